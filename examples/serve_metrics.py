"""Counters and histograms in Prometheus' text format, as much of it as examples/serve.py needs."""

import bisect
import threading
from collections import defaultdict
from collections.abc import Sequence


class Counter:
    """A number that only grows, one for each combination of labels."""

    def __init__(self, name: str, help_text: str, labels: Sequence[str] = ()):
        self.name, self._help, self._labels = name, help_text, tuple(labels)
        self._values: dict[tuple[str, ...], float] = defaultdict(float)
        self._lock = threading.Lock()

    def add(self, *labels: str, amount: float = 1) -> None:
        with self._lock:
            self._values[labels] += amount

    def lines(self) -> list[str]:
        with self._lock:
            values = sorted(self._values.items())
        return [
            f"# HELP {self.name} {self._help}",
            f"# TYPE {self.name} counter",
            *(f"{self.name}{_shown(self._labels, labels)} {value:g}" for labels, value in values),
        ]


class Histogram:
    """How many observations were at most each of some bounds."""

    def __init__(self, name: str, help_text: str, bounds: Sequence[float]):
        self.name, self._help, self._bounds = name, help_text, tuple(bounds)
        self._counts, self._sum = [0] * (len(self._bounds) + 1), 0.0
        self._lock = threading.Lock()

    def observe(self, value: float) -> None:
        with self._lock:
            self._counts[bisect.bisect_left(self._bounds, value)] += 1
            self._sum += value

    def lines(self) -> list[str]:
        with self._lock:
            counts, total = list(self._counts), self._sum
        found, below = [f"# HELP {self.name} {self._help}", f"# TYPE {self.name} histogram"], 0
        for bound, count in zip((*self._bounds, float("inf")), counts, strict=True):
            below += count
            limit = "+Inf" if bound == float("inf") else f"{bound:g}"
            found.append(f'{self.name}_bucket{{le="{limit}"}} {below}')
        return [*found, f"{self.name}_sum {total:g}", f"{self.name}_count {below}"]


class Metrics:
    """What the service counts."""

    def __init__(self):
        seconds = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
        self.requests = Counter("freemerge_requests_total", "Requests answered.", ("status",))
        self.rows = Counter("freemerge_generations_total", "Texts generated.", ("expert",))
        self.prompt_tokens = Counter("freemerge_prompt_tokens_total", "Tokens of prompts.")
        self.new_tokens = Counter("freemerge_new_tokens_total", "Tokens generated.")
        self.batch = Histogram("freemerge_batch_size", "Requests generated together.", (1, 2, 4, 8, 16, 32, 64, 128))
        self.first = Histogram("freemerge_first_token_seconds", "From a request to its first token.", seconds)
        self.whole = Histogram("freemerge_request_seconds", "From a request to its last token.", seconds)

    def text(self, waiting: int) -> str:
        gauge = [
            "# HELP freemerge_waiting_requests Requests that wait for a batch.",
            "# TYPE freemerge_waiting_requests gauge",
            f"freemerge_waiting_requests {waiting}",
        ]
        return "\n".join([line for metric in vars(self).values() for line in metric.lines()] + gauge) + "\n"


def _shown(names: Sequence[str], values: Sequence[str]) -> str:
    def escaped(value: str) -> str:
        return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")

    return "{" + ",".join(f'{n}="{escaped(v)}"' for n, v in zip(names, values, strict=True)) + "}" if names else ""

"""Time on a GPU: events around queued work, inputs that have left the cache, medians."""

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

ROUNDS = 15
AHEAD = 2_000_000  # clock ticks the GPU sleeps while the host queues the work to be timed, launches included


@dataclass(frozen=True)
class Device:
    """What is measured on. Without a GPU the CPU stands in, to test the benchmarks themselves."""

    name: str

    @property
    def real(self) -> bool:
        return torch.device(self.name).type == "cuda"

    @property
    def cache_bytes(self) -> int:
        return torch.cuda.get_device_properties(self.name).L2_cache_size if self.real else 0

    def describe(self) -> dict:
        if not self.real:
            return {"device": "cpu, no GPU"}
        facts = torch.cuda.get_device_properties(self.name)
        return {
            "device": facts.name,
            "multiprocessors": facts.multi_processor_count,
            "memory_gib": round(facts.total_memory / 2**30),
            "capability": f"{facts.major}.{facts.minor}",
            "cuda": torch.version.cuda,
        }

    def seconds(self, run: Callable[..., object], inputs: Sequence[tuple], rounds: int = ROUNDS) -> float:
        """The median of `rounds` calls of run(*inputs[i]), i going round so that no input is still in the cache."""
        for arguments in inputs[:2]:
            run(*arguments)
        clock = self._events if self.real else self._wall
        return statistics.median(clock(run, itertools.islice(itertools.cycle(inputs), rounds)))

    def _events(self, run, inputs) -> list[float]:
        pairs = []
        for arguments in inputs:
            torch.cuda._sleep(AHEAD)
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run(*arguments)
            end.record()
            pairs.append((start, end))
        torch.cuda.synchronize()
        return [start.elapsed_time(end) / 1e3 for start, end in pairs]

    def _wall(self, run, inputs) -> list[float]:
        times = []
        for arguments in inputs:
            start = time.perf_counter()
            run(*arguments)
            times.append(time.perf_counter() - start)
        return times

    def rotated(self, make: Callable[[int], tuple]) -> list[tuple]:
        """make(0), make(1), ...: as many sets of arguments as exceed the cache four times, at least two."""
        first = make(0)
        nbytes = sum(t.nbytes for t in _tensors(first))
        return [first, *(make(seed) for seed in range(1, max(2, 1 + 4 * self.cache_bytes // max(1, nbytes))))]

    def copy_bandwidth(self, nbytes: int = 4 << 30) -> float:
        """Bytes a second, read and written, of a large copy on the device."""
        source = torch.empty(nbytes if self.real else 1 << 20, dtype=torch.uint8, device=self.name).random_()
        target = torch.empty_like(source)
        return 2 * source.nbytes / self.seconds(target.copy_, [(source,)])

    def host_bandwidth(self, nbytes: int = 1 << 30) -> float:
        """Bytes a second from pinned host memory to the device."""
        source = torch.empty(nbytes if self.real else 1 << 20, dtype=torch.uint8, pin_memory=self.real).random_()
        target = torch.empty_like(source, device=self.name, pin_memory=False)
        return source.nbytes / self.seconds(lambda: target.copy_(source, non_blocking=True), [()])


def _tensors(value):
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for part in value:
            yield from _tensors(part)

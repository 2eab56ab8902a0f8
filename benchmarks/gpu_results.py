"""One measured figure of a GPU, its bar, and the table that ends a run."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from results import table


@dataclass(frozen=True)
class Figure:
    """A figure in a unit of its own: a share of a bandwidth, or how many times faster or slower."""

    what: str
    seconds: float
    value: float
    unit: str
    bar: float | None = None
    most: bool = False  # the bar is an upper one
    error: str = ""

    @classmethod
    def of_bytes(
        cls, what: str, nbytes: int, seconds: float, bandwidth: float, bar: float | None, of="copy"
    ) -> "Figure":
        """The share of a bandwidth that moving `nbytes` in `seconds` is."""
        return cls(what, seconds, nbytes / seconds / bandwidth, f"of {of} bandwidth", bar)

    @classmethod
    def against(cls, what: str, ours: float, theirs: float, bar: float | None) -> "Figure":
        return cls(what, ours, theirs / ours, "times as fast", bar)

    @classmethod
    def failed(cls, what: str, error: BaseException) -> "Figure":
        return cls(what, 0.0, 0.0, "", error=f"{type(error).__name__}: {error}")

    @property
    def verdict(self) -> str:
        if self.error:
            return "FAILED"
        if self.bar is None:
            return ""
        met = self.value <= self.bar if self.most else self.value >= self.bar
        return "met" if met else "MISSED"

    def row(self) -> tuple[str, ...]:
        if self.error:
            return self.what, "", self.error.splitlines()[0][:80], "", self.verdict
        bar = "" if self.bar is None else f"{'<=' if self.most else '>='} {self.bar:g}"
        return self.what, f"{self.seconds * 1e3:.3f}", f"{self.value:.2f} {self.unit}", bar, self.verdict


def printed(figures: Sequence[Figure]) -> str:
    return table(["what", "ms", "measured", "bar", ""], [figure.row() for figure in figures])


def write_json(path: Path, machine: dict, bandwidths: dict, figures: Sequence[Figure]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    facts = {**machine, "bandwidths": bandwidths, "figures": [{**asdict(f), "verdict": f.verdict} for f in figures]}
    path.write_text(json.dumps(facts, indent=2) + "\n")

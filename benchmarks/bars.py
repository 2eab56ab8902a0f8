"""The bars freemerge has set itself, and how far a run stayed below them."""

from collections.abc import Mapping
from dataclasses import dataclass

START_UP_SECONDS = 0.4
PEAK_BYTES = 2 * 2**30
GROWTH = 1.2  # of the cost of a byte, from the cheapest point of a series to the dearest


@dataclass(frozen=True)
class Bar:
    times_floor: float
    peer: str | None = None
    times_peer: float = 0.0


BARS = {
    "task_arithmetic": Bar(1.5, "mergekit task_arithmetic", 15),
    "average": Bar(1.5, "mergekit average", 15),
    "fr": Bar(3, "official fr", 80),
    "fr_align": Bar(8, "official fr_align", 40),
    "free": Bar(7, "official free", 60),
    "ties": Bar(5, "mergekit ties", 40),
    "breadcrumbs_ties": Bar(5, "mergekit breadcrumbs_ties", 40),
    "ties_merging": Bar(7),
    "dare_ties": Bar(6, "mergekit dare_ties", 25),
    "della": Bar(6, "mergekit della", 25),
    "sce": Bar(4, "mergekit sce", 12),
    "model_stock": Bar(4, "mergekit model_stock", 12),
    "slerp": Bar(4, "mergekit slerp", 12),
    "nuslerp": Bar(4, "mergekit nuslerp", 12),
    "pcb": Bar(10),
    "emr": Bar(6),
}


def judge(seconds: Mapping[str, float], floors: Mapping[str, float], peaks: Mapping[str, int]) -> list[tuple[str, ...]]:
    """(what, bar, measured, verdict) of every bar there is a measurement for."""
    found = []
    for what in ("--help", "methods"):
        if what in seconds:
            found.append(at_most(f"start-up: freemerge {what}", seconds[what], START_UP_SECONDS, " s"))
    for what, bar in BARS.items():
        if what not in seconds:
            continue
        found.append(at_most(what, seconds[what] / floors[what], bar.times_floor, " x floor"))
        if bar.peer in seconds:
            faster = seconds[bar.peer] / seconds[what]
            found.append(at_least(what, faster, bar.times_peer, f" x faster than {bar.peer}"))
        found.append(at_most(f"{what}: peak anonymous memory", peaks[what] / 2**30, PEAK_BYTES / 2**30, " GiB"))
    return found


def at_most(what: str, measured: float, bar: float, unit: str) -> tuple[str, ...]:
    verdict = "met" if measured <= bar else f"missed: {measured / bar:.2f} of the bar"
    return what, f"<= {bar:g}{unit}", f"{measured:.2f}{unit}", verdict


def at_least(what: str, measured: float, bar: float, unit: str) -> tuple[str, ...]:
    verdict = "met" if measured >= bar else f"missed: {measured / bar:.2f} of the bar"
    return what, f">= {bar:g}{unit}", f"{measured:.1f}{unit}", verdict

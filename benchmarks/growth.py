"""Does a byte cost the same with more experts, and in a larger model?"""

import bars
import results
from commands import merge_command
from session import Session, gigabytes

METHODS = ("task_arithmetic", "fr", "fr_align", "free")
EXPERTS, EXPERTS_SIZE = (1, 2, 4, 8), 0.25
SIZES, SIZES_EXPERTS = (0.25, 0.5, 1.0), 3
SERIES = {
    "experts": [(experts, EXPERTS_SIZE, experts) for experts in EXPERTS],
    "size": [(size, size, SIZES_EXPERTS) for size in SIZES],
}


def row_name(name: str, series: str, value: float) -> str:
    return f"{name}, {series} = {value:g}"


def measure_growth(session: Session) -> None:
    for series, points in SERIES.items():
        for value, part, experts in points:
            size = part * session.options.size
            model = session.prepare(size, experts)
            for _ in range(session.options.repeats):
                for name in METHODS:
                    command = merge_command(session.options.freemerge, name, model, session.out)
                    session.time_merge(row_name(name, series, value), command, name, model)
            for name in METHODS:
                moved = gigabytes(model, name)
                session.keep(row_name(name, series, value), size=size, experts=experts, gigabytes=moved, notes="growth")


def growth_tables(session: Session) -> list[str]:
    """Seconds for 10^9 bytes read or written along each series that was measured to its end."""
    cost = {
        row.what: float(row.seconds) / float(row.gigabytes) for row in session.rows if row.notes.startswith("growth")
    }
    found = []
    for series, points in SERIES.items():
        values = [value for value, _, _ in points]
        lines = []
        for name in METHODS:
            costs = [cost[what] for value in values if (what := row_name(name, series, value)) in cost]
            if len(costs) == len(values):
                lines.append((name, *(f"{c:.3f}" for c in costs), verdict(costs)))
        if lines:
            head = ["s for 10^9 bytes moved", *(f"{series} {value:g}" for value in values), "flat within 20 %?"]
            found.append(results.table(head, lines))
    return found


def verdict(costs: list[float]) -> str:
    """Of costs in order of growth: a byte that gets cheaper is said so, one that gets dearer is a bar missed."""
    spread, rise = max(costs) / min(costs), max(costs) / costs[0]
    if spread <= bars.GROWTH:
        return f"met ({spread - 1:.0%})"
    return (
        f"met: falls by {1 - min(costs) / costs[0]:.0%}" if rise <= bars.GROWTH else f"missed: rises by {rise - 1:.0%}"
    )

"""The C++ versions of the ops, under the names of the ops mostly with the signatures of their references.

Arguments are positional, checked by the ops' front doors. `bounds` and `workspace` are those of
kernels/_high_pass_plan.py.
"""

from collections.abc import Sequence

from freemerge.kernels.array import Array
from freemerge.kernels.magnitude_threshold import Threshold
from freemerge.kernels.sparse_rows import Selection

def isa() -> str: ...
def threads() -> int: ...
def set_threads(count: int) -> None: ...
def add_balanced(
    base: Array,
    experts: Sequence[Array],
    lows: Sequence[float],
    highs: Sequence[float],
    floors: Sequence[float],
    tops: Sequence[float],
    weights: Sequence[float],
    normalized: bool,
    out: Array,
) -> None: ...
def add_elected(
    base: Array, task_vectors: Sequence[Array], weights: Sequence[float], scaling: float, normalize: bool, out: Array
) -> None: ...
def add_expert_products(
    x: Array,
    offsets: Sequence[Array],
    columns: Sequence[Array],
    values: Sequence[Array],
    scales: Sequence[float],
    weights: Array,
    out: Array,
) -> None: ...
def add_masked(
    base: Array,
    experts: Sequence[Array],
    masks: Sequence[Array | None],
    weights: Sequence[float],
    votes: Sequence[float] | None,
    shares: Sequence[float] | None,
    least: float,
    scaling: float,
    out: Array,
) -> None: ...
def add_masked_vector(array: Array, vector: Array, mask: Array, scale: float, out: Array) -> None: ...
def add_scaled_rows(base: Array | None, arrays: Sequence[Array], weights: Array, lines: str, out: Array) -> None: ...
def add_task_vectors(base: Array, experts: Sequence[Array], weights: Sequence[float], out: Array) -> None: ...
def add_trimmed(
    base: Array,
    experts: Sequence[Array],
    floors: Sequence[float],
    zeros: int,
    combination: str,
    scaling: float,
    out: Array,
) -> None: ...
def all_finite(array: Array) -> bool: ...
def apply_sparse_rows(
    array: Array,
    offsets: Array,
    columns: Array,
    values: Array,
    scale: float,
    start: Array | None,
    out: Array,
    kept: Array | None,
) -> None: ...
def balance_scores(
    base: Array, experts: Sequence[Array], lows: Sequence[float], highs: Sequence[float], normalized: bool, out: Array
) -> None: ...
def count_magnitudes(base: Array | None, expert: Array, value: float) -> tuple[int, int]: ...
def count_range(
    base: Array | None, expert: Array, lows: Sequence[int], shifts: Sequence[int], bins: int, magnitudes: bool
) -> Array: ...
def dot_products(base: Array | None, arrays: Sequence[Array], lines: str) -> Array: ...
def drop_mask(
    base: Array | None, expert: Array, density: float, epsilon: float, key: tuple[int, int], out: Array
) -> None: ...
def fusion_importance(base: Array, expert: Array, out: Array) -> None: ...
def magnitude_mask(
    base: Array | None, expert: Array, lower: Threshold, upper: Threshold | None, out: Array
) -> None: ...
def magnitude_threshold(
    bases: Sequence[Array | None], experts: Sequence[Array], rank: int, scope: str
) -> tuple[Array, Array]: ...
def mask_statistics(base: Array | None, expert: Array, mask: Array) -> tuple[float, float, float, float]: ...
def near_swap(base: Array, expert: Array, t: float, out: Array) -> None: ...
def put_entries(array: Array, offsets: Array, columns: Array, entries: Array) -> None: ...
def sign_majority(base: Array, experts: Sequence[Array], floors: Sequence[float]) -> int: ...
def sparse_rows(
    base: Array | None, expert: Array, first: int, last: int | None, scope: str, within: Selection | None
) -> tuple[Array, Array, Array]: ...
def task_vector_statistics(base: Array | None, experts: Sequence[Array]) -> Array: ...
def task_vector_variance(base: Array, experts: Sequence[Array], out: Array) -> None: ...
def high_pass(
    base: Array | None,
    experts: Sequence[Array],
    weights: Sequence[float],
    form: str,
    axis: int,
    stored: bool,
    bounds: object,
    add_base: bool,
    workspace: object,
    out: Array,
) -> None: ...
def high_pass_magnitudes(
    base: Array | None, experts: Sequence[Array], form: str, axis: int, stored: bool, bounds: object, workspace: object
) -> Array: ...
def release_scratch() -> None: ...
def unified_vector(base: Array, experts: Sequence[Array], masks: Sequence[Array], out: Array) -> Array: ...
def weighted_sum(arrays: Sequence[Array], weights: Sequence[float], out: Array) -> None: ...

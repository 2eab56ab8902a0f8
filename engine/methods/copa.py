"""CoPA-Merging (RobustMerge): LoRA adapters merged factor by factor, weak directions scaled up, into one adapter."""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from freemerge.checkpoint.torch_arrays import placed_like
from freemerge.errors import RecipeError
from freemerge.kernels.array import Array, is_tensor, task_vector
from freemerge.kernels.magnitude_threshold import magnitude_threshold
from freemerge.kernels.weighted_sum import weighted_sum
from freemerge.lora_names import Part, is_factor, part_of
from freemerge.methods import TensorPlan
from freemerge.methods._task_vectors import DENSE, namespace

SCOPE = "model"
SOURCE = "RobustMerge (CoPA-Merging), Zeng et al. 2025, arXiv:2502.17159; METHODS.md section 11"
USES_BASE = False
MERGES_ADAPTERS = True


def merge_tensor(
    base: None,
    experts: Sequence[Array],
    *,
    name: str,
    mask_ratio: float = 0.2,
    att_ratio: float = 0.2,
    fuse_weight: float = 2.0,
    settled: Mapping[str, np.ndarray],
    out: Array,
) -> None:
    """Write a factor of the merged adapter, or the mean of a tensor that is none.

        A       = fuse_weight * sum_t trim(A_t)
        B[:, i] = fuse_weight * sum_t c_t[i] trim(B_t)[:, i] / sum_t c_t[i]

    trim keeps the entries of a factor that are largest in magnitude. S_t[i] = sum |A_t[i]| / sum |trim(A_t)[i]| of a
    row i, and c_t is S_t with its lower values raised to the order statistic at 1 - att_ratio. Where nothing of a row
    is kept, S is the largest of that adapter's other rows, 1 if there are none.

    Both factors are multiplied, so the update is by fuse_weight squared, and A of one adapter meets B of another: that
    is the method. lora_alpha / r stays as it is.

    Args:
        mask_ratio: share of the entries of a factor that are kept; the official code's name for it.
        att_ratio: share of the rows that keep a coefficient of their own.
        fuse_weight: what each factor is multiplied by.
    """
    part = part_of(name)
    if not is_factor(name):
        weighted_sum(experts, [1 / len(experts)] * len(experts), out=out)
        return
    trimmed = (_trimmed(expert, mask_ratio) for expert in experts)
    if part.part.endswith("_A"):
        total = sum(trimmed)
    else:
        weights = settled[_pair(part)]
        weights = weights / weights.sum(0)
        total = sum(_by_columns(factor, column) for factor, column in zip(trimmed, weights, strict=True))
    weighted_sum([total], [fuse_weight], out=out)


def measure_tensor(
    base: None, experts: Sequence[Array], *, name: str, mask_ratio: float, att_ratio: float, **_
) -> np.ndarray:
    """[T, r]: c_t of the rows of an A; [T, 0] of another tensor."""
    if not is_factor(name) or not part_of(name).part.endswith("_A"):
        return np.zeros((len(experts), 0))
    return np.array([_coefficients(expert, mask_ratio, att_ratio) for expert in experts])


def settle(statistics: Mapping[str, np.ndarray], **_) -> dict[str, np.ndarray]:
    """The coefficients of every module, by what its two factors have in common."""
    return {_pair(part_of(name)): found for name, found in statistics.items() if found.shape[1]}


def plan_tensor(
    name: str, shape: tuple[int, ...], *, experts: int, mask_ratio: float, att_ratio: float, **_
) -> TensorPlan:
    for key, value in (("mask_ratio", mask_ratio), ("att_ratio", att_ratio)):
        if not 0 <= value <= 1:
            raise RecipeError(f"{key} is {value}; it is a share, from 0 to 1")
    if not is_factor(name):
        return TensorPlan("merge", "mean", elementwise=True)
    done = "largest entries, summed" if part_of(name).part.endswith("_A") else "largest entries, weighted by A's"
    return TensorPlan("merge", done, 4 * DENSE * math.prod(shape))


def _pair(part: Part) -> str:
    return f"{part.module}.{part.part[:-2]}"


def _trimmed(factor: Array, share: float) -> Array:
    """float32: the largest entries, as many as the official code keeps, and all that equal the smallest of them."""
    values = task_vector(None, factor)
    n = math.prod(values.shape)
    dropped = int(n * (1 - share))
    if dropped == 0:
        return values
    floor = float(magnitude_threshold([None], [values], n - dropped + 1).values[0])
    return namespace(values).where(abs(values) < floor, 0, values)


def _coefficients(factor: Array, mask_ratio: float, att_ratio: float) -> np.ndarray:
    """c of one A, float64 [r]."""
    whole, kept = (_row_sums(array) for array in (task_vector(None, factor), _trimmed(factor, mask_ratio)))
    with np.errstate(invalid="ignore"):  # of infinity, which has to be found
        found = np.divide(whole, kept, out=np.full(len(whole), np.nan), where=kept > 0)
    if not len(found):
        return found
    some = found[kept > 0]
    # of NaN nothing is kept, and it has to be found
    found[kept == 0] = (some.max() if some.size else 1.0) + 0 * whole[kept == 0]
    ranked = np.sort(found)
    return np.clip(found, ranked[min(int(len(found) * (1 - att_ratio)), len(found) - 1)], ranked[-1])


def _row_sums(matrix: Array) -> np.ndarray:
    rows = abs(matrix.reshape(len(matrix), -1))
    return rows.double().sum(1).cpu().numpy() if is_tensor(rows) else rows.sum(1, dtype=np.float64)


def _by_columns(factor: Array, column: np.ndarray) -> Array:
    """B with its columns, the second dimension, multiplied."""
    return factor * placed_like(column.astype(np.float32), factor).reshape(1, -1, *(1 for _ in factor.shape[2:]))

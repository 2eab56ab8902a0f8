"""What the methods share that keep some entries of every task vector and add these up: masks, draws, rescaling."""

from collections.abc import Sequence

from freemerge.errors import RecipeError
from freemerge.kernels._masks import empty_mask, mask_bytes
from freemerge.kernels.add_masked import add_masked
from freemerge.kernels.array import Array, rows_of
from freemerge.kernels.drop_mask import draw_key, drop_mask
from freemerge.kernels.magnitude_mask import magnitude_mask
from freemerge.kernels.magnitude_threshold import magnitude_threshold
from freemerge.kernels.mask_statistics import mask_statistics
from freemerge.methods import TensorPlan
from freemerge.methods._coefficients import coefficients, per_expert

ADDITION = 0.8  # nanoseconds an element and input, of one core
RANKING = 1.5  # of finding a threshold and writing the mask
NO_NORM = 1e-7  # mergekit: a smaller sum of magnitudes is not rescaled


def ranked_mask(base: Array | None, expert: Array, first: int, last: int, selection: str = "tensor") -> Array | None:
    """The mask of the entries of rank first ... last - 1 by magnitude, 0 the largest; None where these are all.

    Args:
        selection: rank over the whole "tensor", or within each "row" (slices along the last dimension).
    """
    rows, width = rows_of(expert.shape)
    if first == 0 and last == (width if selection == "row" else rows * width):
        return None
    scope = "row" if selection == "row" else "model"
    lower, upper = (magnitude_threshold([base], [expert], rank, scope=scope) for rank in (last, first))
    mask = empty_mask(expert)
    magnitude_mask(base, expert, lower, upper if first else None, out=mask)
    return mask


def crumb_masks(
    base: Array,
    experts: Sequence[Array],
    density: float | Sequence[float],
    gamma: float | Sequence[float],
    selection: str,
) -> list[Array | None]:
    """Masks of the int(density * n) entries that follow on the int(gamma * n) largest, n of a tensor or of a row."""
    shares = zip(experts, per_expert(density, len(experts)), per_expert(gamma, len(experts)), strict=True)
    return [_crumb_mask(base, expert, *own, selection) for expert, *own in shares]


def _crumb_mask(base: Array, expert: Array, density: float, gamma: float, selection: str) -> Array | None:
    if density >= 1 or (selection == "row" and expert.shape == ()):  # a single number is no row of them
        return None
    rows, width = rows_of(expert.shape)
    n = width if selection == "row" else rows * width
    count = max(0, int(density * n))
    first = min(int(gamma * n), n - count)  # mergekit: where they do not fit, the largest are not left out
    return ranked_mask(base, expert, first, first + count, selection)


def drawn_masks(
    base: Array,
    experts: Sequence[Array],
    name: str,
    density: float | Sequence[float],
    epsilon: float | Sequence[float] = 0.0,
    *,
    seed: int,
) -> list[Array | None]:
    """Masks of random draws for the experts' tensors of this name; None where everything is kept."""
    shares = zip(experts, per_expert(density, len(experts)), per_expert(epsilon, len(experts)), strict=True)
    return [_drawn_mask(base, expert, *own, draw_key(seed, name, t)) for t, (expert, *own) in enumerate(shares)]


def _drawn_mask(base: Array, expert: Array, density: float, epsilon: float, key: tuple[int, int]) -> Array | None:
    if density >= 1:
        return None
    mask = empty_mask(expert)
    if density <= 0:
        mask[...] = 0
    else:
        drop_mask(base, expert, density=density, epsilon=epsilon, key=key, out=mask)
    return mask


def add_kept(
    base: Array,
    experts: Sequence[Array],
    masks: Sequence[Array | None],
    *,
    weights: Sequence[float],
    scaling: float,
    normalize: bool,
    rescale: bool,
    elect: bool,
    out: Array,
) -> None:
    """Write base + scaling * the weighted sum of the kept entries, of those of the elected sign if `elect`.

    `rescale` brings the sum of magnitudes of what is kept back to that of the task vector. `normalize` divides by the
    sum of the weights; with `elect`, of those that agree.
    """
    factors = [_rescaled(base, *pair) if rescale else 1.0 for pair in zip(experts, masks, strict=True)]
    if elect:
        votes = [weight * factor for weight, factor in zip(weights, factors, strict=True)]
        shares = weights if normalize else None
        return add_masked(base, experts, masks, votes, votes=votes, shares=shares, scaling=scaling, out=out)
    numbers = zip(coefficients(weights, 1.0, normalize), factors, strict=True)
    return add_masked(base, experts, masks, [weight * factor for weight, factor in numbers], scaling=scaling, out=out)


def _rescaled(base: Array, expert: Array, mask: Array | None) -> float:
    if mask is None:
        return 1.0
    found = mask_statistics(base, expert, mask)
    return found.sum_abs / found.kept_abs if min(found.sum_abs, found.kept_abs) >= NO_NORM else 1.0


def plan_masked(action: str, shape: tuple[int, ...], experts: int, sweeps: float = RANKING) -> TensorPlan:
    """The plan of a sum under masks: what they take of memory, and about how long."""
    size = 1
    for side in shape:
        size *= side
    cost = size * (ADDITION * (experts + 1) + 2 * sweeps * experts)
    return TensorPlan("merge", action, experts * mask_bytes(size), cost)


def check_share(name: str, values: Sequence[float]) -> None:
    """Raise RecipeError for what is no share of the entries."""
    for value in values:
        if not 0 <= value <= 1:
            raise RecipeError(f"{name}: {value} is not a share of the entries; give a number from 0 to 1")


def check_draw(densities: Sequence[float], epsilons: Sequence[float]) -> None:
    """Raise RecipeError where a probability between density - epsilon and density + epsilon is none."""
    for density, epsilon in zip(densities, epsilons, strict=True):
        if 0 < density < 1 and not (epsilon >= 0 and density - epsilon > 0 and density + epsilon < 1):
            raise RecipeError(
                f"epsilon: with density {density} and epsilon {epsilon} probabilities go from {density - epsilon:g} to "
                f"{density + epsilon:g}; choose a smaller epsilon"
            )


def check_experts(method: str, experts: int, exactly: int = 0, at_least: int = 1) -> None:
    """Raise RecipeError where the method takes another number of experts."""
    if exactly and experts != exactly:
        noun = "expert" if exactly == 1 else "experts"
        raise RecipeError(f"models: {method} merges exactly {exactly} {noun} beside the base, not {experts}")
    if experts < at_least:
        raise RecipeError(f"models: {method} merges at least {at_least} experts, not {experts}")

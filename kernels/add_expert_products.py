"""add_expert_products: what sparse experts add to the product of a linear layer, each to its own rows of a batch."""

from collections.abc import Sequence

import numpy as np

from freemerge.errors import ShapeError
from freemerge.kernels.apply_sparse_rows import check_rows
from freemerge.kernels.array import Array, SparseRows, dtype_of, store
from freemerge.kernels.checks import check_count, check_float, check_place
from freemerge.kernels.dispatch import implementation


def add_expert_products(
    x: Array, experts: Sequence[SparseRows], scales: Sequence[float], weights: Array, *, out: Array
) -> None:
    """Add to `out`, the product of a layer's weights with `x`, that of the experts' sparse rows.

        out[i, r] = round( out[i, r] + sum_e (weights[g, e] * scales[e]) * sum_k value[k] * x[i, column[k]] )

    with k over the entries of row r of expert e, and g = i // (n / G) the group token i is in. All of it is float32,
    entries in their order, experts in theirs, with one rounding (and one more addition in float64 where `out` is).
    Experts of weight 0 are left out; a token with no other keeps what it has, bit for bit. The result of a token does
    not depend on what other tokens there are.

    Args:
        x: [n, width], any float dtype, contiguous: tokens.
        experts: E sparse rows of one shape [H, width].
        scales: E numbers.
        weights: [G, E] float32, G a divisor of n: the first n / G tokens have the first row of weights, and so on.
            One 1 in a row of zeros is an expert chosen; other numbers mix them.
        out: [n, H], any float dtype, contiguous; changed in place.

    Raises:
        ShapeError: arrays do not fit together.

    Source: METHODS.md sections 1.5 and 1.8, the hard and the soft router.
    """
    check_float("x", x)
    check_float("out", out)
    check_place("x", x, "out", out)
    check_place("x", x, "weights", weights)
    check_count("scales", scales, len(experts), "experts")
    if len(x.shape) != 2 or len(out.shape) != 2 or x.shape[0] != out.shape[0]:
        raise ShapeError(f"x is {list(x.shape)} and out {list(out.shape)}, not [n, width] and [n, H]")
    for rows in experts:
        check_place("x", x, "experts", rows.values)
        check_rows(rows, (out.shape[1], x.shape[1]))
    if dtype_of(weights) != np.float32 or len(weights.shape) != 2 or weights.shape[1] != len(experts):
        raise ShapeError(f"weights are {weights.dtype} {list(weights.shape)}, not float32 [groups, {len(experts)}]")
    if weights.shape[0] == 0 or x.shape[0] % weights.shape[0]:
        if x.shape[0]:
            raise ShapeError(f"{weights.shape[0]} rows of weights for {x.shape[0]} tokens, of which each has as many")
        return
    multiply_experts(x, experts, scales, weights, out)


def multiply_experts(x: Array, experts: Sequence[SparseRows], scales: Sequence[float], weights: Array, out: Array):
    """The same of arrays that were checked before."""
    run = implementation("add_expert_products", x) or add_expert_products_reference
    arrays = ([getattr(rows, name) for rows in experts] for name in ("offsets", "columns", "values"))
    run(x, *arrays, list(map(float, scales)), weights, out)


def add_expert_products_reference(
    x: Array,
    offsets: Sequence[Array],
    columns: Sequence[Array],
    values: Sequence[Array],
    scales: Sequence[float],
    weights: Array,
    out: Array,
) -> None:
    tokens, weights = x.astype(np.float32), np.repeat(weights, len(x) // len(weights), axis=0)
    total = np.zeros(out.shape, np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        for e in range(len(offsets)):
            mine = np.flatnonzero(weights[:, e])
            product = _product(tokens[mine], offsets[e], columns[e], values[e])
            total[mine] += (weights[mine, e] * np.float32(scales[e]))[:, None] * product
        touched = np.flatnonzero((weights != 0).any(axis=1))
        result = np.empty((len(touched), out.shape[1]), out.dtype)
        store((out[touched] if out.dtype == np.float64 else out[touched].astype(np.float32)) + total[touched], result)
    out[touched] = result


def _product(tokens: Array, offsets: Array, columns: Array, values: Array) -> Array:
    """tokens times the sparse rows, [n, H], entries one after the other."""
    product = np.zeros((len(tokens), len(offsets) - 1), np.float32)
    lengths = np.diff(offsets)
    for position in range(lengths.max(initial=0)):
        rows = np.flatnonzero(lengths > position)
        entries = offsets[rows] + position
        product[:, rows] += values[entries] * tokens[:, columns[entries]]
    return product

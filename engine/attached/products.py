"""What experts add to a layer's answer for its input, by the kind of their parts; the layer's weights stay as they are.

Everything here works on torch tensors without gradients, on the CPU through NumPy views of their memory. Answers are
added up in float32 and rounded once.
"""

import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from freemerge.attached.in_place import as_array, as_host, on_host
from freemerge.checkpoint.torch_arrays import as_tensor, placed_like
from freemerge.kernels.add_expert_products import multiply_experts
from freemerge.kernels.apply_sparse_rows import apply_sparse_rows
from freemerge.kernels.array import Array, SparseRows, column_dtype, dtype_of, empty, is_tensor, rows_of
from freemerge.parts import Difference, LowRank, Part, Rows, apply_parts


def add_linear(x: Any, out: Any, parts: Sequence[tuple[int, Part, float]], weights: Array, *, transposed: bool) -> None:
    """out[i] += sum over parts of weight * scale * (part x[i]).

    Args:
        x: [n, width]; out: [n, H], contiguous, changed in place.
        parts: (expert, part, scale); a part is [H, width], or [width, H] where `transposed`.
        weights: float32 [G, E], G a divisor of n, where x lies.
    """
    sparse = [(e, part, scale) for e, part, scale in parts if isinstance(part, Rows)]
    if sparse:
        chosen = _contiguous(columns_of(weights, [e for e, _, _ in sparse]))
        rows = [turned(part) if transposed else part for _, part, _ in sparse]
        multiply_experts(as_array(x), rows, [scale for *_, scale in sparse], chosen, as_array(out))
    others = [(e, part, scale) for e, part, scale in parts if not isinstance(part, Rows)]
    if others:
        groups = as_tensor(columns_of(weights, [e for e, _, _ in others])).to(out.device)
        each = groups.repeat_interleave(len(x) // len(groups), 0)
        add_chosen(x, out, [(part, scale) for _, part, scale in others], each, transposed)


def columns_of(weights: Array, columns: Sequence[int]) -> Array:
    """Those of the experts; columns go to a GPU for it, so all are taken as they are."""
    return weights[:, columns] if len(columns) < weights.shape[1] else weights


def add_chosen(x: Any, out: Any, parts: Sequence[Sequence], weights: Any, transposed: bool = False) -> None:
    """out[i] += sum over e of weights[i, e] * scale * (part e of x[i]); a part meets only tokens that weigh it.

    Args:
        x: [n, width]; out: [n, H], changed in place.
        parts: E (part, scale), each [H, width], or [width, H] where `transposed`; of kinds other than rows.
        weights: float32 [n, E].
    """
    torch, shares = sys.modules["torch"], weights.T
    expert, token = shares.nonzero(as_tuple=True)
    counts = torch.bincount(expert, minlength=len(parts)).tolist()
    factors = shares[expert, token][:, None]
    total = out if out.dtype in (torch.float32, torch.float64) else out.float()
    # one expert after the other, as the order of sums would be any on a GPU
    for (part, scale), mine, factor in zip(parts, token.split(counts), factors.split(counts), strict=True):
        if len(mine):
            total.index_add_(0, mine, _product(x[mine].float(), part, factor * scale, transposed).to(total.dtype))
    if total is not out:
        out.copy_(total)


def add_rows(ids: Any, out: Any, parts: Sequence[tuple[int, Part, float]], weights: Array) -> None:
    """out[i] += sum over parts of weight * scale * (row ids[i] of the part).

    Args:
        ids: [n] integers; out: [n, width], contiguous, changed in place.
        parts: (expert, part, scale), each [rows, width].
    """
    total = out.float() if parts else out
    for e, part, scale in parts:
        mine, share = _share(weights, e, len(ids), out.device)
        if len(mine):
            add_part_rows(total, mine, ids[mine], part, share * scale)
    if total is not out:
        out.copy_(total)


def add_part_rows(total: Any, mine: Any, ids: Any, part: Part, factors: Any) -> None:
    """total[mine[i]] += factors[i] * (row ids[i] of the part)."""
    if not isinstance(part, Rows):
        chosen = (
            dense(part)[ids] if not isinstance(part, LowRank) else as_tensor(part.left)[ids] @ as_tensor(part.right)
        )
        total.index_add_(0, mine, chosen * factors[:, None])
    elif on_host(total):
        _add_entries_on_host(*map(as_array, (total, mine, ids)), part, as_array(factors))
    else:
        _add_entries(total, mine, ids, part, factors)


def _add_entries(total: Any, mine: Any, ids: Any, part: Rows, factors: Any) -> None:
    torch, begin = sys.modules["torch"], part.offsets[ids]
    counts = part.offsets[ids + 1] - begin
    token = torch.repeat_interleave(torch.arange(len(ids), device=ids.device), counts)
    entry = torch.arange(len(token), device=ids.device) + (begin - counts.cumsum(0) + counts)[token]
    columns = part.columns.to(torch.int64)[entry]
    # of one expert, no place comes twice: nothing depends on the order
    total.index_put_((mine[token], columns), part.values[entry] * factors[token], accumulate=True)


def _add_entries_on_host(total: Array, mine: Array, ids: Array, part: Rows, factors: Array) -> None:
    """The same in NumPy, whose calls take a tenth of torch's: a batch looks up few entries."""
    begin = part.offsets[ids]
    counts = part.offsets[ids + 1] - begin
    token = np.repeat(np.arange(len(ids)), counts)
    entry = np.arange(len(token)) + (begin - counts.cumsum() + counts)[token]
    total[mine[token], part.columns[entry]] += part.values[entry] * factors[token]


def changed(tensor: Any, parts: Sequence[tuple[Part, float]]) -> Any:
    """A new tensor: `tensor` with parts added, one rounding; one part alone as it is in place, to the bit."""
    out = sys.modules["torch"].empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
    apply_parts(as_array(tensor.detach().contiguous()), parts, out=as_array(out))
    return out


def additive(part: Part, scale: float, tensor: Any) -> tuple[Part, float]:
    """A part that replaces entries as one that is added, and the scale it then has; others as they are."""
    if not isinstance(part, Rows) or part.start is None:
        return part, scale
    before = part.gather(as_array(tensor.detach().contiguous()))
    after = empty((part.count,), dtype_of(before), before)
    apply_sparse_rows(before, _in_a_line(part), scale, start=part.start, out=after)
    return replace(part, values=_float32(after) - _float32(before), start=None), 1.0


def _in_a_line(part: Rows) -> SparseRows:
    """The entries alone, as an array of as many."""
    columns = np.arange(part.count, dtype=column_dtype(part.count))
    line = SparseRows(np.array([0, part.count]), columns, part.values, (part.count,))
    if not is_tensor(part.values):
        return line
    return replace(line, offsets=placed_like(line.offsets, part.values), columns=placed_like(line.columns, part.values))


def turned(rows: Rows) -> Rows:
    """The transpose of a matrix of sparse rows."""
    if is_tensor(rows.values):
        return turned(rows.moved(as_host)).moved(lambda array: placed_like(array, rows.values))
    height, width = rows_of(rows.shape)
    order = np.argsort(rows.columns, kind="stable")
    row = np.repeat(np.arange(height, dtype=np.uint32), np.diff(rows.offsets))[order]
    offsets = np.concatenate([[0], np.cumsum(np.bincount(rows.columns, minlength=width))]).astype(np.int64)
    columns = row.astype(column_dtype(height))
    return Rows(offsets, columns, rows.values[order], (width, height))


def dense(part: Part) -> Any:
    """The part alone, float32, as a tensor that nobody may write to."""
    torch = sys.modules["torch"]
    if isinstance(part, Difference):
        return as_tensor(part.difference).view(tuple(part.shape))
    first = next(iter(part.arrays.values()))
    out = torch.zeros(tuple(part.shape), device=first.device if is_tensor(first) else "cpu")
    part.apply(as_array(out), 1.0, out=as_array(out))
    return out


def _product(x: Any, part: Part, factors: Any, transposed: bool) -> Any:
    """factors[i] * (part x[i]), float32 [n, H]."""
    if isinstance(part, LowRank):
        left, right = as_tensor(part.left), as_tensor(part.right)
        first, second = (left, right) if transposed else (right.T, left.T)
        return (x @ first).mul_(factors) @ second
    matrix = dense(part)
    return (x @ (matrix if transposed else matrix.T)).mul_(factors)


def _float32(array: Array) -> Array:
    return array.float() if is_tensor(array) else array.astype(np.float32)


def _share(weights: Array, expert: int, n: int, device) -> tuple[Any, Any]:
    """The tokens that use an expert, and how much."""
    column, each = weights[:, expert], n // len(weights)
    if not is_tensor(column):
        groups = np.flatnonzero(column)
        mine, share = (groups[:, None] * each + np.arange(each)).reshape(-1), np.repeat(column[groups], each)
        return as_tensor(mine).to(device), as_tensor(share).to(device)
    groups = column.nonzero()[:, 0]
    mine = (groups[:, None] * each + sys.modules["torch"].arange(each, device=device)).reshape(-1)
    return mine, column[groups].repeat_interleave(each)


def _contiguous(weights: Array) -> Array:
    return weights.contiguous() if is_tensor(weights) else np.ascontiguousarray(weights)

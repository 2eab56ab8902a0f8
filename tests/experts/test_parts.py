"""A part of every kind is added as its definition says, whole, in runs of rows, and to others, with one rounding."""

import numpy as np
import pytest

from freemerge.errors import ShapeError
from freemerge.kernels._masks import pack_mask
from freemerge.kernels.array import FLOATS, store
from freemerge.kernels.sparse_rows import sparse_rows
from freemerge.parts import KINDS, Cut, Difference, LowRank, Mask, QuantizedRows, Rows, apply_parts
from freemerge.testing import poisoned, random_array

SHAPES = [(9, 13), (40,), (3, 2, 5), (), (0, 4), (1, 3)]
KIND_NAMES = tuple(KINDS)


def part_of(kind, shape, seed=0):
    vector = random_array(shape, np.float32, seed)
    if kind == "rows":
        return Rows.cut(sparse_rows(None, vector, last=vector.size // 3))
    if kind == "quantized_rows":
        return QuantizedRows.quantized(part_of("rows", shape, seed), np.dtype(np.int8))
    if kind == "mask":
        return Mask(pack_mask(np.random.default_rng(seed).random(shape) < 0.5), vector, shape)
    if kind == "difference":
        return Difference(vector, shape)
    height, width = LowRank.planned(shape, 1).arrays["left"][1][0], LowRank.planned(shape, 1).arrays["right"][1][1]
    return LowRank(random_array((height, 3), np.float32, seed), random_array((3, width), np.float32, seed + 1), shape)


def dense(part):
    """The part as float32 numbers, by its definition."""
    if part.kind == "rows":
        return part.to_dense()
    if part.kind == "quantized_rows":
        out = np.zeros((len(part.lengths), part.shape[-1] if part.shape else 1), np.float32)
        begin = 0
        for row, length in enumerate(part.lengths):
            entries = slice(begin, begin := begin + int(length))
            out[row, part.columns[entries]] = part.values[entries].astype(np.float32) * part.row_scales[row]
        return out.reshape(part.shape)
    if part.kind == "mask":
        bits = np.unpackbits(part.mask, count=part.vector.size, bitorder="little").reshape(part.shape)
        return np.where(bits, part.vector, np.float32(0))
    if part.kind == "difference":
        return part.difference
    return (part.left.astype(np.float64) @ part.right.astype(np.float64)).astype(np.float32).reshape(part.shape)


def expected(array, weighted, dtype=None):
    wide = np.float64 if array.dtype == np.float64 else np.float32
    total = array.astype(wide)
    for part, scale in weighted:
        total = total + np.float32(scale) * dense(part)
    out = poisoned(array.shape, dtype or array.dtype)
    store(np.asarray(total, wide), out)
    return out


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("kind", KIND_NAMES)
def test_applied_is_its_definition(kind, dtype, shape):
    part, array = part_of(kind, shape), random_array(shape, dtype, 5)
    out = poisoned(shape, dtype)
    part.apply(array, -0.7, out=out)
    np.testing.assert_array_equal(out, expected(array, [(part, -0.7)]))
    part.apply(array, -0.7, out=array)
    np.testing.assert_array_equal(array, out)


@pytest.mark.parametrize("kind", KIND_NAMES)
def test_runs_of_rows_are_the_same_as_the_whole(kind, monkeypatch):
    monkeypatch.setattr("freemerge.parts.low_rank.BLOCK", 64)
    part, array = part_of(kind, (50, 13)), random_array((50, 13), np.float16, 5)
    whole, out = poisoned((50, 13), np.float16), poisoned((50, 13), np.float16)
    part.apply(array, 1.5, out=whole)
    for first in range(0, 50, 2 * part.grain):
        last = min(50, first + 2 * part.grain)
        part.rows(first, last).apply(array[first:last], 1.5, out=out[first:last])
    np.testing.assert_array_equal(out, whole)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_several_parts_are_added_with_one_rounding(dtype):
    weighted = [(part_of(kind, (9, 13), seed), 0.3 + seed) for seed, kind in enumerate(KIND_NAMES)]
    array, out = random_array((9, 13), dtype, 5), poisoned((9, 13), dtype)
    apply_parts(array, weighted, out=out)
    np.testing.assert_array_equal(out, expected(array, weighted))


def test_rows_that_replace():
    base, backbone, vector = (random_array((6, 7), np.float32, seed) for seed in range(3))
    part = Rows.cut(sparse_rows(None, vector, last=10), base)
    out = poisoned((6, 7), np.float32)
    part.apply(backbone, 2.0, out=out)
    np.testing.assert_array_equal(out, np.where(dense(part) != 0, base + 2 * dense(part), backbone))
    part.rows(2, 5).apply(backbone[2:5], 2.0, out=backbone[2:5])
    np.testing.assert_array_equal(backbone[2:5], out[2:5])


@pytest.mark.parametrize("kind", KIND_NAMES)
def test_a_layout_is_what_its_arrays_suggest(kind):
    part = part_of(kind, (9, 13))
    assert KINDS[kind].suggested(part.shape, part.layout.arrays) == part.layout
    with pytest.raises((KeyError, ValueError)):
        KINDS[kind].suggested(part.shape, {})


@pytest.mark.parametrize("kind", KIND_NAMES)
def test_another_shape_is_refused(kind):
    array = random_array((13, 9), np.float32, 0)
    with pytest.raises(ShapeError, match=r"13, 9"):
        part_of(kind, (9, 13)).apply(array, 1.0, out=array)


@pytest.mark.parametrize(
    ("kind", "count"), [("rows", 39), ("quantized_rows", 39), ("mask", 117), ("low_rank", 66), ("difference", 117)]
)
def test_parameters(kind, count):
    assert part_of(kind, (9, 13)).parameters == count


def test_what_parts_share_is_moved_once():
    vector = random_array((9, 13), np.float32, 0)
    parts = [Mask(pack_mask(vector > t), vector, (9, 13)) for t in range(3)]
    moves = []
    moved = Cut([*parts, None], [{}] * 4, {"vector": vector}).moved(lambda a: moves.append(a) or a.copy())
    assert len(moves) == 4
    assert all(part.vector is moved.shared["vector"] for part in moved.parts[:3])

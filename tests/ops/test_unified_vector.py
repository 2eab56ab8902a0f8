import numpy as np
import pytest

from freemerge.errors import ShapeError
from freemerge.kernels._masks import empty_mask, unpack_mask
from freemerge.kernels.dispatch import implementation
from freemerge.kernels.unified_vector import unified_vector, unified_vector_reference
from freemerge.testing import FLOATS, poisoned, random_array


def run(version, base, experts, out_dtype):
    masks = [np.full_like(empty_mask(base), 0xAA) for _ in experts]
    out = poisoned(base.shape, out_dtype)
    sums = version(base, experts, masks, out)
    return [out.view(np.uint8), sums, *masks]


@pytest.mark.parametrize("n", [0, 1, 9, 127, 1024, 70_003, 140_001])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_compiled_version_matches_reference_bit_for_bit(dtype, n):
    base, *experts = (random_array(n, dtype, seed=t) for t in range(4))
    compiled = implementation("unified_vector", base)
    for found, expected in zip(
        run(compiled, base, experts, dtype), run(unified_vector_reference, base, experts, dtype), strict=True
    ):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("out_dtype", FLOATS, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_mixture_of_dtypes(dtype, out_dtype):
    base, expert = random_array((3, 501), dtype, seed=0), random_array((3, 501), np.float32, seed=1)
    compiled = implementation("unified_vector", base)
    for found, expected in zip(
        run(compiled, base, [expert, base], out_dtype),
        run(unified_vector_reference, base, [expert, base], out_dtype),
        strict=True,
    ):
        np.testing.assert_array_equal(found, expected)


def test_by_hand():
    base = np.zeros(6, np.float32)
    experts = [
        np.array(column, np.float32) for column in ([3, 1, 0, -1, 2, 0], [-1, -2, 0, 1, 3, 0], [2, -2, 0, -9, 1, 5])
    ]
    masks = [empty_mask(base) for _ in experts]
    out = poisoned(6, np.float32)
    statistics = unified_vector(base, experts, masks=masks, out=out)
    assert out.tolist() == [3, -2, 0, -9, 3, 5]
    kept = [unpack_mask(mask, (6,)).astype(int).tolist() for mask in masks]
    assert kept == [[1, 0, 0, 1, 1, 0], [0, 1, 0, 0, 1, 0], [1, 1, 0, 1, 1, 1]]
    assert statistics.sum_abs.tolist() == [7, 7, 19]
    assert statistics.kept_abs.tolist() == [15, 5, 22]


def test_what_is_not_finite_stays_so():
    base = np.zeros(3, np.float32)
    experts = [np.array([np.nan, np.inf, 1], np.float32), np.array([1, -np.inf, 1], np.float32)]
    out = poisoned(3, np.float32)
    unified_vector(base, experts, masks=[empty_mask(base) for _ in experts], out=out)
    assert np.isfinite(out).tolist() == [False, False, True]


def test_statistics_do_not_depend_on_threads():
    from freemerge.kernels import dispatch

    base, *experts = (random_array(300_000, np.float32, seed=t) for t in range(3))
    found = []
    for threads in (1, 3):
        dispatch.set_threads(threads)
        found.append(run(implementation("unified_vector", base), base, experts, np.float32))
    dispatch.set_threads(0)
    for one, other in zip(*found, strict=True):
        np.testing.assert_array_equal(one, other)


def test_rejects_what_does_not_fit():
    base = np.zeros(9, np.float32)
    with pytest.raises(ShapeError, match="no expert"):
        unified_vector(base, [], masks=[], out=base)
    with pytest.raises(ShapeError, match="1 masks for 2 experts"):
        unified_vector(base, [base, base], masks=[empty_mask(base)], out=base)
    with pytest.raises(ShapeError, match=r"masks\[0\] is uint8 \[1\]"):
        unified_vector(base, [base], masks=[np.zeros(1, np.uint8)], out=base)

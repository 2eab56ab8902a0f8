"""The products of the complement form, against NumPy's transform in float64."""

import numpy as np
import pytest
import torch

from freemerge.kernels.array import BFLOAT16
from freemerge.kernels.triton._low_pass import analyse, synthesise
from freemerge.testing import from_gpu, random_array, to_gpu

CASES = [
    ((5, 7), [0, 1, 3]),
    ((3, 1), [0]),
    ((1, 2), [0, 1]),
    ((33, 64), [0, 5, 32]),
    ((70, 301), [0, 2, 150]),
    ((40, 130), range(66)),  # more numbers than one tile has
    ((65, 1030), [0, 3, 515]),  # rows in parts
]
WEIGHTS = [0.3, 0.7]
# Float32 products and sums of W terms, against float64: a few parts in a million of the largest coefficient.
TOLERANCE = 1e-5


def inputs(shape, dtype):
    base, *experts = (random_array(shape, dtype, seed) for seed in range(3))
    wide = base.astype(np.float64)
    delta = sum(np.float32(w) * (e.astype(np.float64) - wide) for w, e in zip(WEIGHTS, experts, strict=True))
    return base, experts, delta


def poisoned(*shape, dtype=torch.float32):
    return to_gpu(np.full(shape, np.nan, np.float32)).to(dtype)


@pytest.mark.parametrize("dtype", [np.float32, BFLOAT16, np.float16], ids=str)
@pytest.mark.parametrize(("shape", "columns"), CASES, ids=str)
def test_analyse_gives_the_chosen_coefficients(shape, columns, dtype):
    base, experts, delta = inputs(shape, dtype)
    columns = np.array(columns, np.int32)
    spectrum = poisoned(len(columns), shape[0], 2)
    analyse(to_gpu(base), [to_gpu(expert) for expert in experts], WEIGHTS, columns, spectrum)
    found = from_gpu(spectrum).view(np.complex64)[..., 0]
    expected = np.fft.fft(delta, axis=1).T[columns]
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE * np.abs(expected).max())


@pytest.mark.parametrize("add_base", [True, False])
@pytest.mark.parametrize(("shape", "columns"), CASES, ids=str)
def test_synthesise_adds_the_rows_the_coefficients_are_of(shape, columns, add_base):
    base, experts, delta = inputs(shape, np.float32)
    columns = np.array(columns, np.int32)
    given = np.random.default_rng(7).standard_normal((len(columns), shape[0], 2)).astype(np.float32)
    given[2 * columns % shape[1] == 0, :, 1] = 0  # the transform of real rows is real there
    out = poisoned(*shape)
    on_gpu = [to_gpu(expert) for expert in experts]
    synthesise(to_gpu(base), on_gpu, WEIGHTS, columns, to_gpu(given), add_base, out)
    half = np.zeros((shape[0], shape[1] // 2 + 1), complex)
    half[:, columns] = given.view(np.complex64)[..., 0].T
    low = np.fft.irfft(half, n=shape[1], axis=1) * shape[1]
    expected = delta + low + (base if add_base else 0)
    np.testing.assert_allclose(from_gpu(out), expected, rtol=0, atol=TOLERANCE * np.abs(expected).max())


def test_task_vectors_need_no_base():
    _, experts, _ = inputs((20, 50), np.float32)
    columns = np.array([0, 7], np.int32)
    spectrum = poisoned(2, 20, 2)
    analyse(None, [to_gpu(expert) for expert in experts], WEIGHTS, columns, spectrum)
    total = sum(np.float32(w) * e.astype(np.float64) for w, e in zip(WEIGHTS, experts, strict=True))
    expected = np.fft.fft(total, axis=1).T[columns]
    found = from_gpu(spectrum).view(np.complex64)[..., 0]
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE * np.abs(expected).max())


def test_out_may_be_base_and_is_rounded_once():
    base, experts, delta = inputs((66, 96), BFLOAT16)
    columns = np.array([0, 1], np.int32)
    target = to_gpu(base)
    on_gpu = [to_gpu(expert) for expert in experts]
    synthesise(target, on_gpu, WEIGHTS, columns, to_gpu(np.zeros((2, 66, 2), np.float32)), True, target)
    expected = (base.astype(np.float64) + delta).astype(BFLOAT16).astype(np.float64)
    # one ulp where the float32 sum lies on the other side of a tie; its own error where terms cancel
    np.testing.assert_allclose(from_gpu(target).astype(np.float64), expected, rtol=2.0**-7, atol=1e-6)

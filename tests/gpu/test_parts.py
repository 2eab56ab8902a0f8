"""Parts of experts on torch tensors, and the methods that cut them out: what they give on NumPy arrays."""

import numpy as np
import pytest

from freemerge import methods
from freemerge.checkpoint.torch_arrays import placed_like
from freemerge.kernels._masks import pack_mask
from freemerge.kernels.array import BFLOAT16, FLOAT8_E4M3FN, dtype_of, is_tensor
from freemerge.kernels.sparse_rows import sparse_rows
from freemerge.parts import Difference, LowRank, Mask, QuantizedRows, Rows, apply_parts
from freemerge.testing import from_gpu, poisoned, random_array, to_gpu

SHAPE = (40, 24)


def parts():
    vector, numbers = random_array(SHAPE, np.float32, 1), np.random.default_rng(0)
    return {
        "rows": Rows.cut(sparse_rows(None, vector, last=99)),
        "replaced": QuantizedRows.quantized(Rows.cut(sparse_rows(None, vector, last=99), vector), np.dtype(np.int8)),
        "float8": QuantizedRows.quantized(Rows.cut(sparse_rows(None, vector, last=99)), FLOAT8_E4M3FN),
        "mask": Mask(pack_mask(numbers.random(SHAPE) < 0.5), vector, SHAPE),
        "low_rank": LowRank(random_array((40, 3), np.float32, 2), random_array((3, 24), np.float32, 3), SHAPE),
        "difference": Difference(vector, SHAPE),
    }


@pytest.mark.parametrize(
    "kinds", [*([kind] for kind in parts()), [kind for kind in parts() if kind != "replaced"]], ids=str
)
@pytest.mark.parametrize("dtype", [np.dtype(np.float32), np.dtype(np.float64), BFLOAT16], ids=str)
def test_applied_to_tensors_as_to_arrays(kinds, dtype):
    array, weighted = random_array(SHAPE, dtype, 5), [(parts()[kind], 0.3 * (1 + i)) for i, kind in enumerate(kinds)]
    expected, out = poisoned(SHAPE, dtype), to_gpu(poisoned(SHAPE, dtype))
    apply_parts(array, weighted, out=expected)
    tensor = to_gpu(array)
    there = [(part.moved(lambda a: placed_like(a, tensor)), scale) for part, scale in weighted]
    apply_parts(tensor, there, out=out)
    found = from_gpu(out).astype(np.float64)
    # an ulp between CPU and GPU, of numbers up to 8; where products are float32 theirs
    ulp = 8 * (2.0**-8 if dtype == BFLOAT16 else 2.0**-23)
    np.testing.assert_allclose(found, expected.astype(np.float64), rtol=0, atol=ulp)


@pytest.mark.parametrize(
    ("method", "given"),
    [
        ("twin", {"density": 0.2}),
        ("twin", {"density": 0.2, "compression": "magnitude"}),
        ("smile", {"rank": 3, "gate_rank": 2}),
        ("emr", {}),
        ("tall_mask", {"backbone": "base"}),
    ],
    ids=str,
)
def test_experts_are_cut_out_of_tensors_as_of_arrays(method, given):
    base, *experts = (random_array(SHAPE, np.float32, t) for t in range(3))
    module = methods.get(method).module
    settings = {p.name: p.default for p in methods.get(method).parameters.values()} | given
    expected = module.cut_experts(base, base, experts, name="q.weight", **settings)
    there = [to_gpu(array) for array in (base, base, *experts)]
    found = module.cut_experts(*there[:2], there[2:], name="q.weight", **settings)
    moved = found.moved(lambda array: placed_like(array, base))
    for ours, theirs in zip(moved.parts, expected.parts, strict=True):
        assert ours.layout == theirs.layout
        applied = [poisoned(SHAPE, np.float32) for _ in range(2)]
        for part, out in zip((ours, theirs), applied, strict=True):
            part.apply(base, 1.0, out=out)
        np.testing.assert_allclose(*applied, rtol=0, atol=5e-6)  # through torch's LAPACK or cuSOLVER, in float64
    assert all(is_tensor(array) and dtype_of(array) == np.float32 for array in found.shared.values())
    for ours, theirs in zip(found.statistics, expected.statistics, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-12)  # float64 sums in another order

"""copa on torch tensors: what it gives on NumPy arrays."""

import numpy as np
import pytest

from freemerge import methods
from freemerge.kernels.array import BFLOAT16
from freemerge.testing import from_gpu, poisoned, random_array, to_gpu

SHAPES = {"m.lora_A.weight": (4, 2, 3, 3), "m.lora_B.weight": (37, 4, 1, 1), "norm.weight": (19,)}


def merged(experts, place):
    copa = methods.get("copa")
    given = {p.name: p.default for p in copa.parameters.values()}
    placed = {name: [place(one[name]) for one in experts] for name in SHAPES}
    measured = {name: copa.module.measure_tensor(None, arrays, name=name, **given) for name, arrays in placed.items()}
    settled = copa.module.settle(measured, **given)
    outs = {name: place(poisoned(shape, experts[0][name].dtype)) for name, shape in SHAPES.items()}
    for name, arrays in placed.items():
        copa.module.merge_tensor(None, arrays, name=name, **given, settled=settled, out=outs[name])
    return outs


@pytest.mark.parametrize("dtype", [np.dtype(np.float32), BFLOAT16], ids=str)
def test_tensors_as_arrays(dtype):
    experts = [{n: random_array(s, dtype, 10 * t + i) for i, (n, s) in enumerate(SHAPES.items())} for t in range(3)]
    expected = merged(experts, np.array)
    for name, tensor in merged(experts, to_gpu).items():
        found, array = from_gpu(tensor).astype(float), expected[name].astype(float)
        # row sums and products in another order may move the last bit
        np.testing.assert_allclose(found, array, rtol=2.0**-7 if dtype == BFLOAT16 else 1e-6, atol=1e-7, err_msg=name)

"""The methods of singular vectors, masks and shifts on torch tensors: what they give on NumPy arrays."""

import numpy as np
import pytest

from freemerge import methods
from freemerge.kernels.array import BFLOAT16
from freemerge.testing import from_gpu, poisoned, random_array, to_gpu

SHAPES = {"a.weight": (20, 37), "b.weight": (24, 16), "c.bias": (19,)}
# elementwise: to a bit; the others through torch's LAPACK or cuSOLVER
EXACT = ("adamerging", "adamerging_plus_plus", "tall_mask")
DTYPES = [np.dtype(np.float32), BFLOAT16]


def merged(method, base, experts, place):
    """The method's hooks, as the engine calls them, on arrays brought to their place."""
    method = methods.get(method)
    given = {p.name: p.default for p in method.parameters.values()}
    inputs = {name: (place(base[name]), [place(expert[name]) for expert in experts]) for name in base}
    known, is_settled = {}, getattr(method.module, "is_settled", lambda settled: False)
    for _ in range(method.sweeps):
        if known and is_settled(known["settled"]):
            break
        measured = {n: method.module.measure_tensor(b, es, name=n, **given, **known) for n, (b, es) in inputs.items()}
        assert all(isinstance(found, np.ndarray) for found in measured.values())
        known = {"settled": method.module.settle(measured, **given, **known)}
    outs = {name: place(poisoned(array.shape, array.dtype)) for name, array in base.items()}
    for name, (start, models) in inputs.items():
        method.module.merge_tensor(start, models, name=name, **given, **known, out=outs[name])
    return outs


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("method", [*EXACT, "doge", "iso_c", "iso_cts", "opcm", "tsvm"])
def test_tensors_as_arrays(method, dtype):
    base = {name: random_array(shape, dtype, i) for i, (name, shape) in enumerate(SHAPES.items())}
    experts = [
        {name: (array + random_array(array.shape, dtype, 10 * t, 0.1)).astype(dtype) for name, array in base.items()}
        for t in range(1, 4)
    ]
    expected = merged(method, base, experts, np.array)
    for name, tensor in merged(method, base, experts, to_gpu).items():
        result, array = from_gpu(tensor).astype(np.float64), expected[name].astype(np.float64)
        size = np.abs(array - base[name].astype(np.float64)).max()
        ulp = np.abs(array) * 2.0**-7 if dtype == BFLOAT16 else 6e-7
        allowed = 0 if method in EXACT else ulp + (1e-3 if method == "doge" else 1e-5) * size
        assert np.all(np.abs(result - array) <= allowed), name

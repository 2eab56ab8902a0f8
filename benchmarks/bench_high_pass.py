"""The high-pass filter on real shapes: three bfloat16 experts in, base added, bfloat16 out.

ns an element, and the GB/s that moving every array once would make of it.
"""

import numpy as np
import pytest

from conftest import checkpoint
from freemerge.kernels.array import BFLOAT16
from freemerge.kernels.high_pass import high_pass, high_pass_reference, plan_high_pass
from shapes import FILTERED as SHAPES

SMALL = (1024, 1024)  # where the reference and torch are timed too
MASK = {"cutoff": 0.7, "radius_from": "min", "inner_ring": "official"}


def per_element(benchmark, shape):
    if benchmark.stats is not None:
        benchmark.extra_info["ns_per_element"] = round(benchmark.stats.stats.median / np.prod(shape) * 1e9, 2)
    benchmark.extra_info["plan"] = plan_high_pass(shape, **MASK).describe()


def run_op(base, experts, out):
    high_pass(base, experts, [0.3] * 3, **MASK, out=out)


def run_reference(base, experts, out):
    high_pass_reference(base, experts, [0.3] * 3, *MASK.values(), True, out)


def run_torch(base, experts, out):
    """The official chain: per expert fft2, a mask, ifft2; then the sum."""
    torch = pytest.importorskip("torch")
    start, *others = (torch.from_numpy(array.astype(np.float32)) for array in (base, *experts))
    rows, columns = base.shape
    u, v = torch.arange(rows)[:, None] - rows // 2, torch.arange(columns) - columns // 2
    distance = (u**2 + v**2).float().sqrt()
    total = torch.zeros_like(start)
    for other in others:
        spectrum = torch.fft.fft2(other - start)
        inner, outer = distance <= min(rows, columns) // 10, distance <= 0.7 * min(rows, columns)
        ring = outer & (distance >= min(rows, columns) // 10)
        total += 0.3 * (torch.fft.ifft2(spectrum * inner) + torch.fft.ifft2(spectrum * ring)).real
    out[...] = (start + total).numpy().astype(BFLOAT16)


CASES = [pytest.param(run_op, shape, id=f"cpu {shape[0]}x{shape[1]}") for shape in [SMALL, *SHAPES]]
CASES += [
    pytest.param(run, SMALL, id=f"{run.__name__[4:]} {SMALL[0]}x{SMALL[1]}") for run in (run_reference, run_torch)
]


@pytest.mark.parametrize(("run", "shape"), CASES)
def test_high_pass(benchmark, throughput, run, shape):
    base, experts = checkpoint(shape)
    out = np.empty_like(base)
    throughput(lambda: run(base, experts, out), moved=5 * base.nbytes)
    per_element(benchmark, shape)
    if shape == SMALL:
        expected = np.empty_like(base)
        run_reference(base, experts, expected)
        np.testing.assert_allclose(out.astype(np.float32), expected.astype(np.float32), rtol=2.0**-7, atol=1e-6)

import numpy as np
import pytest

from freemerge.errors import ShapeError
from freemerge.kernels.dispatch import implementation
from freemerge.kernels.task_vector_variance import task_vector_variance, task_vector_variance_reference
from freemerge.testing import FLOATS, poisoned, random_array


@pytest.mark.parametrize("experts", [1, 2, 3, 7])
@pytest.mark.parametrize("n", [0, 1, 1025, 70_003])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_compiled_version_matches_reference_bit_for_bit(dtype, n, experts):
    base, *arrays = (random_array(n, dtype, seed=t) for t in range(experts + 1))
    expected, out = poisoned(n, np.float32), poisoned(n, np.float32)
    task_vector_variance_reference(base, arrays, expected)
    implementation("task_vector_variance", base)(base, arrays, out)
    np.testing.assert_array_equal(out.view(np.uint8), expected.view(np.uint8))


def test_is_the_population_variance():
    base, *experts = (random_array(1000, np.float32, seed=t) for t in range(4))
    out = poisoned(1000, np.float32)
    task_vector_variance(base, experts, out=out)
    np.testing.assert_allclose(
        out, np.var(np.stack(experts).astype(np.float64), axis=0), rtol=1e-4, atol=1e-6
    )  # float32


def test_one_expert_does_not_vary():
    out = poisoned(5, np.float32)
    task_vector_variance(np.zeros(5, np.float32), [np.arange(5, dtype=np.float32)], out=out)
    assert out.tolist() == [0] * 5


def test_rejects_another_dtype():
    with pytest.raises(ShapeError, match="variances are float32"):
        task_vector_variance(np.zeros(3), [np.zeros(3)], out=np.zeros(3))

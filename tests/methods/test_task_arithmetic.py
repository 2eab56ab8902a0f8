"""linear, average, task_arithmetic: coefficients mean what mergekit's table says; every rank and T = 1 work."""

import numpy as np
import pytest

from freemerge import methods
from freemerge.testing import poisoned, random_array


def merged(method, base, experts, **parameters):
    out = poisoned(base.shape, base.dtype)
    methods.get(method).module.merge_tensor(base, experts, name="w", out=out, **parameters)
    return out


@pytest.fixture
def tensors():
    return [random_array((5, 7), np.float32, seed) for seed in range(4)]


def close(a, b):
    # float32 sums of at most four terms near 1
    np.testing.assert_allclose(a, b, rtol=0, atol=2e-6)


def test_task_arithmetic_coefficients(tensors):
    base, *experts = tensors
    deltas = [expert - base for expert in experts]
    close(merged("task_arithmetic", base, experts), base + 0.3 * sum(deltas))
    close(merged("task_arithmetic", base, experts, scaling=0.5), base + 0.5 * sum(deltas))
    weighted = 0.2 * deltas[0] + 0.5 * deltas[1] - 0.1 * deltas[2]
    close(merged("task_arithmetic", base, experts, weight=(0.2, 0.5, -0.1)), base + weighted)
    close(merged("task_arithmetic", base, experts, weight=(0.2, 0.5, -0.1), scaling=0.5), base + 0.5 * weighted)
    close(merged("task_arithmetic", base, experts, weight=(0.2, 0.5, -0.1), normalize=True), base + weighted / 0.6)


def test_weights_that_sum_to_zero_are_not_normalized(tensors):
    base, first, second, _ = tensors
    close(merged("task_arithmetic", base, [first, second], weight=(1.0, -1.0), normalize=True), base + first - second)


def test_linear_and_average(tensors):
    base, *experts = tensors
    mean = np.mean(experts, axis=0)
    close(merged("average", base, experts), mean)
    close(merged("linear", base, experts), mean)
    close(merged("linear", base, experts, weight=(1.0, 2.0, 1.0)), (experts[0] + 2 * experts[1] + experts[2]) / 4)
    close(
        merged("linear", base, experts, weight=(0.5, 2.0, 0.1), normalize=False),
        0.5 * experts[0] + 2 * experts[1] + 0.1 * experts[2],
    )


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (1,), (2, 3, 4, 5)])
@pytest.mark.parametrize("method", ["linear", "average", "task_arithmetic"])
def test_any_rank_and_one_expert(method, shape):
    base, expert = (random_array(shape, np.float32, seed) for seed in (0, 1))
    expected = base + np.float32(0.3) * (expert - base) if method == "task_arithmetic" else expert
    np.testing.assert_array_equal(merged(method, base, [expert]), expected)

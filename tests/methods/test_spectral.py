"""iso_c, iso_cts, tsvm: against float64 decompositions, and the matrices nobody thinks of."""

import subprocess
import sys

import numpy as np
import pytest

from freemerge import merge_state_dicts, methods
from freemerge.errors import CheckpointError, RecipeError
from freemerge.testing import FLOATS, poisoned, random_array

METHODS = ["iso_c", "iso_cts", "tsvm"]
NEGLIGIBLE = 1e-6


def merged(method, base, experts, **given):
    out = poisoned(base.shape, base.dtype)
    methods.get(method).module.merge_tensor(base, experts, name="mlp.weight", out=out, **given)
    return out


def polar(matrix):
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    kept = s > NEGLIGIBLE * s[:1]
    return u[:, kept] @ vt[kept]


def leading(matrix, rank, floor=0.0):
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    kept = (s > (floor or NEGLIGIBLE * s[:1]))[:rank]
    return u[:, :rank] * kept, s[:rank] * kept, vt[:rank].T * kept


def iso_c(vectors):
    total = sum(vectors)
    return np.linalg.svd(total, compute_uv=False).mean() * polar(total)


def tsvm(vectors):
    parts = [leading(vector, int(min(vector.shape) * (1 / len(vectors)))) for vector in vectors]
    left, values, right = (np.concatenate(side, -1) for side in zip(*parts, strict=True))
    return polar(left) * values @ polar(right).T


def iso_cts(vectors, common=0.8):
    n, count = min(vectors[0].shape), len(vectors)
    shared = n - count * round((n - int(n * common)) / count)
    space = leading(sum(vectors), shared)
    rest = [vector - space[0] @ (space[0].T @ vector) for vector in vectors]
    own = int((n - shared) / count)
    floors = [NEGLIGIBLE * np.linalg.norm(vector) for vector in vectors]
    parts = [*(leading(one, own, floor) for one, floor in zip(rest, floors, strict=True)), space]
    left, values, right = (np.concatenate(side, -1) for side in zip(*parts, strict=True))
    return values.mean() * polar(left) @ polar(right).T


REFERENCES = {"iso_c": iso_c, "iso_cts": iso_cts, "tsvm": tsvm}


def inputs(shape, count, dtype=np.float32, scale=0.02):
    base = random_array(shape, dtype, 0)
    moves = [random_array(shape, np.float32, 1 + t, scale) for t in range(count)]
    return base, [np.asarray(base.astype(np.float32) + move).astype(dtype) for move in moves]


def task_vectors(base, experts):
    return [expert.astype(np.float64) - base.astype(np.float64) for expert in experts]


def close(out, base, update):
    # the update to 1e-5 of its largest entry, beside the rounding of the weights themselves
    expected = base.astype(np.float64) + update
    allowed = 1e-5 * np.abs(update).max() + 6e-8 * np.abs(expected).max()
    np.testing.assert_allclose(out, expected, rtol=0, atol=allowed)


@pytest.mark.parametrize("shape", [(24, 24), (20, 37), (37, 20), (1, 9), (9, 1), (1, 1), (60, 3)], ids=str)
@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("method", METHODS)
def test_matches_float64(method, count, shape):
    base, experts = inputs(shape, count)
    close(merged(method, base, experts), base, REFERENCES[method](task_vectors(base, experts)))


@pytest.mark.parametrize("method", METHODS)
def test_in_pieces(monkeypatch, method):
    base, experts = inputs((23, 61), 3)
    monkeypatch.setattr("freemerge.methods._linear_algebra.PIECE", 100)
    close(merged(method, base, experts), base, REFERENCES[method](task_vectors(base, experts)))


@pytest.mark.parametrize("common", [0.0, 0.3, 0.5, 1.0])
def test_common_share(common):
    base, experts = inputs((21, 31), 3)
    close(merged("iso_cts", base, experts, common=common), base, iso_cts(task_vectors(base, experts), common))
    if common == 1.0:  # nothing is any expert's own
        close(merged("iso_cts", base, experts, common=common), base, iso_c(task_vectors(base, experts)))


@pytest.mark.parametrize("method", METHODS)
def test_scaling_and_order(method):
    base, experts = inputs((16, 24), 3)
    update = REFERENCES[method](task_vectors(base, experts))
    close(merged(method, base, experts, scaling=0.4), base, 0.4 * update)
    close(merged(method, base, experts[::-1]), base, update)


@pytest.mark.parametrize("shape", [(20, 37), (37, 20)], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_low_rank_experts(method, shape):
    """What lies in the null space is arbitrary, and left out."""
    base = np.zeros(shape, np.float32)
    experts = [
        random_array((shape[0], 2), np.float32, t) @ random_array((2, shape[1]), np.float32, 9 + t) for t in range(3)
    ]
    update = merged(method, base, experts)
    close(update, base, REFERENCES[method](task_vectors(base, experts)))
    assert np.linalg.matrix_rank(update, tol=1e-4 * np.abs(update).max()) <= 6


@pytest.mark.parametrize("method", METHODS)
def test_experts_that_are_the_same(method):
    """Directions that all tasks share are left with one polar factor."""
    base, (expert,) = inputs((12, 18), 1)
    close(merged(method, base, [expert] * 3), base, REFERENCES[method](task_vectors(base, [expert] * 3)))


@pytest.mark.parametrize("method", METHODS)
def test_experts_that_do_not_move(method):
    base, (expert,) = inputs((12, 18), 1)
    np.testing.assert_array_equal(merged(method, base, [base, base]), base)
    assert np.all(np.isfinite(merged(method, base, [base, expert])))


@pytest.mark.parametrize("shape", [(), (0,), (7,), (0, 4), (4, 0), (3, 2, 5), (2, 3, 2, 2)], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_what_is_not_a_matrix_is_averaged(method, shape):
    base, experts = inputs(shape, 3)
    expected = base + 0.5 * sum(np.asarray(expert) - base for expert in experts) / 3
    np.testing.assert_allclose(merged(method, base, experts, scaling=0.5), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_averaged_matrices(method):
    base, experts = inputs((6, 8), 2)
    expected = base + sum(expert - base for expert in experts) / 2
    np.testing.assert_allclose(merged(method, base, experts, averaged=("mlp",)), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_every_dtype_is_rounded_once(method, dtype):
    base, experts = inputs((12, 18), 2, dtype)
    update = REFERENCES[method](task_vectors(base, experts))
    expected = base.astype(np.float64) + update
    ulp = {8: 0.0, 4: 0.0}.get(dtype.itemsize, np.spacing(np.abs(expected).astype(dtype)).astype(np.float64))
    error = np.abs(merged(method, base, experts).astype(np.float64) - expected)
    assert np.all(error <= 0.5001 * ulp + 1e-5 * np.abs(update).max() + (dtype.itemsize == 4) * 3e-7)


@pytest.mark.parametrize("method", METHODS)
def test_a_nan_is_found_in_the_model_that_has_it(method):
    base, experts = inputs((6, 8), 2)
    experts[1][2, 3] = np.nan
    with pytest.raises(CheckpointError, match=r"w: NaN or Inf in expert1$|w: NaN or Inf in expert1\n"):
        merge_state_dicts(method, {"w": base}, [{"w": expert} for expert in experts])


def test_the_merged_task_vector_of_iso_c_is_isotropic():
    base, experts = inputs((24, 40), 4)
    values = np.linalg.svd(merged("iso_c", np.zeros_like(base), [e - base for e in experts]), compute_uv=False)
    np.testing.assert_allclose(values, values[0], rtol=1e-5)


def test_one_expert_is_reproduced_by_tsvm():
    base, (expert,) = inputs((24, 40), 1)
    np.testing.assert_allclose(merged("tsvm", base, [expert]), expert, rtol=0, atol=1e-6)


def test_the_plan_counts_directions_and_memory():
    def plan(method, shape, **given):
        given = {p.name: p.default for p in methods.get(method).parameters.values()} | given
        return methods.get(method).module.plan_tensor("w", shape, experts=3, **given)

    assert "33 singular vectors" in plan("tsvm", (100, 200)).transform
    assert "79 common singular vectors, 7 of each expert" in plan("iso_cts", (100, 200)).transform
    for method in METHODS:
        assert plan(method, (100, 200)).workspace >= 100 * 200 * 4
        assert plan(method, (100,)).transform == plan(method, (10, 10), averaged=("w",)).transform == "mean"
    with pytest.raises(RecipeError, match="a share"):
        plan("iso_cts", (100, 200), common=1.5)


def test_numpy_arrays_need_no_torch():
    code = (
        "import sys, numpy as np, freemerge; a = np.eye(4, dtype='f4');"
        "[freemerge.merge_state_dicts(m, {'w': a}, [{'w': 2 * a}, {'w': a.T + 1}]) for m in ('iso_cts', 'tsvm')];"
        "sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-P", "-c", code], check=True)

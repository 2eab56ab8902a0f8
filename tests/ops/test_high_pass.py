import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from freemerge.errors import RecipeError, ShapeError
from freemerge.kernels import dispatch
from freemerge.kernels._high_pass_plan import column_bounds, possible_plans
from freemerge.kernels.dispatch import implementation
from freemerge.kernels.high_pass import high_pass, high_pass_reference, mask_reference, plan_high_pass
from freemerge.testing import FLOATS, poisoned, random_array

GOLDENS = sorted((Path(__file__).parents[1] / "goldens" / "fr_filter").glob("*.safetensors"))
BFLOAT16 = FLOATS[3]

# Relative to the largest element of the result. float32 transforms of these lengths err by 1e-7 to 4e-7; the rest is
# room for another order of operations on another instruction set.
TOLERANCE = 1e-6

SHAPES = [
    (1, 1),
    (1, 2),
    (5, 1),
    (1, 768),
    (640, 1),
    (2, 3),
    (7, 9),
    (64, 64),
    (96, 97),
    (31, 37),
    (47, 29),
    (9, 200),
    (130, 33),
    (33, 130),
]
MASKS = [(cutoff, "min", ring) for cutoff in (0, 0.06, 0.5, 0.7, 0.9) for ring in ("official", "clean")]
MASKS += [
    (0.6, "max", "official"),
    (0.3, "max", "clean"),
    (0.7, "diagonal", "official"),
    (0.95, "diagonal", "clean"),
    (1e30, "max", "clean"),
]


def filtered(base, experts, weights, plan, mask, add_base=True, out=None):
    """The compiled op in the form and along the axis of `plan`."""
    out = poisoned(experts[0].shape, np.float32) if out is None else out
    bounds = column_bounds(out.shape, plan.axis, *mask)
    implementation("high_pass", out)(
        base, experts, weights, plan.form, plan.axis, plan.stored, bounds, add_base, None, out
    )
    return out


def referenced(base, experts, weights, mask, add_base=True, dtype=np.float64):
    out = poisoned(experts[0].shape, dtype)
    high_pass_reference(base, experts, weights, *mask, add_base, out)
    return out


def assert_near(actual, expected, tolerance=TOLERANCE):
    scale = max(np.abs(expected).max(initial=0), 1e-3)
    np.testing.assert_allclose(actual.astype(np.float64), expected, rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_every_form_and_axis_matches_the_whole_mask(mask, shape):
    base, experts = random_array(shape, np.float32, seed=0), [random_array(shape, np.float32, seed=t) for t in (1, 2)]
    expected = referenced(base, experts, [0.3, -0.7], mask, add_base=False)
    for plan in possible_plans(shape, *mask):
        actual = filtered(base, experts, [0.3, -0.7], plan, mask, add_base=False)
        # what is removed leaves rounding errors of its own size behind, also where next to nothing is left
        scale = max(np.abs(expected).max(), 0.05)
        np.testing.assert_allclose(actual, expected, rtol=0, atol=TOLERANCE * scale, err_msg=plan.describe())


@pytest.mark.parametrize("length", [61, 67, 121, 169, 251, 343, 509, 1001, 1187, 2 * 61 * 3, 4757, 2048, 2816])
def test_any_length_along_either_axis(length):
    for shape in ((3, length), (length, 3)):
        experts = [random_array(shape, np.float32, seed=1)]
        mask = (0.7, "max", "official")
        expected = referenced(None, experts, [1.0], mask)
        for plan in possible_plans(shape, *mask):
            # Bluestein's algorithm (a prime above 61) is three transforms for one
            assert_near(filtered(None, experts, [1.0], plan, mask), expected, 2 * TOLERANCE)


@pytest.mark.parametrize("out_dtype", FLOATS, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", [(40, 129), (129, 40)], ids=str)
def test_every_dtype(shape, dtype, out_dtype):
    base, experts = (
        random_array(shape, dtype, seed=0),
        [random_array(shape, other, seed=2) for other in (dtype, dtype, BFLOAT16)],
    )
    weights = [0.5, -0.25, 1.0]
    exact = referenced(base, experts, weights, (0.7, "min", "clean"))
    out = poisoned(shape, out_dtype)
    high_pass(base, experts, weights, out=out)
    # half a last place of the output and the filter's own error; the smallest float8_e4m3fn is 2^-9
    ulp, smallest = {8: (1e-6, 4e-6), 4: (1e-6, 4e-6), 2: (2.0**-8, 4e-6), 1: (2.0**-3, 2.0**-10)}[
        np.dtype(out_dtype).itemsize
    ]
    np.testing.assert_allclose(out.astype(np.float64), exact, rtol=1.01 * ulp, atol=1.01 * smallest)


@pytest.mark.parametrize("shape", [(768, 768), (192, 768), (768, 192)], ids=str)
def test_bfloat16_result_is_the_rounded_exact_one(shape):
    base, experts = random_array(shape, BFLOAT16, seed=0), [random_array(shape, BFLOAT16, seed=t) for t in (1, 2, 3)]
    expected = referenced(base, experts, [0.3] * 3, (0.7, "min", "clean"), dtype=BFLOAT16)
    out = poisoned(shape, BFLOAT16)
    high_pass(base, experts, [0.3] * 3, out=out)
    # an error of 1e-7 turns a rounding where the exact value lies that close to the middle of two bfloat16 numbers
    assert (out.view(np.uint16) != expected.view(np.uint16)).mean() < 5e-4
    np.testing.assert_allclose(out.astype(np.float32), expected.astype(np.float32), rtol=2.0**-7, atol=1e-6)


@pytest.mark.parametrize("path", GOLDENS, ids=lambda path: path.stem)
def test_matches_golden(path):
    with safe_open(path, "np") as file:
        hyper = json.loads(file.metadata()["case"])["hyper"]
        for name in file.keys():  # noqa: SIM118 - not a dict
            if not name.startswith("delta0/"):
                continue
            task_vector = file.get_tensor(name)
            out = poisoned(task_vector.shape, np.float32)
            ring = "official" if hyper["inner_ring"] else "clean"
            high_pass(
                None,
                [task_vector],
                [1.0],
                cutoff=hyper["ratio"],
                radius_from=hyper["radius_from"],
                inner_ring=ring,
                out=out,
            )
            assert_near(out, file.get_tensor(f"expected_{name}"), 2e-6)  # tolerance of shared/goldens/README.md


def test_there_are_goldens():
    assert len(GOLDENS) == 6


# ---- the plan ----


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    st.tuples(st.integers(1, 90), st.integers(1, 90)),
    st.one_of(st.sampled_from([0.0, 0.1, 0.5, 0.7, 0.9, 1.0]), st.floats(0, 1.6)),
    st.sampled_from(["min", "max", "diagonal"]),
    st.sampled_from(["official", "clean"]),
)
def test_bounds_and_counts_equal_the_whole_mask(shape, cutoff, radius_from, inner_ring):
    mask = mask_reference(shape, cutoff, radius_from, inner_ring)
    for axis in (0, 1):
        inner, below, outer = column_bounds(shape, axis, cutoff, radius_from, inner_ring)
        lines = shape[1 - axis]
        distance = np.abs(np.arange(lines) - lines // 2)[:, None]
        gain = (distance <= inner).astype(int) + ((distance > below) & (distance <= outer))
        np.testing.assert_array_equal(gain, mask if axis == 1 else mask.T)
    plan = plan_high_pass(shape, cutoff=cutoff, radius_from=radius_from, inner_ring=inner_ring)
    assert (plan.removed, plan.doubled) == ((mask == 0).sum(), (mask == 2).sum())


@pytest.mark.parametrize(
    ("shape", "cutoff", "radius_from", "removed", "doubled"),
    [  # METHODS.md section 1.1
        ((768, 768), 0.7, "min", 113, 4),
        ((1024, 1024), 0.7, "min", 221, 12),
        ((4096, 4096), 0.7, "min", 3445, 12),
        ((768, 768), 0.6, "max", 28_965, 4),
        ((2304, 768), 0.7, "min", 1_020_614, 4),
        ((768, 3072), 0.7, "min", 1_610_438, 4),
        ((3072, 768), 0.7, "min", 1_610_438, 4),
        ((768, 3072), 0.6, "max", 0, 4),
        ((4096, 4096), 0.9, "min", 0, 12),
        ((4096, 11008), 0.7, "min", 23_788_626, 12),
        ((4096, 14336), 0.9, "min", 30_155_946, 12),
        ((32000, 4096), 0.9, "min", 102_507_690, 12),
        ((50265, 768), 0.7, "min", 37_854_662, 4),
        ((1, 768), 0.7, "min", 767, 1),
    ],
)
def test_counts_of_the_specification(shape, cutoff, radius_from, removed, doubled):
    plan = plan_high_pass(shape, cutoff=cutoff, radius_from=radius_from, inner_ring="official")
    assert (plan.removed, plan.doubled) == (removed, doubled)
    clean = plan_high_pass(shape, cutoff=cutoff, radius_from=radius_from, inner_ring="clean")
    assert (clean.removed, clean.doubled) == (removed, 0)


def test_radius_is_rounded_to_float32():
    # 0.7 * 90 is 62.99999999999999 in double and 63 in float32: the coefficients at distance 63 stay
    bounds = column_bounds((90, 130), 1, 0.7, "min", "official")
    assert bounds[2][130 // 2 - 63] == 0


def test_squared_distances_are_rounded_to_float32():
    # 2^24 + 1 is no float32; the official mask takes it for 2^24
    limit = column_bounds((8194, 8194), 1, 4096 / 8194, "min", "clean")
    assert limit[0][8194 // 2 - 4096] == 1


@pytest.mark.parametrize(
    ("shape", "cutoff", "form"),
    [((512, 512), 0.9, "keep"), ((512, 512), 0.7, "complement"), ((512, 1536), 0.7, "sweeps")],
)
def test_form_follows_what_is_removed(shape, cutoff, form):
    plan = plan_high_pass(shape, cutoff=cutoff)
    assert plan.form == form
    assert ("no transform" if form == "keep" else form) in plan.describe()


def test_tall_matrices_are_transformed_along_columns():
    assert (plan_high_pass((1536, 512)).axis, plan_high_pass((512, 1536)).axis) == (0, 1)


# ---- properties ----


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.integers(1, 70),
    st.integers(1, 70),
    st.floats(0.1, 1.2),
    st.sampled_from(["official", "clean"]),
    st.integers(0, 99),
)
def test_filter_is_linear(rows, columns, cutoff, inner_ring, seed):
    shape = (rows, columns)
    left, right = (random_array(shape, np.float32, seed=seed + k) for k in (0, 1))

    def f(experts, weights):
        out = poisoned(shape, np.float32)
        high_pass(None, experts, weights, cutoff=cutoff, inner_ring=inner_ring, out=out)
        return out

    np.testing.assert_allclose(
        f([left, right], [2.0, -3.0]), 2 * f([left], [1.0]) - 3 * f([right], [1.0]), rtol=0, atol=2e-5
    )


def test_filtering_twice_changes_nothing_with_a_clean_ring_and_even_sizes():
    once, twice = poisoned((96, 160), np.float32), poisoned((96, 160), np.float32)
    high_pass(None, [random_array((96, 160), np.float32, seed=0)], [1.0], out=once)
    high_pass(None, [once], [1.0], out=twice)
    assert_near(twice, once)


@pytest.mark.parametrize("shape", [(100, 333), (333, 100), (200, 200)], ids=str)
def test_same_bits_for_any_number_of_threads(shape):
    base, experts = random_array(shape, BFLOAT16, seed=0), [random_array(shape, BFLOAT16, seed=1)]
    for plan in possible_plans(shape, 0.7, "min", "clean"):
        results = []
        for threads in (1, 2, 5):
            dispatch.set_threads(threads)
            results.append(filtered(base, experts, [0.7], plan, (0.7, "min", "clean")))
        dispatch.set_threads(0)
        for result in results[1:]:
            np.testing.assert_array_equal(result.view(np.uint32), results[0].view(np.uint32))


def test_storing_the_spectra_changes_no_bit():
    mask = (0.7, "min", "official")
    experts = [random_array((80, 250), np.float32, seed=1)]
    stored, again = (plan for plan in possible_plans((80, 250), *mask) if plan.axis == 1)
    assert {stored.stored, again.stored} == {True, False}
    np.testing.assert_array_equal(
        filtered(None, experts, [1.0], stored, mask), filtered(None, experts, [1.0], again, mask)
    )


@pytest.mark.parametrize("shape", [(64, 200), (200, 64), (128, 128)], ids=str)
def test_out_may_be_base(shape):
    base, expert = random_array(shape, np.float32, seed=0), random_array(shape, np.float32, seed=1)
    for plan in possible_plans(shape, 0.7, "min", "clean"):
        expected = filtered(base, [expert], [0.4], plan, (0.7, "min", "clean"))
        start = base.copy()
        filtered(start, [expert], [0.4], plan, (0.7, "min", "clean"), out=start)
        np.testing.assert_array_equal(start, expected)


def test_float64_base_keeps_its_precision():
    base = 1.0 + random_array((40, 96), np.float64, seed=0, scale=1e-9)
    out = poisoned(base.shape, np.float64)
    high_pass(base, [base], [1.0], out=out)
    np.testing.assert_array_equal(out, base)


def test_no_experts_copies_the_base():
    base, out = random_array((40, 96), np.float32, seed=0), poisoned((40, 96), np.float32)
    high_pass(base, [], [], out=out)
    np.testing.assert_array_equal(out, base)


def test_arrays_may_lie_at_odd_addresses():
    shape, raw = (33, 70), np.zeros(2 * 33 * 70 + 1, np.uint8)
    expert, aligned = raw[1:].view(BFLOAT16).reshape(shape), random_array(shape, BFLOAT16, seed=1)
    expert[...] = aligned
    results = [poisoned(shape, np.float32) for _ in range(2)]
    for source, out in zip((expert, aligned), results, strict=True):
        high_pass(None, [source], [1.0], out=out)
    np.testing.assert_array_equal(*results)


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)], ids=str)
def test_zero_size(shape):
    high_pass(poisoned(shape, np.float32), [poisoned(shape, np.float32)], [1.0], out=poisoned(shape, np.float32))


def test_workspace_of_the_caller():
    plan = plan_high_pass((64, 256))
    expert = random_array((64, 256), np.float32, seed=0)
    given_one, own = poisoned((64, 256), np.float32), poisoned((64, 256), np.float32)
    high_pass(None, [expert], [1.0], workspace=np.full(plan.workspace, 255, np.uint8), out=given_one)
    high_pass(None, [expert], [1.0], out=own)
    np.testing.assert_array_equal(given_one, own)
    with pytest.raises(ShapeError, match="workspace is 10 bytes"):
        high_pass(None, [expert], [1.0], workspace=np.zeros(10, np.uint8), out=own)


def test_reference_runs_where_nothing_is_compiled(monkeypatch):
    expert, fast, slow = (
        random_array((30, 50), np.float32, seed=0),
        poisoned((30, 50), np.float32),
        poisoned((30, 50), np.float32),
    )
    high_pass(None, [expert], [1.0], out=fast)
    monkeypatch.setenv("FREEMERGE_IMPL", "reference")
    high_pass(None, [expert], [1.0], out=slow)
    assert_near(fast, slow)


def test_rejects_what_it_does_not_take():
    matrix = np.zeros((4, 5), np.float32)
    with pytest.raises(ShapeError, match="takes matrices"):
        high_pass(None, [matrix[0]], [1.0], out=matrix[0])
    with pytest.raises(ShapeError, match=r"base is \[5, 4\]"):
        high_pass(np.zeros((5, 4)), [matrix], [1.0], out=matrix)
    with pytest.raises(ShapeError, match="0 weights for 1 experts"):
        high_pass(None, [matrix], [], out=matrix)
    for bad in ({"cutoff": -0.1}, {"cutoff": float("nan")}, {"radius_from": "mean"}, {"inner_ring": "none"}):
        with pytest.raises(RecipeError, match=next(iter(bad))):
            high_pass(None, [matrix], [1.0], out=matrix, **bad)

"""twin: what each expert keeps beyond the shared model, and the weights for a router's probabilities."""

import numpy as np
import pytest

import freemerge
from freemerge import merge_state_dicts
from freemerge.checkpoint.reader import open_checkpoint
from freemerge.errors import InputError, RecipeError
from freemerge.experts.apply import apply_expert, list_experts
from freemerge.testing import random_array, tiny_llama, tiny_llama_config, write_checkpoint

SHAPES = {"mlp.weight": (24, 40), "mlp.bias": (40,), "conv.weight": (3, 4, 2, 2), "logit_scale": (), "empty": (0, 3)}


@pytest.fixture
def models():
    base = {name: random_array(shape, np.float32, i) for i, (name, shape) in enumerate(SHAPES.items())}
    experts = [
        {
            name: np.asarray(base[name] + random_array(shape, np.float32, 10 * t + i, 0.1))
            for i, (name, shape) in enumerate(SHAPES.items())
        }
        for t in (1, 2)
    ]
    return base, experts


def truncated(matrix, rank):
    u, s, v = np.linalg.svd(matrix.astype(np.float64))
    return (u[:, :rank] * s[:rank]) @ v[:rank]


@pytest.mark.parametrize("relative_to", ["merged", "base"])
def test_svd_keeps_the_leading_directions_of_matrices_and_all_of_the_rest(models, relative_to):
    base, experts = models
    merged = merge_state_dicts("twin", base, experts, density=0.3, relative_to=relative_to, expert_scaling=0.5)
    for name in SHAPES:
        # float32 sums
        np.testing.assert_allclose(
            merged[name], base[name] + 0.3 * sum(e[name] - base[name] for e in experts), atol=1e-6
        )
    for t, expert in enumerate(merged.experts):
        assert {name: part.kind for name, part in expert.tensors.items()} == {
            "mlp.weight": "low_rank",
            "mlp.bias": "difference",
            "conv.weight": "difference",
            "logit_scale": "difference",
        }
        assert expert.tensors["mlp.weight"].left.shape == (24, int(0.3 * 24))
        reference = merged if relative_to == "merged" else base
        applied = expert.apply(merged)
        for name in SHAPES:
            kept = experts[t][name] - reference[name]
            kept = truncated(kept, int(0.3 * 24)) if name == "mlp.weight" else kept
            # the decomposition is that of float32 numbers
            np.testing.assert_allclose(applied[name], merged[name] + 0.5 * kept, atol=2e-6)


def test_magnitude_keeps_the_largest_entries(models):
    base, experts = models
    merged = merge_state_dicts("twin", base, experts, density=0.1, compression="magnitude")
    for t, expert in enumerate(merged.experts):
        assert {name: part.kind for name, part in expert.tensors.items()} == {
            "mlp.weight": "rows",
            "conv.weight": "rows",
            "mlp.bias": "difference",
            "logit_scale": "difference",
        }
        for name in ("mlp.weight", "conv.weight"):
            left = experts[t][name] - merged[name]
            least = np.sort(np.abs(left), axis=None)[-int(0.1 * left.size)]
            np.testing.assert_array_equal(expert.tensors[name].to_dense(), np.where(np.abs(left) >= least, left, 0))


def test_density_0_leaves_the_shared_model_and_1_gives_the_expert_back(models):
    base, experts = models
    assert merge_state_dicts("twin", base, experts, density=0.0).experts[0].tensors == {}
    merged = merge_state_dicts("twin", base, experts, density=1.0)
    for name, array in merged.experts[1].apply(merged).items():
        # shared + (expert - shared) rounds twice
        np.testing.assert_allclose(array, experts[1][name], atol=5e-7)


def test_excluded_tensors_stay_as_in_the_base(models):
    base, experts = models
    merged = merge_state_dicts("twin", base, experts, exclude=["bias"], density=0.5)
    np.testing.assert_array_equal(merged["mlp.bias"], base["mlp.bias"])
    assert all("mlp.bias" not in expert.tensors for expert in merged.experts)


def test_what_cannot_be_met_is_said(models):
    base, experts = models
    with pytest.raises(RecipeError, match="is not a share"):
        merge_state_dicts("twin", base, experts, density=1.5)
    merged = merge_state_dicts("twin", base, experts)
    with pytest.raises(InputError, match="no expert 'law'; there are: expert0, expert1"):
        merged.with_experts({"expert0": 0.5, "law": 0.5})
    replacing = {"combine": "replace", "relative_to": "base", "density": 0.1, "rescale": 1.0}
    free = merge_state_dicts("free", base, experts, **replacing)
    with pytest.raises(RecipeError, match="expert0, expert1 replace entries"):
        free.with_experts({"expert0": 0.5, "expert1": 0.5})


def test_probabilities_on_disk_are_those_in_memory(tmp_path):
    tensors = {}
    for t, name in enumerate(("base", "math", "code")):
        tensors[name] = tiny_llama(t, dtype=np.float16)
        write_checkpoint(tmp_path / name, tensors[name], config=tiny_llama_config())
    given = {"density": 0.2, "compression": "svd"}
    freemerge.merge("twin", tmp_path / "base", [tmp_path / "math", tmp_path / "code"], tmp_path / "out", **given)
    merged = merge_state_dicts("twin", tensors.pop("base"), tensors, **given)
    probabilities = {"math": 0.7, "code": 0.3}
    apply_expert(tmp_path / "out", probabilities, tmp_path / "applied")
    with open_checkpoint(tmp_path / "applied") as applied:
        for name, array in merged.with_experts(probabilities).items():
            np.testing.assert_array_equal(applied.read(name), array)
    summaries = list_experts(tmp_path / "out")
    assert [summary.name for summary in summaries] == ["code", "math"]
    assert all("low_rank" in summary.kinds and "difference" in summary.kinds for summary in summaries)

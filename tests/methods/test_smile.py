"""smile: parts and gates of linear layers, what becomes of everything else, and what a routed layer answers."""

import numpy as np
import pytest

import freemerge
from freemerge import merge_state_dicts
from freemerge.errors import RecipeError
from freemerge.experts.apply import list_experts
from freemerge.experts.routed_layer import forward, route
from freemerge.experts.sidecar import read_expert
from freemerge.testing import random_array, tiny_llama, tiny_llama_config, write_checkpoint

SHAPES = {
    "embed_tokens.weight": (30, 16),
    "layers.0.attn.q_proj.weight": (24, 16),
    "layers.0.attn.q_proj.bias": (24,),
    "layers.0.input_layernorm.weight": (16,),
    "layers.0.input_layernorm.bias": (16,),
    "conv1.weight": (4, 3, 2, 2),
    "conv1.bias": (4,),
    "logit_scale": (),
}
WEIGHT, BIAS = "layers.0.attn.q_proj.weight", "layers.0.attn.q_proj.bias"


@pytest.fixture
def models():
    base = {name: random_array(shape, np.float32, i) for i, (name, shape) in enumerate(SHAPES.items())}
    experts = [
        {
            name: np.asarray(base[name] + random_array(shape, np.float32, 10 * t + i, 0.1))
            for i, (name, shape) in enumerate(SHAPES.items())
        }
        for t in (1, 2, 3)
    ]
    return base, experts


@pytest.mark.parametrize("rank", [5, 0, 99])
def test_linear_layers_get_parts_and_everything_else_stays(models, rank):
    base, experts = models
    merged = merge_state_dicts("smile", base, experts, rank=rank, gate_rank=2)
    for name, array in base.items():
        np.testing.assert_array_equal(merged[name], array)
    for expert, tuned in zip(merged.experts, experts, strict=True):
        kinds = {WEIGHT: "difference" if rank == 0 else "low_rank", BIAS: "difference"}
        assert {name: part.kind for name, part in expert.tensors.items()} == kinds
        applied = expert.apply(merged)
        np.testing.assert_allclose(applied[BIAS], tuned[BIAS], atol=1e-6)
        u, s, v = np.linalg.svd((tuned[WEIGHT] - base[WEIGHT]).astype(np.float64))
        kept = len(s) if rank == 0 else rank
        # the decomposition is that of float32 numbers
        product = (u[:, : len(s)][:, :kept] * s[:kept]) @ v[: len(s)][:kept]
        np.testing.assert_allclose(applied[WEIGHT], base[WEIGHT] + product, atol=2e-6)


def test_what_is_no_linear_layer_may_be_averaged(models):
    base, experts = models
    merged = merge_state_dicts("smile", base, experts, average_experts=True)
    for name in SHAPES:
        mean = sum(expert[name] for expert in experts) / 3
        # a mean of three in float32
        np.testing.assert_allclose(merged[name], base[name] if name in (WEIGHT, BIAS) else mean, atol=1e-6)


@pytest.mark.parametrize("gate_from", ["difference", "weights"])
def test_the_gate_has_the_leading_directions_of_every_expert(models, gate_from):
    base, experts = models
    gate = merge_state_dicts("smile", base, experts, gate_rank=2, gate_from=gate_from).shared[WEIGHT]["gate"]
    assert gate.shape == (6, 16)
    for t, expert in enumerate(experts):
        matrix = expert[WEIGHT] - (base[WEIGHT] if gate_from == "difference" else 0)
        directions = np.linalg.svd(matrix.astype(np.float64))[2][:2]
        agreement = np.abs(gate[2 * t : 2 * t + 2] @ directions.T)
        np.testing.assert_allclose(agreement, np.eye(2), atol=1e-5)  # up to their sign; float32


@pytest.mark.parametrize("rank", [4, 0])
def test_a_routed_layer_is_its_definition(models, rank):
    base, experts = models
    merged = merge_state_dicts("smile", base, experts, rank=rank, gate_rank=2)
    inputs, gate = random_array((7, 16), np.float32, 99), merged.shared[WEIGHT]["gate"]
    routing = route(inputs, gate, 3, 2)
    outputs = forward(
        inputs,
        merged[WEIGHT],
        merged[BIAS],
        [expert.tensors[WEIGHT] for expert in merged.experts],
        [expert.tensors[BIAS] for expert in merged.experts],
        routing.weights,
    )
    for x, y, z, weights in zip(inputs, outputs, routing.logits, routing.weights, strict=True):
        norms = [np.linalg.norm(gate[2 * t : 2 * t + 2] @ x) for t in range(3)]
        np.testing.assert_allclose(z, norms, rtol=1e-5)
        chances = np.exp(norms) / np.exp(norms).sum()
        best = np.argsort(-chances)[:2]
        np.testing.assert_allclose(weights[best], chances[best] / chances[best].sum(), rtol=1e-5)
        assert np.count_nonzero(weights) == 2
        # the layers that each chosen expert alone would be
        applied = [expert.apply(merged) for expert in merged.experts]
        answers = [weights[t] * (applied[t][WEIGHT] @ x + applied[t][BIAS]) for t in best]
        np.testing.assert_allclose(y, sum(answers), atol=1e-4)


def test_a_single_expert_answers_every_input(models):
    base, experts = models
    gate = merge_state_dicts("smile", base, experts[:1]).shared[WEIGHT]["gate"]
    assert route(random_array((5, 16), np.float32, 0), gate, 1, 1).weights.tolist() == [[1.0]] * 5


@pytest.mark.parametrize("given", [{"top_k": 4}, {"top_k": 0}, {"gate_rank": 0}], ids=str)
def test_what_cannot_be_met_is_said(models, given):
    with pytest.raises(RecipeError, match="at most 3 experts"):
        merge_state_dicts("smile", *models, **given)


def test_on_disk_it_is_the_same_as_in_memory(tmp_path):
    tensors = {}
    for t, name in enumerate(("base", "math", "code")):
        tensors[name] = tiny_llama(t, dtype=np.float16)
        write_checkpoint(tmp_path / name, tensors[name], config=tiny_llama_config())
    given = {"rank": 3, "gate_rank": 2}
    freemerge.merge("smile", tmp_path / "base", [tmp_path / "math", tmp_path / "code"], tmp_path / "out", **given)
    merged = merge_state_dicts("smile", tensors.pop("base"), tensors, **given)
    for in_memory in merged.experts:
        expert = read_expert(tmp_path / "out" / "experts" / f"{in_memory.name}.safetensors")
        assert (expert.metadata["rank"], expert.metadata["top_k"]) == ("3", "1")
        assert expert.tensors.keys() == in_memory.tensors.keys()
        for name, part in in_memory.tensors.items():
            for role, array in part.arrays.items():
                np.testing.assert_array_equal(expert.tensors[name].arrays[role], array)
        assert expert.shared.tensors.keys() == merged.shared.keys()
        for name, arrays in merged.shared.items():
            np.testing.assert_array_equal(expert.shared.tensors[name]["gate"], arrays["gate"])
    assert all(summary.shared_nbytes > 0 for summary in list_experts(tmp_path / "out"))

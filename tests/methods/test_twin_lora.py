"""twin_lora: shared factors, experts of low rank against NumPy's decomposition; on disk, adapters all the way."""

import json

import numpy as np
import pytest

import freemerge
from freemerge import merge_state_dicts
from freemerge.checkpoint.reader import open_adapter
from freemerge.checkpoint.verify import verify
from freemerge.errors import InputError, PlanError, RecipeError
from freemerge.experts.apply import apply_expert, list_experts
from freemerge.experts.from_model import extract_expert
from freemerge.testing import random_array, tiny_llama, write_safetensors

Q, CONV = "base_model.model.q_proj", "base_model.model.conv"
SHAPES = {
    f"{Q}.lora_A.weight": (8, 40),
    f"{Q}.lora_B.weight": (30, 8),
    f"{CONV}.lora_A.weight": (8, 2, 3, 3),
    f"{CONV}.lora_B.weight": (5, 8, 1, 1),
    "base_model.model.norm.weight": (9,),
}


def adapters(count):
    items = list(enumerate(SHAPES.items()))
    return [{n: random_array(s, np.float32, 10 * t + i) for i, (n, s) in items} for t in range(count)]


def nearest(matrix, rank):
    left, values, right = np.linalg.svd(matrix.astype(float), full_matrices=False)
    return (left[:, :rank] * values[:rank]) @ right[:rank]


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_shared_factors_and_experts(rank):
    experts = adapters(3)
    merged = merge_state_dicts("twin_lora", None, experts, rank=rank, scaling=0.4)
    for name, shape in SHAPES.items():
        weight = 0.4 if "lora" in name else 1 / 3
        np.testing.assert_allclose(merged[name], weight * sum(one[name] for one in experts), atol=1e-6, err_msg=name)
        for expert, one in zip(merged.experts, experts, strict=True):
            part = expert.tensors[name]
            low = len(shape) == 2 and rank * sum(shape) < np.prod(shape)
            assert part.kind == ("low_rank" if low else "difference")
            rest = one[name] - merged[name]
            found = expert.apply(merged)[name] - merged[name]
            np.testing.assert_allclose(found, nearest(rest, rank) if low else rest, rtol=0, atol=2e-6, err_msg=name)


def test_what_it_takes():
    with pytest.raises(RecipeError, match="rank: 0 is not a rank"):
        merge_state_dicts("twin_lora", None, adapters(2), rank=0)
    with pytest.raises(PlanError, match="no LoRA adapter"):
        merge_state_dicts("twin_lora", None, [tiny_llama(0), tiny_llama(1)])


def test_adapters_on_disk(tmp_path):
    experts = adapters(2)
    for name, tensors in zip("ab", experts, strict=True):
        (tmp_path / name).mkdir()
        config = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "base_model_name_or_path": "nowhere"}
        (tmp_path / name / "adapter_config.json").write_text(json.dumps(config))
        write_safetensors(tmp_path / name / "adapter_model.safetensors", tensors)
    out = tmp_path / "out"
    result = freemerge.merge("twin_lora", experts=[tmp_path / "a", tmp_path / "b"], out=out, rank=2)
    assert result.experts == ("a", "b")
    assert verify(out).ok
    assert [expert.name for expert in list_experts(out)] == ["a", "b"]
    with pytest.raises(InputError, match="out is a LoRA adapter"):
        extract_expert(out, tmp_path / "a", name="c")
    apply_expert(out, "b", tmp_path / "with_b")
    assert json.loads((tmp_path / "with_b/adapter_config.json").read_bytes())["lora_alpha"] == 16
    assert "library_name: peft" in (tmp_path / "with_b/README.md").read_text()
    expected = merge_state_dicts("twin_lora", None, experts, rank=2)
    with open_adapter(out) as shared, open_adapter(tmp_path / "with_b") as applied:
        assert set(applied.tensors) == set(SHAPES)
        for name, array in expected.experts[1].apply(expected).items():
            np.testing.assert_array_equal(shared.read(name), expected[name], err_msg=name)
            np.testing.assert_array_equal(applied.read(name), array, err_msg=name)

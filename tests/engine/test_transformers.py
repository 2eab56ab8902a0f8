"""What freemerge writes is what transformers loads."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageClassification

import freemerge
from freemerge.experts.apply import apply_expert
from freemerge.testing import tiny_llama, tiny_llama_config, tiny_vit, tiny_vit_config, write_checkpoint

LLAMA = (AutoModelForCausalLM, tiny_llama, tiny_llama_config)
VIT = (AutoModelForImageClassification, tiny_vit, tiny_vit_config)


def on_disk(folder, tiny, config, dtype):
    paths = []
    for seed in range(3):
        path = write_checkpoint(
            folder / str(seed), tiny(seed, dtype=dtype), config=config(torch_dtype=np.dtype(dtype).name)
        )
        (path / "generation_config.json").write_text('{"bos_token_id": 1, "eos_token_id": 2}')
        paths.append(str(path))
    return paths[0], paths[1:]


@pytest.mark.parametrize("method", ["task_arithmetic", "free"])
@pytest.mark.parametrize(("auto", "tiny", "config"), [LLAMA, VIT], ids=["llama", "vit"])
def test_from_pretrained_loads_a_merge(tmp_path, auto, tiny, config, method):
    base, experts = on_disk(tmp_path, tiny, config, np.float32)
    freemerge.merge(method, base, experts, tmp_path / "merged", shard_size="40kB")
    model, info = auto.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(info[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    reference = auto.from_pretrained(base)
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert any(not torch.equal(p, q) for p, q in zip(model.parameters(), reference.parameters(), strict=True))


def test_from_pretrained_loads_an_applied_expert_and_ties_what_was_tied(tmp_path):
    paths = []
    for seed in range(2):
        tensors = tiny_llama(seed, tie_word_embeddings=True)
        paths.append(
            str(write_checkpoint(tmp_path / str(seed), tensors, config=tiny_llama_config(tie_word_embeddings=True)))
        )
    freemerge.merge("free", paths[0], {"math": paths[1]}, tmp_path / "merged")
    apply_expert(tmp_path / "merged", "math", tmp_path / "applied")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "applied")
    assert model.lm_head.weight is model.model.embed_tokens.weight

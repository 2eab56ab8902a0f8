"""Tiny models for recipes that mergekit and freemerge both run: real names, tokenizers of their own, one LoRA adapter.

folder/f32, bf16, tied    Llamas: base, math, code, chat (fine-tuned from it), other, third (of other tokens), padded
folder/gpt2, bert, qwen   base, math, code; tied, with biases, of other names
folder/t5                 the same, with an encoder and a decoder
"""

import json
from pathlib import Path

import numpy as np

from freemerge.kernels.array import BFLOAT16
from freemerge.testing import random_array, tiny_llama, tiny_llama_config, tiny_tokenizer, write_checkpoint

LAYERS, HIDDEN, INNER = 3, 32, 48
COMMON = tiny_tokenizer(["ab", "abc", "th", "the", "in", "ing"], ("<|im_end|>",), "{{ messages[0].content }}")
OTHER = tiny_tokenizer(["ab", "abd", "qu", "th", "the"], ("<|im_start|>", "<|im_end|>"), "{{ 'other' }}")
THIRD = tiny_tokenizer(["qu", "xy", "xyz"], ("<|im_start|>", "<|extra|>"), "{{ 'other' }}")


def make_zoo(folder: Path) -> None:
    _llamas(folder / "f32", np.float32)
    _llamas(folder / "bf16", BFLOAT16)
    _llamas(folder / "tied", np.float32, tie_word_embeddings=True)
    _adapter(folder / "f32/lora")
    size = _vocab_size(COMMON)
    _family(folder / "gpt2", _gpt2(size), GPT2 | {"vocab_size": size})
    _family(folder / "bert", _bert(size), BERT | {"vocab_size": size})
    _family(folder / "qwen", _qwen(size), _qwen_config(size))
    _family(folder / "t5", _t5(size), T5 | {"vocab_size": size})


def _vocab_size(files: dict[str, dict]) -> int:
    data = files["tokenizer.json"]
    return len(set(data["model"]["vocab"]) | {token["content"] for token in data["added_tokens"]})


def _write(folder: Path, tensors: dict, config: dict, files: dict[str, dict] = COMMON) -> None:
    write_checkpoint(folder, tensors, config=config)
    for name, data in files.items():
        (folder / name).write_text(json.dumps(data, indent=2))


def _moved(tensors: dict, seed: int, scale: float = 2e-3) -> dict:
    """A fine-tune: every tensor moved by normal numbers."""
    found = {}
    for i, (name, array) in enumerate(tensors.items()):
        move = random_array(array.shape, np.float32, seed=1000 * seed + i, scale=scale)
        found[name] = (array.astype(np.float32) + move).astype(array.dtype)
    return found


def _family(folder: Path, base: dict, config: dict) -> None:
    _write(folder / "base", base, config)
    for seed, name in enumerate(("math", "code", "chat"), 1):
        _write(folder / name, _moved(base, seed), config)


def _llamas(folder: Path, dtype, **overrides) -> None:
    size = _vocab_size(COMMON)
    shape = {"num_hidden_layers": LAYERS, "vocab_size": size, "hidden_size": HIDDEN, "intermediate_size": INNER}
    shape |= overrides
    config = tiny_llama_config(torch_dtype=np.dtype(dtype).name, **shape)
    _family(folder, tiny_llama(0, dtype=dtype, **shape), config)
    models = {"other": (OTHER, _vocab_size(OTHER)), "third": (THIRD, _vocab_size(THIRD)), "padded": (COMMON, size + 5)}
    for seed, (name, (files, rows)) in enumerate(models.items(), 5):
        tensors = tiny_llama(seed, dtype=dtype, **(shape | {"vocab_size": rows}))
        _write(folder / name, tensors, config | {"vocab_size": rows}, files)


def _adapter(folder: Path) -> None:
    """A LoRA adapter for f32/base, as PEFT saves one."""
    rank, tensors = 3, {}
    for i in range(LAYERS):
        for j, (name, rows, columns) in enumerate(
            (("self_attn.q_proj", HIDDEN, HIDDEN), ("mlp.up_proj", INNER, HIDDEN))
        ):
            head = f"base_model.model.model.layers.{i}.{name}"
            tensors[f"{head}.lora_A.weight"] = random_array((rank, columns), np.float32, seed=50 + 2 * i + j, scale=0.1)
            tensors[f"{head}.lora_B.weight"] = random_array((rows, rank), np.float32, seed=90 + 2 * i + j, scale=0.1)
    folder.mkdir(parents=True)
    write_checkpoint(folder, tensors)
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    settings = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": 6,
        "target_modules": ["q_proj", "up_proj"],
        "bias": "none",
    }
    settings |= {"base_model_name_or_path": None, "task_type": "CAUSAL_LM", "inference_mode": True}
    (folder / "adapter_config.json").write_text(json.dumps(settings))


GPT2 = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "n_embd": HIDDEN, "n_layer": LAYERS, "n_head": 4}
GPT2 |= {"n_positions": 40, "torch_dtype": "float32"}
BERT = {"architectures": ["BertForMaskedLM"], "model_type": "bert", "hidden_size": HIDDEN, "num_hidden_layers": LAYERS}
BERT |= {"num_attention_heads": 4, "intermediate_size": INNER, "max_position_embeddings": 40, "torch_dtype": "float32"}
T5 = {"architectures": ["T5ForConditionalGeneration"], "model_type": "t5", "d_model": HIDDEN, "d_ff": INNER, "d_kv": 8}
T5 |= {
    "feed_forward_proj": "gated-gelu",
    "num_layers": 2,
    "num_decoder_layers": LAYERS,
    "num_heads": 4,
    "torch_dtype": "float32",
}


def _filled(shapes: dict[str, tuple[int, ...]]) -> dict:
    return {name: random_array(shape, np.float32, seed=i, scale=0.05) for i, (name, shape) in enumerate(shapes.items())}


def _linear(name: str, rows: int, columns: int) -> dict:
    return {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}


def _norm(name: str) -> dict:
    return {f"{name}.weight": (HIDDEN,), f"{name}.bias": (HIDDEN,)}


def _gpt2(size: int) -> dict:
    shapes = {"transformer.wte.weight": (size, HIDDEN), "transformer.wpe.weight": (40, HIDDEN)}
    for i in range(LAYERS):
        layer = f"transformer.h.{i}"
        shapes |= _norm(f"{layer}.ln_1") | _norm(f"{layer}.ln_2")
        wide = {"attn.c_attn": 3 * HIDDEN, "attn.c_proj": HIDDEN, "mlp.c_fc": 4 * HIDDEN}
        for name, columns in wide.items():
            shapes |= {f"{layer}.{name}.weight": (HIDDEN, columns), f"{layer}.{name}.bias": (columns,)}
        shapes |= {f"{layer}.mlp.c_proj.weight": (4 * HIDDEN, HIDDEN), f"{layer}.mlp.c_proj.bias": (HIDDEN,)}
    return _filled(shapes | _norm("transformer.ln_f"))


def _bert(size: int) -> dict:
    head = "bert.embeddings"
    shapes = {f"{head}.word_embeddings.weight": (size, HIDDEN), f"{head}.position_embeddings.weight": (40, HIDDEN)}
    shapes |= {f"{head}.token_type_embeddings.weight": (2, HIDDEN)} | _norm(f"{head}.LayerNorm")
    for i in range(LAYERS):
        layer = f"bert.encoder.layer.{i}"
        for name in ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"):
            shapes |= _linear(f"{layer}.{name}", HIDDEN, HIDDEN)
        shapes |= _linear(f"{layer}.intermediate.dense", INNER, HIDDEN) | _linear(
            f"{layer}.output.dense", HIDDEN, INNER
        )
        shapes |= _norm(f"{layer}.attention.output.LayerNorm") | _norm(f"{layer}.output.LayerNorm")
    shapes |= _linear("bert.pooler.dense", HIDDEN, HIDDEN)
    shapes |= {"cls.predictions.bias": (size,)} | _linear("cls.predictions.transform.dense", HIDDEN, HIDDEN)
    return _filled(shapes | _norm("cls.predictions.transform.LayerNorm"))


def _qwen_config(size: int) -> dict:
    shape = {"num_hidden_layers": LAYERS, "vocab_size": size, "hidden_size": HIDDEN, "intermediate_size": INNER}
    config = tiny_llama_config(torch_dtype="float32", tie_word_embeddings=True, **shape)
    return config | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}


def _qwen(size: int) -> dict:
    shape = {"num_hidden_layers": LAYERS, "vocab_size": size, "hidden_size": HIDDEN, "intermediate_size": INNER}
    tensors = tiny_llama(3, tie_word_embeddings=True, **shape)
    for name in [name for name in tensors if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight"))]:
        rows = tensors[name].shape[0]
        tensors[name.replace("weight", "bias")] = random_array((rows,), np.float32, seed=len(name) + rows, scale=0.05)
    return tensors


def _t5(size: int) -> dict:
    shapes: dict[str, tuple[int, ...]] = {"shared.weight": (size, HIDDEN)}
    for side, layers in (("encoder", 2), ("decoder", LAYERS)):
        for i in range(layers):
            parts = ["SelfAttention", "EncDecAttention"] if side == "decoder" else ["SelfAttention"]
            for j, part in enumerate(parts):
                layer = f"{side}.block.{i}.layer.{j}"
                shapes |= {f"{layer}.{part}.{name}.weight": (HIDDEN, HIDDEN) for name in "qkvo"}
                shapes |= {f"{layer}.layer_norm.weight": (HIDDEN,)}
            layer = f"{side}.block.{i}.layer.{len(parts)}"
            shapes |= {f"{layer}.DenseReluDense.wi_{k}.weight": (INNER, HIDDEN) for k in (0, 1)}
            shapes |= {f"{layer}.layer_norm.weight": (HIDDEN,)}
            shapes |= {f"{layer}.DenseReluDense.wo.weight": (HIDDEN, INNER)}
        shapes |= {f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight": (32, 4)}
        shapes |= {f"{side}.final_layer_norm.weight": (HIDDEN,)}
    return _filled(shapes)

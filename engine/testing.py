"""For tests and benchmarks: poisoned outputs, random arrays of any dtype, tiny checkpoints with real names."""

import json
import os
from pathlib import Path

import numpy as np

from freemerge.checkpoint.dtypes import NAMES
from freemerge.kernels import dispatch
from freemerge.kernels.array import FLOATS, Array, store

__all__ = [
    "FLOATS",
    "from_gpu",
    "interpret_triton",
    "poisoned",
    "random_array",
    "tiny_llama",
    "tiny_llama_config",
    "tiny_tokenizer",
    "tiny_vit",
    "tiny_vit_config",
    "to_gpu",
    "versions",
    "write_checkpoint",
    "write_safetensors",
]


def random_array(shape, dtype, seed: int, scale: float = 1.0) -> Array:
    """Normal numbers times `scale`, rounded to `dtype`."""
    values = np.random.default_rng(seed).standard_normal(shape, dtype=np.float64) * scale
    out = np.empty(shape, dtype)
    store(values, out)
    return out


def poisoned(shape, dtype) -> Array:
    """An array of NaN: an element nobody wrote cannot pass for a result."""
    return np.full(shape, np.nan, dtype)


def interpret_triton() -> None:
    """Let Triton's interpreter run the kernels of kernels/triton on CPU tensors; call it before Triton is imported."""
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined, Triton's own ones too
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patch_and_mend(tensor, scope):
        # Triton 3.6 makes an index of an array of one element, which NumPy 2.4 refuses
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_and_mend

    patched = set()

    def call(function, *args, **kwargs):
        # patching Triton's language for each function a kernel calls, as it does, takes most of a test's time
        if function.fn.__module__ not in patched and function.fn.__module__.startswith("triton."):
            interpreter._patch_lang(function.fn)
            patched.add(function.fn.__module__)
        return function.rewrite()(*args, **kwargs)

    interpreter.InterpretedFunction.__call__ = call


def to_gpu(array: Array):
    """A copy as a torch tensor: on the GPU where there is one, else on the CPU, for Triton's interpreter."""
    import torch

    from freemerge.checkpoint.torch_arrays import to_torch

    return to_torch(array.copy()).to("cuda" if torch.cuda.is_available() else "cpu")


def from_gpu(tensor) -> Array:
    """A tensor's elements as a NumPy array."""
    from freemerge.checkpoint.torch_arrays import from_torch

    return from_torch(tensor.cpu())


def versions(op: str) -> list[str]:
    """The compiled versions of `op` there are on this machine, by name."""
    return ["cpu"] if hasattr(dispatch._cpu, op) else []


def write_safetensors(
    path: str | os.PathLike, tensors: dict[str, Array], metadata: dict[str, str] | None = None
) -> None:
    """The format in a dozen lines, apart from freemerge's writer: something to test reader and writer against."""
    header: dict[str, dict] = {"__metadata__": metadata} if metadata else {}
    position = 0
    for name, array in tensors.items():
        offsets = [position, position := position + array.nbytes]
        header[name] = {"dtype": NAMES[array.dtype], "shape": list(array.shape), "data_offsets": offsets}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for array in tensors.values():
            file.write(array.tobytes())


def write_checkpoint(
    folder: str | os.PathLike, tensors: dict[str, Array], *, shards: int = 1, config: dict | None = None
) -> Path:
    """A checkpoint directory: model.safetensors, or an index and `shards` files of about as many tensors each."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config, indent=2))
    if shards == 1:
        write_safetensors(folder / "model.safetensors", tensors, {"format": "pt"})
        return folder
    weight_map = {}
    for i in range(shards):
        names = list(tensors)[i * len(tensors) // shards : (i + 1) * len(tensors) // shards]
        shard = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        write_safetensors(folder / shard, {name: tensors[name] for name in names}, {"format": "pt"})
        weight_map |= dict.fromkeys(names, shard)
    size = sum(array.nbytes for array in tensors.values())
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": size}, "weight_map": weight_map}, indent=2)
    )
    return folder


def tiny_llama(seed: int, *, dtype=np.float32, scale: float = 0.02, **overrides) -> dict[str, Array]:
    """A LlamaForCausalLM of `tiny_llama_config(**overrides)`: normal numbers times `scale`, norms around one."""
    config = tiny_llama_config(**overrides)
    hidden, inner, vocabulary = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    kv = hidden // heads * kv_heads
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        shapes |= {
            f"{layer}.self_attn.q_proj.weight": (hidden, hidden),
            f"{layer}.self_attn.k_proj.weight": (kv, hidden),
            f"{layer}.self_attn.v_proj.weight": (kv, hidden),
            f"{layer}.self_attn.o_proj.weight": (hidden, hidden),
            f"{layer}.mlp.gate_proj.weight": (inner, hidden),
            f"{layer}.mlp.up_proj.weight": (inner, hidden),
            f"{layer}.mlp.down_proj.weight": (hidden, inner),
            f"{layer}.input_layernorm.weight": (hidden,),
            f"{layer}.post_attention_layernorm.weight": (hidden,),
        }
    shapes["model.norm.weight"] = (hidden,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (vocabulary, hidden)
    return _random_weights(shapes, dtype, seed, scale)


def tiny_llama_config(**overrides) -> dict:
    """config.json of a Llama of 52 thousand parameters that transformers can run; `overrides` replace entries."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 160,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
    } | overrides


def tiny_tokenizer(words: list[str], added: tuple[str, ...] = (), template: str | None = None) -> dict[str, dict]:
    """tokenizer.json and tokenizer_config.json, by name: byte pairs over a to z.

    Args:
        words: tokens beside the letters, each made of one before it, or a letter, and a letter.
        added: special tokens, beside <unk>, <s> and </s>, under the last ids.
        template: the chat template.
    """
    special = ["<unk>", "<s>", "</s>"]
    vocab = {token: i for i, token in enumerate([*special, *"abcdefghijklmnopqrstuvwxyz", *words])}
    numbered = {token: vocab[token] for token in special} | {token: len(vocab) + i for i, token in enumerate(added)}
    settings = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    merges = [[word[:-1], word[-1]] for word in words]
    data = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": number, "content": token, **settings} for token, number in numbered.items()],
        "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "BPE", "unk_token": "<unk>", "vocab": vocab, "merges": merges},
    }
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    config |= {"unk_token": "<unk>", "model_max_length": 64, **({"chat_template": template} if template else {})}
    return {"tokenizer.json": data, "tokenizer_config.json": config}


def tiny_vit(seed: int, *, dtype=np.float32, scale: float = 0.02, **overrides) -> dict[str, Array]:
    """A ViTForImageClassification of `tiny_vit_config(**overrides)`: tensors of 1, 2, 3 and 4 dimensions."""
    config = tiny_vit_config(**overrides)
    hidden, inner, patch = config["hidden_size"], config["intermediate_size"], config["patch_size"]
    patches, channels = (config["image_size"] // patch) ** 2, config["num_channels"]
    shapes: dict[str, tuple[int, ...]] = {
        "vit.embeddings.cls_token": (1, 1, hidden),
        "vit.embeddings.position_embeddings": (1, patches + 1, hidden),
        "vit.embeddings.patch_embeddings.projection.weight": (hidden, channels, patch, patch),
        "vit.embeddings.patch_embeddings.projection.bias": (hidden,),
    }
    for i in range(config["num_hidden_layers"]):
        layer = f"vit.encoder.layer.{i}"
        linears = {
            "attention.attention.query": (hidden, hidden),
            "attention.attention.key": (hidden, hidden),
            "attention.attention.value": (hidden, hidden),
            "attention.output.dense": (hidden, hidden),
            "intermediate.dense": (inner, hidden),
            "output.dense": (hidden, inner),
        }
        for name, shape in linears.items():
            shapes |= {f"{layer}.{name}.weight": shape, f"{layer}.{name}.bias": shape[:1]}
        for name in ("layernorm_before", "layernorm_after"):
            shapes |= {f"{layer}.{name}.weight": (hidden,), f"{layer}.{name}.bias": (hidden,)}
    shapes |= {"vit.layernorm.weight": (hidden,), "vit.layernorm.bias": (hidden,)}
    shapes |= {"classifier.weight": (len(config["id2label"]), hidden), "classifier.bias": (len(config["id2label"]),)}
    return _random_weights(shapes, dtype, seed, scale)


def tiny_vit_config(**overrides) -> dict:
    """config.json of a ViT of 19 thousand parameters that transformers can run; `overrides` replace entries."""
    return {
        "architectures": ["ViTForImageClassification"],
        "model_type": "vit",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 16,
        "patch_size": 4,
        "num_channels": 3,
        "id2label": {"0": "a", "1": "b", "2": "c"},
        "label2id": {"a": 0, "b": 1, "c": 2},
    } | overrides


def _random_weights(shapes: dict[str, tuple[int, ...]], dtype, seed: int, scale: float) -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    weights = {}
    for name, shape in shapes.items():
        values = rng.standard_normal(shape) * scale + (1.0 if "norm" in name and name.endswith("weight") else 0.0)
        weights[name] = np.empty(shape, dtype)
        store(values, weights[name])
    return weights

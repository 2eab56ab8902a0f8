"""Llama-shaped checkpoints of any size: a base, and experts whose task vectors have low-rank, sparse and noise parts.

The bytes depend on shape and seed alone, not on threads. As a program: python synthetic.py DIRECTORY SIZE EXPERTS.
"""

import json
import math
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from itertools import chain
from pathlib import Path
from zlib import crc32

import numpy as np

BLOCK = 1 << 18  # elements made at once, by one thread: what stays in cache, and in memory the allocator keeps
RANK = 16
SPARSE_DENSITY = 0.005
# Standard deviations: Llama's own initialisation, then the parts of a task vector
INITIAL, LOW_RANK, SPARSE, NOISE = 0.02, 2e-4, 2e-3, 2e-4


@dataclass(frozen=True)
class Llama:
    hidden: int = 2048
    intermediate: int = 5632
    layers: int = 22
    vocabulary: int = 32000
    heads: int = 32
    kv_heads: int = 4

    def scaled(self, size: float) -> "Llama":
        """`size` times the parameters in matrices of the same width: fewer layers and words."""
        return replace(self, layers=max(1, round(self.layers * size)), vocabulary=max(1, round(self.vocabulary * size)))

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Name to shape, in the order in which transformers saves them."""
        hidden, kv = self.hidden, self.hidden * self.kv_heads // self.heads
        layer = {
            "input_layernorm": (hidden,),
            "mlp.down_proj": (hidden, self.intermediate),
            "mlp.gate_proj": (self.intermediate, hidden),
            "mlp.up_proj": (self.intermediate, hidden),
            "post_attention_layernorm": (hidden,),
            "self_attn.k_proj": (kv, hidden),
            "self_attn.o_proj": (hidden, hidden),
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.v_proj": (kv, hidden),
        }
        found = {"lm_head.weight": (self.vocabulary, hidden), "model.embed_tokens.weight": (self.vocabulary, hidden)}
        for index in range(self.layers):
            found |= {f"model.layers.{index}.{name}.weight": shape for name, shape in layer.items()}
        return found | {"model.norm.weight": (hidden,)}

    def parameters(self) -> int:
        return sum(map(math.prod, self.tensors().values()))

    def config(self) -> dict:
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
        }


FULL = Llama()


@dataclass(frozen=True)
class Checkpoints:
    """A base and its experts on disk: directories with config.json and model.safetensors."""

    llama: Llama
    base: Path
    experts: tuple[Path, ...]

    @property
    def directories(self) -> list[Path]:
        return [self.base, *self.experts]

    def bytes_each(self) -> int:
        return (self.base / "model.safetensors").stat().st_size


def make_checkpoints(directory: Path, llama: Llama, experts: int, *, seed: int = 0) -> Checkpoints:
    """Write base and `experts` experts below `directory`, unless they lie there already."""
    base = make_checkpoint(directory / "base", llama, None, seed)
    return Checkpoints(
        llama, base, tuple(make_checkpoint(directory / f"expert{t}", llama, base, seed + 1 + t) for t in range(experts))
    )


def make_checkpoints_in_process(directory: Path, size: float, experts: int) -> Checkpoints:
    """The same in a process of its own with one BLAS thread: we have threads already, and BLAS spins where it waits."""
    command = [sys.executable, __file__, directory, str(size), str(experts)]
    subprocess.run(command, check=True, env={**os.environ, "OPENBLAS_NUM_THREADS": "1"})
    return make_checkpoints(directory, FULL.scaled(size), experts)


def make_checkpoint(directory: Path, llama: Llama, base: Path | None, seed: int) -> Path:
    recipe = json.dumps({"seed": seed, "expert": base is not None, **asdict(llama)})
    made = directory / "synthetic.json"
    if made.exists() and made.read_text() == recipe:
        return directory
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(llama.config(), indent=2))
    write_tensors(directory / "model.safetensors", llama, base and base / "model.safetensors", seed)
    made.write_text(recipe)  # last: a directory without it is half-written
    return directory


def write_tensors(path: Path, llama: Llama, base: Path | None, seed: int) -> None:
    header, begin = layout(llama)
    size = begin + 2 * llama.parameters()
    base_words = None if base is None else np.memmap(base, np.uint8, "r")[begin:].view(np.uint16)
    file = os.open(path, os.O_CREAT | os.O_RDWR, 0o644)
    try:
        os.truncate(file, size)
        os.pwrite(file, header, 0)

        def write(job):
            name, first, rows, width, at = job
            words = None if base_words is None else base_words[at : at + rows * width]
            values = make_block(name, first, rows, width, seed, words)
            os.pwrite(file, to_bfloat16(values), begin + 2 * at)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(write, blocks(llama)))
    finally:
        os.close(file)


def layout(llama: Llama) -> tuple[bytes, int]:
    """The head of the safetensors file (length, JSON, padding), and where the data begins."""
    entries, at = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in llama.tensors().items():
        end = at + 2 * math.prod(shape)
        entries[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, end]}
        at = end
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, 8 + len(text)


def blocks(llama: Llama):
    """(name, first row, rows, width, first element in the file) of each block; a vector is one row."""
    at = 0
    for name, shape in llama.tensors().items():
        height, width = (1, *shape)[-2:]
        step = max(1, BLOCK // width)
        for first in range(0, height, step):
            rows = min(step, height - first)
            yield name, first, rows, width, at
            at += rows * width


def make_block(name: str, first: int, rows: int, width: int, seed: int, base: np.ndarray | None) -> np.ndarray:
    """[rows, width] float32: of the base where `base` is None, else the base's bfloat16 words plus a task vector."""
    random = np.random.default_rng([seed, crc32(name.encode()), first])
    values = random.standard_normal((rows, width), np.float32)
    if base is None:
        values *= INITIAL
        values += name.endswith("norm.weight")
        return values
    values *= NOISE
    if rows > 1:
        left = random.standard_normal((rows, RANK), np.float32) * np.float32(LOW_RANK / math.sqrt(RANK))
        values += left @ low_rank_factor(name, width, seed)
    chosen = random.integers(0, values.size, int(values.size * SPARSE_DENSITY))
    values.reshape(-1)[chosen] += random.standard_normal(chosen.size, np.float32) * np.float32(SPARSE)
    values += from_bfloat16(base).reshape(rows, width)
    return values


@lru_cache(maxsize=8)
def low_rank_factor(name: str, width: int, seed: int) -> np.ndarray:
    return np.random.default_rng([seed, crc32(name.encode())]).standard_normal((RANK, width), np.float32)


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    """Nearest-even, as uint16. By hand because the cast of ml_dtypes holds the interpreter's lock."""
    words = values.view(np.uint32)
    odd = (words >> 16) & 1
    odd += 0x7FFF
    odd += words
    return odd.view(np.uint16)[..., 1::2].copy()


def from_bfloat16(words: np.ndarray) -> np.ndarray:
    return (words.astype(np.uint32) << 16).view(np.float32)


def read_tensor(directory: Path, name: str) -> np.ndarray:
    """One bfloat16 tensor of a checkpoint, single or sharded, as float32: by hand, so that nobody checks himself."""
    for path in sorted(directory.glob("*.safetensors")):
        head, begin = read_header(path)
        if name in head:
            first, last = head[name]["data_offsets"]
            words = np.fromfile(path, np.uint16, (last - first) // 2, offset=begin + first)
            return from_bfloat16(words).reshape(head[name]["shape"])
    raise KeyError(name)


def read_shapes(directory: Path) -> dict[str, tuple[int, ...]]:
    heads = (read_header(path)[0].items() for path in sorted(directory.glob("*.safetensors")))
    return {name: tuple(entry["shape"]) for name, entry in chain.from_iterable(heads) if name != "__metadata__"}


def read_header(path: Path) -> tuple[dict, int]:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        return json.loads(file.read(length)), 8 + length


if __name__ == "__main__":
    make_checkpoints(Path(sys.argv[1]), FULL.scaled(float(sys.argv[2])), int(sys.argv[3]))

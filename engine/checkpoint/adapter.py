"""PEFT's LoRA adapters: what their configuration and tensors say about the tensors of a base.

Source: github.com/huggingface/peft, src/peft/tuners/lora (0.21).
"""

import json
import math
import os
import re
from functools import partial

import numpy as np

from freemerge.checkpoint.files import FileState, check_unchanged, fingerprint
from freemerge.checkpoint.header import few, shown
from freemerge.checkpoint.low_rank import Change, LowRank
from freemerge.errors import CheckpointError, listed
from freemerge.kernels.array import Array, is_float
from freemerge.lora_names import part_of

CONFIG = "adapter_config.json"
SUPPORTED = "Adapters of peft_type LORA are read: plain, rsLoRA and DoRA. Merge others into their base with PEFT first."
REMEDY = "Apply an adapter to the model it was trained on, or merge it into that with PEFT first."
# Options with which an adapter is more than an update of single matrices.
REFUSED = {
    "target_parameters": "adapters of bare parameters",
    "layer_replication": "replicated layers",
    "trainable_token_indices": "trainable tokens",
    "alora_invocation_tokens": "adapters that certain tokens switch on",
    "use_qalora": "QALoRA",
    "use_bdlora": "BD-LoRA",
    "arrow_config": "Arrow",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
}
_CHANGES_BASE = re.compile(r"pissa.*|olora|corda|loftq|lora_ga")
_PREFIX = re.compile(r"^base_model\.(model\.)?")
_UNUSED = re.compile(r"\.original_module\.")  # of modules_to_save, whose trained copy is what counts
_HEADED = re.compile(r"LMHead|For(CausalLM|MaskedLM|ConditionalGeneration|PreTraining)")
_WRAPPER = re.compile(r"\.(base_layer|modules_to_save\.default|modules_to_save)(?=\.)")


class Adapter:
    """An open adapter: its tensors, a checkpoint's, and its configuration.

    Raises:
        CheckpointError: the configuration is missing, broken, or of a kind that is not read.
    """

    def __init__(self, checkpoint):
        self.checkpoint, self.label = checkpoint, checkpoint.label
        self._path = checkpoint.path / CONFIG
        try:
            self._state = FileState.of(self._path)
            self.config = json.loads(self._path.read_bytes())
        except (OSError, ValueError, RecursionError) as error:
            problems = [f"{CONFIG} cannot be read: {str(error)[:200]}"]
        else:
            problems = _config_problems(self.config)
        if problems:
            raise CheckpointError(listed((f"{self.label}: {problem}" for problem in problems), SUPPORTED))

    @property
    def base_name(self) -> str | None:
        """The model it was trained on, as the configuration names it."""
        name, revision = self.config.get("base_model_name_or_path"), self.config.get("revision")
        return f"{name}@{revision}" if name and revision and not os.path.exists(name) else name or None

    def changes(self, base) -> dict[str, Change]:
        """By name of the base's tensors, what the adapter makes of them.

        Args:
            base: an open checkpoint.

        Raises:
            CheckpointError: naming every tensor of the adapter that does not fit the base.
        """
        reading = _Reading(self, base)
        if reading.problems:
            problems = (f"{self.label}: {problem}" for problem in few(reading.problems))
            raise CheckpointError(listed(problems, REMEDY))
        return reading.changes

    def rank_and_scaling(self, module: str) -> tuple[int, float]:
        """r, and alpha / r or rsLoRA's alpha / sqrt(r), of a module by its path; the first pattern that fits counts."""
        rank = _by_pattern(self.config.get("rank_pattern"), module, self.config.get("r", 8))
        alpha = _by_pattern(self.config.get("alpha_pattern"), module, self.config.get("lora_alpha", 8))
        return rank, alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)

    def fingerprint(self) -> dict:
        """As of a checkpoint, the configuration included."""
        return {CONFIG: fingerprint(self._path, self._state.size), **self.checkpoint.fingerprint()}

    def check_unchanged(self) -> None:
        check_unchanged({self._path: self._state})
        self.checkpoint.check_unchanged()


class _Reading:
    """One pass over an adapter's tensors, which collects `changes` and `problems`.

    Of a module "model.layers.0.mlp.up_proj" it looks for the base's tensor "model.layers.0.mlp.up_proj.weight"; where
    there is none, for the only one whose name ends so, or that this name ends with.
    """

    def __init__(self, adapter: Adapter, base):
        self.adapter, self.base = adapter, base
        self.problems: list[str] = []
        self.changes: dict[str, Change] = {}
        self._modules: dict[str, dict[str, str]] = {}  # module -> "lora_A.weight" -> key
        self._taken: dict[str, str] = {}
        self._tied = tied_embedding(base)
        names, whole = set(), []
        for key in adapter.checkpoint.tensors:
            if _UNUSED.search(key):
                continue
            part = part_of(path := _plain(key))
            if part is None:
                whole.append((key, path))
                continue
            names.add(part.adapter)
            self._modules.setdefault(part.module, {})[f"{part.part}.{part.kind}"] = key
        if len(names) > 1:  # A of one must never meet B of another
            several = ", ".join(sorted(name or "a nameless one" for name in names))
            self.problems.append(f"holds several adapters ({several}); save each on its own")
            return
        for key, path in self._without_tied_head(whole):
            self._replace(key, path)
        for module, parts in self._modules.items():
            self._update(module, parts)

    def _without_tied_head(self, whole: list[tuple[str, str]]) -> list[tuple[str, str]]:
        """Without a head that is saved too and was trained with the embedding it is tied to; that may change then."""
        read = self.adapter.checkpoint.read
        embeddings = [key for key, path in whole if self._tied and path.endswith(self._tied)]
        heads = [key for key, path in whole if self._tied and "head" in path and path not in self.base.tensors]
        copies = [key for key in heads if any(_equal(read(key), read(other)) for other in embeddings)]
        if self.adapter.config.get("ensure_weight_tying") and embeddings:
            self._tied = None
        updated = any(f"{module}.weight".endswith(self._tied or " ") for module in self._modules)
        if copies and not updated:
            self._tied = None
        return [(key, path) for key, path in whole if key not in copies]

    def _replace(self, key: str, path: str) -> None:
        name = self._find(key, path)
        if name is None or self._unties(key, name):
            return
        ours, theirs = self.base.tensors[name], self.adapter.checkpoint.tensors[key]
        if ours.shape != theirs.shape or is_float(ours.dtype) != is_float(theirs.dtype):
            self._unfit(key, name)
            return
        self.changes[name] = Change(partial(self.adapter.checkpoint.read, key))

    def _update(self, module: str, parts: dict[str, str]) -> None:
        embedding = "lora_embedding_A.weight" in parts or "lora_embedding_B.weight" in parts
        stem = "lora_embedding" if embedding else "lora"
        a, b = parts.pop(f"{stem}_A.weight", None), parts.pop(f"{stem}_B.weight", None)
        bias, magnitude = parts.pop("lora_B.bias", None), parts.pop("lora_magnitude_vector.weight", None)
        if a is None or b is None or parts:
            others = ", ".join(map(shown, parts.values()))
            said = f"not understood beside A and B: {others}" if a and b else "an A without a B, or a B without an A"
            self.problems.append(f"{module}: {said}")
            return
        name = self._find(a, f"{module}.weight")
        if name is None or self._unties(a, name):
            return
        rank, scaling = self.adapter.rank_and_scaling(module)
        transposed = embedding or bool(self.adapter.config.get("fan_in_fan_out"))
        if self._fits(name, rank, a, b, magnitude, transposed):
            read = self.adapter.checkpoint.read
            self._add(name, LowRank(read, a, b, scaling, transposed, magnitude))
            if bias is not None:
                self._add_bias(bias, f"{module}.bias", scaling)

    def _fits(self, name: str, rank: int, a: str, b: str, magnitude: str | None, transposed: bool) -> bool:
        tensors, info = self.adapter.checkpoint.tensors, self.base.tensors[name]
        shapes = tensors[a].shape, tensors[b].shape
        if not all(is_float(tensors[key].dtype) for key in (a, b)) or not is_float(info.dtype):
            self.problems.append(f"{shown(a)}: {tensors[a].dtype}, in the base {name} is {info.dtype}")
        elif not shapes[0] or shapes[0][0] != rank:
            self.problems.append(f"{shown(a)}: {list(shapes[0])}, but the configuration gives it rank {rank}")
        elif not info.shape or shapes not in _expected(info.shape, rank, transposed):
            self._unfit(b, name, f"{shown(a)}: {list(shapes[0])}, ")
        elif magnitude and tensors[magnitude].numel != info.shape[-1 if transposed else 0]:
            self._unfit(magnitude, name)
        elif bool(self.adapter.config.get("use_dora")) != (magnitude is not None):
            missing = "there is no magnitude" if magnitude is None else "it has a magnitude"
            self.problems.append(f"{shown(a)}: use_dora is {self.adapter.config.get('use_dora')}, but {missing}")
        else:
            return True
        return False

    def _add_bias(self, key: str, path: str, scaling: float) -> None:
        name = self._find(key, path)
        if name is None:
            return
        if self.base.tensors[name].shape != self.adapter.checkpoint.tensors[key].shape:
            self._unfit(key, name)
            return
        self._add(name, LowRank(self.adapter.checkpoint.read, None, key, scaling))

    def _add(self, name: str, update: LowRank) -> None:
        self.changes[name] = self.changes.get(name, Change()).then(Change(updates=(update,)))

    def _find(self, key: str, path: str) -> str | None:
        """The base's tensor of this path, or a problem."""
        tensors = self.base.tensors
        found = [path] if path in tensors else [name for name in tensors if name.endswith(f".{path}")]
        found = found or [name for name in tensors if path.endswith(f".{name}")]
        if len(found) > 1:
            self.problems.append(f"{shown(key)}: {', '.join(found[:3])} of {self.base.label} could be meant")
        elif not found:
            self.problems.append(f"{shown(key)}: {self.base.label} has no {path}{self._tie_hint(path)}")
        elif found[0] in self.base.tied:
            self.problems.append(f"{shown(key)}: {found[0]} is tied to {self.base.tied[found[0]]} in {self.base.label}")
        elif self._taken.setdefault(found[0], path) != path:
            self.problems.append(f"{shown(key)}: {found[0]} is changed by {self._taken[found[0]]} already")
        else:
            return found[0]
        return None

    def _unties(self, key: str, name: str) -> bool:
        """Whether it changes an embedding that is the output head too, which in PEFT stays as it is; a problem."""
        if name != self._tied or _equal(self.adapter.checkpoint.read(key), self.base.read(name)):
            return False
        self.problems.append(
            f"{shown(key)}: {name} is the output head of {self.base.label} too, which this adapter leaves as it is "
            "(save the base with a head of its own)"
        )
        return True

    def _tie_hint(self, path: str) -> str:
        tied = (self.base.config or {}).get("tie_word_embeddings") and "head" in path
        return " (it is tied to the embedding there: save the base with a head of its own)" if tied else ""

    def _unfit(self, key: str, name: str, before: str = "") -> None:
        shape = list(self.adapter.checkpoint.tensors[key].shape)
        info = self.base.tensors[name]
        self.problems.append(f"{before}{shown(key)}: {shape}; {name} is {list(info.shape)} in {self.base.label}")


def tied_embedding(base) -> str | None:
    """The embedding of a language model that has no output head of its own: the two are one weight."""
    config = base.config or {}
    if not any(_HEADED.search(str(name)) for name in config.get("architectures") or ()):
        return None
    vocabulary = config.get("vocab_size", (config.get("text_config") or {}).get("vocab_size"))
    outside = {n: i.shape for n, i in base.tensors.items() if not any(part.isdecimal() for part in n.split("."))}
    found = [name for name, shape in outside.items() if len(shape) == 2 and shape[0] == vocabulary]
    embeddings = [name for name in found if any(word in name for word in ("embed", "wte", "shared"))]
    return embeddings[0] if len(embeddings) == 1 == len(found) else None


def _equal(a: Array, b: Array) -> bool:
    return a.shape == b.shape and bool(np.array_equal(a.astype(np.float32), b.astype(np.float32)))


def _expected(shape: tuple[int, ...], rank: int, transposed: bool) -> list[tuple]:
    """The shapes of A and B that fit a tensor: linear, convolution (of one group), or stored as [in, out]."""
    if transposed:
        return [((rank, shape[0]), (shape[1], rank))] if len(shape) == 2 else []
    return [((rank, *shape[1:]), (shape[0], rank, *(1 for _ in shape[2:])))] if len(shape) > 1 else []


def _plain(key: str) -> str:
    """The path in the base: without what PEFT wraps around it."""
    return _WRAPPER.sub("", _PREFIX.sub("", key))


def _by_pattern(patterns: dict | None, module: str, otherwise):
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return otherwise


def _config_problems(config: object) -> list[str]:
    if type(config) is not dict:
        return [f"{CONFIG} is not a map"]
    problems = []
    if config.get("peft_type") != "LORA":
        return [f"peft_type {shown(config.get('peft_type'))} is not read"]
    problems += [f"{what} ({option}) are not read" for option, what in REFUSED.items() if config.get(option)]
    if _CHANGES_BASE.fullmatch(str(config.get("init_lora_weights")).lower()):
        problems.append(
            f"init_lora_weights {config['init_lora_weights']} means that the base was changed too; save it as a plain "
            "LoRA (PEFT: save_pretrained(..., path_initial_model_for_weight_conversion=...))"
        )
    ranks = {"r": config.get("r", 8), **_patterns(config, "rank_pattern", problems)}
    alphas = {"lora_alpha": config.get("lora_alpha", 8), **_patterns(config, "alpha_pattern", problems)}
    for key, rank in ranks.items():
        if type(rank) is not int or rank < 1:
            problems.append(f"{key}: a rank is a whole number from 1 on, not {shown(rank)}")
    for key, alpha in alphas.items():
        if type(alpha) not in (int, float) or not math.isfinite(alpha):
            problems.append(f"{key}: an alpha is a number, not {shown(alpha)}")
    return problems


def _patterns(config: dict, key: str, problems: list[str]) -> dict:
    patterns = config.get(key) or {}
    if type(patterns) is not dict:
        problems.append(f"{key} is not a map")
        return {}
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            problems.append(f"{key}: {shown(pattern)} is no regular expression ({error})")
    return {f"{key}[{pattern}]": value for pattern, value in patterns.items()}

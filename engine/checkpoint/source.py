"""What the user wrote to the weight files it means: a directory, a file, an index, or the name of a model on a hub."""

import os
import re
from dataclasses import dataclass
from pathlib import Path

from freemerge.checkpoint.header import Malformed
from freemerge.checkpoint.index import SUFFIXES, examine_index
from freemerge.errors import CheckpointError, listed

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")
PICKLED = (".bin", ".pt", ".pth", ".ckpt")
NOT_WEIGHTS = re.compile(r"(training_args|optimizer|scheduler|scaler|rng_state.*|random_states.*)\.(bin|pt|pth|pkl)")
ADAPTER = "adapter_model"
PREFERRED = (
    "model",
    "diffusion_pytorch_model",
    "pytorch_model",
)  # the names of whole models, where other files lie beside
ADAPTER_REMEDY = "An adapter is a directory or hub name, alone or after MODEL+, as PEFT saves it."
WANTED = "Give a directory, a weight file, or a hub name like org/name[@revision]."
PICKLE_REMEDY = (
    "A pickled checkpoint can run code when it is read carelessly; torch's weights_only loader refuses all but "
    "tensors. If you trust its author, allow it with --allow-pickle (allow_pickle=True); better, have it saved "
    "as safetensors."
)


@dataclass(frozen=True)
class Source:
    """`weight_map` is what the index says, tensor name to a path within `directory`; None for a single file."""

    label: str
    directory: Path
    files: tuple[Path, ...]
    weight_map: dict[str, str] | None
    pickled: bool

    @property
    def adapter(self) -> bool:
        """Whether it is a LoRA adapter, as PEFT names it."""
        return _stem(self.files[0].name) == ADAPTER


def split_adapters(source: str | os.PathLike) -> tuple[str, list[str]]:
    """The model and the adapters of `model+adapter+...`; a '+' within a path that exists is part of it."""
    text, adapters = os.fspath(source), []
    while not _exists(text) and "+" in text.strip("+"):
        cuts = [cut.start() for cut in re.finditer(r"(?<=.)\+(?=.)", text)]
        cut = next((cut for cut in reversed(cuts) if _exists(text[cut + 1 :])), cuts[-1])
        text, adapters = text[:cut], [text[cut + 1 :], *adapters]
    return text, adapters


def _exists(text: str) -> bool:
    return os.path.exists(os.path.expanduser(text))


def find_source(source: str | os.PathLike, *, allow_pickle: bool, adapter: bool = False) -> Source:
    """The weights that `source` means; those of a LoRA adapter where there is nothing else, or with `adapter`.

    Raises CheckpointError where `source` is nothing, or where it could be several things.
    """
    label, shown_as, path = os.fspath(source), os.fspath(source), Path(source)
    try:
        path = path.expanduser()
        if not path.exists():
            path = _from_hub(label, allow_pickle)
            shown_as = f"{label} ({path})"
        weights = _in_directory(path, allow_pickle, adapter) if path.is_dir() else path
        found = _source(label, weights, allow_pickle)
        if adapter and not found.adapter:
            raise Malformed(f"holds no {ADAPTER}.safetensors, the weights of a LoRA adapter", ADAPTER_REMEDY)
        return found
    except Malformed as error:
        *problems, remedy = error.problems
    except (OSError, RuntimeError) as error:  # no permission, a name too long, ~ of nobody
        problems, remedy = [f"cannot be opened: {error}"], WANTED
    raise CheckpointError(listed((f"{shown_as}: {problem}" for problem in problems), remedy))


def _from_hub(label: str, allow_pickle: bool) -> Path:
    if not HUB_NAME.fullmatch(label):
        raise Malformed("no such file or directory", WANTED)
    from freemerge.checkpoint.hub import download

    name, _, revision = label.partition("@")
    return download(name, revision or None, allow_pickle=allow_pickle)


def _in_directory(directory: Path, allow_pickle: bool, adapter: bool) -> Path:
    names = sorted(entry.name for entry in os.scandir(directory) if entry.is_file() or entry.is_symlink())
    candidates = _whole_models(
        directory, [name for name in names if name.endswith((".safetensors", SUFFIXES[0]))], SUFFIXES[0]
    )
    if not candidates:
        pickled = [name for name in names if name.endswith((*PICKLED, SUFFIXES[1])) and not NOT_WEIGHTS.fullmatch(name)]
        if pickled and not allow_pickle:
            raise Malformed(f"holds no safetensors, only pickled weights ({_few_names(pickled)})", PICKLE_REMEDY)
        candidates = _whole_models(directory, pickled, SUFFIXES[1])
    if not candidates:
        raise Malformed(
            "holds no weights",
            "Give a directory with model.safetensors or model.safetensors.index.json and its shards.",
        )
    return directory / _choice(candidates, adapter)


def _whole_models(directory: Path, names: list[str], index_suffix: str) -> list[str]:
    """The indexes and the files that no index lists."""
    indexes = [name for name in names if name.endswith(index_suffix)]
    listed_files = set()
    for index in indexes:
        try:
            listed_files.update(examine_index(directory / index).values())
        except Malformed as error:
            problems = (f"{index} {problem}" for problem in error.problems)
            raise Malformed(*problems, "Download or write the index again, or give the weight file itself.") from None
    return [name for name in names if name not in listed_files]


def _choice(names: list[str], adapter: bool) -> str:
    adapters = [name for name in names if _stem(name) == ADAPTER]
    names = (adapters if adapter else [name for name in names if name not in adapters]) or names
    for stem in PREFERRED:
        preferred = [name for name in names if _stem(name) == stem]
        if preferred:
            names = preferred
            break
    if len(names) > 1:
        shards = all(re.search(r"-\d{5}-of-\d{5}\.", name) for name in names)
        remedy = "Fetch the index of these shards too." if shards else "Give the one you mean instead of the directory."
        raise Malformed(f"could mean any of {_few_names(names)}", remedy)
    return names[0]


def _stem(name: str) -> str:
    for suffix in (*SUFFIXES, ".safetensors", *PICKLED):
        if name.endswith(suffix):
            return name.removesuffix(suffix)
    return name


def _few_names(names: list[str]) -> str:
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")


def _source(label: str, weights: Path, allow_pickle: bool) -> Source:
    directory, name = weights.parent, weights.name
    pickled = name.endswith((*PICKLED, SUFFIXES[1]))
    if pickled and not allow_pickle:
        raise Malformed(f"{name} is pickled" if name not in label else "is pickled", PICKLE_REMEDY)
    if not name.endswith(SUFFIXES):
        if not pickled and not name.endswith(".safetensors"):
            raise Malformed(
                "not a weight file", f"Known are .safetensors, {', '.join(PICKLED)} and {', '.join(SUFFIXES)}."
            )
        return Source(label, directory, (weights,), None, pickled)
    weight_map = _weight_map(weights)
    files = tuple(directory / shard for shard in sorted(set(weight_map.values())))
    missing = [f"{name} names {file.relative_to(directory)}, which is not there" for file in files if not file.exists()]
    if missing:
        raise Malformed(*missing, "Fetch the missing shards, or the whole model again.")
    return Source(label, directory, files, weight_map, pickled)


def _weight_map(index: Path) -> dict[str, str]:
    try:
        return examine_index(index)
    except Malformed as error:
        problems = (f"{index.name} {problem}" for problem in error.problems)
        raise Malformed(*problems, "Download or write the index again.") from None

"""Checkpoints on disk: safetensors, single or sharded, mapped; tensors are views of the files."""

import os
from contextlib import suppress
from pathlib import Path
from threading import Lock

import numpy as np

from freemerge.checkpoint import files, mapping
from freemerge.checkpoint.header import REMEDY, Malformed, TensorInfo, examine_header, few, shown
from freemerge.checkpoint.source import Source, find_source, split_adapters
from freemerge.checkpoint.tokenizer import Tokenizer, read_chat_template, read_tokenizer
from freemerge.errors import ChangedInputError, CheckpointError, InputError, gathered, listed


def open_checkpoint(
    source: str | os.PathLike, *, allow_pickle: bool = False, base: str | os.PathLike | None = None
) -> "Checkpoint":
    """Open `source` and check all of its headers; no tensor is read.

    Args:
        source: a directory, a weight file, an index, or `org/name[@revision]` on the hub, asked only where there is no
            such path; any of them with LoRA adapters on it, `model+adapter`; or an adapter alone, which goes on the
            model its configuration names.
        allow_pickle: read pickled weights too, by torch's weights_only loader.
        base: what an adapter alone goes on where its configuration names no model, or none that can be opened.

    Raises:
        CheckpointError: naming all that is wrong with it.
    """
    model, adapters = split_adapters(source)
    found = find_source(model, allow_pickle=allow_pickle)
    if found.adapter:
        model, adapters = None, [model, *adapters]
    if not adapters:
        return _open(found)
    from freemerge.checkpoint.adapted import AdaptedCheckpoint
    from freemerge.checkpoint.adapter import Adapter

    opened = [Adapter(_open(find_source(name, allow_pickle=allow_pickle, adapter=True))) for name in adapters]
    if found.adapter:
        return AdaptedCheckpoint(_open_base(opened[0], base, allow_pickle), opened)
    return AdaptedCheckpoint(_open(found), opened)


def open_adapter(source: str | os.PathLike, *, allow_pickle: bool = False):
    """Open a LoRA adapter as a checkpoint of its own tensors, not applied to anything (bare_adapter.py).

    Raises:
        CheckpointError: as for open_checkpoint, or `source` is no adapter.
    """
    from freemerge.checkpoint.adapter import Adapter
    from freemerge.checkpoint.bare_adapter import BareAdapter

    return BareAdapter(Adapter(_open(find_source(source, allow_pickle=allow_pickle, adapter=True))))


def open_result(source: str | os.PathLike):
    """Open what a merge has written: a model, or an adapter by its own tensors."""
    return open_adapter(source) if find_source(source, allow_pickle=False).adapter else open_checkpoint(source)


def _open(found: Source) -> "Checkpoint":
    if found.pickled:
        from freemerge.checkpoint.pickled import PickledCheckpoint

        return PickledCheckpoint(found)
    return Checkpoint(found)


def _open_base(adapter, fallback: str | os.PathLike | None, allow_pickle: bool) -> "Checkpoint":
    """The model of an adapter that came alone: the one it names, else the fallback."""
    here, errors = os.path.realpath(adapter.checkpoint.path), []
    for name in dict.fromkeys((adapter.base_name, fallback)):
        if name is None or os.path.realpath(name) == here:
            continue
        try:
            return open_checkpoint(name, allow_pickle=allow_pickle)
        except InputError as error:
            errors.append(error)
    problem = f"{adapter.label}: a LoRA adapter, and the model it goes on is not known"
    missing = CheckpointError(listed([problem], "Write MODEL+ADAPTER, the adapter with the model it was trained on."))
    raise CheckpointError(gathered([missing, *errors]))


class Checkpoint:
    """An open checkpoint. Threads may read from it at the same time.

    Attributes:
        label: what the user wrote.
        path: its directory.
        files: its weight files, in order.
        tensors: every tensor's TensorInfo by name, sorted.
        tied: name to the name whose memory it shares. Empty for safetensors files, which store such a tensor once.
        config: config.json, None if there is none.
        labels: the label, and those of adapters on it, see adapted.AdaptedCheckpoint.
    """

    def __init__(self, source: Source):
        self.label, self.path, self.files = source.label, source.directory, source.files
        self.labels = (self.label,)
        self.tied: dict[str, str] = {}
        problems: list[str] = []
        self.config = _collect(problems, files.read_config, self.path)
        # Before the headers are read: a file that changes in between must count as changed.
        self._states = files.states(self.files)
        self.tensors = self._open(source, problems)
        if not self.tensors and not problems:
            problems.append("holds no tensors")
        if problems:
            raise CheckpointError(listed((f"{self.label}: {problem}" for problem in problems), REMEDY))

    def _open(self, source: Source, problems: list[str]) -> dict[str, TensorInfo]:
        self._lock, self._maps = Lock(), {}
        self._data_starts = {}
        tensors: dict[str, TensorInfo] = {}
        for file in self.files:
            try:
                header = examine_header(file)
            except Malformed as error:
                problems += (f"{self._name(file)}: {problem}" for problem in error.problems)
                continue
            self._data_starts[file] = header.length
            problems += few(
                [
                    f"{shown(name)} is in both {self._name(tensors[name].file)} and {self._name(file)}"
                    for name in header.tensors
                    if name in tensors
                ]
            )
            tensors |= header.tensors
        if source.weight_map is not None:
            problems += self._disagreements(source.weight_map, tensors)
        return dict(sorted(tensors.items()))

    def _disagreements(self, weight_map: dict[str, str], tensors: dict[str, TensorInfo]) -> list[str]:
        problems = []
        opened = {self._name(file): file for file in self._data_starts}
        for name, shard in weight_map.items():
            file = opened.get(shard)
            if file and (name not in tensors or tensors[name].file is not file):
                problems.append(f"{shown(name)} is in {shard} by the index, but not in that file")
        for name in tensors.keys() - weight_map.keys():
            problems.append(f"{shown(name)} is in {self._name(tensors[name].file)}, but not in the index")
        return few(sorted(problems))

    def _name(self, file: Path) -> str:
        return file.relative_to(self.path).as_posix()

    def read(self, name: str) -> np.ndarray:
        """The tensor in its shape and dtype: a read-only view of the mapped file, at any address; nothing is copied."""
        info = self.tensors[name]
        return np.ndarray(info.shape, info.dtype, buffer=self._map(info.file), offset=info.offset)

    def read_run(self, name: str, begin: int, end: int) -> np.ndarray:
        """Elements [begin, end) of a tensor in order, [end - begin]."""
        return self.read(name).reshape(-1)[begin:end]

    def nbytes_made(self, name: str) -> int:
        """Bytes of memory that reading a tensor takes: none."""
        return 0

    def _map(self, file: Path) -> np.ndarray:
        with self._lock:
            if file not in self._maps:
                self.check_unchanged()
                mapped = mapping.map_file(file)
                if mapped.nbytes != self._states[file].size:
                    raise ChangedInputError(
                        f"{file} changed while it was opened. Start again when nothing writes to the inputs."
                    )
                self._maps[file] = mapped
            return self._maps[file]

    def prefetch(self, name: str, begin: int = 0, end: int | None = None) -> None:
        """Have elements [begin, end) of a tensor ready for its first reader. A hint: it never raises."""
        self._advise(mapping.prefetch, name, begin, end)

    def release(self, name: str, begin: int = 0, end: int | None = None) -> None:
        """Elements [begin, end) are done with: their pages leave this process, not the cache, and can be read again."""
        self._advise(mapping.release, name, begin, end)

    def _advise(self, advice, name: str, begin: int, end: int | None) -> None:
        with suppress(OSError, ChangedInputError):  # reading will say it
            advice(self.read(name).reshape(-1)[begin:end])

    def fingerprint(self) -> dict:
        """By file name: size, mtime_ns, xxh3_128 (files.fingerprint says of what)."""
        return {self._name(file): files.fingerprint(file, self._header_length(file)) for file in self.files}

    def _header_length(self, file: Path) -> int:
        return self._data_starts[file]

    def check_unchanged(self) -> None:
        """Raises ChangedInputError, naming every weight file that is no longer the one that was opened."""
        files.check_unchanged(self._states)

    def side_files(self) -> list[Path]:
        """Configuration, tokenizer, chat template: what a copy of the model needs besides its weights."""
        return files.side_files(self.path)

    def tokenizer(self) -> Tokenizer | None:
        """As `read_tokenizer` reads it."""
        return read_tokenizer(self.path)

    def chat_template(self) -> str | None:
        return read_chat_template(self.path)

    def license(self) -> str | None:
        return files.read_license(self.path)

    def close(self) -> None:
        """Let go of the files. Arrays that were read stay valid, and keep their file mapped."""
        self._maps = {}

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(self, *_) -> None:
        self.close()


def _collect(problems: list[str], read, directory: Path):
    try:
        return read(directory)
    except ValueError as error:
        problems.append(str(error))
        return None

"""The file of one sparse expert, `experts/<name>.safetensors` beside the backbone.

For each tensor it changes, compressed sparse rows (kernels.array.SparseRows):

    offsets/<tensor>   I64 [rows + 1]
    columns/<tensor>   U16 [n], or U32 where rows are longer than 65536
    values/<tensor>    F32 [n], not yet scaled
    start/<tensor>     [n] in the base's dtype, mode "replace" only: what the values are added to

Metadata are strings: format, version, expert, method, mode ("add" or "replace"), backbone (what backbone_fingerprint of
checkpoint.manifest says), whatever else the method notes (mu, density, ...), and tensors, a JSON object:
{<tensor>: {"shape": [...], "scale": number}}.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from freemerge.checkpoint import mapping
from freemerge.checkpoint.checksum import checksum
from freemerge.checkpoint.header import Header, TensorInfo, read_header
from freemerge.checkpoint.layout import Entry, encode_header, plan_shard
from freemerge.checkpoint.writer import ShardWriter
from freemerge.errors import CheckpointError, OutputError, listed
from freemerge.kernels.array import Array, SparseRows, column_dtype, rows_of

FORMAT = "freemerge-expert"
VERSION = "1"
_REQUIRED = ("expert", "method", "mode", "backbone")
_WIDEST_SCALE = -1.2345678901234567e-300
_ROOM = 8192  # bytes for the metadata that only the end of a merge knows, beside the scales


@dataclass(frozen=True)
class SparseEntry:
    """A tensor an expert changes in `count` entries; `start` is the dtype of the base's weights in mode "replace"."""

    name: str
    shape: tuple[int, ...]
    count: int
    start: np.dtype | None = None

    def parts(self) -> list[Entry]:
        rows, width = rows_of(self.shape)
        parts = [
            Entry(f"offsets/{self.name}", np.dtype(np.int64), (rows + 1,)),
            Entry(f"columns/{self.name}", column_dtype(width), (self.count,)),
            Entry(f"values/{self.name}", np.dtype(np.float32), (self.count,)),
        ]
        return (
            parts if self.start is None else [*parts, Entry(f"start/{self.name}", np.dtype(self.start), (self.count,))]
        )


class SidecarWriter:
    """Writes an expert in place, any tensor from any thread; opening again keeps what an interrupted run wrote."""

    def __init__(self, path: Path, entries: Sequence[SparseEntry], *, fsync: bool = True):
        self._entries = {entry.name: entry for entry in entries}
        parts = [part for entry in entries for part in entry.parts()]
        room = len(encode_header(parts, {"tensors": self._tensors(_WIDEST_SCALE)})) + _ROOM
        self._plan = plan_shard(path.name, parts, {"format": "unfinished"}, room)
        self._places = {place.name: place for place in self._plan.entries}
        path.parent.mkdir(exist_ok=True)
        self._file = ShardWriter(path.parent, self._plan, fsync=fsync)

    def _tensors(self, scales: Mapping[str, float] | float) -> str:
        scale_of = scales.get if isinstance(scales, Mapping) else lambda _: scales
        facts = {name: {"shape": list(e.shape), "scale": float(scale_of(name))} for name, e in self._entries.items()}
        return json.dumps(facts, separators=(",", ":"), ensure_ascii=False, sort_keys=True, allow_nan=False)

    def write(self, name: str, rows: SparseRows, start: Array | None = None) -> str:
        """Write what the expert does to one tensor; answers its checksum, see `checksum`.

        Args:
            rows: of the shape and count announced.
            start: [rows.count] of the dtype announced, the base's weights at the entries; mode "replace" only.
        """
        entry = self._entries[name]
        if (tuple(rows.shape), rows.count, start is None) != (tuple(entry.shape), entry.count, entry.start is None):
            raise ValueError(f"{name}: {rows.count} entries of {list(rows.shape)}, announced were {entry}")
        rows = rows.on_host()
        arrays = {"offsets": rows.offsets, "columns": rows.columns, "values": rows.values, "start": start}
        for part in entry.parts():
            array, place = arrays[part.name.partition("/")[0]], self._places[part.name]
            if (array.dtype, array.shape) != (place.dtype, place.shape):
                raise ValueError(f"{part.name} is {array.dtype} {array.shape}, announced {place.dtype} {place.shape}")
            self._file.write_at(place.offset, array)
        return _checksum([arrays[part.name.partition("/")[0]] for part in entry.parts()])

    def checksum(self, name: str) -> str:
        """Of what stands in the file for one tensor: equal to what `write` answered while nothing has changed."""
        return _checksum([self._file.view(self._places[part.name]) for part in self._entries[name].parts()])

    def finish(self, metadata: Mapping[str, object], scales: Mapping[str, float] | float) -> None:
        """Write the header and push everything to the disk.

        Args:
            metadata: expert, method, mode and backbone, and whatever else describes it; numbers are written as JSON.
            scales: what each tensor's values are multiplied by, or one number for all.
        """
        missing = [key for key in _REQUIRED if key not in metadata]
        if missing:
            raise ValueError(f"an expert's metadata need {', '.join(missing)}")
        text = {key: value if isinstance(value, str) else json.dumps(value) for key, value in sorted(metadata.items())}
        text = {"format": FORMAT, "version": VERSION, **text, "tensors": self._tensors(scales)}
        header = encode_header(self._plan.entries, text, len(self._plan.header))
        if len(header) != len(self._plan.header):
            excess = len(header) - len(self._plan.header)
            raise OutputError(
                f"{self._file.path}: metadata are {excess} bytes longer than the room for them; shorten them"
            )
        self._file.write_at(0, header)
        self._file.finish()

    def close(self) -> None:
        self._file.close()


def _checksum(arrays: Sequence[Array]) -> str:
    return checksum("".join(checksum(array) for array in arrays).encode())


class Expert:
    """An expert's file, mapped; arrays are read-only views."""

    def __init__(self, path: Path, header: Header):
        self.path = path
        self.metadata = {key: value for key, value in header.metadata.items() if key != "tensors"}
        self._facts = json.loads(header.metadata["tensors"])
        self._infos = header.tensors
        self._map = mapping.map_file(path)

    @property
    def name(self) -> str:
        return self.metadata["expert"]

    @property
    def mode(self) -> str:
        return self.metadata["mode"]

    @cached_property
    def tensors(self) -> dict[str, SparseRows]:
        """The entries of every tensor the expert changes, by its name."""
        return {
            name: SparseRows(
                *(self._view(f"{part}/{name}") for part in ("offsets", "columns", "values")), tuple(facts["shape"])
            )
            for name, facts in self._facts.items()
        }

    def scale(self, name: str) -> float:
        return self._facts[name]["scale"]

    def start(self, name: str) -> Array | None:
        """The base's weights at the entries of a tensor; None in mode "add"."""
        return self._view(f"start/{name}") if self.mode == "replace" else None

    def _view(self, name: str) -> Array:
        info = self._infos[name]
        return np.ndarray(info.shape, info.dtype, buffer=self._map, offset=info.offset)


def read_expert(path: Path) -> Expert:
    """Open the file of an expert. Raises CheckpointError with all that is wrong with it."""
    path = Path(path)
    header = read_header(path)
    problems = _problems(header)
    if problems:
        raise CheckpointError(listed((f"{path}: {problem}" for problem in problems), "Write the expert again."))
    return Expert(path, header)


def _problems(header: Header) -> list[str]:
    metadata = header.metadata
    if metadata.get("format") != FORMAT:
        return ["not an expert of freemerge, or one that was never finished"]
    if metadata.get("version") != VERSION:
        return [f"format version {metadata.get('version')}; this freemerge reads version {VERSION}"]
    problems = [f"metadata lack {key}" for key in _REQUIRED if key not in metadata]
    if metadata.get("mode") not in ("add", "replace"):
        problems.append(f"mode is {metadata.get('mode')!r}, not add or replace")
    try:
        facts = json.loads(metadata["tensors"])
        expected = {name: (tuple(map(int, fact["shape"])), float(fact["scale"])) for name, fact in facts.items()}
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError):
        return [*problems, "metadata do not describe its tensors"]
    for name, (shape, _) in expected.items():
        problems += _tensor_problems(name, shape, header.tensors, metadata.get("mode"))
    return problems


def _tensor_problems(name: str, shape: tuple[int, ...], infos: Mapping[str, TensorInfo], mode: str | None) -> list[str]:
    if f"values/{name}" not in infos:
        return [f"values/{name} is missing"]
    count = infos[f"values/{name}"].numel
    start = infos.get(f"start/{name}")
    entry = SparseEntry(name, shape, count, start.dtype if start and mode == "replace" else None)
    problems = [] if mode != "replace" or start else [f"start/{name} is missing"]
    for part in entry.parts():
        info = infos.get(part.name)
        if info is None:
            problems.append(f"{part.name} is missing")
        elif (info.dtype, info.shape) != (part.dtype, part.shape):
            problems.append(f"{part.name} is {info.dtype} {list(info.shape)}, not {part.dtype} {list(part.shape)}")
    return problems

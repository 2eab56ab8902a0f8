"""The files of experts beside the backbone: `experts/<name>.safetensors`, and what several of them share.

For each tensor that an expert changes, the arrays of its part (freemerge.parts), each named <role>/<tensor>:

    rows            offsets/     I64 [rows + 1]; entries as compressed sparse rows (kernels.array.SparseRows)
                    columns/     U16 [n], or U32 where rows are longer than 65536
                    values/      F32 [n], not yet scaled
                    start/       [n] in the base's dtype, mode "replace" only: what the values are added to
    quantized_rows  lengths/     U16 [rows], or U32 where rows are longer than 65535: entries in each row
                    columns/     as above
                    values/      I8 or F8_E4M3 [n]; times the row's scale they are those above
                    row_scales/  F32 [rows]
                    start/       as above; an entry of value 0 puts it there, too
    mask            mask/        U8 [ceil(elements / 8)], one bit for each element, the lowest first
    low_rank        left/        F32 [rows, r];    right/    F32 [r, width]
    difference      difference/  F32, the tensor's shape

Metadata are strings: format, version, expert, method, mode ("add" or "replace"), backbone (what backbone_fingerprint of
checkpoint.manifest says), whatever else the method notes (mu, density, ...), of quantized rows quantization_error and
largest_quantization_error (see compact.CompactedExpert), and tensors, a JSON object:
{<tensor>: {"kind": ..., "shape": [...], "scale": number}}. Version 1 knew rows alone, and no "kind"; files with
quantized_rows are of version 3, all others of version 2.

What all experts of a method share is in `experts/shared/<method>.safetensors`: the same names, `vector/<tensor>` in the
dtype of the backbone, say. Its metadata are format, version, method, fingerprint, and experts, a JSON list of their
names in the order of the merge; each expert that needs it carries the same fingerprint as "shared".
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from freemerge.checkpoint import mapping
from freemerge.checkpoint.checksum import checksum
from freemerge.checkpoint.header import Header, read_header
from freemerge.checkpoint.layout import Entry, encode_header, plan_shard
from freemerge.checkpoint.writer import ShardWriter
from freemerge.errors import CheckpointError, OutputError, listed
from freemerge.kernels.array import Array
from freemerge.parts import KINDS, Arrays, Layout, Part

FORMAT, SHARED_FORMAT = "freemerge-expert", "freemerge-shared"
READABLE = ("1", "2", "3")
SHARED = "shared"  # the folder, beside the experts
_REQUIRED = ("expert", "method", "mode", "backbone")
_WIDEST_SCALE = -1.2345678901234567e-300
_ROOM = 8192  # bytes for the metadata that only the end of a merge knows, beside the scales


class ArraysWriter:
    """Writes arrays of tensors in place, any tensor from any thread; opening again keeps what an interrupted run wrote.

    Args:
        arrays: tensor -> role -> dtype and shape, of everything that will be written.
        widest: metadata as long as they can get; there is room for a little more.
    """

    def __init__(self, path: Path, arrays: Mapping[str, Arrays], *, widest: Mapping[str, str], fsync: bool = True):
        entries = [
            Entry(f"{role}/{name}", dtype, shape)
            for name, roles in arrays.items()
            for role, (dtype, shape) in roles.items()
        ]
        room = len(encode_header(entries, widest)) + _ROOM
        self._plan = plan_shard(path.name, entries, {"format": "unfinished"}, room)
        self._places = {place.name: place for place in self._plan.entries}
        self._roles = {name: list(roles) for name, roles in arrays.items()}
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = ShardWriter(path.parent, self._plan, fsync=fsync)

    def write(self, name: str, arrays: Mapping[str, np.ndarray]) -> str:
        """Write the arrays of one tensor, by role, as announced; answers their checksum, see `checksum`."""
        if list(arrays) != self._roles[name]:
            raise ValueError(f"{name}: {', '.join(arrays)}; announced were {', '.join(self._roles[name])}")
        for role, array in arrays.items():
            place = self._places[f"{role}/{name}"]
            if (array.dtype, array.shape) != (place.dtype, place.shape):
                raise ValueError(f"{place.name} is {array.dtype} {array.shape}, announced {place.dtype} {place.shape}")
        for role, array in arrays.items():
            self._file.write_at(self._places[f"{role}/{name}"].offset, array)
        return _checksum(list(arrays.values()))

    def checksum(self, name: str) -> str:
        """Of what stands in the file for one tensor: equal to what `write` answered while nothing has changed."""
        return _checksum([self._file.view(self._places[f"{role}/{name}"]) for role in self._roles[name]])

    def finish(self, metadata: Mapping[str, str]) -> None:
        """Write the header and push everything to the disk."""
        header = encode_header(self._plan.entries, metadata, len(self._plan.header))
        if len(header) != len(self._plan.header):
            excess = len(header) - len(self._plan.header)
            raise OutputError(
                f"{self._file.path}: metadata are {excess} bytes longer than the room for them; shorten them"
            )
        self._file.write_at(0, header)
        self._file.finish()

    def close(self) -> None:
        self._file.close()


class SidecarWriter:
    """Writes an expert: a part of each tensor it changes, as laid out in `layouts`."""

    def __init__(self, path: Path, layouts: Mapping[str, Layout], *, fsync: bool = True):
        self._layouts = dict(layouts)
        arrays = {name: layout.arrays for name, layout in layouts.items()}
        self._file = ArraysWriter(path, arrays, widest={"tensors": self._tensors(_WIDEST_SCALE)}, fsync=fsync)
        self.checksum, self.close = self._file.checksum, self._file.close

    def _tensors(self, scales: Mapping[str, float] | float) -> str:
        scale_of = scales.get if isinstance(scales, Mapping) else lambda _: scales
        facts = {
            name: {"kind": layout.kind, "shape": list(layout.shape), "scale": float(scale_of(name))}
            for name, layout in self._layouts.items()
        }
        return json.dumps(facts, separators=(",", ":"), ensure_ascii=False, sort_keys=True, allow_nan=False)

    def write(self, name: str, part: Part) -> str:
        """Write what the expert does to one tensor, laid out as announced; answers its checksum."""
        announced = self._layouts[name]
        if part.layout != announced:
            raise ValueError(f"{name}: a part with {part.layout}; announced was {announced}")
        return self._file.write(name, part.arrays)

    def finish(self, metadata: Mapping[str, object], scales: Mapping[str, float] | float) -> None:
        """Write the header and push everything to the disk.

        Args:
            metadata: expert, method, mode and backbone, and whatever else describes it; numbers are written as JSON.
            scales: what each tensor's part is multiplied by, or one number for all.
        """
        missing = [key for key in _REQUIRED if key not in metadata]
        if missing:
            raise ValueError(f"an expert's metadata need {', '.join(missing)}")
        text = {key: value if isinstance(value, str) else json.dumps(value) for key, value in sorted(metadata.items())}
        version = _version(layout.kind for layout in self._layouts.values())
        self._file.finish({"format": FORMAT, "version": version, **text, "tensors": self._tensors(scales)})


class SharedWriter(ArraysWriter):
    """Writes what all experts of a method share."""

    def __init__(self, path: Path, arrays: Mapping[str, Arrays], *, fsync: bool = True):
        super().__init__(path, arrays, widest={}, fsync=fsync)

    def finish(self, metadata: Mapping[str, str]) -> None:
        super().finish({"format": SHARED_FORMAT, "version": _version(()), **metadata})


class ExpertFolder:
    """Where the files of a merge's experts are opened, to be written: `folder` is experts/ of the result."""

    def __init__(self, folder: Path, *, fsync: bool = True):
        self._folder, self._fsync = folder, fsync

    def open(self, name: str, layouts: Mapping[str, Layout]) -> SidecarWriter:
        return SidecarWriter(self._folder / f"{name}.safetensors", layouts, fsync=self._fsync)

    def open_shared(self, method: str, arrays: Mapping[str, Arrays]) -> SharedWriter:
        return SharedWriter(self._folder / SHARED / f"{method}.safetensors", arrays, fsync=self._fsync)


def _version(kinds: Iterable[str]) -> str:
    """The lowest that knows parts of these kinds, so that a freemerge before reads what it can."""
    return "3" if "quantized_rows" in kinds else "2"


def _checksum(arrays: Sequence[Array]) -> str:
    return checksum("".join(checksum(array) for array in arrays).encode())


class _Views:
    """The arrays of a mapped file, by their names."""

    def __init__(self, mapped: Any, header: Header):
        self._mapped, self._infos = mapped, header.tensors

    def __contains__(self, name: str) -> bool:
        return name in self._infos

    def __getitem__(self, name: str) -> np.ndarray:
        info = self._infos[name]
        return np.ndarray(info.shape, info.dtype, buffer=self._mapped, offset=info.offset)


class Shared:
    """A file of what experts share, mapped; arrays are read-only views."""

    def __init__(self, path: Path, header: Header):
        self.path, self.metadata = path, header.metadata
        views = _Views(mapping.map_file(path), header)
        self.tensors: dict[str, dict[str, np.ndarray]] = {}
        """Tensor -> role -> array."""
        for entry in header.tensors:
            role, _, name = entry.partition("/")
            self.tensors.setdefault(name, {})[role] = views[entry]


class Expert:
    """An expert's file, mapped; arrays are read-only views."""

    def __init__(self, path: Path, header: Header, shared: Shared | None = None):
        self.path, self.shared = path, shared
        self.metadata = {key: value for key, value in header.metadata.items() if key != "tensors"}
        facts, held = json.loads(header.metadata["tensors"]), shared.tensors if shared else {}
        self._scales = {name: fact["scale"] for name, fact in facts.items()}
        views = _Views(mapping.map_file(path), header)
        self.tensors: dict[str, Part] = {n: _part(n, fact, views, held.get(n, {})) for n, fact in facts.items()}
        """The part of every tensor the expert changes, by its name."""

    @property
    def name(self) -> str:
        return self.metadata["expert"]

    @property
    def mode(self) -> str:
        return self.metadata["mode"]

    def scale(self, name: str) -> float:
        return self._scales[name]


def _part(name: str, facts: Mapping[str, Any], views: _Views, shared: Mapping[str, Array]) -> Part:
    kind = KINDS[_kind(facts)]
    arrays = {role: views[f"{role}/{name}"] for role in kind.roles if f"{role}/{name}" in views}
    return kind.of(tuple(facts["shape"]), arrays, shared)


def read_expert(path: Path) -> Expert:
    """Open the file of an expert, and what it shares. Raises CheckpointError with all that is wrong with them."""
    path = Path(path)
    header = read_header(path)
    problems = _problems(header)
    if problems:
        raise CheckpointError(listed((f"{path}: {problem}" for problem in problems), "Write the expert again."))
    wanted = header.metadata.get("shared")
    return Expert(path, header, None if wanted is None else _read_shared(path, header, wanted))


def _read_shared(path: Path, header: Header, fingerprint: str) -> Shared:
    beside = path.parent / SHARED / f"{header.metadata['method']}.safetensors"
    shared_header = read_header(beside)
    problems = []
    if shared_header.metadata.get("format") != SHARED_FORMAT or shared_header.metadata.get("version") not in READABLE:
        problems.append("not what experts of freemerge share, or never finished")
    elif shared_header.metadata.get("fingerprint") != fingerprint:
        problems.append(f"of another merge than {path}")
    for name, facts in json.loads(header.metadata["tensors"]).items():
        vector = shared_header.tensors.get(f"vector/{name}")
        if _kind(facts) == "mask" and (vector is None or list(vector.shape) != facts["shape"]):
            problems.append(f"vector/{name} is missing or of another shape than its mask")
    if problems:
        raise CheckpointError(listed((f"{beside}: {problem}" for problem in problems), "Merge again."))
    return Shared(beside, shared_header)


def _kind(facts: Mapping[str, object]) -> str:
    return facts.get("kind", "rows")


def _problems(header: Header) -> list[str]:
    metadata = header.metadata
    if metadata.get("format") != FORMAT:
        return ["not an expert of freemerge, or one that was never finished"]
    if metadata.get("version") not in READABLE:
        return [f"format version {metadata.get('version')}; this freemerge reads versions {', '.join(READABLE)}"]
    problems = [f"metadata lack {key}" for key in _REQUIRED if key not in metadata]
    if metadata.get("mode") not in ("add", "replace"):
        problems.append(f"mode is {metadata.get('mode')!r}, not add or replace")
    try:
        float(metadata.get("quantization_error", 0))
    except ValueError:
        problems.append(f"quantization_error is {metadata['quantization_error']!r}, not a number")
    try:
        facts = json.loads(metadata["tensors"])
        expected = {
            name: (_kind(fact), tuple(map(int, fact["shape"])), fact["scale"] + 0.0) for name, fact in facts.items()
        }
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError):
        return [*problems, "metadata do not describe its tensors"]
    for name, (kind, shape, _) in expected.items():
        problems += _tensor_problems(name, kind, shape, header, metadata.get("mode"))
    return problems


def _tensor_problems(name: str, kind: str, shape: tuple[int, ...], header: Header, mode: str | None) -> list[str]:
    if kind not in KINDS:
        return [f"{name} is of the kind {kind!r}; this freemerge reads {', '.join(KINDS)}"]
    infos = {role: header.tensors.get(f"{role}/{name}") for role in KINDS[kind].roles}
    found = {role: (info.dtype, info.shape) for role, info in infos.items() if info is not None}
    try:
        expected = KINDS[kind].suggested(shape, found).arrays
    except (KeyError, ValueError, IndexError):
        return [f"{name} is of the kind {kind}, but its arrays {', '.join(KINDS[kind].roles)} are missing or odd"]
    replaces = mode == "replace" and "start" in KINDS[kind].roles
    problems = [f"start/{name} is missing"] if replaces and "start" not in found else []
    for role, (dtype, dimensions) in expected.items():
        if role not in found:
            problems.append(f"{role}/{name} is missing")
        elif found[role] != (dtype, dimensions):
            stored, stored_shape = found[role]
            problems.append(f"{role}/{name} is {stored} {list(stored_shape)}, not {dtype} {list(dimensions)}")
    return problems

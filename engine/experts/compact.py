"""Experts in half the bytes: values of sparse rows in 8 bits with a scale for each row, and what error that makes."""

import math
import os
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from freemerge.checkpoint.manifest import changed_files, enter_files, read_manifest
from freemerge.checkpoint.reader import Checkpoint, open_result
from freemerge.checkpoint.workdir import WorkDir
from freemerge.checkpoint.writer import disk_errors
from freemerge.errors import CheckpointError, InputError, ShapeError, gathered, listed
from freemerge.experts.apply import FOLDER, check_fits
from freemerge.experts.sidecar import Expert, SidecarWriter, read_expert
from freemerge.kernels.array import FLOAT8_E4M3FN, dtype_of
from freemerge.parts import Layout, Part, QuantizedRows, Rows

VALUES: Mapping[str, np.dtype] = {"int8": np.dtype(np.int8), "float8": FLOAT8_E4M3FN}


@dataclass(frozen=True)
class CompactedExpert:
    """What became of an expert.

    Attributes:
        nbytes_before, nbytes, share: of its file; and now as a share of the backbone's tensors.
        error: ||quantized - values|| / ||values|| over all its sparse rows, each tensor's times its scale.
        largest_error: the largest change of what is added to a weight.
        worst_tensor, worst_error: that of the largest relative error.
    """

    name: str
    nbytes_before: int
    nbytes: int
    share: float
    error: float
    largest_error: float
    worst_tensor: str
    worst_error: float


def compact_experts(
    merged: str | os.PathLike,
    out: str | os.PathLike,
    *,
    values: str = "int8",
    overwrite: bool = False,
    fsync: bool = True,
) -> list[CompactedExpert]:
    """Write the merged model `merged` with compact experts as `out`, which takes its place in every way.

        compact_experts("merged", "merged-compact")

    Sparse rows become parts.QuantizedRows. What has none stays as it is: experts of masks or low-rank products, and
    those that are compact already. Weights are hard links to those of `merged` where the file system has them, else
    copies, and all other files are copies. `out` appears complete or not at all.

    Args:
        values: "int8", of steps as wide for all values of a row, or "float8" (e4m3), of steps as wide as the value.
            What a sparse expert keeps are its largest values, and for those int8 has the smaller error.
        overwrite, fsync: as for freemerge.merge; `out` may be `merged`.

    Returns:
        The experts that became smaller, by name.

    Raises:
        InputError: no expert has sparse rows of float32.
        CheckpointError: an expert's file is damaged, was changed since the merge, or is of another backbone.
        OutputError: `out` exists (and overwrite is False), or cannot be written.
    """
    if values not in VALUES:
        raise InputError(f"values are {' or '.join(VALUES)}, not {values!r}")
    merged, out = Path(merged), Path(out)
    if merged.resolve() in out.resolve().parents:
        raise InputError(f"{out} lies in {merged}, of which it would be a part; choose another folder")
    manifest = read_manifest(merged)
    with open_result(merged) as backbone:
        experts = _open_experts(merged, backbone, manifest)
        dense = sum(info.nbytes for info in backbone.tensors.values())
    plain = [e for e in experts if any(isinstance(part, Rows) for part in e.tensors.values())]
    if not plain:
        raise InputError(f"no expert of {merged} has sparse rows of float32, which are what can be made compact")
    files = {expert.path: f"{FOLDER}/{expert.path.name}" for expert in plain}
    with WorkDir.open(out, fingerprint="compact", overwrite=overwrite, resume=False, fsync=fsync) as work:
        _take_over(merged, work.staging, but=files)
        written = [
            _write_compact(expert, work.staging / file, values, dense, fsync)
            for expert, file in zip(plain, files.values(), strict=True)
        ]
        facts = {e.name: manifest["experts"].get(e.name, {}) | {"values": values, "error": e.error} for e in written}
        enter_files(work.staging, list(files.values()), facts, fsync=fsync)
        work.publish()
    return written


def _open_experts(merged: Path, backbone: Checkpoint, manifest: Mapping) -> list[Expert]:
    paths = sorted((merged / FOLDER).glob("*.safetensors"))
    if changed := changed_files(merged, manifest, paths):
        raise CheckpointError(listed(changed, "Copy the files again, or merge again."))
    experts, errors = [], []
    for path in paths:
        try:
            experts.append(read_expert(path))
            check_fits(experts[-1], backbone, manifest["backbone"])
        except CheckpointError as error:
            errors.append(error)
    if errors:
        raise CheckpointError(gathered(errors))
    return experts


def _take_over(merged: Path, folder: Path, but: Collection[Path]) -> None:
    """All files but those: tensors linked, the rest, which people edit, copied."""
    for path in sorted(merged.rglob("*")):
        if path in but or not path.is_file():
            continue
        place = folder / path.relative_to(merged)
        with disk_errors(place, lambda path=path: path.stat().st_size):
            place.parent.mkdir(parents=True, exist_ok=True)
            if path.suffix != ".safetensors" or not _linked(path, place):
                shutil.copyfile(path, place)


def _linked(path: Path, place: Path) -> bool:
    try:
        os.link(path.resolve(), place)
    except OSError:  # another file system, or one without links
        return False
    return True


def _write_compact(expert: Expert, path: Path, values: str, dense: int, fsync: bool) -> CompactedExpert:
    """Tensor by tensor; the errors go into the file's metadata."""
    dtype = VALUES[values]
    layouts = {name: _layout(part, dtype) for name, part in expert.tensors.items()}
    errors: dict[str, tuple[float, float, float]] = {}
    out = SidecarWriter(path, layouts, fsync=fsync)
    try:
        for name, part in expert.tensors.items():
            if isinstance(part, Rows):
                compact = _quantized(expert, name, part, dtype)
                errors[name] = _errors(part, compact, expert.scale(name))
                part = compact
            out.write(name, part)
        relative = {name: math.sqrt(error / norm) if norm else 0.0 for name, (error, norm, _) in errors.items()}
        worst = max(relative, key=relative.get)
        total, norm = (sum(found[i] for found in errors.values()) for i in (0, 1))
        error, largest = math.sqrt(total / norm) if norm else 0.0, max(found[2] for found in errors.values())
        noted = {key: value for key, value in expert.metadata.items() if key not in ("format", "version")}
        noted |= {"quantization_error": error, "largest_quantization_error": largest}
        out.finish(noted, {name: expert.scale(name) for name in expert.tensors})
    finally:
        out.close()
    nbytes = path.stat().st_size
    return CompactedExpert(
        expert.name, expert.path.stat().st_size, nbytes, nbytes / dense, error, largest, worst, relative[worst]
    )


def _layout(part: Part, dtype: np.dtype) -> Layout:
    if not isinstance(part, Rows):
        return part.layout
    start = None if part.start is None else dtype_of(part.start)
    return QuantizedRows.planned(part.shape, int(np.count_nonzero(part.values)), dtype, start)


def _quantized(expert: Expert, name: str, part: Rows, dtype: np.dtype) -> QuantizedRows:
    try:
        return QuantizedRows.quantized(part, dtype)
    except ShapeError as error:
        raise CheckpointError(f"{expert.path}: {name}: {error}; merge again") from error


def _errors(part: Rows, compact: QuantizedRows, scale: float) -> tuple[float, float, float]:
    """||quantized - values||^2 and ||values||^2, both scaled, and the largest difference, scaled; in float64."""
    values = part.values[part.values != 0].astype(np.float64) * scale
    differences = compact.expanded().values * np.float64(scale) - values
    return (
        float(differences @ differences),
        float(values @ values),
        float(np.abs(differences).max(initial=0.0)),
    )

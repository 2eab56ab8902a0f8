"""Backbone plus expert as a plain checkpoint, for programs that know nothing of experts."""

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from freemerge.checkpoint.card import copy_side_files, write_card
from freemerge.checkpoint.checksum import PieceChecksum
from freemerge.checkpoint.layout import Entry, plan_shards
from freemerge.checkpoint.manifest import MergeInput, read_manifest, write_manifest
from freemerge.checkpoint.reader import Checkpoint, open_checkpoint
from freemerge.checkpoint.workdir import WorkDir
from freemerge.checkpoint.writer import CheckpointWriter
from freemerge.errors import CheckpointError, InputError, ShapeError, listed
from freemerge.experts.sidecar import Expert, read_expert
from freemerge.kernels.apply_sparse_rows import apply_sparse_rows
from freemerge.kernels.array import SparseRows, rows_of

FOLDER = "experts"
_TILE = 4 << 20  # bytes


@dataclass(frozen=True)
class ExpertSummary:
    """An expert beside a backbone; `density` is its share of the entries of the tensors it changes."""

    name: str
    file: Path
    nbytes: int
    tensors: int
    entries: int
    density: float
    mode: str
    scales: tuple[float, float]
    """The smallest and the largest."""


def list_experts(folder: str | os.PathLike) -> list[ExpertSummary]:
    """The experts of a merged model, by name. Raises CheckpointError for a file that is none."""
    return [_summary(read_expert(path)) for path in sorted(Path(folder, FOLDER).glob("*.safetensors"))]


def _summary(expert: Expert) -> ExpertSummary:
    rows = expert.tensors.values()
    entries, elements = sum(r.count for r in rows), sum(int(np.prod(r.shape)) for r in rows)
    scales = [expert.scale(name) for name in expert.tensors] or [1.0]
    return ExpertSummary(
        name=expert.name,
        file=expert.path,
        nbytes=expert.path.stat().st_size,
        tensors=len(expert.tensors),
        entries=entries,
        density=entries / elements if elements else 0.0,
        mode=expert.mode,
        scales=(min(scales), max(scales)),
    )


def find_expert(folder: Path, name: str) -> Expert:
    """Open the expert `name` of a merged model. Raises InputError listing those there are."""
    path = Path(folder, FOLDER, f"{name}.safetensors")
    if path.parent != Path(folder, FOLDER) or not path.is_file():
        names = ", ".join(sorted(path.stem for path in Path(folder, FOLDER).glob("*.safetensors"))) or "none"
        raise InputError(f"{folder} has no expert {name!r}; there are: {names}")
    return read_expert(path)


def apply_expert(
    merged: str | os.PathLike,
    name: str,
    out: str | os.PathLike,
    *,
    overwrite: bool = False,
    fsync: bool = True,
    shard_size: int = 5 * 10**9,
    threads: int | None = None,
) -> None:
    """Write the merged model `merged` with its expert `name` put in, as a plain checkpoint `out`.

    At the entries of the expert, out = round(backbone + scale * value), in mode "replace" round(start + scale * value):
    see kernels.apply_sparse_rows. Everything else is copied. `out` appears complete or not at all.

    Raises:
        InputError: no such expert.
        CheckpointError: the expert was made for another backbone, or a file is damaged.
        OutputError: `out` exists (and overwrite is False), or cannot be written.
    """
    merged, out = Path(merged), Path(out)
    expert = find_expert(merged, name)
    manifest = read_manifest(merged)
    with open_checkpoint(merged) as backbone:
        _check_fits(expert, backbone, manifest["backbone"])
        shards = plan_shards([Entry(n, info.dtype, info.shape) for n, info in backbone.tensors.items()], shard_size)
        with WorkDir.open(out, fingerprint=f"expert {name}", overwrite=overwrite, resume=False, fsync=fsync) as work:
            checksums = _write_tensors(backbone, expert, CheckpointWriter(work.staging, shards, fsync=fsync), threads)
            _write_side_files(work.staging, backbone, expert, manifest, shards, checksums)
            work.publish()


def _check_fits(expert: Expert, backbone: Checkpoint, fingerprint: str) -> None:
    if expert.metadata["backbone"] != fingerprint:
        raise CheckpointError(
            f"{expert.path} belongs to the backbone {expert.metadata['backbone']}, this one is {fingerprint}; "
            "apply an expert to the merged model it was written with"
        )
    problems = []
    for name, rows in expert.tensors.items():
        info = backbone.tensors.get(name)
        if info is None:
            problems.append(f"{name}: in the expert, but not in the backbone")
        elif info.shape != rows.shape:
            problems.append(f"{name}: {list(info.shape)} in the backbone, {list(rows.shape)} in the expert")
    if problems:
        raise CheckpointError(listed(problems, "Apply an expert to the merged model it was written with."))


def _write_tensors(
    backbone: Checkpoint, expert: Expert, writer: CheckpointWriter, threads: int | None
) -> dict[str, str]:
    """Write every tensor; answers their checksums by name."""
    names = sorted(backbone.tensors, key=lambda name: -backbone.tensors[name].nbytes)
    with writer, ThreadPoolExecutor(threads or os.cpu_count()) as pool:
        checksums = dict(zip(names, pool.map(partial(_write_tensor, backbone, expert, writer), names), strict=True))
        writer.finish()
    return checksums


def _write_tensor(backbone: Checkpoint, expert: Expert, writer: CheckpointWriter, name: str) -> str:
    backbone.prefetch(name)
    array = backbone.read(name)
    pieces = PieceChecksum(array.nbytes)
    flat = array.reshape(-1)
    step = _TILE // flat.dtype.itemsize
    tiles = (
        _tiles_with_expert(array, expert, name)
        if name in expert.tensors
        else ((first, flat[first : first + step]) for first in range(0, flat.size, step))
    )
    for first, tile in tiles:
        writer.write(name, first, tile)
        pieces.update(first * flat.dtype.itemsize, tile)
    backbone.release(name)
    return pieces.hexdigest()


def _tiles_with_expert(array: np.ndarray, expert: Expert, name: str):
    """Runs of whole rows with the expert put in, and the element each begins at."""
    rows, start, scale = expert.tensors[name], expert.start(name), expert.scale(name)
    height, width = rows_of(array.shape)
    matrix = array.reshape(height, width)
    at_once = max(1, _TILE // max(1, width * array.dtype.itemsize))
    for first in range(0, height, at_once):
        block = np.array(matrix[first : first + at_once])
        part, entries = rows_between(rows, first, first + len(block))
        try:
            apply_sparse_rows(block, part, scale, start=None if start is None else start[entries], out=block)
        except ShapeError as error:
            raise CheckpointError(f"{expert.path}: {name}: {error}; write the expert again") from error
        yield first * width, block


def rows_between(rows: SparseRows, first: int, last: int) -> tuple[SparseRows, slice]:
    """Rows first ... last - 1 as sparse rows of their own, and which entries these are."""
    _, width = rows_of(rows.shape)
    offsets = rows.offsets[first : last + 1]
    entries = slice(int(offsets[0]), int(offsets[-1]))
    shape = (last - first, width)
    return SparseRows(offsets - offsets[0], rows.columns[entries], rows.values[entries], shape), entries


def _write_side_files(folder: Path, backbone: Checkpoint, expert: Expert, manifest: dict, shards, checksums) -> None:
    merged = MergeInput.of(backbone, "backbone")
    recipe = {"expert": expert.name, "backbone": manifest["backbone"], "recipe": manifest["recipe"]}
    copy_side_files(backbone, folder)
    write_card(
        folder,
        method=expert.metadata["method"],
        recipe=_yaml(recipe),
        inputs=[MergeInput(facts["name"], facts["role"], facts["license"], {}) for facts in manifest["inputs"]],
        command=("freemerge", "experts", "apply", merged.name, expert.name, "OUT"),
    )
    write_manifest(folder, recipe=recipe, inputs=[merged], shards=shards, checksums=checksums)


def _yaml(data: dict) -> str:
    import yaml

    return yaml.safe_dump(data, sort_keys=False, allow_unicode=True)

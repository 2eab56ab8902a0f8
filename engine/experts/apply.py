"""Backbone plus experts as a plain checkpoint, for programs that know nothing of experts."""

import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeAlias

import numpy as np

from freemerge.checkpoint.card import copy_side_files, write_card
from freemerge.checkpoint.checksum import PieceChecksum
from freemerge.checkpoint.layout import Entry, plan_shards
from freemerge.checkpoint.manifest import MergeInput, read_manifest, write_manifest
from freemerge.checkpoint.reader import Checkpoint, open_result
from freemerge.checkpoint.workdir import WorkDir
from freemerge.checkpoint.writer import CheckpointWriter
from freemerge.errors import CheckpointError, InputError, ShapeError, listed
from freemerge.experts.memory import check_addable
from freemerge.experts.sidecar import Expert, read_expert
from freemerge.kernels.array import rows_of
from freemerge.parts import QuantizedRows, Rows, apply_parts

Weighted: TypeAlias = tuple[Expert, float]

FOLDER = "experts"
_TILE = 4 << 20  # bytes


@dataclass(frozen=True)
class ExpertSummary:
    """An expert beside a backbone.

    Attributes:
        kinds: of its parts, and how many tensors have one: "rows 12, difference 3".
        values: dtypes of the values of sparse rows; None where there are none.
        parameters: numbers it holds; of a mask one for each element.
        density: parameters as a share of the elements of the tensors it changes.
        nbytes, share: of its file; and as a share of the backbone's tensors.
        shared_nbytes: of what all experts share, which is there once.
        scales: the smallest and the largest.
        error: of compact files, as compact.CompactedExpert has it.
    """

    name: str
    file: Path
    kinds: str
    values: str | None
    tensors: int
    parameters: int
    density: float
    nbytes: int
    share: float
    shared_nbytes: int
    mode: str
    scales: tuple[float, float]
    error: float | None


def list_experts(folder: str | os.PathLike) -> list[ExpertSummary]:
    """The experts of a merged model, by name. Raises CheckpointError for a file that is none."""
    dense = dense_nbytes(folder)
    return [_summary(read_expert(path), dense) for path in sorted(Path(folder, FOLDER).glob("*.safetensors"))]


def dense_nbytes(folder: str | os.PathLike) -> int:
    """Of the tensors of a merged model without its experts."""
    with open_result(folder) as backbone:
        return sum(info.nbytes for info in backbone.tensors.values())


def share_of_experts(folder: str | os.PathLike) -> tuple[int, float]:
    """The bytes of all experts of a merged model, what they share counted once; and as a share of the backbone's."""
    nbytes = sum(path.stat().st_size for path in Path(folder, FOLDER).rglob("*.safetensors"))
    return nbytes, nbytes / max(1, dense_nbytes(folder))


def _summary(expert: Expert, dense: int) -> ExpertSummary:
    parts = expert.tensors.values()
    kinds = Counter(part.kind for part in parts)
    parameters, elements = sum(part.parameters for part in parts), sum(math.prod(part.shape) for part in parts)
    scales = [expert.scale(name) for name in expert.tensors] or [1.0]
    dtypes = (part.values.dtype.name for part in parts if isinstance(part, (Rows, QuantizedRows)))
    nbytes, error = expert.path.stat().st_size, expert.metadata.get("quantization_error")
    return ExpertSummary(
        name=expert.name,
        file=expert.path,
        kinds=", ".join(f"{kind} {count}" for kind, count in kinds.items()),
        values=", ".join(dict.fromkeys(dtypes)) or None,
        tensors=len(expert.tensors),
        parameters=parameters,
        density=parameters / elements if elements else 0.0,
        nbytes=nbytes,
        share=nbytes / dense if dense else 0.0,
        shared_nbytes=expert.shared.path.stat().st_size if expert.shared else 0,
        mode=expert.mode,
        scales=(min(scales), max(scales)),
        error=None if error is None else float(error),
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
    experts: str | Mapping[str, float],
    out: str | os.PathLike,
    *,
    overwrite: bool = False,
    fsync: bool = True,
    shard_size: int = 5 * 10**9,
    threads: int | None = None,
) -> None:
    """Write the merged model `merged` with one or more of its experts put in, as a plain checkpoint `out`.

        apply_expert("merged", "math", "merged-math")
        apply_expert("merged", {"math": 0.7, "code": 0.3}, "merged-both")

    In the tensors of the experts, out = round( backbone + sum of weight * scale * part ), see freemerge.parts; in mode
    "replace", of a single expert, round( start + scale * value ). Everything else is copied. `out` appears complete or
    not at all.

    Args:
        experts: the name of one, or the weights of several (a router's probabilities, say).

    Raises:
        InputError: no such expert; or several, of which one replaces entries.
        CheckpointError: an expert was made for another backbone, or a file is damaged.
        OutputError: `out` exists (and overwrite is False), or cannot be written.
    """
    merged, out = Path(merged), Path(out)
    weights = {experts: 1.0} if isinstance(experts, str) else dict(experts)
    chosen = [(find_expert(merged, name), float(weight)) for name, weight in weights.items()]
    check_addable([expert for expert, _ in chosen])
    manifest = read_manifest(merged)
    with open_result(merged) as backbone:
        for expert, _ in chosen:
            check_fits(expert, backbone, manifest["backbone"])
        entries = [Entry(name, info.dtype, info.shape) for name, info in backbone.tensors.items()]
        shards = plan_shards(entries, shard_size, getattr(backbone, "weights_file", None))
        fingerprint = f"experts {weights}"
        with WorkDir.open(out, fingerprint=fingerprint, overwrite=overwrite, resume=False, fsync=fsync) as work:
            checksums = _write_tensors(backbone, chosen, CheckpointWriter(work.staging, shards, fsync=fsync), threads)
            _write_side_files(work.staging, backbone, chosen, manifest, shards, checksums)
            work.publish()


def check_fits(expert: Expert, backbone: Checkpoint, fingerprint: str) -> None:
    """Raise CheckpointError for an expert that was damaged, or made for another backbone than that of `fingerprint`."""
    if expert.metadata["backbone"] != fingerprint:
        raise CheckpointError(
            f"{expert.path} belongs to the backbone {expert.metadata['backbone']}, this one is {fingerprint}; "
            "apply an expert to the merged model it was written with"
        )
    problems = []
    for name, part in expert.tensors.items():
        info = backbone.tensors.get(name)
        if info is None:
            problems.append(f"{name}: in the expert, but not in the backbone")
        elif info.shape != part.shape:
            problems.append(f"{name}: {list(info.shape)} in the backbone, {list(part.shape)} in the expert")
        if not math.isfinite(expert.scale(name)):
            problems.append(f"{expert.path}: {name} has the scale {expert.scale(name)}; write the expert again")
        try:
            part.check()
        except ShapeError as error:
            problems.append(f"{expert.path}: {name}: {error}; write the expert again")
    if problems:
        raise CheckpointError(listed(problems, "Apply an expert to the merged model it was written with."))


def _write_tensors(
    backbone: Checkpoint, chosen: Sequence[Weighted], writer: CheckpointWriter, threads: int | None
) -> dict[str, str]:
    """Write every tensor; answers their checksums by name."""
    names = sorted(backbone.tensors, key=lambda name: -backbone.tensors[name].nbytes)
    with writer, ThreadPoolExecutor(threads or os.cpu_count()) as pool:
        checksums = dict(zip(names, pool.map(partial(_write_tensor, backbone, chosen, writer), names), strict=True))
        writer.finish()
    return checksums


def _write_tensor(backbone: Checkpoint, chosen: Sequence[Weighted], writer: CheckpointWriter, name: str) -> str:
    backbone.prefetch(name)
    array = backbone.read(name)
    pieces = PieceChecksum(array.nbytes)
    flat = array.reshape(-1)
    step = _TILE // flat.dtype.itemsize
    parts = [(expert, weight) for expert, weight in chosen if name in expert.tensors]
    tiles = (
        _tiles_with_experts(array, parts, name)
        if parts
        else ((first, flat[first : first + step]) for first in range(0, flat.size, step))
    )
    for first, tile in tiles:
        writer.write(name, first, tile)
        pieces.update(first * flat.dtype.itemsize, tile)
    backbone.release(name)
    return pieces.hexdigest()


def _tiles_with_experts(array: np.ndarray, chosen: Sequence[Weighted], name: str):
    """Runs of whole rows with the experts put in, and the element each begins at."""
    height, width = rows_of(array.shape)
    matrix = array.reshape(height, width)
    grain = math.lcm(*(expert.tensors[name].grain for expert, _ in chosen))
    at_once = -(-max(1, _TILE // max(1, width * array.dtype.itemsize)) // grain) * grain
    for first in range(0, height, at_once):
        block = np.array(matrix[first : first + at_once])
        parts = [
            (expert.tensors[name].rows(first, first + len(block)), weight * expert.scale(name))
            for expert, weight in chosen
        ]
        apply_parts(block, parts, out=block)
        yield first * width, block


def _write_side_files(
    folder: Path, backbone: Checkpoint, chosen: Sequence[Weighted], manifest: dict, shards, checksums
) -> None:
    merged = MergeInput.of(backbone, "backbone")
    weights = {expert.name: weight for expert, weight in chosen}
    recipe = {"experts": weights, "backbone": manifest["backbone"], "recipe": manifest["recipe"]}
    said = ",".join(name if weight == 1 else f"{name}={weight}" for name, weight in weights.items())
    copy_side_files(backbone, folder)
    write_card(
        folder,
        method=", ".join(dict.fromkeys(expert.metadata["method"] for expert, _ in chosen)),
        recipe=_yaml(recipe),
        inputs=[MergeInput(facts["name"], facts["role"], facts["license"], {}) for facts in manifest["inputs"]],
        library=getattr(backbone, "library", "transformers"),
        command=("freemerge", "experts", "apply", merged.name, said, "OUT"),
    )
    write_manifest(folder, recipe=recipe, inputs=[merged], shards=shards, checksums=checksums)


def _yaml(data: dict) -> str:
    import yaml

    return yaml.safe_dump(data, sort_keys=False, allow_unicode=True)

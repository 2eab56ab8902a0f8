"""freemerge.json: what a result was made from and by, and a checksum for each of its tensors and files.

It depends on recipe, inputs and versions alone: no dates, no directories of this machine, so equal merges are equal
directories.
"""

import json
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import numpy as np

from freemerge import __version__
from freemerge.checkpoint.checksum import checksum, checksum_file
from freemerge.checkpoint.dtypes import NAMES
from freemerge.checkpoint.layout import ShardPlan
from freemerge.checkpoint.reader import Checkpoint
from freemerge.checkpoint.rename import fsync_path
from freemerge.checkpoint.writer import write_file
from freemerge.errors import CheckpointError

MANIFEST = "freemerge.json"
FORMAT = 1


@dataclass(frozen=True)
class MergeInput:
    """One input as card and manifest name it: `role` is base, expert, backbone, ...; `fingerprint` as of Checkpoint.

    `label` is the model's without the adapters on it, whose labels are `adapters`.
    """

    label: str
    role: str
    license: str | None
    fingerprint: Mapping[str, Mapping[str, object]]
    adapters: tuple[str, ...] = ()

    @classmethod
    def of(cls, checkpoint: Checkpoint, role: str) -> "MergeInput":
        label, *adapters = checkpoint.labels
        return cls(label, role, checkpoint.license(), checkpoint.fingerprint(), tuple(adapters))

    @property
    def models(self) -> list[str]:
        """The model and its adapters, without the directories of this machine: a hub name, or a path's last part."""
        return [_public(label) for label in (self.label, *self.adapters)]

    @property
    def name(self) -> str:
        return "+".join(self.models)


def _public(label: str) -> str:
    path = PurePath(label)
    is_hub_name = len(path.parts) == 2 and not path.is_absolute() and path.parts[0] not in (".", "..", "~")
    return label if is_hub_name else path.name or "input"


def backbone_fingerprint(checksums: Mapping[str, str]) -> str:
    """What identifies a set of weights: a checksum over the names and checksums of all tensors."""
    return checksum("".join(f"{name}\0{digest}\n" for name, digest in sorted(checksums.items())).encode())


def write_manifest(
    folder: Path,
    *,
    recipe: Mapping[str, object] | Sequence[Mapping[str, object]],
    inputs: Sequence[MergeInput],
    shards: Sequence[ShardPlan],
    checksums: Mapping[str, str],
    experts: Mapping[str, Mapping[str, object]] | None = None,
) -> None:
    """Write freemerge.json; the last file of a result, since it holds checksums of the others.

    Args:
        folder: where the whole result stands.
        recipe: plain data (what YAML can hold), a list where it has several documents.
        shards: as written.
        checksums: of every tensor, by name.
        experts: facts to note of experts/<name>.safetensors, by name.
    """
    tensors = {
        entry.name: {
            "dtype": NAMES[entry.dtype],
            "shape": list(entry.shape),
            "shard": shard.filename,
            "checksum": checksums[entry.name],
        }
        for shard in shards
        for entry in shard.entries
    }
    shard_names = {shard.filename for shard in shards}
    manifest = {
        "format": FORMAT,
        "versions": {"freemerge": __version__, "python": platform.python_version(), "numpy": np.__version__},
        "recipe": recipe,
        "inputs": [input_facts(item) for item in inputs],
        "backbone": backbone_fingerprint(checksums),
        "tensors": dict(sorted(tensors.items())),
        "experts": {name: {"file": f"experts/{name}.safetensors", **facts} for name, facts in (experts or {}).items()},
        "files": {
            path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "checksum": checksum_file(path)}
            for path in sorted(folder.rglob("*"))
            if path.is_file() and path.name not in {MANIFEST, *shard_names}
        },
    }
    write_file(folder / MANIFEST, _encoded(manifest))


def add_expert(folder: Path, name: str, *, fsync: bool = True) -> None:
    """Enter experts/<name>.safetensors, written after the merge, in the manifest of `folder`."""
    file = f"experts/{name}.safetensors"
    enter_files(folder, [file], {name: {"file": file}}, fsync=fsync)


def enter_files(
    folder: Path, files: Sequence[str], experts: Mapping[str, Mapping[str, object]] | None = None, *, fsync: bool = True
) -> None:
    """Enter files written after the merge in the manifest of `folder`; `experts` are facts of those that are some."""
    manifest = read_manifest(folder)
    manifest["experts"] |= experts or {}
    for file in files:
        path = folder / file
        manifest["files"][file] = {"bytes": path.stat().st_size, "checksum": checksum_file(path)}
    beside = folder / f".{MANIFEST}.new"
    write_file(beside, _encoded(manifest))
    if fsync:
        fsync_path(beside)
    beside.replace(folder / MANIFEST)
    if fsync:
        fsync_path(folder)


def read_manifest(folder: Path) -> dict:
    """freemerge.json as a dict. Raises CheckpointError where there is none or it is none."""
    path = Path(folder) / MANIFEST
    try:
        manifest = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(
            f"{folder} has no {MANIFEST}: it was not made by freemerge, or it was copied in part"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {str(error)[:200]}") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not of format {FORMAT}, the one this freemerge reads")
    return manifest


def changed_files(folder: Path, manifest: Mapping[str, Any], paths: Iterable[Path]) -> list[str]:
    """What is wrong with those of the files in `folder` that are not as its manifest says they were written."""
    problems = []
    for path in paths:
        facts = manifest.get("files", {}).get(path.relative_to(folder).as_posix())
        if facts is None:
            continue
        if path.stat().st_size != facts["bytes"]:
            problems.append(f"{path}: {path.stat().st_size} bytes, written as {facts['bytes']}")
        elif checksum_file(path) != facts["checksum"]:
            problems.append(f"{path}: not what was written (its checksum differs from {MANIFEST}'s)")
    return problems


def _encoded(manifest: Mapping[str, object]) -> bytes:
    """JSON with one line for each tensor, file and expert: short, and two manifests can be compared by diff."""
    sections = []
    for key, value in manifest.items():
        text = json.dumps(value, indent=1, ensure_ascii=False).replace("\n", "\n ")
        if key in ("tensors", "files", "experts") and value:
            rows = (f"  {_json(name)}: {_json(facts)}" for name, facts in value.items())
            text = "{\n" + ",\n".join(rows) + "\n }"
        sections.append(f" {_json(key)}: {text}")
    return ("{\n" + ",\n".join(sections) + "\n}\n").encode()


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def input_facts(item: MergeInput) -> dict:
    # When a file was written says nothing about what is in it.
    files = {
        file: {key: value for key, value in facts.items() if key != "mtime_ns"}
        for file, facts in item.fingerprint.items()
    }
    return {"name": item.name, "role": item.role, "license": item.license, "files": files}

"""Is a result still what was written? Every tensor and file against the checksums of freemerge.json."""

import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from freemerge.checkpoint import mapping
from freemerge.checkpoint.checksum import checksum, checksum_file
from freemerge.checkpoint.dtypes import NAMES
from freemerge.checkpoint.header import Malformed, examine_header
from freemerge.checkpoint.manifest import MANIFEST, backbone_fingerprint, read_manifest


@dataclass
class Report:
    """What `verify` found: how much was compared, and every problem, one line each."""

    folder: Path
    tensors: int = 0
    files: int = 0
    nbytes: int = 0
    problems: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.problems


@dataclass(frozen=True)
class _Check:
    """Something to be hashed: `work` answers its checksum."""

    what: str
    nbytes: int
    expected: str
    work: Callable[[], str]


def verify(
    folder: str | os.PathLike, *, threads: int | None = None, on_bytes: Callable[[int], None] | None = None
) -> Report:
    """Hash every tensor and file of a result and compare with its freemerge.json.

    Args:
        threads: all cores unless given.
        on_bytes: told how many bytes were compared after each tensor or file.

    Raises:
        CheckpointError: there is no freemerge.json to compare with.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    report = Report(folder)
    checks = [*_tensor_checks(folder, manifest, report), *_file_checks(folder, manifest, report)]
    checks.sort(key=lambda check: -check.nbytes)
    with ThreadPoolExecutor(threads or os.cpu_count()) as pool:
        for check, problem in zip(checks, pool.map(_problem, checks), strict=True):
            report.nbytes += check.nbytes
            report.problems += problem
            if on_bytes is not None:
                on_bytes(check.nbytes)
    report.problems += _extra_files(folder, manifest)
    if manifest["backbone"] != backbone_fingerprint({n: facts["checksum"] for n, facts in manifest["tensors"].items()}):
        report.problems.append(f"{MANIFEST}: the backbone's fingerprint is not that of its checksums")
    report.problems.sort()
    return report


def _problem(check: _Check) -> list[str]:
    try:
        found = check.work()
    except OSError as error:
        return [f"{check.what}: cannot be read ({error.strerror})"]
    return [] if found == check.expected else [f"{check.what}: changed (checksum {found}, written as {check.expected})"]


def _tensor_checks(folder: Path, manifest: Mapping, report: Report) -> Iterator[_Check]:
    shards = _shards(manifest)
    for shard, expected in shards.items():
        report.tensors += len(expected)
        try:
            infos = examine_header(folder / shard).tensors
        except Malformed as error:
            report.problems += [f"{shard}: {problem}" for problem in error.problems]
            continue
        report.problems += [f"{name}: in {shard}, but not in {MANIFEST}" for name in infos.keys() - expected.keys()]
        mapped = mapping.map_file(folder / shard)
        for name, facts in expected.items():
            info = infos.get(name)
            if info is None:
                report.problems.append(f"{name}: missing from {shard}")
            elif (NAMES[info.dtype], list(info.shape)) != (facts["dtype"], facts["shape"]):
                now, then = f"{NAMES[info.dtype]} {list(info.shape)}", f"{facts['dtype']} {facts['shape']}"
                report.problems.append(f"{name}: {now} in {shard}, written as {then}")
            else:
                view = mapped[info.offset : info.offset + info.nbytes]
                yield _Check(name, info.nbytes, facts["checksum"], partial(_checksum_of_mapped, view))


def _checksum_of_mapped(view: np.ndarray) -> str:
    mapping.prefetch(view)
    found = checksum(view)
    mapping.release(view)  # a model larger than memory must not push everything else out of it
    return found


def _shards(manifest: Mapping) -> dict[str, dict[str, Mapping]]:
    shards: dict[str, dict[str, Mapping]] = {}
    for name, facts in manifest["tensors"].items():
        shards.setdefault(facts["shard"], {})[name] = facts
    return shards


def _file_checks(folder: Path, manifest: Mapping, report: Report) -> Iterator[_Check]:
    for name, facts in manifest["files"].items():
        report.files += 1
        path = folder / name
        if not path.is_file():
            report.problems.append(f"{name}: missing")
        elif path.stat().st_size != facts["bytes"]:
            report.problems.append(f"{name}: {path.stat().st_size} bytes, written as {facts['bytes']}")
        else:
            yield _Check(name, facts["bytes"], facts["checksum"], partial(checksum_file, path))


def _extra_files(folder: Path, manifest: Mapping) -> list[str]:
    known = {MANIFEST, *_shards(manifest), *manifest["files"]}
    present = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    # Names with a dot in front are those of tools: .gitattributes, .cache/huggingface.
    visible = (path for path in present if not path.parts[0].startswith("."))
    return [f"{path.as_posix()}: not part of what was written" for path in visible if path.as_posix() not in known]

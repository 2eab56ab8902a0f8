"""A router's two files, router.safetensors with its arrays and router.json with the rest.

In a merged model they stand in its folder `router`, beside `experts`: a file of tensors in the model's own folder would
be read as weights by programs that read all there are.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from freemerge.checkpoint.checksum import checksum, checksum_file
from freemerge.checkpoint.header import read_header
from freemerge.checkpoint.layout import Entry, plan_shard
from freemerge.checkpoint.manifest import MANIFEST, enter_files, read_manifest
from freemerge.checkpoint.rename import fsync_path
from freemerge.checkpoint.writer import ShardWriter, write_file
from freemerge.errors import CheckpointError, InputError, OutputError, listed
from freemerge.routers.assignment import checked_names
from freemerge.routers.mlp import MlpRouter
from freemerge.routers.prototype import PrototypeRouter
from freemerge.routers.router import Router, check_settings

FOLDER, WEIGHTS, CONFIG = "router", "router.safetensors", "router.json"
FORMAT, VERSION = "freemerge-router", 1
KINDS = {kind.kind: kind for kind in (PrototypeRouter, MlpRouter)}
_TYPES: dict[str, tuple[type, ...]] = {
    "format": (str,),
    "version": (int,),
    "kind": (str,),
    "experts": (list,),
    "width": (int,),
    "features": (str,),
    "temperature": (float, int),
    "threshold": (float, int),
    "top_k": (int, type(None)),
    "options": (dict,),
    "backbone": (str, type(None)),
    "checksum": (str,),
}
_REMEDY = "Save the router again, or fit it again."


def save_router(router: Router, folder: str | os.PathLike, *, overwrite: bool = False, fsync: bool = True) -> Path:
    """Write a router's files into `folder`, or where that is a merged model into its folder `router`; answers where.

    A merged model's freemerge.json gets their checksums, and the router the backbone's fingerprint.

    Raises:
        InputError: the merged model has not all of the router's experts.
        OutputError: there is a router already (and overwrite is False), or it cannot be written.
    """
    folder = Path(folder)
    manifest = read_manifest(folder) if (folder / MANIFEST).exists() else None
    if manifest is not None:
        others = [name for name in router.experts if name not in manifest["experts"]]
        if others:
            there = ", ".join(manifest["experts"]) or "none"
            raise InputError(
                f"the router is for other experts: {folder} has no {', '.join(others)}; there are: {there}"
            )
    home = folder / FOLDER if manifest is not None else folder
    if not overwrite and any((home / name).exists() for name in (WEIGHTS, CONFIG)):
        raise OutputError(f"{home} holds a router already; pass overwrite to replace it")
    _write(router, home, manifest and manifest["backbone"], fsync)
    if manifest is not None:
        enter_files(folder, [f"{FOLDER}/{name}" for name in (WEIGHTS, CONFIG)], fsync=fsync)
    return home


def _write(router: Router, home: Path, backbone: str | None, fsync: bool) -> None:
    """Both files beside their places, then renamed; between the two renames the checksum tells that they differ."""
    try:
        home.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{home} cannot be made: {error.strerror}") from None
    entries = [Entry(name, array.dtype, array.shape) for name, array in router.arrays.items()]
    plan = plan_shard(f".{WEIGHTS}.new", entries, {"format": FORMAT})
    writer = ShardWriter(home, plan, fsync=fsync)
    try:
        for entry in plan.entries:
            writer.write_at(entry.offset, np.ascontiguousarray(router.arrays[entry.name]))
        writer.finish()
    finally:
        writer.close()
    config = _config(router, backbone, checksum_file(writer.path))
    beside = home / f".{CONFIG}.new"
    write_file(beside, (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode())
    if fsync:
        fsync_path(beside)
    writer.path.replace(home / WEIGHTS)
    beside.replace(home / CONFIG)
    if fsync:
        fsync_path(home)


def _config(router: Router, backbone: str | None, digest: str) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "version": VERSION,
        "kind": router.kind,
        "experts": list(router.experts),
        "width": router.width,
        "features": router.features,
        "temperature": router.temperature,
        "threshold": router.threshold,
        "top_k": router.top_k,
        "options": router.options,
        "backbone": backbone,
        "checksum": digest,
    }


def load_router(folder: str | os.PathLike) -> Router:
    """The router of a merged model, or of a folder with its files.

    Raises:
        InputError: there is none.
        CheckpointError: with all that is wrong with its files: changed, cut short, not finite; or, beside a merged
            model, of another backbone or other experts.
    """
    home = find_router(Path(folder))
    if home is None:
        raise InputError(f"{folder} holds no router: {CONFIG} and {WEIGHTS}, as Router.save writes them")
    config = _read_config(home / CONFIG)
    problems = [*_config_problems(config)]
    arrays: dict[str, np.ndarray] = {}
    if not problems:
        problems += _misplaced(config, home)
        arrays, found = _read_arrays(home / WEIGHTS, config)
        problems += found
    if problems:
        raise CheckpointError(listed((f"{home}: {p}" for p in problems), _REMEDY, outcome="nothing was loaded"))
    settings = {key: config[key] for key in ("features", "temperature", "threshold", "top_k")}
    return KINDS[config["kind"]].of(config["experts"], arrays, **config["options"], **settings)


def find_router(folder: Path) -> Path | None:
    """Where the router's files are: `folder`, or its folder `router`; None where neither has any."""
    homes = (folder, folder / FOLDER)
    return next((home for home in homes if (home / CONFIG).is_file() or (home / WEIGHTS).is_file()), None)


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_bytes(), object_pairs_hook=_unique)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing beside {WEIGHTS}. {_REMEDY}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {str(error)[:200]}. {_REMEDY}") from None
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not a router of freemerge. {_REMEDY}")
    if config.get("version") != VERSION:
        raise CheckpointError(f"{path}: version {config.get('version')}; this freemerge reads version {VERSION}")
    return config


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands twice")
    return found


def _config_problems(config: Mapping[str, Any]) -> list[str]:
    problems = [f"{CONFIG} lacks {key}" for key in _TYPES if key not in config]
    problems += [f"{CONFIG} has {key!r}, which this freemerge does not know" for key in config if key not in _TYPES]
    problems += [
        f"{CONFIG}: {key} is {config[key]!r}"
        for key, types in _TYPES.items()
        if key in config and type(config[key]) not in types
    ]
    if problems:
        return problems
    if config["kind"] not in KINDS:
        return [f"kind {config['kind']!r}; this freemerge reads {', '.join(KINDS)}"]
    try:
        checked_names(config["experts"])
        check_settings(len(config["experts"]), config["temperature"], config["threshold"], config["top_k"])
        KINDS[config["kind"]].check_options(config["options"])
    except InputError as error:
        return [f"{CONFIG}: {error}"]
    return [] if config["width"] > 0 else [f"{CONFIG}: width is {config['width']}"]


def _misplaced(config: Mapping[str, Any], home: Path) -> list[str]:
    """What does not fit the merged model that the files are in."""
    if home.name != FOLDER or not (home.parent / MANIFEST).exists():
        return []
    manifest = read_manifest(home.parent)
    problems = []
    if config["backbone"] not in (None, manifest["backbone"]):
        problems.append(f"made for the backbone {config['backbone']}, the model beside it is {manifest['backbone']}")
    others = [name for name in config["experts"] if name not in manifest["experts"]]
    if others:
        there = ", ".join(manifest["experts"]) or "none"
        problems.append(f"for other experts: {', '.join(others)} not there; the model has {there}")
    return problems


def _read_arrays(path: Path, config: Mapping[str, Any]) -> tuple[dict[str, np.ndarray], list[str]]:
    """The arrays, copied into memory, and what is wrong with them."""
    try:
        infos = read_header(path).tensors
    except CheckpointError as error:
        return {}, list(getattr(error.args[0], "listed", [str(error)]))
    found = {name: info.shape for name, info in infos.items()}
    expected = KINDS[config["kind"]].shapes(config["width"], len(config["experts"]), found)
    problems = [f"{WEIGHTS}: {name} is missing" for name in expected if name not in infos]
    problems += [f"{WEIGHTS}: {name} is no part of a {config['kind']} router" for name in infos if name not in expected]
    problems += [
        f"{WEIGHTS}: {name} is {info.dtype} {list(info.shape)}, expected is float32 {list(expected[name])}"
        for name, info in infos.items()
        if name in expected and (info.dtype, info.shape) != (np.float32, expected[name])
    ]
    if problems:
        return {}, problems
    data = path.read_bytes()
    if checksum(data) != config["checksum"]:
        return {}, [f"{WEIGHTS}: not what {CONFIG} was written with (its checksum differs)"]
    arrays = {
        name: np.frombuffer(data, info.dtype, info.numel, info.offset).reshape(info.shape).copy()
        for name, info in infos.items()
    }
    bad = [name for name, array in arrays.items() if not np.isfinite(array).all()]
    return arrays, [f"{WEIGHTS}: {name} has NaN or Inf" for name in bad]

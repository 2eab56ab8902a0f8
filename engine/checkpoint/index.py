"""The index of a sharded checkpoint: which shard holds which tensor."""

import json
from pathlib import Path, PurePosixPath

from freemerge.checkpoint.header import Malformed, few, shown

SUFFIXES = (".safetensors.index.json", ".bin.index.json")


def examine_index(path: Path) -> dict[str, str]:
    """`weight_map` of an index file: tensor name to shard, a path within the index's directory. Raises Malformed."""
    try:
        index = json.loads(path.read_bytes(), object_pairs_hook=_unique)
    except OSError as error:
        raise Malformed(f"cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise Malformed(f"not a JSON file: {str(error)[:200]}") from None
    weight_map = index.get("weight_map") if type(index) is dict else None
    if type(weight_map) is not dict or any(type(shard) is not str for shard in weight_map.values()):
        raise Malformed("has no weight_map of tensor names to files")
    plain = {shard: PurePosixPath(shard).as_posix() for shard in weight_map.values()}
    outside = [shard for shard in plain if not _is_inside(shard)]
    if outside:
        raise Malformed(*few([f"names {shown(shard)}, which is not a file of its own directory" for shard in outside]))
    return {name: plain[shard] for name, shard in weight_map.items()}


def _unique(pairs: list[tuple[str, object]]) -> dict:
    unique = dict(pairs)
    if len(unique) != len(pairs):
        raise Malformed("names a tensor twice")
    return unique


def _is_inside(shard: str) -> bool:
    # By the path as written. Links are followed: in a hub's cache every file is one.
    parts = PurePosixPath(shard).parts
    return bool(parts) and not shard.startswith("/") and ".." not in parts and not set(shard) & {"\0", "\\"}

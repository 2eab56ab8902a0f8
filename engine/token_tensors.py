"""Which tensors of a model have a row, or an entry, for each token: told from headers, for any architecture."""

from freemerge.checkpoint.header import TensorInfo
from freemerge.settings import config_parts, is_embedding, layer_of, layer_stacks

NO_TOKENS = ("pos", "wpe", "type", "patch", "vision", "visual")  # in names of embeddings of something else


def token_rows(checkpoint) -> int:
    """How many rows its embedding of tokens has; 0 without one."""
    found = {info.shape[0] for name, info in _outside(checkpoint) if _embeds(name) and len(info.shape) == 2}
    said = {part.get("vocab_size") for part in config_parts(checkpoint.config)} & found
    return max(said or found, default=0)


def token_tensors(checkpoint) -> list[str]:
    """The tensors with a row, or an entry, for each token."""
    rows = token_rows(checkpoint)
    sized = [(name, len(info.shape)) for name, info in _outside(checkpoint) if info.shape[:1] == (rows,)]
    matrices = [name for name, dimensions in sized if dimensions == 2 and not _of_something_else(name)]
    return matrices + [name for name, dimensions in sized if dimensions == 1 and name.endswith("bias")]


def _outside(checkpoint) -> list[tuple[str, TensorInfo]]:
    stacks = layer_stacks(checkpoint.tensors)
    return [(n, info) for n, info in checkpoint.tensors.items() if (layer_of(n) or (None,))[0] not in stacks]


def _embeds(name: str) -> bool:
    return (is_embedding(name) or "shared" in name.split(".")) and not _of_something_else(name)


def _of_something_else(name: str) -> bool:
    return any(word in name.lower() for word in NO_TOKENS)


def called(name: str, checkpoint, holding: list[str]) -> str | None:
    """Where a model has the rows of `name`: there, in the embedding it is tied to, or nowhere."""
    if name in holding:
        return name
    tied = (checkpoint.config or {}).get("tie_word_embeddings") or checkpoint.tied
    matrices = [other for other in holding if len(checkpoint.tensors[other].shape) == 2]
    return matrices[0] if tied and not name.endswith("bias") and len(matrices) == 1 else None

"""Which tensor of each expert belongs to which tensor of the base; what does not fit is said all at once."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from freemerge.checkpoint.torch_arrays import same_bytes
from freemerge.kernels.array import is_float

_AT_ONCE = 1 << 20  # elements that are compared at once where reading them computes them


@dataclass(frozen=True, slots=True)
class Match:
    """One tensor of the result and where its inputs lie.

    Args:
        name: of the tensor in the base and in the result.
        sources: the tensor's name in each expert; another one where that expert ties it, None where the expert is left
            out.
        same_as: the tensor this one is tied to, if it is: the same bytes are written for both.
    """

    name: str
    sources: tuple[str | None, ...]
    same_as: str | None = None


def never_fits(name: str, shape: tuple[int, ...], expert_shape: tuple[int, ...]) -> None:
    """What most methods make of an expert's tensor of another shape: a problem."""


class Matcher:
    """Compare headers of a base and its experts; collect `matches`, `problems` and `warnings`.

    Args:
        fit: (name, shape, expert_shape) -> "crop", "skip" or None (a problem), asked about an expert's tensor of
            another shape. `asked_fit` says whether it was; if not, the matches hold with any other fit as well.
    """

    def __init__(self, base, experts: Sequence, *, fit: Callable = never_fits):
        self.base, self.experts, self.fit = base, list(experts), fit
        self.problems: list[str] = []
        self.warnings: list[str] = []
        self.asked_fit = False
        self._ties = [_ties(checkpoint) for checkpoint in self.experts]
        base_ties = _ties(base)
        self._base_ties = {} if _says_untied(base) else base_ties
        self.matches = [self._match(name) for name in base.tensors]
        for index in range(len(self.experts)):
            self._note_extra_tensors(index)

    def _match(self, name: str) -> Match:
        tied_to = self._base_ties.get(name)
        sources = [self._source(index, name, tied_to) for index in range(len(self.experts))]
        taking_part = [
            source
            if source is not None and self._takes_part(index, name, self.experts[index].tensors[source])
            else None
            for index, source in enumerate(sources)
        ]
        return Match(name, tuple(taking_part), tied_to)

    def _source(self, index: int, name: str, tied_to: str | None) -> str | None:
        expert, ties = self.experts[index], self._ties[index]
        if name in expert.tensors:
            if tied_to and ties.get(name) != tied_to:
                self.problems.append(
                    f"{name}: tied to {tied_to} in {self.base.label}, a weight of its own in {self._label(index)}"
                )
            return name
        if tied_to and tied_to in expert.tensors:
            return tied_to
        if _says_tied(expert) and is_float(self.base.tensors[name].dtype) and _head_of(self.base, name):
            self.problems.append(f"{name}: a weight of its own in {self.base.label}, tied in {self._label(index)}")
        elif is_float(self.base.tensors[name].dtype):
            self.problems.append(f"{name}: missing from {self._label(index)}{self._hint(expert, name)}")
        return None

    def _takes_part(self, index: int, name: str, theirs) -> bool:
        ours = self.base.tensors[name]
        if is_float(ours.dtype) != is_float(theirs.dtype):
            self.problems.append(f"{name}: {ours.dtype} in {self.base.label}, {theirs.dtype} in {self._label(index)}")
            return False
        if ours.shape == theirs.shape or not is_float(ours.dtype):
            return True
        self.asked_fit = True
        fit = self.fit(name, ours.shape, theirs.shape)
        if fit is None:
            where = f"{self._label(index)}{_file(theirs)}"
            said = f"{name}: {list(ours.shape)} in {self.base.label}, {list(theirs.shape)} in {where}"
            self.problems.append(said + _of_vocabularies(name, ours.shape, theirs.shape))
        return fit == "crop"

    def _note_extra_tensors(self, index: int) -> None:
        expert, extra = self.experts[index], []
        for name in expert.tensors:
            if name in self.base.tensors or name in self._ties[index]:
                continue
            if _says_tied(self.base) and _head_of(expert, name):
                self.problems.append(f"{name}: tied in {self.base.label}, a weight of its own in {self._label(index)}")
            else:
                extra.append(name)
        if extra:
            some = ", ".join(extra[:3]) + (f" and {len(extra) - 3} more" if len(extra) > 3 else "")
            self.warnings.append(f"{self._label(index)} has tensors the base has not, they are left out: {some}")

    def _hint(self, expert, name: str) -> str:
        renamed = next(
            (other for other in expert.tensors if other.endswith("." + name) or name.endswith("." + other)), None
        )
        return f" (there it is called {renamed}: save both models with the same prefix)" if renamed else ""

    def _label(self, index: int) -> str:
        return f"expert {index} ({self.experts[index].label})"


def _file(info) -> str:
    return f" ({info.file.name})" if getattr(info, "file", None) else ""


def _of_vocabularies(name: str, shape: tuple[int, ...], other: tuple[int, ...]) -> str:
    """What to do about an embedding or a head that only has another number of rows."""
    one_for_a_token = shape[1:] == other[1:] and not any(part.isdigit() for part in name.split("."))
    if one_for_a_token and any(word in name for word in ("emb", "wte", "head", "shared", "output", "decoder")):
        return "; for rows of the same tokens write `tokenizer_source: base`, or `union` to keep the tokens of all"
    return ""


def _ties(checkpoint) -> dict[str, str]:
    """Tensors that are the same weight: by shared memory, or an output head stored with the bytes of an embedding."""
    ties = dict(checkpoint.tied)
    for name in checkpoint.tensors:
        embedding = _head_of(checkpoint, name)
        if name not in ties and embedding and _holds_same(checkpoint, name, embedding):
            ties[name] = embedding
    return ties


def _holds_same(checkpoint, name: str, other: str) -> bool:
    # a checkpoint that is yet to be made has no bytes, and names all its ties
    if getattr(checkpoint, "is_planned", False):
        return False
    if not checkpoint.nbytes_made(name) and not checkpoint.nbytes_made(other):
        return same_bytes(checkpoint.read(name), checkpoint.read(other))
    size = checkpoint.tensors[name].numel
    runs = [(begin, min(begin + _AT_ONCE, size)) for begin in range(0, size, _AT_ONCE)]
    return all(same_bytes(checkpoint.read_run(name, *run), checkpoint.read_run(other, *run)) for run in runs)


def _head_of(checkpoint, name: str) -> str | None:
    """The embedding that `name` could be tied to: another matrix of its shape and dtype, outside the layers."""
    if not any(word in name for word in ("head", "output", "decoder")) or any(
        part.isdigit() for part in name.split(".")
    ):
        return None
    info = checkpoint.tensors[name]
    for other, theirs in checkpoint.tensors.items():
        embeds = any(word in other for word in ("embed", "wte", "shared"))
        if (
            embeds
            and other != name
            and len(info.shape) == 2
            and (theirs.shape, theirs.dtype) == (info.shape, info.dtype)
        ):
            return other
    return None


def _says_tied(checkpoint) -> bool:
    return bool((checkpoint.config or {}).get("tie_word_embeddings")) or bool(checkpoint.tied)


def _says_untied(checkpoint) -> bool:
    return (checkpoint.config or {}).get("tie_word_embeddings") is False and not checkpoint.tied

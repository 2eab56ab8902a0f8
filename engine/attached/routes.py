"""How each kind of module is routed.

Linear layers and embeddings add what the experts' parts make of the input (products.py), norms take a weight for each
row, and any other module is run again for the rows of each expert (replay_route.py).
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from freemerge.attached import replay
from freemerge.attached.active import STATES, Work
from freemerge.attached.assignment import Assignment
from freemerge.attached.products import add_linear, add_rows
from freemerge.attached.replay_route import ReplayRoute
from freemerge.attached.route import ALONE, Path, Route, input_of, learns_nothing, rows_first
from freemerge.errors import InputError

RMS_NORMS = ("RMSNorm", "T5LayerNorm")  # how the classes of transformers end


class LinearRoute(Route):
    """nn.Linear, and transformers' Conv1D with its transposed weight."""

    def __init__(self, attachment: Any, label: str, names: Mapping[Path, str], *, transposed: bool = False):
        super().__init__(attachment, label, names)
        self._weight, self._bias, self._transposed = names.get(("weight",)), names.get(("bias",)), transposed

    def answer(self, work: Work, module: Any, args: tuple, kwargs: Mapping[str, Any], output: Any) -> Any:
        x = rows_first(work, input_of(args, kwargs), self.label)
        y = output.detach().contiguous()
        weight_parts = self.parts(work, self._weight) if self._weight else []
        if weight_parts:
            tokens = x.detach().reshape(-1, x.shape[-1]).contiguous()
            lines = y.view(-1, y.shape[-1])
            add_linear(tokens, lines, weight_parts, work.weights(y), transposed=self._transposed)
        if self._bias and self.parts(work, self._bias):
            y.view(len(work.groups), -1, y.shape[-1]).add_(self._biases(work, y)[:, None])
        return learns_nothing(output, y)

    def _biases(self, work: Work, y: Any) -> Any:
        """float32 [G, H]: what to add to the backbone's bias."""
        key = "bias", self._bias
        if key not in work.known:
            added = self.attachment.derived.added(self._bias, tuple(self.attachment.found.experts))
            work.known[key] = work.placed("groups", y) @ added
        return work.known[key]


class EmbeddingRoute(Route):
    """nn.Embedding."""

    def answer(self, work: Work, module: Any, args: tuple, kwargs: Mapping[str, Any], output: Any) -> Any:
        ids, rows = input_of(args, kwargs), work.assignment.rows
        if self._is_for_all(ids, work.assignment):
            ids, output = (ids[None], output[None]) if ids.ndim == 1 else (ids, output)
            ids, output = ids.expand(rows, *ids.shape[1:]), output.expand(rows, *output.shape[1:])
        work.assignment.check_input(ids.shape, self.label)
        y = output.detach().clone(memory_format=torch.contiguous_format)
        parts = self.parts(work, self.names["weight",])
        add_rows(ids.reshape(-1), y.view(-1, y.shape[-1]), parts, work.weights(y))
        return learns_nothing(output, y)

    def _is_for_all(self, ids: Any, assignment: Assignment) -> bool:
        """Whether these are positions, the same for all rows: each row has its own answer then.

        Raises InputError where they are neither that nor what the model was given.
        """
        rows = assignment.rows
        if rows == 1 or STATES.get()[id(self.attachment)].was_given(ids):
            return False
        if ids.ndim > 1 and len(ids) == 1:
            return True
        if ids.ndim == 1 and (len(ids) % rows or bool((ids[1:] - ids[:-1] == 1).all())):
            return True
        if len(ids) not in (rows, rows * (assignment.tokens or 1)):
            raise InputError(
                f"{self.label} looks up {list(ids.shape)}, neither the {rows} rows of the batch nor positions "
                f"that they share; {ALONE}"
            )
        return False


class NormRoute(Route):
    """A norm over the last dimensions: the rows of each expert have its weights, in one go."""

    def answer(self, work: Work, module: Any, args: tuple, kwargs: Mapping[str, Any], output: Any) -> Any:
        x = rows_first(work, input_of(args, kwargs), self.label)
        inner, index = self.inner(module), work.placed("mixture_of", x)
        tokens, y = x.detach().reshape(len(index), -1, *inner), output.detach()
        touched = work.placed("touched", x)
        everywhere = len(touched) == len(index)
        if not everywhere:
            tokens, index = tokens[touched], index[touched]
        tensors = {n: self._stacked(work, own)[index][:, None] for (n,), own in self.names.items()}
        found = self.norm(module, tokens, tensors).to(y.dtype)
        if everywhere:
            y = found.view(y.shape)
        else:
            y = y.clone(memory_format=torch.contiguous_format)
            y.view(len(work.mixture_of), -1, *inner)[touched] = found
        return learns_nothing(output, y)

    def _stacked(self, work: Work, name: str) -> Any:
        found = self.mixed(work, name)
        return torch.stack(found) if isinstance(found, list) else found

    def inner(self, module: Any) -> tuple[int, ...]:
        return tuple(module.normalized_shape)

    def norm(self, module: Any, tokens: Any, tensors: Mapping[str, Any]) -> Any:
        """Of [rows, tokens, ...], with tensors [rows, 1, ...] in the place of its own."""
        found = functional.layer_norm(tokens.float(), module.normalized_shape, None, None, module.eps)
        weight, bias = (tensors.get(name, getattr(module, name)) for name in ("weight", "bias"))
        found = found if weight is None else found.mul_(weight)
        return found if bias is None else found.add_(bias)


class RmsNormRoute(NormRoute):
    """The many RMSNorm of transformers: any of them, as long as it multiplies with its weight (see `broadcasts`)."""

    def inner(self, module: Any) -> tuple[int, ...]:
        return tuple(module.weight.shape)

    def norm(self, module: Any, tokens: Any, tensors: Mapping[str, Any]) -> Any:
        return replay.run(replay.twin_of(module, {(name,): t for name, t in tensors.items()}), (tokens,), {})


def route_for(attachment: Any, module: Any, label: str, names: Mapping[Path, str]) -> Route:
    """The fastest that is right for this module."""
    own = set(names)
    same = "forward" not in vars(module)
    forward = type(module).forward
    if same and forward is nn.Linear.forward and own <= {("weight",), ("bias",)}:
        return LinearRoute(attachment, label, names)
    if same and _is_conv1d(module):
        return LinearRoute(attachment, label, names, transposed=True)
    if same and forward is nn.Embedding.forward and module.max_norm is None:
        return EmbeddingRoute(attachment, label, names)
    if same and forward is nn.LayerNorm.forward:
        return NormRoute(attachment, label, names)
    if same and own == {("weight",)} and type(module).__name__.endswith(RMS_NORMS) and broadcasts(module):
        return RmsNormRoute(attachment, label, names)
    return ReplayRoute(attachment, label, names)


def broadcasts(module: Any) -> bool:
    """Whether a norm with weights [rows, 1, width] answers for each row what it does with that row's weight."""
    if module.weight is None or module.weight.ndim != 1 or list(module.children()):
        return False
    like = {"dtype": module.weight.dtype, "device": module.weight.device}
    seed = torch.Generator().manual_seed(0)
    weights = torch.randn(2, 1, module.weight.numel(), generator=seed).to(**like)
    x = torch.randn(2, 3, module.weight.numel(), generator=seed).to(**like)
    try:
        with torch.no_grad():
            together = replay.run(replay.twin_of(module, {("weight",): weights}), (x,), {})
            alone = [
                replay.run(replay.twin_of(module, {("weight",): w[0]}), (row[None],), {})
                for w, row in zip(weights, x, strict=True)
            ]
    except (RuntimeError, TypeError, ValueError):
        return False
    return torch.equal(together, torch.cat(alone))


def _is_conv1d(module: Any) -> bool:
    kind = type(module)
    return kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils" and module.weight.ndim == 2

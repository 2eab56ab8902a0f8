"""How each kind of module is routed: a forward hook that turns the backbone's answer into that of each row's expert.

Linear layers and embeddings add what the experts' parts make of the input (products.py), norms take a weight for each
row, and any other module is run again for the rows of each expert (replay.py).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from freemerge.attached import replay
from freemerge.attached.active import STATES, Active, Work
from freemerge.attached.assignment import Assignment
from freemerge.attached.products import add_linear, add_rows
from freemerge.errors import InputError
from freemerge.parts import Part, Rows

Path = tuple[str, ...]
RMS_NORMS = ("RMSNorm", "T5LayerNorm")  # how the classes of transformers end
ALONE = "run such experts one after the other, with use_expert"


class Route(ABC):
    """The forward hook of one module.

    Args:
        attachment: whose experts these are.
        label: the module's name, for messages.
        names: the experts' name of each tensor of the module that one of them changes, by path from the module.
    """

    def __init__(self, attachment: Any, label: str, names: Mapping[Path, str]):
        self.attachment, self.label, self.names = attachment, label, dict(names)

    def install(self, module: Any) -> Any:
        """From now on it is asked for `module`; answers what has a `remove` that ends this."""
        return module.register_forward_hook(self, with_kwargs=True)

    def __call__(self, module: Any, args: tuple, kwargs: Mapping[str, Any], output: Any) -> Any:
        active = STATES.get().get(id(self.attachment))
        if active is not None and active.gates is not None:
            gated = active.gates.answer(module, _input(args, kwargs), output)
            return None if gated is None else learns_nothing(output, gated)
        work = self.work()
        if work is None or not self.touches(work):
            return None
        return self.answer(work, module, args, kwargs, output)

    def work(self) -> Work | None:
        """What routes the module, which is being called, in this context."""
        active = STATES.get().get(id(self.attachment))
        if active is None or self in active.replaying:
            return None
        active.called.add(self)
        return active.work

    def touches(self, work: Work) -> bool:
        return any(self.parts(work, name) for name in self.names.values())

    def __deepcopy__(self, memo: dict) -> Any:
        return _pass  # a copy made in a routed context is not in one

    @abstractmethod
    def answer(self, work: Work, module: Any, args: tuple, kwargs: Mapping[str, Any], output: Any) -> Any:
        """What the module answers, each row with its experts, given `output`, what it answers with the backbone's."""

    def parts(self, work: Work, name: str | None) -> list[tuple[int, Part, float]]:
        """(expert, part, scale) of a tensor, of those experts that the assignment uses."""
        key = "parts", name
        if key not in work.known:
            work.known[key] = self.attachment.derived.parts(name, work)
        return work.known[key]

    def mixed(self, work: Work, name: str) -> Any:
        """The tensor with each of the mixtures of experts there are."""
        key = "mixed", name
        if key not in work.known:
            work.known[key] = self.attachment.derived.mixed(name, work)
        return work.known[key]


class LinearRoute(Route):
    """nn.Linear, and transformers' Conv1D with its transposed weight."""

    def __init__(self, attachment: Any, label: str, names: Mapping[Path, str], *, transposed: bool = False):
        super().__init__(attachment, label, names)
        self._weight, self._bias, self._transposed = names.get(("weight",)), names.get(("bias",)), transposed

    def answer(self, work: Work, module: Any, args: tuple, kwargs: Mapping[str, Any], output: Any) -> Any:
        x = _rows_first(work, _input(args, kwargs), self.label)
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
        ids, rows = _input(args, kwargs), work.assignment.rows
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
        x = _rows_first(work, _input(args, kwargs), self.label)
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


class ReplayRoute(Route):
    """Any module, run again for the rows of each mixture of experts.

    Args:
        taken: routes of children whose tensors the module may take without calling them, by path. Where it did, these
            tensors are its own.
    """

    def __init__(
        self, attachment: Any, label: str, names: Mapping[Path, str], taken: Mapping[Path, Route] = MappingProxyType({})
    ):
        super().__init__(attachment, label, names)
        self.taken = dict(taken)

    def touches(self, work: Work) -> bool:
        return super().touches(work) or any(route.touches(work) for route in self.taken.values())

    def answer(self, work: Work, module: Any, args: tuple, kwargs: Mapping[str, Any], output: Any) -> Any:
        called = STATES.get()[id(self.attachment)].called
        taken = {path: route for path, route in self.taken.items() if route not in called}
        called.difference_update(self.taken.values())
        names = self.names | {(*path, *n): name for path, route in taken.items() for n, name in route.names.items()}
        used = {e for name in names.values() for e, _, _ in self.parts(work, name)}
        if not used:
            return None
        x = replay.first_tensor(args, kwargs)
        if x is None:
            raise InputError(f"{self.label} is called without a tensor: its own tensors cannot be routed")
        _check_mask(module, args, kwargs, self.label)
        replay.check_stateless(args, kwargs, self.label)
        n = len(x) if not x.is_nested and len(x) == 1 else len(_rows_first(work, x, self.label))
        index = self.mixture_of_rows(work, n)
        shared = n == 1 < len(index)
        for u, mixture in enumerate(work.mixtures):
            rows = np.flatnonzero(index == u)
            if not len(rows) or not any(mixture[e] for e in used):
                continue
            rows = torch.as_tensor(rows, device=x.device)
            given = (args, dict(kwargs)) if shared else replay.select((args, dict(kwargs)), rows, n)
            with uniform(self.attachment, mixture, {self, *taken.values()}):
                part = replay.run(self.twin(work, module, u, names), *given)
            output = replay.put_rows(output, part, rows, len(index) if shared else n, self.label)
        return output

    def parts(self, work: Work, name: str | None) -> list[tuple[int, Part, float]]:
        """Without those that change nothing (a tensor that no expert trained): running again is not free."""
        key = "changing parts", name
        if key not in work.known:
            work.known[key] = [found for found in super().parts(work, name) if not _is_nothing(found[1])]
        return work.known[key]

    def twin(self, work: Work, module: Any, u: int, names: Mapping[Path, str]) -> Any:
        """`module` with the tensors of one mixture of experts."""
        return replay.twin_of(module, {path: self.mixed(work, name)[u] for path, name in names.items()})

    def mixture_of_rows(self, work: Work, n: int) -> np.ndarray:
        """Which mixture each of the first dimension's `n` has; where it is 1 for all, each of the batch's rows."""
        assignment = work.assignment
        if assignment.tokens is not None and n != len(work.mixture_of):
            by_row = work.mixture_of.reshape(-1, assignment.tokens)
            if (by_row != by_row[:, :1]).any():
                raise InputError(f"{self.label} mixes tokens: assign experts to rows, not to tokens")
            groups = by_row[:, 0]
        else:
            groups = work.mixture_of
        if n != 1 and n % len(groups):
            raise InputError(f"{self.label} was given {n} rows, the assignment has {len(groups)}")
        return np.repeat(groups, max(1, n // len(groups)))


def _pass(*_: Any) -> None:
    """The hook that changes nothing."""


class Hook:
    """A hook that a copy of the module, made in a routed context, is without."""

    def __init__(self, call: Callable[..., None]):
        self._call = call

    def __call__(self, *args: Any) -> None:
        self._call(*args)

    def __deepcopy__(self, memo: dict) -> Any:
        return _pass


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


class uniform:
    """Forwards in this context have one mixture of experts for all rows; what `routes` route is left alone."""

    def __init__(self, attachment: Any, mixture: np.ndarray, routes: Iterable[Route]):
        self._state = Active(Assignment(mixture[None]), replaying=frozenset(routes))
        self._key = id(attachment)

    def __enter__(self) -> None:
        self._token = STATES.set({**STATES.get(), self._key: self._state})

    def __exit__(self, *_: object) -> None:
        STATES.reset(self._token)


class _Unlearnable(torch.autograd.Function):
    """An answer put in the place of another, past autograd."""

    @staticmethod
    def forward(ctx, output, instead):
        return instead.view_as(instead)

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError("a routed forward has no gradient: train with use_expert, or with torch.no_grad() around it")


def learns_nothing(output: Any, y: Any) -> Any:
    """`y` in the place of `output`; `backward` says that there is no gradient."""
    if torch.is_grad_enabled() and output.requires_grad:
        return _Unlearnable.apply(output, y)
    return y


def _input(args: tuple, kwargs: Mapping[str, Any]) -> Any:
    return args[0] if args else next(iter(kwargs.values()))


def _rows_first(work: Work, x: Any, label: str) -> Any:
    """`x`. Raises InputError where the rows are not in its first dimension, as far as that can be told."""
    if x.is_nested:
        raise InputError(f"{label} was given a nested tensor; make its encoder with enable_nested_tensor=False")
    assignment, shape = work.assignment, list(x.shape)
    assignment.check_input(shape, label)
    if assignment.rows == 1:
        return x
    if assignment.tokens is None and len(shape) > 2 and shape[1] == assignment.rows != shape[0]:
        raise InputError(f"{label} was given {shape}, whose rows seem to be in the second dimension; {ALONE}")
    if _is_parameter(x):
        raise InputError(f"{label} was given a parameter of the model, {shape}, the same for all rows; {ALONE}")
    return x


def _is_parameter(x: Any) -> bool:
    """Or a view of one, other than one that repeats it for each row."""
    owner = x._base if x._is_view() else x
    return isinstance(owner, nn.Parameter) and x.stride(0) != 0


def _is_nothing(part: Part) -> bool:
    """Whether it changes nothing: zeros, of which looking at one mostly tells."""
    return isinstance(part, Rows) and part.start is None and not (part.values[:1].any() or part.values.any())


def _check_mask(module: Any, args: tuple, kwargs: Mapping[str, Any], label: str) -> None:
    if isinstance(module, nn.MultiheadAttention):
        mask = kwargs.get("attn_mask", args[5] if len(args) > 5 else None)
        if mask is not None and mask.ndim == 3:
            raise InputError(f"{label} has a mask for each head and row, which cannot be routed; give key_padding_mask")


def _is_conv1d(module: Any) -> bool:
    kind = type(module)
    return kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils" and module.weight.ndim == 2

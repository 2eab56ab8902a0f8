"""A route: the forward hook that turns the backbone's answer of one module into that of each row's expert.

Here is what all of them have in common; routes.py and replay_route.py have the kinds.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from freemerge.attached.active import STATES, Work
from freemerge.errors import InputError
from freemerge.parts import Part

Path = tuple[str, ...]
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
            gated = active.gates.answer(module, input_of(args, kwargs), output)
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


class Hook:
    """A hook that a copy of the module, made in a routed context, is without."""

    def __init__(self, call: Callable[..., None]):
        self._call = call

    def __call__(self, *args: Any) -> None:
        self._call(*args)

    def __deepcopy__(self, memo: dict) -> Any:
        return _pass


def _pass(*_: Any) -> None:
    """The hook that changes nothing."""


def input_of(args: tuple, kwargs: Mapping[str, Any]) -> Any:
    return args[0] if args else next(iter(kwargs.values()))


def rows_first(work: Work, x: Any, label: str) -> Any:
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


def learns_nothing(output: Any, y: Any) -> Any:
    """`y` in the place of `output`; `backward` says that there is no gradient."""
    if torch.is_grad_enabled() and output.requires_grad:
        return _Unlearnable.apply(output, y)
    return y


class _Unlearnable(torch.autograd.Function):
    """An answer put in the place of another, past autograd."""

    @staticmethod
    def forward(ctx, output, instead):
        return instead.view_as(instead)

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError("a routed forward has no gradient: train with use_expert, or with torch.no_grad() around it")

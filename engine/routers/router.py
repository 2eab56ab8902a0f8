"""Router: from features of a batch to probabilities of experts, and from those to an assignment."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from freemerge.checkpoint.torch_arrays import from_torch, is_torch, placed_like
from freemerge.errors import InputError
from freemerge.kernels.array import Array
from freemerge.routers.assignment import Assignment, checked_names, choose, shown_rows, spread
from freemerge.routers.calibration import Calibration, calibrate, softmax
from freemerge.routers.examples import indices_of, is_numbers
from freemerge.routers.features import LAST_HIDDEN_MEAN, LastHiddenMean


class Router(ABC):
    """Scores experts by the features of an input.

    Attributes:
        experts: names, in the order of the logits.
        width: of the features.
        features: what they are; "last_hidden_mean" is what LastHiddenMean computes, any other name the user's own.
        temperature: probabilities are softmax(logits / temperature).
        threshold: where the largest probability is below it, the backbone alone is used.
        top_k: 1 picks the most probable expert by name; k > 1 weighs the k most probable, their probabilities divided
            by their sum; None weighs all.
    """

    kind: ClassVar[str]

    def __init__(
        self,
        experts: Sequence[str],
        width: int,
        *,
        features: str = LAST_HIDDEN_MEAN,
        temperature: float = 1.0,
        threshold: float = 0.0,
        top_k: int | None = 1,
    ):
        self.experts, self.width, self.features = checked_names(experts), width, features
        check_settings(len(self.experts), temperature, threshold, top_k)
        self.temperature, self.threshold, self.top_k = float(temperature), float(threshold), top_k
        self._placed: dict[str, dict[str, Array]] = {}

    @classmethod
    @abstractmethod
    def of(cls, experts: Sequence[str], arrays: Mapping[str, np.ndarray], **settings: Any) -> "Router":
        """The router made of `arrays`; `settings` are `options` and those of __init__."""

    @classmethod
    @abstractmethod
    def shapes(cls, width: int, count: int, found: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        """Of the arrays it is made of, for `count` experts; those found in a file tell what may vary."""

    @classmethod
    def check_options(cls, options: Mapping[str, Any]) -> None:
        """Raise InputError for numbers that are not its `options`."""
        if options:
            raise InputError(f"options are {options!r}, a {cls.kind} router has none")

    @property
    @abstractmethod
    def arrays(self) -> dict[str, np.ndarray]:
        """What it is made of, float32, by name."""

    @abstractmethod
    def _forward(self, features: Array, arrays: Mapping[str, Array]) -> Array:
        """[n, T] logits of float32 [n, width] features that lie where `arrays` do."""

    @property
    def options(self) -> dict[str, float]:
        """Numbers of its kind that are no arrays."""
        return {}

    def logits(self, features: Array) -> np.ndarray:
        """Scores of each row, float32 [n, T], computed where the features lie.

        Args:
            features: [n, width] floats, an array or a tensor on any device.

        Raises:
            InputError: features of another width; NaN or Inf in them or in what comes out.
        """
        features = checked_features(features, self.width)
        logits = _on_host(self._forward(features, self._arrays_like(features)))
        bad = np.flatnonzero(~np.isfinite(logits).all(axis=1))
        if len(bad):
            raise InputError(
                f"the router answers NaN or Inf for {shown_rows(bad)}: its numbers or the features are off"
            )
        return logits

    def probabilities(self, features: Array) -> np.ndarray:
        """softmax(logits / temperature), float64 [n, T]."""
        return softmax(self.logits(features) / self.temperature)

    def assign(self, features: Array) -> Assignment:
        """Names, or with top_k other than 1 float32 [n, T] weights in the order of `experts`; see `assignment`."""
        return choose(self.probabilities(features), self.experts, self.top_k, self.threshold)

    def calibrate(
        self, features: Array, labels: Sequence, *, accuracy: float | None = None, coverage: float | None = None
    ) -> Calibration:
        """Fit temperature and threshold to examples that the router was not fitted on, and set them.

        The temperature minimises the negative log likelihood. The threshold is the least that reaches `accuracy` among
        the rows that get an expert, or the greatest that still gives an expert to the share `coverage` of all rows;
        with neither, no row is left to the backbone.

        Args:
            features: [n, width].
            labels: n names of experts (or their indices); None where the backbone alone is right, as for inputs of
                no task, which then count as wrong wherever an expert is picked.

        Raises:
            InputError: the accuracy cannot be reached. The router is as it was.
        """
        found = calibrate(self.logits(features), indices_of(labels, self.experts), accuracy, coverage)
        self.temperature, self.threshold = found.temperature, found.threshold
        return found

    def save(self, folder: str | Path, *, overwrite: bool = False, fsync: bool = True) -> Path:
        """Write router.safetensors and router.json; see `files.save_router`."""
        from freemerge.routers.files import save_router

        return save_router(self, folder, overwrite=overwrite, fsync=fsync)

    def bind(self, model: Any, *, features: Callable[[Any], Array] | None = None) -> "BoundRouter":
        """The router for a model with experts attached: a function from a batch of its inputs to an assignment.

        Args:
            features: from a batch to [rows, width]; LastHiddenMean(model) unless given.

        Raises:
            InputError: the router's experts are not among the model's, or its features are not the usual ones.
        """
        attached = check_attached(self.experts, model)
        if features is None:
            if self.features != LAST_HIDDEN_MEAN:
                raise InputError(f"this router is for features {self.features!r}: pass the function that computes them")
            features = LastHiddenMean(model)
        return BoundRouter(self, features, attached)

    def _arrays_like(self, features: Array) -> Mapping[str, Array]:
        if not is_torch(features):
            return self.arrays
        device = str(features.device)
        if device not in self._placed:
            self._placed[device] = {name: placed_like(array, features) for name, array in self.arrays.items()}
        return self._placed[device]


@dataclass(frozen=True)
class BoundRouter:
    """A router with what computes its features; called with a batch, it answers an assignment over `attached`."""

    router: Router
    features: Callable[[Any], Array]
    attached: tuple[str, ...]

    def __call__(self, batch: Any) -> Assignment:
        return spread(self.router.assign(self.features(batch)), self.router.experts, self.attached)


def check_settings(count: int, temperature: float, threshold: float, top_k: int | None) -> None:
    """Raise InputError for settings that make no sense for `count` experts."""
    if not (math.isfinite(temperature) and temperature > 0):
        raise InputError(f"temperature {temperature}: a number above 0")
    if not 0 <= threshold <= 1:
        raise InputError(f"threshold {threshold}: a probability, from 0 (always an expert) to 1")
    if top_k is not None and (type(top_k) is not int or not 1 <= top_k <= count):
        raise InputError(f"top_k {top_k}: from 1 to {count}, the number of experts, or None for all")


def check_attached(experts: Sequence[str], model: Any) -> tuple[str, ...]:
    """The names of the model's experts. Raises InputError where a router's are not among them."""
    attached = getattr(model, "experts", None)
    if not isinstance(attached, tuple):
        raise InputError(f"{type(model).__name__} has no experts attached; call freemerge.attach first")
    others = [name for name in experts if name not in attached]
    if others:
        raise InputError(
            f"the router is for other experts: {', '.join(others)} not attached, attached are {', '.join(attached)}"
        )
    return attached


def checked_features(features: Any, width: int) -> Array:
    """Features as float32, on the host as an array. Raises InputError for another width, NaN or Inf."""
    if is_torch(features):
        features = features.detach().float()
        features = from_torch(features) if features.device.type == "cpu" else features
    else:
        features = np.asarray(features)
        if not is_numbers(features.dtype):
            raise InputError(
                f"features are {list(features.shape)} of {features.dtype}, expected are [rows, {width}] numbers"
            )
        features = features.astype(np.float32)
    if features.ndim != 2 or features.shape[1] != width:
        raise InputError(f"features are {list(features.shape)}, expected are [rows, {width}] numbers")
    finite = (features.isfinite() if is_torch(features) else np.isfinite(features)).all(1)
    if not bool(finite.all()):
        bad = np.flatnonzero(~_on_host(finite))
        raise InputError(f"features of {shown_rows(bad)} are NaN or Inf")
    return features


def _on_host(array: Array) -> np.ndarray:
    return from_torch(array.cpu()) if is_torch(array) else array

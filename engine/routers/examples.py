"""Examples to fit a router on: features and the expert that is right for each row."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from freemerge.attached.assignment import unknown
from freemerge.checkpoint.torch_arrays import from_torch, is_torch
from freemerge.errors import InputError
from freemerge.routers.assignment import checked_names, shown_rows


@dataclass(frozen=True)
class Examples:
    """`features` [n, width] float32, finite; `indices` [n] int64 into `experts`, each there at least once."""

    experts: tuple[str, ...]
    features: np.ndarray
    indices: np.ndarray


def gather_examples(data: Any, labels: Sequence | None = None, experts: Sequence[str] | None = None) -> Examples:
    """Examples from what `fit` takes.

    Args:
        data: [n, width] features with `labels`; or a mapping from an expert's name to features; or an iterable (a data
            loader) of (features, labels).
        labels: a name of an expert, or its index, for each row.
        experts: the order of the experts; unless given that of the mapping, else the names sorted.

    Raises:
        InputError: no example of some expert, unknown labels, features that do not fit together, NaN or Inf.
    """
    batches = list(_batches(data, labels))
    if not batches:
        raise InputError("no examples to fit a router on")
    names = _names(data, [label for _, found in batches for label in found], experts)
    widths = {features.shape[1] for features, _ in batches}
    if len(widths) > 1:
        raise InputError(f"features of different widths: {', '.join(map(str, sorted(widths)))}")
    features = np.concatenate([features for features, _ in batches])
    indices = indices_of([label for _, found in batches for label in found], names)
    bad = np.flatnonzero(~np.isfinite(features).all(axis=1))
    if len(bad):
        raise InputError(f"features of {shown_rows(bad)} are NaN or Inf")
    if (indices < 0).any():
        raise InputError("a label is None: a router is fitted on rows of its experts; others are for calibrate")
    missing = [name for i, name in enumerate(names) if not (indices == i).any()]
    if missing:
        raise InputError(f"no example of {', '.join(missing)}; a router needs some of each expert")
    return Examples(names, features, indices)


def indices_of(labels: Iterable, experts: Sequence[str]) -> np.ndarray:
    """Labels as int64 indices into `experts`; -1 for None. Raises InputError for a label that is none of them."""
    places = {name: i for i, name in enumerate(experts)}
    found = []
    for label in _plain(labels):
        index = -1 if label is None else places.get(label, label)
        if not isinstance(index, (int, np.integer)) or not (label is None or 0 <= index < len(experts)):
            raise InputError(unknown(label, experts))
        found.append(index)
    return np.array(found, np.int64)


def _batches(data: Any, labels: Sequence | None) -> Iterable[tuple[np.ndarray, list]]:
    if isinstance(data, Mapping):
        if labels is not None:
            raise InputError("labels are the keys of the mapping; give no others")
        pairs = ((features, None) for features in data.values())
        names = list(data)
    elif labels is not None:
        pairs, names = [(data, labels)], [None]
    elif hasattr(data, "shape"):
        raise InputError("features alone do not say which expert is right: give labels, or a mapping by expert")
    else:
        pairs, names = data, None
    for i, (features, found) in enumerate(pairs):
        features = _matrix(features)
        found = [names[i]] * len(features) if found is None else _plain(found)
        if len(found) != len(features):
            raise InputError(f"{len(features)} rows of features, {len(found)} labels")
        yield features, found


def _matrix(features: Any) -> np.ndarray:
    features = from_torch(features.detach().float().cpu()) if is_torch(features) else np.asarray(features)
    if features.ndim != 2 or not is_numbers(features.dtype):
        raise InputError(f"features are {list(features.shape)} of {features.dtype}, expected are [rows, width] numbers")
    return features.astype(np.float32, copy=False)


def is_numbers(dtype: np.dtype) -> bool:
    """Whether arrays of it become float32: bfloat16 is of kind V."""
    return dtype.kind in "biufV" and dtype.names is None


def _plain(labels: Any) -> list:
    return labels.tolist() if hasattr(labels, "tolist") else list(labels)


def _names(data: Any, labels: Sequence, experts: Sequence[str] | None) -> tuple[str, ...]:
    if experts is not None:
        return checked_names(experts)
    if isinstance(data, Mapping):
        return checked_names(data)
    if not all(isinstance(label, str) for label in labels):
        raise InputError("labels are indices: give the names of the experts, in their order")
    return checked_names(sorted(set(labels)))

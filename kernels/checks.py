"""The checks at the front of every op, with one wording."""

from collections.abc import Sequence

import numpy as np

from freemerge.errors import ShapeError
from freemerge.kernels.array import Array, dtype_of, is_float, is_tensor


def check_float(name: str, array: Array) -> None:
    if not is_float(dtype_of(array)):
        raise ShapeError(f"{name} is {array.dtype}, not a float type")
    if not _is_contiguous(array):
        how = f"{name}.contiguous()" if is_tensor(array) else f"numpy.ascontiguousarray({name})"
        raise ShapeError(f"{name} is not contiguous; pass {how}")


def check_like(name: str, array: Array, **others: Array | Sequence[Array]) -> None:
    """`array` is a contiguous float array, and each of `others` (arrays, sequences of arrays) one of its shape."""
    check_float(name, array)
    for other_name, value in others.items():
        alone = not isinstance(value, (list, tuple))
        for i, other in enumerate([value] if alone else value):
            if not _is_like(array, other):
                _say_why_not(name, array, other_name if alone else f"{other_name}[{i}]", other)


def check_place(name: str, array: Array, label: str, other: Array) -> None:
    """Both are NumPy arrays, or tensors on one device."""
    places = [str(a.device) if is_tensor(a) else "a NumPy array" for a in (array, other)]
    if places[0] != places[1]:
        raise ShapeError(f"{label} is on another device: {places[1]}, where {name} is {places[0]}")


def _is_like(array: Array, other: Array) -> bool:
    """What `_say_why_not` finds nothing to say about, found out in a fraction of the time: a merge asks thousands."""
    if isinstance(array, np.ndarray):
        alike = isinstance(other, np.ndarray) and other.shape == array.shape
        return alike and is_float(other.dtype) and other.flags.c_contiguous
    alike = is_tensor(other) and other.shape == array.shape and other.device == array.device
    return alike and is_float(dtype_of(other)) and other.is_contiguous()


def _is_contiguous(array: Array) -> bool:
    return array.is_contiguous() if is_tensor(array) else array.flags.c_contiguous


def _say_why_not(name: str, array: Array, label: str, other: Array) -> None:
    check_float(label, other)
    if other.shape != array.shape:
        raise ShapeError(f"{label} is {list(other.shape)}, {name} is {list(array.shape)}")
    check_place(name, array, label, other)


def check_against(base: Array | None, experts: Sequence[Array]) -> None:
    """`experts` are contiguous float arrays; where there is a base, of its shape."""
    if base is not None:
        check_like("base", base, experts=experts)
        return
    for t, expert in enumerate(experts):
        check_float(f"experts[{t}]", expert)


def check_pair(base: Array | None, expert: Array) -> None:
    """`expert` is a contiguous float array; where there is a base, of its shape."""
    check_float("expert", expert)
    if base is not None:
        check_like("base", base, expert=expert)


def check_magnitude(value: float) -> None:
    if not value >= 0:
        raise ShapeError(f"{value} is not a magnitude: give a number of at least 0")


def check_count(name: str, values: Sequence, expected: int, of: str) -> None:
    if len(values) != expected:
        raise ShapeError(f"{len(values)} {name} for {expected} {of}")

"""CPU torch tensors as NumPy arrays and back, sharing memory; tensors on a GPU as they are.

torch is imported by whoever made the tensor.
"""

import sys

import numpy as np

from freemerge.kernels.array import BFLOAT16, FLOAT8_E4M3FN, FLOAT8_E5M2, Array, is_tensor

# dtypes NumPy lacks in torch's eyes pass through an integer of their width
THROUGH = {
    "torch.bfloat16": ("int16", BFLOAT16),
    "torch.float8_e4m3fn": ("uint8", FLOAT8_E4M3FN),
    "torch.float8_e5m2": ("uint8", FLOAT8_E5M2),
}


def is_torch(value: object) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def from_torch(tensor) -> np.ndarray:
    """A CPU tensor's memory as an array; one that is not contiguous is copied. Raises ValueError where none can be."""
    torch = sys.modules["torch"]
    if tensor.device.type != "cpu":
        raise ValueError(f"on {tensor.device}, neither on the CPU nor on a CUDA GPU")
    tensor = dense(tensor)
    width, dtype = THROUGH.get(str(tensor.dtype), (None, None))
    try:
        return tensor.view(getattr(torch, width)).numpy().view(dtype) if width else tensor.numpy()
    except (TypeError, RuntimeError) as error:
        raise ValueError(f"{tensor.dtype} has no NumPy dtype ({error})") from None


def dense(tensor):
    """A tensor's elements in order, without a gradient; a copy only where they are not. Raises ValueError."""
    if tensor.layout != sys.modules["torch"].strided or tensor.is_quantized:
        raise ValueError(f"{tensor.layout if not tensor.is_quantized else 'quantized'}, not a plain dense tensor")
    return tensor.detach().resolve_neg().contiguous()


def to_torch(array: np.ndarray):
    """A writable array's memory as a tensor."""
    torch = sys.modules["torch"]
    for name, (width, dtype) in THROUGH.items():
        if array.dtype == dtype:
            return torch.from_numpy(array.view(width)).view(getattr(torch, name.removeprefix("torch.")))
    return torch.from_numpy(array)


def as_tensor(array: Array):
    """An array's memory as a tensor that nobody may write to, be it a mapped file; a tensor as it is."""
    if is_tensor(array):
        return array
    return to_torch(array if array.flags.writeable else np.asarray(_Unlocked(array)))


class _Unlocked:
    """An array's memory without the note that it is read-only, which torch warns of."""

    def __init__(self, array: np.ndarray):
        pointer, _ = array.__array_interface__["data"]
        self._array, self.__array_interface__ = array, array.__array_interface__ | {"data": (pointer, False)}


def flat_bytes(array: Array) -> Array:
    """The bytes of a contiguous array or tensor, [nbytes] uint8, without a copy."""
    if not is_tensor(array):
        return array.reshape(-1).view(np.uint8)
    torch = sys.modules["torch"]
    if array.numel() == 0:  # its strides may be any, which view refuses
        return array.new_empty(0, dtype=torch.uint8)
    return array.reshape(-1).view(torch.uint8)


def same_bytes(a: Array, b: Array) -> bool:
    """Whether two contiguous arrays or tensors lie together and have the same bytes."""
    if is_tensor(a) != is_tensor(b) or (is_tensor(a) and a.device != b.device):
        return False
    equal = sys.modules["torch"].equal if is_tensor(a) else np.array_equal
    a, b = flat_bytes(a), flat_bytes(b)
    return equal(a[:4096], b[:4096]) and equal(a, b)


def placed_like(array: Array, like: Array) -> Array:
    """`array` as what `like` is, and where that is: a NumPy array, or a tensor on its device; copied only to move."""
    if not is_tensor(like):
        return from_torch(array.cpu()) if is_tensor(array) else array
    # a copy, as torch warns of memory that is read-only
    return (array if is_tensor(array) else to_torch(array.copy())).to(like.device)

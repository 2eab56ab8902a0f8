"""CPU torch tensors as NumPy arrays and back, sharing memory. torch is imported by whoever made the tensor."""

import sys

import numpy as np

from freemerge.kernels.array import BFLOAT16, FLOAT8_E4M3FN, FLOAT8_E5M2

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
        raise ValueError(f"on {tensor.device}, not on the CPU; pass .cpu()")
    if tensor.layout != torch.strided or tensor.is_quantized:
        raise ValueError(f"{tensor.layout if not tensor.is_quantized else 'quantized'}, not a plain dense tensor")
    tensor = tensor.detach().resolve_neg().contiguous()
    width, dtype = THROUGH.get(str(tensor.dtype), (None, None))
    try:
        return tensor.view(getattr(torch, width)).numpy().view(dtype) if width else tensor.numpy()
    except (TypeError, RuntimeError) as error:
        raise ValueError(f"{tensor.dtype} has no NumPy dtype ({error})") from None


def to_torch(array: np.ndarray):
    """A writable array's memory as a tensor."""
    torch = sys.modules["torch"]
    for name, (width, dtype) in THROUGH.items():
        if array.dtype == dtype:
            return torch.from_numpy(array.view(width)).view(getattr(torch, name.removeprefix("torch.")))
    return torch.from_numpy(array)

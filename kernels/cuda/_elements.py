"""Storage dtypes, as csrc/cuda/element.h names them."""

import torch

from freemerge.kernels.triton._convert import FLOAT8

ELEMENTS = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def exact(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """float8 as bfloat16, which holds all its numbers; everything else as it is."""
    return tensor.to(torch.bfloat16) if tensor is not None and tensor.dtype in FLOAT8 else tensor

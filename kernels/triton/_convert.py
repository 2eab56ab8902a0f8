"""Storage dtypes and the float32 (float64) of arithmetic: in kernels by bits, float8 by torch before and after.

By bits, because Triton's interpreter truncates to bfloat16 and loses its denormals: what the tests see is what runs.
"""

import torch
import triton
import triton.language as tl

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)


@triton.jit
def widen(x):
    """Any storage dtype as float32, exactly; float64 stays as it is."""
    if x.dtype == tl.bfloat16:
        return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    elif x.dtype == tl.float64:
        return x
    else:
        return x.to(tl.float32)


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """float32 or float64 as `dtype`, with one rounding to nearest even; NaN stays NaN."""
    if dtype == tl.bfloat16:
        bits = _to_odd(x).to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        rounded = tl.where(x != x, (bits >> 16) | 0x40, rounded)
        return rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    elif dtype == tl.float16:
        return _to_odd(x).to(tl.float16)
    else:
        return x.to(dtype)


@triton.jit
def _to_odd(x):
    # float64 to float32 by "round to odd": the rounding to a narrower type that follows is then as good as the only one
    if x.dtype == tl.float64:
        nearest = x.to(tl.float32)
        bits = nearest.to(tl.int32, bitcast=True)
        again = nearest.to(tl.float64)
        as_it_is = (again == x) | (x != x) | ((bits & 1) == 1)
        odd = tl.where(tl.abs(again) > tl.abs(x), bits - 1, bits + 1)
        return tl.where(as_it_is, bits, odd).to(tl.float32, bitcast=True)
    else:
        return x


@triton.jit
def load_task_vector(base, expert, offsets, mask):
    """Expert minus base as float32, formed in float64 where either is; base None: the expert. 0 outside the mask."""
    x = widen(tl.load(expert + offsets, mask=mask, other=0.0))
    if base is not None:
        x = x - widen(tl.load(base + offsets, mask=mask, other=0.0))
    return x.to(tl.float32)


@triton.jit
def magnitude_bits(x):
    """The bits of |x|, float32, as int32: ordered as the numbers are. NaN counts as infinite."""
    return tl.minimum(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0x7F800000)


def loadable(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """What a kernel can read: float8 as float16, exactly (sm_80 has no float8), everything else as it is."""
    return tensor.to(torch.float16) if tensor is not None and tensor.dtype in FLOAT8 else tensor


def storable(out: torch.Tensor, base: torch.Tensor | None = None) -> torch.Tensor:
    """What a kernel can write in place of `out`: for float8, a tensor of the dtype of the arithmetic over `base`."""
    if out.dtype not in FLOAT8:
        return out
    wide = torch.float64 if base is not None and base.dtype == torch.float64 else torch.float32
    return torch.empty(out.shape, dtype=wide, device=out.device)


def store(values: torch.Tensor, out: torch.Tensor) -> None:
    """Copy `values` to `out` as the CPU rounds.

    Torch alone rounds float64 twice on its way to a narrower dtype, and takes what float8_e4m3fn cannot hold for its
    largest number (in some versions), not for NaN.
    """
    if values is out:
        return
    values = values if values.dtype == out.dtype else loadable(values)
    if values.dtype == torch.float64 and out.dtype.itemsize < 4:
        values = _tensor_to_odd(values)
    if out.dtype == torch.float8_e4m3fn != values.dtype:
        nan = torch.full_like(values, torch.nan).copysign(values)
        values = torch.where(values.abs() > 464, nan, values)  # 464 is the tie of 448, the largest, and the next
    out.copy_(values)


def _tensor_to_odd(values: torch.Tensor) -> torch.Tensor:
    nearest = values.to(torch.float32)
    bits, again = nearest.view(torch.int32), nearest.to(torch.float64)
    as_it_is = (again == values) | values.isnan() | (bits & 1 == 1)
    odd = torch.where(again.abs() > values.abs(), bits - 1, bits + 1)
    return torch.where(as_it_is, bits, odd).view(torch.float32)

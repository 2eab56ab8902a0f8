"""drop_mask in Triton: Philox in registers, a bit an entry written, nothing read.

With epsilon, ranks are wanted: runs of lines are put in order by torch's stable sort, and a program that reads an
entry's place at its rank draws the entry's word and writes whether it is kept; the bytes are packed to bits at last.
"""

import math

import torch
import triton
import triton.language as tl

from freemerge.kernels.drop_mask import lines_of
from freemerge.kernels.triton._convert import load_task_vector, loadable, magnitude_bits
from freemerge.kernels.triton._masks import ROWS, pack

BLOCK = 1024
AT_ONCE = 1 << 22  # entries put in order together; 28 bytes of memory each


@triton.jit
def _words(counter, key_0, key_1):
    """The four words of counters, int64, of Philox4x32-10."""
    low = counter.to(tl.uint32)
    zero = low ^ low
    return tl.philox_impl(low, (counter >> 32).to(tl.uint32), zero, zero, key_0.to(tl.uint32), key_1.to(tl.uint32), 10)


@triton.jit(do_not_specialize=["key_0", "key_1", "limit"])
def _drop_mask_kernel(
    mask, key_0: tl.int64, key_1: tl.int64, limit: tl.int64, n: tl.int64, size: tl.int64, ROWS: tl.constexpr
):
    # a row is a byte of the mask: the words of two counters
    byte = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    half = tl.arange(0, 2)[None, :]
    words = _words(byte[:, None] * 2 + half, key_0, key_1)
    least = limit.to(tl.uint32)
    nibble = tl.zeros([ROWS, 2], tl.int32)
    for k in tl.static_range(4):
        nibble = nibble | ((words[k] < least).to(tl.int32) << k)
    bits = tl.sum(nibble << (4 * half), axis=1)
    within = tl.minimum(tl.maximum(n - byte * 8, 0), 8).to(tl.int32)
    tl.store(mask + byte, (bits & ((1 << within) - 1)).to(tl.uint8), mask=byte < size)


@triton.jit
def _place(first_line, width, stride, BLOCK: tl.constexpr):
    """Of this program: the line, BLOCK places along it, and where in the array the line begins."""
    program = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(width, BLOCK)  # of a line
    line = program // blocks
    places = (program - line * blocks) * BLOCK + tl.arange(0, BLOCK)
    return line, places, (first_line + line) // stride * width * stride + (first_line + line) % stride


@triton.jit
def _magnitudes_kernel(
    base,
    expert,
    out,
    first_line: tl.int64,
    width: tl.int64,
    stride: tl.int64,
    BLOCK: tl.constexpr,
):
    """out: int32 [lines, width], the magnitudes of these lines, the last entry of a line first."""
    line, place, start = _place(first_line, width, stride, BLOCK)
    inside = place < width
    bits = magnitude_bits(load_task_vector(base, expert, start + place * stride, inside))
    tl.store(out + line * width + (width - 1 - place), bits, mask=inside)


@triton.jit(do_not_specialize=["key_0", "key_1"])
def _keep_ranked_kernel(
    order,
    limits,
    kept,
    key_0: tl.int64,
    key_1: tl.int64,
    first_line: tl.int64,
    width: tl.int64,
    stride: tl.int64,
    BLOCK: tl.constexpr,
):
    line, rank, start = _place(first_line, width, stride, BLOCK)
    inside = rank < width
    place = width - 1 - tl.load(order + line * width + rank, mask=inside, other=0)
    limit = tl.load(limits + rank, mask=inside, other=0)
    entry = start + place * stride
    word_0, word_1, word_2, word_3 = _words(entry >> 2, key_0, key_1)
    which = entry & 3
    word = tl.where(which < 2, tl.where(which == 0, word_0, word_1), tl.where(which == 2, word_2, word_3))
    tl.store(kept + entry, (word.to(tl.int64) < limit).to(tl.uint8), mask=inside)


def drop_mask(
    base: torch.Tensor | None,
    expert: torch.Tensor,
    density: float,
    epsilon: float,
    key: tuple[int, int],
    out: torch.Tensor,
) -> None:
    n = expert.numel()
    if n == 0:
        return
    if epsilon == 0 or lines_of(expert.shape)[1] < 2:
        # a word has 32 bits: the largest limit, 2^32, is one too many for it, and keeps everything
        limit = math.floor(density * 2**32)
        if limit < 2**32:
            _drop_mask_kernel[(triton.cdiv(len(out), ROWS),)](out, *key, limit, n, len(out), ROWS, num_warps=4)
        else:
            out.fill_(255)
            out[-1:].fill_((1 << ((n - 1) % 8 + 1)) - 1)
        return
    kept = torch.empty(n, dtype=torch.uint8, device=out.device)
    _keep_ranked(loadable(base), loadable(expert), density, epsilon, key, kept)
    pack(kept, out)


def _keep_ranked(base, expert, density: float, epsilon: float, key: tuple[int, int], kept: torch.Tensor) -> None:
    count, width, stride = lines_of(expert.shape)
    limits = _limits(width, density, epsilon, kept.device)
    at_once = max(1, AT_ONCE // width)
    block = min(BLOCK, max(128, triton.next_power_of_2(width)))
    for first in range(0, count * stride, at_once):
        lines = min(at_once, count * stride - first)
        grid = (lines * triton.cdiv(width, block),)
        magnitudes = torch.empty((lines, width), dtype=torch.int32, device=kept.device)
        _magnitudes_kernel[grid](base, expert, magnitudes, first, width, stride, block, num_warps=4)
        order = magnitudes.sort(dim=1, stable=True).indices
        _keep_ranked_kernel[grid](order, limits, kept, *key, first, width, stride, block, num_warps=4)


def _limits(width: int, density: float, epsilon: float, device) -> torch.Tensor:
    """int64 [width]: a word below this is kept at that rank; in the roundings of keep_probabilities."""
    ranks = torch.arange(width, dtype=torch.float64, device=device)
    last = ranks[-1]  # a tensor: by a number, torch multiplies by what is nearest to one over it
    return ((density - epsilon + 2 * epsilon * ranks / last) * 2.0**32).floor().to(torch.int64)

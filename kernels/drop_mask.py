"""drop_mask: entries dropped at random, each by a draw of its own that depends on nothing but a key and its place."""

import hashlib

import numpy as np

from freemerge.errors import ShapeError
from freemerge.kernels._masks import check_mask, pack_mask
from freemerge.kernels.array import Array, magnitude, numel
from freemerge.kernels.checks import check_pair
from freemerge.kernels.dispatch import implementation


def drop_mask(
    base: Array | None, expert: Array, *, density: float, epsilon: float = 0.0, key: tuple[int, int], out: Array
) -> None:
    """Write the mask of the entries of a task vector that a random draw keeps.

        kept where word_i < floor( p_i * 2^32 ),  word_i = word i % 4 of Philox4x32-10 at counter i // 4 with `key`
        p_i = density,  with epsilon: density - epsilon + 2 * epsilon * rank_i / (W - 1)

    i counts entries in row-major order; rank_i is the rank (0 ... W - 1) of |expert - base| by ascending magnitude
    along dimension 1 (0 if there is only one), W its length; among equals the lower index ranks higher; W = 1: p_i =
    density. The result is the same on any device, with any number of threads, in any order.

    Args:
        base: any shape, any float dtype, contiguous; None where `expert` is a task vector itself. Not read without
            epsilon.
        expert: of the shape of `base`, any float dtype. Not read without epsilon.
        density: the mean probability of being kept.
        epsilon: how much above and below it the probability is for the largest and the smallest of a row.
        key: two 32-bit words; see `draw_key`.
        out: a mask (kernels/_masks.py) over the entries of `expert`.

    Raises:
        ShapeError: arrays do not fit together, or a probability is not from 0 to 1.

    Source: Philox: Salmon et al. 2011; DARE, DELLA: METHODS.md sections 4 and 15.
    """
    check_pair(base, expert)
    check_mask("out", out, expert)
    if not 0 <= density - epsilon <= density + epsilon <= 1:
        raise ShapeError(f"density {density} with epsilon {epsilon}: probabilities go from 0 to 1")
    run = implementation("drop_mask", expert) or drop_mask_reference
    run(base, expert, float(density), float(epsilon), key, out)


def draw_key(seed: int, name: str, expert: int) -> tuple[int, int]:
    """The key of the draws for one tensor of one expert: a hash of what tells it from all others."""
    digest = hashlib.blake2b(f"{seed}\0{expert}\0{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")


def drop_mask_reference(
    base: Array | None, expert: Array, density: float, epsilon: float, key: tuple[int, int], out: Array
) -> None:
    limits = np.floor(keep_probabilities(base, expert, density, epsilon) * 2.0**32)
    out[...] = pack_mask(philox(key, numel(expert)).reshape(expert.shape) < limits)


def keep_probabilities(base: Array | None, expert: Array, density: float, epsilon: float) -> Array:
    """float64, of the shape of `expert`: with what probability an entry is kept."""
    if epsilon == 0:
        return np.full(expert.shape, density)
    lines = magnitude(base, expert).reshape(lines_of(expert.shape))
    width = lines.shape[1]
    if width < 2:
        return np.full(expert.shape, density)
    order = width - 1 - np.argsort(lines[:, ::-1], axis=1, kind="stable")  # of equals, the last comes first
    ranks = np.empty(lines.shape)
    np.put_along_axis(ranks, order, np.arange(width, dtype=np.float64)[None, :, None], axis=1)
    return (density - epsilon + 2 * epsilon * ranks / (width - 1)).reshape(expert.shape)


def lines_of(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """(count, W, stride): the lines along dimension 1 of a contiguous array, of stride elements from entry to entry."""
    if len(shape) < 2:
        return 1, shape[0] if shape else 1, 1
    return shape[0], shape[1], int(np.prod(shape[2:], dtype=np.int64))


def philox(key: tuple[int, int], count: int) -> Array:
    """The first `count` words, uint32, of the counters 0, 1, 2, ... of Philox4x32-10."""
    low = np.uint64(0xFFFFFFFF)
    shift = np.uint64(32)
    counter = np.arange((count + 3) // 4, dtype=np.uint64)
    c0, c1 = counter & low, counter >> shift
    c2 = c3 = np.zeros_like(counter)
    k0, k1 = key
    for _ in range(10):
        p0, p1 = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1, c2, c3 = (p1 >> shift) ^ c1 ^ np.uint64(k0), p1 & low, (p0 >> shift) ^ c3 ^ np.uint64(k1), p0 & low
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3], axis=1).reshape(-1)[:count].astype(np.uint32)

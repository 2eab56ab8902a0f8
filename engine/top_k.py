"""What a router keeps of the weights it gives to experts."""

import numpy as np

from freemerge.kernels.array import Array, is_tensor


def keep_top_k(weights: Array, top_k: int) -> Array:
    """Of each row the `top_k` largest weights divided by their sum, and 0 for the others; a row of zeros stays one.

    Among equals the first comes first.

    Args:
        weights: [n, T] floats >= 0, an array or a tensor; not changed.
        top_k: from 1 on.

    Returns:
        [n, T], like `weights`.
    """
    if is_tensor(weights):
        rest, kept = weights.clone(), weights.new_zeros(weights.shape)
        for _ in range(min(top_k, weights.shape[-1])):  # argmax finds the first of equals; a stable sort takes longer
            best = rest.argmax(-1, keepdim=True)
            kept.scatter_(-1, best, rest.gather(-1, best))
            rest.scatter_(-1, best, -1.0)
        total = kept.sum(-1, keepdim=True)
        return kept / total.masked_fill(total == 0, 1.0)
    kept = weights.copy()
    np.put_along_axis(kept, np.argsort(-weights, axis=-1, kind="stable")[:, top_k:], 0.0, -1)
    total = kept.sum(-1, keepdims=True)
    return kept / np.where(total == 0, 1.0, total).astype(total.dtype)

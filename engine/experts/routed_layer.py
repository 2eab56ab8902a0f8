"""A linear layer with experts and a gate that weighs them by input, as SMILE has it: what it computes, in NumPy.

The reference, which the official code's numbers are compared with (tests/run_goldens.py), and the routed model
(attached/gated.py).

Source: arXiv:2408.10174; METHODS.md section 8.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from freemerge.kernels.array import Array
from freemerge.parts import LowRank, Part
from freemerge.top_k import keep_top_k


class Routing(NamedTuple):
    """Of n inputs and T experts, [n, T]: norms in the gate, their softmax, and the weights of the answers."""

    logits: Array
    probabilities: Array
    weights: Array


def route(inputs: Array, gate: Array, experts: int, top_k: int) -> Routing:
    """Weigh the experts by how much of each input lies in their directions.

        z_t = |A_t x|;   p = softmax(z);   weights: the top_k largest p over their sum, 0 for the others

    Equal probabilities: the lower expert comes first.

    Args:
        inputs: [n, W] float32.
        gate: [T * r, W] float32, the directions of one expert after the other.
        experts: T.
        top_k: 1 to T.
    """
    along = (inputs @ gate.T).reshape(len(inputs), experts, -1)
    logits = np.linalg.norm(along, axis=-1)
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    probabilities = powers / powers.sum(-1, keepdims=True)
    return Routing(logits, probabilities, keep_top_k(probabilities, top_k))


def forward(
    inputs: Array,
    weight: Array,
    bias: Array | None,
    parts: Sequence[Part],
    bias_parts: Sequence[Part | None],
    weights: Array,
) -> Array:
    """float32 [n, H]: W x + b + sum_t weights[t] * (part_t x + bias_t), each input with weights of its own.

    Args:
        inputs: [n, W] float32.
        weight: [H, W], the backbone's. bias: [H], or None for a layer without.
        parts: T parts of `weight`, applied with a scale of 1.
        bias_parts: T parts of `bias`, None for experts without.
        weights: [n, T], as `route` answers them.
    """
    outputs = inputs @ weight.astype(np.float32).T
    if bias is not None:
        outputs = outputs + bias.astype(np.float32)
    for part, bias_part, share in zip(parts, bias_parts, weights.T, strict=True):
        answer = _times(part, inputs)
        outputs = outputs + share[:, None] * (answer if bias_part is None else answer + _dense(bias_part))
    return outputs


def _times(part: Part, inputs: Array) -> Array:
    if isinstance(part, LowRank):
        return inputs @ part.right.T @ part.left.T
    return inputs @ _dense(part).T


def _dense(part: Part) -> Array:
    dense = np.zeros(part.shape, np.float32)
    part.apply(dense, 1.0, out=dense)
    return dense

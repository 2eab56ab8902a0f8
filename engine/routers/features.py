"""Features of a batch: the mean over tokens of the last hidden state of the backbone alone."""

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from freemerge.checkpoint.torch_arrays import from_torch, is_torch
from freemerge.errors import InputError
from freemerge.kernels.array import Array
from freemerge.routers.assignment import shown_rows

LAST_HIDDEN_MEAN = "last_hidden_mean"
# Arguments of a forward that ask for something, not inputs to it
_NOT_INPUTS = frozenset({"labels", "past_key_values", "use_cache", "cache_position", "return_dict", "logits_to_keep"})


class LastHiddenMean:
    """Features of a batch for the model given: float32 tensor [rows, width], where the model is.

    Called with a batch, a mapping from names of inputs to tensors (or one tensor, the first input), it runs the part of
    the model that makes hidden states: `base_model` of a transformers model, its encoder where it has a decoder too,
    else the model itself. Tokens that `attention_mask` leaves out are left out of the mean. No gradients.

    Raises:
        InputError: an expert is in place of the backbone's weights; the model is training; a row has no tokens; the
            part has no hidden states.
    """

    name = LAST_HIDDEN_MEAN

    def __init__(self, model: Any):
        self.model, self._part = model, _hidden_part(model)
        parameters = inspect.signature(self._part.forward).parameters.values()
        self._inputs = {p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD or p.kind is p.KEYWORD_ONLY}

    def __call__(self, batch: Any):
        import torch

        if getattr(self.model, "expert", None) is not None:
            raise InputError(
                f"features are the backbone's: call use_expert(None) first ({self.model.expert} is in place)"
            )
        if self._part.training:
            raise InputError("features of a model in training are random: call model.eval() first")
        with torch.no_grad():
            hidden = self._hidden(batch)
        mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
        return mean_over_tokens(hidden, mask)

    def _hidden(self, batch: Any):
        if not isinstance(batch, Mapping):
            return _last_hidden(self._part(batch))
        inputs = {n: v for n, v in batch.items() if n in self._inputs - _NOT_INPUTS and not n.startswith("output_")}
        if "use_cache" in self._inputs:
            inputs["use_cache"] = False
        return _last_hidden(self._part(**inputs))


def mean_over_tokens(hidden, mask=None):
    """[rows, width]: the mean of [rows, tokens, width] hidden states over the tokens whose mask is not 0.

    Float32 sums; `mask` is [rows, tokens]. Hidden states [rows, width] are answered as they are.

    Raises:
        InputError: a row without tokens; shapes that do not fit together.
    """
    hidden = hidden.float()
    if hidden.ndim == 2:
        return hidden
    if hidden.ndim != 3:
        raise InputError(f"hidden states are {list(hidden.shape)}, expected are [rows, tokens, width]")
    if mask is None:
        return hidden.mean(dim=1)
    if tuple(mask.shape) != tuple(hidden.shape[:2]):
        raise InputError(f"attention_mask is {list(mask.shape)}, expected is {list(hidden.shape[:2])}")
    kept = (mask != 0).to(hidden.device)
    counts = kept.sum(dim=1)
    if not bool(counts.all()):
        raise InputError(
            f"{shown_rows((counts == 0).nonzero()[:, 0].tolist())} of the batch: no token to take features of"
        )
    # not hidden * mask: what stands at padding may be NaN
    return hidden.masked_fill(~kept[:, :, None], 0.0).sum(dim=1) / counts[:, None]


def collect_features(features: Callable[[Any], Array], batches: Iterable[Any], rows: int | None = None) -> np.ndarray:
    """Features of many batches on the host, float32 [n, width].

    Args:
        features: e.g. LastHiddenMean(model).
        batches: what it takes.
        rows: stop at this many; the official routers are trained on up to 5500 of each task.
    """
    found: list[np.ndarray] = []
    for batch in batches:
        if rows is not None and sum(map(len, found)) >= rows:
            break
        answer = features(batch)
        found.append(from_torch(answer.float().cpu()) if is_torch(answer) else np.asarray(answer, np.float32))
    if not found:
        raise InputError("no batches to take features of")
    return np.concatenate(found)[:rows]


def rows_of_batch(batch: Any) -> int | None:
    """How many rows a batch has, by the first input that has a shape; None where none has."""
    values = batch.values() if isinstance(batch, Mapping) else [batch]
    return next((len(value) for value in values if getattr(value, "shape", ())), None)


def _hidden_part(model: Any) -> Any:
    part = getattr(model, "base_model", model)  # transformers' name for the model without its head
    config = getattr(part, "config", None)
    if getattr(config, "is_encoder_decoder", False) and hasattr(part, "get_encoder"):
        return part.get_encoder()
    return part


def _last_hidden(output: Any):
    found = getattr(output, "last_hidden_state", None)
    if found is None and isinstance(output, Mapping):
        found = output.get("last_hidden_state")
    if found is None:
        found = output[0] if isinstance(output, tuple) else output
    if not is_torch(found):
        raise InputError(f"no hidden states in a {type(output).__name__}: give a function that computes features")
    return found

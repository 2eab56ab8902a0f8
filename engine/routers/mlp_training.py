"""Training of MlpRouter, in torch."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from freemerge.errors import InputError, UnavailableError
from freemerge.routers.examples import Examples

Layers = list[tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class Variant:
    """An official network; `hidden` answers its hidden widths for features of a width, dropout is 0.5 or none."""

    hidden: Any
    batch_norm: bool
    slope: float
    dropout: bool


VARIANTS = {
    "lm": Variant(lambda width: (2 * width, 2 * width), batch_norm=True, slope=0.01, dropout=True),
    "vit": Variant(lambda width: (256,), batch_norm=False, slope=0.0, dropout=False),
    "vit_mlp": Variant(lambda width: (512, 256), batch_norm=False, slope=0.0, dropout=True),
}


def train(
    examples: Examples,
    *,
    variant: str,
    hidden: Sequence[int] | None,
    learning_rate: float,
    batch: int,
    epochs: int,
    enough: float,
    seed: int,
    device: Any,
) -> tuple[Layers, float]:
    """The layers of the trained network, batch norms folded in, and its ReLU's slope; see MlpRouter.fit."""
    try:
        import torch
    except ImportError as error:
        raise UnavailableError(f"training a router: {error}; pip install torch, or use PrototypeRouter") from None
    shape = _checked(variant, hidden, learning_rate, batch, epochs, enough, len(examples.features))
    device = torch.device(device or "cpu")
    # The caller may be under inference_mode, where nothing learns; and its random numbers are its own.
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.random.fork_rng([device] if device.type == "cuda" else []),
    ):
        torch.manual_seed(seed)
        widths = hidden if hidden is not None else shape.hidden(examples.features.shape[1])
        network = _network(examples.features.shape[1], widths, len(examples.experts), shape).to(device).train()
        features = torch.from_numpy(examples.features).to(device)
        labels = torch.from_numpy(examples.indices).to(device)
        optimizer = torch.optim.Adam(network.parameters(), lr=learning_rate, fused=True)
        for _ in range(epochs):
            total = 0.0
            for rows in _batches(torch.randperm(len(features)).to(device), batch):
                optimizer.zero_grad()
                loss = torch.nn.functional.cross_entropy(network(features[rows]), labels[rows])
                loss.backward()
                optimizer.step()
                total += loss.detach() * len(rows)
            mean = float(total) / len(features)
            if not math.isfinite(mean):
                raise InputError(f"the router's training diverged (loss {mean}): lower the learning rate")
            if mean < enough:
                break
    return _folded(network.cpu()), shape.slope


def _checked(variant: str, hidden, learning_rate: float, batch: int, epochs: int, enough: float, rows: int) -> Variant:
    if variant not in VARIANTS:
        raise InputError(f"no router variant {variant!r}: there are {', '.join(VARIANTS)}")
    if hidden is not None and not all(type(width) is int and width > 0 for width in hidden):
        raise InputError(f"hidden {list(hidden)}: widths of layers, whole numbers above 0")
    if not (learning_rate > 0 and batch > 1 and epochs > 0):
        raise InputError(f"learning_rate {learning_rate} and epochs {epochs} are above 0, batch {batch} above 1")
    if not enough >= 0:
        raise InputError(f"enough {enough}: a loss, 0 to train all epochs")
    if VARIANTS[variant].batch_norm and rows < 2:
        raise InputError("one example: a router with batch norm needs two or more")
    return VARIANTS[variant]


def _network(width: int, hidden: Sequence[int], count: int, shape: Variant):
    from torch import nn

    from freemerge.routers.half_dropout import HalfDropout

    layers: list[nn.Module] = []
    for after in hidden:
        norm = [nn.BatchNorm1d(after)] if shape.batch_norm else []
        dropout = [HalfDropout()] if shape.dropout else []
        layers += [nn.Linear(width, after), *norm, nn.LeakyReLU(shape.slope), *dropout]
        width = after
    return nn.Sequential(*layers, nn.Linear(width, count))


def _batches(order, batch: int) -> Iterator:
    """Runs of `batch` rows; a last row alone joins the run before, as batch norm has nothing to say of one row."""
    ends = list(range(batch, len(order), batch))
    if ends and len(order) - ends[-1] == 1:
        ends.pop()
    yield from order.tensor_split(ends)


def _folded(network) -> Layers:
    """The linear layers, with each batch norm's scale and shift multiplied into the layer before it."""
    from torch import nn

    layers: list[tuple] = []
    for module in network:
        if isinstance(module, nn.Linear):
            layers.append((module.weight.detach().double(), module.bias.detach().double()))
        elif isinstance(module, nn.BatchNorm1d):
            weight, bias = layers.pop()
            scale = module.weight.detach().double() / (module.running_var.double() + module.eps).sqrt()
            shift = module.bias.detach().double() - module.running_mean.double() * scale
            layers.append((weight * scale[:, None], bias * scale + shift))
    return [tuple(part.float().numpy() for part in layer) for layer in layers]

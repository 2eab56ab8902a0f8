"""The official router: a small network over features, trained with the labels of the tasks."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from freemerge.errors import InputError
from freemerge.kernels.array import Array
from freemerge.routers.examples import gather_examples
from freemerge.routers.features import LAST_HIDDEN_MEAN
from freemerge.routers.router import Router


class MlpRouter(Router):
    """Linear layers with a (leaky) ReLU between them; batch norms are folded into the layers before them.

    Args:
        layers: (weight [out, in], bias [out]) of each, float32, from the features' width to T.
        slope: of the ReLU below 0.
    """

    kind = "mlp"

    def __init__(
        self,
        experts: Sequence[str],
        layers: Sequence[tuple[np.ndarray, np.ndarray]],
        *,
        slope: float = 0.01,
        **settings: Any,
    ):
        super().__init__(experts, layers[0][0].shape[1], **settings)
        self.slope, self._count = float(slope), len(layers)
        self._arrays = {
            f"layers.{i}.{part}": array
            for i, layer in enumerate(layers)
            for part, array in zip(("weight", "bias"), layer, strict=True)
        }

    @classmethod
    def fit(
        cls,
        data: Any,
        labels: Sequence | None = None,
        *,
        experts: Sequence[str] | None = None,
        variant: str = "lm",
        hidden: Sequence[int] | None = None,
        learning_rate: float = 5e-4,
        batch: int = 1024,
        epochs: int = 50,
        enough: float = 0.05,
        seed: int = 0,
        device: Any = None,
        features: str = LAST_HIDDEN_MEAN,
        top_k: int | None = 1,
    ) -> "MlpRouter":
        """Train a router: cross-entropy, Adam, the official settings unless given.

        Args:
            data, labels, experts: as for `examples.gather_examples`: a mapping from expert to [n, width] features,
                features with labels, or a data loader of both. All are held in memory, float32.
            variant: the official networks, d the features' width:
                "lm": d -> 2d -> 2d -> T with batch norm, leaky ReLU and dropout 0.5 after the first two;
                "vit": d -> 256 -> T with ReLU (the official d is 512, of a ResNet-18);
                "vit_mlp": d -> 512 -> 256 -> T with ReLU and dropout 0.5 (the official d is 150528, of pixels).
            hidden: widths in place of the variant's.
            batch: rows of a step.
            epochs: at most; the official code's training does not look at the loss.
            enough: training ends after an epoch whose mean loss, in nats and with dropout, is below this; 0: never.
            seed: of the first weights, the order of rows, and dropout; torch's own generators are left alone.
            device: a torch device to train on; the CPU unless given.
            features, top_k: see Router.

        Raises:
            InputError: an expert without examples, features that do not fit together, NaN or Inf; or training that
                diverged.
            UnavailableError: torch is not installed.
        """
        from freemerge.routers.mlp_training import train

        examples = gather_examples(data, labels, experts)
        layers, slope = train(
            examples,
            variant=variant,
            hidden=hidden,
            learning_rate=learning_rate,
            batch=batch,
            epochs=epochs,
            enough=enough,
            seed=seed,
            device=device,
        )
        return cls(examples.experts, layers, slope=slope, features=features, top_k=top_k)

    @classmethod
    def of(cls, experts: Sequence[str], arrays: Mapping[str, np.ndarray], **settings: Any) -> "MlpRouter":
        parts = [[arrays[f"layers.{i}.{part}"] for part in ("weight", "bias")] for i in range(len(arrays) // 2)]
        return cls(experts, parts, **settings)

    @classmethod
    def shapes(cls, width: int, count: int, found: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        last = max(1, sum(name.endswith(".weight") for name in found)) - 1
        widths = [width, *((found.get(f"layers.{i}.weight") or (0,))[0] for i in range(last)), count]
        pairs = list(enumerate(zip(widths[1:], widths, strict=False)))
        return {f"layers.{i}.weight": pair for i, pair in pairs} | {f"layers.{i}.bias": pair[:1] for i, pair in pairs}

    @classmethod
    def check_options(cls, options: Mapping[str, Any]) -> None:
        slope = options.get("slope")
        if options.keys() != {"slope"} or type(slope) not in (int, float) or not 0 <= slope <= 1:
            raise InputError(f"options are {options!r}, expected is a slope from 0 to 1")

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        return self._arrays

    @property
    def options(self) -> dict[str, float]:
        return {"slope": self.slope}

    def _forward(self, features: Array, arrays: Mapping[str, Array]) -> Array:
        for i in range(self._count):
            if i:
                features = features.clip(0, None) + self.slope * features.clip(None, 0)
            features = features @ arrays[f"layers.{i}.weight"].T + arrays[f"layers.{i}.bias"]
        return features

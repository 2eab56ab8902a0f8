"""Nearest prototype: the cosine between an input's features and the mean features of each expert's examples."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from freemerge.errors import InputError
from freemerge.kernels.array import Array
from freemerge.routers.examples import gather_examples
from freemerge.routers.features import LAST_HIDDEN_MEAN
from freemerge.routers.router import Router

TEMPERATURE = 0.1  # of cosines, until calibrate fits one


class PrototypeRouter(Router):
    """Needs no training.

        logits[i, t] = cos( features[i] - center, prototypes[t] - center )

    0 where either vector is zero. Mean hidden states of a language model have a large part in common, beside which the
    tasks differ little; `center` takes it away.

    Args:
        prototypes: [T, width] float32.
        center: [width] float32.
    """

    kind = "prototype"

    def __init__(self, experts: Sequence[str], prototypes: np.ndarray, center: np.ndarray, **settings: Any):
        super().__init__(experts, prototypes.shape[1], **settings)
        self._arrays = {"center": center, "prototypes": prototypes}

    @classmethod
    def fit(
        cls,
        data: Any,
        labels: Sequence | None = None,
        *,
        experts: Sequence[str] | None = None,
        centered: bool = True,
        features: str = LAST_HIDDEN_MEAN,
        temperature: float = TEMPERATURE,
        top_k: int | None = 1,
    ) -> "PrototypeRouter":
        """The router whose prototypes are the means over each expert's examples; a handful of each will do.

        Args:
            data, labels, experts: as for `examples.gather_examples`: a mapping from expert to [n, width] features,
                features with labels, or a data loader of both.
            centered: the center is the mean of the prototypes; else, or with one expert, zero.
            features, temperature, top_k: see Router.

        Raises:
            InputError: an expert without examples, features that do not fit together, NaN or Inf.
        """
        examples = gather_examples(data, labels, experts)
        wide = examples.features.astype(np.float64)
        prototypes = np.stack([wide[examples.indices == i].mean(axis=0) for i in range(len(examples.experts))])
        center = prototypes.mean(axis=0) if centered and len(prototypes) > 1 else np.zeros(prototypes.shape[1])
        if not ((prototypes - center) ** 2).sum(axis=1).all():
            raise InputError("the examples of an expert have features of zero mean: there is no direction to compare")
        settings = {"features": features, "temperature": temperature, "top_k": top_k}
        return cls(examples.experts, prototypes.astype(np.float32), center.astype(np.float32), **settings)

    @classmethod
    def of(cls, experts: Sequence[str], arrays: Mapping[str, np.ndarray], **settings: Any) -> "PrototypeRouter":
        return cls(experts, arrays["prototypes"], arrays["center"], **settings)

    @classmethod
    def shapes(cls, width: int, count: int, found: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        return {"center": (width,), "prototypes": (count, width)}

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        return self._arrays

    def _forward(self, features: Array, arrays: Mapping[str, Array]) -> Array:
        return _directions(features - arrays["center"]) @ _directions(arrays["prototypes"] - arrays["center"]).T


def _directions(rows: Array) -> Array:
    # divided by their size first, so that squares neither overflow nor vanish
    rows = rows / _nonzero(abs(rows).sum(1))[:, None]
    return rows / _nonzero((rows * rows).sum(1) ** 0.5)[:, None]


def _nonzero(values: Array) -> Array:
    return values + (values == 0)

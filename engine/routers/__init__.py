"""What picks experts for the rows of a batch: prototypes, a small network, or a function of the user's own.

    router = PrototypeRouter.fit({"math": features_of_math, "code": features_of_code})
    router.calibrate(held_out, labels, accuracy=0.99)     # below some confidence: the backbone alone
    router.save("merged")

    route = load_router("merged").bind(model)             # model: see freemerge.attach
    with model.routed(route(batch)):
        model.generate(**batch)

Source: FREE-Merging, arXiv:2411.16815; METHODS.md section 1.8.
"""

from freemerge.attached.gates import Gates
from freemerge.routers.calibration import Calibration
from freemerge.routers.features import LastHiddenMean, collect_features
from freemerge.routers.files import load_router
from freemerge.routers.function import FunctionRouter
from freemerge.routers.mlp import MlpRouter
from freemerge.routers.prototype import PrototypeRouter
from freemerge.routers.router import BoundRouter, Router

__all__ = [
    "BoundRouter",
    "Calibration",
    "FunctionRouter",
    "Gates",
    "LastHiddenMean",
    "MlpRouter",
    "PrototypeRouter",
    "Router",
    "collect_features",
    "load_router",
]

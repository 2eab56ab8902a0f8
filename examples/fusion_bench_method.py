"""freemerge as an algorithm of fusion_bench, for its pools and its evaluation; needs fusion_bench.

With this file on PYTHONPATH, a method configuration of fusion_bench is

    _target_: fusion_bench_method.FreemergeAlgorithm
    merge_by: fr
    scaling: 0.4
"""

from copy import deepcopy
from typing import Any

import torch
from fusion_bench.method import BaseAlgorithm
from fusion_bench.modelpool import BaseModelPool

import freemerge
from freemerge import methods


class FreemergeAlgorithm(BaseAlgorithm):
    """Any method of freemerge on the models of a pool, which are all loaded; the result is a new model.

    Args:
        merge_by: name of the method.
        device: where tensors in host memory are merged, as for freemerge.merge_state_dicts.
        parameters: of the method.
    """

    def __init__(self, merge_by: str, device: str = "cpu", **parameters: Any):
        super().__init__()
        self.merge_by, self.device, self.parameters = merge_by, device, parameters

    @torch.no_grad()
    def run(self, modelpool: BaseModelPool | dict[str, torch.nn.Module]) -> torch.nn.Module:
        pool = modelpool if isinstance(modelpool, BaseModelPool) else BaseModelPool(modelpool)
        model = deepcopy(pool.load_pretrained_or_first_model())
        base = model.state_dict() if methods.get(self.merge_by).uses_base else None
        experts = {name: pool.load_model(name).state_dict() for name in pool.model_names}
        merged = freemerge.merge_state_dicts(self.merge_by, base, experts, device=self.device, **self.parameters)
        model.load_state_dict(merged)
        return model

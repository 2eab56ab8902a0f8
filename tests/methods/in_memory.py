"""A merge in memory by a plain loop over a method's hooks: what the engine does, without files, threads or limits."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from freemerge import methods
from freemerge.kernels.apply_sparse_rows import apply_sparse_rows
from freemerge.kernels.array import SparseRows, is_float


class Merged(dict):
    """The merged tensors; `experts`: one Expert for each, of a method that writes experts."""

    experts: list["Expert"]


@dataclass
class Expert:
    metadata: dict[str, Any]
    mode: str
    tensors: dict[str, SparseRows]
    scales: dict[str, float]
    base: dict[str, np.ndarray]

    def scale(self, name):
        return self.scales[name]

    def apply(self, state_dict):
        result = dict(state_dict)
        for name, rows in self.tensors.items():
            result[name] = np.empty_like(state_dict[name])
            start = None
            if self.mode == "replace":
                height = len(rows.offsets) - 1
                index = np.repeat(np.arange(height), np.diff(rows.offsets)), rows.columns
                start = self.base[name].reshape(height, -1)[index] if rows.count else np.zeros(0, np.float32)
            apply_sparse_rows(state_dict[name], rows, self.scales[name], start=start, out=result[name])
        return result


def merge_state_dicts(method, base, experts, *, dtype=None, variant=None, **given):
    method = methods.get(method)
    module = method.module
    params = (
        {p.name: p.default for p in method.parameters.values()} | (method.variants[variant] if variant else {}) | given
    )
    merged = Merged()
    fitted = {}
    floating = [name for name in sorted(base or experts[0]) if is_float((base or experts[0])[name].dtype)]
    for name, array in (base or experts[0]).items():
        if name not in floating:
            merged[name] = array
            continue
        fitted[name] = [_fit(module, name, array, expert[name], params) for expert in experts]
        merged[name] = np.full(array.shape, np.nan, dtype or array.dtype)
        module.merge_tensor(array if base else None, fitted[name], name=name, out=merged[name], **params)
    if method.writes_experts:
        merged.experts = _experts(module, base, merged, fitted, floating, params)
    return merged


def _fit(module, name, array, theirs, params):
    if theirs.shape == array.shape:
        return theirs
    rule = module.fit_expert(name, array.shape, theirs.shape, **params)
    assert rule, f"{name}: {theirs.shape} for {array.shape}"
    return np.ascontiguousarray(theirs[tuple(slice(n) for n in array.shape)]) if rule == "crop" else None


def _experts(module, base, merged, fitted, floating, params):
    count = len(fitted[floating[0]])
    rows = [{} for _ in range(count)]
    for t in range(count):
        covered = [n for n in floating if fitted[n][t] is not None and module.expert_count(n, base[n].shape, **params)]
        within = dict.fromkeys(covered)
        if module.expert_scope(**params) == "model":
            arrays = ([tensors[n] for n in covered] for tensors in (base, merged))
            found = module.select_over_model(*arrays, [fitted[n][t] for n in covered], **params)
            within = {name: selection for name, (selection, _) in zip(covered, found, strict=True)}
        for name in covered:
            rows[t][name] = module.extract_expert(
                base[name], merged[name], fitted[name][t], name=name, within=within[name], **params
            )
    statistics = [
        module.measure_tensor(
            base[name], merged[name], fitted[name], [held.get(name) for held in rows], name=name, **params
        )
        for name in floating
    ]
    experts = []
    for t in range(count):
        mu = module.expert_scale([one[t] for one in statistics], **params)
        scales = {name: module.tensor_scale(mu, name, base[name].shape, **params) for name in rows[t]}
        experts.append(Expert({"mu": mu}, module.expert_mode(**params), rows[t], scales, base))
    return experts

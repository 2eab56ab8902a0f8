"""Run golden cases through the public API: `python tests/run_goldens.py [DIR]`, by default tests/goldens.

One line for each case: method, variant, case, worst absolute error, worst relative error and its tolerance, how much
of the error allowed in the update (merged minus base) is used, and pass, fail or unsupported. Ends with 1 if a case
fails. Format and tolerances: the README.md of the goldens.
"""

import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import ml_dtypes
import numpy as np

from freemerge import merge_state_dicts, methods
from freemerge.experts.interventions import INTERVENTIONS, at_position
from freemerge.experts.routed_layer import forward as layer_forward
from freemerge.experts.routed_layer import route
from freemerge.kernels._masks import pack_mask, unpack_mask
from freemerge.kernels.balance_scores import balance_scores
from freemerge.kernels.drop_mask import draw_key, keep_probabilities

StateDict = dict[str, np.ndarray]

DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": ml_dtypes.bfloat16}
DTYPES |= {"I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1", "U8": "u1", "BOOL": "?"}
ROUNDING = {np.dtype(ml_dtypes.bfloat16): 4e-3, np.dtype(np.float16): 5e-4}  # one rounding to the storage dtype
# rtol by method and group where it is not 1e-6: about four times the official code's own float32 error
RTOL = {
    ("adamerging", "expected_scalar"): 5e-6,
    ("doge", "expected"): 2e-4,
    ("doge", "expected_shift"): 1e-3,
    ("fr_filter", "expected_delta"): 2e-6,
    ("free", "expected_expert"): 5e-4,
    ("free", "expected_infer"): 2e-6,
    ("free", "expected_shared"): 2e-6,
    ("opcm", "expected"): 2e-6,
    ("opcm", "expected_step"): 2e-6,
    ("pcb", "expected_scale"): 5e-6,
    ("saft", "expected_step"): 2e-6,
    ("smile", "expected_expert"): 1e-5,
    ("smile", "expected_forward"): 2e-5,
    ("smile", "expected_gate"): 1e-5,  # as the experts, whose right singular vectors its rows are
    ("tsvm", "expected"): 2e-6,
    ("twin", "expected_expert"): 5e-4,
    ("twin", "expected_infer"): 2e-6,
}
LATER = {("adamerging", "expected_scalar")}  # losses and gradients: learning the coefficients is not merging
WEIGHTS = ("expected", "expected_hp", "expected_task", "expected_hp_task", "expected_infer")  # groups of whole weights


class Unsupported(Exception):
    pass


@dataclass
class Case:
    """One golden file. `groups` holds its tensors by group; `hyper` the hyper-parameters of the official run."""

    method: str
    variant: str
    name: str
    hyper: dict[str, Any]
    groups: dict[str, StateDict]

    @property
    def base(self) -> StateDict | None:
        return self.groups.get("base")

    @property
    def experts(self) -> list[StateDict]:
        return [
            self.groups[f"expert{t}"]
            for t in range(sum(bool(re.fullmatch(r"expert\d+", name)) for name in self.groups))
        ]

    @property
    def storage(self) -> np.dtype | None:
        """The narrowest float dtype of the base."""
        dtypes = [array.dtype for array in (self.base or {}).values() if is_float(array)]
        return min(dtypes, key=lambda dtype: dtype.itemsize, default=None)


@dataclass
class Result:
    """Worst errors of a case. Shares are of the error allowed: above 1 the case fails."""

    absolute: float = 0.0
    relative: float = 0.0  # of the tensor with the largest share, as is rtol
    rtol: float = 1e-6
    share: float = 0.0
    update_share: float = 0.0  # of the update, merged minus base
    problems: list[str] = field(default_factory=list)


def read_case(path: Path) -> Case:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    case = json.loads(header.pop("__metadata__")["case"])
    groups: dict[str, StateDict] = {}
    for name, info in header.items():
        group, _, tensor = name.partition("/")
        begin, end = (8 + length + offset for offset in info["data_offsets"])
        array = np.frombuffer(data[begin:end], DTYPES[info["dtype"]]).reshape(info["shape"])
        groups.setdefault(group, {})[tensor] = array
    return Case(case["method"], case["variant"], case["case"], case["hyper"], groups)


# ---- from the official code's hyper-parameters to ours

OFFICIAL_NAMES = {
    "cutoff": ("ratio", "filter_ratio", "high"),
    "radius_from": ("radius_from",),
    "align": ("with_align",),
    "scaling": ("scaling_coef", "scaling", "lam"),
    "weight": ("weight",),
    "normalize": ("normalize",),
    "density": ("top_k_keep", "keep"),
    "removal": ("top_k_remove", "remove"),
    "rescale": ("expert_factor",),
}


ANY, NOTHING = ["."], ["(?!)"]  # patterns


def parameters_of(case: Case) -> dict[str, Any]:
    """The parameters of our method that the hyper-parameters of an fr or free case ask for."""
    known = methods.get(case.method).parameters
    hyper = case.hyper
    given = {
        ours: hyper[key] for ours, keys in OFFICIAL_NAMES.items() for key in keys if ours in known and key in hyper
    }
    if "exclude" in hyper:  # the official code matches from the start of a name
        given["exclude"] = [f"^(?:{pattern})" for pattern in hyper["exclude"]]
    if "inner_ring" in hyper:
        given["inner_ring"] = "official" if hyper["inner_ring"] else "clean"
    if "mask_rate" in hyper:
        given["density"] = 1 - hyper["mask_rate"]
    if "shared_factor" in hyper:  # base + c * (expert_factor * expert or shared_factor * shared)
        outer = hyper.get("scaling_coef", 1.0)
        given |= {"scaling": outer * hyper["shared_factor"], "expert_scaling": outer}
    return given


def variant_of(case: Case) -> str:
    variant = case.variant.split("_")[0]
    if variant not in methods.get(case.method).variants:
        raise Unsupported(f"variant {case.variant}")
    return variant


# ---- what each golden method compares: group -> how to compute it


def compute(case: Case) -> dict[str, Callable[[], StateDict]]:
    if case.method in COMPUTE:
        return COMPUTE[case.method](case)
    raise Unsupported("method")


def whole_weights(case: Case, method: str, **parameters) -> dict[str, Callable[[], StateDict]]:
    def run(dtype=None):
        return merge_state_dicts(method, case.base, case.experts, dtype=dtype, **parameters)

    return {"expected": run, "expected_hp": lambda: run("float32")}


def mergekit(case: Case) -> dict[str, Callable[[], StateDict]]:
    if case.variant not in methods.names():
        raise Unsupported("method")
    method = methods.get(case.variant)
    given = {method.aliases.get(key, key): value for key, value in case.hyper.items() if key != "uses_base"}
    if unknown := set(given) - set(method.parameters):
        raise Unsupported(f"parameter {', '.join(sorted(unknown))}")
    return given_draws(case, whole_weights(case, case.variant, **given))


def breadcrumbs(case: Case) -> dict[str, Callable[[], StateDict]]:
    return whole_weights(case, "breadcrumbs", variant="roberta", gamma=case.hyper["remove"], **parameters_of(case))


def dare(case: Case) -> dict[str, Callable[[], StateDict]]:
    then = case.variant.removeprefix("mergelm_")
    if then == "ties_merging":
        return dare_ties_merging(case)
    if then not in methods.get("dare").parameters["then"].choices:
        raise Unsupported(f"variant {case.variant}")
    given = {"density": 1 - case.hyper["drop_rate"], "rescale": case.hyper["rescale"], "then": then}
    given["scaling"] = case.hyper.get("scaling_coefficient", 1.0)
    return given_draws(case, whole_weights(case, "dare", **given, **parameters_of(case)))


def dare_ties_merging(case: Case) -> dict[str, Callable[[], StateDict]]:
    given = {"density": 1 - case.hyper["drop_rate"], "mask_rate": case.hyper["param_value_mask_rate"]}
    given |= {"rescale": case.hyper["rescale"], "scaling": case.hyper["scaling_coefficient"]}
    exclude = [f"^(?:{pattern})" for pattern in case.hyper["exclude"]]
    return given_draws(case, whole_weights(case, "dare_ties_merging", **given, exclude=exclude))


def ties(case: Case) -> dict[str, Callable[[], StateDict]]:
    hyper, given = case.hyper, {"variant": case.variant, "scaling": case.hyper["lam"]}
    if case.variant == "mergelm":
        given |= {"mask_rate": hyper["mask_rate"], "exclude": [f"^(?:{pattern})" for pattern in hyper["exclude"]]}
    else:
        share = hyper["K"] / 100 if hyper["K"] > 1 else hyper["K"]
        given |= {"density": share, "combination": hyper["merge_func"].removeprefix("dis-")}
    groups = whole_weights(case, "ties_merging", **given)
    return groups | {"expected": groups["expected_hp"]}  # the official code's results are float32


def pcb(case: Case) -> dict[str, Callable[[], StateDict]]:
    hyper = case.hyper
    given = {"variant": case.variant, "density": hyper["ratio"], "clamp": hyper["clamp"], "scaling": hyper["lam"]}
    module, merge_tensor = methods.get("pcb").module, methods.get("pcb").module.merge_tensor

    def run():
        return merge_state_dicts("pcb", case.base, case.experts, **given)

    def scale(t):  # the weight of every entry, from 0 to 1
        found = {}

        def looks_on(base, experts, *, name, agreement, settled, **others):
            scores = np.empty((len(experts), base.size), np.float32)
            balance_scores(base, experts, *settled.clips, normalized=agreement == "normalized", out=scores)
            floor, top = settled.scores.values[t], settled.tops[t]
            found[name] = ((np.clip(scores[t].astype(float), floor, top) - floor) / (top - floor)).reshape(base.shape)
            merge_tensor(base, experts, name=name, agreement=agreement, settled=settled, **others)

        with patch.object(module, "merge_tensor", looks_on):
            run()
        return found

    return {"expected": run} | {f"expected_scale{t}": lambda t=t: scale(t) for t in range(len(case.experts))}


def given_draws(case: Case, groups: dict[str, Callable[[], StateDict]]) -> dict[str, Callable[[], StateDict]]:
    """The same with the draws of the golden, if it has any: an entry is kept where its number is below what it takes.

    Numbers are uniform ones, or 1 where the entry is dropped and 0 where it is kept.
    """
    numbers = {}
    for t in range(len(case.experts)):
        for group in ("aux_u", "aux_drop"):
            for name, array in case.groups.get(f"{group}{t}", {}).items():
                numbers[draw_key(0, name, t)] = array

    def drop_mask(base, expert, *, density, epsilon, key, out):
        out[...] = pack_mask(numbers[key] < keep_probabilities(base, expert, density, epsilon))

    def run(compute):
        with patch("freemerge.methods._masked_sum.drop_mask", drop_mask):
            return compute()

    return {group: lambda compute=compute: run(compute) for group, compute in groups.items()} if numbers else groups


def fr_filter(case: Case) -> dict[str, Callable[[], StateDict]]:
    given = {"filter": ANY, "unfiltered": NOTHING, "scaling": 1.0, **parameters_of(Case("fr", "", "", case.hyper, {}))}

    def run(group):
        vectors = case.groups[group]
        return merge_state_dicts("fr", zeros_like(vectors), [vectors], **given)

    return {f"expected_{group}": lambda group=group: run(group) for group in case.groups if group.startswith("delta")}


def fr(case: Case) -> dict[str, Callable[[], StateDict]]:
    given = {"variant": variant_of(case), **parameters_of(case)}
    return whole_weights(case, "fr", **given) | {"expected_shared": lambda: shared(case, "fr", given)}


def free(case: Case) -> dict[str, Callable[[], StateDict]]:
    if case.hyper.get("mask_strategy", "top") != "top":
        raise Unsupported(f"mask_strategy {case.hyper['mask_strategy']}")
    given = {"variant": variant_of(case), **parameters_of(case)}
    if case.variant == "llm_free_as_shipped":
        given["density"] = 0.0
    merged = merge_state_dicts("free", case.base, case.experts, **given)

    def rescaling():  # computed by the official code even where it takes a number instead
        official = merge_state_dicts("free", case.base, case.experts, **given | {"rescale": "official"})
        return {"rescaling": np.array([expert.metadata["mu"] for expert in official.experts])}

    def task_in_float32(t):
        wide = merge_state_dicts("free", case.base, case.experts, dtype="float32", **given)
        return wide.experts[t].apply(wide)

    def expert(t):
        if given.get("variant") == "script":  # relative to the merged model, whose experts add
            return merged.experts[t].apply(zeros_like(merged))
        # the golden holds roberta's before their factor
        alone = shared(case, "free", given | ({"rescale": 1.0} if given["variant"] == "roberta" else {}))
        return alone.experts[t].apply(zeros_like(alone))

    groups = whole_weights(case, "free", **given) | {"expected": lambda: merged}
    groups["expected_infer"] = lambda: merged.with_experts(chances(case))
    groups["expected_shared"] = lambda: shared(case, "free", given)
    groups["expected_scalar"] = rescaling
    for t, one in enumerate(merged.experts):
        groups[f"expected_task{t}"] = lambda one=one: one.apply(merged)
        groups[f"expected_hp_task{t}"] = lambda t=t: task_in_float32(t)
        groups[f"expected_expert{t}"] = lambda t=t: expert(t)
    return groups


def chances(case: Case) -> dict[str, float]:
    """The softmax of the router's logits, by expert."""
    logits = case.groups["aux"]["router_logits"].astype(np.float64)
    powers = np.exp(logits - logits.max())
    return {f"expert{t}": float(chance) for t, chance in enumerate(powers / powers.sum())}


def emr(case: Case) -> dict[str, Callable[[], StateDict]]:
    given = {"variant": case.variant}
    merged = merge_state_dicts("emr", case.base, case.experts, **given)
    wide = merge_state_dicts("emr", case.base, case.experts, dtype="float32", **given)
    groups = {"expected_unified": lambda: {name: arrays["vector"] for name, arrays in merged.shared.items()}}
    groups["expected_scalar"] = lambda: {"rescalers": np.array([expert.metadata["mu"] for expert in merged.experts])}
    for t in range(len(case.experts)):
        groups[f"expected_task{t}"] = lambda t=t: merged.experts[t].apply(merged)
        groups[f"expected_hp_task{t}"] = lambda t=t: wide.experts[t].apply(wide)
        groups[f"expected_mask{t}"] = lambda t=t: masks(merged.experts[t])
    return groups


def twin(case: Case) -> dict[str, Callable[[], StateDict]]:
    hyper, variant = case.hyper, case.variant.removesuffix("_twin")
    if variant == "lora_fixed_rank":
        return twin_lora(case)
    if variant not in methods.get("twin").variants:
        raise Unsupported(f"variant {case.variant}")
    given = {"variant": variant, "scaling": hyper.get("shared_factor", hyper.get("scaling", hyper.get("lam")))}
    given |= {"exclude": [f"^(?:{pattern})" for pattern in hyper.get("exclude", ())]}
    given["density"] = (
        1 - hyper["mask_rate"] if "mask_rate" in hyper else hyper.get("keep", hyper.get("expert_density"))
    )
    given["expert_scaling"] = hyper.get("expert_factor", 1.0)
    given |= {"weight": hyper["weight"]} if "weight" in hyper else {}
    given |= {"compression": hyper["mask_strategy"]} if "mask_strategy" in hyper else {}
    merged = merge_state_dicts("twin", case.base, case.experts, **given)

    def unscaled():  # the sum of the task vectors, merged onto zeros
        vectors = task_vectors(case)
        return merge_state_dicts("twin", zeros_like(vectors[0]), vectors, **given | {"scaling": 1.0})

    whole = merged.experts[hyper["task"]].apply(merged) if "task" in hyper else merged
    groups = {"expected": lambda: whole, "expected_shared": unscaled}
    groups["expected_infer"] = lambda: merged.with_experts(chances(case))
    for t, expert in enumerate(merged.experts):
        groups[f"expected_task{t}"] = lambda expert=expert: expert.apply(merged)
        groups[f"expected_expert{t}"] = lambda expert=expert: expert.apply(zeros_like(merged))
    return groups


def smile(case: Case) -> dict[str, Callable[[], StateDict]]:
    hyper = case.hyper
    given = {"rank": hyper["k"], "gate_rank": hyper["gate_k"], "top_k": hyper["top_k"]}
    given["gate_from"] = "difference" if hyper["routing_use_diff"] else "weights"
    merged = merge_state_dicts("smile", case.base, case.experts, **given)
    (weight,) = (name for name in case.base if name.endswith("weight"))
    bias = next((name for name in case.base if name.endswith("bias")), None)
    gate = merged.shared[weight]["gate"]

    def expert(t):  # singular vectors are defined up to their sign: the golden's u and svh are turned like ours
        part, golden = merged.experts[t].tensors[weight], case.groups[f"expected_expert{t}"]
        found = {"bias": merged.experts[t].tensors[bias].difference} if bias else {}
        if part.kind == "difference":
            return found | {"weight": part.difference}
        values = np.linalg.norm(part.left, axis=0)
        signs = np.sign(np.sum(part.right * golden["svh"], axis=1))
        found |= {"u": part.left / values * signs, "svh": part.right * (values * signs)[:, None]}
        return found | {"product": found["u"] @ found["svh"]}

    def forward():
        inputs = case.groups["aux"]["x"]
        routing = route(inputs, gate, len(case.experts), hyper["top_k"])
        parts = [expert.tensors[weight] for expert in merged.experts]
        biases = [expert.tensors[bias] if bias else None for expert in merged.experts]
        outputs = layer_forward(inputs, merged[weight], merged[bias] if bias else None, parts, biases, routing.weights)
        return {"router_logits": routing.logits, "router_prob": routing.probabilities, "y": outputs}

    def turned():  # each row up to its sign
        golden = case.groups["expected_gate"]["weight"]
        return {"weight": gate * np.sign(np.sum(gate * golden, axis=1, keepdims=True))}

    groups = {"expected_forward": forward, "expected_gate": turned}
    return groups | {f"expected_expert{t}": lambda t=t: expert(t) for t in range(len(case.experts))}


def twin_lora(case: Case) -> dict[str, Callable[[], StateDict]]:
    merged = merge_state_dicts("twin_lora", None, case.experts, scaling=case.hyper["lam"], rank=case.hyper["new_rank"])
    parts = {f"expected_expert{t}": lambda e=e: e.apply(zeros_like(merged)) for t, e in enumerate(merged.experts)}
    return {"expected": lambda: merged, **parts}


def masks(expert) -> StateDict:
    return {name: unpack_mask(part.mask, part.shape).astype(np.uint8) for name, part in expert.tensors.items()}


def shared(case: Case, method: str, given: dict[str, Any]) -> StateDict:
    """The sum of the task vectors of every floating tensor: merged onto zeros, where no rounding hides it."""
    vectors = task_vectors(case)
    return merge_state_dicts(method, zeros_like(vectors[0]), vectors, **{**given, "scaling": 1.0, "include": ANY})


def task_vectors(case: Case) -> list[StateDict]:
    base = {name: array.astype(np.float32) for name, array in case.base.items() if is_float(array)}
    return [
        {name: np.asarray(expert[name].astype(np.float32) - array) for name, array in base.items()}
        for expert in case.experts
    ]


def plain(case: Case) -> dict[str, Callable[[], StateDict]]:
    """A method whose parameters have the official names, or aliases of them."""
    return whole_weights(case, case.method, **case.hyper)


def tall_mask(case: Case) -> dict[str, Callable[[], StateDict]]:
    given = {"scaling": case.hyper["ta_scaling"], "threshold": case.hyper["tall_lambda"]}
    given["consensus"] = case.hyper["consensus_threshold"]
    vectors = task_vectors(case)

    def mask():  # where anything is left of the sum, merged onto zeros
        merged = merge_state_dicts("tall_mask", zeros_like(vectors[0]), vectors, **given)
        return {name: (array != 0).astype(np.uint8) for name, array in merged.items()}

    beside = merge_state_dicts("tall_mask", case.base, case.experts, **given, backbone="base")

    groups = whole_weights(case, "tall_mask", **given) | {"expected_consensus_mask": mask}
    for t in range(len(vectors)):
        groups[f"expected_task{t}"] = lambda t=t: beside.experts[t].apply(beside)
        groups[f"expected_mask{t}"] = lambda t=t: masks(beside.experts[t])
    return groups


def adamerging(case: Case) -> dict[str, Callable[[], StateDict]]:
    tensors = ["l1.weight", "l1.bias", "l2.weight"]  # a row of coefficients each, if not one for all

    def merged(coefficients):
        rows = np.broadcast_to(coefficients, (len(tensors), len(case.experts))).astype(float)
        weight = {
            f"expert{t}": [{"filter": name, "value": float(value)} for name, value in zip(tensors, column, strict=True)]
            for t, column in enumerate(rows.T)
        }
        return merge_state_dicts("adamerging", case.base, case.experts, weight=weight)

    return {
        "expected_init": lambda: merged(case.groups["aux"]["lambda_init"]),
        "expected": lambda: merged(case.groups["expected_scalar"]["lambda_final"]),
    }


def opcm(case: Case) -> dict[str, Callable[[], StateDict]]:
    given = {"variant": "official", "alpha": case.hyper["alpha"]}
    vectors = [{name: array.astype(np.float64) for name, array in one.items()} for one in task_vectors(case)]

    def after(count):
        return merge_state_dicts("opcm", case.base, case.experts[:count], **given)

    def coefficient(count):  # of biases, which are added up, the merge is the sum divided by it
        merged = merge_state_dicts("opcm", zeros_like(vectors[0]), vectors[:count], **given)
        biases = [name for name in merged if name.endswith("bias")]
        total = np.concatenate([sum(one[name] for one in vectors[:count]) for name in biases])
        return np.linalg.norm(total) / np.linalg.norm(np.concatenate([merged[name] for name in biases]))

    groups = whole_weights(case, "opcm", **given)
    groups["expected_scalar"] = lambda: {"lambda": np.array([coefficient(t + 1) for t in range(len(vectors))])}
    return groups | {f"expected_step{t}": lambda t=t: after(t + 1) for t in range(len(vectors))}


def doge(case: Case) -> dict[str, Callable[[], StateDict]]:
    given = {"variant": "official", "scaling": case.hyper["lam"], "density": case.hyper["K"] / 100}
    given |= {"learning_rate": case.hyper["lr"], "steps": case.hyper["iters"], "subspace": case.hyper["subspace"]}

    def shift():  # untrimmed and merged onto zeros it is a multiple of what is added to the task vectors
        vectors = [{name: array.astype(np.float64) for name, array in one.items()} for one in task_vectors(case)]
        merged = merge_state_dicts("doge", zeros_like(vectors[0]), vectors, **given | {"density": 1.0})
        shifts = {}
        for name in case.groups["expected_shift"]:
            weights = [given["scaling"] / np.linalg.norm(one[name]) for one in vectors]
            moved = sum(weight * one[name] for weight, one in zip(weights, vectors, strict=True))
            shifts[name] = (merged[name] - moved) / sum(weights)
        return shifts

    return whole_weights(case, "doge", **given) | {"expected_shift": shift}


def copa(case: Case) -> dict[str, Callable[[], StateDict]]:
    def product():
        merged = merge_state_dicts("copa", None, case.experts, **case.hyper)
        stems = {name.rpartition(".lora_")[0] for name in merged}
        return {f"{m}.delta_BA": merged[f"{m}.lora_B.weight"] @ merged[f"{m}.lora_A.weight"] for m in stems}

    return plain(case) | {"expected_product": product}


def intervmerge(case: Case) -> dict[str, Callable[[], StateDict]]:
    given = {name.lower(): array for name, array in case.groups["aux"].items() if name != "h"}
    if case.variant == "miniInterv_best_efficient":
        given["block"] = case.hyper["layer_index"]
    hidden, act = case.groups["aux"]["h"], partial(INTERVENTIONS[case.variant], **given)
    return {"expected_forward": lambda: {"h_out": at_position(hidden, case.hyper["position"], act)}}


COMPUTE = {
    "average": lambda case: whole_weights(case, "average"),
    "task_arithmetic": lambda case: whole_weights(case, "task_arithmetic", scaling=case.hyper["lam"]),
    "mergekit": mergekit,
    "breadcrumbs": breadcrumbs,
    "dare": dare,
    "ties": ties,
    "pcb": pcb,
    "copa": copa,
    "intervmerge": intervmerge,
    "fr_filter": fr_filter,
    "fr": fr,
    "free": free,
    "iso_c": plain,
    "iso_cts": plain,
    "tsvm": plain,
    "tall_mask": tall_mask,
    "emr": emr,
    "twin": twin,
    "smile": smile,
    "adamerging": adamerging,
    "opcm": opcm,
    "doge": doge,
}


def zeros_like(tensors: StateDict) -> StateDict:
    return {name: np.zeros(array.shape, array.dtype) for name, array in tensors.items()}


# ---- comparison


def is_float(array: np.ndarray) -> bool:
    return array.dtype.kind in "fV"  # ml_dtypes' bfloat16 is of kind V


def compare(case: Case) -> Result:
    result = Result()
    computed = compute(case)
    wanted = [group for group in case.groups if group.startswith("expected") and (case.method, group) not in LATER]
    if missing := [group for group in wanted if group not in computed]:
        raise Unsupported(f"group {', '.join(missing)}")
    for group in wanted:
        _compare_group(case, group, computed[group](), result)
    return result


def _compare_group(case: Case, group: str, computed: StateDict, result: Result) -> None:
    kind = re.sub(r"\d+$", "", group)
    for name, golden in case.groups[group].items():
        label = f"{group}/{name}"
        if name not in computed or computed[name].shape != golden.shape:
            result.problems.append(f"{label} is missing or of another shape")
        elif not is_float(golden):
            if not np.array_equal(computed[name], golden):
                result.problems.append(f"{label} differs")
        else:
            _compare_floats(case, kind, label, name, computed[name], golden, result)


def _compare_floats(
    case: Case, kind: str, label: str, name: str, computed: np.ndarray, golden: np.ndarray, result: Result
) -> None:
    # scalars of the official code come out of arithmetic in the storage dtype
    rounded = case.storage if kind == "expected_scalar" else golden.dtype
    rtol = max(RTOL.get((case.method, kind), 1e-6), ROUNDING.get(rounded, 0.0))
    ours, theirs = computed.astype(np.float64), golden.astype(np.float64)
    if not np.all(np.isfinite(ours) == np.isfinite(theirs)):
        result.problems.append(f"{label}: not finite")
        return
    error, size = _max(ours - theirs), _max(theirs)
    precise = case.groups.get(label.split("/")[0].replace("expected", "expected_hp"), {}).get(name)
    # what the official code's own roundings to the storage dtype cost it is not asked of us
    drift = _max(theirs - precise) if precise is not None else 0.0
    share = error / (rtol * size + drift or 1e-12)
    result.absolute = max(result.absolute, error)
    if share >= result.share:
        result.share, result.relative, result.rtol = share, (error / size if size else 0.0), rtol
    if share > 1:
        result.problems.append(f"{label} is off by {error:.1e}")
    exact = golden.dtype not in ROUNDING and precise is None and kind in WEIGHTS and case.base is not None
    if exact and name in case.base and case.base[name].shape == golden.shape:
        start = case.base[name].astype(np.float64)
        allowed = 3e-7 * _max(start) + 2e-4 * _max(theirs - start)
        update_share = _max((ours - start) - (theirs - start)) / (allowed or 1e-12)
        result.update_share = max(result.update_share, update_share)
        if update_share > 1:
            result.problems.append(f"the update of {label} is off by {update_share:.1f} times what is allowed")


def _max(values: np.ndarray) -> float:
    return float(np.max(np.abs(values), initial=0.0))


def report(path: Path) -> str:
    """Print the line of one case; pass, fail or unsupported."""
    case = read_case(path)
    title = f"{case.method:<16} {case.variant:<20} {path.stem:<26}"
    try:
        result = compare(case)
    except Unsupported as reason:
        print(f"{title} unsupported: {reason}")
        return "unsupported"
    verdict = "fail" if result.problems else "pass"
    errors = f"abs {result.absolute:.1e}  rel {result.relative:.1e} of {result.rtol:.0e}"
    print(f"{title} {errors}  update {result.update_share:6.1%}  {': '.join([verdict, *result.problems[:1]])}")
    return verdict


def main(arguments: list[str]) -> int:
    folder = Path(arguments[0]) if arguments else Path(__file__).parent / "goldens"
    verdicts = [report(path) for path in sorted(folder.rglob("*.safetensors"))]
    print(", ".join(f"{verdicts.count(verdict)} {verdict}" for verdict in ("pass", "fail", "unsupported")))
    return 1 if "fail" in verdicts or not verdicts else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

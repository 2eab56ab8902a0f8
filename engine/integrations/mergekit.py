"""Methods of freemerge inside mergekit (0.1.5 or later), under their own names, for recipes that mergekit runs.

    python -m freemerge.integrations.mergekit recipe.yml out [options of mergekit-yaml]

is `mergekit-yaml` where `merge_method` may also be `fr`, `free` and `pcb`; a program that calls mergekit has them after
`import freemerge.integrations.mergekit`. Parameters have freemerge's names, aliases and defaults (`freemerge methods
fr`), and a `variant` can be named; filters and gradients are mergekit's. Patterns, such as `exclude`, are one regular
expression each. mergekit passes over parameters that it does not know in silence.

mergekit hands over one tensor at a time, and has no place for anything beside the model. So here

    fr      is the same, tensor for tensor
    free    writes the backbone alone, without experts
    pcb     clips and selects within each tensor, by order statistics of its own; in freemerge, as in the paper, the
            entries of the whole model compete

and a merge takes as long as mergekit reads and writes. `freemerge merge recipe.yml out` runs the same recipe without
these differences.
"""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, Literal

from freemerge import methods
from freemerge.api import merge_state_dicts
from freemerge.errors import UnavailableError
from freemerge.methods import Method, Parameter
from freemerge.methods._sparse_expert import SparseExpert

try:
    from mergekit.merge_methods.base import (
        BasePolicy,
        FunctionalGroupMergeMethod,
        InputContract,
        MergeMethodSpec,
        OptionalTensorPolicy,
        ParameterScope,
        ParameterSpec,
        TensorGroup,
    )
    from mergekit.merge_methods.registry import register, registered_methods
except ImportError as error:
    raise UnavailableError(f"mergekit 0.1.5 or later is needed ({error}); pip install mergekit") from error

PAPERS = {
    "fr": "https://arxiv.org/abs/2411.16815",
    "free": "https://arxiv.org/abs/2411.16815",
    "pcb": "https://arxiv.org/abs/2410.02396",
}
OF_EXPERTS = {field.name for field in fields(SparseExpert)}  # parameters of what mergekit has no place for
WITHOUT_EXPERTS = {"density": 0.0, "rescale": 1.0}
KINDS = {"number": float, "integer": int, "flag": bool, "patterns": str}


def add_methods() -> None:
    """Register the methods with mergekit; what is registered already stays."""
    known = {method.spec.name for method in registered_methods()}
    for name in PAPERS.keys() - known:
        register(in_mergekit(methods.get(name)))


def in_mergekit(method: Method) -> FunctionalGroupMergeMethod:
    """The method as mergekit calls it: with tensors of one name."""
    offered = _offered(method)
    spec = MergeMethodSpec(
        name=method.name,
        parameters=[_parameter(name, offered[target]) for name, target in _names(method, offered).items()]
        + [ParameterSpec("variant", Literal[tuple(method.variants)] | None, ParameterScope.SHARED, None)],
        contract=InputContract(base=BasePolicy.REQUIRED, min_non_base=1),
        pretty_name=f"{method.name} (freemerge)",
        reference_url=PAPERS[method.name],
        optional_tensor_policy=OptionalTensorPolicy.PASSTHROUGH_BASE_SINGLETON,
    )

    def merge(group: TensorGroup, **given: Any):
        settings = _settings(method, offered, given, [entry.id for entry in group.non_base])
        name = group.metadata.name or "tensor"
        base, *experts = ({name: entry.tensor.detach().contiguous()} for entry in (group.base, *group.non_base))
        return merge_state_dicts(method.name, base, experts, **settings)[name]

    return FunctionalGroupMergeMethod(spec, merge)


def _offered(method: Method) -> dict[str, Parameter]:
    """Parameters that mean something to one tensor, all of one shape."""
    left_out = {"crop", *(OF_EXPERTS if method.writes_experts else ())}
    return {name: parameter for name, parameter in method.parameters.items() if name not in left_out}


def _names(method: Method, offered: Mapping[str, Parameter]) -> dict[str, str]:
    """What a recipe may call them -> their names."""
    return {name: name for name in offered} | {name: to for name, to in method.aliases.items() if to in offered}


def _parameter(name: str, parameter: Parameter) -> ParameterSpec:
    """Not given is None, so that a variant's presets hold."""
    if parameter.kind == "choice":
        kind = Literal[parameter.choices]
    elif parameter.kind == "number-or-choice":
        kind = float | Literal[parameter.choices]
    else:
        kind = KINDS[parameter.kind]
    scope = ParameterScope.NON_BASE if parameter.per_expert else ParameterScope.SHARED
    return ParameterSpec(name, kind | None, scope, None, parameter.help)


def _settings(
    method: Method, offered: Mapping[str, Parameter], given: Mapping[str, Any], experts: Sequence[Any]
) -> dict[str, Any]:
    """Of what mergekit resolved for a tensor, what was given, as merge_state_dicts takes it."""
    settings = dict(WITHOUT_EXPERTS) if method.writes_experts else {}
    for name, target in _names(method, offered).items():
        value = given[name]
        if offered[target].per_expert:
            numbers = [value[expert] for expert in experts]
            default = offered[target].default
            value = None
            if any(number is not None for number in numbers):
                value = [default if number is None else number for number in numbers]
        if value is not None:
            settings[target] = value
    return settings | ({"variant": given["variant"]} if given["variant"] else {})


def main() -> None:
    """`mergekit-yaml` with these methods."""
    from mergekit.scripts.run_yaml import main as run

    run(prog_name="python -m freemerge.integrations.mergekit")


add_methods()
if __name__ == "__main__":
    main()

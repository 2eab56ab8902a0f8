"""Methods of freemerge inside mergekit (0.1.5 or later), under their own names, for recipes that mergekit runs.

    python -m freemerge.integrations.mergekit recipe.yml out [options of mergekit-yaml]

is `mergekit-yaml` where `merge_method` may also be `fr`, `free`, `emr` and `pcb`; a program that calls mergekit has
them after `import freemerge.integrations.mergekit`. Parameters have freemerge's names, aliases and defaults (`freemerge
methods fr`), and a `variant` can be named; filters and gradients are mergekit's. Patterns, such as `exclude`, are one
regular expression each. mergekit passes over parameters that it does not know in silence.

mergekit hands over one tensor at a time, and has no place for anything beside the model. So here

    fr      is the same, tensor for tensor
    free    writes the backbone alone, without experts
    emr     writes the base plus the unified vector, without masks (in freemerge: `backbone: unified`)
    pcb     clips and selects within each tensor, by order statistics of its own; in freemerge, as in the paper, the
            entries of the whole model compete

and a merge takes as long as mergekit reads and writes. `freemerge merge recipe.yml out` runs the same recipe without
these differences.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from freemerge import methods
from freemerge.errors import UnavailableError
from freemerge.methods import Method, Parameter
from freemerge.methods._sparse_expert import SparseExpert
from freemerge.state_dicts import merge_state_dicts

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


@dataclass(frozen=True)
class Inside:
    """A method as it is in mergekit: parameters that mean nothing there, and what they are instead."""

    paper: str
    left_out: frozenset[str] = frozenset({"crop"})  # mergekit refuses shapes that differ
    instead: Mapping[str, Any] = field(default_factory=dict)


METHODS = {
    "fr": Inside("https://arxiv.org/abs/2411.16815"),
    "free": Inside(
        "https://arxiv.org/abs/2411.16815",
        frozenset({"crop", *(one.name for one in fields(SparseExpert))}),
        {"density": 0.0, "rescale": 1.0},
    ),
    "emr": Inside("https://arxiv.org/abs/2405.17461", frozenset({"means", "backbone"}), {"backbone": "unified"}),
    "pcb": Inside("https://arxiv.org/abs/2410.02396"),
}
KINDS = {"number": float, "integer": int, "flag": bool, "patterns": str}


def add_methods() -> None:
    """Register the methods with mergekit; what is registered already stays."""
    known = {method.spec.name for method in registered_methods()}
    for name in METHODS.keys() - known:
        register(in_mergekit(methods.get(name)))


def in_mergekit(method: Method) -> FunctionalGroupMergeMethod:
    """The method as mergekit calls it: with tensors of one name."""
    inside = METHODS[method.name]
    offered = {name: parameter for name, parameter in method.parameters.items() if name not in inside.left_out}
    parameters = [_parameter(name, offered[target]) for name, target in _names(method, offered).items()]
    if variants := _variants(method, offered):
        parameters.append(ParameterSpec("variant", Literal[variants] | None, ParameterScope.SHARED, None))
    spec = MergeMethodSpec(
        name=method.name,
        parameters=parameters,
        contract=InputContract(base=BasePolicy.REQUIRED, min_non_base=1),
        pretty_name=f"{method.name} (freemerge)",
        reference_url=inside.paper,
        optional_tensor_policy=OptionalTensorPolicy.PASSTHROUGH_BASE_SINGLETON,
    )

    def merge(group: TensorGroup, **given: Any):
        settings = _settings(method, offered, given, [entry.id for entry in group.non_base])
        name = group.metadata.name or "tensor"
        base, *experts = ({name: entry.tensor.detach().contiguous()} for entry in (group.base, *group.non_base))
        return merge_state_dicts(method.name, base, experts, **settings)[name]

    return FunctionalGroupMergeMethod(spec, merge)


def _variants(method: Method, offered: Mapping[str, Parameter]) -> tuple[str, ...]:
    """Those that preset something of what is offered."""
    return tuple(name for name, presets in method.variants.items() if presets.keys() & offered.keys())


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
    settings = dict(METHODS[method.name].instead)
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
    return settings | ({"variant": given["variant"]} if given.get("variant") else {})


def main() -> None:
    """`mergekit-yaml` with these methods."""
    from mergekit.scripts.run_yaml import main as run

    run(prog_name="python -m freemerge.integrations.mergekit")


add_methods()
if __name__ == "__main__":
    main()

"""The merge methods, one module each: the registry, and the contract of a method module.

A method module `engine/methods/<name>.py` is found by its name. It holds

    \"\"\"First line: what it does, shown by `freemerge methods`.\"\"\"
    SCOPE       "element" (any contiguous run of elements can be merged alone), "tensor" (needs whole tensors) or
                "model" (needs to know something of all tensors first)
    SOURCE      paper and section of METHODS.md
    USES_BASE   False for a method that never looks at the base (optional, True)
    BASE_OPTIONAL  True for one that does without a base if none is given: `base` is None then (optional, False)
    MERGES_ADAPTERS  True for one that merges the tensors of LoRA adapters, not of models (optional, False)
    VARIANTS    name of a variant -> the parameters it presets (optional)
    ALIASES     other names of parameters a recipe may use -> the parameter (optional; mergekit's `lambda`)

    def merge_tensor(base, experts, *, name, <parameters>, out) -> None

`name` is the tensor's name. `base` and `experts` are contiguous float arrays of one shape, of any rank (0-d and
zero-size included); `out` is like them. Parameters are keyword-only, annotated, with defaults, and explained in the
`Args:` section of merge_tensor's docstring. Annotations are float, int, bool, `Literal[...]` of words,
`float | Literal[...]`, and

    Patterns    regular expressions searched in tensor names (see `matches`)
    PerExpert   one number for each expert: merge_tensor gets a tuple of T; a recipe may give one number for all
    ... | None  not given is None; of a PerExpert, given for all experts or for none

Optional hooks, called with every parameter by its name (`**params`):

    plan_tensor(name, shape, *, experts, **params) -> TensorPlan
        What merge_tensor will do, for `--dry-run` and the memory limit; `experts` is their number.
    fit_expert(name, shape, expert_shape, **params) -> "crop" | "skip" | None
        An expert's tensor of another shape than the base's: take [:H, :W] of it; leave this expert out (merge_tensor
        gets None in its place); or None: it is an error.

A method of scope "model" is called before anything is merged, for every merged tensor, SWEEPS (1) times:

    measure_tensor(base, experts, *, name, **params) -> np.ndarray
        Numbers of one tensor, few of them; from the second sweep on with settled=..., of the sweep before. NaN or Inf
        among them ends the merge.
    settle(statistics, **params) -> Any
        After each sweep: what follows from the arrays of all tensors, by name; from the second sweep on with
        settled=..., of the sweep before. merge_tensor gets the last as settled=... It is the same on every device.
    is_settled(settled) -> bool
        Optional: no further sweep is needed; SWEEPS is the most there are.

A method of scope "model" that takes experts one after the other can keep a state (KEEPS_STATE), so that some can be
added later (running_state.py). Its measure_tensor and merge_tensor also get, each None where there is none,

    earlier     float32, like `base`: what measure_tensor kept of the experts before these
    kept        float32, like `base`: where measure_tensor writes what it keeps, and merge_tensor finds it

and its settle gets the numbers of the experts before, earlier=..., as they were answered by

    state_facts(settled) -> dict
        Numbers to keep beside the arrays, JSON-able.

A method that writes experts (WRITES_EXPERTS; of scope "element" or "tensor") also has these. What an expert holds of a
tensor is a part (freemerge.parts: sparse rows, a mask, a low-rank product, a difference). `expert` arrays are in their
storage dtype, `merged` is the backbone's tensor in the dtype it is stored in.

    plan_expert(name, shape, dtype, **params) -> Layout | None
        What one expert's part of this tensor looks like, `dtype` the base's (expert_scope "model": at most). None: the
        tensor is not in its file.
    cut_experts(base, merged, experts, *, name, within=None, **params) -> Cut
        The parts, unscaled; what they share; and statistics, sums for the scale. Of any merged or copied floating
        tensor, parts None where plan_expert is; experts[t] is None where fit_expert left it out. within[t] is this
        tensor's selection, expert_scope "model" only.

and may have

    DESCRIBED   names of the parameters that go into the metadata of experts, of those that hold for the whole model
    leaves_experts(**params) -> bool
        Whether a merge with these parameters, of which some may be missing, leaves experts at all (True).
    plan_shared(name, shape, dtype, *, experts, **params) -> {role: (dtype, shape)}
        The arrays that all experts share about this tensor, `dtype` the result's ({}); a mask's is "vector".
    expert_scale(statistics, **params) -> float
        mu, from one expert's dicts of all tensors (1).
    tensor_scale(mu, name, shape, **params) -> float
        What this tensor's part is multiplied by when it is applied (mu).
    expert_mode(**params) -> "add" | "replace"
        theta = merged + scale * part; or, of rows, theta = base + scale * value wherever value is not 0 ("add").
    expert_scope(**params) -> "row" | "tensor" | "model"
        What the selected entries compete with ("tensor").
    select_over_model(bases, merged, experts, **params) -> list[tuple[Selection, Layout]]
        Scope "model" only, for one expert: the arrays of all the tensors it covers. For each its selection, and the
        layout that follows from it.
"""

import ast
import difflib
import importlib
import inspect
import pkgutil
import re
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

from freemerge.errors import RecipeError

__all__ = ["Method", "Parameter", "Patterns", "PerExpert", "TensorPlan", "get", "matches", "names", "summaries"]

PerExpert: TypeAlias = Annotated[float | tuple[float, ...], "one number for each expert"]
Patterns: TypeAlias = Annotated[tuple[str, ...], "regular expressions searched in tensor names"]


@dataclass(frozen=True)
class Parameter:
    """One parameter of a method, read from the signature of its merge_tensor."""

    name: str
    default: Any
    kind: Literal["number", "integer", "flag", "choice", "patterns", "number-or-choice"]
    per_expert: bool
    choices: tuple[str, ...]
    help: str


@dataclass(frozen=True)
class Method:
    name: str
    summary: str
    scope: Literal["element", "tensor", "model"]
    sweeps: int  # over all tensors before the first is merged
    source: str
    uses_base: bool
    base_optional: bool
    merges_adapters: bool
    writes_experts: bool
    keeps_state: bool
    variants: Mapping[str, Mapping[str, Any]]
    aliases: Mapping[str, str]
    parameters: Mapping[str, Parameter]
    module: types.ModuleType

    def leaves_experts(self, parameters: Mapping[str, Any]) -> bool:
        """Whether a merge with these parameters writes experts beside its backbone."""
        hook = getattr(self.module, "leaves_experts", None)
        return self.writes_experts and (hook is None or hook(**parameters))

    @property
    def ops(self) -> set[str]:
        """The ops of freemerge.kernels it is made of, its own and those of the helpers it shares with others."""
        return _ops(self.module)


@dataclass(frozen=True)
class TensorPlan:
    """What merge_tensor does with one tensor.

    Args:
        action: "copy" if the result is the base's tensor.
        transform: in words.
        workspace: bytes of memory needed beside inputs and output.
        cost: nanoseconds of one core.
        elementwise: any contiguous run of its elements can be merged alone, whatever the method's scope.
    """

    action: Literal["merge", "copy"]
    transform: str = ""
    workspace: int = 0
    cost: float = 0.0
    elementwise: bool = False


def names() -> list[str]:
    """All methods, sorted. Imports none of them."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))


def summaries() -> dict[str, str]:
    """Name -> first docstring line of each method, read without importing any."""
    texts = {name: (Path(__file__).parent / f"{name}.py").read_text("utf-8") for name in names()}
    return {name: _first_line(ast.get_docstring(ast.parse(text))) for name, text in texts.items()}


@cache
def get(name: str) -> Method:
    """The method of this name.

    Raises:
        RecipeError: there is no such method; the message names the nearest.
    """
    known = names()
    if name not in known:
        raise RecipeError(f"unknown method {name!r}; {_nearest(name, known)}")
    module = importlib.import_module(f"{__name__}.{name}")
    return Method(
        name=name,
        summary=_first_line(module.__doc__),
        scope=module.SCOPE,
        sweeps=getattr(module, "SWEEPS", 1) if module.SCOPE == "model" else 0,
        source=module.SOURCE,
        uses_base=getattr(module, "USES_BASE", True),
        base_optional=getattr(module, "BASE_OPTIONAL", False),
        merges_adapters=getattr(module, "MERGES_ADAPTERS", False),
        writes_experts=getattr(module, "WRITES_EXPERTS", False),
        keeps_state=getattr(module, "KEEPS_STATE", False),
        variants=getattr(module, "VARIANTS", {}),
        aliases=getattr(module, "ALIASES", {}),
        parameters=_parameters(module.merge_tensor),
        module=module,
    )


@cache
def _pattern(patterns: tuple[str, ...]) -> re.Pattern[str]:
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise RecipeError(f"{pattern!r} is not a regular expression: {error}") from None
    return re.compile("|".join(f"(?:{pattern})" for pattern in patterns))


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether one of the regular expressions is found anywhere in the tensor's name; False for no pattern."""
    return bool(patterns) and _found(name, tuple(patterns))


@lru_cache(maxsize=1 << 14)  # a search asks the same of the same names for each of its merges
def _found(name: str, patterns: tuple[str, ...]) -> bool:
    return _pattern(patterns).search(name) is not None


def _ops(module: types.ModuleType) -> set[str]:
    found = set()
    for value in list(vars(module).values()):
        package, _, owner = (getattr(value, "__module__", None) or "").rpartition(".")
        if package == "freemerge.kernels" and owner == getattr(value, "__name__", None):
            found.add(owner)
        elif package == __name__ and owner.startswith("_") and owner != module.__name__.rpartition(".")[2]:
            found |= _ops(sys.modules[f"{package}.{owner}"])
    return found


def _first_line(docstring: str | None) -> str:
    return (docstring or "").strip().split("\n", 1)[0]


def _nearest(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]}?" if close else f"there are {', '.join(known)}"


def _parameters(merge_tensor) -> dict[str, Parameter]:
    annotations = typing.get_type_hints(merge_tensor, include_extras=True)
    helps = _argument_helps(inspect.getdoc(merge_tensor) or "")
    return {
        p.name: _parameter(p.name, p.default, annotations[p.name], helps.get(p.name, ""))
        for p in inspect.signature(merge_tensor).parameters.values()
        if p.kind is p.KEYWORD_ONLY and p.name not in ("name", "settled", "earlier", "kept", "out")
    }


def _parameter(name: str, default: Any, annotation: Any, text: str) -> Parameter:
    union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    plain = [a for a in typing.get_args(annotation) if a is not type(None)] if union else [annotation]
    choices = tuple(choice for a in plain if typing.get_origin(a) is Literal for choice in typing.get_args(a))
    if Patterns in plain:
        kind = "patterns"
    elif choices:
        kind = "choice" if len(plain) == 1 else "number-or-choice"
    else:
        kind = {bool: "flag", int: "integer"}.get(plain[0], "number")
    return Parameter(name, default, kind, PerExpert in plain, choices, text)


def _argument_helps(docstring: str) -> dict[str, str]:
    """Argument -> text of the Args section, continuation lines joined."""
    section = re.search(r"^Args:\n(.*?)(?=^\S|\Z)", docstring, re.MULTILINE | re.DOTALL)
    helps: dict[str, str] = {}
    for line in inspect.cleandoc(section[1]).splitlines() if section else []:
        if match := re.match(r"(\w+): (.*)", line):
            current, helps[match[1]] = match[1], match[2]
        elif line.strip():
            helps[current] += " " + line.strip()
    return helps

"""Where the tensors of a checkpoint lie in a module: by name, by the name transformers gives it, behind one prefix."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from freemerge.attached.renamed import renamed
from freemerge.checkpoint.dtypes import NAMES
from freemerge.errors import InputError, listed
from freemerge.kernels.array import dtype_of

REMEDY = (
    "Attach experts to the model of the checkpoint they were merged with: the same class, not quantized, its "
    "projections not fused; or load what `freemerge experts apply` writes."
)


@dataclass(frozen=True)
class Place:
    """A tensor of the model: the modules that own it (several where it is tied) and its name in each.

    The tensor is looked up anew each time, as `.to(device)` may put another one there.
    """

    name: str
    owners: tuple[tuple[Any, str], ...]

    @property
    def tensor(self):
        module, name = self.owners[0]
        found = module._parameters.get(name)
        return module._buffers[name] if found is None else found


def find_places(model, shapes: Mapping[str, tuple[int, ...]], label: str) -> dict[str, Place]:
    """Where each tensor of `shapes` (name -> shape) lies in `model`.

    Names are matched as they are; where some have no match, as transformers renames them when it loads this model; and
    those that have none then, with one prefix put in front of all of them or taken away from all of them (transformers'
    `model.`, `bert.`, ...).

    Args:
        label: what the names are from, for messages.

    Raises:
        InputError: with everything that has no place, or not one of its shape.
    """
    owners, tensors = _owners(model)
    names, converted = _located(model, shapes, tensors)
    problems = []
    for name, shape in shapes.items():
        if name not in names and name in converted:
            problems.append(f"{name}: in {label}, but the model has it fused or turned, in {converted[name]}")
        elif name not in names:
            problems.append(f"{name}: in {label}, but not in the model{_nearest(name, tensors)}")
        elif why := _unfit(tensors[names[name]], shape):
            problems.append(f"{name}: {why}")
    if problems:
        raise InputError(listed(problems, REMEDY, outcome="nothing was changed"))
    return {name: Place(name, tuple(owners[_identity(tensors[names[name]])])) for name in shapes}


def tied(places: Mapping[str, Place]) -> dict[str, str]:
    """The names that lie in the same place as one before, and that one."""
    first: dict[Any, str] = {}
    same = {name: first.setdefault(tuple((id(m), n) for m, n in place.owners), name) for name, place in places.items()}
    return {name: other for name, other in same.items() if name != other}


def _owners(model) -> tuple[dict, dict[str, Any]]:
    """Owners by the identity of the tensor, and every tensor by each of its names."""
    owners: dict[Any, list] = {}
    tensors: dict[str, Any] = {}
    seen = set()
    for path, module in model.named_modules(remove_duplicate=False):
        for own in (module._parameters, module._buffers):
            for name, tensor in own.items():
                if tensor is None:
                    continue
                tensors[f"{path}.{name}" if path else name] = tensor
                if (id(module), name) not in seen:
                    seen.add((id(module), name))
                    owners.setdefault(_identity(tensor), []).append((module, name))
    return owners, tensors


def _identity(tensor) -> Any:
    """The same for tensors that are one: the same memory seen in the same way."""
    if type(tensor).__module__.startswith("torch") and tensor.device.type != "meta" and tensor.numel():
        return tensor.device, tensor.data_ptr(), tuple(tensor.shape), tensor.stride()
    return id(tensor)


def _located(model, wanted: Mapping[str, Any], tensors: Mapping[str, Any]) -> tuple[dict[str, str], dict[str, str]]:
    """The model's name of each wanted tensor that has one; and into what transformers converted others."""
    exact = _matched(wanted, tensors)
    if len(exact) == len(wanted):
        return exact, {}
    others, converted = renamed(model, wanted)
    others = {name: other for name, other in others.items() if name not in converted}
    found = _matched(others.values(), tensors)
    by_rule = {name: found[other] for name, other in others.items() if other in found}
    return max(exact, by_rule, key=len), converted


def _matched(wanted: Iterable[str], found: Mapping[str, Any]) -> dict[str, str]:
    """The model's name of each wanted tensor that has one; where one has none, of as many as one rule finds."""
    exact = {name: name for name in wanted if name in found}
    missing = [name for name in wanted if name not in found]
    if not missing:
        return exact
    rules = [_rule(missing, add=prefix) for prefix in _prefixes(missing[0], found)]
    rules += [_rule(missing, take=prefix) for prefix in _heads(missing[0])]
    taken = set(exact.values())
    fitting = [r for r in rules if all(to in found and to not in taken for to in r.values())]
    if len(fitting) > 1:
        raise InputError(
            f"{missing[0]} has several places in the model: {', '.join(r[missing[0]] for r in fitting)}. {REMEDY}"
        )
    if fitting:
        return exact | fitting[0]
    # nothing fits all of them: of what fits most, the others are the ones to tell of
    rules += [_rule(missing, add=prefix) for prefix in _prefixes(missing[-1], found)]
    rules += [_rule(missing, take=prefix) for prefix in {_heads(name)[0] for name in missing if _heads(name)}]
    partly = ({n: to for n, to in rule.items() if to in found and to not in taken} for rule in rules)
    return exact | max(partly, key=len, default={})


def _rule(names: Iterable[str], *, add: str = "", take: str = "") -> dict[str, str]:
    """Every name with one prefix more, or one less."""
    return {name: add + name.removeprefix(take) for name in names}


def _prefixes(name: str, found: Iterable[str]) -> list[str]:
    return [other.removesuffix(name) for other in found if other.endswith(f".{name}")]


def _heads(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:i]) + "." for i in range(1, len(parts))]


def _nearest(name: str, tensors: Iterable[str]) -> str:
    from difflib import get_close_matches

    near = get_close_matches(name, list(tensors), n=1, cutoff=0.5)
    return f" (nearest: {near[0]})" if near else ""


def _unfit(tensor, shape: tuple[int, ...]) -> str | None:
    if tuple(tensor.shape) != tuple(shape):
        return f"{list(shape)} in the expert, {list(tensor.shape)} in the model"
    if tensor.is_meta or tensor.is_quantized or str(tensor.layout) != "torch.strided":
        return f"a {type(tensor).__name__} ({tensor.layout}, on {tensor.device}) in the model, not a plain dense tensor"
    if not tensor.is_floating_point() or dtype_of(tensor) not in NAMES:
        return f"{tensor.dtype} in the model, not a float type"
    return None

"""Values as flags and calls give them, for all experts or for each: brought to where a recipe has them."""

from collections.abc import Mapping, Sequence

from freemerge import methods
from freemerge.recipe.names import named_experts
from freemerge.schema import nearest


def share_out(method: str, parameters: dict, models: list[dict]) -> tuple[dict, list[str]]:
    """Move values meant for single experts to their entries; answer what is left for all, and the problems."""
    known = methods.get(method).parameters
    shared, problems = {}, []
    for key, value in parameters.items():
        per_expert = key in known and known[key].per_expert
        if isinstance(value, Mapping) and not {"value"} <= set(value):
            problems += _by_name(key, value, models)
        elif per_expert and isinstance(value, (list, tuple)) and not any(isinstance(item, Mapping) for item in value):
            problems += _in_order(key, value, models)
        else:
            shared[key] = list(value) if isinstance(value, tuple) else value
    return shared, problems


def _by_name(key: str, values: Mapping, models: list[dict]) -> list[str]:
    names = named_experts([(entry["name"], entry["model"]) for entry in models])
    for entry, name in zip(models, names, strict=True):
        entry["name"] = name
    entries = dict(zip(names, models, strict=True))
    for name, value in values.items():
        if name in entries:
            entries[name]["parameters"][key] = value
    return [f"{key}: no expert is called {name!r}{nearest(name, entries)}" for name in values if name not in entries]


def _in_order(key: str, values: Sequence, models: list[dict]) -> list[str]:
    if len(values) != len(models):
        return [f"{key}: {len(values)} numbers for {len(models)} experts; give one for all or one for each"]
    for entry, value in zip(models, values, strict=True):
        entry["parameters"][key] = value
    return []

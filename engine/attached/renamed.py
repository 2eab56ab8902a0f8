"""Names of a checkpoint's tensors in a transformers model that was loaded from it under others (ViT, GPT-NeoX, ...)."""

import sys
from collections.abc import Iterable
from typing import Any


def renamed(model: Any, names: Iterable[str]) -> tuple[dict[str, str], dict[str, str]]:
    """What `from_pretrained` makes of a checkpoint's names, by transformers' own rules for this model.

    Returns:
        name -> the model's name, of every one; and of those that are converted (fused with others, split, turned),
        name -> the tensor they go into. Both are empty where transformers has no rules, or is not what made the model.
    """
    rules = _rules(model)
    found, converted = {}, {}
    for name in sorted(names) if rules else ():  # in the order of loading, which some rules go by
        renamings, converters = rules
        found[name] = name
        for rule in renamings:
            found[name] = rule.rename_source_key(found[name])[0]
        into = next((into for rule in converters if (into := rule.rename_source_key(found[name]))[1] is not None), None)
        if into is not None:
            converted[name] = into[0]
    return found, converted


def _rules(model: Any) -> tuple[list, list] | None:
    """Those that rename, and those that convert."""
    transformers = sys.modules.get("transformers")
    if transformers is None:
        return None
    made = next((m for m in model.modules() if isinstance(m, transformers.PreTrainedModel)), None)
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming
    except ImportError:  # before transformers 5, which has the modules of its checkpoints
        return None
    if made is None:
        return None
    rules = get_model_conversion_mapping(made)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    return renamings, [rule for rule in rules if not isinstance(rule, WeightRenaming)]

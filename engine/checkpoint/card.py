"""What lies beside the weights of a result: configuration, tokenizer, and README.md, the model card.

The card depends on recipe and inputs alone: no dates, no directories of this machine, so equal merges are equal
directories.
"""

import json
import shlex
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from freemerge import __version__
from freemerge.checkpoint.dtypes import NAMES
from freemerge.checkpoint.manifest import MANIFEST, MergeInput
from freemerge.checkpoint.reader import Checkpoint
from freemerge.checkpoint.tokenizer import PREFIXES, Tokenizer
from freemerge.checkpoint.writer import write_file

CARD = "README.md"
SEE_INPUTS = "see-inputs"  # the name of the license of a merge whose inputs do not share one
# What transformers calls the dtypes of weights.
TORCH_NAMES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
}


def copy_side_files(
    checkpoint: Checkpoint,
    folder: Path,
    dtype: np.dtype | None = None,
    tokenizer: Tokenizer | None = None,
    config: dict | None = None,
) -> None:
    """Copy configuration, generation config, tokenizer and chat template into `folder`.

    Where config.json names a dtype, it names `dtype` then, the output's. Tokenizer and chat template are those of
    `tokenizer`, if given, and what config.json says is `config`.
    """
    for path in checkpoint.side_files():
        if tokenizer is not None and path.name.startswith(PREFIXES):
            continue
        data = path.read_bytes()
        if path.name == "config.json" and config is not None:
            data = _encoded(config)
        if path.name == "config.json" and dtype is not None:
            data = _with_dtype(data, TORCH_NAMES.get(NAMES[np.dtype(dtype)]))
        write_file(folder / path.name, data)
    if tokenizer is not None:
        tokenizer.write(folder)


def _with_dtype(data: bytes, name: str | None) -> bytes:
    config = json.loads(data)
    changed = _set_dtype(config, name) if name else False
    return _encoded(config) if changed else data


def _encoded(config: dict) -> bytes:
    return (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()


def _set_dtype(config: dict, name: str) -> bool:
    """Set every torch_dtype or dtype of a configuration and of its parts (text_config, ...); was there another?"""
    changed = False
    for key, value in config.items():
        if isinstance(value, dict):
            changed |= _set_dtype(value, name)
        elif key in ("torch_dtype", "dtype") and value in TORCH_NAMES.values() and value != name:
            config[key] = name
            changed = True
    return changed


def write_card(
    folder: Path,
    *,
    method: str,
    recipe: str,
    inputs: Sequence[MergeInput],
    experts: Sequence[str] = (),
    library: str = "transformers",
    command: Sequence[str] = ("freemerge", "merge", "recipe.yml", "OUT"),
) -> None:
    """Write the model card README.md.

    Args:
        recipe: YAML text.
        experts: names of the experts in experts/.
        library: what loads the result.
        command: reproduces the result; recipe.yml in it stands for `recipe`.
    """
    import yaml

    licenses = {item.license for item in inputs}
    shared = len(licenses) == 1 and not licenses & {None, SEE_INPUTS}
    front: dict[str, object] = {
        "base_model": list(dict.fromkeys(name.partition("@")[0] for item in inputs for name in item.models)),
        "library_name": library,
        "tags": ["merge", "freemerge"],
        **({"license": licenses.pop()} if shared else {"license": "other", "license_name": SEE_INPUTS}),
    }
    from_recipe = " from the recipe, saved as recipe.yml" if "recipe.yml" in command else ""
    sections = [
        f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---\n",
        f"# {method} merge of {', '.join(item.name for item in inputs)}\n",
        f"Made by freemerge {__version__} with the method `{method}`.\n",
        "" if shared else _license_section(inputs),
        _expert_section(experts) if experts else "",
        f"## Recipe\n\n```yaml\n{recipe.rstrip()}\n```\n",
        f"This command makes it again{from_recipe}:\n\n    {shlex.join(command)}\n",
        f"`freemerge verify OUT` compares every tensor with the checksums in `{MANIFEST}`.\n",
    ]
    write_file(folder / CARD, "\n".join(section for section in sections if section).encode())


def _license_section(inputs: Sequence[MergeInput]) -> str:
    lines = [f"- {item.name} ({item.role}): {item.license or 'none stated'}" for item in inputs]
    return "\n".join(
        [
            "## License\n",
            "The inputs do not share one stated license; whoever uses this model has to comply with each of them:\n",
            *lines,
            "",
        ]
    )


def _expert_section(experts: Sequence[str]) -> str:
    lines = [f"- `experts/{name}.safetensors`" for name in experts]
    example = f"    freemerge experts apply OUT {experts[0]} {experts[0]}-model"
    return "\n".join(
        [
            "## Experts\n",
            "Beside the merged backbone lie experts, one for each task:\n",
            *lines,
            "",
            "Backbone and expert make a plain checkpoint for that task:\n",
            example,
            "",
        ]
    )

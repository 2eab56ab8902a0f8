"""Merge a model pool of fusion_bench by any method of freemerge, from its YAML; fusion_bench need not be installed.

    python examples/fusion_bench_pool.py clip-vit-base-patch32_TA8_model_only.yaml fr merged -p scaling=0.4

`_pretrained_` is the base, every model without underscores around its name an expert. A model is a path or the name of
one on the hub, a mapping with pretrained_model_name_or_path (and revision), or one with base_model_name and peft_name,
a LoRA adapter. What fusion_bench composes of several files, or fills in (${...}), has to be printed by it first:
`fusion_bench modelpool=... --cfg job --resolve > pool.yaml`; its key modelpool is found.

The checkpoints are merged as they lie there. Where a pool takes a part of them, as CLIPVisionModelPool takes the vision
model of openai/clip-vit-base-patch32, that part has to be saved by itself, or merge inside fusion_bench:
examples/fusion_bench_method.py.
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

import freemerge
from freemerge import methods
from freemerge.errors import FreemergeError, RecipeError

PATH, BASE, ADAPTER = "pretrained_model_name_or_path", "base_model_name", "peft_name"
COMPOSE = "print the pool composed: fusion_bench modelpool=... --cfg job --resolve > pool.yaml"


@dataclass(frozen=True)
class Pool:
    """`base` and `experts` as freemerge.merge takes them; `dtype` is what the pool loads its models in, or None."""

    base: str | None
    experts: dict[str, str]
    dtype: str | None


def main() -> None:
    options = arguments()
    try:
        pool = read_pool(options.pool)
        result = freemerge.merge(
            options.method,
            base=pool.base if methods.get(options.method).uses_base else None,
            experts=pool.experts,
            out=options.out,
            dtype=options.dtype or pool.dtype,
            overwrite=options.overwrite,
            **dict(map(parameter, options.parameter)),
        )
    except FreemergeError as error:
        sys.exit(str(error))
    print(f"{len(pool.experts)} models by {options.method}: {result.tensors} tensors in {result.out}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pool", type=Path, help="YAML of the model pool")
    parser.add_argument("method", help="`freemerge methods` lists them")
    parser.add_argument("out", type=Path)
    parser.add_argument(
        "-p", "--parameter", action="append", default=[], metavar="KEY=VALUE", help="of the method; a value as in YAML"
    )
    parser.add_argument("--dtype", help="of the result [what the pool loads its models in, else the base's]")
    parser.add_argument("--overwrite", action="store_true")
    return parser.parse_args()


def parameter(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals:
        raise RecipeError(f"-p {text}: write KEY=VALUE")
    return key, yaml.safe_load(value)


def read_pool(path: Path) -> Pool:
    """The models a pool names.

    Raises:
        RecipeError: it names none, or some in a way that only fusion_bench understands; all problems at once.
    """
    config = yaml.safe_load(path.read_text("utf-8"))
    config = config.get("modelpool", config) if isinstance(config, dict) else {}
    models = config.get("models")
    if not isinstance(models, dict):
        raise RecipeError(f"{path}: no models; {COMPOSE}")
    sources, problems = {}, []
    for name, entry in models.items():
        try:
            sources[name] = source(entry)
        except ValueError as error:
            problems.append(f"{path}: {name}: {error}")
    if problems:
        raise RecipeError("\n".join(problems))
    loading = config.get("model_kwargs") or {}
    dtype = loading.get("torch_dtype") or loading.get("dtype")
    experts = {name: model for name, model in sources.items() if not (name.startswith("_") and name.endswith("_"))}
    return Pool(sources.get("_pretrained_"), experts, None if dtype == "auto" else dtype)


def source(entry: Any) -> str:
    """A model as freemerge has it: path, hub name with @revision, model+adapter."""
    if isinstance(entry, dict) and BASE in entry and ADAPTER in entry:
        found = f"{entry[BASE]}+{entry[ADAPTER]}"
    elif isinstance(entry, dict) and PATH in entry:
        revision = entry.get("revision")
        found = f"{entry[PATH]}@{revision}" if revision else str(entry[PATH])
    elif isinstance(entry, str):
        found = entry
    else:
        raise ValueError(f"give a path or a hub name, {PATH}, or {BASE} and {ADAPTER}")
    if "${" in found:
        raise ValueError(f"{found} is filled in by fusion_bench; {COMPOSE}")
    return found


if __name__ == "__main__":
    main()

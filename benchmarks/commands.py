"""The commands that are compared, and a check that what they wrote is what they were asked for."""

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

import processes
from synthetic import Checkpoints, read_shapes, read_tensor

WEIGHT = 0.3
SAMPLE = "model.layers.0.self_attn.k_proj.weight"

# What `freemerge merge` is given, by the name under which it is reported
METHODS = {
    "task_arithmetic": ["task_arithmetic", f"scaling={WEIGHT}"],
    "average": ["average"],
    "fr": ["fr", "align=false"],
    "fr_align": ["fr", "align=true"],
    "free": ["free", "density=0.01"],
}
# mergekit's names of what both can do
MERGEKIT_METHODS = {"task_arithmetic": "task_arithmetic", "average": "linear"}


class WrongResult(Exception):
    """A command ended well and wrote something else than it was asked for."""


def default_freemerge() -> Path:
    return Path(sys.executable).parent / "freemerge"


def merge_command(freemerge: Path, name: str, model: Checkpoints, out: Path, *, fsync: bool = False) -> list:
    method, *parameters = METHODS[name]
    command = [freemerge, "merge", "--method", method, "--base", model.base]
    for expert in model.experts:
        command += ["--expert", expert]
    for parameter in parameters:
        command += ["-p", parameter]
    return [*command, "-o", out, "--overwrite", "--quiet", *([] if fsync else ["--no-fsync"])]


def recipe_command(freemerge: Path, recipe: Path, out: Path) -> list:
    return [freemerge, "merge", recipe, out, "--overwrite", "--quiet", "--no-fsync"]


def mergekit_recipe(name: str, model: Checkpoints, directory: Path) -> Path:
    """A recipe that mergekit and freemerge both read. JSON, which is YAML."""
    weight = WEIGHT if name == "task_arithmetic" else 1.0
    recipe = {
        "merge_method": MERGEKIT_METHODS[name],
        "models": [{"model": str(expert), "parameters": {"weight": weight}} for expert in model.experts],
        "dtype": "bfloat16",
    }
    if name == "task_arithmetic":
        recipe["base_model"] = str(model.base)
    path = directory / f"{name}.yml"
    path.write_text(json.dumps(recipe, indent=2))
    return path


def timed_merge(command: list, name: str, model: Checkpoints, out: Path) -> processes.Run:
    """Run `command`, check the tensors below `out`, remove its folder. Raises CommandFailed, WrongResult."""
    empty_folder(out.parent)
    try:
        run = processes.run(command)
        if problems := list(wrong(name, model, out)):
            raise WrongResult(f"{' '.join(map(str, command))}: {'; '.join(problems)}")
        return run
    finally:
        shutil.rmtree(out.parent)


def empty_folder(path: Path) -> None:
    """Whatever an interrupted run left there is gone: results, and work directories beside them."""
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)


def wrong(name: str, model: Checkpoints, out: Path) -> Iterator[str]:
    shapes = read_shapes(out)
    if shapes != model.llama.tensors():
        yield f"{len(shapes)} tensors instead of the {len(model.llama.tensors())} of the model, or of other shapes"
        return
    base, merged = read_tensor(model.base, SAMPLE), read_tensor(out, SAMPLE)
    experts = [read_tensor(expert, SAMPLE) for expert in model.experts]
    if not np.isfinite(merged).all() or (merged == base).all():
        yield f"{SAMPLE} is not finite, or is the base's"
    if name in MERGEKIT_METHODS:
        task_vectors = sum(expert - base for expert in experts)
        expected = base + task_vectors * (WEIGHT if name == "task_arithmetic" else 1 / len(experts))
        # Peers round to bfloat16 at every step: a few units of the largest magnitude involved.
        if np.abs(merged - expected).max() > 2**-6 * np.abs(experts).max():
            yield f"{SAMPLE} is not {name} of the inputs"
    if name == "free" and len(list((out / "experts").glob("*.safetensors"))) != len(experts):
        yield "experts/ does not hold one file for each expert"

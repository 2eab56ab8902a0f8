"""The commands that are compared, and a check that what they wrote is what they were asked for."""

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

import expected
import processes
from merges import MERGES
from synthetic import Checkpoints, read_shapes, read_tensor

SAMPLE = "model.layers.0.self_attn.k_proj.weight"
WRITERS = ("free", "emr")  # a file of its own for each expert


class WrongResult(Exception):
    """A command ended well and wrote something else than it was asked for."""


def default_freemerge() -> Path:
    return Path(sys.executable).parent / "freemerge"


def merge_command(freemerge: Path, name: str, model: Checkpoints, out: Path, *, fsync: bool = False) -> list:
    merge = MERGES[name]
    command = [freemerge, "merge", "--method", merge.method]
    if merge.base:
        command += ["--base", model.base]
    for expert in experts_of(name, model):
        command += ["--expert", expert]
    for parameter, value in merge.parameters.items():
        command += ["-p", f"{parameter}={json.dumps(value)}"]
    return [*command, "-o", out, "--overwrite", "--quiet", *([] if fsync else ["--no-fsync"])]


def recipe_command(freemerge: Path, recipe: Path, out: Path) -> list:
    return [freemerge, "merge", recipe, out, "--overwrite", "--quiet", "--no-fsync"]


def mergekit_recipe(name: str, model: Checkpoints, directory: Path) -> Path:
    """A recipe that mergekit and freemerge both read. JSON, which is YAML."""
    merge, models = MERGES[name], list(experts_of(name, model))
    if merge.method == "slerp":  # mergekit wants the base among the models
        models = [model.base, *models]
    recipe = {
        "merge_method": merge.method,
        "models": [{"model": str(path)} for path in models],
        "parameters": dict(merge.parameters),
        "dtype": "bfloat16",
    }
    if merge.base:
        recipe["base_model"] = str(model.base)
    path = directory / f"{name}.yml"
    path.write_text(json.dumps(recipe, indent=2))
    return path


def experts_of(name: str, model: Checkpoints) -> tuple[Path, ...]:
    return model.experts[: MERGES[name].experts]


def inputs_of(name: str, model: Checkpoints) -> list[Path]:
    """The files that a merge has to read."""
    directories = [*([model.base] if MERGES[name].base else []), *experts_of(name, model)]
    return [directory / "model.safetensors" for directory in directories]


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
    experts = [read_tensor(expert, SAMPLE) for expert in experts_of(name, model)]
    if name == "emr" and (merged != base).any():
        yield f"{SAMPLE} is not the base's, which the experts belong on"
    elif not np.isfinite(merged).all() or (name != "emr" and (merged == base).all()):
        yield f"{SAMPLE} is not finite, or is the base's"
    else:
        yield from (f"{SAMPLE} {problem}" for problem in expected.disagreements(name, base, experts, merged))
    if name in WRITERS and len(list((out / "experts").glob("*.safetensors"))) != len(experts):
        yield "experts/ does not hold one file for each expert"

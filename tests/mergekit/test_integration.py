"""freemerge's methods inside mergekit, against freemerge's own merges: in one process, for mergekit loads slowly."""

import importlib
import importlib.util
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import yaml

import freemerge
from freemerge.checkpoint.reader import open_checkpoint
from freemerge.errors import UnavailableError
from freemerge.testing import tiny_llama, tiny_llama_config, write_checkpoint

SIZE = {"num_hidden_layers": 2, "vocab_size": 40}
# method, parameters of the merge, those of each expert
MERGES = {
    "fr": ("fr", {"lambda": 0.4}, [{"weight": 1.0}, {"weight": 0.5}]),
    "fr variant": ("fr", {"variant": "roberta"}, [{}, {}]),
    "fr patterns": ("fr", {"exclude": "mlp|norm", "inner_ring": "official", "elect": True}, [{"weight": 0.7}, {}]),
    "free": ("free", {"scaling": 0.5}, [{}, {}]),
    "free variant": ("free", {"variant": "vit8"}, [{}, {}]),
    "emr": ("emr", {}, [{}, {}]),
    "pcb": ("pcb", {"ratio": 0.3}, [{"weight": 0.8}, {"weight": 1.2}]),
    "pcb variant": ("pcb", {"variant": "vision"}, [{}, {}]),
}
# The first by the module's command line, the others in the same process by mergekit's
RUN = """
import json, runpy, sys
jobs = json.load(open(sys.argv[1]))
for i, job in enumerate(jobs):
    sys.argv = ["mergekit-yaml", *job]
    try:
        if i == 0:
            runpy.run_module("freemerge.integrations.mergekit", run_name="__main__")
        else:
            from mergekit.scripts.run_yaml import main
            main()
    except SystemExit as end:
        assert not end.code, job
"""


def recipe(method, parameters, own, folder):
    models = [{"model": f"{folder}/expert{t}", "parameters": given} for t, given in enumerate(own)]
    there = {"merge_method": method, "base_model": f"{folder}/base", "models": models, "parameters": parameters}
    return there | {"dtype": "float32"}


@pytest.fixture(scope="module")
def merged(tmp_path_factory):
    """The folder, with a result of mergekit for each of MERGES."""
    if not importlib.util.find_spec("mergekit"):
        pytest.skip("needs mergekit")
    folder = tmp_path_factory.mktemp("mergekit")
    for seed, name in enumerate(("base", "expert0", "expert1")):
        write_checkpoint(folder / name, tiny_llama(seed, dtype=np.float32, **SIZE), config=tiny_llama_config(**SIZE))
    jobs = []
    for name, merge in MERGES.items():
        (folder / f"{name}.yml").write_text(yaml.safe_dump(recipe(*merge, folder)))
        jobs.append([str(folder / f"{name}.yml"), str(folder / f"{name} merged"), "--no-write-model-card", "--quiet"])
    (folder / "jobs.json").write_text(json.dumps(jobs))
    command = [sys.executable, "-c", RUN, folder / "jobs.json"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TRITON_INTERPRET": "0"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return folder


def tensors(folder):
    with open_checkpoint(folder) as checkpoint:
        return {name: np.array(checkpoint.read(name)) for name in checkpoint.tensors}


@pytest.mark.parametrize(("name", "merge"), MERGES.items(), ids=MERGES)
def test_writes_what_freemerge_writes(merged, name, merge):
    method, parameters, own = merge
    base, *experts = (tensors(merged / model) for model in ("base", "expert0", "expert1"))
    if any(own):
        parameters = parameters | {"weight": [given.get("weight", 1.0) for given in own]}
    if method == "emr":  # in mergekit nothing can be left beside the model
        parameters = {"backbone": "unified"}
    got = tensors(merged / f"{name} merged")
    assert got.keys() == base.keys()
    for tensor in base:  # tensor by tensor, which is another thing for pcb alone
        one = ({tensor: model[tensor]} for model in (base, *experts))
        expected = freemerge.merge_state_dicts(method, next(one), list(one), **parameters)[tensor]
        np.testing.assert_array_equal(got[tensor], expected)
    assert not all(np.array_equal(got[tensor], base[tensor]) for tensor in base)


@pytest.mark.parametrize(("name", "same"), [("fr", True), ("free", True), ("emr", False), ("pcb", False)])
def test_what_is_the_same_over_the_model(merged, name, same):
    freemerge.merge(str(merged / f"{name}.yml"), out=merged / f"{name} by freemerge")
    expected, got = tensors(merged / f"{name} by freemerge"), tensors(merged / f"{name} merged")
    assert got.keys() == expected.keys()
    assert all(np.array_equal(got[tensor], array) for tensor, array in expected.items()) == same


def test_without_mergekit_it_says_what_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "mergekit", None)
    monkeypatch.delitem(sys.modules, "freemerge.integrations.mergekit", raising=False)
    with pytest.raises(UnavailableError, match=r"mergekit 0\.1\.5 or later is needed .*; pip install mergekit"):
        importlib.import_module("freemerge.integrations.mergekit")

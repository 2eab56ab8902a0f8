"""The examples for fusion_bench: its pools without it, its algorithms where it is installed."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

import freemerge
from freemerge.checkpoint.reader import open_checkpoint
from freemerge.errors import RecipeError
from freemerge.testing import tiny_vit, tiny_vit_config, write_checkpoint

EXAMPLES = Path(__file__).parent.parent / "examples"


def example(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where its dataclass looks for itself
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def pools():
    return example("fusion_bench_pool")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pool")
    for seed, name in enumerate(("base", "cars", "dtd")):
        write_checkpoint(folder / name, tiny_vit(seed), config=tiny_vit_config())
    return folder


def pool_of(models):
    return {
        "_target_": "fusion_bench.modelpool.CLIPVisionModelPool",
        "models": {
            "_pretrained_": str(models / "base"),
            "stanford-cars": str(models / "cars"),
            "dtd": {
                "_target_": "transformers.ViT.from_pretrained",
                "pretrained_model_name_or_path": str(models / "dtd"),
            },
        },
        "processor": None,
    }


def run(*arguments):
    command = [sys.executable, str(EXAMPLES / "fusion_bench_pool.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def tensors(folder):
    with open_checkpoint(folder) as checkpoint:
        return {name: np.array(checkpoint.read(name)) for name in checkpoint.tensors}


@pytest.mark.parametrize(("method", "parameters"), [("fr", {"scaling": 0.4}), ("average", {})])
def test_merges_a_pool(models, tmp_path, method, parameters):
    (tmp_path / "pool.yaml").write_text(yaml.safe_dump({"modelpool": pool_of(models), "method": None}))
    flags = [flag for key, value in parameters.items() for flag in ("-p", f"{key}={value}")]
    done = run(tmp_path / "pool.yaml", method, tmp_path / "merged", *flags)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"2 models by {method}: ")
    experts = {"stanford-cars": tensors(models / "cars"), "dtd": tensors(models / "dtd")}
    base = tensors(models / "base") if method == "fr" else None
    expected = freemerge.merge_state_dicts(method, base, experts, **parameters)
    got = tensors(tmp_path / "merged")
    assert got.keys() == expected.keys()
    assert all(np.array_equal(got[name], array) for name, array in expected.items())


def test_says_what_is_wrong_with_a_merge(models, tmp_path):
    (tmp_path / "pool.yaml").write_text(yaml.safe_dump(pool_of(models)))
    done = run(tmp_path / "pool.yaml", "fr", tmp_path / "merged", "-p", "scalling=0.4")
    assert done.returncode == 1
    assert "scalling" in done.stderr
    assert "Traceback" not in done.stderr


def test_reads_every_way_to_name_a_model(pools, tmp_path):
    models = {
        "_pretrained_": "org/base",
        "a": {"pretrained_model_name_or_path": "org/a", "revision": "v2"},
        "b": {"base_model_name": "org/base", "peft_name": "org/b_lora", "merge_and_unload": True},
        "_merged_": "org/merged",
    }
    path = tmp_path / "pool.yaml"
    path.write_text(yaml.safe_dump({"models": models, "model_kwargs": {"torch_dtype": "bfloat16"}}))
    assert pools.read_pool(path) == pools.Pool("org/base", {"a": "org/a@v2", "b": "org/base+org/b_lora"}, "bfloat16")


def test_names_every_model_that_only_fusion_bench_finds(pools, tmp_path):
    path = tmp_path / "pool.yaml"
    models = {"_pretrained_": "${..dir}/base", "cars": {"model_name": "ViT-B-32", "pickle_path": "cars.pt"}}
    path.write_text(yaml.safe_dump({"models": models}))
    with pytest.raises(RecipeError, match=r"(?s)_pretrained_: .*--resolve.*cars: give a path or a hub name"):
        pools.read_pool(path)
    path.write_text(yaml.safe_dump({"defaults": [{"/model/clip-vit@models": ["clip-vit-base-patch32"]}]}))
    with pytest.raises(RecipeError, match="no models; print the pool composed"):
        pools.read_pool(path)


@pytest.mark.filterwarnings("default")  # its imports' own
@pytest.mark.parametrize(("method", "parameters"), [("fr", {"scaling": 0.4}), ("average", {})])
def test_is_an_algorithm(method, parameters):
    torch = pytest.importorskip("torch")
    pytest.importorskip("fusion_bench")
    from fusion_bench.modelpool import BaseModelPool

    torch.manual_seed(0)
    pool = {
        name: torch.nn.Sequential(torch.nn.Linear(9, 7), torch.nn.Linear(7, 5)) for name in ("_pretrained_", "a", "b")
    }
    before = {name: {key: tensor.clone() for key, tensor in model.state_dict().items()} for name, model in pool.items()}
    algorithm = example("fusion_bench_method").FreemergeAlgorithm(method, **parameters)
    merged = algorithm.run(BaseModelPool(pool)).state_dict()
    base = before["_pretrained_"] if method == "fr" else None
    expected = freemerge.merge_state_dicts(method, base, {name: before[name] for name in "ab"}, **parameters)
    assert all(torch.equal(merged[key], tensor) for key, tensor in expected.items())
    assert all(torch.equal(pool[name].state_dict()[key], t) for name in pool for key, t in before[name].items())

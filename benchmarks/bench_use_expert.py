"""Putting an expert in place and taking it out, against reading the model's file from the page cache."""

import statistics
import time

import numpy as np
import pytest
import torch

import freemerge
from attached_models import Bare, random_expert
from freemerge.checkpoint.torch_arrays import from_torch, to_torch
from freemerge.kernels.array import BFLOAT16
from freemerge.testing import write_safetensors
from synthetic import FULL

BAR, ROUNDS = 0.03, 7


@pytest.fixture(scope="module")
def model_file(tmp_path_factory):
    noise = (np.random.default_rng(0).standard_normal(1 << 20, np.float32) * 0.02).astype(BFLOAT16)
    path = tmp_path_factory.mktemp("llama") / "model.safetensors"
    write_safetensors(path, {name: np.resize(noise, shape) for name, shape in FULL.tensors().items()})
    yield path
    path.unlink()


def seconds(run) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def read_all(path) -> None:
    """What a loader does at least: every byte of the file in memory of the process."""
    load = pytest.importorskip("safetensors.torch").load_file
    for tensor in load(path).values():
        tensor.clone()


def test_use_expert(benchmark, model_file):
    from safetensors.torch import load_file

    shapes = FULL.tensors()
    model = Bare({name: tensor.clone() for name, tensor in load_file(model_file).items()})
    freemerge.attach(model, [random_expert(name, shapes, 0.01, seed) for seed, name in enumerate("ab")])
    before = {name: from_torch(tensor).copy() for name, tensor in model.named_parameters() if "layers.7." in name}
    times = {"load": [], "put": [], "out": []}
    for _ in range(ROUNDS):
        times["load"].append(seconds(lambda: read_all(model_file)))
        times["put"].append(seconds(lambda: model.use_expert("a")))
        times["out"].append(seconds(lambda: model.use_expert(None)))
    for name, array in before.items():
        assert torch.equal(to_torch(array), model.get_parameter(name))
    benchmark.pedantic(lambda: (model.use_expert("a"), model.use_expert("b")), rounds=3)
    medians = {what: statistics.median(all_times) for what, all_times in times.items()}
    for what in ("put", "out"):
        share = medians[what] / medians["load"]
        benchmark.extra_info[f"{what}_share_of_load"] = round(share, 4)
        print(
            f"\n{what}: {medians[what] * 1e3:.0f} ms (best {min(times[what]) * 1e3:.0f}), {share:.1%} of loading "
            f"{medians['load']:.2f} s (best {min(times['load']):.2f}); the bar is {BAR:.0%}"
        )

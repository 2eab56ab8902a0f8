"""The demo, with a few training steps: everything it says it writes is there, and says the truth."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from freemerge.checkpoint.reader import open_checkpoint

ROOT = Path(__file__).parent.parent
TASKS = ["parity", "below_five", "rotation", "inverted"]
METHODS = ["average", "task_arithmetic", "fr", "free"]

for package in ("sklearn", "matplotlib", "torch"):
    pytest.importorskip(package)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "out"
    command = [sys.executable, str(ROOT / "examples/digits.py"), "--steps", "14", "--out", str(out)]
    finished = subprocess.run(command, capture_output=True, text=True, cwd=out.parent)
    assert finished.returncode == 0, finished.stderr
    return out, finished.stdout


def test_table_has_every_model_and_task(demo):
    _, printed = demo
    for text in [*METHODS[:3], *TASKS, "base", "experts, own task", "free, with experts", "command"]:
        assert text in printed


def test_picture_is_drawn(demo):
    assert (demo[0] / "spectra.png").read_bytes().startswith(b"\x89PNG")


def test_checkpoints_are_ordinary_ones_and_the_base_is_sharded(demo):
    out, _ = demo
    index = json.loads((out / "base/model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    shapes = {name: info.shape for name, info in open_checkpoint(out / "base").tensors.items()}
    for folder in [*(f"experts/{name}" for name in TASKS), *(f"merged/{name}" for name in METHODS)]:
        assert {name: info.shape for name, info in open_checkpoint(out / folder).tensors.items()} == shapes
        assert json.loads((out / folder / "config.json").read_text())["model_type"] == "vit"


def test_average_is_the_mean_of_the_experts(demo):
    out, _ = demo
    name = "encoder.layer.0.intermediate.dense.weight"
    mean = np.mean([open_checkpoint(out / "experts" / task).read(name) for task in TASKS], axis=0, dtype=np.float64)
    # one rounding to float32
    np.testing.assert_allclose(open_checkpoint(out / "merged/average").read(name), mean, rtol=2**-23, atol=1e-9)


@pytest.mark.parametrize("task", TASKS)
def test_an_applied_expert_changes_one_entry_in_a_hundred(demo, task):
    out, _ = demo
    name = "encoder.layer.1.output.dense.weight"
    backbone, applied = (open_checkpoint(out / folder).read(name) for folder in ("merged/free", f"applied/{task}"))
    assert 0 < np.count_nonzero(backbone != applied) <= backbone.size // 100


SAME_FEATURES = """
import sys
from pathlib import Path

import torch
import transformers

sys.path.insert(0, sys.argv[1])
from digits_training import load_encoder

model = transformers.ViTModel.from_pretrained(sys.argv[2], add_pooling_layer=False).eval()
images = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(0))
with torch.no_grad():
    theirs = model(images[:, None]).last_hidden_state[:, 0]
    torch.testing.assert_close(load_encoder(Path(sys.argv[2]))(images), theirs)
"""


def test_the_merged_encoder_is_a_hugging_face_vit(demo):
    pytest.importorskip("transformers")
    command = [sys.executable, "-c", SAME_FEATURES, str(ROOT / "examples"), str(demo[0] / "merged/fr")]
    # a process of its own, away from the checkout: transformers would import the folder `kernels`
    finished = subprocess.run(command, capture_output=True, text=True, cwd=demo[0])
    assert finished.returncode == 0, finished.stderr

"""Whole merges on disk: what comes out, and that nothing but the recipe decides it."""

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import freemerge
from freemerge.checkpoint.reader import open_checkpoint
from freemerge.checkpoint.verify import verify
from freemerge.errors import ChangedInputError, CheckpointError, OutputError, PlanError, RecipeError
from freemerge.kernels.array import BFLOAT16
from freemerge.methods import fr
from freemerge.testing import tiny_llama, tiny_vit, tiny_vit_config, write_checkpoint


def tensors_of(folder):
    checkpoint = open_checkpoint(folder)
    return {name: checkpoint.read(name) for name in checkpoint.tensors}


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_task_arithmetic_is_its_formula(models, tmp_path):
    base, experts = models
    freemerge.merge("task_arithmetic", base, experts, tmp_path / "out", scaling=0.5)
    start, moved, merged = tensors_of(base), [tensors_of(e) for e in experts], tensors_of(tmp_path / "out")
    assert list(merged) == list(start)
    for name, tensor in start.items():
        first = tensor.astype(np.float32)
        total = sum(np.float32(0.5) * (m[name].astype(np.float32) - first) for m in moved)
        np.testing.assert_array_equal(merged[name], (first + total).astype(BFLOAT16))


@pytest.mark.parametrize("method", ["average", "linear", "task_arithmetic", "fr", "free"])
def test_disk_and_memory_give_the_same_bytes(models, tmp_path, method):
    base, experts = models
    freemerge.merge(method, base, experts, tmp_path / "out")
    in_memory = freemerge.merge_state_dicts(method, tensors_of(base), [tensors_of(e) for e in experts])
    for name, tensor in tensors_of(tmp_path / "out").items():
        np.testing.assert_array_equal(tensor.view(np.uint16), in_memory[name].view(np.uint16))


@pytest.mark.parametrize("selection", ["tensor", "row", "model"])
def test_bytes_depend_on_the_recipe_alone(models, tmp_path, monkeypatch, selection):
    base, experts = models

    def merge(out, **options):
        parameters = {"selection": selection, "density": 0.05}
        freemerge.merge("free", base, experts, tmp_path / out, shard_size="60kB", **options, **parameters)
        return bytes_of(tmp_path / out)

    expected = merge("one", threads=1)
    assert merge("four", threads=4) == expected
    assert merge("small", threads=3, max_memory="1MB") == expected  # every tensor through the mapped output
    monkeypatch.setattr("freemerge.stream.PIECE", 4096)
    monkeypatch.setattr("freemerge.checkpoint.checksum.PIECE", 4 << 20)
    assert merge("tiles") == expected


@pytest.mark.parametrize(
    "parameters",
    [{}, {"elect": True}, {"align": True}, {"bias_rule": "first"}, {"bias_rule": "base", "exclude": "v_proj"}],
    ids=str,
)
def test_fr_cuts_what_it_does_not_filter_into_pieces(models, tmp_path, monkeypatch, parameters):
    base, experts = models
    freemerge.merge("fr", base, experts, tmp_path / "whole", **parameters)
    monkeypatch.setattr("freemerge.stream.PIECE", 4096)
    monkeypatch.setattr("freemerge.checkpoint.checksum.PIECE", 4096)
    sizes = Counter()
    merge = fr.merge_tensor

    def noted(base, experts, *, name, out, **settings):
        sizes[name] += 1
        merge(base, experts, name=name, out=out, **settings)

    monkeypatch.setattr(fr, "merge_tensor", noted)
    freemerge.merge("fr", base, experts, tmp_path / "pieces", **parameters)
    assert (sizes["lm_head.weight"] > 1) == ("align" not in parameters)
    assert sizes["model.layers.0.mlp.up_proj.weight"] == 1
    assert (tmp_path / "whole/model.safetensors").read_bytes() == (tmp_path / "pieces/model.safetensors").read_bytes()


KILLED = """
import os, signal, sys
import freemerge
calls = 0
def die(done, total):
    global calls
    calls += 1
    if calls == int(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGKILL)
out, options = sys.argv[3], {"density": 0.05, "shard_size": "60kB", "threads": 2}
freemerge.merge("free", sys.argv[2], sys.argv[4:], out, progress=die, **options)
"""


@pytest.mark.parametrize("point", [1, 2, 7, 13, 20, 21])
def test_a_killed_merge_resumes_to_the_same_bytes(models, tmp_path, point):
    base, experts = models
    options = {"density": 0.05, "shard_size": "60kB"}
    freemerge.merge("free", base, experts, tmp_path / "whole", **options)
    out = tmp_path / "out"
    command = [sys.executable, "-P", "-c", KILLED, str(point), base, str(out), *experts]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    assert not out.exists()
    freemerge.merge("free", base, experts, out, resume=True, **options)
    assert bytes_of(out) == bytes_of(tmp_path / "whole")
    assert not list(tmp_path.glob(".out*"))


def test_an_existing_result_survives_a_killed_overwrite(models, tmp_path):
    base, experts = models
    out = tmp_path / "out"
    freemerge.merge("task_arithmetic", base, experts, out)
    before = bytes_of(out)
    script = KILLED.replace("progress=die", "progress=die, overwrite=True")
    assert (
        subprocess.run([sys.executable, "-P", "-c", script, "9", base, str(out), *experts], check=False).returncode < 0
    )
    assert bytes_of(out) == before
    freemerge.merge("free", base, experts, out, density=0.05, shard_size="60kB", resume=True, overwrite=True)
    assert bytes_of(out) != before
    assert not verify(out).problems


def test_resuming_another_recipe_is_refused(models, tmp_path):
    base, experts = models
    command = [sys.executable, "-P", "-c", KILLED, "9", base, str(tmp_path / "out"), *experts]
    subprocess.run(command, check=False)
    with pytest.raises(OutputError, match="cannot be resumed"):
        freemerge.merge("free", base, experts, tmp_path / "out", density=0.1, shard_size="60kB", resume=True)


def test_an_interrupt_keeps_what_is_done(models, tmp_path):
    base, experts = models
    interrupts = []

    def interrupt(done, total):
        if done > total / 2 and not interrupts:  # a second one could come when the first has ended the merge
            interrupts.append(done)
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        freemerge.merge("fr", base, experts, tmp_path / "out", progress=interrupt)
    assert not (tmp_path / "out").exists()
    freemerge.merge("fr", base, experts, tmp_path / "out", resume=True)
    assert not verify(tmp_path / "out").problems


def test_an_input_that_changes_meanwhile_is_an_error(models, tmp_path):
    base, experts = models
    shard = Path(experts[0]) / "model.safetensors"

    def touch(done, total):
        os.utime(shard, ns=(1, 1))

    with pytest.raises(ChangedInputError, match=r"model[.]safetensors"):
        freemerge.merge("task_arithmetic", base, experts, tmp_path / "out", progress=touch)
    assert not (tmp_path / "out").exists()


def test_nothing_is_published_when_the_disk_is_full(models, tmp_path, monkeypatch):
    base, experts = models
    real, calls = os.pwrite, []

    def full(file, data, offset):
        calls.append(offset)
        if len(calls) > 12:
            raise OSError(28, "No space left on device")
        return real(file, data, offset)

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OutputError, match=r"disk full.*--resume"):
        freemerge.merge("fr", base, experts, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(os, "pwrite", real)
    freemerge.merge("fr", base, experts, tmp_path / "out", resume=True)
    assert not verify(tmp_path / "out").problems


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_is_named_and_not_published(models, tmp_path, bad):
    base, experts = models
    moved = {name: tensor.copy() for name, tensor in tensors_of(experts[0]).items()}
    moved["model.layers.1.mlp.up_proj.weight"][3, 4] = bad
    moved["model.norm.weight"][0] = bad
    poisoned = str(write_checkpoint(tmp_path / "poisoned", moved))
    with pytest.raises(CheckpointError) as error:
        freemerge.merge("fr", base, [experts[1], poisoned], tmp_path / "out")
    assert "model.layers.1.mlp.up_proj.weight: NaN or Inf in " + poisoned in str(error.value)
    assert "model.norm.weight: NaN or Inf in " + poisoned in str(error.value)
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))
    freemerge.merge("fr", base, [experts[1], poisoned], tmp_path / "out", check_finite=False)
    assert np.isnan(tensors_of(tmp_path / "out")["model.layers.1.mlp.up_proj.weight"].astype(np.float32)).any()


def test_a_result_too_large_for_its_dtype_is_said_to_be_one(models, tmp_path):
    base, experts = models
    with pytest.raises(CheckpointError, match="does not fit float16"):
        freemerge.merge("task_arithmetic", base, experts, tmp_path / "out", scaling=1e7, dtype="float16")


def test_every_problem_of_a_merge_at_once(models, tmp_path):
    base, experts = models
    moved = dict(tensors_of(experts[0]))
    moved["model.norm.weight"] = moved["model.norm.weight"][:5]
    del moved["lm_head.weight"]
    odd = str(write_checkpoint(tmp_path / "odd", moved))
    with pytest.raises(PlanError) as error:
        freemerge.merge("fr", base, [odd, experts[1]], tmp_path / "out")
    assert "2 problems, nothing was written" in str(error.value)
    assert not list(tmp_path.glob(".out*"))


def test_every_model_that_cannot_be_read_in_one_error(models, tmp_path):
    base, _ = models
    with pytest.raises(CheckpointError) as error:
        freemerge.merge("fr", base, [str(tmp_path / "no"), str(tmp_path / "nil")], tmp_path / "out")
    assert str(error.value).startswith("2 problems, nothing was written")
    assert str(error.value).count("hub name") == 1


def test_an_input_is_never_overwritten(models):
    base, experts = models
    with pytest.raises(RecipeError, match="is one of the inputs"):
        freemerge.merge("fr", base, experts, experts[0], overwrite=True)


def test_dry_run_says_what_would_happen(models, tmp_path):
    base, experts = models
    plan = freemerge.merge("fr", base, experts, tmp_path / "out", dry_run=True)
    summary = plan.summary()
    assert summary["bytes_out"] == sum(tensor.nbytes for tensor in tensors_of(base).values())
    assert summary["bytes_in"] == 4 * summary["bytes_out"]
    rows = {row["tensor"]: row for row in plan.rows()}
    assert rows["model.layers.0.mlp.up_proj.weight"]["transform"].startswith("removes")
    assert not (tmp_path / "out").exists()


def test_dtype_of_the_result(models, tmp_path):
    base, experts = models
    freemerge.merge("fr", base, experts, tmp_path / "out", dtype="float32")
    assert {tensor.dtype for tensor in tensors_of(tmp_path / "out").values()} == {np.dtype(np.float32)}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "float32"


def test_integers_come_from_the_base(tmp_path):
    base, expert = tiny_vit(0), tiny_vit(1)
    base["vit.steps"], expert["vit.steps"] = np.array([3, 4]), np.array([9, 9])
    folders = [
        write_checkpoint(tmp_path / name, tensors, config=tiny_vit_config())
        for name, tensors in (("b", base), ("e", expert))
    ]
    freemerge.merge("task_arithmetic", folders[0], [folders[1]], tmp_path / "out")
    np.testing.assert_array_equal(tensors_of(tmp_path / "out")["vit.steps"], [3, 4])


def test_tied_weights_stay_tied(tmp_path):
    folders = []
    for seed in range(3):
        tensors = tiny_llama(seed)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
        folders.append(write_checkpoint(tmp_path / str(seed), tensors, config={"tie_word_embeddings": True}))
    freemerge.merge(
        "fr", folders[0], folders[1:], tmp_path / "out", unfiltered="lm_head"
    )  # the filter treats them differently
    merged = tensors_of(tmp_path / "out")
    np.testing.assert_array_equal(merged["lm_head.weight"], merged["model.embed_tokens.weight"])


def test_recipe_file_and_call_give_the_same_weights(models, tmp_path):
    base, experts = models
    lines = [
        f"merge_method: fr\nbase_model: {base}\nparameters: {{scaling: 0.4}}\nmodels:",
        *(f"  - model: {e}" for e in experts),
    ]
    (tmp_path / "recipe.yml").write_text("\n".join(lines))
    freemerge.merge(tmp_path / "recipe.yml", out=tmp_path / "a")
    freemerge.merge("fr", base, experts, tmp_path / "b", scaling=0.4)
    assert bytes_of(tmp_path / "a") == bytes_of(tmp_path / "b")


def test_the_manifest_describes_the_result(models, tmp_path):
    base, experts = models
    freemerge.merge("free", base, experts, tmp_path / "out")
    assert not verify(tmp_path / "out").problems
    shard = tmp_path / "out" / "model.safetensors"
    with open(shard, "r+b") as file:
        file.seek(-5, os.SEEK_END)
        file.write(b"x")
    assert any("checksum" in problem or "changed" in problem for problem in verify(tmp_path / "out").problems)


def test_an_unknown_method_names_the_nearest():
    with pytest.raises(RecipeError, match="task_arithmetic"):
        freemerge.merge("task_arithmetik", "b", ["e"], "o")

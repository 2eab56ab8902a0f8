"""Methods of model scope: what is measured before the merge, in what order, and what is merged with it."""

from dataclasses import replace

import numpy as np
import pytest

import freemerge
from freemerge import methods, resident
from freemerge.checkpoint.memory import MemoryCheckpoint
from freemerge.errors import CheckpointError
from freemerge.kernels.array import task_vector
from freemerge.plan import make_plan
from freemerge.recipe import Recipe
from freemerge.sinks import MemorySink
from freemerge.stream import Stream
from freemerge.testing import random_array, tiny_llama, write_checkpoint

BASE = {"a": random_array((5, 7), np.float32, 0), "b": random_array((11,), np.float32, 1), "steps": np.arange(3)}
EXPERTS = [{name: array + t for name, array in BASE.items()} for t in (1, 2)]
EXPERTS = [{**expert, "steps": BASE["steps"]} for expert in EXPERTS]


class Normalized:
    """A method of two sweeps: every entry of the sum over its mean, less the largest of that over the model."""

    def __init__(self, sweeps=2):
        self.SWEEPS, self.calls = sweeps, []

    def is_settled(self, settled):
        return isinstance(settled, tuple)

    def measure_tensor(self, base, experts, *, name, settled=None, **parameters):
        self.calls.append((name, settled))
        total = sum(task_vector(base, expert).astype(np.float64) for expert in experts)
        return np.array([total.sum(), total.size]) if settled is None else np.array(total.max() / settled)

    def settle(self, statistics, *, settled=None, **parameters):
        assert list(statistics) == ["a", "b"]
        if settled is None:
            total, size = sum(statistics.values())
            return total / size
        return settled, max(statistics.values())

    def merge_tensor(self, base, experts, *, name, settled, out, **parameters):
        mean, largest = settled
        out[...] = sum(task_vector(base, expert) for expert in experts) / mean - largest


def run(how, base=BASE, experts=EXPERTS, sweeps=2):
    hooks, seen = Normalized(sweeps), []
    method = replace(methods.get("opcm"), sweeps=hooks.SWEEPS, module=hooks)
    opened = [MemoryCheckpoint(one, label) for one, label in zip([base, *experts], "pqr", strict=True)]
    plan = make_plan(
        Recipe.from_flags("opcm", "p", ["q", "r"]), methods.get("opcm"), opened[0], opened[1:], shard_size=None
    )
    plan = replace(plan, method=method)
    sink = MemorySink(plan)
    if how == "resident":
        resident.run(plan, sink)
    else:
        Stream(plan, sink, max_memory=1 << 40, progress=lambda *progress: seen.append(progress)).run()
    return sink.tensors, hooks.calls, seen


@pytest.mark.parametrize("how", ["stream", "resident"])
def test_sweeps_then_the_merge(how):
    merged, calls, _ = run(how)
    # the sum of the task vectors is 3 everywhere: over its mean 1, less the largest 1
    for name in ("a", "b"):
        np.testing.assert_allclose(merged[name], 0, atol=1e-6)
    np.testing.assert_array_equal(merged["steps"], BASE["steps"])
    assert sorted(name for name, settled in calls if settled is None) == ["a", "b"]
    assert [settled for _, settled in calls] == [None, None, pytest.approx(3), pytest.approx(3)]


@pytest.mark.parametrize("how", ["stream", "resident"])
def test_no_more_sweeps_than_it_takes(how):
    merged, calls, _ = run(how, sweeps=5)
    assert len(calls) == 4
    np.testing.assert_allclose(merged["a"], 0, atol=1e-6)


@pytest.mark.parametrize("sweeps", [2, 5])
def test_progress_counts_every_sweep(sweeps):
    _, _, seen = run("stream", sweeps=sweeps)
    assert seen[-1][0] == seen[-1][1]
    read = 3 * sum(BASE[name].nbytes for name in "ab")
    assert seen[-1][1] == (1 + sweeps) * read + sum(BASE[name].nbytes for name in "ab") + 2 * BASE["steps"].nbytes


@pytest.mark.parametrize("how", ["stream", "resident"])
def test_nan_ends_it_before_the_merge(how):
    experts = [EXPERTS[0], {**EXPERTS[1], "b": EXPERTS[1]["b"] * np.nan}]
    with pytest.raises(CheckpointError, match="b: NaN or Inf in r"):
        run(how, BASE, experts)


def tensors_in(folder):
    with freemerge.Session(None, [folder]) as session:
        return session.merge("average")


def close(merged, expected):
    assert merged.keys() == expected.keys()
    for name, array in merged.items():
        # threads of the linear algebra may change the last bits
        np.testing.assert_allclose(array, expected[name], rtol=0, atol=1e-5, err_msg=name)


@pytest.fixture
def folders(tmp_path):
    return [write_checkpoint(tmp_path / str(seed), tiny_llama(seed, scale=0.02), shards=2) for seed in range(4)]


@pytest.mark.parametrize("method", ["opcm", "doge"])
def test_on_disk_as_in_memory(method, folders, tmp_path):
    base, *experts = folders
    result = freemerge.merge(method, base, experts, tmp_path / "out", max_memory="1GiB")
    with freemerge.Session(base, experts) as session:
        expected = session.merge(method)
    assert freemerge.merge(method, base, experts, dry_run=True).summary()["passes"] == 1 + methods.get(method).sweeps
    assert result.tensors == len(expected)
    close(tensors_in(tmp_path / "out"), expected)


def test_resuming_measures_again(folders, tmp_path, monkeypatch):
    base, *experts = folders
    opcm, calls = methods.get("opcm").module, []
    merge_tensor = opcm.merge_tensor

    def dies(*arguments, name, **others):
        calls.append(name)
        if len(calls) == 12:
            raise KeyboardInterrupt
        return merge_tensor(*arguments, name=name, **others)

    monkeypatch.setattr(opcm, "merge_tensor", dies)
    with pytest.raises(KeyboardInterrupt):
        freemerge.merge("opcm", base, experts, tmp_path / "out", threads=1)
    monkeypatch.undo()
    freemerge.merge("opcm", base, experts, tmp_path / "out", resume=True)
    freemerge.merge("opcm", base, experts, tmp_path / "whole")
    close(*(tensors_in(tmp_path / name) for name in ("out", "whole")))

"""Experts added to an earlier merge of opcm: what all at once would give, bit for bit; and when that is refused."""

import json

import numpy as np
import pytest
from typer.testing import CliRunner

import freemerge
from freemerge import methods
from freemerge.checkpoint.reader import open_checkpoint
from freemerge.checkpoint.verify import verify
from freemerge.cli import app
from freemerge.errors import CheckpointError, InputError, PlanError, RecipeError
from freemerge.kernels.array import BFLOAT16
from freemerge.testing import random_array, tiny_llama, write_checkpoint

SHAPES = {
    "a.weight": (12, 18),
    "b.weight": (18, 12),
    "class_embedding": (18,),
    "conv.weight": (3, 2, 2, 2),
    "embed.weight": (9, 12),
    "empty.weight": (0, 12),
    "logit_scale": (),
}
WEIGHTS, STATE = "model.safetensors", "state/opcm.safetensors"


def models(tmp_path, count, dtype=np.float32):
    base = {name: random_array(shape, dtype, i) for i, (name, shape) in enumerate(SHAPES.items())}
    base["steps"] = np.arange(3)
    yield write_checkpoint(tmp_path / "base", base)
    for t in range(1, count + 1):
        moved = {n: a + random_array(a.shape, np.float32, 50 * t + i, 0.1) for i, (n, a) in enumerate(base.items())}
        tensors = {name: np.asarray(array, base[name].dtype) for name, array in moved.items()}
        yield write_checkpoint(tmp_path / f"expert{t}", tensors | {"steps": base["steps"]})


@pytest.fixture
def folders(tmp_path):
    return list(models(tmp_path, 3))


def merge(tmp_path, out, base, experts, **options):
    after = options.pop("after", None)
    options["continue_from"] = after and tmp_path / after
    freemerge.merge("opcm", base, experts, tmp_path / out, **options)
    return tmp_path / out


def same(ours, theirs, *files):
    return all((ours / file).read_bytes() == (theirs / file).read_bytes() for file in files)


@pytest.mark.parametrize("options", [{}, {"alpha": 0.2, "variant": "official"}, {"added": ["b"]}], ids=str)
@pytest.mark.parametrize("dtype", [np.float64, np.float32, BFLOAT16], ids=["float64", "float32", "bfloat16"])
def test_one_after_the_other_is_all_at_once(tmp_path, dtype, options):
    base, *experts = models(tmp_path, 4, dtype)
    whole = merge(tmp_path, "whole", base, experts, **options)
    merge(tmp_path, "first", base, experts[:1], **options)
    merge(tmp_path, "third", base, experts[1:3], after="first", **options)
    last = merge(tmp_path, "last", base, experts[3:], after="third", **options)
    assert same(last, whole, WEIGHTS, STATE, "state/opcm.json")
    assert verify(last).ok
    inputs = json.loads((last / "freemerge.json").read_bytes())["inputs"]
    assert [item["name"] for item in inputs] == ["base", "expert1", "expert2", "expert3", "expert4"]


def test_a_kept_state_changes_no_bit(tmp_path, folders):
    base, *experts = folders
    kept, not_kept = merge(tmp_path, "kept", base, experts), merge(tmp_path, "not", base, experts, keep_state=False)
    assert same(kept, not_kept, WEIGHTS)
    assert not (not_kept / "state").exists()


def test_it_holds_the_sum_before_rescaling(tmp_path, folders):
    base, *experts = folders
    out = merge(tmp_path, "out", base, experts)
    facts = json.loads((out / "state/opcm.json").read_bytes())
    with open_checkpoint(base) as start, open_checkpoint(out) as merged, open_checkpoint(out / STATE) as state:
        assert set(state.tensors) == set(SHAPES)
        total = {name: state.read(name) for name in SHAPES}
        scale = np.mean(facts["norms"]) / np.sqrt(
            sum(np.sum(np.square(array, dtype=float)) for array in total.values())
        )
        for name in SHAPES:
            expected = start.read(name) + scale * total[name]
            np.testing.assert_allclose(merged.read(name), expected, rtol=0, atol=1e-6, err_msg=name)


def test_sharded_on_another_device_and_resumed(tmp_path, gpu_calls, monkeypatch):
    base, *experts = (write_checkpoint(tmp_path / str(t), tiny_llama(t, scale=0.02), shards=2) for t in range(4))
    options = {"shard_size": 100_000, "device": "interpreter"}
    whole = merge(tmp_path, "whole", base, experts, **options)
    merge(tmp_path, "two", base, experts[:2], **options)
    opcm, calls = methods.get("opcm").module, []
    merge_tensor = opcm.merge_tensor

    def dies(*arguments, **others):
        calls.append(others["name"])
        if len(calls) == 12:
            raise KeyboardInterrupt
        return merge_tensor(*arguments, **others)

    monkeypatch.setattr(opcm, "merge_tensor", dies)
    with pytest.raises(KeyboardInterrupt):
        merge(tmp_path, "three", base, experts[2:], after="two", **options)
    monkeypatch.undo()
    three = merge(tmp_path, "three", base, experts[2:], after="two", resume=True, **options)
    with open_checkpoint(whole) as ours, open_checkpoint(three) as theirs, open_checkpoint(base) as start:
        assert len(ours.files) > 1
        for name in ours.tensors:
            # threads of the linear algebra may change the last bits
            np.testing.assert_allclose(ours.read(name), theirs.read(name), rtol=0, atol=1e-5, err_msg=name)
            assert np.any(ours.read(name) != start.read(name)), name


def test_command_and_recipe(tmp_path, folders):
    base, *experts = map(str, folders)
    whole = merge(tmp_path, "whole", base, experts)

    def run(*words):
        result = CliRunner().invoke(app, ["merge", *words, "-q"])
        assert result.exit_code == 0, result.output

    method = ["--method", "opcm", "-b", base]
    run(*method, "-e", experts[0], "-e", experts[1], "-o", str(tmp_path / "two"))
    run(*method, "-e", experts[2], "--continue-from", str(tmp_path / "two"), "-o", str(tmp_path / "three"))
    assert same(tmp_path / "three", whole, WEIGHTS, STATE)
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(
        f"merge_method: opcm\nbase_model: {base}\nmodels: [{{model: {experts[2]}}}]\n"
        f"continue_from: {tmp_path / 'two'}\nkeep_state: false\n"
    )
    run(str(recipe), str(tmp_path / "by_recipe"))
    assert same(tmp_path / "by_recipe", whole, WEIGHTS)
    assert not (tmp_path / "by_recipe/state").exists()
    run(str(recipe), str(tmp_path / "kept"), "--keep-state")
    assert same(tmp_path / "kept", whole, WEIGHTS, STATE)


def test_the_plan_says_what_it_takes(folders):
    base, *experts = folders
    plan = freemerge.merge("opcm", base, experts, dry_run=True)
    floats = sum(int(np.prod(shape)) for shape in SHAPES.values())
    assert plan.summary()["bytes_state"] == 4 * floats
    assert "bytes_state" not in freemerge.merge("opcm", base, experts, dry_run=True, keep_state=False).summary()


# -- what is refused, before anything is written ------------------------------------------------------------------


def refused(tmp_path, kind, folders, after, **options):
    base, *experts = folders
    with pytest.raises(kind) as caught:
        merge(tmp_path, "refused", base, experts, after=after, **options)
    assert not (tmp_path / "refused").exists()
    assert issubclass(kind, InputError)
    return str(caught.value)


def test_another_base_other_parameters_and_an_expert_twice(tmp_path, folders):
    base, first, second, third = folders
    merge(tmp_path, "two", base, [first, second], alpha=0.3)
    found = refused(tmp_path, PlanError, [third, base, second], "two", alpha=0.4)
    assert "3 problems" in found
    assert "its base was base, not" in found
    assert "expert2 is in it already, as expert2" in found
    assert "alpha was 0.3, not 0.4" in found
    by_layer = refused(
        tmp_path, PlanError, [base, third], "two", alpha=[{"filter": "b.w", "value": 0.2}, {"value": 0.3}]
    )
    assert "alpha was 0.3, not 0.2 (b.weight)" in by_layer
    merge(tmp_path, "fine", base, [third], after="two", alpha=[{"filter": "b.w", "value": 0.3}, {"value": 0.3}])


def test_a_copy_of_an_expert_is_known_by_what_it_holds(tmp_path, folders):
    base, first, second, _ = folders
    merge(tmp_path, "two", base, [first, second])
    (tmp_path / "copy.safetensors").write_bytes((second / WEIGHTS).read_bytes())
    assert "as expert2" in refused(tmp_path, PlanError, [base, tmp_path / "copy.safetensors"], "two")


def test_an_output_without_a_state(tmp_path, folders):
    base, *experts = folders
    merge(tmp_path, "none", base, experts[:2], keep_state=False)
    assert "none holds no state/opcm.json" in refused(tmp_path, CheckpointError, [base, experts[2]], "none")
    assert "nowhere holds no state/opcm.json" in refused(tmp_path, CheckpointError, [base, experts[2]], "nowhere")


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"format": 1, "parameters": {}, "base": {}, "experts": []}'])
def test_a_broken_state(tmp_path, folders, text):
    base, *experts = folders
    out = merge(tmp_path, "two", base, experts[:2])
    (out / "state/opcm.json").write_text(text)
    assert "opcm.json" in refused(tmp_path, CheckpointError, [base, experts[2]], "two")


def test_a_state_of_another_format(tmp_path, folders):
    base, *experts = folders
    out = merge(tmp_path, "two", base, experts[:2])
    facts = json.loads((out / "state/opcm.json").read_bytes())
    (out / "state/opcm.json").write_text(json.dumps(facts | {"format": 7}))
    assert "opcm.json is of format 7, not 1" in refused(tmp_path, CheckpointError, [base, experts[2]], "two")


def test_a_state_of_other_tensors(tmp_path, folders):
    base, *experts = folders
    out = merge(tmp_path, "two", base, experts[:2])
    with open_checkpoint(out / STATE) as state:
        tensors = {name: np.array(state.read(name)) for name in state.tensors if name != "b.weight"}
    write_checkpoint(tmp_path / "less", tensors)
    (tmp_path / "less" / WEIGHTS).rename(out / STATE)
    found = refused(tmp_path, PlanError, [base, experts[2]], "two")
    assert "does not hold the tensors of this merge, b.weight for one" in found


def test_a_method_without_a_state_and_an_output_that_is_an_input(tmp_path, folders):
    base, *experts = folders
    merge(tmp_path, "two", base, experts[:2])
    with pytest.raises(RecipeError, match="continue_from: linear merges all experts at once"):
        freemerge.merge("linear", base, experts, tmp_path / "out", continue_from=tmp_path / "two")
    with pytest.raises(RecipeError, match="is one of the inputs"):
        merge(tmp_path, "two", base, experts[2:], after="two", overwrite=True)

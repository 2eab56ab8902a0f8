"""The harness of benchmarks/ measures what it says, shown with a stand-in for the command it times."""

import csv
import json
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
# Averages or adds task vectors in float32 like freemerge, and takes as long as Python takes to start.
STAND_IN = """\
    #!{python}
    import json, shutil, sys
    from pathlib import Path
    sys.path.insert(0, {benchmarks!r})
    import numpy as np, synthetic
    arguments = sys.argv[1:]
    if arguments[0] != "merge":
        sys.exit()
    if "--method" in arguments:
        values = dict(zip(arguments, arguments[1:]))
        method, base, out = values["--method"], Path(values["--base"]), Path(values["-o"])
        experts = [Path(b) for a, b in zip(arguments, arguments[1:]) if a == "--expert"]
    else:
        recipe, out = json.loads(Path(arguments[1]).read_text()), Path(arguments[2])
        method, experts = recipe["merge_method"], [Path(model["model"]) for model in recipe["models"]]
        base = Path(recipe.get("base_model", experts[0]))
    if method == "free" and "{broken}":
        sys.exit("no such method")
    shutil.copytree(base, out)
    if method == "free":
        (out / "experts").mkdir()
        for expert in experts:
            shutil.copy(expert / "config.json", out / "experts" / (expert.name + ".safetensors"))
    path = out / "model.safetensors"
    head, begin = synthetic.read_header(path)
    words = [np.fromfile(d / "model.safetensors", np.uint16, offset=begin) for d in (base, *experts)]
    start, *tuned = map(synthetic.from_bfloat16, words)
    weight = 1 / len(tuned) if method == "linear" else 0.3
    merged = start + sum(weight * (expert - start) for expert in tuned)
    with path.open("r+b") as file:
        file.seek(begin)
        file.write(synthetic.to_bfloat16(merged.astype(np.float32)))
"""


@pytest.fixture
def compare(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import compare
    import synthetic

    tiny = synthetic.Llama(hidden=32, intermediate=48, layers=4, vocabulary=40, heads=4, kv_heads=2)
    monkeypatch.setattr(synthetic, "FULL", tiny)
    make = synthetic.make_checkpoints  # the process of its own would not know of `tiny`
    monkeypatch.setattr(
        synthetic, "make_checkpoints_in_process", lambda path, size, experts: make(path, tiny.scaled(size), experts)
    )
    return compare


def stand_in(directory, broken=""):
    path = directory / "freemerge"
    text = textwrap.dedent(STAND_IN).format(python=sys.executable, benchmarks=str(BENCHMARKS), broken=broken)
    path.write_text(text)
    path.chmod(0o755)
    return path


def run(compare, directory, *arguments):
    where = ["--data", str(directory / "data"), "--results", str(directory / "results")]
    code = compare.main([*where, *arguments])
    path = directory / "results" / "compare.csv"
    rows = list(csv.DictReader(path.read_text().splitlines())) if path.exists() else []
    return code, {row["what"]: row for row in rows}, (directory / "results" / "latest.md").read_text()


def test_every_merge_is_timed_against_its_floor(compare, tmp_path, capsys):
    parts = "startup,task_arithmetic,average,fr,fr_align,free,durable"
    code, rows, latest = run(
        compare, tmp_path, "--freemerge", str(stand_in(tmp_path)), "--only", parts, "--repeats", "1"
    )
    assert code == 0
    merges = {"task_arithmetic", "average", "fr", "fr_align", "free"}
    durable = {"task_arithmetic, fsync", "fr, fsync", "free, fsync"}
    assert set(rows) == merges | durable | {"--help", "methods", "python -c pass"}
    for name in merges | durable:
        row = rows[name]
        assert float(row["times_floor"]) == pytest.approx(float(row["seconds"]) / float(row["floor"]), rel=0.01)
        assert int(row["peak_mib"]) > 0
    assert latest in capsys.readouterr().out
    assert "| task_arithmetic " in latest
    assert not (tmp_path / "data" / "out").exists()


def test_a_command_that_fails_is_reported_and_the_others_are_measured(compare, tmp_path):
    broken = stand_in(tmp_path, broken="yes")
    code, rows, latest = run(compare, tmp_path, "--freemerge", str(broken), "--only", "fr,free", "--repeats", "2")
    assert code == 1
    assert set(rows) == {"fr"}
    assert rows["fr"]["repeats"] == "2"
    assert "FAILED free" in latest
    assert "no such method" in latest


def test_a_command_that_writes_something_else_is_caught(compare, tmp_path):
    copies_the_base = tmp_path / "freemerge"
    copies_the_base.write_text(
        '#!/bin/sh\nwhile [ "$1" != -o ]; do [ "$1" = --base ] && base=$2; shift; done\ncp -r "$base" "$2"\n'
    )
    copies_the_base.chmod(0o755)
    code, _, latest = run(compare, tmp_path, "--freemerge", str(copies_the_base), "--only", "fr", "--repeats", "1")
    assert code == 1
    assert "is not finite, or is the base's" in latest


FAMILY = [
    "ties",
    "breadcrumbs_ties",
    "ties_merging",
    "dare_ties",
    "della",
    "sce",
    "model_stock",
    "slerp",
    "nuslerp",
    "pcb",
    "emr",
]


def test_the_family_writes_what_plain_numpy_makes_of_it(compare, tmp_path):
    code, rows, latest = run(compare, tmp_path, "--only", ",".join(FAMILY), "--repeats", "1")
    assert code == 0, latest
    assert set(rows) == set(FAMILY)
    assert {name: rows[name]["experts"] for name in FAMILY if rows[name]["experts"] != "3"} == {
        "slerp": "1",
        "nuslerp": "2",
    }


@pytest.mark.parametrize("name", [name for name in FAMILY if name not in ("model_stock", "emr")])
def test_another_merge_is_not_taken_for_it(compare, tmp_path, name):
    import expected
    import synthetic

    model = synthetic.make_checkpoints(tmp_path, synthetic.Llama(256, 256, 1, 256, 4, 4), experts=3)
    tensor = "model.layers.0.mlp.up_proj.weight"
    base, *experts = (synthetic.read_tensor(directory, tensor) for directory in model.directories)
    experts = experts[: compare.MERGES[name].experts]
    right = base + expected.EXPECTED[name](base, np.array(experts) - base)
    assert not list(expected.disagreements(name, base, experts, right))
    for wrong in (base + 0.2 * (right - base), experts[0] * 1.01, base + sum(experts) - len(experts) * base):
        assert list(expected.disagreements(name, base, experts, wrong))


def test_growth_has_a_row_for_every_point_and_a_verdict(compare, tmp_path, monkeypatch):
    import growth

    monkeypatch.setattr(growth, "METHODS", ("task_arithmetic", "fr"))
    monkeypatch.setattr(growth, "SERIES", {"experts": [(1, 0.5, 1), (8, 0.5, 8)], "size": [(0.5, 0.5, 2)]})
    code, rows, latest = run(
        compare, tmp_path, "--freemerge", str(stand_in(tmp_path)), "--only", "growth", "--repeats", "1"
    )
    assert code == 0
    assert len(rows) == 2 * 3
    assert rows["fr, experts = 8"]["experts"] == "8"
    assert "experts 8" in latest
    assert "size 0.5" in latest


def test_official_chain_is_extrapolated_by_elements(compare, tmp_path):
    pytest.importorskip("torch")
    code, rows, _ = run(compare, tmp_path, "--only", "official", "--repeats", "1")
    assert code == 0
    assert set(rows) == {"official fr", "official fr_align", "official free"}
    assert all("EXTRAPOLATED" in row["notes"] for row in rows.values())


def test_official_chain_is_the_filter_of_the_reference(compare):
    torch = pytest.importorskip("torch")
    import official_chain

    base = torch.zeros(24, 40)
    vector = torch.randn(24, 40, generator=torch.Generator().manual_seed(0))
    u, v = np.ogrid[:24, :40]
    distance = np.sqrt((u - 12) ** 2 + (v - 20) ** 2)
    gain = (distance <= 2) * 1.0 + ((distance >= 2) & (distance <= np.float32(0.7 * 24)))
    expected = np.fft.ifft2(np.fft.fft2(vector.numpy()) * gain).real
    # float32 transforms of numbers of order 1
    np.testing.assert_allclose(official_chain.filtered_task_vector(base, vector).numpy(), expected, atol=1e-5)


def test_bars_say_by_how_much_they_were_missed(compare):
    import bars

    judged = bars.judge({"fr": 4.0, "official fr": 400.0}, {"fr": 1.0}, {"fr": 2**30})
    assert [(what, verdict) for what, _, _, verdict in judged] == [
        ("fr", "missed: 1.33 of the bar"),
        ("fr", "met"),
        ("fr: peak anonymous memory", "met"),
    ]


def test_cost_of_a_byte_may_fall_but_not_rise(compare):
    import growth

    assert growth.verdict([1.0, 1.1, 1.19]).startswith("met")
    assert growth.verdict([1.0, 0.8, 0.5]) == "met: falls by 50%"
    assert growth.verdict([1.0, 1.1, 1.3]) == "missed: rises by 30%"


def test_peak_counts_children_and_anonymous_memory_only(compare):
    import processes

    child = "import numpy, time; kept = numpy.ones(50_000_000, numpy.uint8); time.sleep(0.3)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}], check=True)"
    peak = processes.run([sys.executable, "-c", parent]).peak_bytes
    assert 50e6 < peak < 200e6


def test_a_failed_command_says_why(compare):
    import processes

    with pytest.raises(processes.CommandFailed, match="exit code 3\nthe reason"):
        processes.run([sys.executable, "-c", "import sys; print('the reason', file=sys.stderr); sys.exit(3)"])


def test_synthetic_checkpoints_are_what_transformers_reads(compare, tmp_path):
    transformers = pytest.importorskip("transformers")
    import synthetic

    model = synthetic.make_checkpoints(tmp_path, synthetic.FULL, experts=1)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(model.experts[0]).state_dict()
    assert {name: tuple(tensor.shape) for name, tensor in loaded.items()} == synthetic.FULL.tensors()
    name = "model.layers.2.mlp.up_proj.weight"
    np.testing.assert_array_equal(loaded[name].float().numpy(), synthetic.read_tensor(model.experts[0], name))


def test_synthetic_task_vectors_are_dense_with_outliers(compare, tmp_path):
    import synthetic

    model = synthetic.make_checkpoints(tmp_path, synthetic.Llama(256, 256, 1, 256, 4, 4), experts=1)
    name = "model.embed_tokens.weight"
    base, expert = (synthetic.read_tensor(directory, name) for directory in model.directories)
    assert base.std() == pytest.approx(synthetic.INITIAL, rel=0.05)
    task_vector = np.abs(expert - base)
    assert np.median(task_vector) < synthetic.INITIAL / 10
    assert task_vector.max() > 5 * task_vector.std()


def test_synthetic_bytes_do_not_depend_on_threads(compare, tmp_path, monkeypatch):
    import os

    import synthetic

    monkeypatch.setattr(synthetic, "BLOCK", 512)
    made = []
    for threads in (1, 7):
        monkeypatch.setattr(os, "cpu_count", lambda threads=threads: threads)
        model = synthetic.make_checkpoints(tmp_path / str(threads), synthetic.FULL, experts=1)
        made.append((model.experts[0] / "model.safetensors").read_bytes())
    assert made[0] == made[1]


def test_the_recipe_says_what_both_tools_do(compare, tmp_path):
    import commands
    import synthetic

    model = synthetic.make_checkpoints(tmp_path, synthetic.FULL, experts=2)
    recipe = json.loads(commands.mergekit_recipe("task_arithmetic", model, tmp_path).read_text())
    assert recipe["merge_method"] == "task_arithmetic"
    assert recipe["base_model"] == str(model.base)
    assert recipe["parameters"] == {"weight": 0.3}
    assert [entry["model"] for entry in recipe["models"]] == list(map(str, model.experts))


@pytest.fixture
def experts(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import experts

    monkeypatch.setattr(experts, "ROUNDS", 1)
    return experts


def tiny_bert():
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=200, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
    )
    return transformers.BertModel(config, add_pooling_layer=False).eval()


def test_a_mixed_batch_is_right_before_it_is_timed(experts, monkeypatch, tmp_path):
    found = experts.mixed_batch(tiny_bert(), 2, tmp_path)
    assert set(found) == {"dense", "routed", "switched", "swapped"}
    assert all(milliseconds > 0 for milliseconds in found.values())

    import attached_models
    from freemerge.experts.memory import MemoryExpert

    monkeypatch.setattr(MemoryExpert, "scale", lambda expert, name: len(expert.tensors) * next(scales))
    scales = iter(range(1, 10**6))  # another one each time somebody asks
    assert attached_models.random_expert("e", {"a": (40, 40)}, 0.1, 0).scale("a") == 1
    with pytest.raises(AssertionError, match="Tensor-likes are not close"):
        experts.mixed_batch(tiny_bert(), 2, tmp_path)


def test_memory_of_experts_is_held_against_their_files(experts, tmp_path):
    found = experts.memory(tiny_bert(), tmp_path)
    files = [path.stat().st_size for path in sorted(tmp_path.glob("*.safetensors"))]
    assert found["their files"] == pytest.approx(sum(files[1:]) / 1e6)
    ((what, bar, measured, verdict),) = experts.judge("encoder_memory", {"held for 7 more": 3.0, "their files": 2.0})
    assert (what, bar, measured) == ("encoder_memory of an expert", "<= 1.05 x its file", "1.50 x its file")
    assert verdict.startswith("missed")


def test_switching_and_batches_have_their_bars(experts):
    switched = {"file read": 1000, "expert put in place": 20, "changed for another": 60, "taken out": 10}
    assert [row[-1] for row in experts.judge("switch", switched)] == ["met", "missed: 2.00 of the bar", "met"]
    batch = {"dense": 100, "routed": 120, "switched": 400, "swapped": 600}
    assert [row[2:] for row in experts.judge("encoder_16", batch)] == [
        ("1.20 x dense", "met"),
        ("5.0 x faster than swapped models", "met"),
    ]

"""The command line: what it makes of its arguments, what it prints, its exit codes. Merging is api's business."""

import io
import json
import os
import re
import signal
import sys
import types
from dataclasses import dataclass
from pathlib import Path

import pytest
from typer.testing import CliRunner

from freemerge import cli
from freemerge.cli.output import progress_bar
from freemerge.errors import OutputError, PlanError
from freemerge.recipe import load_recipe

RECIPE = """
merge_method: task_arithmetic
base_model: b
models:
- model: runs/math
  parameters: {weight: 0.5}
- model: code
"""


@dataclass
class FakeResult:
    out: str
    bytes_out: int = 3 << 20
    experts: tuple = ("math", "code")
    seconds: float = 1.234
    warnings: tuple = ("lm_head.weight: untied",)


class FakePlan:
    def rows(self):
        return [{"tensor": "w", "shape": [2, 3], "action": "merge", "transform": "complement"}]

    def summary(self):
        return {"bytes_in": 12, "memory": 2 << 30, "passes": 1, "warnings": ["odd"]}


@pytest.fixture
def calls(monkeypatch):
    """What api.merge was called with."""
    seen = []

    def merge(recipe, *, out, **options):
        seen.append({"asked": recipe, "out": out, **options})
        return FakePlan() if options.get("dry_run") else FakeResult(out)

    replace_merge(monkeypatch, merge)
    return seen


def replace_merge(monkeypatch, merge):
    monkeypatch.setitem(sys.modules, "freemerge.api", types.SimpleNamespace(merge=merge))


def models_of(calls):
    return {expert.name: expert.model for expert in load_recipe(calls[0]["asked"]).experts}


def run(*arguments):
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.yml"
    path.write_text(RECIPE)
    return path


class TestMerge:
    @pytest.mark.parametrize("out", [["OUT"], ["-o", "OUT"]])
    def test_a_recipe(self, calls, recipe, out):
        answer = run("merge", recipe, *out)
        assert (answer.exit_code, calls[0]["asked"], calls[0]["out"]) == (0, recipe, "OUT")
        assert "3.0 MiB" in answer.stdout
        assert "warning: lm_head.weight: untied" in answer.stderr

    @pytest.mark.parametrize("out", [["OUT"], ["-o", "OUT"]])
    def test_flags(self, calls, out):
        models = ["-m", "task_arithmetic", "-b", "B", "-e", "E1", "-e", "E2"]
        answer = run("merge", *models, "-p", "scaling=0.3", "-p", "normalize=true", "--dtype", "bfloat16", *out)
        assert (answer.exit_code, calls[0]["out"]) == (0, "OUT")
        recipe = load_recipe(calls[0]["asked"])
        assert (recipe.method, recipe.base, str(recipe.dtype)) == ("task_arithmetic", "B", "bfloat16")
        assert models_of(calls) == {"E1": "E1", "E2": "E2"}
        assert recipe.parameters == {"scaling": 0.3, "normalize": True}

    def test_named_experts_and_their_parameters(self, calls):
        experts = ["-e", "math=runs/1", "-e", "code=runs/2"]
        run("merge", "-m", "linear", *experts, "-p", "weight.math=1e-1", "-p", "weight.code=2", "O")
        assert models_of(calls) == {"math": "runs/1", "code": "runs/2"}
        assert [expert.parameters for expert in load_recipe(calls[0]["asked"]).experts] == [
            {"weight": 0.1},
            {"weight": 2},
        ]

    def test_names_are_found_for_the_others(self, calls):
        run("merge", "-m", "linear", "-e", "runs/math", "-e", "math=runs/2", "-e", "other/math/", "O")
        assert models_of(calls) == {"math-2": "runs/math", "math": "runs/2", "math-3": "other/math/"}

    def test_a_path_with_an_equals_sign_is_no_name(self, calls, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        Path("lr=3").mkdir()
        run("merge", "-m", "linear", "-e", "lr=3", "-e", "runs/lr=4", "O")
        assert models_of(calls) == {"lr-3": "lr=3", "lr-4": "runs/lr=4"}

    def test_options_reach_the_merge(self, calls, recipe):
        flags = ["--resume", "--overwrite", "--allow-pickle", "--allow-nonfinite", "--no-fsync", "--quiet"]
        answer = run("merge", recipe, "O", "--threads", 3, "--max-memory", "1GiB", "--shard-size", "2GB", *flags)
        expected = {
            "threads": 3,
            "max_memory": 1 << 30,
            "shard_size": 2_000_000_000,
            "device": "auto",
            "resume": True,
            "overwrite": True,
            "allow_pickle": True,
            "check_finite": False,
            "fsync": False,
            "progress": None,
        }
        assert {key: calls[0][key] for key in expected} == expected
        assert answer.stdout == ""

    def test_a_recipe_with_something_changed(self, calls, recipe):
        run("merge", recipe, "O", "-p", "weight=0.25", "-p", "scaling=2", "--dtype", "float32")
        changed = load_recipe(calls[0]["asked"])
        assert changed.parameters == {"scaling": 2, "weight": 0.25}
        assert [expert.parameters for expert in changed.experts] == [{}, {}]
        assert str(changed.out_dtype) == "float32"

    def test_one_experts_parameter_changed(self, calls, recipe):
        run("merge", recipe, "O", "-p", "weight.code=0.25")
        assert [expert.parameters for expert in load_recipe(calls[0]["asked"]).experts] == [
            {"weight": 0.5},
            {"weight": 0.25},
        ]

    def test_json(self, calls, recipe):
        assert json.loads(run("merge", recipe, "O", "--json").stdout)["experts"] == ["math", "code"]

    def test_dry_run_needs_no_folder(self, calls, recipe):
        answer = run("merge", recipe, "--dry-run")
        assert (answer.exit_code, calls[0]["dry_run"], calls[0]["out"]) == (0, True, None)
        assert "complement" in answer.stdout
        assert "2.0 GiB" in answer.stdout
        assert "warning: odd" in answer.stderr
        assert json.loads(run("merge", recipe, "--dry-run", "--json").stdout)["rows"][0]["shape"] == [2, 3]

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ([], "give a recipe or --method"),
            (["r.yml"], "OUT is missing"),
            (["r.yml", "O", "-m", "linear"], "one of them"),
            (["r.yml", "O", "-b", "B"], "--base and --expert go with --method"),
            (["r.yml", "O", "-o", "P"], "OUT is given twice"),
            (["-m", "linear", "O", "-p", "scaling"], "write it as name=value"),
            (["-m", "linear", "O", "-p", "a=1", "-p", "a=2"], "a is given twice"),
            (["-m", "linear", "O", "-p", "a=1", "-p", "a.b=2"], "a.b is given twice"),
            (["-m", "linear", "O", "-p", "a=["], "is not a value"),
            (["-m", "linear", "O", "-e", "a=1", "-e", "a=2"], "same name"),
            (["-m", "liner", "O", "-e", "a"], "did you mean linear?"),
            (["-m", "linear", "O", "-e", "a", "--dtype", "float17"], "did you mean float16?"),
            (["r.yml", "O", "--threads", "x"], "--threads"),
            (["r.yml", "O", "--nonsense"], "--nonsense"),
            (["r.yml", "O", "--max-memory", "much"], "--max-memory much: not a size"),
        ],
    )
    def test_bad_arguments_end_with_2(self, calls, arguments, message):
        answer = run("merge", *arguments)
        assert (answer.exit_code, calls) == (2, [])
        assert message in answer.stderr

    @pytest.mark.parametrize(("error", "code"), [(PlanError("no such tensor"), 2), (OutputError("disk full"), 1)])
    def test_errors_are_messages(self, monkeypatch, recipe, error, code):
        def fail(*_, **__):
            raise error

        replace_merge(monkeypatch, fail)
        answer = run("merge", recipe, "O")
        assert (answer.exit_code, answer.stdout) == (code, "")
        assert answer.stderr == f"{type(error).__name__}: {error}\n"

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_a_signal_says_how_to_go_on(self, monkeypatch, recipe, number):
        before = signal.getsignal(number)
        replace_merge(monkeypatch, lambda *_, **__: os.kill(os.getpid(), number))
        answer = run("merge", recipe, "O")
        assert answer.exit_code == 1
        assert "nothing in O was changed; the same command with --resume" in answer.stderr
        assert signal.getsignal(number) == before


class TestMethods:
    def test_all_are_listed(self):
        answer = run("methods")
        assert re.search("^task_arithmetic +Task Arithmetic: the base plus the scaled sum", answer.stdout, re.MULTILINE)
        assert json.loads(run("methods", "--json").stdout)["linear"].startswith("Linear: ")

    def test_one_is_described(self):
        answer = run("methods", "task_arithmetic")
        for expected in [
            "arXiv:2212.04089",
            "weight = (depends)   number, one for each expert",
            "alias    lambda: scaling",
        ]:
            assert expected in answer.stdout
        described = json.loads(run("methods", "linear", "--json").stdout)
        assert (described["uses_base"], described["parameters"][1]["kind"]) == (False, "flag")

    def test_a_typo(self):
        answer = run("methods", "task_aritmetic")
        assert (answer.exit_code, answer.stderr.strip()[-29:]) == (2, "did you mean task_arithmetic?")


class TestProgressBar:
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    def test_bytes_and_rate_on_a_terminal(self, monkeypatch):
        monkeypatch.setattr(sys, "stderr", self.Terminal())
        with progress_bar("merging") as progress:
            progress(1 << 20, 4 << 20)
        drawn = sys.stderr.getvalue()
        assert "merging" in drawn
        assert "1.0/4.0 MiB" in drawn

    def test_nothing_elsewhere_or_when_quiet(self, monkeypatch):
        monkeypatch.setattr(sys, "stderr", io.StringIO())
        with progress_bar("merging") as progress:
            assert progress is None
        monkeypatch.setattr(sys, "stderr", self.Terminal())
        with progress_bar("merging", quiet=True) as progress:
            assert progress is None


def test_info_names_every_op_and_why(monkeypatch):
    monkeypatch.setenv("FREEMERGE_IMPL", "reference")
    told = json.loads(run("info", "--json").stdout)
    assert {op["version"] for op in told["ops"]} == {"reference"}
    assert told["FREEMERGE_IMPL"] == "reference"
    assert "add_task_vectors" in run("info").stdout


def test_every_command_has_help_and_an_example():
    experts = [f"experts {name}" for name in ("list", "apply", "compact", "export", "extract", "join")]
    for name in ["merge", "methods", "inspect", "verify", "info", *experts]:
        text = run(*name.split(), "--help").stdout
        assert f"freemerge {name}" in text.partition("Options")[0].partition("\n")[2], name

"""The goldens: what the official code computes on small inputs, reproduced."""

import importlib.util
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
CASES = sorted((TESTS / "goldens").rglob("*.safetensors"))

specification = importlib.util.spec_from_file_location("run_goldens", TESTS / "run_goldens.py")
run_goldens = importlib.util.module_from_spec(specification)
specification.loader.exec_module(run_goldens)


@pytest.mark.parametrize("path", CASES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_golden(path):
    assert run_goldens.compare(run_goldens.read_case(path)).problems == []


def test_there_are_goldens_of_every_method():
    reproduced = {"adamerging", "average", "doge", "emr", "fr", "free", "iso_c", "iso_cts", "opcm", "tall_mask"}
    reproduced |= {"fr_filter", "task_arithmetic", "tsvm", "mergekit", "breadcrumbs", "dare", "ties", "pcb"}
    reproduced |= {"copa", "intervmerge", "smile", "twin"}
    assert {path.parent.name for path in CASES} == reproduced


def test_a_wrong_result_fails(monkeypatch, capsys):
    path = TESTS / "goldens" / "task_arithmetic" / "lam03_f32.safetensors"
    merge = run_goldens.merge_state_dicts

    def slightly_wrong(method, base, experts, *, scaling, **others):
        return merge(method, base, experts, scaling=scaling * 1.01, **others)

    monkeypatch.setattr(run_goldens, "merge_state_dicts", slightly_wrong)
    assert run_goldens.report(path) == "fail"
    assert "lam03_f32" in capsys.readouterr().out


def test_unknown_methods_are_unsupported_not_failed(tmp_path, capsys):
    path = TESTS / "goldens" / "average" / "mean5_f32.safetensors"
    data = path.read_bytes().replace(b'\\"method\\": \\"average\\"', b'\\"method\\": \\"averagf\\"')
    assert data != path.read_bytes()
    (tmp_path / "case.safetensors").write_bytes(data)
    assert run_goldens.main([str(tmp_path)]) == 0
    assert "unsupported: method" in capsys.readouterr().out

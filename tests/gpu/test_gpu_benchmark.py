"""`make gpu` ends with benchmarks/gpu.py: tried here on small matrices, so that a slip costs no device time."""

import json

import pytest
import torch

from gpu_experts import measure_experts
from gpu_merges import measure_merges
from gpu_ops import measure_ops
from gpu_results import Figure, printed, write_json
from gpu_timing import Device


@pytest.fixture
def device() -> Device:
    return Device("cuda" if torch.cuda.is_available() else "cpu")


def test_every_op_is_measured(device):
    figures = [figure for part in measure_ops(device, copy=1e9, shrink=128) for figure in part]
    assert [figure.what for figure in figures if figure.bar] == [
        "add_task_vectors",
        "task_vector_statistics",
        "high_pass 32x32",
        "high_pass 32x32, torch chain",
        "high_pass 32x112, torch chain",
        "high_pass 32x112, rfft2 chain",
        "high_pass 32x86, torch chain",
        "high_pass 32x86, rfft2 chain",
        "sparse_rows 1 %, torch.topk",
    ]
    assert all(figure.value > 0 for figure in figures)


def test_whole_merges_are_measured(device, tmp_path):
    figures = [figure for part in measure_merges(device, tmp_path, copy=1e9, host=1e9, shrink=64) for figure in part]
    assert [figure.what for figure in figures] == [
        "fr 1.1B, files to files",
        "fr 8B, files to files",
        "Session 8B, task_arithmetic again",
    ]
    assert not any(tmp_path.iterdir())


def test_decoding_with_experts_is_measured(device):
    figures = [figure for part in measure_experts(device, shrink=64) for figure in part]
    assert [figure.what for figure in figures if figure.bar] == [
        "decoding, batch 1, 1 experts, CUDA graph",
        "decoding, batch 32, 8 experts, CUDA graph",
        "use_expert, one for another",
    ]
    assert all(figure.value > 0 for figure in figures)


def test_the_table_says_met_missed_and_failed(tmp_path):
    figures = [
        Figure.of_bytes("a", 85, 1.0, 100, bar=0.85),
        Figure.against("b", 2.0, 3.0, bar=4),
        Figure("c", 1.0, 1.2, "times", 1.3, most=True),
        Figure.failed("d", ValueError("no\nmore")),
    ]
    assert [figure.verdict for figure in figures] == ["met", "MISSED", "met", "FAILED"]
    assert "ValueError: no" in printed(figures)
    write_json(tmp_path / "gpu.json", {"device": "none"}, {"copy": 1.0}, figures)
    assert json.loads((tmp_path / "gpu.json").read_text())["figures"][1]["verdict"] == "MISSED"


def test_the_official_mask_is_what_our_filter_keeps(device):
    """The opponents compute the same: within float32's error of ours, before the one rounding to bfloat16."""
    from freemerge.kernels.high_pass import high_pass
    from gpu_ops import CUTOFF, WEIGHTS, _half, _mask, _real_chain, _torch_chain, weights_like_trained

    base, experts, out = weights_like_trained((33, 96), device.name, seed=0)
    high_pass(base, experts, WEIGHTS, cutoff=CUTOFF, inner_ring="official", out=out)
    mask, theirs = _mask(33, 96, device.name), torch.empty_like(out)
    _torch_chain(base, experts, theirs, mask)
    torch.testing.assert_close(theirs, out, rtol=2**-7, atol=1e-6)
    even = weights_like_trained((32, 96), device.name, seed=0)
    out = even[2]
    high_pass(*even[:2], WEIGHTS, cutoff=CUTOFF, inner_ring="official", out=out)
    theirs = torch.empty_like(out)
    _real_chain(*even[:2], theirs, _half(_mask(32, 96, device.name)))
    torch.testing.assert_close(theirs, out, rtol=2**-7, atol=1e-6)

"""The example of a search, with a few training steps."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

for package in ("sklearn", "torch"):
    pytest.importorskip(package)


def test_sweep_searches_and_reports(tmp_path):
    command = [sys.executable, str(ROOT / "examples/sweep.py"), "--steps", "14", "--generations", "2"]
    finished = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert finished.returncode == 0, finished.stderr
    for text in ("fr: mean accuracy", "weight 0.3 for all", "parity", "on 250 other images", "26 merges in"):
        assert text in finished.stdout
    assert not list(tmp_path.iterdir())

"""Every Triton kernel compiles to sm_80 and sm_90 without spilling. `pytest -s` shows what the kernels need."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
MAY_USE_THE_STACK: set[str] = set()  # names in triton_signatures.py, with the reason beside them


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """All kernels there are, and the resources of those in triton_signatures.py."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("TRITON_")}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    done = subprocess.run(
        [sys.executable, HERE / "compile_triton.py"], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    first, *rest = map(json.loads, done.stdout.splitlines())
    return first["kernels"], rest


def test_every_kernel_has_a_signature(report):
    kernels, compiled = report
    missing = set(kernels) - {used["name"].partition(" ")[0] for used in compiled}
    assert not missing, f"give them a signature in {HERE / 'triton_signatures.py'}"


def test_no_kernel_spills(report):
    compiled = report[1]
    print(f"\n{'kernel':72} {'target':6} registers  shared  stack  local  widest load")
    for used in compiled:
        print(
            "{name:72} {architecture:6} {reg:9} {shared:7} {stack:6} {local:6} {load:7} bit".format(**used),
        )
    spilling = {used["name"] for used in compiled if used["stack"] or used["local"]}
    assert compiled
    assert spilling <= MAY_USE_THE_STACK


def test_bfloat16_is_loaded_16_bytes_at_a_time(report):
    narrow = [used for used in report[1] if used["name"].endswith(" bfloat16") and used["load"] < 128]
    assert not narrow

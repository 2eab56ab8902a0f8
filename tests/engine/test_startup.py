"""Start-up stays short because nothing heavy is imported: what is imported is tested, not the time."""

import subprocess
import sys

import pytest

from freemerge.testing import tiny_llama, tiny_llama_config, write_checkpoint

LOOK = """
import sys
from freemerge.cli import main
sys.argv = ["freemerge", *sys.argv[1:]]
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
print("IMPORTED", *sys.modules)
"""


def imported_by(*arguments, cwd=None) -> set[str]:
    command = [sys.executable, "-P", "-c", LOOK, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, check=False)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.rpartition("IMPORTED")[2].split())


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["methods"], ["merge", "--help"]], ids=" ".join)
def test_help_and_methods_import_nothing_heavy(arguments):
    heavy = {"numpy", "ml_dtypes", "yaml", "torch", "rich", "safetensors", "huggingface_hub"}
    if arguments in (["--help"], ["methods"]):  # typer itself imports pydantic where a command has options
        heavy.add("pydantic")
    assert not heavy & imported_by(*arguments)


def test_import_freemerge_costs_nothing():
    done = subprocess.run(
        [sys.executable, "-P", "-c", "import sys, freemerge; print(*sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert not {"numpy", "typer", "yaml", "pydantic", "torch"} & set(done.stdout.split())


def test_without_a_gpu_info_looks_torch_up_without_importing_it():
    assert not {"torch", "transformers"} & imported_by("info")


def test_python_m_freemerge():
    done = subprocess.run(
        [sys.executable, "-P", "-m", "freemerge", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("freemerge 0.")


def test_a_merge_of_local_models_imports_neither_torch_nor_the_hub(tmp_path):
    for seed, name in enumerate(["base", "math"]):
        write_checkpoint(tmp_path / name, tiny_llama(seed), config=tiny_llama_config())
    flags = ["-m", "task_arithmetic", "-b", "base", "-e", "math", "-o", "out"]
    imported = imported_by("merge", *flags, cwd=tmp_path)
    assert (tmp_path / "out/model.safetensors").exists()
    assert not {"torch", "transformers", "huggingface_hub", "matplotlib", "rich", "scipy"} & imported

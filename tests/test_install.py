"""What is shipped: the sdist can be built, the wheel works outside the checkout with nothing but what it declares."""

import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from importlib.metadata import distribution
from pathlib import Path

import pytest

packaging = pytest.importorskip("packaging.requirements")
pytest.importorskip("build")
ROOT = Path(__file__).parent.parent
# Neither the checkout's folders nor what the developer has set may be seen.
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "FREEMERGE"))}

pytestmark = pytest.mark.slow


def run(*command, cwd):
    done = subprocess.run([str(part) for part in command], cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    out = tmp_path_factory.mktemp("sdist")
    run(sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", out, ROOT, cwd=out)
    return next(out.glob("freemerge-*.tar.gz"))


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory):
    """Built from the sdist, with the objects of the checkout: that its sources are complete is another test."""
    out = tmp_path_factory.mktemp("wheel")
    with tarfile.open(sdist) as archive:
        archive.extractall(out)
    source = next(out.glob("freemerge-*"))
    for objects in (ROOT / "build").glob("temp.*"):
        shutil.copytree(objects, source / "build" / objects.name)
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps", "--no-index"]
    run(*pip, "-w", out, source, cwd=out)
    return next(out.glob("freemerge-*.whl"))


@pytest.fixture(scope="module")
def clean(wheel, tmp_path_factory):
    """The bin directory of an environment with the wheel and its declared dependencies, torch not among them."""
    directory = tmp_path_factory.mktemp("clean")
    venv.create(directory, with_pip=False, symlinks=True)
    python = directory / "bin" / "python"
    packages = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=directory).strip())
    for name in declared("freemerge") - {"freemerge"}:
        link(name, packages)
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", "--no-index"]
    run(*pip, wheel, cwd=directory)
    return directory / "bin"


def declared(name, found=None):
    """`name` and all it requires without extras, by their names."""
    found = set() if found is None else found
    if name not in found:
        found.add(name)
        for text in distribution(name).requires or ():
            requirement = packaging.Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                declared(requirement.name, found)
    return found


def link(name, packages):
    files = distribution(name).files
    for top in {file.parts[0] for file in files if file.parts[0] not in ("..", "__pycache__")}:
        if not (packages / top).exists():
            (packages / top).symlink_to(distribution(name).locate_file(top))


def test_sdist_holds_sources_tests_and_benchmarks(sdist):
    with tarfile.open(sdist) as archive:
        inside = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    folders = ("engine", "kernels", "csrc", "bindings", "tests", "benchmarks", "docs", "examples")
    kept = (".py", ".pyi", ".cpp", ".h", ".cu", ".md", ".safetensors", ".typed")
    for folder in folders:
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in kept:
                assert str(path.relative_to(ROOT)) in inside
    assert {"Makefile", "constraints.txt", "LICENSE", "README.md", "pyproject.toml", "setup.py"} <= inside
    assert not [name for name in inside if name.endswith((".so", ".pyc"))]


def test_wheel_holds_the_package_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        inside = archive.namelist()
    assert {name.split("/")[0].split("-")[0] for name in inside} == {"freemerge"}
    assert any(name.startswith("freemerge/kernels/_cpu.") and name.endswith(".so") for name in inside)
    for folder, package in {"engine": "", "kernels": "kernels/", "csrc": "csrc/"}.items():
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".pyi", ".cpp", ".h", ".cu", ".typed"):
                assert f"freemerge/{package}{path.relative_to(ROOT / folder)}" in inside


def test_wheel_works_outside_the_checkout_without_torch(clean, tmp_path):
    program = """if True:
        import importlib.util, numpy, freemerge
        from importlib import resources
        from freemerge.kernels import dispatch
        assert "site-packages" in freemerge.__file__, freemerge.__file__
        assert importlib.util.find_spec("torch") is None
        assert hasattr(dispatch._cpu, "add_task_vectors")
        assert (resources.files("freemerge.csrc") / "include" / "freemerge" / "dtype.h").is_file()
        base, expert = ({"weight": numpy.full((4, 4), value, numpy.float32)} for value in (1, 3))
        merged = freemerge.merge_state_dicts("task_arithmetic", base, [expert], scaling=0.5)
        numpy.testing.assert_array_equal(merged["weight"], 2)
    """
    run(clean / "python", "-c", program, cwd=tmp_path)


def test_command_of_the_wheel_answers(clean, tmp_path):
    assert "freemerge" in run(clean / "freemerge", "info", cwd=tmp_path)
    assert "task_arithmetic" in run(clean / "freemerge", "methods", cwd=tmp_path)

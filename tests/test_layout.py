"""Promises about the tree itself."""

import ast
import importlib
from pathlib import Path

import pytest

from freemerge import kernels, methods
from freemerge.kernels import dispatch
from freemerge.testing import versions

ROOT = Path(__file__).parent.parent
OPS = kernels.ops()

# Lowest first; a module imports only from its own layer and those below.
LAYERS = [
    ["errors", "lora_names", "sizes"],
    ["kernels.array", "kernels.checks", "kernels.dispatch", "kernels"],
    [f"kernels.{op}" for op in OPS],
    ["kernels.triton", "kernels.cuda"],
    ["methods", "parts", "top_k", "checkpoint"],
    ["experts.sidecar", "experts.apply", "experts.memory", "experts.routed_layer", "experts"],
    ["attached"],
    ["routers"],
    ["chat_templates", "schema", "recipe", "documents", "settings", "accelerator", "devices"],
    ["adapters", "token_tensors", "vocabulary", "match", "plan", "slices", "modules", "stages", "running_state"],
    ["experts.extract", "sinks", "module_sink", "blas", "buffers", "readahead"],
    ["placement", "inputs"],
    ["stream", "resident", "experts.from_model", "experts.export", "experts.join", "experts.lora"],
    ["opening", "publish", "state_dicts"],
    ["api"],
    ["session"],
    ["integrations"],
    ["spectrum", "inspect", "info", "reference", "testing", "cli", "__main__"],
]


def layer(module: str) -> int:
    """Of the longest name in LAYERS that `module` is, or lies in."""
    found = [(len(name), i) for i, names in enumerate(LAYERS) for name in names if f"{module}.".startswith(f"{name}.")]
    assert found, f"{module} is in no layer: give it its place in LAYERS"
    return max(found)[1]


def modules():
    for folder, prefix in (("engine", ""), ("kernels", "kernels.")):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            name = prefix + ".".join(part for part in parts if part != "__init__")
            if name:
                yield name.rstrip("."), path


def imports(path: Path):
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("freemerge."):
            for alias in node.names:
                inner = f"{node.module}.{alias.name}".removeprefix("freemerge.")
                yield (
                    inner
                    if (ROOT / "engine" / f"{inner.replace('.', '/')}.py").exists()
                    else node.module.removeprefix("freemerge.")
                )
        elif isinstance(node, ast.Import):
            yield from (
                alias.name.removeprefix("freemerge.") for alias in node.names if alias.name.startswith("freemerge.")
            )


@pytest.mark.parametrize(("module", "path"), list(modules()))
def test_imports_point_downwards(module, path):
    upwards = [other for other in imports(path) if layer(other) > layer(module)]
    assert not upwards


@pytest.mark.parametrize(("module", "path"), list(modules()))
def test_nothing_imports_by_folder_name(module, path):
    text = path.read_text("utf-8")
    assert "import engine" not in text
    assert "from engine" not in text
    assert "import kernels\n" not in text.replace("from freemerge import kernels\n", "")


@pytest.mark.parametrize("op", OPS)
def test_every_op_has_reference_compiled_version_test_and_benchmark(op):
    module = importlib.import_module(f"freemerge.kernels.{op}")
    assert callable(getattr(module, op))
    assert callable(getattr(module, f"{op}_reference"))
    assert module.__doc__.startswith(f"{op}: ")
    assert (ROOT / f"tests/ops/test_{op}.py").exists()
    assert (ROOT / f"benchmarks/bench_{op}.py").exists()
    assert versions(op)


@pytest.mark.parametrize("op", OPS)
def test_every_op_has_one_gpu_version_called_like_its_reference_and_a_test(op):
    paths = [path for folder in dispatch.GPU_FOLDERS if (path := ROOT / f"kernels/{folder}/{op}.py").exists()]
    assert len(paths) == 1
    assert (ROOT / f"tests/gpu/test_{op}.py").exists()
    assert parameters(paths[0], op) == parameters(ROOT / f"kernels/{op}.py", f"{op}_reference")


def parameters(path: Path, function: str) -> list[str]:
    """The names of its parameters; read, because importing a GPU version takes the tools it is written in."""
    definitions = [node for node in ast.parse(path.read_text("utf-8")).body if isinstance(node, ast.FunctionDef)]
    return [argument.arg for node in definitions if node.name == function for argument in node.args.args]


@pytest.mark.parametrize("name", methods.names())
def test_every_method_has_a_source_and_its_parameters_are_explained(name):
    method = methods.get(name)
    assert method.source
    assert method.summary.endswith(".")
    unexplained = [parameter.name for parameter in method.parameters.values() if not parameter.help]
    assert not unexplained


def test_every_public_name_resolves_and_is_explained():
    import freemerge

    for name in set(freemerge.__all__) - {"__version__"}:
        assert getattr(freemerge, name).__doc__

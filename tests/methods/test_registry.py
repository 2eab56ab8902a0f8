"""The registry: methods are found by file name, and their parameters are read from the signature of merge_tensor."""

import subprocess
import sys

import pytest

from freemerge import devices, methods
from freemerge.errors import RecipeError, UnavailableError
from freemerge.kernels import dispatch


def test_every_method_says_what_it_is():
    summaries = methods.summaries()
    assert {"average", "linear", "task_arithmetic"} <= set(methods.names()) == set(summaries)
    for name in methods.names():
        method = methods.get(name)
        assert method.summary == summaries[name]
        assert method.summary.endswith(".")
        assert method.scope in ("element", "tensor", "model")
        assert "METHODS.md" in method.source
        for parameter in method.parameters.values():
            assert parameter.help, f"{name}: {parameter.name} is not explained in the Args section"
        for variant, presets in method.variants.items():
            assert set(presets) <= set(method.parameters), variant
        assert set(method.aliases.values()) <= set(method.parameters)


def test_parameters_are_read_from_the_signature():
    parameters = methods.get("task_arithmetic").parameters
    assert list(parameters) == ["weight", "scaling", "normalize"]
    weight, scaling, normalize = parameters.values()
    assert (weight.kind, weight.per_expert, weight.default) == ("number", True, None)
    assert (scaling.kind, scaling.per_expert, scaling.default) == ("number", False, None)
    assert (normalize.kind, normalize.default) == ("flag", False)
    assert methods.get("task_arithmetic").aliases == {"lambda": "scaling"}


def test_an_unknown_method_names_the_nearest():
    with pytest.raises(RecipeError, match="did you mean task_arithmetic"):
        methods.get("task_arithmetics")
    with pytest.raises(RecipeError, match="there are adamerging, adamerging_plus_plus, arcee_fusion"):
        methods.get("zzz")


def test_names_and_summaries_import_no_method_and_no_numpy():
    code = (
        "import sys; from freemerge import methods; methods.names(); methods.summaries();"
        "print([m for m in sys.modules if m in ('numpy', 'torch') or m.startswith('freemerge.methods.')])"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_patterns_are_searched_anywhere_in_the_name():
    assert methods.matches("model.layers.0.mlp.weight", ("attn", "mlp"))
    assert methods.matches("model.layers.0.mlp.weight", (r"^model\..*weight$",))
    assert not methods.matches("model.layers.0.mlp.weight", ("^layers",))
    assert not methods.matches("model.layers.0.mlp.weight", ())
    with pytest.raises(RecipeError, match="not a regular expression"):
        methods.matches("x", ("(",))


def test_free_has_every_kind_of_parameter():
    parameters = methods.get("free").parameters
    kinds = {name: parameters[name].kind for name in ("cutoff", "radius_from", "align", "filter", "rescale", "weight")}
    assert kinds == {
        "cutoff": "number",
        "radius_from": "choice",
        "align": "flag",
        "filter": "patterns",
        "rescale": "number-or-choice",
        "weight": "number",
    }
    assert parameters["radius_from"].choices == ("min", "max", "diagonal")
    assert parameters["rescale"].choices == ("official", "weighted")
    assert [name for name, parameter in parameters.items() if parameter.per_expert] == ["weight"]
    assert set(methods.get("fr").parameters) < set(parameters)
    assert set(methods.get("free").variants) == {"vit8", "vit30", "roberta", "script", "llm"}


def test_the_ops_of_a_method_are_known():
    assert methods.get("task_arithmetic").ops == {"add_task_vectors"}
    assert {"high_pass", "add_elected", "sparse_rows", "count_magnitudes"} <= methods.get("free").ops
    assert {"add_masked", "magnitude_mask", "drop_mask"} <= methods.get("ties").ops


def test_without_a_gpu_version_of_an_op_a_method_stays_on_the_cpu(monkeypatch):
    monkeypatch.setattr(dispatch, "has_gpu_version", lambda op: op != "add_masked")
    monkeypatch.setattr(devices, "find", lambda device, max_gpu_memory: [device])
    ties, mean = methods.get("ties"), methods.get("average")
    assert devices.find_for([mean, ties], "auto") == []
    assert devices.find_for([ties], "cpu") == ["cpu"]
    assert devices.find_for([mean], "auto") == ["auto"]
    with pytest.raises(UnavailableError, match="ties runs on the CPU only, add_masked has no GPU version"):
        devices.find_for([ties], "cuda:0")

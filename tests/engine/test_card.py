"""Beside the weights: the same bytes for the same merge, and a card that says what the result is."""

import json

import numpy as np
import pytest
import yaml
from huggingface_hub import ModelCard

from freemerge.checkpoint.card import copy_side_files, write_card
from freemerge.checkpoint.manifest import MergeInput, backbone_fingerprint
from freemerge.checkpoint.reader import open_checkpoint
from freemerge.kernels.array import BFLOAT16
from freemerge.testing import write_checkpoint


def make_input(label, license="apache-2.0"):
    return MergeInput(label, "expert", license, {})


def card(folder, inputs, **kwargs):
    write_card(folder, method="fr", recipe="merge_method: fr\n", inputs=inputs, **kwargs)
    text = (folder / "README.md").read_text()
    return yaml.safe_load(text.split("---\n")[1]), text


@pytest.mark.parametrize(
    ("label", "name"),
    [
        ("meta-llama/Llama-3.2-1B", "meta-llama/Llama-3.2-1B"),
        ("/tmp/pytest-7/base", "base"),
        ("./base", "base"),
        ("../base", "base"),
        ("runs/today/base", "base"),
        ("base", "base"),
        (".", "input"),
    ],
)
def test_names_do_not_tell_of_this_machine(label, name):
    assert make_input(label).name == name


def test_front_matter_of_inputs_with_one_license(tmp_path):
    front, text = card(tmp_path, [make_input("org/a@main"), make_input("/x/b")])
    assert front == {
        "base_model": ["org/a", "b"],
        "library_name": "transformers",
        "tags": ["merge", "freemerge"],
        "license": "apache-2.0",
    }
    assert ModelCard.load(tmp_path / "README.md").data.base_model == ["org/a", "b"]
    assert "```yaml\nmerge_method: fr\n```" in text
    assert "freemerge merge recipe.yml OUT" in text


@pytest.mark.parametrize("licenses", [["mit", "llama3"], ["mit", None], [None, None], ["see-inputs", "see-inputs"]])
def test_licenses_that_differ_are_listed(tmp_path, licenses):
    front, text = card(tmp_path, [make_input(name, license) for name, license in zip("ab", licenses, strict=True)])
    assert front["license"] == "other"
    for name, license in zip("ab", licenses, strict=True):
        assert f"- {name} (expert): {license or 'none stated'}\n" in text


def test_experts_are_listed(tmp_path):
    _, text = card(tmp_path, [make_input("a")], experts=["math", "code"])
    assert "experts/code.safetensors" in text
    assert "freemerge experts apply OUT math math-model" in text


@pytest.fixture
def checkpoint(tmp_path):
    config = {"model_type": "x", "torch_dtype": "float32", "text_config": {"dtype": "float32"}, "note": {"dtype": "U8"}}
    folder = write_checkpoint(tmp_path / "base", {"a": np.zeros(3, np.float32)}, config=config)
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json", "README.md"):
        (folder / name).write_text(name)
    (tmp_path / "out").mkdir()
    return open_checkpoint(folder)


def test_side_files_are_copied_and_name_the_dtype_written(checkpoint, tmp_path):
    copy_side_files(checkpoint, tmp_path / "out", BFLOAT16)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"config.json", "tokenizer.json", "chat_template.jinja", "generation_config.json"}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config == {
        "model_type": "x",
        "torch_dtype": "bfloat16",
        "text_config": {"dtype": "bfloat16"},
        "note": {"dtype": "U8"},
    }


@pytest.mark.parametrize("dtype", [None, np.dtype(np.float32)])
def test_a_config_that_fits_is_copied_byte_for_byte(checkpoint, tmp_path, dtype):
    copy_side_files(checkpoint, tmp_path / "out", dtype)
    assert (tmp_path / "out" / "config.json").read_bytes() == (tmp_path / "base" / "config.json").read_bytes()


def test_backbone_fingerprint_depends_on_names_and_checksums_alone():
    both = {"a": "1" * 32, "b": "2" * 32}
    assert backbone_fingerprint(both) == backbone_fingerprint(dict(reversed(both.items())))
    assert len({backbone_fingerprint(x) for x in (both, {"a": "2" * 32, "b": "1" * 32}, {"a": "1" * 32}, {})}) == 4

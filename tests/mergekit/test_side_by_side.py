"""The same recipe by mergekit and by freemerge: the same tensors, configuration and tokenizer."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from mergekit_recipes import CASES, STAGES
from mergekit_zoo import make_zoo

import freemerge
from freemerge.checkpoint.reader import open_checkpoint
from freemerge.checkpoint.tokenizer import read_tokenizer
from freemerge.token_tensors import token_tensors

ALL = CASES | STAGES
THEIRS = Path(__file__).with_name("theirs.py")
NOISE = {"transformers_version", "_name_or_path", "output_attentions", "output_hidden_states"}


def slug(name: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in name)


def jobs_of(name: str, folder: Path) -> list:
    """What mergekit runs for a recipe: of several documents one after the other."""
    text = ALL[name].text.format(D=folder / "zoo" / ALL[name].family)
    made, jobs = {}, []
    options = {"lora_merge_cache": str(folder / "cache"), **dict(ALL[name].options)}
    for number, document in enumerate(yaml.safe_load_all(text)):
        out = folder / "theirs" / slug(name)
        if "name" in document:
            out = made[document.pop("name")] = out.with_name(f"{out.name}-{number}")
        written = yaml.safe_dump(document)
        for stage, place in made.items():
            written = written.replace(f"model: {stage}\n", f"model: {place}\n")
        path = folder / f"{slug(name)}-{number}.yml"
        path.write_text(written)
        jobs.append([str(path), str(out), options])
    return jobs


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """With the models, and mergekit's result for every recipe in theirs/."""
    if not importlib.util.find_spec("mergekit"):
        pytest.skip("needs mergekit")
    folder = tmp_path_factory.mktemp("side-by-side")
    make_zoo(folder / "zoo")
    (folder / "jobs.json").write_text(json.dumps([job for name in ALL for job in jobs_of(name, folder)]))
    command = [sys.executable, THEIRS, folder / "jobs.json"]
    ended = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    assert ended.returncode == 0, ended.stderr[-2000:]
    return folder


@pytest.mark.parametrize("name", ALL)
def test_the_result_is_the_same(folder, name):
    case = ALL[name]
    theirs = folder / "theirs" / slug(name)
    assert not (theirs / "error.txt").exists(), (theirs / "error.txt").read_text()[-2000:]
    text = case.text.format(D=folder / "zoo" / case.family)
    ours = folder / "ours" / slug(name)
    freemerge.merge(text, out=ours, fsync=False)
    assert_same_tensors(open_checkpoint(ours), open_checkpoint(theirs), case)
    assert_same_configuration(ours, theirs)
    assert_same_tokenizer(ours, theirs, text)


def assert_same_tensors(ours, theirs, case):
    known = [name for name in ours.tensors if case.unknown is None or not name.startswith(case.unknown)]
    assert known == sorted(theirs.tensors)
    order = token_order(ours, theirs)
    for name, info in theirs.tensors.items():
        assert (ours.tensors[name].shape, ours.tensors[name].dtype) == (info.shape, info.dtype), name
        found, expected = ours.read(name).astype(np.float64), theirs.read(name).astype(np.float64)
        if name in token_tensors(ours) and order is not None:
            expected = expected[order]
        ulp = float(np.spacing(np.abs(expected).max().astype(np.float32))) if expected.size else 0.0
        ulp *= 2.0 ** (23 - {"float32": 23, "float16": 10, "bfloat16": 7}[info.dtype.name])
        apart = np.abs(found - expected) > case.ulps * ulp
        assert apart.mean() <= case.differing, (name, np.abs(found - expected).max() / ulp)


def token_order(ours, theirs) -> np.ndarray | None:
    """mergekit's row of each row of ours: it numbers the new tokens of a union in another order in every run."""
    found, expected = ours.tokenizer(), theirs.tokenizer()
    if found is None or found.vocab == expected.vocab:
        return None
    order = np.arange(ours.config["vocab_size"])
    order[list(found.vocab.values())] = [expected.vocab[token] for token in found.vocab]
    return order


def assert_same_configuration(ours, theirs):
    auto = pytest.importorskip("transformers").AutoConfig
    found, expected = (auto.from_pretrained(folder).to_dict() for folder in (ours, theirs))
    assert without_noise(found) == without_noise(expected)


def without_noise(config: dict) -> dict:
    return {key: value for key, value in config.items() if key not in NOISE}


def assert_same_tokenizer(ours, theirs, text):
    found, expected = read_tokenizer(ours), read_tokenizer(theirs)
    assert found.vocab.keys() == expected.vocab.keys()
    if "base_model" in text:  # without one, mergekit starts from any of the models
        assert added_to(found) == added_to(expected)
        assert rendered(ours) == rendered(theirs)


def added_to(tokenizer) -> dict:
    return {token["content"]: token["special"] for token in tokenizer.added}


def rendered(folder) -> str:
    """A talk in its chat template, without white space: mergekit's llama3 breaks lines where Llama 3's own does not."""
    chat = pytest.importorskip("transformers.utils.chat_template_utils")
    template = chat._compile_jinja_template(open_checkpoint(folder).chat_template())
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    talk = template.render(messages=messages, bos_token="<s>", eos_token="</s>", add_generation_prompt=True)
    return "".join(talk.split())

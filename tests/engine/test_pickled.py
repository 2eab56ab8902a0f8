import json
import os

import numpy as np
import pytest
import torch

from freemerge.checkpoint.reader import open_checkpoint
from freemerge.errors import CheckpointError
from freemerge.testing import tiny_llama

STATE = {name: torch.from_numpy(array) for name, array in tiny_llama(0).items()}


def assert_same(checkpoint, state):
    assert list(checkpoint.tensors) == sorted(state)
    for name, tensor in state.items():
        array = checkpoint.read(name)
        assert not array.flags.writeable
        assert array.shape == checkpoint.tensors[name].shape
        np.testing.assert_array_equal(array.astype(np.float64), tensor.double().numpy())


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("name", ["pytorch_model.bin", "mine.pt", "mine.pth"])
def test_reads_a_pickled_state_dict_when_allowed(tmp_path, name, zipped):
    state = STATE | {
        "half": torch.arange(6).reshape(2, 3).bfloat16().T,
        "zero": torch.tensor(3),
        "none": torch.ones(0, 2),
    }
    torch.save(state, tmp_path / name, _use_new_zipfile_serialization=zipped)
    for source in (tmp_path, tmp_path / name):
        with open_checkpoint(source, allow_pickle=True) as checkpoint:
            assert_same(checkpoint, state)
            assert checkpoint.tensors["half"].file == tmp_path / name
            assert list(checkpoint.fingerprint()) == [name]
            checkpoint.prefetch("half")
            checkpoint.release("half")
            checkpoint.check_unchanged()
            assert_same(checkpoint, state)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "mine.pt"])
def test_refuses_without_permission_and_says_why(tmp_path, name):
    torch.save(STATE, tmp_path / name)
    for source in (tmp_path, tmp_path / name):
        with pytest.raises(CheckpointError, match=r"(?s)pickled.*can run code.*--allow-pickle"):
            open_checkpoint(source)


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_runs_no_code(tmp_path, zipped):
    evil = {"weight": torch.ones(2), "evil": Evil(tmp_path / "ran")}
    torch.save(evil, tmp_path / "mine.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=r"mine\.pt: torch's weights_only loader refuses it"):
        open_checkpoint(tmp_path, allow_pickle=True)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("raw", [b"", b"PK\3\4", b"PK\3\4" + bytes(100), b"\x80\x02}q\x00.", b"\x80\x02", b"hello"])
def test_refuses_rubbish(tmp_path, raw):
    (tmp_path / "mine.pt").write_bytes(raw)
    with pytest.raises(CheckpointError, match=r"mine\.pt"):
        open_checkpoint(tmp_path, allow_pickle=True)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_shared_storage_is_tied(tmp_path, zipped):
    state = dict(STATE)
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    state["part"] = state["model.embed_tokens.weight"][:3]
    torch.save(state, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    checkpoint = open_checkpoint(tmp_path, allow_pickle=True)
    assert checkpoint.tied == {"lm_head.weight": "model.embed_tokens.weight"}
    assert_same(checkpoint, state)


@pytest.mark.parametrize("wrapper", ["state_dict", "model", "module"])
def test_unwraps_a_training_checkpoint(tmp_path, wrapper):
    torch.save({wrapper: {"state_dict": STATE}, "epoch": 3, "loss": 0.5}, tmp_path / "mine.ckpt")
    assert_same(open_checkpoint(tmp_path / "mine.ckpt", allow_pickle=True), STATE)


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        ({"model": STATE, "state_dict": STATE}, r"several state dicts \(state_dict, model\)"),
        (STATE | {"epoch": 3}, "more than tensors: epoch"),
        ({1: torch.ones(1)}, "more than tensors: 1"),
        ([torch.ones(1)], "holds a list"),
        (torch.ones(1), "holds a Tensor"),
        ({}, "holds no tensors"),
        ({"c": torch.ones(1, dtype=torch.cfloat)}, "c: dtype complex64"),
    ],
)
def test_refuses_what_is_no_state_dict(tmp_path, saved, message):
    torch.save(saved, tmp_path / "mine.pt")
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path, allow_pickle=True)


def test_shards_with_an_index(tmp_path):
    names = list(STATE)
    weight_map = {}
    for i, part in enumerate([names[:7], names[7:]]):
        torch.save({name: STATE[name] for name in part}, tmp_path / f"pytorch_model-{i}.bin")
        weight_map |= dict.fromkeys(part, f"pytorch_model-{i}.bin")
    path = tmp_path / "pytorch_model.bin.index.json"
    path.write_text(json.dumps({"weight_map": weight_map}))
    assert_same(open_checkpoint(tmp_path, allow_pickle=True), STATE)
    path.write_text(json.dumps({"weight_map": {**weight_map, "more": "pytorch_model-0.bin"}}))
    with pytest.raises(CheckpointError, match=r"more is in pytorch_model-0\.bin by the index"):
        open_checkpoint(tmp_path, allow_pickle=True)

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from freemerge.checkpoint.dtypes import NAMES
from freemerge.checkpoint.reader import open_checkpoint
from freemerge.errors import ChangedInputError, CheckpointError
from freemerge.testing import random_array, tiny_llama, tiny_llama_config, tiny_vit, write_checkpoint, write_safetensors


def assert_same(checkpoint, tensors):
    assert list(checkpoint.tensors) == sorted(tensors)
    for name, array in tensors.items():
        read, info = checkpoint.read(name), checkpoint.tensors[name]
        assert (read.dtype, read.shape) == (array.dtype, array.shape) == (info.dtype, info.shape)
        assert read.tobytes() == array.tobytes()


@pytest.mark.parametrize("shards", [1, 2, 3])
def test_reads_what_was_written(tmp_path, shards):
    tensors = tiny_llama(0, dtype=ml_dtypes.bfloat16)
    write_checkpoint(tmp_path, tensors, shards=shards, config=tiny_llama_config())
    with open_checkpoint(tmp_path) as checkpoint:
        assert_same(checkpoint, tensors)
        assert len(checkpoint.files) == shards
        assert checkpoint.config == tiny_llama_config()
        assert checkpoint.tied == {}


def test_every_dtype_at_odd_addresses_with_scalars_and_empty_tensors(tmp_path):
    tensors = {"odd": np.array([1], np.uint8)}
    for dtype in NAMES:
        for shape in [(3, 5), (), (0,), (2, 0, 3)]:
            raw = np.random.default_rng(1).integers(0, 2, (*shape, dtype.itemsize), np.uint8)
            tensors[f"{dtype} {shape}"] = np.frombuffer(raw.tobytes(), dtype).reshape(shape)
    write_safetensors(tmp_path / "model.safetensors", tensors)
    assert_same(open_checkpoint(tmp_path), tensors)


def test_read_is_a_read_only_view_and_outlives_the_checkpoint(tmp_path):
    tensors = tiny_vit(0)
    checkpoint = open_checkpoint(write_checkpoint(tmp_path, tensors))
    array = checkpoint.read("classifier.weight")
    assert not array.flags.owndata
    with pytest.raises(ValueError, match="read-only"):
        array[0] = 1
    checkpoint.close()
    (tmp_path / "model.safetensors").unlink()
    assert array.tobytes() == tensors["classifier.weight"].tobytes()


def test_a_file_an_index_or_one_shard_can_be_given(tmp_path):
    tensors = tiny_llama(0)
    write_checkpoint(tmp_path, tensors, shards=2)
    assert_same(open_checkpoint(tmp_path / "model.safetensors.index.json"), tensors)
    shard = tmp_path / "model-00002-of-00002.safetensors"
    assert_same(open_checkpoint(shard), load_file(shard))


def test_threads_may_read_at_the_same_time(tmp_path):
    tensors = tiny_llama(0)
    checkpoint = open_checkpoint(write_checkpoint(tmp_path, tensors, shards=8))
    with ThreadPoolExecutor(8) as pool:
        found = dict(zip(tensors, pool.map(lambda name: checkpoint.read(name).tobytes(), tensors), strict=True))
    assert found == {name: array.tobytes() for name, array in tensors.items()}


def test_hints_change_nothing(tmp_path):
    tensors = {"big": random_array((700, 701), np.float32, 0), "empty": np.empty((0, 3), np.float32)}
    checkpoint = open_checkpoint(write_checkpoint(tmp_path, tensors))
    for name in tensors:
        checkpoint.prefetch(name)
        checkpoint.prefetch(name, 1000, 90_000)
        checkpoint.release(name)
        checkpoint.release(name, 5, 6)
    assert_same(checkpoint, tensors)


def test_a_hint_about_a_vanished_file_does_not_raise(tmp_path):
    checkpoint = open_checkpoint(write_checkpoint(tmp_path, tiny_vit(0)))
    (tmp_path / "model.safetensors").unlink()
    checkpoint.prefetch("classifier.weight")
    with pytest.raises(ChangedInputError, match="is gone"):
        checkpoint.read("classifier.weight")


def test_three_hundred_shards_fit_a_low_limit_of_open_files(tmp_path):
    tensors = {f"t{i:03d}": np.full(3, i, np.float32) for i in range(300)}
    write_checkpoint(tmp_path, tensors, shards=300)
    code = f"""
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, (100, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
from freemerge.checkpoint.reader import open_checkpoint
checkpoint = open_checkpoint({str(tmp_path)!r})
print(sum(float(checkpoint.read(name)[0]) for name in checkpoint.tensors))
"""
    assert run(code).strip() == str(float(sum(range(300))))


def test_importing_the_reader_imports_nothing_heavy():
    code = "import sys, freemerge.checkpoint.reader, freemerge.checkpoint.memory; print(*sys.modules)"
    assert not {"torch", "huggingface_hub", "pydantic", "yaml", "safetensors"} & set(run(code).split())


def run(code, **environment):
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=os.environ | environment
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda file: file.write_bytes(file.read_bytes() + b"\0"), "changed"),
        (lambda file: os.utime(file, ns=(1, 1)), "changed"),
        (lambda file: file.unlink(), "is gone"),
    ],
)
def test_a_changed_file_is_noticed(tmp_path, change, message):
    checkpoint = open_checkpoint(write_checkpoint(tmp_path, tiny_vit(0)))
    checkpoint.check_unchanged()
    change(tmp_path / "model.safetensors")
    with pytest.raises(ChangedInputError, match=rf"model\.safetensors {message}"):
        checkpoint.check_unchanged()


def test_a_replaced_file_is_noticed_even_with_the_old_time(tmp_path):
    file = write_checkpoint(tmp_path, tiny_vit(0)) / "model.safetensors"
    checkpoint = open_checkpoint(tmp_path)
    before = file.stat()
    (tmp_path / "new").write_bytes(file.read_bytes())
    os.utime(tmp_path / "new", ns=(before.st_atime_ns, before.st_mtime_ns))
    (tmp_path / "new").replace(file)
    with pytest.raises(ChangedInputError):
        checkpoint.check_unchanged()


def test_fingerprints_see_content_and_names(tmp_path):
    tensors = tiny_llama(0)

    def hashes(folder, tensors):
        found = open_checkpoint(write_checkpoint(tmp_path / folder, tensors, shards=2)).fingerprint()
        assert json.loads(json.dumps(found)) == found
        return {file: found[file]["xxh3_128"] for file in found}

    first = hashes("a", tensors)
    assert list(first) == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert hashes("b", tensors) == first
    assert not set(hashes("c", tiny_llama(1)).values()) & set(first.values())
    renamed = {name.replace("norm", "morn"): array for name, array in tensors.items()}
    assert not set(hashes("d", renamed).values()) & set(first.values())


def test_all_problems_of_a_checkpoint_are_told_at_once(tmp_path):
    write_checkpoint(tmp_path, tiny_llama(0), shards=4)
    first, second, third, _ = sorted(tmp_path.glob("*.safetensors"))
    first.write_bytes(first.read_bytes()[:-100])
    second.write_bytes(b"{}")
    tensors = load_file(third)
    lost = next(iter(tensors))
    tensors["stranger"] = tensors.pop(lost)
    write_safetensors(third, tensors)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tmp_path)
    for problem in (
        "config.json cannot be read",
        f"{first.name}: cut short: 100 bytes of tensors are missing",
        f"{second.name}: 2 bytes, too short",
        f"{lost} is in {third.name} by the index, but not in that file",
        f"stranger is in {third.name}, but not in the index",
    ):
        assert problem in str(caught.value)


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    write_checkpoint(tmp_path, tiny_llama(0), shards=2)
    first, second = sorted(tmp_path.glob("*.safetensors"))
    write_safetensors(second, load_file(second) | {"model.embed_tokens.weight": np.zeros(3)})
    with pytest.raises(CheckpointError, match=f"is in both {first.name} and {second.name}"):
        open_checkpoint(tmp_path)


def test_license_and_side_files(tmp_path):
    write_checkpoint(tmp_path, tiny_vit(0), config={})
    wanted = ["config.json", "chat_template.jinja", "generation_config.json", "merges.txt", "special_tokens_map.json"]
    wanted += ["spiece.model", "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json"]
    unwanted = ["README.md", "modeling.py", "optimizer.pt", "pytorch_model.bin", "tokenizer.bin", "notes.txt"]
    for name in wanted[1:] + unwanted:
        (tmp_path / name).write_text("x")
    (tmp_path / "tokenizer_folder").mkdir()
    checkpoint = open_checkpoint(tmp_path)
    assert [path.name for path in checkpoint.side_files()] == sorted(wanted)
    assert checkpoint.license() is None


@pytest.mark.parametrize(
    ("card", "license"),
    [
        ("---\nlicense: apache-2.0\ntags: [a]\n---\n# x", "apache-2.0"),
        ("---\nlicense: other\nlicense_name: llama3\n---\n", "llama3"),
        ("---\nlicense: [mit, apache-2.0]\n---\n", "mit, apache-2.0"),
        ("---\ntags: [a]\n---\n", None),
        ("---\nlicense: [\n---\n", None),
        ("---\nlicense: mit\n", None),
        ("license: mit\n", None),
        ("", None),
    ],
)
def test_license_from_the_card(tmp_path, card, license):
    write_checkpoint(tmp_path, tiny_vit(0))
    (tmp_path / "README.md").write_text(card)
    assert open_checkpoint(tmp_path).license() == license

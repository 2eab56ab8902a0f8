"""Which files a directory, a file or a hub name means, and what is said where that is unclear."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from freemerge.checkpoint.reader import open_checkpoint
from freemerge.errors import CheckpointError
from freemerge.testing import tiny_vit, write_checkpoint, write_safetensors


@pytest.fixture
def folder(tmp_path):
    """Makes a directory of one-tensor files, each tensor named like its file."""

    def make(*names):
        for name in names:
            (tmp_path / name).parent.mkdir(exist_ok=True)
            if name.endswith(".safetensors"):
                write_safetensors(tmp_path / name, {name: np.zeros(2, np.float32)})
            else:
                (tmp_path / name).write_bytes(b"")
        return tmp_path

    return make


def index(folder, weight_map, name="model.safetensors.index.json"):
    (folder / name).write_text(weight_map if isinstance(weight_map, str) else json.dumps({"weight_map": weight_map}))
    return folder


def refusal(source, **options):
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(source, **options)
    return str(caught.value)


@pytest.mark.parametrize(
    ("names", "meant"),
    [
        (["model.safetensors", "consolidated.safetensors", "adapter_model.safetensors"], "model.safetensors"),
        (["model.safetensors", "pytorch_model.bin", "optimizer.pt"], "model.safetensors"),
        (
            ["diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors"],
            "diffusion_pytorch_model.safetensors",
        ),
        (["mine.safetensors"], "mine.safetensors"),
        (["model-00002-of-00003.safetensors"], "model-00002-of-00003.safetensors"),
        (["experts/a.safetensors", "model.safetensors"], "model.safetensors"),
    ],
)
def test_a_directory_means_its_whole_model(folder, names, meant):
    assert list(open_checkpoint(folder(*names)).tensors) == [meant]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "holds no weights"),
        (["README.md", "experts/a.safetensors"], "holds no weights"),
        (["a.safetensors", "b.safetensors"], "could mean any of a.safetensors, b.safetensors"),
        (["m-00001-of-00002.safetensors", "m-00002-of-00002.safetensors"], "Fetch the index of these shards too"),
        (["adapter_model.safetensors"], "adapter_config.json cannot be read"),
        (["pytorch_model.bin"], "only pickled weights (pytorch_model.bin)"),
        (["training_args.bin", "optimizer.pt", "rng_state_0.pth"], "holds no weights"),
    ],
)
def test_refuses_directories_that_mean_nothing_or_several_things(folder, names, message):
    assert message in refusal(folder(*names))


def test_refuses_a_model_that_is_there_single_and_sharded(folder):
    directory = index(
        folder("model.safetensors", "model-00001-of-00001.safetensors"), {"x": "model-00001-of-00001.safetensors"}
    )
    assert "could mean any of model.safetensors, model.safetensors.index.json" in refusal(directory)
    assert list(open_checkpoint(directory / "model.safetensors").tensors) == ["model.safetensors"]


def test_an_index_may_list_the_single_file_and_shards_in_folders(folder):
    directory = index(folder("model.safetensors"), {"model.safetensors": "model.safetensors"})
    assert list(open_checkpoint(directory).tensors) == ["model.safetensors"]
    index(folder("part/a.safetensors"), {"part/a.safetensors": "part/a.safetensors"})
    assert list(open_checkpoint(directory / "model.safetensors.index.json").tensors) == ["part/a.safetensors"]


def test_one_shard_under_two_names_is_one(folder):
    write_safetensors(folder() / "x.safetensors", {"a": np.zeros(2), "b": np.zeros(3)})
    directory = index(folder(), {"a": "x.safetensors", "b": ".//x.safetensors"})
    assert len(open_checkpoint(directory).files) == 1
    assert "c is in x.safetensors by the index" in refusal(
        index(directory, {"a": "x.safetensors", "b": "./x.safetensors", "c": "./x.safetensors"})
    )


def test_shards_may_be_links_as_in_the_cache_of_a_hub(folder, tmp_path):
    directory = folder("blobs/0123.safetensors", "snapshot/none.txt") / "snapshot"
    os.symlink("../blobs/0123.safetensors", directory / "model.safetensors")
    assert list(open_checkpoint(directory).tensors) == ["blobs/0123.safetensors"]


@pytest.mark.parametrize(
    "shard", ["../x.safetensors", "/etc/passwd", "a/../../x.safetensors", "..", "", "a\0b", "a\\b"]
)
def test_refuses_shards_outside_the_directory(folder, shard):
    directory = index(folder(), {"a": shard})
    assert "which is not a file of its own directory" in refusal(directory)
    assert "which is not a file of its own directory" in refusal(directory / "model.safetensors.index.json")


def test_names_every_missing_shard(folder):
    directory = index(
        folder("b.safetensors"), {"x": "a.safetensors", "b.safetensors": "b.safetensors", "y": "c.safetensors"}
    )
    message = refusal(directory)
    assert "names a.safetensors, which is not there" in message
    assert "names c.safetensors, which is not there" in message
    assert "b.safetensors, " not in message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not a JSON file"),
        ("[" * 100_000, "not a JSON file"),
        ("[]", "has no weight_map"),
        ("{}", "has no weight_map"),
        ('{"weight_map": {"a": 1}}', "has no weight_map"),
        ('{"weight_map": {"a": "x", "a": "y"}}', "names a tensor twice"),
    ],
)
def test_refuses_an_index_that_is_none(folder, text, message):
    assert f"model.safetensors.index.json {message}" in refusal(index(folder(), text))


def test_refuses_files_of_other_kinds(folder):
    directory = folder("notes.txt", "model.gguf")
    assert "not a weight file" in refusal(directory / "notes.txt")
    assert "not a weight file" in refusal(directory / "model.gguf")


def test_a_link_to_nothing_is_said_to_be_that(folder):
    (folder() / "model.safetensors").symlink_to("nothing")
    assert "model.safetensors: cannot be read: No such file or directory" in refusal(folder())


@pytest.mark.parametrize("source", ["x" * 5000, "~nobody-of-that-name/model"])
def test_what_the_system_refuses(source):
    assert "Give a directory, a weight file, or a hub name" in refusal(source)


@pytest.mark.parametrize("source", ["nowhere", "./no/where", "/no/where", "~/no-such-model", "a/b/c", "org/name@"])
def test_what_is_no_path_and_no_hub_name(source):
    assert "no such file or directory" in refusal(source)


def offline(tmp_path, source):
    """What open_checkpoint says of a hub name, with nothing but the cache in tmp_path."""
    code = f"""
from freemerge.checkpoint.reader import open_checkpoint
from freemerge.errors import CheckpointError
try:
    checkpoint = open_checkpoint({source!r})
    side_files = [path.name for path in checkpoint.side_files()]
    print(len(checkpoint.tensors), checkpoint.label, checkpoint.license(), *side_files)
except CheckpointError as error:
    print(error)
"""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path, env=environment
    )
    return done.stdout


@pytest.mark.parametrize("revision", ["", "@main", "@" + "a" * 40])
def test_hub_names_resolve_offline_from_the_cache(tmp_path, revision):
    repository = tmp_path / "hub" / "models--org--name"
    snapshot = write_checkpoint(repository / "snapshots" / ("a" * 40), tiny_vit(0), shards=2, config={})
    (snapshot / "README.md").write_text("---\nlicense: mit\n---\n")
    (repository / "blobs").mkdir()
    for file in snapshot.iterdir():
        file.rename(repository / "blobs" / file.name)
        file.symlink_to(f"../../blobs/{file.name}")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    assert offline(tmp_path, f"org/name{revision}").split() == [
        str(len(tiny_vit(0))),
        f"org/name{revision}",
        "mit",
        "config.json",
    ]


def test_a_hub_name_of_which_the_cache_has_no_weights(tmp_path):
    repository = tmp_path / "hub" / "models--org--name"
    (repository / "snapshots" / "abc").mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    assert f"org/name ({repository / 'snapshots' / 'abc'}): holds no weights" in offline(tmp_path, "org/name")


def test_a_hub_name_that_is_not_in_the_cache(tmp_path):
    message = offline(tmp_path, "org/name@v2")
    assert "org/name: no such local directory, and not found on the hub at revision v2 or in its cache" in message
    assert "hf download org/name --revision v2" in message


def test_a_local_directory_goes_before_the_hub(tmp_path):
    write_checkpoint(tmp_path / "org" / "name", tiny_vit(0))
    assert offline(tmp_path, "org/name").split()[0] == str(len(tiny_vit(0)))

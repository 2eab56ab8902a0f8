"""emr: with its mask and scale the unified vector restores each expert's direction and mean magnitude; on disk too."""

import numpy as np
import pytest

import freemerge
from freemerge import merge_state_dicts
from freemerge.checkpoint.reader import open_checkpoint
from freemerge.checkpoint.verify import verify
from freemerge.errors import CheckpointError
from freemerge.experts.apply import apply_expert, list_experts, share_of_experts
from freemerge.experts.sidecar import read_expert
from freemerge.kernels._masks import unpack_mask
from freemerge.kernels.array import BFLOAT16, store
from freemerge.testing import random_array, tiny_llama, tiny_llama_config, write_checkpoint

SHAPES = {"layers.0.mlp.weight": (24, 40), "layers.0.mlp.bias": (40,), "logit_scale": (), "empty": (0, 3)}


def checkpoints(dtype=np.float32, count=3):
    base = {name: random_array(shape, dtype, i) for i, (name, shape) in enumerate(SHAPES.items())}
    experts = []
    for t in range(count):
        moved = {
            name: random_array(shape, np.float32, 10 * t + i + 50, 0.1)
            for i, (name, shape) in enumerate(SHAPES.items())
        }
        experts.append({name: np.empty(shape, dtype) for name, shape in SHAPES.items()})
        for name, array in experts[-1].items():
            store(base[name].astype(np.float32) + moved[name], array)
    return base | {"steps": np.arange(3)}, [expert | {"steps": np.arange(3)} for expert in experts]


def by_definition(base, experts, means):
    """U, and for each expert its mask and scale, in float64."""
    vectors = [{name: expert[name].astype(np.float64) - base[name] for name in SHAPES} for expert in experts]
    unified = {}
    for name in SHAPES:
        up = sum(vector[name] for vector in vectors) > 0
        along = [np.where(up, vector[name], -vector[name]) for vector in vectors]
        largest = np.maximum(0, np.max(along, axis=0))
        unified[name] = np.where(up, largest, -largest)
    masks = [{name: vector[name] * unified[name] > 0 for name in SHAPES} for vector in vectors]
    mean = np.mean if means == "per_tensor" else np.sum
    held = [name for name, shape in SHAPES.items() if 0 not in shape]
    scales = [
        sum(mean(np.abs(vector[name])) for name in held)
        / sum(mean(np.abs(mask[name] * unified[name])) for name in held)
        for vector, mask in zip(vectors, masks, strict=True)
    ]
    return unified, masks, scales


@pytest.mark.parametrize(("variant", "means"), [("per_tensor_means", "per_tensor"), ("flat_mean", "flat")])
def test_is_its_definition(variant, means):
    base, experts = checkpoints()
    merged = merge_state_dicts("emr", base, experts, variant=variant)
    unified, masks, scales = by_definition(base, experts, means)
    for name, array in base.items():
        np.testing.assert_array_equal(merged[name], array)
    for expert, mask, scale in zip(merged.experts, masks, scales, strict=True):
        # sums of float32 differences; the definition is float64
        assert expert.metadata["mu"] == pytest.approx(scale, rel=1e-6)
        applied = expert.apply(merged)
        for name, shape in SHAPES.items():
            part = expert.tensors[name]
            np.testing.assert_array_equal(unpack_mask(part.mask, shape), mask[name])
            np.testing.assert_allclose(part.vector, unified[name], rtol=0, atol=1e-6)
            np.testing.assert_allclose(applied[name], base[name] + scale * mask[name] * unified[name], atol=2e-6)


def test_a_single_expert_comes_back():
    base, experts = checkpoints(count=1)
    merged = merge_state_dicts("emr", base, experts)
    assert merged.experts[0].metadata["mu"] == 1.0
    for name, array in merged.experts[0].apply(merged).items():
        np.testing.assert_allclose(array, experts[0][name], rtol=0, atol=1e-6)


def test_an_expert_that_does_not_move_has_scale_0():
    base, experts = checkpoints(count=1)
    merged = merge_state_dicts("emr", base, [base, *experts])
    assert merged.experts[0].metadata["mu"] == 0.0
    for name, array in merged.experts[0].apply(merged).items():
        np.testing.assert_array_equal(array, base[name])


def test_the_unified_backbone_is_a_plain_model():
    base, experts = checkpoints()
    merged = merge_state_dicts("emr", base, experts, backbone="unified")
    unified, *_ = by_definition(base, experts, "flat")
    assert merged.experts == ()
    for name in SHAPES:
        np.testing.assert_allclose(merged[name], base[name] + unified[name], atol=1e-6)


def test_a_nan_in_an_expert_is_found_though_the_backbone_is_the_base():
    base, experts = checkpoints()
    experts[1]["layers.0.mlp.weight"][3, 3] = np.nan
    with pytest.raises(CheckpointError, match=r"mlp.weight: NaN or Inf in expert1"):
        merge_state_dicts("emr", base, experts)


@pytest.fixture
def models(tmp_path):
    base = tiny_llama(0, dtype=BFLOAT16)
    for t, name in enumerate(("base", "math", "code")):
        moved = tiny_llama(t)
        tensors = {k: (a.astype(np.float32) + 0.1 * t * moved[k]).astype(BFLOAT16) for k, a in base.items()}
        write_checkpoint(tmp_path / name, tensors, config=tiny_llama_config())
    return [str(tmp_path / name) for name in ("base", "math", "code")]


def bytes_of(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_on_disk_it_is_the_same_as_in_memory(models, tmp_path):
    base, *experts = models
    out = tmp_path / "out"
    freemerge.merge("emr", base, experts, out)
    opened = [open_checkpoint(model) for model in models]
    tensors = [{name: np.array(one.read(name)) for name in one.tensors} for one in opened]
    in_memory = merge_state_dicts("emr", tensors[0], dict(zip(("math", "code"), tensors[1:], strict=True)))
    assert not verify(out).problems
    assert [summary.kinds for summary in list_experts(out)] == [f"mask {len(tensors[0])}"] * 2
    files = [out / "experts" / name for name in ("math.safetensors", "code.safetensors", "shared/emr.safetensors")]
    nbytes = sum(file.stat().st_size for file in files)  # the vector, which both share, once
    assert share_of_experts(out) == (nbytes, nbytes / sum(array.nbytes for array in tensors[0].values()))
    assert read_expert(out / "experts" / "math.safetensors").metadata["means"] == "per_tensor"
    for experts_given, expected in [
        ("math", in_memory.experts[0].apply(in_memory)),
        ({"math": 0.75, "code": 0.5}, in_memory.with_experts({"math": 0.75, "code": 0.5})),
    ]:
        apply_expert(out, experts_given, tmp_path / "applied", overwrite=True)
        with open_checkpoint(tmp_path / "applied") as applied:
            for name, array in expected.items():
                np.testing.assert_array_equal(applied.read(name), array)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_an_interrupted_merge_resumes_to_the_same_bytes(models, tmp_path, share):
    base, *experts = models
    freemerge.merge("emr", base, experts, tmp_path / "whole", shard_size="60kB", fsync=False)

    def interrupt(done, total):
        if done > share * total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        freemerge.merge("emr", base, experts, tmp_path / "out", shard_size="60kB", progress=interrupt, fsync=False)
    (shared,) = (tmp_path / ".out.freemerge" / "staging" / "experts" / "shared").glob("*")
    data = bytearray(shared.read_bytes())
    data[-40:] = bytes(40)  # what a power cut may have lost is made again
    shared.write_bytes(data)
    freemerge.merge("emr", base, experts, tmp_path / "out", shard_size="60kB", resume=True, fsync=False)
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "whole")

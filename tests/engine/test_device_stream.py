"""Merges streamed through an accelerator: the same results as on the CPU, whatever the memory; what goes wrong there.

Here the streaming is tested, with stand-ins for the kernels; the kernels are in tests/gpu.
"""

import threading
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch

import freemerge
from freemerge import devices
from freemerge.accelerator import Accelerator, Lane
from freemerge.checkpoint.reader import open_checkpoint
from freemerge.checkpoint.verify import verify
from freemerge.errors import CheckpointError
from freemerge.kernels import dispatch
from freemerge.testing import tiny_vit, tiny_vit_config, write_checkpoint


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def tensors_of(folder):
    checkpoint = open_checkpoint(folder)
    return {name: checkpoint.read(name) for name in checkpoint.tensors}


@pytest.fixture
def merge(models, gpu_calls, tmp_path):
    """merge(method, out, **options) -> the files of the result."""

    def run(method, out, device="interpreter", **options):
        freemerge.merge(method, *models, tmp_path / out, device=device, shard_size="60kB", **options)
        assert not verify(tmp_path / out).problems
        return bytes_of(tmp_path / out)

    return run


@pytest.mark.parametrize("method", ["average", "linear", "task_arithmetic"])
def test_elementwise_methods_give_the_bytes_of_the_cpu(merge, gpu_calls, method):
    assert merge(method, "gpu") == merge(method, "cpu", device="cpu")
    assert {"add_task_vectors", "weighted_sum"} & set(gpu_calls)


@pytest.mark.parametrize("parameters", [{}, {"align": True}, {"elect": True}, {"crop": True}])
def test_fr_is_within_an_ulp_of_the_cpu(merge, gpu_calls, tmp_path, parameters):
    merge("fr", "gpu", **parameters)
    merge("fr", "cpu", device="cpu", **parameters)
    assert "high_pass" in gpu_calls
    cpu = tensors_of(tmp_path / "cpu")
    for name, tensor in tensors_of(tmp_path / "gpu").items():
        apart = ordered(tensor) - ordered(cpu[name])
        assert np.abs(apart).max() <= 1, name


def ordered(array):
    """bfloat16 as integers in the order of the numbers: neighbours differ by one."""
    bits = array.view(np.int16).astype(np.int32)
    return np.where(bits < 0, -(bits & 0x7FFF), bits)


@pytest.mark.parametrize("selection", ["tensor", "row", "model"])
@pytest.mark.parametrize("combine", ["add", "replace"])
def test_experts_are_cut_out_on_the_gpu(merge, models, gpu_calls, tmp_path, selection, combine):
    relative_to = "base" if combine == "replace" else "merged"
    merge("free", "out", density=0.05, selection=selection, combine=combine, relative_to=relative_to)
    assert ("sparse_rows" in gpu_calls) == (selection != "model")
    on_cpu = {"selection": selection, "combine": combine, "relative_to": relative_to, "density": 0.05}
    freemerge.merge("free", *models, tmp_path / "cpu", device="cpu", shard_size="60kB", **on_cpu)
    for name in ("math", "code", "chat"):
        mine, theirs = (tensors_of(tmp_path / out / "experts" / f"{name}.safetensors") for out in ("out", "cpu"))
        assert mine.keys() == theirs.keys()
        # an ulp of the backbone moves the values, and which of two nearly equal ones is kept
        for key in mine:
            if key.startswith("values/"):
                np.testing.assert_allclose(np.sort(mine[key]), np.sort(theirs[key]), atol=2e-3)


@pytest.mark.parametrize("method", ["task_arithmetic", "free"])
@pytest.mark.parametrize(
    "limits",
    [
        {"max_memory": "1MB"},
        {"max_gpu_memory": "30kB"},  # most tensors are too large for it
        {"max_gpu_memory": "200"},  # all are
        {"threads": 1},
        {"threads": 8, "max_gpu_memory": "100kB"},
    ],
    ids=str,
)
def test_bytes_do_not_depend_on_memory_or_threads(merge, method, limits, stand_in_on_cpu):
    assert merge(method, "small", **limits) == merge(method, "large")


@pytest.fixture
def stand_in_on_cpu(monkeypatch):
    """The references on the CPU too, so that what falls back to it has the same bytes."""
    monkeypatch.setattr(dispatch, "_cpu", None)


def test_two_accelerators_give_the_bytes_of_one(merge, monkeypatch, stand_in_on_cpu):
    expected = merge("free", "one", density=0.05)
    find = devices.find
    monkeypatch.setattr(devices, "find", lambda *args: find(*args) + find(*args))
    assert merge("free", "two", density=0.05) == expected


def test_a_large_tensor_goes_in_pieces(tmp_path, monkeypatch, gpu_calls):
    # pieces of 4 KiB instead of 4 MiB, 8 of them on the GPU at a time, halved until they fit
    monkeypatch.setattr("freemerge.stream.PIECE", 4096)
    monkeypatch.setattr("freemerge.checkpoint.checksum.PIECE", 4096)
    rng = np.random.default_rng(0)
    folders = [
        write_checkpoint(tmp_path / name, {"w": rng.standard_normal((300, 257)).astype(np.float32)})
        for name in ("base", "math", "code")
    ]
    merged = []
    for out, device, memory in [("cpu", "cpu", None), ("gpu", "interpreter", None), ("small", "interpreter", 20000)]:
        gpu_calls.clear()
        where = {"device": device, "max_gpu_memory": memory}
        freemerge.merge("task_arithmetic", folders[0], folders[1:], tmp_path / out, **where)
        merged.append(bytes_of(tmp_path / out))
        pieces = -(-300 * 257 * 4 // 4096)
        at_once = {"cpu": 0, "gpu": 8, "small": 1}[out]
        assert gpu_calls.count("add_task_vectors") == (-(-pieces // at_once) if at_once else 0)
    assert merged[0] == merged[1] == merged[2]


def test_copies_and_integers_stay_on_the_host(tmp_path, gpu_calls):
    base, expert = tiny_vit(0), tiny_vit(1)
    base["vit.steps"], expert["vit.steps"] = np.array([3, 4]), np.array([9, 9])
    base["vit.empty"], expert["vit.empty"] = np.ones((0, 3), np.float32), np.ones((0, 3), np.float32)
    base["vit.scale"], expert["vit.scale"] = np.array(1.0, np.float32), np.array(2.0, np.float32)
    folders = [
        write_checkpoint(tmp_path / name, tensors, config=tiny_vit_config())
        for name, tensors in (("b", base), ("e", expert))
    ]
    freemerge.merge("task_arithmetic", folders[0], [folders[1]], tmp_path / "out", device="interpreter", scaling=0.5)
    merged = tensors_of(tmp_path / "out")
    np.testing.assert_array_equal(merged["vit.steps"], [3, 4])
    assert merged["vit.empty"].shape == (0, 3)
    assert merged["vit.scale"] == 1.5
    assert gpu_calls.count("add_task_vectors") == len(base) - 1


def test_every_dtype(tmp_path, gpu_calls):
    tensors = [{"a": np.full((3, 5), t, np.float32), "b": np.full(7, t, np.float64)} for t in range(3)]
    folders = [write_checkpoint(tmp_path / str(t), part) for t, part in enumerate(tensors)]
    for dtype in ("bfloat16", "float16", "float8_e4m3fn", "float64"):
        where = {"device": "interpreter", "dtype": dtype}
        freemerge.merge("task_arithmetic", folders[0], folders[1:], tmp_path / dtype, scaling=0.5, **where)
        for tensor in tensors_of(tmp_path / dtype).values():
            assert str(tensor.dtype) == dtype
            np.testing.assert_array_equal(tensor.astype(np.float64), 1.5)


@pytest.mark.parametrize("method", ["task_arithmetic", "free"])
def test_an_interrupted_merge_resumes_to_the_same_bytes(merge, models, tmp_path, method):
    expected = merge(method, "whole")

    def interrupt(done, total):
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge(method, "out", progress=interrupt)
    assert not (tmp_path / "out").exists()
    assert merge(method, "out", resume=True) == expected


@pytest.mark.parametrize("limit", [40_000, 100_000])
def test_no_more_memory_is_in_use_than_was_granted(merge, monkeypatch, limit):
    """Inputs and results, that is; for what ops take themselves OnAccelerator.needed adds room."""
    held, most, lock = 0, 0, threading.Lock()
    real = Lane.empty

    def change(nbytes):
        nonlocal held, most
        with lock:
            held += nbytes
            most = max(most, held)

    def empty(lane, shape, dtype):
        tensor = real(lane, shape, dtype)
        change(tensor.nbytes)
        weakref.finalize(tensor, change, -tensor.nbytes)
        return tensor

    monkeypatch.setattr(Lane, "empty", empty)
    merge("task_arithmetic", "out", max_gpu_memory=limit, threads=8)
    assert limit / 3 < most <= limit
    assert held == 0


# -- memory that runs out -----------------------------------------------------------------------------------------


@pytest.fixture
def tight(monkeypatch, gpu_calls):
    """A GPU that has in truth only `tight[0]` bytes for one op's arrays, whatever the budget says."""
    room = [1 << 60]
    roomy = dispatch.gpu_version

    def gpu_version(op):
        run = roomy(op)

        def checked(*args):
            needed = sum(tensor.nbytes for tensor in flattened(args) if isinstance(tensor, torch.Tensor))
            if needed > room[0]:
                gpu_calls.append("out of memory")
                raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {needed} bytes")
            return run(*args)

        return checked

    monkeypatch.setattr(dispatch, "gpu_version", gpu_version)
    return room


def flattened(values):
    for value in values:
        yield from flattened(value) if isinstance(value, list | tuple) else [value]


@pytest.mark.parametrize("method", ["task_arithmetic", "free"])
@pytest.mark.parametrize("room", [100, 5000, 60000])
def test_out_of_memory_shrinks_and_goes_on(merge, tight, gpu_calls, method, room, stand_in_on_cpu):
    expected = merge(method, "roomy")
    tight[0] = room
    gpu_calls.clear()
    assert merge(method, "tight", threads=3) == expected
    assert 0 < gpu_calls.count("out of memory") < 30


def test_shrinking_ends():
    accelerator = Accelerator.interpreter(1000)
    with accelerator.reserve(500):
        accelerator.shrink(400)
        assert accelerator.limit == 450  # one beside another no more
    accelerator.shrink(400)
    assert not accelerator.fits(400)


def test_reservations_wait_for_each_other():
    accelerator = Accelerator.interpreter(1000)
    order = []

    def second():
        with accelerator.reserve(600):
            order.append("second")

    with accelerator.reserve(600):
        thread = threading.Thread(target=second)
        thread.start()
        thread.join(0.1)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]


def test_another_failure_is_not_taken_for_a_lack_of_memory(merge, tight, tmp_path, monkeypatch):
    def broken(op):
        def run(*args):
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

        return run

    monkeypatch.setattr(dispatch, "gpu_version", broken)
    with pytest.raises(RuntimeError, match="illegal"):
        merge("task_arithmetic", "out")
    assert not (tmp_path / "out").exists()


# -- what is wrong with the inputs --------------------------------------------------------------------------------


def test_what_is_not_finite_is_named_and_not_published(models, gpu_calls, tmp_path):
    base, experts = models
    moved = {name: tensor.copy() for name, tensor in tensors_of(experts[0]).items()}
    moved["model.layers.1.mlp.up_proj.weight"][3, 4] = np.nan
    poisoned = str(write_checkpoint(tmp_path / "poisoned", moved))
    with pytest.raises(CheckpointError) as error:
        freemerge.merge("fr", base, [experts[1], poisoned], tmp_path / "out", device="interpreter")
    assert f"model.layers.1.mlp.up_proj.weight: NaN or Inf in {poisoned}" in str(error.value)
    assert not list(tmp_path.glob("*out*"))

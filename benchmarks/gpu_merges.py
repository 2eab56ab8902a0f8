"""Whole merges on a GPU: files streamed through it, and a Session whose inputs stay there."""

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

import freemerge
from gpu_results import Figure
from gpu_timing import Device
from synthetic import FULL, Llama, layout

LLAMA_8B = Llama(4096, 14336, 32, 128256, 32, 8)
EXPERTS = 3


def measure_merges(
    device: Device, folder: Path, copy: float, host: float, *, shrink: int = 1
) -> list[Iterator[Figure]]:
    """fr from the page cache at two sizes, then merging again and again; measured as they are iterated over.

    Args:
        folder: in memory or on disk; what is made there is removed again.
        copy, host: bandwidths of a copy on the device, and from pinned memory to it, bytes/s.
        shrink: divides the widths, to try these lines.
    """
    sizes = {"1.1B": shrunk(FULL, shrink), "8B": shrunk(LLAMA_8B, shrink)}
    return [_measure_model(device, folder, name, llama, copy, host) for name, llama in sizes.items()]


def _measure_model(device: Device, folder: Path, name: str, llama: Llama, copy: float, host: float) -> Iterator[Figure]:
    models, out = _checkpoints(folder / name, llama, device.name), folder / "merged"
    where = {"out": out, "device": "cuda" if device.real else "interpreter"}
    results = [
        freemerge.merge("fr", base=models[0], experts=models[1:], fsync=False, overwrite=True, **where)
        for _ in range(3)
    ]
    seconds, read = sorted(result.seconds for result in results)[1], results[0].bytes_in
    yield Figure.of_bytes(f"fr {name}, files to files", read, seconds, host, bar=0.7, of="pinned host-to-device")
    shutil.rmtree(out)
    if name == "8B":
        yield _session(device, models, copy)
    shutil.rmtree(folder / name)


def _session(device: Device, models: list[Path], copy: float) -> Figure:
    with freemerge.Session(models[0], models[1:], device=device.name if device.real else "interpreter") as session:
        merged = session.merge("task_arithmetic", scaling=0.3)
        moved = (EXPERTS + 2) * sum(tensor.nbytes for tensor in merged.values())
        scalings = [(scaling,) for scaling in (0.1, 0.2, 0.4)]
        seconds = device.seconds(
            lambda scaling: session.merge("task_arithmetic", into=merged, scaling=scaling, check_finite=False), scalings
        )
    what = "Session 8B, task_arithmetic again"
    return Figure(what, seconds, seconds * copy / moved, "times the bytes' time", 1.3, most=True)


def shrunk(llama: Llama, shrink: int) -> Llama:
    if shrink == 1:
        return llama
    small = llama.hidden // shrink
    return replace(llama, hidden=small, intermediate=llama.intermediate // shrink, layers=1, vocabulary=64)


def _checkpoints(folder: Path, llama: Llama, device: str) -> list[Path]:
    """A base and three experts of random weights, made on the device; the experts share one file's bytes.

    Links make the page cache hold 2 models instead of 4: reading and copying do not know.
    """
    base = _write_model(folder / "base", llama, device, seed=0)
    expert = _write_model(folder / "expert0", llama, device, seed=1)
    others = [folder / f"expert{t}" for t in range(1, EXPERTS)]
    for other in others:
        other.mkdir(parents=True, exist_ok=True)
        shutil.copy(expert / "config.json", other)
        os.link(expert / "model.safetensors", other / "model.safetensors")
    return [base, expert, *others]


def _write_model(folder: Path, llama: Llama, device: str, seed: int) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(llama.config()))
    header, _ = layout(llama)
    random = torch.Generator(device).manual_seed(seed)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(header)
        for shape in llama.tensors().values():
            tensor = torch.randn(shape, generator=random, device=device, dtype=torch.bfloat16) * 0.02
            file.write(tensor.view(torch.int16).cpu().numpy().tobytes())
    return folder

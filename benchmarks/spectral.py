"""Methods of singular vectors against the same arithmetic with torch.linalg.svd in full, as fusion_bench has it.

    python benchmarks/spectral.py                        every method and shape, three experts: half an hour on 2 cores
    python benchmarks/spectral.py iso_c,tsvm 768x3072    some

Each run is a process of its own with all cores, float32 in and out: the time of one tensor without imports and inputs,
the anonymous memory it takes at its peak beyond them, and the largest error against float64, relative to the largest
entry of the update. What torch runs is written from METHODS.md sections 9, 10 and 16 (official: torch.linalg.svd).
"""

import json
import subprocess
import sys
import time

import numpy as np

import processes
import results

SHAPES = ("768x3072", "2048x2048", "2048x5632", "5632x2048")
METHODS = ("iso_c", "iso_cts", "tsvm")
EXPERTS = 3
RANK, LOW_RANK, NOISE = 16, 2e-4, 2e-4  # as synthetic.py: what an expert moved


def make_inputs(shape: tuple[int, int]) -> list[np.ndarray]:
    """Task vectors: the experts of a base that is zero, so that its rounding is no part of the error."""
    random, vectors = np.random.default_rng(0), []
    for _ in range(EXPERTS):
        left, right = (random.standard_normal((side, RANK), np.float32) for side in shape)
        noise = random.standard_normal(shape, np.float32) * np.float32(NOISE)
        vectors.append(np.float32(LOW_RANK / 4) * (left @ right.T) + noise)
    return vectors


# ---- with torch ----


def svd(matrix):
    import torch

    return torch.linalg.svd(matrix, full_matrices=False)


def iso_c(vectors):
    left, values, right = svd(sum(vectors))
    return values.mean() * (left @ right)


def tsvm(vectors):
    import torch

    rank = int(min(vectors[0].shape) * (1 / len(vectors)))
    lefts, values, rights = zip(*map(svd, vectors), strict=True)
    left = torch.cat([one[:, :rank] for one in lefts], dim=1)
    right = torch.cat([one[:rank] for one in rights])
    return polar(left) @ torch.diag(torch.cat([one[:rank] for one in values])) @ polar(right)


def iso_cts(vectors, common: float = 0.8):
    import torch

    n, count = min(vectors[0].shape), len(vectors)
    shared = n - count * round((n - int(n * common)) / count)
    own = (n - shared) // count
    left, values, right = svd(sum(vectors))
    space = left[:, :shared], values[:shared], right[:shared]
    parts = []
    for vector in vectors:
        left, values, right = svd(vector - space[0] @ (space[0].T @ vector))
        parts.append((left[:, :own], values[:own], right[:own]))
    lefts, values, rights = zip(*parts, space, strict=True)
    return torch.cat(values).mean() * polar(torch.cat(lefts, dim=1)) @ polar(torch.cat(rights))


def polar(matrix):
    left, _, right = svd(matrix)
    return left @ right


def torch_update(method: str, vectors: list[np.ndarray], double: bool = False) -> np.ndarray:
    import torch

    tensors = [torch.from_numpy(vector) for vector in vectors]
    if double:
        tensors = [tensor.double() for tensor in tensors]
    return {"iso_c": iso_c, "tsvm": tsvm, "iso_cts": iso_cts}[method](tensors).numpy()


# ---- measuring ----


def freemerge_update(method: str, vectors: list[np.ndarray]) -> np.ndarray:
    import freemerge

    base = {"w": np.zeros_like(vectors[0])}
    return freemerge.merge_state_dicts(method, base, [{"w": vector} for vector in vectors])["w"]


def measure(kind: str, method: str, shape: tuple[int, int], reference: str) -> dict[str, float]:
    """In a process of its own."""
    import torch

    import freemerge  # noqa: F401

    vectors = make_inputs(shape)
    if kind == "float64":
        np.save(reference, torch_update(method, vectors, double=True))
        return {}
    svd(torch.eye(64))  # starts the threads
    freemerge_update(method, [vector[:64, :64].copy() for vector in vectors])
    watch = processes.PeakWatch(processes.os.getpid())
    before, started = processes.anonymous_bytes(watch.pid), time.perf_counter()
    run = {"freemerge": freemerge_update, "torch": torch_update}[kind]
    update = run(method, vectors)
    seconds, peak = time.perf_counter() - started, watch.stop()
    expected = np.load(reference)
    return {
        "seconds": seconds,
        "mib": (peak - before) / 2**20,
        "error": float(np.abs(update - expected).max() / np.abs(expected).max()),
    }


def in_process(*arguments: str) -> dict[str, float]:
    command = [sys.executable, __file__, "measure", *arguments]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main(methods: str = ",".join(METHODS), shapes: str = ",".join(SHAPES)) -> None:
    rows, reference = [], "/tmp/freemerge-spectral.npy"
    for method in methods.split(","):
        for shape in shapes.split(","):
            in_process("float64", method, shape, reference)
            ours, torchs = (in_process(kind, method, shape, reference) for kind in ("freemerge", "torch"))
            faster = torchs["seconds"] / ours["seconds"]
            numbers = (f"{one['seconds']:.2f} s, {one['mib']:.0f} MiB, {one['error']:.1e}" for one in (ours, torchs))
            rows.append((method, shape, *numbers, f"{faster:.1f} x"))
            print(*rows[-1], sep="  ", file=sys.stderr, flush=True)
    print(results.table(("method", "shape", "freemerge", "torch.linalg.svd", "faster"), rows))


if __name__ == "__main__":
    if sys.argv[1:2] == ["measure"]:
        kind, method, shape, reference = sys.argv[2:]
        print(json.dumps(measure(kind, method, tuple(map(int, shape.split("x"))), reference)))
    else:
        main(*sys.argv[1:])

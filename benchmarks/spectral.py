"""Methods of singular vectors against the same arithmetic with torch.linalg.svd in full, as fusion_bench has it.

    python benchmarks/spectral.py                        every method and shape: half an hour on 2 cores
    python benchmarks/spectral.py iso_c,tsvm 768x3072    some

A model of two tensors of one shape and three experts, float32. Each run is a process of its own with all cores, timed
by the clock and in seconds of CPU, without imports: freemerge merges from file to file, what torch runs (written from
METHODS.md section 16) has its inputs in memory. Medians of ROUNDS in turns; anonymous memory at its peak beyond what
there was before; and the largest error against float64, relative to the largest entry of the update.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np

import processes
import results

SHAPES = ("768x3072", "2048x2048", "2048x5632", "5632x2048")
METHODS = ("iso_c", "iso_cts", "tsvm")
TENSORS, EXPERTS, ROUNDS = 2, 3, 3
RANK, LOW_RANK, NOISE = 16, 2e-4, 2e-4  # as synthetic.py: what an expert moved


def make_vectors(shape: tuple[int, int], tensor: int) -> list[np.ndarray]:
    """Task vectors: the experts of a base that is zero, so that its rounding is no part of the error."""
    random, vectors = np.random.default_rng(tensor), []
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


def torch_update(method: str, vectors: list[np.ndarray], dtype: str = "float32") -> np.ndarray:
    import torch

    tensors = [torch.from_numpy(vector).to(getattr(torch, dtype)) for vector in vectors]
    return {"iso_c": iso_c, "tsvm": tsvm, "iso_cts": iso_cts}[method](tensors).numpy()


def torch_updates(method: str, of_tensors: list[list[np.ndarray]]) -> list[np.ndarray]:
    return [torch_update(method, vectors) for vectors in of_tensors]


# ---- measuring, in a process of its own ----


def write_models(folder: Path, shape: tuple[int, int]) -> list[Path]:
    from freemerge.testing import write_checkpoint

    of_tensors = [make_vectors(shape, tensor) for tensor in range(TENSORS)]
    models = {"base": [np.zeros(shape, np.float32)] * TENSORS}
    models |= {f"expert{t}": [vectors[t] for vectors in of_tensors] for t in range(EXPERTS)}
    return [write_checkpoint(folder / name, dict(zip("ab", arrays, strict=True))) for name, arrays in models.items()]


def merge_files(method: str, models: list[Path], out: Path) -> None:
    import freemerge

    freemerge.merge(method, models[0], models[1:], out, fsync=False, overwrite=True)


def measure(kind: str, method: str, shape: tuple[int, int], folder: Path) -> dict[str, float]:
    import torch

    from freemerge.checkpoint.reader import open_checkpoint

    if kind == "float64":
        np.save(folder / "expected.npy", torch_update(method, make_vectors(shape, 0), "float64"))
        return {}
    svd(torch.eye(64))  # starts the threads
    merge_files(method, write_models(folder / "small", (64, 64)), folder / "small" / "out")  # imports
    if kind == "freemerge":
        run = partial(merge_files, method, write_models(folder, shape), folder / "out")
    else:
        run = partial(torch_updates, method, [make_vectors(shape, tensor) for tensor in range(TENSORS)])
    watch = processes.PeakWatch(processes.os.getpid())
    before = processes.anonymous_bytes(watch.pid)
    started, busy = time.perf_counter(), time.process_time()
    found = run()
    seconds, cpu = time.perf_counter() - started, time.process_time() - busy
    peak = watch.stop()
    update = found[0] if found else open_checkpoint(folder / "out").read("a")
    expected = np.load(folder / "expected.npy")
    error = float(np.abs(update - expected).max() / np.abs(expected).max())
    return {"seconds": seconds, "cpu": cpu, "mib": (peak - before) / 2**20, "error": error}


def in_process(*arguments: str) -> dict[str, float]:
    command = [sys.executable, __file__, "measure", *arguments]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def compared(method: str, shape: str) -> tuple[str, ...]:
    found: dict[str, list[dict[str, float]]] = {"freemerge": [], "torch": []}
    with tempfile.TemporaryDirectory() as folder:
        in_process("float64", method, shape, folder)
        for _ in range(ROUNDS):
            for kind, runs in found.items():
                runs.append(in_process(kind, method, shape, folder))
    texts, medians = [], []
    for runs in found.values():
        seconds, cpu = (statistics.median(run[unit] for run in runs) for unit in ("seconds", "cpu"))
        texts.append(f"{seconds:.2f} s, CPU {cpu:.2f} s, {runs[0]['mib']:.0f} MiB, {runs[0]['error']:.1e}")
        medians.append((seconds, cpu))
    ours, torchs = medians
    return method, shape, *texts, f"{torchs[0] / ours[0]:.1f} x, CPU {torchs[1] / ours[1]:.1f} x"


def main(methods: str = ",".join(METHODS), shapes: str = ",".join(SHAPES)) -> None:
    rows = []
    for method in methods.split(","):
        for shape in shapes.split(","):
            rows.append(compared(method, shape))
            print(*rows[-1], sep="  ", file=sys.stderr, flush=True)
    print(results.table(("method", "shape", "freemerge", "torch.linalg.svd", "faster"), rows))


if __name__ == "__main__":
    if sys.argv[1:2] == ["measure"]:
        kind, method, shape, folder = sys.argv[2:]
        print(json.dumps(measure(kind, method, tuple(map(int, shape.split("x"))), Path(folder))))
    else:
        main(*sys.argv[1:])

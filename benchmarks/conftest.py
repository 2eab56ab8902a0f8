"""Shared by all benchmarks: arrays like those of real checkpoints, and bytes moved against what this machine copies."""

import time
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from importlib import import_module

import numpy as np
import pytest

from freemerge.kernels import dispatch
from freemerge.kernels.array import BFLOAT16
from shapes import SHAPES, SMALL


def pytest_generate_tests(metafunc):
    """Every op on every shape; its reference on a small one, to compare with."""
    if {"version", "shape"} <= set(metafunc.fixturenames):
        cases = [("cpu", name) for name in SHAPES] + [("reference", SMALL)]
        parameters = [pytest.param(version, SHAPES[name], id=f"{version} {name}") for version, name in cases]
        metafunc.parametrize(("version", "shape"), parameters)


@pytest.fixture(scope="session")
def copy_bandwidth() -> float:
    """Bytes a second read and written by copying large arrays on as many threads as the ops use; the best of seven."""
    count = dispatch.threads()
    pairs = [(np.ones(2**27, np.uint8), np.empty(2**27, np.uint8)) for _ in range(count)]
    with ThreadPoolExecutor(count) as pool:

        def seconds() -> float:
            start = time.perf_counter()
            list(pool.map(lambda pair: np.copyto(pair[1], pair[0]), pairs))
            return time.perf_counter() - start

        return 2 * count * 2**27 / min(seconds() for _ in range(7))


@pytest.fixture
def throughput(benchmark, copy_bandwidth):
    """throughput(run, moved) times `run`, which reads and writes `moved` bytes, and records GB/s beside the copy's."""

    def measure(run, moved: int):
        result = benchmark.pedantic(run, rounds=7, warmup_rounds=1)
        if benchmark.stats is not None:
            rate = moved / benchmark.stats.stats.median
            share = rate / copy_bandwidth
            benchmark.extra_info["GB_per_s"] = round(rate / 1e9, 2)
            benchmark.extra_info["copy_GB_per_s"] = round(copy_bandwidth / 1e9, 2)
            benchmark.extra_info["share_of_copy"] = round(share, 2)
            print(f"\n{benchmark.name}: {rate / 1e9:.1f} GB/s, {share:.0%} of a copy's {copy_bandwidth / 1e9:.1f}")
        return result

    return measure


@lru_cache(maxsize=1)
def checkpoint(shape, experts: int = 3):
    """A bfloat16 weight and its fine-tuned versions, which mostly differ by a few units in the last place."""
    random = np.random.default_rng(0)
    base = (random.standard_normal(shape, np.float32) * 0.02).astype(BFLOAT16)
    noise = (random.standard_normal(shape, np.float32) * 1e-3 for _ in range(experts))
    return base, [(base.astype(np.float32) + change).astype(BFLOAT16) for change in noise]


@pytest.fixture
def weights(shape):
    return checkpoint(shape)


@pytest.fixture
def version_of(version):
    """version_of(op): the compiled op or its reference, which take the same arguments."""

    def find(op):
        if version == "reference":
            return getattr(import_module(f"freemerge.kernels.{op}"), f"{op}_reference")
        return getattr(dispatch._cpu, op)

    return find

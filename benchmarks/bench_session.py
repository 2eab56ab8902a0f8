"""A session merging again: against a copy of the same bytes, and what Python takes where there is little to merge."""

import numpy as np
import pytest

import freemerge
from freemerge.kernels.array import BFLOAT16
from freemerge.testing import tiny_llama
from synthetic import Llama

EXPERTS = 3
PARAMETERS = {"task_arithmetic": {"weight": [0.3, 0.2, 0.1]}, "linear": {"weight": [0.5, 0.3, 0.2]}, "fr": {}}
LLAMA = Llama(layers=2, vocabulary=4000)
# the tensors of a Llama of 32 layers, each of next to no elements
MANY_TENSORS = {"num_hidden_layers": 32, "hidden_size": 16, "intermediate_size": 24, "vocab_size": 32}


@pytest.fixture(scope="module")
def large():
    noise = np.random.default_rng(0).standard_normal(1 << 20, np.float32) * 0.02
    shapes = LLAMA.tensors()
    return [
        {name: np.resize(np.roll(noise, t), shape).astype(BFLOAT16) for name, shape in shapes.items()}
        for t in range(1 + EXPERTS)
    ]


@pytest.fixture(scope="module")
def many():
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    return [tiny_llama(seed, dtype=BFLOAT16, **MANY_TENSORS, **heads) for seed in range(1 + EXPERTS)]


@pytest.mark.parametrize("method", PARAMETERS)
def test_again(throughput, large, method):
    with freemerge.Session(large[0], large[1:], device="cpu") as session:
        former = session.merge(method, **PARAMETERS[method])
        read = EXPERTS if method == "linear" else 1 + EXPERTS
        moved = (read + 1) * sum(array.nbytes for array in former.values())
        expected = {name: array.copy() for name, array in former.items()}
        throughput(lambda: session.merge(method, into=former, **PARAMETERS[method]), moved)
    assert all(former[name].tobytes() == array.tobytes() for name, array in expected.items())


@pytest.mark.parametrize("into", [False, True], ids=["new", "into"])
@pytest.mark.parametrize("method", PARAMETERS)
def test_overhead(benchmark, many, method, into):
    with freemerge.Session(many[0], many[1:], device="cpu", threads=1) as session:
        former = session.merge(method) if into else None
        merged = benchmark(lambda: session.merge(method, into=former, **PARAMETERS[method]))
        assert len(merged) == 291
    if benchmark.stats is not None:
        milliseconds = benchmark.stats.stats.median * 1e3
        benchmark.extra_info["milliseconds"] = round(milliseconds, 2)
        print(f"\n{benchmark.name}: {milliseconds:.1f} ms for {len(merged)} tensors of next to nothing")

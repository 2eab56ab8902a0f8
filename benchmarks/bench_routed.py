"""A batch of 32 rows over 8 experts: routed in one forward, against the backbone alone and against swapping models.

Side by side in one process, medians of rounds; threads as the machine has them.
"""

import statistics
import time

import numpy as np
import pytest
import torch

import freemerge
from attached_models import random_expert
from freemerge.checkpoint.torch_arrays import from_torch
from freemerge.testing import write_safetensors

ROWS, EXPERTS, ROUNDS = 32, 8, 3
DENSE_BAR, SWAP_BAR = 1.3, 4.0
WORDS = 30522


def encoder():
    """Six layers of 768, as DistilBERT has them."""
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(num_hidden_layers=6)
    return transformers.BertModel(config, add_pooling_layer=False)


def decoder():
    """Two layers of TinyLlama's 1.1 B, and a small vocabulary."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=2,
        num_attention_heads=32,
        num_key_value_heads=4,
        vocab_size=4000,
    )
    return transformers.LlamaModel(config)


def seconds(run) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


@pytest.fixture(scope="module", params=[encoder, decoder], ids=lambda make: make.__name__)
def model(request):
    torch.manual_seed(0)
    made = request.param().eval()
    shapes = {name: tuple(tensor.shape) for name, tensor in made.named_parameters()}
    return freemerge.attach(made, [random_expert(f"e{e}", shapes, 0.01, e) for e in range(EXPERTS)])


@pytest.fixture(scope="module")
def files(model, tmp_path_factory):
    """Every expert's whole model, as the official evaluation keeps it."""
    folder, paths = tmp_path_factory.mktemp("models"), {}
    for name in model.experts:
        model.use_expert(name)
        paths[name] = folder / f"{name}.safetensors"
        write_safetensors(paths[name], {n: from_torch(t) for n, t in model.state_dict().items()})
    model.use_expert(None)
    return paths


@pytest.mark.parametrize("tokens", [16])
def test_mixed_batch(benchmark, model, files, tokens):
    load = pytest.importorskip("safetensors.torch").load_file
    words = model.get_input_embeddings().num_embeddings
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, words, (ROWS, tokens)))
    assignment = [model.experts[row % EXPERTS] for row in range(ROWS)]
    groups = {name: [row for row in range(ROWS) if assignment[row] == name] for name in model.experts}

    def routed():
        with model.routed(assignment):
            return model(ids).last_hidden_state

    def swapped(swap):
        answer = torch.empty(ROWS, tokens, model.config.hidden_size)
        for name, rows in groups.items():
            swap(name)
            answer[rows] = model(ids[rows]).last_hidden_state
        return answer

    runs = {
        "dense": lambda: model(ids),
        "routed": routed,
        "switched": lambda: swapped(model.use_expert),
        "swapped": lambda: swapped(lambda name: model.load_state_dict(load(files[name]), strict=False)),
    }
    with torch.inference_mode():
        expected = swapped(model.use_expert)
        model.use_expert(None)
        torch.testing.assert_close(routed(), expected, rtol=1e-3, atol=1e-3)  # six layers in float32
        backbone = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        times: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(ROUNDS):
            for name, run in runs.items():
                times[name].append(seconds(run))
                model.use_expert(None)
                if name == "swapped":
                    model.load_state_dict(backbone)
        benchmark.pedantic(routed, rounds=1)
    medians = {name: statistics.median(all_times) for name, all_times in times.items()}
    ratios = {
        "of_dense": medians["routed"] / medians["dense"],
        "faster_than_swapped": medians["swapped"] / medians["routed"],
    }
    ratios["faster_than_switched"] = medians["switched"] / medians["routed"]
    benchmark.extra_info |= {name: round(value, 3) for name, value in ratios.items()}
    print(
        f"\n{benchmark.name}: " + ", ".join(f"{n} {t * 1e3:.0f} ms" for n, t in medians.items()) + f"; routed takes "
        f"{ratios['of_dense']:.2f} of dense (bar {DENSE_BAR}), {ratios['faster_than_swapped']:.1f} times faster than "
        f"swapping files (bar {SWAP_BAR:g}), {ratios['faster_than_switched']:.1f} times than use_expert for each group"
    )

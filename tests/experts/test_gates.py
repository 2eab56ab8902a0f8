"""Gates in a running model: each token picks its experts in each linear layer, as the layer's definition says."""

import copy
import json
import shutil
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from torch import nn

import freemerge
from freemerge.attached.products import add_chosen
from freemerge.checkpoint.torch_arrays import as_tensor
from freemerge.errors import CheckpointError, InputError
from freemerge.experts.routed_layer import forward, route
from freemerge.experts.sidecar import read_expert
from freemerge.kernels.array import BFLOAT16
from freemerge.methods.smile import EMBEDDINGS_AND_NORMS
from freemerge.parts import Difference, LowRank
from freemerge.routers import Gates
from freemerge.testing import random_array, tiny_llama, tiny_llama_config, write_checkpoint

transformers = pytest.importorskip("transformers")

NAMES = ("math", "code", "law")  # not in the order of the alphabet, in which files are opened
IDS = torch.from_numpy(np.random.default_rng(0).integers(1, 60, (3, 7)))
# two orders of summation in float32, over layers with activations of size 1 to 10
F32 = {"rtol": 2e-4, "atol": 2e-4}


def llama():
    config = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config |= {"num_key_value_heads": 2, "vocab_size": 60, "eos_token_id": None, "pad_token_id": 0}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**config))


def bert():
    config = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=60, **config))


@cache
def merged(make, rank=4):
    """A model, and what smile makes of it and of experts near it, all of random numbers."""
    model = make()
    return model, merged_by_smile(model, rank=rank, top_k=2)


def attached(make, rank=4):
    model, found = merged(make, rank)
    return freemerge.attach(copy.deepcopy(model), found.experts)


def merged_by_smile(model, **parameters):
    torch.manual_seed(0)
    with torch.no_grad():
        for tensor in model.parameters():
            nn.init.normal_(tensor, 1.0 if tensor.ndim == 1 else 0.0, 0.3)
    base = model.eval().state_dict()
    tuned = {name: {n: shaken(t, seed) for n, t in base.items()} for seed, name in enumerate(NAMES)}
    return freemerge.merge_state_dicts("smile", base, tuned, **{"rank": 4, "gate_rank": 2, **parameters})


def shaken(tensor, seed):
    """`tensor` and a tenth of its size more."""
    return tensor + 0.03 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(seed)).to(tensor.dtype)


class ByHand(nn.Module):
    """A linear layer with experts, a token at a time."""

    def __init__(self, layer, name, merged, top_k):
        super().__init__()
        self.layer, self.name, self.merged, self.top_k = layer, name, merged, top_k

    def forward(self, x):
        tokens = x.reshape(-1, x.shape[-1])
        return torch.stack([self.answer(token) for token in tokens]).view(*x.shape[:-1], -1)

    def answer(self, token):
        weight, bias = f"{self.name}.weight", f"{self.name}.bias"
        directions = as_tensor(self.merged.shared[weight]["gate"]).float().view(len(NAMES), -1, len(token))
        chances = (directions @ token).norm(dim=1).softmax(0)
        chosen = chances.argsort(descending=True)[: self.top_k].tolist()
        answer = self.layer(token)
        for t in chosen:
            parts = self.merged.experts[t].tensors
            part = parts[weight]
            change = as_tensor(part.left) @ (as_tensor(part.right) @ token)
            if bias in parts:
                change = change + as_tensor(parts[bias].difference)
            answer = answer + chances[t] / chances[chosen].sum() * change
        return answer


def with_layers_by_hand(model, merged, top_k):
    twin = copy.deepcopy(model)
    for name, module in list(twin.named_modules()):
        if isinstance(module, nn.Linear):
            parent, _, last = name.rpartition(".")
            setattr(twin.get_submodule(parent), last, ByHand(module, name, merged, top_k))
    return twin


@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("make", [llama, bert])
def test_a_whole_model_is_what_its_layers_are_by_hand(make, top_k):
    model, by_hand = attached(make), with_layers_by_hand(*merged(make), top_k)
    with torch.no_grad():
        expected, backbone = by_hand(IDS).logits, model(IDS).logits
        with model.routed(Gates() if top_k == 2 else Gates(top_k=top_k)):
            found = model(IDS).logits
        with model.routed(Gates(top_k=1 + top_k % 3)):
            other = model(IDS).logits
        again = model(IDS).logits
    torch.testing.assert_close(found, expected, **F32)
    torch.testing.assert_close(again, backbone, rtol=0, atol=0)
    for different in (backbone, other):
        assert (different - expected).abs().max() > 0.01


@pytest.mark.parametrize("rank", [4, 0], ids=["low rank", "differences"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("make", [llama, bert])
def test_every_layer_answers_what_its_reference_does(make, dtype, rank):
    model, shared, experts = attached(make, rank).to(dtype), merged(make, rank)[1].shared, merged(make, rank)[1].experts
    seen = {}
    with torch.no_grad(), model.routed(Gates()):
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear):
                module.register_forward_hook(lambda m, given, y, name=name: seen.update({name: (m, given[0], y)}))
        model(IDS)
    assert len(seen) == sum(isinstance(module, nn.Linear) for module in model.modules())
    for name, (module, x, y) in seen.items():
        tokens = x.reshape(-1, x.shape[-1]).float().numpy()
        weights = route(tokens, shared[f"{name}.weight"]["gate"], 3, 2).weights
        parts, biases = ([e.tensors.get(f"{name}.{own}") for e in experts] for own in ("weight", "bias"))
        bias = None if module.bias is None else module.bias.detach().float().numpy()
        expected = forward(tokens, module.weight.detach().float().numpy(), bias, parts, biases, weights)
        # bfloat16: what the backbone's layer answers is rounded, and so is the sum
        rtol = 2**-7 if dtype == torch.bfloat16 else 2e-6
        atol = rtol * np.abs(expected).max()
        np.testing.assert_allclose(y.reshape(len(tokens), -1).float().numpy(), expected, rtol=rtol, atol=atol)


def test_generation_asks_the_gates_for_every_token():
    model, by_hand = attached(llama), with_layers_by_hand(*merged(llama), 2)
    options = {"max_new_tokens": 6, "do_sample": False}
    expected = by_hand.generate(IDS, **options)
    with model.routed(Gates()):
        assert torch.equal(model.generate(IDS, **options), expected)
        twin = copy.deepcopy(model)
        backbone = twin.generate(IDS, **options)
    assert torch.equal(model.generate(IDS, **options), backbone)
    assert not torch.equal(expected, backbone)


@pytest.fixture(scope="module")
def on_disk(tmp_path_factory):
    folder = tmp_path_factory.mktemp("smile")
    for seed, name in enumerate(("base", *NAMES)):
        write_checkpoint(folder / name, tiny_llama(seed, dtype=BFLOAT16, scale=0.1), config=tiny_llama_config())
    given = {"rank": 4, "gate_rank": 2, "top_k": 2, "fsync": False}
    freemerge.merge("smile", folder / "base", {n: folder / n for n in NAMES}, folder / "merged", **given)
    return folder / "merged"


def test_a_merged_model_from_disk_knows_whose_gates_are_whose(on_disk):
    model = freemerge.load(on_disk)
    assert model.experts == tuple(sorted(NAMES))
    layer, name = model.model.layers[1].mlp.up_proj, "model.layers.1.mlp.up_proj.weight"
    found = model.use_expert.__self__.found
    x = torch.randn(5, layer.in_features, generator=torch.Generator().manual_seed(0)).to(layer.weight.dtype)
    with torch.no_grad(), model.routed(Gates()):
        answer = layer(x).float().numpy()
    weights = route(x.float().numpy(), found.gates.arrays[name], 3, 2).weights
    parts = [found.experts[expert].tensors[name] for expert in NAMES]
    expected = forward(x.float().numpy(), layer.weight.detach().float().numpy(), None, parts, [None] * 3, weights)
    np.testing.assert_allclose(answer, expected, rtol=2**-7, atol=2**-7 * np.abs(expected).max())  # as above


def test_experts_without_gates_are_told_at_once(on_disk, tmp_path):
    model, missing = attached(llama), ["model.layers.0.mlp.up_proj.weight", "lm_head.weight"]
    without(model, missing)
    with pytest.raises(InputError) as error, model.routed(Gates()):
        pass
    assert str(error.value).startswith("2 problems, nothing was run")
    assert all(f"{name}: there is no gate of" in str(error.value) for name in missing)
    with model.routed("math"):
        pass
    model.detach_experts()
    freemerge.attach(model, freemerge.merge_state_dicts("emr", model.state_dict(), {"a": shaken_all(model)}).experts)
    with pytest.raises(InputError, match=r"these experts have no gates\. Gates are what"), model.routed(Gates()):
        pass
    shutil.copytree(on_disk, tmp_path / "merged")
    (tmp_path / "merged/experts/law.safetensors").unlink()
    two = freemerge.load(tmp_path / "merged")
    with pytest.raises(InputError, match="gates are of math, code, law; not attached: law"), two.routed(Gates()):
        pass


def without(model, names):
    found = model.use_expert.__self__.found
    model.use_expert.__self__.found = replace(
        found, gates=replace(found.gates, arrays={n: a for n, a in found.gates.arrays.items() if n not in names})
    )


def shaken_all(model):
    return {name: shaken(tensor, 1) for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda gate: gate[:-1],
            r"the gate of lm_head.weight: \[5, 32\], expected are \[a multiple of 3 experts, 32\]",
        ),
        (lambda gate: gate[:, :-1], r"\[6, 31\], expected"),
        (lambda gate: np.where(gate == gate.max(), np.nan, gate), "the gate of lm_head.weight: NaN or Inf"),
    ],
)
def test_a_gate_that_does_not_fit_is_refused(spoil, message):
    model, found = copy.deepcopy(merged(llama))
    found.shared["lm_head.weight"]["gate"] = spoil(np.array(found.shared["lm_head.weight"]["gate"]))
    freemerge.attach(model, found.experts)
    with pytest.raises(InputError, match=message), model.routed(Gates()):
        pass


@pytest.mark.parametrize("top_k", [0, -1, 1.0, True, "2"])
def test_top_k_is_a_whole_number(top_k):
    with pytest.raises(InputError, match="a whole number from 1 on"):
        Gates(top_k=top_k)


def test_more_experts_than_there_are():
    model = attached(llama)
    with pytest.raises(InputError, match="top_k 4: there are 3 experts"), model.routed(Gates(top_k=4)):
        pass


def test_layers_that_do_not_show_their_input_are_refused():
    """MultiheadAttention takes its projection's weights past the module; a Conv1D's gate is of its other side."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.turned = transformers.pytorch_utils.Conv1D(8, 8)

    model = Block()
    freemerge.attach(model, merged_by_smile(model, rank=2).experts)
    with pytest.raises(InputError) as error, model.routed(Gates()):
        pass
    for name in ("attention.out_proj.weight", "attention.out_proj.bias", "turned.weight", "turned.bias"):
        assert f"{name}: a gate needs what its layer is given" in str(error.value)


def test_layers_that_are_passed_by_at_times_are_refused():
    class Sometimes(nn.Module):
        def __init__(self):
            super().__init__()
            self.out = nn.Linear(8, 5)

        def forward(self, x):
            return nn.functional.linear(x, self.out.weight, self.out.bias) if len(x) == 1 else self.out(x)

    model = Sometimes()
    freemerge.attach(model, merged_by_smile(model).experts)
    with pytest.raises(InputError, match=r"which the model \(Sometimes\) may take past it"), model.routed(Gates()):
        pass


def test_other_modules_stay_the_backbones():
    """An embedding that smile's patterns took for a linear layer: in the official code it is none."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.head = nn.Embedding(60, 8), nn.Linear(8, 5)

        def forward(self, ids):
            return self.head(self.table(ids))

    model = Net()
    found = merged_by_smile(model)
    assert "table.weight" in found.experts[0].tensors
    by_hand = with_layers_by_hand(model, found, 1)
    freemerge.attach(model, found.experts)
    with torch.no_grad(), model.routed(Gates()):
        torch.testing.assert_close(model(IDS), by_hand(IDS), **F32)


def test_experts_without_gates_may_be_attached_beside_them():
    model = llama()
    found = merged_by_smile(model, exclude=(*EMBEDDINGS_AND_NORMS, "lm_head"))
    alone = freemerge.attach(copy.deepcopy(model), found.experts)
    beside = freemerge.merge_state_dicts("emr", model.state_dict(), {"emr": shaken_all(model)}).experts
    assert "lm_head.weight" in beside[0].tensors
    freemerge.attach(model, [*found.experts, *beside])
    with torch.no_grad(), alone.routed(Gates()), model.routed(Gates()):
        torch.testing.assert_close(model(IDS).logits, alone(IDS).logits, rtol=0, atol=0)


def test_a_part_meets_only_the_tokens_that_chose_it():
    sides = [[random_array(shape, np.float32, e) for shape in ((5, 2), (2, 4))] for e in (1, 2)]
    parts = [(LowRank(left, right, (5, 4)), 0.5) for left, right in sides]
    parts.append((Difference(random_array((5, 4), np.float32, 3), (5, 4)), 2.0))
    matrices = [*(left @ right for left, right in sides), parts[2][0].difference]
    x, total = torch.from_numpy(random_array((6, 4), np.float32, 9)), torch.zeros(6, 5, dtype=torch.float64)
    x[5] = torch.nan  # chosen by nobody
    weights = torch.tensor([[1.0, 0, 0], [0, 0.5, 0.5], [0, 1, 0], [0, 0, 1], [0.2, 0.3, 0.5], [0, 0, 0]])
    add_chosen(x, total, parts, weights)
    for i in range(5):
        scaled = sum(float(w) * s * m for w, s, m in zip(weights[i], (0.5, 0.5, 2.0), matrices, strict=True))
        np.testing.assert_allclose(total[i].numpy(), scaled @ x[i].numpy(), rtol=1e-5, atol=1e-6)  # float32 products
    assert not total[5].any()


def test_gates_are_written_with_the_names_of_their_experts(on_disk):
    shared = read_expert(on_disk / "experts/code.safetensors").shared
    assert json.loads(shared.metadata["experts"]) == list(NAMES)


@pytest.mark.parametrize("experts", [None, "math", "3"], ids=str)
def test_gates_of_nobody_are_refused(experts):
    model, found = copy.deepcopy(merged(llama))
    found.shared.metadata = {} if experts is None else {"experts": experts}
    with pytest.raises(CheckpointError, match="math: metadata do not say of which experts the gates are"):
        freemerge.attach(model, found.experts)

"""A batch whose rows use different experts gives what each row gives with its expert in place, within rounding."""

import copy
import threading

import numpy as np
import pytest
import torch
from merged_models import EXPERTS, merged_llama
from parts_of_kinds import experts_for
from torch import nn

import freemerge
from freemerge.attached.direct import taken_directly
from freemerge.attached.replay_route import ReplayRoute
from freemerge.attached.routes import EmbeddingRoute, LinearRoute, NormRoute, RmsNormRoute, route_for
from freemerge.checkpoint.torch_arrays import to_torch
from freemerge.errors import CheckpointError, InputError
from freemerge.kernels.array import BFLOAT16

transformers = pytest.importorskip("transformers")

ASSIGNMENT = ["a", None, "b", "a", "c", "b"]
# two orders of summation in float32, over layers with activations of size 1 to 10
F32 = {"rtol": 2e-4, "atol": 2e-4}


def attached(model, kind="rows"):
    torch.manual_seed(0)
    for tensor in model.parameters():
        nn.init.normal_(tensor, 1.0 if tensor.ndim == 1 else 0.0, 0.3)
    return freemerge.attach(model.eval(), experts_for(model, kind))


def one_by_one(model, assignment, run):
    """run(row) with the row's expert in place."""
    answers = []
    for row, name in enumerate(assignment):
        model.use_expert(name)
        answers.append(run(row))
    model.use_expert(None)
    return torch.cat(answers)


def assert_routed(model, batch, assignment=ASSIGNMENT, tolerance=F32, call=lambda model, batch: model(batch)):
    with torch.no_grad():
        expected = one_by_one(model, assignment, lambda row: call(model, batch[row : row + 1]))
        backbone = call(model, batch)
        with model.routed(assignment):
            found = call(model, batch)
        again = call(model, batch)
    assert not torch.allclose(expected, backbone, **tolerance)
    torch.testing.assert_close(found, expected, **tolerance)
    torch.testing.assert_close(again, backbone, rtol=0, atol=0)
    assert not any(m._forward_hooks for m in list(model.modules())[1:])


def tiny_llama_model(**overrides):
    config = {
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 160,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**(config | overrides)))


def logits(model, batch):
    return model(batch).logits


IDS = torch.from_numpy(np.random.default_rng(0).integers(1, 160, (6, 7)))


@pytest.mark.parametrize("kind", ["rows", "replace", "mask", "low_rank", "difference"])
def test_llama_with_parts_of_every_kind(kind):
    assert_routed(attached(tiny_llama_model(), kind), IDS, call=logits)


def test_a_tied_head_is_routed_with_its_embedding():
    model = attached(tiny_llama_model(tie_word_embeddings=True))
    assert_routed(model, IDS, call=logits)


@pytest.mark.parametrize("kind", ["rows", "mask", "low_rank"])
def test_bfloat16_is_as_far_from_float32_as_experts_in_place_are(kind):
    exact, model = attached(tiny_llama_model(), kind), attached(tiny_llama_model(), kind)
    model.to(torch.bfloat16)
    with torch.no_grad():
        expected = one_by_one(exact, ASSIGNMENT, lambda row: exact(IDS[row : row + 1]).logits)
        in_place = one_by_one(model, ASSIGNMENT, lambda row: model(IDS[row : row + 1]).logits)
        with model.routed(ASSIGNMENT):
            routed = model(IDS).logits
    errors = [(found.float() - expected).square().mean().sqrt() for found in (routed, in_place)]
    assert errors[0] < 1.3 * errors[1]


@pytest.mark.parametrize("kind", ["rows", "low_rank"])
def test_bert(kind):
    config = transformers.BertConfig(
        vocab_size=160,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=16,
    )
    model = attached(transformers.BertForSequenceClassification(config), kind)
    assert_routed(model, IDS, call=logits)


def test_gpt2_has_transposed_weights():
    config = transformers.GPT2Config(vocab_size=160, n_positions=16, n_embd=32, n_layer=2, n_head=4)
    for kind in ("rows", "low_rank", "mask"):
        assert_routed(attached(transformers.GPT2LMHeadModel(config), kind), IDS, call=logits)


def test_vit_has_tensors_of_its_own_and_convolutions():
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64, image_size=16, patch_size=4
    )
    model = attached(transformers.ViTForImageClassification(config))
    images = torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    assert_routed(model, images, call=logits)


class Net(nn.Module):
    """Convolutions, norms over channels, and attention that takes its projection's weights past the module."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.second, self.group = nn.Conv2d(8, 8, 3, bias=False), nn.GroupNorm(2, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.scale = nn.Parameter(torch.ones(8))
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = self.group(self.second(torch.relu(self.norm(self.first(x)))))
        x = x.flatten(2).transpose(1, 2)
        return self.head((self.attention(x, x, x, need_weights=False)[0] * self.scale).mean(1))


@pytest.mark.parametrize("kind", ["rows", "difference"])
def test_convolutions_norms_and_attention(kind):
    model = Net()
    model.norm.running_var.fill_(0.5)
    images = torch.randn(6, 3, 9, 9, generator=torch.Generator().manual_seed(1))
    assert_routed(attached(model, kind), images)


def test_each_module_gets_the_fastest_route_that_is_right():
    model = tiny_llama_model()
    layer = model.model.layers[0]
    found = {
        module: type(route_for(None, module, "", {("weight",): "x"}))
        for module in (
            layer.mlp.up_proj,
            model.model.embed_tokens,
            layer.input_layernorm,
            nn.LayerNorm(3),
            nn.RMSNorm(3),
        )
    }
    assert list(found.values()) == [LinearRoute, EmbeddingRoute, RmsNormRoute, NormRoute, ReplayRoute]
    assert type(route_for(None, nn.Embedding(3, 2, max_norm=1.0), "", {("weight",): "x"})) is ReplayRoute
    layer.mlp.up_proj.forward = lambda x: x
    assert type(route_for(None, layer.mlp.up_proj, "", {("weight",): "x"})) is ReplayRoute


def mixed_in_place(model, weights, batch):
    """The answer for one row with a weighted sum of experts in its weights."""
    twin = copy.deepcopy(model)
    twin.detach_experts()
    experts = model.use_expert.__self__.found.experts
    with torch.no_grad():
        for expert, weight in zip(experts.values(), weights, strict=True):
            for tensor, part in expert.tensors.items():
                target = twin.get_parameter(tensor)
                zero = np.zeros(tuple(part.shape), np.float32)
                part.apply(zero, expert.scale(tensor), out=zero)
                target += float(weight) * to_torch(zero)
        return twin(batch).logits


def test_weights_of_several_experts():
    model = attached(tiny_llama_model())
    weights = np.array([[0.5, 0.5, 0], [0, 0, 1], [0.2, 0.3, 0.4], [0, 0, 0], [-1, 0, 0], [0.5, 0.5, 0]], np.float32)
    with torch.no_grad():
        expected = torch.cat([mixed_in_place(model, w, IDS[i : i + 1]) for i, w in enumerate(weights)])
        by_name = [{n: float(v) for n, v in zip("abc", row, strict=True) if v} or None for row in weights]
        for given in (weights, torch.from_numpy(weights).double(), weights.tolist(), by_name):
            with model.routed(given):
                torch.testing.assert_close(model(IDS).logits, expected, **F32)


def test_names_indices_and_arrays_of_names_may_be_mixed():
    model = attached(nn.Sequential(nn.Linear(3, 2)))
    x = torch.ones(4, 3)
    with torch.no_grad():
        with model.routed(["a", None, "c", "b"]):
            expected = model(x)
        for given in (["a", -1, np.int64(2), 1], ("a", None, 2, "b"), np.array(["a", None, "c", "b"], object)):
            with model.routed(given):
                torch.testing.assert_close(model(x), expected, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore")  # torch.compile's, of what it does not compile
def test_compiled_models_are_switched_but_not_routed():
    model = attached(nn.Sequential(nn.Linear(3, 2)))
    compiled, x = torch.compile(model, backend="eager"), torch.ones(2, 3)
    with torch.no_grad():
        for name in (None, "a", None):
            model.use_expert(name)
            torch.testing.assert_close(compiled(x), model(x))
        with (
            model.routed("a"),
            pytest.raises(InputError, match=r"called through torch\.compile: routing works by hooks"),
        ):
            compiled(x)
    model[0].compile(backend="eager")
    with pytest.raises(InputError, match="0 is compiled"), model.routed("a"):
        pass


def test_tokens_with_experts_of_their_own():
    """Of a model without attention, each token is on its own."""
    model = attached(nn.Sequential(nn.Embedding(160, 8), nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 4)))
    names = [[("a", "b", None, "c")[(row + token) % 4] for token in range(7)] for row in range(6)]
    with torch.no_grad():
        expected = torch.empty(6, 7, 4)
        for name in (None, *"abc"):
            model.use_expert(name)
            answer = model(IDS)
            for row in range(6):
                for token in range(7):
                    if names[row][token] == name:
                        expected[row, token] = answer[row, token]
        model.use_expert(None)
        index = [[-1 if name is None else "abc".index(name) for name in row] for row in names]
        for given in (names, index, np.array(index), torch.tensor(index)):
            with model.routed(given):
                torch.testing.assert_close(model(IDS), expected, **F32)
                flat = model[1](model[0](IDS).reshape(-1, 8))
                torch.testing.assert_close(flat.view(6, 7, 8), model[1](model[0](IDS)))
        with model.routed(names), pytest.raises(InputError, match="6 rows of 7 tokens"):
            model(IDS[:, :3])


class Passing(nn.Module):
    """Takes weights of its children past them, each in another way."""

    def __init__(self):
        super().__init__()
        self.embed, self.layer, self.other = nn.Embedding(160, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.scales = nn.ParameterList([nn.Parameter(torch.ones(8))])
        self.fast = True

    def forward(self, x):
        x = self.layer(self.embed(x)) * self.scales[0]
        x = nn.functional.linear(x, self.other.weight, self.other.bias) if self.fast else self.other(x)
        return x @ self.embed.weight.T.to(self.layer.weight.dtype)


@pytest.mark.parametrize("fast", [True, False])
def test_weights_taken_past_their_modules(fast):
    model = attached(Passing())
    model.fast = fast
    assert_routed(model, IDS)
    assert taken_directly(model) == {("embed",): True, ("other",): False, ("scales",): True}
    assert taken_directly(nn.MultiheadAttention(8, 2)) == {("out_proj",): True}


@pytest.mark.filterwarnings("ignore")  # torch's, of weight_norm and nested tensors
def test_modules_that_cannot_be_run_again_say_why():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    padding = torch.tensor([[False] * 4 + [True] * 3, [False] * 7])
    for model, message, options in (
        (nn.Sequential(nn.utils.weight_norm(nn.Linear(8, 4))), "a hook makes its weights before each call", {}),
        (nn.Sequential(nn.LSTM(8, 4, batch_first=True)), "0: the states of a LSTM have rows second", {}),
        (nn.TransformerEncoder(layer, 1), "enable_nested_tensor=False", {"src_key_padding_mask": padding}),
    ):
        attached(model)
        with torch.no_grad(), pytest.raises(InputError, match=message), model.routed(["a", "b"]):
            model(torch.ones(2, 7, 8), **options)


def test_a_convolution_mixes_tokens():
    model = attached(nn.Sequential(nn.Conv1d(3, 4, 3)))
    x = torch.randn(2, 3, 5)
    with model.routed([["a", "a", "a"], [None] * 3]):
        model(x)
    with model.routed([["a", "b", "a"], [None] * 3]), pytest.raises(InputError, match="mixes tokens"):
        model(x)


def test_generation_with_an_expert_for_each_prompt():
    model = attached(tiny_llama_model())
    prompts, options = IDS[:3, :4], {"max_new_tokens": 6, "do_sample": False}
    expected = one_by_one(model, ["a", None, "b"], lambda row: model.generate(prompts[row : row + 1], **options))
    with model.routed(["a", None, "b"]):
        found = model.generate(prompts, **options)
    assert torch.equal(found, expected)
    with model.routed(["a", None, "b"], copies=2):
        beams = model.generate(prompts, num_beams=2, **options)
    alone = one_by_one(
        model, ["a", None, "b"], lambda row: model.generate(prompts[row : row + 1], num_beams=2, **options)
    )
    assert torch.equal(beams, alone)


def test_a_router_is_asked_once_for_a_generation_and_may_run_the_model():
    model, asked = attached(tiny_llama_model()), []

    def router(batch):
        asked.append(sorted(batch))
        features = model(batch["input_ids"]).logits  # of the backbone
        torch.testing.assert_close(features, backbone, rtol=0, atol=0)
        return ["a", None, "b"]

    prompts = IDS[:3, :4]
    with torch.no_grad():
        backbone = model(prompts).logits
        with model.routed(["a", None, "b"]):
            expected, steps = model(prompts).logits, model.generate(prompts, max_new_tokens=4, do_sample=False)
        with model.routed(router):
            torch.testing.assert_close(model(prompts).logits, expected, rtol=0, atol=0)
            torch.testing.assert_close(model(input_ids=prompts).logits, expected, rtol=0, atol=0)
            assert len(asked) == 2
            assert torch.equal(model.generate(prompts, max_new_tokens=4, do_sample=False), steps)
            assert len(asked) == 3
        assert "input_ids" in asked[0]
        with model.routed(lambda batch: ["a"] * 2), pytest.raises(InputError, match="for 2 rows, the batch has 3"):
            model(prompts)
        with model.routed(lambda batch: np.full((3, 3), np.nan)), pytest.raises(InputError, match="NaN or Inf"):
            model(prompts)
    model.use_expert("a")


def test_one_name_holds_for_any_batch():
    model = attached(tiny_llama_model())
    with torch.no_grad():
        model.use_expert("a")
        expected = model(IDS).logits
        model.use_expert(None)
        with model.routed("a"):
            torch.testing.assert_close(model(IDS).logits, expected, **F32)
            torch.testing.assert_close(model(IDS[:4]).logits, expected[:4], **F32)
        backbone = model(IDS).logits
        with model.routed(None):
            torch.testing.assert_close(model(IDS).logits, backbone, rtol=0, atol=0)


def test_threads_route_on_their_own():
    model, found = attached(tiny_llama_model()), {}
    with torch.no_grad():
        expected = {}
        for name in (None, *"abc"):
            with model.routed([name] * 6):
                expected[name] = model(IDS).logits

    def work(name):
        with torch.no_grad(), model.routed([name] * 6):
            found[name] = [model(IDS).logits for _ in range(4)]

    threads = [threading.Thread(target=work, args=(name,)) for name in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name, answers in found.items():
        for answer in answers:
            torch.testing.assert_close(answer, expected[name], rtol=0, atol=0)


def test_a_copy_made_meanwhile_is_not_routed():
    model = attached(tiny_llama_model())
    with torch.no_grad():
        backbone = model(IDS).logits
        with model.routed(ASSIGNMENT):
            expected, twin = model(IDS).logits, copy.deepcopy(model)
            torch.testing.assert_close(twin(IDS).logits, backbone, rtol=0, atol=0)
        with twin.routed(ASSIGNMENT):
            torch.testing.assert_close(twin(IDS).logits, expected, rtol=0, atol=0)
            torch.testing.assert_close(model(IDS).logits, backbone, rtol=0, atol=0)


def test_a_routed_forward_has_no_gradient():
    model = attached(nn.Sequential(nn.Linear(3, 2)))
    with model.routed("a"):
        loss = model(torch.ones(2, 3)).sum()
    with pytest.raises(RuntimeError, match="has no gradient"):
        loss.backward()


def test_switching_and_routing_exclude_each_other():
    model = attached(nn.Sequential(nn.Linear(3, 2)))
    with model.routed("a"), pytest.raises(InputError, match=r"inside `with model\.routed"):
        model.use_expert("b")
    model.use_expert("b")
    with pytest.raises(InputError, match="expert 'b' is in place"), model.routed("a"):
        pass


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["a", "bb", None], r"no expert 'bb': there are a, b, c; did you mean 'b'\?"),
        ([0, 3], "no expert 3"),
        (np.array([0, -2]), "no expert -2"),
        (["a", 3], "no expert 3"),
        (["a", True], "no expert True"),
        ([{"a": float("nan")}], "NaN or Inf"),
        ([{"a": "much"}], "the weight of 'a' is 'much', not a number"),
        ([{"d": 1}], "no expert 'd'"),
        (np.array([[0, 0, np.inf]]), "NaN or Inf in the weights of row 0"),
        (np.zeros((2, 4)), r"\[rows, 3\]"),
        (np.zeros(3, bool), r"\[rows, 3\]"),
        (["a", ["a", "b"]], "differ in length"),
        ([[0, 1], [0]], "differ in length"),
        ([], "an assignment is a list"),
        (object(), "an assignment is a list"),
    ],
)
def test_assignments_that_make_no_sense(given, message):
    model = attached(nn.Sequential(nn.Linear(3, 2)))
    with pytest.raises(InputError, match=message), model.routed(given):
        pass
    model.use_expert("a")


def test_batches_of_another_size_are_refused_before_anything_runs():
    model = attached(tiny_llama_model())
    ran = []
    model.model.register_forward_pre_hook(lambda *_: ran.append(1))
    with model.routed(["a", "b"]), pytest.raises(InputError, match="for 2 rows, the batch has 6; where a prompt has"):
        model(IDS)
    with (
        model.routed(["a", "b"], copies=2),
        pytest.raises(InputError, match="2 rows with 2 copies each, the batch has"),
    ):
        model(input_ids=IDS)
    with pytest.raises(InputError, match="copies 0"), model.routed("a", copies=0):
        pass
    assert not ran


def test_one_row_is_not_all_rows():
    model = attached(nn.Sequential(nn.Linear(3, 2)))
    with torch.no_grad():
        for one in (["a"], [0], np.array([[1, 0, 0]], np.float32), lambda batch: ["a"]):
            with model.routed(one):
                found = model(torch.ones(1, 3))
                with pytest.raises(InputError, match="for 1 rows, the batch has 4"):
                    model(torch.ones(4, 3))
            with model.routed(one, copies=4):
                torch.testing.assert_close(model(torch.ones(4, 3)), found.expand(4, 2))
        for every in ("a", {"a": 1}, lambda batch: "a"):
            with model.routed(every):
                torch.testing.assert_close(model(torch.ones(4, 3)), found.expand(4, 2))


def test_what_cannot_be_told_apart_by_rows_is_refused():
    model = attached(nn.Sequential(nn.LSTM(4, 4)))
    with pytest.raises(InputError, match="a LSTM with batch_first=False"), model.routed("a"):
        pass

    class Bias(nn.Module):
        def __init__(self):
            super().__init__()
            self.relative_attention_bias = nn.Embedding(4, 4)

        def forward(self, x):
            return x + self.relative_attention_bias(torch.arange(4)[None] - torch.arange(4)[:, None].clamp(0))

    model = attached(Bias())
    with pytest.raises(InputError, match="one answer for the whole batch"), model.routed(["a", "b"]):
        pass


def test_two_names_of_one_tensor_are_changed_once_where_they_are_changed_alike():
    model = attached(tiny_llama_model(tie_word_embeddings=True))
    with torch.no_grad(), model.routed(ASSIGNMENT):
        expected = model(IDS).logits
    experts = [copy.copy(e) for e in model.use_expert.__self__.found.experts.values()]
    model.detach_experts()
    for expert in experts:
        if part := expert.tensors.get("model.embed_tokens.weight"):
            expert.tensors = {**expert.tensors, "lm_head.weight": part}
            expert._scales = {**expert._scales, "lm_head.weight": 0.5}
    freemerge.attach(model, dict(zip("abc", experts, strict=True)))
    with torch.no_grad(), model.routed(ASSIGNMENT):
        torch.testing.assert_close(model(IDS).logits, expected, rtol=0, atol=0)
    model.detach_experts()
    experts[1]._scales = {**experts[1]._scales, "lm_head.weight": 0.75}
    with pytest.raises(CheckpointError, match=r"b: .* are one tensor of the model, but changed differently"):
        freemerge.attach(model, dict(zip("abc", experts, strict=True)))


def test_from_a_merged_model(tmp_path):
    model = freemerge.load(merged_llama(tmp_path, dtype=BFLOAT16), dtype="float32")
    assert_routed(model, IDS[:4], assignment=["math", None, "code", "law"], call=logits)
    assert model.experts == tuple(sorted(EXPERTS))


@pytest.mark.parametrize("kind", ["rows", "replace"])
def test_what_follows_from_the_weights_lasts_through_a_switch_and_no_longer(monkeypatch, kind):
    """Biases with each expert and entries that replace are worked out once, and anew where somebody trains."""
    from freemerge.attached import derived

    worked_out = []
    for name in ("changed", "additive"):
        work_out = getattr(derived, name)
        monkeypatch.setattr(derived, name, lambda *a, work_out=work_out: worked_out.append(1) or work_out(*a))
    model = attached(nn.Sequential(nn.Linear(12, 16), nn.LayerNorm(16)), kind)
    x = torch.randn(6, 3, 12)
    assert_routed(model, x)
    assert worked_out
    worked_out.clear()
    assert_routed(model, x)
    with torch.no_grad():
        for name in model.experts:  # one for another
            model.use_expert(name)
        model.use_expert(None)
    assert_routed(model, x)
    assert not worked_out
    with torch.no_grad():
        model[0].bias += 1
        model[1].weight *= 2
    assert_routed(model, x)
    assert worked_out
    model.use_expert("a")
    with torch.no_grad():  # what an expert's entries replace is restored, the rest stays written
        model[0].weight += 1
        model[1].bias -= 1
    model.use_expert(None)
    worked_out.clear()
    assert_routed(model, x)
    assert worked_out

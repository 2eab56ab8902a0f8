"""Tiny models of real architectures, merged from their own checkpoints: experts in place, and a batch of several."""

import copy

import numpy as np
import pytest
import torch
from parts_of_kinds import experts_for

import freemerge
from freemerge.errors import InputError
from freemerge.experts.apply import apply_expert

transformers = pytest.importorskip("transformers")
if int(transformers.__version__.split(".")[0]) < 5:
    pytest.skip("the modules of transformers 5", allow_module_level=True)

EXPERTS = ("math", "code")
ASSIGNMENT = ["math", None, "code", "math"]
# two orders of summation in float32, over layers with activations of size 1 to 10
F32 = {"rtol": 2e-4, "atol": 2e-4}
LAYERS = {"vocab_size": 160, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1}
LAYERS |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
BERT = {"vocab_size": 160, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}


def ids(seed, tokens):
    return torch.from_numpy(np.random.default_rng(seed).integers(3, 160, (4, tokens)))


def floats(*shape):
    return torch.from_numpy(np.random.default_rng(1).normal(size=(4, *shape)).astype(np.float32))


def t5():
    config = transformers.T5Config(vocab_size=160, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, **TOKENS)
    return transformers.T5ForConditionalGeneration(config), {"input_ids": ids(0, 7), "decoder_input_ids": ids(1, 5)}


def bart():
    config = transformers.BartConfig(max_position_embeddings=32, **LAYERS, **TOKENS)
    return transformers.BartForConditionalGeneration(config), {"input_ids": ids(0, 7), "decoder_input_ids": ids(1, 5)}


def whisper():  # 20 positions, one table for all four rows
    config = transformers.WhisperConfig(
        num_mel_bins=8, max_source_positions=20, max_target_positions=16, **LAYERS, **TOKENS
    )
    batch = {"input_features": floats(8, 40), "decoder_input_ids": ids(1, 5)}
    return transformers.WhisperForConditionalGeneration(config), batch


def mpnet():
    return transformers.MPNetModel(transformers.MPNetConfig(**BERT)), {"input_ids": ids(0, 7)}


def vit():  # its modules have other names than its checkpoints
    layers = {name: number for name, number in BERT.items() if name != "vocab_size"}
    config = transformers.ViTConfig(image_size=16, patch_size=4, **layers)
    return transformers.ViTForImageClassification(config), {"pixel_values": floats(3, 16, 16)}


def gpt_neox():  # fused projections, in its checkpoints too
    config = transformers.GPTNeoXConfig(max_position_embeddings=32, **BERT)
    return transformers.GPTNeoXForCausalLM(config), {"input_ids": ids(0, 7)}


def randomised(model, seed, scale):
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in model.parameters():
            tensor += scale * torch.randn(tensor.shape, generator=random)
    return model.eval()


def merged(model, folder):
    """The folder of the model with experts that touch all of its parameters."""
    randomised(model, 0, 0.1).save_pretrained(folder / "base")
    for seed, name in enumerate(EXPERTS, 1):
        randomised(copy.deepcopy(model), seed, 0.15).save_pretrained(folder / name)
    sources = {name: folder / name for name in EXPERTS}
    freemerge.merge("free", base=folder / "base", experts=sources, out=folder / "merged", density=0.1, fsync=False)
    return folder / "merged"


def answer(model, batch):
    output = model(**batch)
    return output.logits if hasattr(output, "logits") else output.last_hidden_state


@pytest.mark.parametrize("make", [t5, bart, whisper, mpnet, vit, gpt_neox], ids=lambda make: make.__name__)
def test_experts_of_a_merged_checkpoint(make, tmp_path):
    model, batch = make()
    folder = merged(model, tmp_path)
    model = freemerge.load(folder)
    with torch.no_grad():
        found = {None: answer(model, batch)}
        for name in EXPERTS:
            apply_expert(folder, name, tmp_path / f"plain-{name}", fsync=False)
            plain = type(model).from_pretrained(tmp_path / f"plain-{name}").eval()
            model.use_expert(name)
            found[name] = answer(model, batch)
            torch.testing.assert_close(found[name], answer(plain, batch), rtol=0, atol=0)
        model.use_expert(None)
        expected = torch.stack([found[name][row] for row, name in enumerate(ASSIGNMENT)])
        with model.routed(ASSIGNMENT):
            routed = answer(model, batch)
            twin = copy.deepcopy(model)
        torch.testing.assert_close(routed, expected, **F32)
        assert not torch.allclose(routed, found[None], **F32)
        for unrouted in (model, twin):
            torch.testing.assert_close(answer(unrouted, batch), found[None], rtol=0, atol=0)


def test_tensors_that_transformers_fuses_are_refused(tmp_path):
    config = transformers.MixtralConfig(num_key_value_heads=2, num_local_experts=2, **BERT)
    folder = merged(transformers.MixtralForCausalLM(config), tmp_path)
    where = (
        r"experts.1.w3.weight: in .*, but the model has it fused or turned, in model.layers.0.mlp.experts.gate_up_proj"
    )
    with pytest.raises(InputError, match=where):
        freemerge.load(folder)


@pytest.fixture(scope="module")
def writer():
    model, batch = t5()
    model = freemerge.attach(randomised(model, 0, 0.3), experts_for(model, "rows"))
    model.generation_config.eos_token_id = model.config.eos_token_id = None
    return model, {"input_ids": batch["input_ids"], "max_new_tokens": 5, "do_sample": False}


@pytest.mark.parametrize("beams", [1, 3])
def test_an_encoder_is_routed_before_there_are_copies(writer, beams):
    model, given = writer
    given = given | {"num_beams": beams}
    expected = {}
    for name in (None, "a", "b"):
        model.use_expert(name)
        expected[name] = model.generate(**given)
    model.use_expert(None)
    names = ["a", None, "b", "a"]
    wanted = torch.stack([expected[name][row] for row, name in enumerate(names)])
    assert not torch.equal(wanted, expected[None])
    asked = []
    for assignment in (names, lambda batch: asked.append(sorted(batch)) or names):
        with model.routed(assignment, copies=beams):
            assert torch.equal(model.generate(**given), wanted)
    assert len(asked) == 1
    assert "input_ids" in asked[0]


def test_a_router_may_have_seen_the_copies():
    config = transformers.LlamaConfig(num_key_value_heads=2, **BERT)
    model = transformers.LlamaForCausalLM(config)
    model = freemerge.attach(randomised(model, 0, 0.3), experts_for(model, "rows"))
    names, given = ["a", None, "b", "a"], {"input_ids": ids(0, 5), "max_new_tokens": 4, "num_beams": 2}
    with model.routed(names, copies=2):
        expected = model.generate(**given)
    with model.routed(lambda batch: [name for name in names for _ in "12"], copies=2):
        assert torch.equal(model.generate(**given), expected)


class Odd(torch.nn.Module):
    """Hands its layers what has no rows where routing looks for them."""

    def __init__(self, how):
        super().__init__()
        self.how, self.table = how, torch.nn.Embedding(8, 3)
        self.embed, self.layer, self.conv = torch.nn.Embedding(8, 3), torch.nn.Linear(3, 3), torch.nn.Conv1d(4, 4, 1)

    def forward(self, x):
        if self.how == "turned":
            return self.layer(x.transpose(0, 1)).transpose(0, 1)
        if self.how == "turned convolution":
            return self.conv(x.permute(1, 2, 0).transpose(1, 2)).transpose(0, 1)
        if self.how == "looked up":
            return x + self.embed(torch.ones(8, 6, dtype=torch.long)).sum()
        table = self.table.weight
        return x + self.layer(table if self.how == "table" else table[2:6]).sum()


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("turned", r"layer \(Linear\) was given \[8, 4, 3\], whose rows seem to be in the second dimension"),
        ("turned convolution", r"conv \(Conv1d\) was given \[8, 4, 3\], whose rows seem to be in the second dimension"),
        ("looked up", r"embed \(Embedding\) looks up \[8, 6\], neither the 4 rows of the batch nor positions"),
        ("table", r"layer \(Linear\) was given a parameter of the model, \[8, 3\]"),
        ("slice of a table", r"layer \(Linear\) was given a parameter of the model, \[4, 3\]"),
    ],
)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_rows_that_are_elsewhere_are_refused(how, message, mode):
    model = Odd(how)
    freemerge.attach(model, experts_for(model, "rows"))
    with mode(), model.routed(["a", "b", "c", "a"]), pytest.raises(InputError, match=message):
        model(torch.ones(4, 8, 3))


def test_positions_and_tokens_in_one_dimension():
    """Positions are the same for all rows; tokens of the batch are not, even where they count up."""

    class Flat(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.position = torch.nn.Embedding(9, 3), torch.nn.Embedding(8, 3)

        def forward(self, x):
            return self.embed(x[:, 0]) + self.position(torch.arange(8)).sum(-2)

    model = Flat()
    freemerge.attach(model, experts_for(model, "rows"))
    x, names = torch.tensor([[1, 0], [2, 0], [3, 0], [4, 0]]), ["a", "b", None, "a"]
    with torch.no_grad():
        expected = []
        for row, name in enumerate(names):
            model.use_expert(name)
            expected.append(model(x[row : row + 1]))
        model.use_expert(None)
        with model.routed(names):
            torch.testing.assert_close(model(x), torch.cat(expected), **F32)


def test_a_module_with_a_cache_and_tensors_of_its_own_is_refused():
    config = transformers.MambaConfig(vocab_size=160, hidden_size=32, num_hidden_layers=1, state_size=4)
    model = transformers.MambaForCausalLM(config)
    freemerge.attach(randomised(model, 0, 0.1), experts_for(model, "rows"))
    x, names = ids(0, 6), ["a", "b", None, "a"]
    with torch.no_grad():
        with model.routed(names), pytest.raises(InputError, match=r"mixer .* keeps a cache.*use_cache=False"):
            model(x)
        expected = []
        for row, name in enumerate(names):
            model.use_expert(name)
            expected.append(model(x[row : row + 1], use_cache=False).logits)
        model.use_expert(None)
        with model.routed(names):
            torch.testing.assert_close(model(x, use_cache=False).logits, torch.cat(expected), **F32)

"""LoRA adapters as experts of a running model, in place and routed: the outputs of PEFT's model with each active."""

import json
import re
import shutil

import numpy as np
import pytest
from merged_models import merged_llama

import freemerge
from freemerge.errors import CheckpointError, InputError
from freemerge.parts import Difference, LowRank

peft, torch, transformers = (pytest.importorskip(name) for name in ("peft", "torch", "transformers"))
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),  # PEFT 0.21, transformers 5.23
    pytest.mark.filterwarnings("ignore::UserWarning"),  # of PEFT, about tied and transposed weights
]

SIDES = {"vocab_size": 64, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2}
TOKENS = torch.arange(50).reshape(5, 10)
NAMES = ("math", "code", "law")
ASSIGNMENT = ["math", None, "code", "law", "math"]
# float32 products in another order, over two layers with activations near 1
F32 = {"rtol": 0, "atol": 2e-5}

# of each adapter; for each kind of model, one of them differs in rank, targets and more from the others
ADAPTERS = {
    "llama": (
        {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
        {"r": 6, "use_rslora": True, "target_modules": ["up_proj", "lm_head", "embed_tokens"]},
        {
            "r": 4,
            "target_modules": ["q_proj", "down_proj"],
            "rank_pattern": {"layers.1.self_attn.q_proj": 6},
            "alpha_pattern": {"q_proj": 3},
            "modules_to_save": ["norm"],
        },
    ),
    "bert": (
        {"r": 4, "target_modules": ["query", "value"], "task_type": "SEQ_CLS", "lora_bias": True},
        {"r": 2, "target_modules": ["query", "dense"], "bias": "all"},
        {"r": 4, "target_modules": ["key", "word_embeddings"], "modules_to_save": ["classifier"]},
    ),
    "gpt2": (
        {"r": 4, "target_modules": ["c_attn"], "fan_in_fan_out": True},
        {"r": 3, "target_modules": ["c_fc"], "fan_in_fan_out": True, "modules_to_save": ["ln_f"]},
        {"r": 2, "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True},
    ),
}


def new_model(kind):
    torch.manual_seed(0)
    if kind == "bert":
        return transformers.BertForSequenceClassification(transformers.BertConfig(**SIDES, num_labels=3)).eval()
    if kind == "gpt2":
        config = transformers.GPT2Config(vocab_size=64, n_embd=24, n_layer=2, n_head=2, n_positions=16)
        return transformers.GPT2LMHeadModel(config).eval()
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIDES)).eval()


def logits(model):
    with torch.no_grad():
        return model.eval()(TOKENS).logits


def train(model, folder, seed, **options):
    """An adapter on a copy of `model` as PEFT saves it, and the copy's answer."""
    tuned = peft.get_peft_model(model, peft.LoraConfig(**options))
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    tuned.save_pretrained(folder)
    return logits(tuned)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """kind -> the folders of its adapters, by name, and PEFT's answers with each of them active."""
    made = {}

    def make(kind):
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind)
            answers = {
                name: train(new_model(kind), folder / name, seed, **options)
                for seed, (name, options) in enumerate(zip(NAMES, ADAPTERS[kind], strict=True))
            }
            made[kind] = {name: folder / name for name in NAMES}, answers
        return made[kind]

    return make


@pytest.mark.parametrize("kind", ADAPTERS)
def test_each_adapter_in_place_answers_as_in_peft(trained, kind):
    folders, answers = trained(kind)
    model = freemerge.attach(new_model(kind), folders)
    backbone = logits(model)
    for name in NAMES:
        model.use_expert(name)
        torch.testing.assert_close(logits(model), answers[name], **F32)
        assert (answers[name] - backbone).abs().max() > 1e-2
    model.use_expert(None)
    torch.testing.assert_close(logits(model), backbone, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ADAPTERS)
def test_a_mixed_batch_answers_as_peft_row_by_row(trained, kind):
    folders, answers = trained(kind)
    model = freemerge.attach(new_model(kind), folders)
    answers = {None: logits(model), **answers}
    expected = torch.stack([answers[name][row] for row, name in enumerate(ASSIGNMENT)])
    with model.routed(ASSIGNMENT):
        torch.testing.assert_close(logits(model), expected, **F32)


def test_generation_with_an_adapter_for_each_prompt(trained):
    folders, _ = trained("llama")
    model, options = freemerge.attach(new_model("llama"), folders), {"max_new_tokens": 5, "do_sample": False}
    expected = []
    for row, name in enumerate(ASSIGNMENT):
        own = new_model("llama")
        own = own if name is None else peft.PeftModel.from_pretrained(own, folders[name])
        expected.append(own.generate(input_ids=TOKENS[row : row + 1, :4], **options))
    with model.routed(ASSIGNMENT):
        found = model.generate(TOKENS[:, :4], **options)
    assert torch.equal(found, torch.cat(expected))


def test_what_becomes_of_an_adapter(trained):
    folders, _ = trained("llama")
    found = freemerge.attach(new_model("llama"), folders).use_expert.__self__.found.experts
    assert {type(part) for part in found["code"].tensors.values()} == {LowRank}  # of an embedding that is saved too
    assert "model.embed_tokens.weight" in found["code"].tensors
    assert found["code"].scale("lm_head.weight") == pytest.approx(8 / np.sqrt(6))
    law = found["law"]
    assert isinstance(law.tensors["model.norm.weight"], Difference)
    assert law.tensors["model.layers.1.self_attn.q_proj.weight"].left.shape == (24, 6)
    assert law.scale("model.layers.1.self_attn.q_proj.weight") == 3 / 6
    # their own names, a fingerprint of no backbone
    assert "backbone" not in law.metadata


def test_bfloat16_rounds_once(trained):
    folders, answers = trained("llama")
    model = freemerge.attach(new_model("llama").to(torch.bfloat16), folders)
    adapted = peft.PeftModel.from_pretrained(new_model("llama").to(torch.bfloat16), folders["math"])
    with model.routed("math"):
        errors = [(found.float() - answers["math"]).square().mean() for found in (logits(model), logits(adapted))]
    assert errors[0] < 1.2 * errors[1]


def test_one_folder_or_a_list_of_them(trained):
    folders, answers = trained("llama")
    model = freemerge.attach(new_model("llama"), str(folders["math"]))
    assert model.experts == ("math",)
    model.detach_experts()
    freemerge.attach(model, [folders["code"], folders["math"] / "adapter_model.safetensors"])
    assert model.experts == ("code", "math")
    model.use_expert("math")
    torch.testing.assert_close(logits(model), answers["math"], **F32)


@pytest.fixture
def merged(tmp_path):
    return merged_llama(tmp_path, dtype=np.float32, experts=("math", "code"))


def plain(merged):
    return transformers.LlamaForCausalLM.from_pretrained(merged).eval()


def test_adapters_beside_sparse_experts_of_a_merged_model(merged, tmp_path):
    expected = train(plain(merged), tmp_path / "lora", 1, r=4, target_modules=["q_proj", "down_proj"])
    model = freemerge.load(merged, experts=[merged, tmp_path / "lora"])
    assert model.experts == ("code", "math", "lora")
    rows = {None: logits(model)}
    for name in model.experts:
        model.use_expert(name)
        rows[name] = logits(model)
    model.use_expert(None)
    # merged weights of this model are larger than those above
    torch.testing.assert_close(rows["lora"], expected, rtol=1e-4, atol=1e-4)
    names = ["lora", "math", None, "code", "lora"]
    with model.routed(names):
        found = logits(model)
    torch.testing.assert_close(found, torch.stack([rows[n][i] for i, n in enumerate(names)]), rtol=1e-4, atol=1e-4)
    with model.routed([{"lora": 0.5, "math": 0.5}] * 5):
        assert not torch.allclose(logits(model), rows[None], atol=1e-2)
    one = freemerge.load(merged, experts={"sums": merged / "experts/math.safetensors", "adapter": tmp_path / "lora"})
    one.use_expert("sums")
    torch.testing.assert_close(logits(one), rows["math"], rtol=0, atol=0)


def test_the_model_may_have_another_prefix(trained, merged, tmp_path):
    """Names of the merged checkpoint go through a rule, those of adapters are the module's own."""

    class Outer(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, tokens):
            return self.inner(tokens)

    inner = plain(merged)
    expected = train(inner, tmp_path / "lora", 1, r=4, target_modules=["q_proj"])
    inner = plain(merged)
    model = freemerge.attach(Outer(inner), [merged, tmp_path / "lora"])
    model.use_expert("lora")
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)  # as above
    model.use_expert("math")
    assert model.expert == "math"


# -- what is refused ----------------------------------------------------------------------------------------------


def edited(folder, out, **config):
    shutil.copytree(folder, out)
    path = out / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return out


def test_adapters_of_another_model_are_refused_with_all_that_is_wrong(trained, tmp_path):
    llama, bert = trained("llama")[0], trained("bert")[0]
    model = new_model("llama")
    with pytest.raises(CheckpointError) as error:
        freemerge.attach(
            model, {"a": bert["math"], "b": edited(llama["math"], tmp_path / "b", r=7), "c": llama["code"]}
        )
    text = str(error.value)
    assert re.match(r"\d+ problems, nothing was changed", text)
    assert "layer.0.attention.self.query.lora_A.weight: the model has no" in text
    assert "q_proj.lora_A.weight: [4, 24], but the configuration gives it rank 7" in text
    assert not hasattr(model, "use_expert")


def test_another_width_is_refused(trained):
    config = transformers.LlamaConfig(**(SIDES | {"hidden_size": 32}))
    with pytest.raises(CheckpointError, match=r"self_attn.q_proj.weight is \[32, 32\] in the model"):
        freemerge.attach(transformers.LlamaForCausalLM(config), trained("llama")[0]["math"])


def test_dora_is_refused(tmp_path):
    train(new_model("llama"), tmp_path / "dora", 0, r=4, target_modules=["q_proj"], use_dora=True)
    with pytest.raises(CheckpointError, match="a DoRA adapter: it rescales whole weights"):
        freemerge.attach(new_model("llama"), tmp_path / "dora")


def test_a_tied_embedding_is_refused_as_peft_leaves_its_head(tmp_path):
    train(new_model("gpt2"), tmp_path / "wte", 0, r=4, target_modules=["wte"])
    model = new_model("gpt2")
    with pytest.raises(CheckpointError, match=r"transformer.wte.weight is the output head of the model too"):
        freemerge.attach(model, tmp_path / "wte")
    with pytest.raises(CheckpointError, match=r"inner.transformer.wte.weight: it is inner.lm_head.weight too"):
        freemerge.attach(torch.nn.ModuleDict({"inner": model}), tmp_path / "wte")


def test_an_adapter_is_no_model(trained):
    with pytest.raises(InputError, match=r"math is a LoRA adapter; load its model with it: freemerge\.load"):
        freemerge.load(trained("llama")[0]["math"])


def test_damaged_files_and_numbers_are_refused(trained, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = trained("llama")[0]["math"]
    shutil.copytree(folder, tmp_path / "nan")
    shutil.copytree(folder, tmp_path / "short")
    weights = tmp_path / "nan/adapter_model.safetensors"
    tensors = load_file(weights)
    next(iter(tensors.values()))[0, 0] = torch.nan
    save_file(tensors, weights)
    short = tmp_path / "short/adapter_model.safetensors"
    short.write_bytes(short.read_bytes()[:-5])
    with pytest.raises(CheckpointError) as error:
        freemerge.attach(new_model("llama"), [tmp_path / "nan", tmp_path / "short"])
    assert str(error.value).startswith("2 problems, nothing was changed")
    assert "nan: NaN or Inf in what it makes of model.layers.0.self_attn.q_proj.weight" in str(error.value)
    assert "short" in str(error.value)


def test_a_name_stands_for_one_expert(trained, merged, tmp_path):
    folders, _ = trained("llama")
    with pytest.raises(InputError, match=r"math: in .*math too; give them names"):
        freemerge.attach(new_model("llama"), [folders["math"], folders["code"], folders["math"]])
    with pytest.raises(InputError, match="holds 2 experts; give the file of one"):
        freemerge.attach(new_model("llama"), {"all": merged})


@pytest.mark.parametrize("nothing", [{}, [], (), iter(())], ids=lambda nothing: type(nothing).__name__)
def test_no_experts_at_all(nothing):
    model = new_model("llama")
    with pytest.raises(InputError, match="there are no experts; give a merged model, its folder experts, or adapters"):
        freemerge.attach(model, nothing)
    assert not hasattr(model, "use_expert")


def test_an_empty_folder_and_what_is_no_expert(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="empty holds no experts"):
        freemerge.attach(new_model("llama"), tmp_path / "empty")
    for given in (3, {"math": torch.zeros(2)}, [None]):
        with pytest.raises(InputError, match="a path or an expert in memory is needed, not a"):
            freemerge.attach(new_model("llama"), given)

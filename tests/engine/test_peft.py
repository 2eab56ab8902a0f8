"""Adapters that PEFT made, applied as tensors are read: the outputs of PEFT's own model; or a refusal that says why."""

import pytest

import freemerge
from freemerge.errors import CheckpointError, InputError
from freemerge.experts.lora import extract_adapter

peft, torch, transformers = (pytest.importorskip(name) for name in ("peft", "torch", "transformers"))
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),  # PEFT 0.21, transformers 5.23
    pytest.mark.filterwarnings("ignore::UserWarning"),  # of PEFT, about tied and transposed weights
]

SIDES = {"vocab_size": 64, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2}
GPT2 = {"vocab_size": 64, "n_embd": 24, "n_layer": 2, "n_head": 2, "n_positions": 16}
TOKENS = torch.arange(20).reshape(2, 10)


def new_model(kind):
    torch.manual_seed(0)
    if kind == "gpt2":
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2))
    if kind == "bert":
        return transformers.BertForSequenceClassification(transformers.BertConfig(**SIDES, num_labels=3))
    options = {"tied": {"tie_word_embeddings": True}, "biased": {"attention_bias": True, "mlp_bias": True}}.get(
        kind, {}
    )
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIDES, **options))


def load(kind, folder):
    return type(new_model(kind)).from_pretrained(folder).eval()


def logits(model):
    with torch.no_grad():
        return model.eval()(TOKENS).logits


def shaken(parameters, seed):
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters:
            parameter += 0.05 * torch.randn_like(parameter)


@pytest.fixture
def trained(tmp_path):
    """Writes a base and an adapter on it as PEFT saves them."""

    def write(kind, **options):
        new_model(kind).save_pretrained(tmp_path / "base")
        config = peft.LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], **options})
        model = peft.get_peft_model(load(kind, tmp_path / "base"), config)
        shaken([parameter for parameter in model.parameters() if parameter.requires_grad], 1)
        model.save_pretrained(tmp_path / "adapter")

    return write


def applied(tmp_path):
    freemerge.merge("passthrough", experts=[f"{tmp_path / 'base'}+{tmp_path / 'adapter'}"], out=tmp_path / "applied")
    return tmp_path / "applied"


CASES = {
    "plain": ("llama", {}),
    "rslora": ("llama", {"use_rslora": True}),
    "dora": ("llama", {"use_dora": True}),
    "patterns": ("llama", {"rank_pattern": {"layers.1.self_attn.q_proj": 6}, "alpha_pattern": {"q_proj": 3}}),
    "anchored pattern": ("llama", {"rank_pattern": {"^model.layers.0.self_attn.q_proj": 7}}),
    "modules_to_save": ("llama", {"modules_to_save": ["embed_tokens", "lm_head", "norm"]}),
    "embedding": ("llama", {"target_modules": ["embed_tokens", "lm_head"]}),
    "biases": ("biased", {"bias": "all"}),
    "biases of layers": ("biased", {"bias": "lora_only"}),
    "bias of B": ("biased", {"lora_bias": True, "use_rslora": True}),
    "stored transposed": ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True, "use_dora": True}),
    "classifier": ("bert", {"target_modules": ["query"], "task_type": "SEQ_CLS", "bias": "all"}),
    "tied, trained as one": ("tied", {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
}


@pytest.mark.parametrize("case", CASES)
def test_outputs_are_those_of_peft(tmp_path, trained, case):
    kind, options = CASES[case]
    trained(kind, **options)
    start = logits(load(kind, tmp_path / "base"))
    theirs = logits(peft.PeftModel.from_pretrained(load(kind, tmp_path / "base"), tmp_path / "adapter"))
    ours = logits(load(kind, applied(tmp_path)))
    # float32 products in another order
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert (theirs - start).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("kind", "options", "said"),
    [
        ("tied", {"target_modules": ["embed_tokens"]}, "embed_tokens.weight is the output head of .*/base too"),
        ("tied", {"modules_to_save": ["embed_tokens"]}, "embed_tokens.weight is the output head of .*/base too"),
        ("gpt2", {"target_modules": ["wte"]}, "wte.weight is the output head of .*/base too"),
        ("tied", {"target_modules": ["lm_head"]}, "it is tied to the embedding there"),
        ("llama", {"trainable_token_indices": [1, 2]}, "trainable tokens"),
        ("llama", {"init_lora_weights": "olora"}, "the base was changed too"),
    ],
    ids=["tied embedding", "tied embedding saved", "gpt2's", "tied head", "tokens", "olora"],
)
def test_what_cannot_be_applied_is_refused(tmp_path, trained, kind, options, said):
    trained(kind, **options)
    with pytest.raises(CheckpointError, match=said):
        applied(tmp_path)
    assert not (tmp_path / "applied").exists()


# -- adapters for PEFT --------------------------------------------------------------------------------------------


def tune(tmp_path, kind, words):
    """A fine-tune whose tensors with one of `words` in their names have moved, matrices by a rank of 3."""
    base = new_model(kind)
    base.save_pretrained(tmp_path / "base")
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in base.named_parameters():
            if any(word in name for word in words):
                low_rank = parameter.dim() == 2
                sides = [(parameter.shape[0], 3), (3, parameter.shape[1])] if low_rank else [parameter.shape]
                parameter += 0.03 * torch.linalg.multi_dot([torch.randn(s) for s in sides]) if low_rank else 0.03
    base.save_pretrained(tmp_path / "tuned")


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("llama", [""]),
        ("tied", ["layers", "norm"]),
        ("biased", ["self_attn", "mlp"]),
        ("gpt2", ["h.", "ln_f"]),
        ("bert", ["layer", "classifier", "LayerNorm"]),
    ],
)
def test_a_fine_tune_of_low_rank_comes_back_in_peft(tmp_path, kind, words):
    tune(tmp_path, kind, words)
    extract_adapter(tmp_path / "base", tmp_path / "tuned", tmp_path / "adapter", rank=6, fsync=False)
    wanted = logits(load(kind, tmp_path / "tuned"))
    theirs = logits(peft.PeftModel.from_pretrained(load(kind, tmp_path / "base"), tmp_path / "adapter"))
    torch.testing.assert_close(theirs, wanted, rtol=0, atol=1e-5)
    torch.testing.assert_close(logits(load(kind, applied(tmp_path))), wanted, rtol=0, atol=1e-5)
    assert (logits(load(kind, tmp_path / "base")) - wanted).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("kind", "words", "said"),
    [
        ("tied", [""], "embed_tokens.weight: changed, and it is the output head too"),
        ("bert", ["classifier"], "no matrix of a linear layer has changed"),
    ],
)
def test_what_peft_could_not_load_is_refused(tmp_path, kind, words, said):
    tune(tmp_path, kind, words)
    with pytest.raises(InputError, match=said):
        extract_adapter(tmp_path / "base", tmp_path / "tuned", tmp_path / "adapter", rank=6, fsync=False)
    assert not (tmp_path / "adapter").exists()

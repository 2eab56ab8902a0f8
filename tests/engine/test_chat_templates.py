"""Chat templates by name, as transformers renders them; "auto" takes the one most models have."""

import types

import pytest

from freemerge.chat_templates import TEMPLATES, chat_template

TALK = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "Hi "},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "Bye"},
]
RENDERED = {
    "chatml": "<|im_start|>system\nBe short.<|im_end|>\n<|im_start|>user\nHi <|im_end|>\n<|im_start|>assistant\nHello"
    "<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n",
    "llama3": "<s><|start_header_id|>system<|end_header_id|>\n\nBe short.<|eot_id|><|start_header_id|>user"
    "<|end_header_id|>\n\nHi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nHello<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    "mistral": "<s> [INST] Be short.\n\nHi  [/INST] Hello</s> [INST] Bye [/INST]",
    "alpaca": "Be short.\n\n### Instruction:\nHi\n\n### Response:\nHello\n\n### Instruction:\nBye\n\n### Response:\n",
    "exaone": "[|system|]Be short.[|endofturn|]\n[|user|]Hi \n[|assistant|]Hello[|endofturn|]\n[|user|]Bye\n"
    "[|assistant|]",
}


def render(template, messages):
    chat = pytest.importorskip("transformers.utils.chat_template_utils")
    return chat._compile_jinja_template(template).render(
        messages=messages, bos_token="<s>", eos_token="</s>", add_generation_prompt=True
    )


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_renders_its_format(name):
    assert render(TEMPLATES[name], TALK) == RENDERED[name]


def test_a_talk_without_a_system_message():
    assert render(TEMPLATES["exaone"], TALK[1:2]) == "[|system|][|endofturn|]\n[|user|]Hi \n[|assistant|]"
    assert render(TEMPLATES["mistral"], TALK[1:2]) == "<s> [INST] Hi  [/INST]"
    jinja2 = pytest.importorskip("jinja2")
    with pytest.raises(jinja2.TemplateError, match="take turns"):
        render(TEMPLATES["mistral"], [TALK[1], TALK[1]])


def test_auto_is_the_one_most_models_have_the_first_of_equals():
    def models(*templates):
        return [types.SimpleNamespace(chat_template=lambda text=text: text) for text in templates]

    assert chat_template("auto", models("a", "b ", None, "b")) == "b"
    assert chat_template("auto", models("a", "b")) == "a"
    assert chat_template("auto", models(None)) is None
    assert chat_template("chatml", []) == TEMPLATES["chatml"]
    assert chat_template("{{ x }}", []) == "{{ x }}"
    assert chat_template(None, models("a")) is None

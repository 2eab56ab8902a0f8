"""Chat templates by name: formats as their models publish them, written for freemerge."""

from collections import Counter
from collections.abc import Iterable

_TURNS = "{%- for message in messages %}"
_ALTERNATE = """{%- set system = messages[0].content if messages[0].role == "system" else none %}
{%- set turns = messages[1:] if system is not none else messages %}
{{- bos_token }}
{%- for turn in turns %}
    {%- if turn.role != ("user", "assistant")[loop.index0 % 2] %}
        {{- raise_exception("after a system message, if there is one, user and assistant take turns") }}
    {%- endif %}
"""

TEMPLATES = {
    "alpaca": _TURNS
    + """
    {%- set heading = {"user": "Instruction", "assistant": "Response", "user_context": "Input"}.get(message.role) %}
    {{- ("### " + heading + ":\\n" if heading else "") + message.content | trim + "\\n\\n" }}
{%- endfor %}
{%- if add_generation_prompt %}{{ "### Response:\\n" }}{% endif %}
""",
    "chatml": _TURNS
    + """{{ "<|im_start|>" + message.role + "\\n" + message.content + "<|im_end|>\\n" }}{% endfor %}
{%- if add_generation_prompt %}{{ "<|im_start|>assistant\\n" }}{% endif %}
""",
    "exaone": """{%- if messages[0].role != "system" %}{{ "[|system|][|endofturn|]\\n" }}{% endif %}
"""
    + _TURNS
    + """
    {{- "[|" + message.role + "|]" + message.content + ("\\n" if message.role == "user" else "[|endofturn|]\\n") }}
{%- endfor %}
{%- if add_generation_prompt %}{{ "[|assistant|]" }}{% endif %}
""",
    "llama3": "{{- bos_token }}\n"
    + _TURNS
    + """
    {{- "<|start_header_id|>" + message.role + "<|end_header_id|>\\n\\n" + message.content | trim + "<|eot_id|>" }}
{%- endfor %}
{%- if add_generation_prompt %}{{ "<|start_header_id|>assistant<|end_header_id|>\\n\\n" }}{% endif %}
""",
    "mistral": _ALTERNATE
    + """    {%- if turn.role == "assistant" %}
        {{- " " + turn.content + eos_token }}
    {%- else %}
        {{- " [INST] " + (system + "\\n\\n" if loop.first and system is not none else "") + turn.content + " [/INST]" }}
    {%- endif %}
{%- endfor %}
""",
}


def chat_template(said: str | None, models: Iterable) -> str | None:
    """The text of what a recipe says: a name, a text, or "auto", the one most of the models have, of several the first.

    None leaves the tokenizer's own.
    """
    if said != "auto":
        return TEMPLATES.get(said, said)
    found = Counter(template.strip() for model in models if (template := model.chat_template()))
    return found.most_common(1)[0][0] if found else None


def why_no_jinja(text: str) -> str | None:
    """What is wrong with a text that is no Jinja; nothing is checked where jinja2 is not installed."""
    try:
        import jinja2
        from jinja2.ext import Extension
    except ImportError:
        return None

    class Generation(Extension):
        tags = {"generation"}  # noqa: RUF012  transformers marks the assistant's turns with it

        def parse(self, parser):
            next(parser.stream)
            return parser.parse_statements(["name:endgeneration"], drop_needle=True)

    try:
        jinja2.Environment(extensions=["jinja2.ext.loopcontrols", Generation]).parse(text)
    except jinja2.TemplateSyntaxError as error:
        return f"line {error.lineno} is no Jinja: {error.message}"
    return None

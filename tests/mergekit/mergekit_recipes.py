"""Recipes that mergekit and freemerge both run, on the models of mergekit_zoo.py: {D} is a folder of them.

Those called "example ..." have the structure of the examples in mergekit's repository, on models of our own.
"""

from dataclasses import dataclass
from textwrap import dedent


@dataclass(frozen=True)
class Case:
    """
    Args:
        text: the recipe.
        family: which models.
        ulps: of the output dtype, at the largest number a tensor holds, that results may differ by.
        why: the reason for more than one.
        options: of mergekit.
        differing: the share of a tensor's entries that may be something else altogether.
        unknown: what the names of tensors begin with that mergekit leaves out.
    """

    text: str
    family: str = "f32"
    ulps: float = 1
    why: str = ""
    options: tuple[tuple[str, object], ...] = ()
    differing: float = 0
    unknown: str | None = None


def models(names: str, **parameters) -> str:
    """`models:` with parameters: one value for all, or a tuple of one for each."""
    lines = ["models:"]
    for i, name in enumerate(names.split()):
        lines.append(f"  - model: {{D}}/{name}")
        if parameters:
            lines.append("    parameters:")
        for key, value in parameters.items():
            lines.append(f"      {key}: {value[i] if isinstance(value, tuple) else value}")
    return "\n".join(lines) + "\n"


def recipe(method: str, names: str, base: str | None = None, shared: str = "", dtype: str = "float32", **own) -> str:
    head = f"merge_method: {method}\n" + (f"base_model: {{D}}/{base}\n" if base else "")
    parameters = f"parameters: {{{{{shared}}}}}\n" if shared else ""
    return head + models(names, **own) + parameters + (f"dtype: {dtype}\n" if dtype else "")


def text(written: str) -> str:
    return dedent(written).lstrip()


ROUNDS = "mergekit rounds to the dtype of the inputs on the way, freemerge once, at the end"
QUOTIENT = "mergekit divides the sum, freemerge the weights"
HEAD = "cls.predictions.transform."  # its table of this architecture lacks them
ANGLES = "sums of products in float32 there, in float64 here"

CASES = {
    # methods
    "linear": Case(recipe("linear", "math code chat", weight=(1, 0.5, 0.2)), ulps=2, why=QUOTIENT),
    "linear, not normalized": Case(recipe("linear", "math code", shared="normalize: false", weight=(0.3, 0.9))),
    "linear with the base among the models": Case(recipe("linear", "base math", weight=(1, 0.5)), ulps=2, why=QUOTIENT),
    "linear, bfloat16": Case(recipe("linear", "math code chat", dtype="bfloat16", weight=(1, 0.5, 0.2)), "bf16"),
    "task_arithmetic": Case(recipe("task_arithmetic", "math code", "base", "lambda: 0.7", weight=(1, 0.5))),
    "task_arithmetic, normalized": Case(
        recipe("task_arithmetic", "math code", "base", "normalize: true, int8_mask: true", weight=(1, 0.5))
    ),
    "task_arithmetic, parameters without effect": Case(
        recipe("task_arithmetic", "math code", "base", "rescale: true", weight=(1, 0.5), density=0.3)
    ),
    "task_arithmetic, bfloat16": Case(
        recipe("task_arithmetic", "math code", "base", dtype="bfloat16", weight=(1, 0.5)), "bf16", 2, ROUNDS
    ),
    "ties": Case(
        recipe("ties", "math code chat", "base", "normalize: true", weight=(1, 0.5, 0.7), density=(0.3, 0.5, 0.7))
    ),
    "ties, rescaled": Case(recipe("ties", "math code", "base", "rescale: true", weight=(1, -0.4), density=0.4)),
    "ties with a gradient": Case(
        recipe("ties", "math code", "base", "int8_mask: true", weight="[0, 0.3, 1]", density="[1, 0.2]")
    ),
    "dare_ties, nothing dropped": Case(recipe("dare_ties", "math code", "base", weight=(1, 0.5), density=1.0)),
    "dare_linear, all dropped": Case(recipe("dare_linear", "math code", "base", weight=(1, 0.5), density=0.0)),
    "della, nothing dropped": Case(recipe("della", "math code", "base", weight=(1, 0.5), density=1.0)),
    "della_linear, nothing dropped": Case(recipe("della_linear", "math code", "base", weight=(1, 0.5), density=1.0)),
    "breadcrumbs": Case(recipe("breadcrumbs", "math code", "base", weight=(1, 0.5), density=0.9, gamma=0.01)),
    "breadcrumbs_ties": Case(
        recipe(
            "breadcrumbs_ties",
            "math code chat",
            "base",
            "normalize: true",
            weight=(1, 0.5, 0.3),
            density=0.6,
            gamma=0.05,
        )
    ),
    "sce": Case(recipe("sce", "math code chat", "base", "select_topk: 0.2")),
    "model_stock": Case(recipe("model_stock", "math code chat", "base"), ulps=2, why=ANGLES),
    "model_stock by rows": Case(recipe("model_stock", "math code", "base", "filter_wise: true"), ulps=2, why=ANGLES),
    "slerp": Case(recipe("slerp", "base math", "base", "t: 0.3"), ulps=2, why=ANGLES),
    "nuslerp": Case(recipe("nuslerp", "math code", weight=(1, 0.4)), ulps=4, why=ANGLES),
    "nuslerp from a base": Case(recipe("nuslerp", "math code", "base", weight=(1, 0.4)), ulps=2, why=ANGLES),
    "nuslerp by rows": Case(
        recipe("nuslerp", "math code", "base", "nuslerp_flatten: false", weight=(1, 0.4)), ulps=2, why=ANGLES
    ),
    "multislerp": Case(recipe("multislerp", "math code chat", weight=(1, 0.4, 0.3)), ulps=4, why=ANGLES),
    "multislerp from a base": Case(
        recipe("multislerp", "math code chat", "base", weight=(1, 0.4, 0.3)), ulps=2, why=ANGLES
    ),
    "karcher": Case(recipe("karcher", "math code chat"), ulps=4, why=ANGLES),
    "nearswap": Case(recipe("nearswap", "base math", "base", "t: 0.001")),
    "ram": Case(recipe("ram", "math code chat", "base", "epsilon: 0.002")),
    "ramplus_tl": Case(recipe("ramplus_tl", "math code chat", "base", "epsilon: 0.002, r: 0.3, alpha: 0.5")),
    "passthrough, scaled": Case(
        text("""
        merge_method: passthrough
        models:
          - model: {D}/math
            parameters:
              scale:
                - {{filter: o_proj, value: 0.5}}
                - {{value: 1.0}}
        dtype: float32
        """)
    ),
    # parameters
    "filters and gradients": Case(
        text("""
        merge_method: task_arithmetic
        base_model: {D}/base
        models:
          - model: {D}/math
            parameters:
              weight:
                - {{filter: self_attn, value: [0, 0.5, 0.3, 0.7, 1]}}
                - {{filter: mlp, value: [1, 0]}}
                - 0.5
          - model: {D}/code
            parameters: {{weight: {{filter: mlp, value: 0.3}}}}
        parameters: {{weight: 0.25, lambda: 0.9}}
        dtype: float32
        """).replace("- 0.5\n", "- {{value: 0.5}}\n")
    ),
    "a gradient for all": Case(recipe("linear", "math code", shared="weight: [0.2, 1, 0.4]")),
    # dtypes
    "out_dtype": Case(recipe("linear", "math code", dtype="", weight=(1, 0.5)) + "out_dtype: bfloat16\n"),
    "dtype and out_dtype": Case(
        recipe("linear", "math code", dtype="float32", weight=(1, 0.5)) + "out_dtype: float16\n", "bf16"
    ),
    "no dtype": Case(recipe("linear", "math code", dtype="", weight=(1, 0.5)), "bf16"),
    "float16": Case(
        recipe("slerp", "base math", "base", "t: 0.4", dtype="float16"), ulps=2, why="mergekit casts the inputs"
    ),
    # slices
    "a stack of two models": Case(
        text("""
        merge_method: passthrough
        slices:
          - sources: [{{model: {D}/math, layer_range: [0, 2]}}]
          - sources: [{{model: {D}/code, layer_range: [1, 3]}}]
        dtype: float32
        """)
    ),
    "layers twice, a part scaled": Case(
        text("""
        merge_method: passthrough
        slices:
          - sources: [{{model: {D}/math, layer_range: [0, 3]}}]
          - sources:
              - model: {D}/math
                layer_range: [1, 2]
                parameters:
                  scale: [{{filter: o_proj, value: 0.0}}, {{filter: down_proj, value: 0.0}}, {{value: 1.0}}]
        dtype: float32
        """),
        options=(("clone_tensors", True),),
    ),
    "two sources, parameters at every level": Case(
        text("""
        merge_method: linear
        slices:
          - sources:
              - {{model: {D}/math, layer_range: [0, 2], parameters: {{weight: [0, 1]}}}}
              - {{model: {D}/code, layer_range: [1, 3]}}
          - sources:
              - {{model: {D}/chat, layer_range: [2, 3]}}
              - {{model: {D}/code, layer_range: [2, 3]}}
            parameters: {{weight: [{{filter: mlp, value: 0.3}}, {{value: 0.8}}]}}
        parameters: {{weight: 0.5}}
        dtype: float32
        """),
        ulps=2,
        why=QUOTIENT,
    ),
    "a base in every slice": Case(
        text("""
        merge_method: task_arithmetic
        base_model: {D}/base
        slices:
          - sources:
              - {{model: {D}/base, layer_range: [0, 2]}}
              - {{model: {D}/math, layer_range: [0, 2], parameters: {{weight: 0.6}}}}
          - sources:
              - {{model: {D}/base, layer_range: [2, 3]}}
              - {{model: {D}/code, layer_range: [2, 3], parameters: {{weight: 0.4}}}}
        dtype: float32
        """)
    ),
    # tokenizers
    "union": Case(
        recipe("linear", "base other third", weight=(1, 0.5, 0.3)) + "tokenizer_source: union\n", ulps=2, why=QUOTIENT
    ),
    "union of tied models": Case(
        recipe("task_arithmetic", "other third", "base", weight=(0.5, 0.3)) + "tokenizer_source: union\n", "tied"
    ),
    "the base's tokens": Case(
        recipe("task_arithmetic", "other padded", "base", weight=0.5) + "tokenizer_source: base\n"
    ),
    "a model's tokens": Case(
        recipe("linear", "base other", "base", weight=(1, 0.5)) + "tokenizer_source: {D}/other\n", ulps=2, why=QUOTIENT
    ),
    "rules for tokens and padding": Case(
        recipe("ties", "other third", "base", weight=(0.5, 0.3), density=0.6)
        + text("""
        tokenizer:
          source: union
          pad_to_multiple_of: 16
          tokens:
            "<|im_start|>": {{source: {D}/third, force: true}}
            "<|im_end|>": {{source: {{kind: model_token, model: {D}/base, token: ing}}}}
            "<|new|>": {{source: {{kind: zero}}}}
            "<|id|>": {{source: {{kind: model_token, model: {D}/other, token_id: 7}}}}
        chat_template: chatml
        """)
    ),
    "union, bfloat16, padded": Case(
        recipe("linear", "base other third", dtype="bfloat16", weight=(1, 0.5, 0.3))
        + "tokenizer: {{source: union, pad_to_multiple_of: 8}}\n",
        "bf16",
        2,
        "the mean of bfloat16 rows is rounded before it is merged, there along the way",
    ),
    "union in a stack": Case(
        text("""
        merge_method: passthrough
        slices:
          - sources: [{{model: {D}/base, layer_range: [0, 2]}}]
          - sources: [{{model: {D}/other, layer_range: [1, 3]}}]
        tokenizer_source: union
        dtype: float32
        """)
    ),
    "a chat template": Case(
        recipe("slerp", "base math", "base", "t: 0.5") + 'chat_template: "{{{{ messages[0].role }}}} says"\n',
        ulps=2,
        why=ANGLES,
    ),
    "a chat template by name": Case(
        recipe("slerp", "base math", "base", "t: 0.5") + "chat_template: mistral\n", ulps=2, why=ANGLES
    ),
    "another chat template by name": Case(
        recipe("ties", "math", "base", density=0.5, weight=1) + "tokenizer_source: base\nchat_template: llama3\n"
    ),
    "the chat template of most": Case(
        recipe("task_arithmetic", "other third", "base", weight=0.5) + "tokenizer_source: union\nchat_template: auto\n"
    ),
    # adapters
    "an adapter": Case(
        recipe("task_arithmetic", "base+{D}/lora math", "base", weight=(0.5, 0.5)),
        ulps=2,
        why="there W + BA is rounded to float32 before it is merged, by torch's own sums",
    ),
    "an adapter alone among models": Case(
        recipe("linear", "base+{D}/lora code", weight=(1, 0.5)), ulps=2, why="as above"
    ),
    # other architectures
    "gpt2, ties": Case(recipe("ties", "math code", "base", weight=(1, 0.5), density=0.5), "gpt2"),
    "gpt2, gradient and filter": Case(
        recipe("slerp", "base math", "base", "t: [{{filter: attn, value: [0, 1]}}, {{value: 0.5}}]"), "gpt2", 2, ANGLES
    ),
    "bert, task_arithmetic": Case(
        recipe("task_arithmetic", "math code", "base", weight=(0.5, 0.4)), "bert", unknown=HEAD
    ),
    "bert, the base's tokens": Case(
        recipe("linear", "base code", "base", weight=0.5) + "tokenizer_source: base\n", "bert", unknown=HEAD
    ),
    "qwen2, della without drops": Case(recipe("della", "math code", "base", weight=(1, 0.5), density=1.0), "qwen"),
    "qwen2, model_stock": Case(recipe("model_stock", "math code chat", "base"), "qwen", 2, ANGLES),
    "t5": Case(recipe("linear", "math code", weight=(1, 0.5)), "t5", 2, QUOTIENT),
    "t5, modules": Case(
        text("""
        merge_method: linear
        modules:
          encoder:
            models: [{{model: {D}/math}}, {{model: {D}/code}}]
            parameters: {{weight: 0.5}}
          decoder:
            slices:
              - sources:
                  - {{model: {D}/code, layer_range: [0, 2], parameters: {{weight: 0.7}}}}
                  - {{model: {D}/math, layer_range: [0, 2]}}
          shared:
            models: [{{model: {D}/math}}]
        parameters: {{weight: 0.3}}
        dtype: float32
        """),
        "t5",
    ),
    # with the structure of mergekit's examples
    "example linear": Case(
        recipe("linear", "math code chat", dtype="float16", weight=(1.0, 0.3, 0.5)), ulps=2, why="as float16"
    ),
    "example ties": Case(
        text("""
        models:
          - model: {D}/math
            parameters:
              density: [1, 0.7, 0.1] # density gradient
              weight: 1.0
          - model: {D}/code
            parameters:
              density: 0.5
              weight: [0, 0.3, 0.7, 1] # weight gradient
          - model: {D}/chat
            parameters:
              density: 0.33
              weight:
                - filter: mlp
                  value: 0.5
                - value: 0
        merge_method: ties
        base_model: {D}/base
        parameters:
          normalize: true
          int8_mask: true
        dtype: float32
        """)
    ),
    "example bio-merge": Case(
        recipe("ties", "math code", "base", "normalize: false, int8_mask: true", density=0.5, weight=0.5)
    ),
    "example gradient-slerp": Case(
        text("""
        slices:
          - sources:
              - model: {D}/base
                layer_range: [0, 3]
              - model: {D}/math
                layer_range: [0, 3]
        merge_method: slerp
        base_model: {D}/base
        parameters:
          t:
            - filter: self_attn
              value: [0, 0.5, 0.3, 0.7, 1]
            - filter: mlp
              value: [1, 0.5, 0.7, 0.3, 0]
            - value: 0.5 # fallback for rest of tensors
        dtype: float32
        """),
        ulps=2,
        why=ANGLES,
    ),
    "example orcamini-platy-44layer": Case(
        text("""
        slices:
          - sources:
            - model: {D}/math
              layer_range: [0, 2]
          - sources:
            - model: {D}/code
              layer_range: [1, 3]
        merge_method: passthrough
        dtype: float16
        """)
    ),
    "example gpt2-small": Case(
        text("""
        slices:
          - sources:
            - model: {D}/base
              layer_range: [0, 2]
        merge_method: passthrough
        dtype: float16
        """),
        "gpt2",
    ),
    "example arcee_fusion": Case(
        recipe("arcee_fusion", "base math", "base"),
        differing=0.02,
        why="it chooses entries by a divergence that in float32, as there, is rounding noise for small changes",
    ),
}

# mergekit-multi's: documents for mergekit run one after the other, with the results of those before
STAGES = {
    "example mega": Case(
        text("""
        slices:
          - sources:
              - model: {D}/base
                layer_range: [0, 3]
              - model: {D}/math
                layer_range: [0, 3]
        merge_method: slerp
        base_model: {D}/base
        parameters:
          t:
            - filter: self_attn
              value: [0, 0.5, 0.3, 0.7, 1]
            - value: 0.5
        dtype: float32
        name: gradient-slerp
        ---
        models:
          - model: gradient-slerp
            parameters: {{density: [1, 0.7, 0.1], weight: 1.0}}
          - model: {D}/code
            parameters: {{density: 0.33, weight: [{{filter: mlp, value: 0.5}}, {{value: 0}}]}}
        merge_method: ties
        base_model: {D}/base
        parameters: {{normalize: true, int8_mask: true}}
        dtype: float32
        """),
        ulps=2,
        why=ANGLES,
    ),
    "a union that a stack is made of": Case(
        text("""
        name: both
        """)
        + recipe("linear", "base other", weight=(1, 0.5))
        + text("""
        tokenizer_source: union
        ---
        merge_method: passthrough
        slices:
          - sources: [{{model: both, layer_range: [0, 2]}}]
          - sources: [{{model: both, layer_range: [1, 3]}}]
        dtype: float32
        """),
        ulps=2,
        why=QUOTIENT,
    ),
}

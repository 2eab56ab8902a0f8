"""docs/methods.md, written from the methods themselves: what each says of itself, and what families have in common.

freemerge methods --markdown > docs/methods.md
"""

import inspect
import re
from collections.abc import Iterator
from typing import Any

from freemerge import methods
from freemerge.methods import Method, Parameter

HEAD = """\
# Methods

This page is printed by `freemerge methods --markdown`; `freemerge methods free` says the same of one method. The
goldens of the authors' own code are in `tests/goldens`; `python tests/run_goldens.py [DIR]` runs them, or others in
the same format.

theta_0 or base is the base model, theta_t expert t of T, tau_t = theta_t - theta_0 its task vector. What holds for
every method:

- Integer and bool tensors are copied from the base.
- Arithmetic is float32 inside, with one rounding at the end, to the dtype of the result.
- A tensor that an expert lacks, or has in another shape, is an error found before anything is written.
- Ties in a selection go to the lower index (row-major). In bfloat16 checkpoints they are the rule: a task vector has
  few distinct values there.

A parameter with "one for each expert" takes one number for all, or one for each. **Patterns** are regular expressions
*searched anywhere* in a tensor's name: `attn` finds every name with attn in it, `^model\\.embed` only names that
begin so, `(attn|mlp).*weight` what it says, `(?!)` nothing. A list of patterns means any of them. A **variant**
presets parameters; what is given beside it overrides the preset.

The **scope** of a method is what it has to see at once: any run of *elements*, a whole *tensor*, or something of the
whole *model*, which is then read in sweeps before the first tensor is merged."""

# Every method is in one family, in the order of the page.
FAMILIES = {
    "Sums and averages": ("average", "linear", "task_arithmetic", "adamerging", "adamerging_plus_plus"),
    "Filtered task vectors": ("fr", "free"),
    "Some entries of each task vector": (
        "ties",
        "breadcrumbs",
        "breadcrumbs_ties",
        "dare_linear",
        "dare_ties",
        "della_linear",
        "della",
        "dare",
        "sce",
        "ram",
        "ramplus_tl",
        "arcee_fusion",
        "nearswap",
    ),
    "Statistics of the whole model": ("ties_merging", "dare_ties_merging", "pcb", "tall_mask"),
    "Singular vectors": ("iso_c", "iso_cts", "tsvm", "opcm", "doge"),
    "LoRA adapters": ("copa", "twin_lora"),
    "Experts beside a backbone": ("emr", "twin", "smile"),
    "Angles": ("slerp", "nuslerp", "multislerp", "karcher", "model_stock"),
    "One model": ("passthrough",),
}

INTRODUCTIONS = {
    "Some entries of each task vector": """\
mergekit's names, parameters and defaults. The first of them form the task vectors, keep some of their entries (a mask
of one bit an entry; a task vector itself is never held in memory) and add up the weighted rest; all ranks and sums
are those of one tensor.

**Election**: the sign of an entry is that of the weighted sum of what is kept there; a sum of zero elects +; only
entries of that sign are added. TIES of the paper, over the whole model and with a majority sign for zeros, is
`ties_merging`.

**Draws** are counter-based (Philox): they depend on the seed, the tensor's name, the expert's place among the experts
and the entry's in the tensor, on nothing else; not on threads, devices, or the order of tensors. They cannot be
mergekit's, but follow the same law.""",
    "Singular vectors": """\
Matrices are merged through their singular vectors. n is the shorter side of a matrix, polar(X) the orthonormal
columns nearest to X: P R^T where X = P Q R^T.

Where singular values vanish (experts of low rank, experts that are the same), the singular vectors are arbitrary and
so is the official result. Here a direction whose singular value is at most 1e-6 of the largest has no vectors and is
left out.

The eigenvectors of the float64 Gram matrix of the shorter side take a fraction of the time of a singular value
decomposition. A direction with singular value s then has a relative error of about 2e-16 (s_1/s)^2, which is below
the 6e-8 (s_1/s) of the float32 decomposition of the official code down to the 1e-6 where directions end. Against
float64 decompositions the updates agree to 1e-5 of their largest entry, most of it the rounding of the weights; of
task vectors alone (768 x 3072 and 2048 x 2048, three experts) to 2e-7, the official float32 code to 1e-5.
Nothing is truncated or random. NumPy's linear algebra has threads of its own; while files are streamed each worker
has its share of the cores, and the last bits may depend on it.""",
    "LoRA adapters": """\
Every expert is an adapter as PEFT saves it, given alone, and so is the result, with the configuration of the first:
rank, alpha, target modules and base have to agree. There is no base model; `base+OUT` applies the result to one. Any
other method takes adapters applied to their base (`base+adapter`), where A of one never meets B of another.""",
    "Experts beside a backbone": """\
What is published is a backbone, a plain checkpoint, with an expert for each model in `experts/NAME.safetensors`. For
each tensor an expert holds a part: sparse rows (as those of `free`), a mask of a vector that all experts share (kept
once, in `experts/shared/METHOD.safetensors`), a low-rank product, or a difference. `freemerge experts list` says what
they are and how large; `freemerge experts apply MERGED math OUT` writes the backbone with one in it,
`freemerge experts apply MERGED math=0.7,code=0.3 OUT` with a weighted sum, as a router's probabilities ask for.
`freemerge experts compact MERGED OUT` makes sparse experts half as large, with values of 8 bits
([experts.md](experts.md#sizes)).""",
    "Angles": """\
Norms and dot products of all pairs are measured in one pass, in float64; the method works on these few numbers and
ends in one weighted sum.""",
}

_SWEEPS = {1: "once", 2: "twice"}


def page() -> str:
    """All of docs/methods.md."""
    return "\n\n".join([HEAD, _overview(), *_families()]) + "\n"


def notes(method: Method) -> str:
    """What there is to know of a method: what it computes, then what its docstring adds to the first line."""
    computed = (inspect.getdoc(method.module.merge_tensor) or "").partition("\nArgs:")[0]
    added = inspect.cleandoc(method.module.__doc__ or "").partition("\n")[2]
    return "\n\n".join(text.strip() for text in (computed, added) if text.strip())


def source(method: Method) -> str:
    """Where the method comes from, with links, but for sections of notes that readers have not got."""
    public = re.sub(r"; METHODS\.md section.*", "", method.source)
    return re.sub(r"arXiv:(\d{4}\.\d{5})", r"[arXiv:\1](https://arxiv.org/abs/\1)", public)


def _overview() -> str:
    found = (methods.get(name) for family in FAMILIES.values() for name in family)
    return _table(
        ("method", "", "scope"), ((f"[`{m.name}`](#{m.name})", _after_colon(m.summary), m.scope) for m in found)
    )


def _families() -> Iterator[str]:
    for family, members in FAMILIES.items():
        yield f"## {family}"
        if family in INTRODUCTIONS:
            yield INTRODUCTIONS[family]
        for name in members:
            yield from _described(methods.get(name))


def _described(method: Method) -> Iterator[str]:
    yield f"### {method.name}"
    yield method.summary
    yield notes(method)
    if method.parameters:
        rows = ((_names(method, p), _value(p.default), _meaning(p)) for p in method.parameters.values())
        yield _table(("parameter", "default", ""), rows)
    if method.variants:
        yield "\n".join(f"- `variant: {name}`: {_presets(presets)}" for name, presets in method.variants.items())
    yield f"Needs {needs(method)}. Scope: {_scope(method)}. Source: {source(method)}."


def needs(method: Method) -> str:
    """The models it merges, in words."""
    if method.base_optional:
        return "experts, and a base if there is one"
    return "a base and experts" if method.uses_base else "experts; the base is not looked at"


def _scope(method: Method) -> str:
    if method.scope != "model":
        return method.scope
    most = "at most " if hasattr(method.module, "is_settled") else ""
    return f"model, read {most}{_SWEEPS.get(method.sweeps, f'{method.sweeps} times')} before it is merged"


def _names(method: Method, parameter: Parameter) -> str:
    others = [alias for alias, name in method.aliases.items() if name == parameter.name]
    return f"`{parameter.name}`" + (f" (or `{'`, `'.join(others)}`)" if others else "")


def _meaning(parameter: Parameter) -> str:
    words = list(parameter.choices) + (["a number"] if parameter.kind == "number-or-choice" else [])
    said = parameter.help
    if words:
        said += f" One of {', '.join(words)}."
    if parameter.kind == "patterns":
        said += " Patterns."
    return said + (" One for each expert." if parameter.per_expert else "")


def _presets(presets) -> str:
    return ", ".join(f"`{name}` {_value(value)}" for name, value in presets.items()) or "the defaults"


def _value(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, tuple):
        return ", ".join(f"`{entry}`" for entry in value) or "none"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _after_colon(summary: str) -> str:
    return summary.partition(": ")[2] or summary


def _table(head: tuple[str, ...], rows) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)

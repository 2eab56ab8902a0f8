"""The shape of a recipe: mergekit's YAML, checked by pydantic, every problem at once.

Only the shape: what a method makes of its parameters is checked in settings.py.
"""

import difflib
from typing import Annotated, Any, TypeVar

import ml_dtypes  # noqa: F401  teaches NumPy the names bfloat16 and float8
import numpy as np
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictBool,
    ValidationError,
    model_validator,
)

from freemerge import methods
from freemerge.chat_templates import TEMPLATES, why_no_jinja
from freemerge.errors import FreemergeError, RecipeError
from freemerge.kernels.array import FLOATS

FILTERED = {"filter", "value"}
_DTYPES = {dtype.name: dtype for dtype in FLOATS}
_SHORT_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32", "float": "float32"}


def nearest(word: str, known) -> str:
    """', did you mean ...?' where a known word is close to this one, and the whole list where there is none."""
    close = difflib.get_close_matches(str(word), known := sorted(known), n=1, cutoff=0.5)
    return f", did you mean {close[0]}?" if close else f"; there is {', '.join(known)}"


def parse_dtype(name: Any) -> np.dtype:
    """The NumPy dtype of a name as torch, mergekit or NumPy write it.

    Raises:
        RecipeError: not a float dtype a checkpoint is written in; names the nearest.
    """
    plain = str(name).removeprefix("torch.")
    plain = _SHORT_DTYPES.get(plain, plain)
    if plain not in _DTYPES:
        raise RecipeError(f"{name} is no dtype to write{nearest(plain, _DTYPES)}")
    return _DTYPES[plain]


def _dtype(value: Any) -> np.dtype | None:
    try:
        return None if value is None else parse_dtype(value)
    except RecipeError as error:
        raise ValueError(str(error)) from None


def _method(name: str) -> str:
    try:
        return methods.get(name).name
    except FreemergeError as error:
        raise ValueError(str(error)) from None


def _chat_template(value: str | None) -> str | None:
    if value is None or value == "auto" or value in TEMPLATES:
        return value
    if "{" not in value:
        known = nearest(value, {*TEMPLATES, "auto"})
        raise ValueError(f"no template is called {value!r}{known}; a template of your own is a Jinja text")
    if said := why_no_jinja(value):
        raise ValueError(said)
    return value


def _token_source(value: Any) -> Any:
    """(model or None for a row of zeros, its token or the number of a row)."""
    if not isinstance(value, dict) or "kind" not in value:
        return _model(value), None
    keys = {"zero": {"kind"}, "model_token": {"kind", "model", "token", "token_id"}}
    if value["kind"] not in keys:
        raise ValueError(f"kind {value['kind']!r}{nearest(value['kind'], keys)}")
    if unknown := sorted(set(value) - keys[value["kind"]]):
        raise ValueError(f"unknown key {unknown[0]!r}{nearest(unknown[0], keys[value['kind']])}")
    if value["kind"] == "zero":
        return None, None
    given = [value[key] for key in ("token", "token_id") if value.get(key) is not None]
    if len(given) != 1 or (given[0] is value.get("token_id") and (type(given[0]) is not int or given[0] < 0)):
        raise ValueError("of a model_token either token, a text, or token_id, a row's number, is expected")
    return _model(value.get("model")), given[0]


def _model(value: Any) -> str:
    if isinstance(value, dict):
        value = _model_of_mapping(value)
    if not isinstance(value, str) or not value.strip():
        raise ValueError("a folder, a file or a hub name is expected")
    return value


def _model_of_mapping(value: dict) -> str:
    # mergekit also writes a model as {model: {path: ..., revision: ...}}
    if value.get("override_architecture"):
        raise ValueError("override_architecture says nothing here, tensors are known by their names; leave it out")
    model, lora = _place_of(value.get("model", value)), _place_of(value.get("lora"))
    return f"{model}+{lora}" if model and lora else model


def _place_of(place: Any) -> Any:
    if isinstance(place, dict):
        return f"{place['path']}@{place['revision']}" if place.get("revision") else place.get("path")
    return place


def _setting(value: Any) -> Any:
    """A scalar, a gradient (list of scalars), or a list of {filter, value}: the forms settings.py resolves."""
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        return _scalar(value)
    if any(isinstance(item, dict) for item in value):
        return [_filtered(item) for item in value]
    return [_scalar(item) for item in value]


def _filtered(item: Any) -> dict:
    if not isinstance(item, dict) or "value" not in item:
        raise ValueError(f"{item!r}: each item of a filtered list is {{filter: part of a tensor's name, value: ...}}")
    if unknown := sorted(set(item) - FILTERED):
        raise ValueError(f"{unknown[0]!r} in a filtered list{nearest(unknown[0], FILTERED)}")
    if not isinstance(item.get("filter") or "*", str):
        raise ValueError(f"filter {item['filter']!r}: part of a tensor's name, or '*'")
    value = item["value"]
    if isinstance(value, dict) or (isinstance(value, list) and any(isinstance(part, dict) for part in value)):
        raise ValueError("filters cannot be nested")
    return {"filter": item.get("filter") or "*", "value": _setting(value)}


def _scalar(value: Any) -> Any:
    if value is None or not isinstance(value, (bool, int, float, str)):
        raise ValueError(f"{value!r}: a number, true or false, or a word is expected")
    return value


def _layer_range(value: Any) -> tuple[int, int]:
    numbers = isinstance(value, (list, tuple)) and [type(item) for item in value] == [int, int]
    if not numbers or value[0] < 0 or value[1] <= value[0]:
        raise ValueError(f"{value!r}: [first layer, the one after the last] is expected, as in [0, 16]")
    return tuple(value)


def _parameters(value: Any) -> Any:
    return {} if value is None else value


def _entries(value: Any) -> Any:
    return [] if value is None else value


ModelName = Annotated[str, BeforeValidator(_model)]
Setting = Annotated[Any, BeforeValidator(_setting)]
Parameters = Annotated[dict[str, Setting], BeforeValidator(_parameters)]
LayerRange = Annotated[Any, BeforeValidator(_layer_range)]
Dtype = Annotated[Any, BeforeValidator(_dtype)]
Source = Annotated[Any, BeforeValidator(lambda value: None if value is None else _model(value))]


T = TypeVar("T")
Entries = Annotated[list[T], BeforeValidator(_entries)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class ModelEntry(_Strict):
    model: ModelName
    name: str | None = None  # freemerge's addition: what the expert is called in files and messages
    parameters: Parameters = {}


class TokenEntry(_Strict):
    source: Annotated[Any, BeforeValidator(_token_source)]
    force: StrictBool = False


class TokenizerEntry(_Strict):
    source: ModelName = "union"
    tokens: Annotated[dict[str, TokenEntry], BeforeValidator(_parameters)] = {}
    pad_to_multiple_of: Annotated[int, Field(gt=0)] | None = None


class SliceSource(_Strict):
    model: ModelName
    layer_range: LayerRange
    parameters: Parameters = {}


class OutputSlice(_Strict):
    sources: Annotated[list[SliceSource], Field(min_length=1)]
    base_model: ModelName | None = None
    residual_weight: float | None = None  # mergekit knows the word, and makes nothing of it
    parameters: Parameters = {}

    @model_validator(mode="after")
    def _aligned(self):
        counts = [source.layer_range[1] - source.layer_range[0] for source in self.sources]
        if len(set(counts)) > 1:
            raise ValueError(f"its sources have {', '.join(map(str, counts))} layers; give all as many")
        return self


class OutputModule(_Strict):
    models: Entries[ModelEntry] = []
    slices: Entries[OutputSlice] = []
    parameters: Parameters = {}

    @model_validator(mode="after")
    def _one_form(self):
        if bool(self.models) == bool(self.slices):
            raise ValueError("models or slices, one of them is expected")
        return self


class Document(_Strict):
    name: str | None = None  # of several documents: what others call its result
    merge_method: Annotated[str, AfterValidator(_method)]
    models: Entries[ModelEntry] = []
    base_model: ModelName | None = None
    parameters: Parameters = {}
    dtype: Dtype = None
    out_dtype: Dtype = None
    tokenizer_source: Source = None
    tokenizer: TokenizerEntry | None = None
    chat_template: Annotated[str | None, AfterValidator(_chat_template)] = None
    continue_from: str | None = None  # freemerge's additions, for methods that keep a state
    keep_state: bool | None = None
    slices: Entries[OutputSlice] = []
    modules: Annotated[dict[str, OutputModule], BeforeValidator(_parameters)] = {}

    @model_validator(mode="after")
    def _one_form(self):
        given = [key for key in ("models", "slices", "modules") if getattr(self, key)]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)}: {'both' if len(given) == 2 else 'all'} are given; keep one")
        source = self.tokenizer.source if self.tokenizer else self.tokenizer_source
        if self.continue_from and source not in (None, "base"):
            raise ValueError("continue_from: the earlier merge has the base's tokens; write tokenizer_source: base")
        return self


_MESSAGES = {
    "string_type": "a text is expected, not {input!r}",
    "list_type": "a list is expected, not {input!r}",
    "dict_type": "a mapping of names to values is expected, not {input!r}",
    "too_short": "at least one is expected",
    "int_type": "a whole number is expected, not {input!r}",
    "int_parsing": "a whole number is expected, not {input!r}",
    "bool_type": "true or false is expected, not {input!r}",
    "greater_than": "a whole number above 0 is expected, not {input!r}",
    "model_type": "a mapping of names to values is expected, not {input!r}",
}


def parse(content: Any) -> tuple[Document | None, list[str]]:
    """The checked document, or None, and the problems found."""
    if not isinstance(content, dict):
        return None, [f"a recipe is a mapping with merge_method, base_model and models, not {type(content).__name__}"]
    try:
        document = Document.model_validate(content)
    except ValidationError as error:
        return None, [_problem(details) for details in error.errors(include_url=False)]
    return document, []


def _problem(details: dict) -> str:
    *parents, last = details["loc"] or [""]
    kind = details["type"]
    if kind == "extra_forbidden":
        return f"{_place(parents)}unknown key {last!r}{nearest(last, _keys(parents))}"
    if kind == "missing":
        return f"{_place(parents)}{last} is missing"
    if kind == "value_error":
        message = str(details["ctx"]["error"])
    else:
        message = _MESSAGES.get(kind, details["msg"]).format(input=details["input"])
    return f"{_place(details['loc'])}{message}"


def _keys(parents: list) -> set[str]:
    owners = {
        "models": ModelEntry,
        "tokenizer": TokenizerEntry,
        "tokens": TokenEntry,
        "modules": OutputModule,
        "slices": OutputSlice,
        "sources": SliceSource,
    }
    named = [part for part in parents if part in owners]
    return set(owners[named[-1]].model_fields if named else Document.model_fields)


def _place(parts) -> str:
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts)
    return f"{text.lstrip('.')}: " if text else ""

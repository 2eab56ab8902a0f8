"""What the user asked for: mergekit's YAML, keywords or flags become one Recipe.

The language is described in docs/recipe.md. Here it is decided which model is the base and what an expert is called;
what a method makes of the parameters is in settings.py.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from freemerge import methods
from freemerge.errors import RecipeError, listed
from freemerge.recipe.flags import share_out
from freemerge.recipe.names import NAME, new_name, same_model
from freemerge.recipe.text import REMEDY, read_documents, to_text, without_empty
from freemerge.recipe.tokenizer import TokenizerChoice, tokenizer_choice, tokenizer_entry
from freemerge.schema import Document, ModelEntry, OutputModule, OutputSlice, parse


@dataclass(frozen=True)
class ExpertEntry:
    model: str  # folder, file or hub name
    name: str  # unique in the recipe, fit for a file name
    parameters: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Slice:
    """Layers of the result and where they come from; ranges are (first layer, the one after the last).

    Args:
        recipe: how they are merged, with parameters of the slice before those of the whole; its base is None where the
            method has no use for one.
        base_range: the base's layers.
        ranges: each expert's.
        parameters, base: what the slice says itself, where it does.
    """

    recipe: "Recipe"
    base_range: tuple[int, int] | None
    ranges: tuple[tuple[int, int], ...]
    parameters: dict[str, Any] = field(default_factory=dict)
    base: str | None = None

    @property
    def layers(self) -> int:
        first, stop = self.base_range or self.ranges[0]
        return stop - first


@dataclass(frozen=True)
class Module:
    """A part of the model, and how it is merged.

    Args:
        name: what the names of its tensors begin with; one of several may be called otherwise, and has all the rest.
        recipe: of models or slices, with the module's parameters before those of the whole.
        parameters: what the module says itself.
    """

    name: str
    recipe: "Recipe"
    parameters: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Recipe:
    """A merge as the user described it; `settings.check_recipe` says whether its method agrees.

    Values of `parameters` are as written: a scalar, a gradient (list of numbers), or a list of {filter, value};
    `settings.settings` resolves them for a tensor. With `slices` or `modules`, `experts` are all models in them but the
    base.
    """

    method: str
    base: str | None
    experts: tuple[ExpertEntry, ...]
    parameters: dict[str, Any] = field(default_factory=dict)
    dtype: np.dtype | None = None  # as in mergekit, of the result unless out_dtype is given
    out_dtype: np.dtype | None = None
    tokenizer: TokenizerChoice | None = None  # None copies the base's, and embeddings are merged as they are
    chat_template: str | None = None  # a Jinja text, the name of one, or "auto"; None is the tokenizer's own
    continue_from: str | None = None  # the output of an earlier merge, whose experts these come after
    keep_state: bool | None = None  # whether to leave what a later merge can continue from; None: if the method can
    slices: tuple[Slice, ...] = ()  # of layers, first to last
    modules: tuple[Module, ...] = ()
    _compiled: dict = field(default_factory=dict, init=False, repr=False, compare=False)  # of settings.py

    @property
    def models(self) -> list[str]:
        """All it names, the base first if there is one."""
        named = [self.base, *(expert.model for expert in self.experts)]
        return list(dict.fromkeys(model for model in named if model is not None))

    @classmethod
    def from_flags(
        cls,
        method: str,
        base: str | os.PathLike | None,
        experts: Sequence[str | os.PathLike] | Mapping[str, str | os.PathLike],
        parameters: Mapping[str, Any] | None = None,
        **others: Any,
    ) -> "Recipe":
        """The recipe of a call or a command line.

        Args:
            experts: paths or hub names, or a mapping of expert names to them.
            parameters: as in a recipe, and for a parameter each expert has its own of, also a mapping of expert names
                to values, or a list with one number for each expert.
            others: dtype, out_dtype, tokenizer_source, tokenizer, chat_template, continue_from, keep_state.

        Raises:
            RecipeError: with all problems found.
        """
        named = experts.items() if isinstance(experts, Mapping) else [(None, model) for model in experts]
        models = [{"model": os.fspath(model), "name": name, "parameters": {}} for name, model in named]
        shared, problems = share_out(method, dict(parameters or {}), models)
        if problems:
            raise RecipeError(listed(problems, "Correct the parameters."))
        content = {
            "merge_method": method,
            "base_model": None if base is None else os.fspath(base),
            "models": models,
            "parameters": shared,
            **{key: value for key, value in others.items() if value is not None},
        }
        return load_recipe(content)

    def overridden(self, parameters: Mapping[str, Any], dtype: str | None = None) -> "Recipe":
        """This recipe with some parameters, or the dtype of the result, changed; forms as for `from_flags`.

        A value for all experts also goes before what the recipe says for one of them.
        """
        aliases = methods.get(self.method).aliases
        given = {aliases.get(key, key) for key in parameters}
        for_all = {aliases.get(key, key) for key, value in parameters.items() if not isinstance(value, Mapping)}
        content = read_documents(self.to_yaml())[1][0]
        parts = list(_parts(content))
        models = [_entry(expert) for expert in self.experts]
        for entry in (*parts, *models):
            said = entry.get("parameters", {}).items()
            entry["parameters"] = {key: value for key, value in said if aliases.get(key, key) not in for_all}
        shared, problems = share_out(self.method, dict(parameters), models)
        in_parts = bool(self.slices or self.modules)
        if in_parts and any(entry["parameters"] for entry in models):
            said = "slices" if self.slices else "modules"
            problems.append(f"with {said} a parameter has one value for all experts; write others in the recipe")
        if problems:
            raise RecipeError(listed(problems, "Correct the parameters."))
        kept = {key: value for key, value in self.parameters.items() if aliases.get(key, key) not in given}
        changed = {**({} if in_parts else {"models": models}), "parameters": {**kept, **shared}}
        return load_recipe({**content, **changed, **({"out_dtype": dtype} if dtype else {})})

    def to_yaml(self) -> str:
        """The recipe in mergekit's YAML: equal recipes give equal text, and loading it gives this recipe again."""
        content = {
            "merge_method": self.method,
            "base_model": self.base,
            **_merged_entry(self),
            "modules": {module.name: _module_entry(module) for module in self.modules},
            "parameters": _sorted(self.parameters),
            "dtype": self.dtype and self.dtype.name,
            "out_dtype": self.out_dtype and self.out_dtype.name,
            **tokenizer_entry(self.tokenizer),
            "chat_template": self.chat_template,
            "continue_from": self.continue_from,
            "keep_state": self.keep_state,
        }
        return to_text(content)


def load_recipe(source: str | os.PathLike | Mapping[str, Any]) -> Recipe:
    """Read a recipe from a file, from YAML text, or from a mapping of the same shape.

    Raises:
        RecipeError: it cannot be read, or it says something that makes no sense; all problems at once.
    """
    label, documents = read_documents(source)
    if len(documents) > 1:
        raise RecipeError(
            f"{label}: holds {len(documents)} documents; they are merged as they stand, so write what is to change "
            "into them"
        )
    document, problems = parse(documents[0])
    recipe = recipe_of(document, problems) if document else None
    if problems:
        raise RecipeError(f"{label}: {listed(problems, REMEDY)}")
    return recipe


def recipe_of(document: Document, problems: list[str]) -> Recipe:
    """The recipe a checked document describes; what makes no sense in it is added to `problems`."""
    if list(document.modules) == ["default"]:  # mergekit's word for all of a model that has one module
        document = _of_module(document, document.modules["default"])
    if document.modules:
        return _modular(document, problems)
    if document.slices:
        return _sliced(document, problems)
    base = document.base_model
    # mergekit's recipes list the base among the models; a method that does not look at it takes it as one model more
    listed_base = base is not None and methods.get(document.merge_method).uses_base
    entries = [e for e in document.models if not (listed_base and same_model(e.model, base))]
    return _assembled(document, entries, problems)


def _sliced(document: Document, problems: list[str]) -> Recipe:
    slices = [_slice(piece, f"slices[{k}]", document, problems) for k, piece in enumerate(document.slices)]
    models = [entry["model"] for piece in slices for entry in _slice_entry(piece)["sources"]]
    return _assembled(document, _experts_among(models, document), problems, slices=tuple(slices))


def _modular(document: Document, problems: list[str]) -> Recipe:
    modules = []
    for name, entry in document.modules.items():
        of_whole = dict.fromkeys(("tokenizer", "tokenizer_source", "chat_template", "continue_from", "keep_state"))
        recipe = recipe_of(_of_module(document, entry).model_copy(update=of_whole), found := [])
        problems += [f"modules.{name}: {problem}" for problem in found]
        modules.append(Module(name, recipe, entry.parameters))
    models = [model for module in modules for model in module.recipe.models]
    return _assembled(document, _experts_among(models, document), problems, modules=tuple(modules))


def _of_module(document: Document, entry: OutputModule) -> Document:
    parameters = _before(entry.parameters, document.parameters, document.merge_method)
    changed = {"modules": {}, "models": entry.models, "slices": entry.slices, "parameters": parameters}
    return document.model_copy(update=changed)


def _experts_among(models: list[str], document: Document) -> list[ModelEntry]:
    base = document.base_model
    experts = dict.fromkeys(model for model in models if base is None or not same_model(model, base))
    return [ModelEntry(model=model) for model in experts]


def _assembled(document: Document, entries: list[ModelEntry], problems: list[str], **parts: tuple) -> Recipe:
    return Recipe(
        method=document.merge_method,
        base=document.base_model,
        experts=tuple(_named(entries, problems)),
        parameters=document.parameters,
        dtype=document.dtype,
        out_dtype=document.out_dtype,
        tokenizer=tokenizer_choice(document, [entry.model for entry in entries], problems),
        chat_template=document.chat_template,
        continue_from=document.continue_from,
        keep_state=document.keep_state,
        **parts,
    )


def _slice(piece: OutputSlice, where: str, document: Document, problems: list[str]) -> Slice:
    base = (piece.base_model or document.base_model) if methods.get(document.merge_method).uses_base else None
    of_base = [s for s in piece.sources if base is not None and same_model(s.model, base)]
    if base is not None and len(of_base) != 1:
        said = "twice among its sources" if of_base else "not among its sources; add it, with its layer_range"
        problems.append(f"{where}: base_model {base} is {said}")
    sources = [source for source in piece.sources if source not in of_base]
    entries = [ModelEntry(model=source.model, parameters=source.parameters) for source in sources]
    merged = Recipe(
        method=document.merge_method,
        base=base,
        experts=tuple(_named(entries, problems)),
        parameters=_before(piece.parameters, document.parameters, document.merge_method),
        dtype=document.dtype,
        out_dtype=document.out_dtype,
    )
    ranges = tuple(source.layer_range for source in sources)
    return Slice(merged, of_base[0].layer_range if of_base else None, ranges, piece.parameters, piece.base_model)


def _before(own: dict[str, Any], others: dict[str, Any], method: str) -> dict[str, Any]:
    """Parameters of which `own` are asked first; where a list of filters says nothing, the others are."""
    aliases = methods.get(method).aliases
    named = {aliases.get(key, key): value for key, value in others.items()}
    joined = {key: value for key, value in others.items() if aliases.get(key, key) not in _known(own, aliases)}
    for key, value in own.items():
        after = named.get(aliases.get(key, key))
        if after is not None and _has_filters(value):
            value = [*value, *(after if _has_filters(after) else [{"filter": "*", "value": after}])]
        joined[key] = value
    return joined


def _known(parameters: dict[str, Any], aliases: Mapping[str, str]) -> set[str]:
    return {aliases.get(key, key) for key in parameters}


def _has_filters(value: Any) -> bool:
    return isinstance(value, list) and any(isinstance(item, dict) for item in value)


def _named(entries: list[ModelEntry], problems: list[str]) -> list[ExpertEntry]:
    # names become file names: they differ without regard to case, and names that were asked for go first
    asked = [entry.name for entry in entries if entry.name is not None]
    taken = set()
    for name in asked:
        if not NAME.fullmatch(name):
            problems.append(f"name {name!r}: it becomes a file's name: letters, digits, '_', '-', and '.' not first")
        if name.lower() in taken:
            problems.append(f"name {name!r}: given to two experts")
        taken.add(name.lower())
    return [ExpertEntry(e.model, e.name or new_name(e.model, taken), e.parameters) for e in entries]


def _entry(expert: ExpertEntry) -> dict:
    return without_empty({"model": expert.model, "name": expert.name, "parameters": _sorted(expert.parameters)})


def _merged_entry(recipe: Recipe) -> dict:
    if recipe.modules:
        return {}
    if recipe.slices:
        return {"slices": [_slice_entry(piece) for piece in recipe.slices]}
    return {"models": [_entry(expert) for expert in recipe.experts]}


def _module_entry(module: Module) -> dict:
    return without_empty({**_merged_entry(module.recipe), "parameters": _sorted(module.parameters)})


def _parts(content: dict) -> Iterator[dict]:
    """Everything within plain data of a recipe, other than models of the whole, that may have parameters."""
    for piece in content.get("slices", ()):
        yield from (piece, *piece["sources"])
    for module in content.get("modules", {}).values():
        yield from (module, *module.get("models", ()))
        yield from _parts(module)


def _slice_entry(piece: Slice) -> dict:
    models = [{"model": expert.model, "parameters": _sorted(expert.parameters)} for expert in piece.recipe.experts]
    sources = [{**entry, "layer_range": list(layers)} for entry, layers in zip(models, piece.ranges, strict=True)]
    if piece.base_range:
        sources.insert(0, {"model": piece.recipe.base, "layer_range": list(piece.base_range)})
    own = {"base_model": piece.base, "parameters": _sorted(piece.parameters)}
    return without_empty({"sources": [without_empty(source) for source in sources], **own})


def _sorted(parameters: dict) -> dict:
    return dict(sorted(parameters.items()))

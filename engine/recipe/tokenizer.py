"""A recipe's `tokenizer`: whose tokens the result has, and rules for some of them."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from freemerge.recipe.names import same_model
from freemerge.recipe.text import without_empty
from freemerge.schema import Document, TokenEntry, TokenizerEntry, nearest


@dataclass(frozen=True)
class TokenRule:
    """Where models that lack a token, with `force` all models, have its row from.

    Args:
        text: the token.
        model: one of the recipe's; None for a row of zeros.
        token: that model's token whose row it is, or the row's number; None for the token itself.
    """

    text: str
    model: str | None
    token: str | int | None = None
    force: bool = False


@dataclass(frozen=True)
class TokenizerChoice:
    """The tokens of the result.

    Args:
        source: "base" (the base's, or without one those of the first model), "union" (those of all), one of the
            models as the recipe spells it, or another folder.
        tokens: rules for some of them; those that are new are added.
        pad_to_multiple_of: of which number of rows the embeddings have a multiple.
    """

    source: str
    tokens: dict[str, TokenRule] = field(default_factory=dict)
    pad_to_multiple_of: int | None = None


def tokenizer_choice(document: Document, experts: Sequence[str], problems: list[str]) -> TokenizerChoice | None:
    """What a checked document says of it; what makes no sense in it is added to `problems`.

    Args:
        experts: the models that are merged, beside the base.
    """
    if document.tokenizer and document.tokenizer_source:
        problems.append("tokenizer_source and tokenizer: both are given; keep one")
    if document.tokenizer is None and document.tokenizer_source is None:
        return None
    entry = document.tokenizer or TokenizerEntry(source=document.tokenizer_source)
    models = list(dict.fromkeys(model for model in (document.base_model, *experts) if model is not None))
    source = next((model for model in models if same_model(model, entry.source)), entry.source)
    if source not in ("base", "union", *models) and not os.path.isdir(os.path.expanduser(source)):
        known = nearest(source, {"base", "union", *models})
        problems.append(f"tokenizer: source {source} is none of the models, and no folder{known}")
    rules = {text: _rule(text, rule, models, problems) for text, rule in entry.tokens.items()}
    return TokenizerChoice(source, rules, entry.pad_to_multiple_of)


def _rule(text: str, entry: TokenEntry, models: list[str], problems: list[str]) -> TokenRule:
    model, token = entry.source
    known = next((known for known in models if model is not None and same_model(model, known)), None)
    if model is not None and known is None:
        hint = "; a row of zeros is {kind: zero}" if model == "zero" else nearest(model, models)
        problems.append(f"tokenizer.tokens.{text}: source {model} is none of the models{hint}")
    return TokenRule(text, known, token, entry.force)


def tokenizer_entry(choice: TokenizerChoice | None) -> dict:
    """The keys of a recipe that say it."""
    if choice is None:
        return {}
    if not choice.tokens and choice.pad_to_multiple_of is None:
        return {"tokenizer_source": choice.source}
    rules = {text: _rule_entry(rule) for text, rule in choice.tokens.items()}
    padding = choice.pad_to_multiple_of
    return {"tokenizer": without_empty({"source": choice.source, "tokens": rules, "pad_to_multiple_of": padding})}


def _rule_entry(rule: TokenRule) -> dict:
    source: Any = rule.model
    if rule.model is None:
        source = {"kind": "zero"}
    elif rule.token is not None:
        key = "token_id" if isinstance(rule.token, int) else "token"
        source = {"kind": "model_token", "model": rule.model, key: rule.token}
    return {"source": source, **({"force": True} if rule.force else {})}

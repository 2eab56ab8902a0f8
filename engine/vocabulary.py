"""The tokens of a result, and every model's embeddings with their rows in that order, those it lacks filled in.

Source of the rules: mergekit's documentation of `tokenizer`, and what mergekit 0.1.5 writes.
"""

import copy
import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from freemerge.checkpoint.header import TensorInfo
from freemerge.checkpoint.rows import AVERAGE, MEAN, ZERO, Rows, RowsView
from freemerge.checkpoint.tokenizer import Tokenizer, read_tokenizer
from freemerge.errors import InputError, PlanError, gathered, listed
from freemerge.recipe import Recipe
from freemerge.recipe.tokenizer import TokenRule
from freemerge.settings import config_parts
from freemerge.token_tensors import called, token_rows, token_tensors

_REMEDY = "docs/recipe.md, Tokenizers, says what is done with vocabularies."


@dataclass(frozen=True)
class Vocabulary:
    """What a recipe's tokenizer means for its models.

    Attributes:
        tokenizer: of the result.
        size: rows of its embeddings, padding included.
        rows: for each model int64 [size]: its row of each token, -1 where it has none.
        rules: those of the recipe, by the token's id.
        base: the model whose rows fill gaps before others do.
        models: names to open models; `vocabs`: to their tokens.
        warnings: for people.
    """

    tokenizer: Tokenizer
    size: int
    rows: Mapping[str, np.ndarray]
    rules: Mapping[int, TokenRule]
    base: str | None
    models: Mapping[str, Any]
    vocabs: Mapping[str, Mapping[str, int]]
    warnings: tuple[str, ...] = ()

    @cached_property
    def fingerprint(self) -> str:
        """Changes with anything that could change a byte of the result."""
        found = hashlib.blake2b(digest_size=16)
        found.update(repr(sorted(self.tokenizer.vocab.items())).encode())
        for name, rows in sorted(self.rows.items()):
            found.update(name.encode() + rows.tobytes())
        return found.hexdigest()

    def config(self, config: dict | None) -> dict | None:
        """A model's configuration with the size of this vocabulary."""
        config = copy.deepcopy(config)
        saying = [part for part in config_parts(config) if "vocab_size" in part] or config_parts(config)[:1]
        for part in saying:
            part["vocab_size"] = self.size
        return config

    def shapes(self, checkpoint) -> dict[str, TensorInfo]:
        """The headers of a model as `aligned` would have them."""
        sized = {name for model in self.models.values() for name in token_tensors(model)}
        return {
            name: replace(info, shape=(self.size, *info.shape[1:])) if name in sized else info
            for name, info in checkpoint.tensors.items()
        }

    def aligned(self, group: Sequence[tuple[str, Any]], base: str | None = None) -> list[Any]:
        """Checkpoints that are merged with each other, with rows for the tokens of this vocabulary.

        Args:
            group: (model, the checkpoint or a view of it, with what is outside the layers under its own names).
            base: the model among them that fills gaps before others do; `self.base` if not given.

        Raises:
            PlanError: a rule asks for a row of a model that is not in the group, or has none.
        """
        models = list(dict.fromkeys(model for model, _ in group))
        checkpoints = {model: self.models[model] for model in models}
        holding = {model: token_tensors(checkpoints[model]) for model in models}
        rows: dict[str, dict[str, Rows]] = {model: {} for model in models}
        problems: list[str] = []
        present = {name for _, view in group for name in view.tensors}
        for name in dict.fromkeys(name for names in holding.values() for name in names if name in present):
            theirs = {model: called(name, checkpoints[model], holding[model]) for model in models}
            taking_part = [model for model in models if theirs[model] is not None]
            fill = _Fill(self, taking_part, base or self.base)
            problems += fill.problems
            sources = [(checkpoints[model], theirs[model]) for model in taking_part]
            for k, model in enumerate(taking_part):
                if name in holding[model]:
                    rows[model][name] = fill.rows(k, sources)
        if problems:
            raise PlanError(listed(dict.fromkeys(problems), _REMEDY))
        return [
            RowsView(view, {n: r for n, r in rows[m].items() if n in view.tensors}, self.config(view.config))
            for m, view in group
        ]


class _Fill:
    """The rows of one tensor for a group of models."""

    def __init__(self, vocabulary: Vocabulary, models: list[str], base: str | None):
        self._models, self.problems = models, []
        size = vocabulary.size
        self._rows = np.stack([vocabulary.rows[model] for model in models])
        has = self._rows >= 0
        count = has.sum(0)
        owner = np.where(count == 0, ZERO, np.where(count == 1, has.argmax(0), AVERAGE)).astype(np.int16)
        if base in models:
            owner[has[models.index(base)] & (count > 1)] = models.index(base)
        self._forced = np.zeros(size, bool)
        row = np.where(owner >= 0, self._rows[np.maximum(owner, 0), np.arange(size)], 0)
        for number, rule in vocabulary.rules.items():
            self._forced[number] = rule.force
            if rule.force or not has[:, number].all():
                owner[number], row[number] = self._ruled(vocabulary, number, rule)
        known = np.zeros(size, bool)
        known[list(vocabulary.tokenizer.vocab.values())] = True
        owner[~known] = MEAN
        self._owner, self._row = owner, row

    def rows(self, k: int, sources: Sequence[tuple[Any, str]]) -> Rows:
        """Of the model at place k."""
        own = (self._rows[k] >= 0) & ~self._forced & (self._owner != MEAN)
        owner = np.where(own, k, self._owner).astype(np.int16)
        row = np.where(own, self._rows[k], self._row)
        averaged = np.flatnonzero(owner == AVERAGE)
        averages = {
            int(i): [(j, int(self._rows[j, i])) for j in np.flatnonzero(self._rows[:, i] >= 0)] for i in averaged
        }
        return Rows(sources, owner, row, averages)

    def _ruled(self, vocabulary: Vocabulary, number: int, rule: TokenRule) -> tuple[int, int]:
        if rule.model is None:
            return ZERO, 0
        where = f"tokenizer.tokens.{rule.text}: {rule.model}"
        if rule.model not in self._models:
            self.problems.append(f"{where} is not merged where the token's row is due; name one of the models there")
            return ZERO, 0
        k, rows = self._models.index(rule.model), token_rows(vocabulary.models[rule.model])
        vocab = vocabulary.vocabs[rule.model]
        token = rule.text if rule.token is None else rule.token
        found = token if isinstance(token, int) else vocab.get(token)
        if found is None or found < 0 or found >= rows:
            said = f"id {found} is not in it" if found is not None else f"has no token {token!r}"
            self.problems.append(f"{where}: {said}; it has {rows} rows")
            return ZERO, 0
        return k, found


def plan_vocabulary(recipe: Recipe, models: Mapping[str, Any]) -> Vocabulary:
    """What the recipe's tokenizer means for these open models.

    Raises:
        PlanError: models have no tokenizer or no embeddings; all problems at once.
    """
    choice, first = recipe.tokenizer, recipe.models[0]
    used = {model: models[model] for model in recipe.models}
    found, problems = _tokenizers(used), []
    counts = {model: token_rows(checkpoint) for model, checkpoint in used.items()}
    problems += [f"{models[m].label}: no embedding, so no rows for tokens" for m, rows in counts.items() if not rows]
    source = choice.source if choice.source not in ("base", "union") else first
    if source not in found:
        found[source], said = _elsewhere(source)
        problems += said
    if found[source] is None:
        problems.append(f"tokenizer: {source} has no tokenizer.json; leave the tokenizer out, or name another model")
    if found[first] is None:
        problems.append(f"{first}: has no tokenizer.json, which says what the rows of its embedding mean")
    if problems:
        raise PlanError(listed(dict.fromkeys(problems), _REMEDY))
    lacking = [model for model in used if found[model] is None]
    warnings = [f"{models[m].label} has no tokenizer; its tokens are taken to be those of {first}" for m in lacking]
    known = {model: found[model] or found[first] for model in used}
    made = found[source].below(counts.get(source, len(found[source].vocab)))
    if choice.source == "union":
        made = _union(made, [known[model].below(counts[model]) for model in used if model != first])
    made = made.with_tokens({"content": text} for text in choice.tokens)
    return _assembled(recipe, made, used, {m: tokenizer.vocab for m, tokenizer in known.items()}, counts, warnings)


def _tokenizers(models: Mapping[str, Any]) -> dict[str, Tokenizer | None]:
    found, errors = {}, []
    for model, checkpoint in models.items():
        try:
            found[model] = checkpoint.tokenizer()
        except InputError as error:
            errors.append(error)
    if errors:
        raise PlanError(gathered(errors))
    return found


def _elsewhere(folder: str) -> tuple[Tokenizer | None, list[str]]:
    """The tokenizer of a folder that is none of the models."""
    place = Path(os.path.expanduser(folder))
    return (read_tokenizer(place), []) if place.is_dir() else (None, [f"tokenizer: there is no folder {folder}"])


def _union(tokenizer: Tokenizer, others: Sequence[Tokenizer]) -> Tokenizer:
    """With the tokens of other models: first the plain ones, then those added with settings, in the order of ids."""
    added = {token["content"] for other in others for token in other.added}
    plain = [t for other in others for t, _ in sorted(other.vocab.items(), key=lambda item: item[1]) if t not in added]
    missing = [{"content": token} for token in dict.fromkeys(plain) if token not in tokenizer.vocab]
    return tokenizer.with_tokens(missing).with_tokens(token for other in others for token in other.added)


def _assembled(
    recipe: Recipe,
    tokenizer: Tokenizer,
    models: Mapping[str, Any],
    vocabs: Mapping[str, Mapping[str, int]],
    counts: Mapping[str, int],
    warnings: Sequence[str],
) -> Vocabulary:
    step = recipe.tokenizer.pad_to_multiple_of or 1
    size = -(-(max(tokenizer.vocab.values(), default=-1) + 1) // step) * step
    rows = {}
    for model, vocab in vocabs.items():
        rows[model] = places = np.full(size, -1, np.int64)
        for token, number in tokenizer.vocab.items():
            if vocab.get(token, counts[model]) < counts[model]:
                places[number] = vocab[token]
    rules = {tokenizer.vocab[text]: rule for text, rule in recipe.tokenizer.tokens.items()}
    return Vocabulary(tokenizer, size, rows, rules, recipe.base, models, vocabs, tuple(warnings))

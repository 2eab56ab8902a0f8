"""A model's tokenizer as data: its vocabulary, and the same tokenizer with tokens more or less, written beside weights.

tokenizer.json says all of it, so no library is needed; only where there is none, transformers makes it.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from freemerge.checkpoint import files
from freemerge.checkpoint.writer import write_file
from freemerge.errors import CheckpointError, UnavailableError

PREFIXES = (
    "tokenizer",
    "vocab",
    "merges",
    "special_tokens",
    "added_tokens",
    "chat_template",
    "spiece",
    "sentencepiece",
)
_OLDER = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.json", "vocab.txt")
_CONFIGS = ("tokenizer_config.json", "special_tokens_map.json")
_REMEDY = "Write tokenizer.json anew with AutoTokenizer.from_pretrained(MODEL).save_pretrained(MODEL)."


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer, perhaps changed since it was read.

    Attributes:
        folder: where its files lie.
        data: tokenizer.json.
        configs: tokenizer_config.json and special_tokens_map.json, those there are.
        changed: whether its tokens are others than those in the folder.
    """

    folder: Path
    data: Mapping[str, Any]
    configs: Mapping[str, Mapping[str, Any]]
    changed: bool = False

    @cached_property
    def vocab(self) -> dict[str, int]:
        """Every token's id."""
        return self._model_vocab | {token["content"]: token["id"] for token in self.added}

    @property
    def added(self) -> list[dict[str, Any]]:
        """The tokens found in a text before the model sees it, with their settings."""
        return self.data.get("added_tokens") or []

    @cached_property
    def _model_vocab(self) -> dict[str, int]:
        vocab = self.data["model"]["vocab"]
        return dict(vocab) if isinstance(vocab, dict) else {piece: i for i, (piece, *_) in enumerate(vocab)}

    def with_tokens(self, tokens: Iterable[Mapping[str, Any]]) -> "Tokenizer":
        """With tokens added that are not added yet, under the ids that follow; one the model knows keeps its id.

        Args:
            tokens: as in `added`; only `content` has to be there.
        """
        added, known = list(self.added), {token["content"] for token in self.added}
        following = max(self.vocab.values(), default=-1) + 1
        for token in tokens:
            if token["content"] in known:
                continue
            number = self._model_vocab.get(token["content"], following)
            following = max(following, number + 1)
            known.add(token["content"])
            added.append(_entry(token, number))
        if len(added) == len(self.added):
            return self
        return replace(self, data={**self.data, "added_tokens": added}, changed=True)

    def below(self, rows: int) -> "Tokenizer":
        """Without the tokens whose ids no embedding of so many rows has."""
        gone = {token for token, number in self.vocab.items() if number >= rows}
        if not gone:
            return self
        added = [token for token in self.added if token["content"] not in gone]
        data = {**self.data, "added_tokens": added, "model": _model_without(self.data["model"], gone)}
        configs = {name: _config_without(config, gone) for name, config in self.configs.items()}
        return replace(self, data=data, configs=configs, changed=True)

    def write(self, folder: Path) -> None:
        """Write it into `folder`: its files as they are, or where it has changed, those that say all of it."""
        for path in files.side_files(self.folder):
            name = path.name
            copied = not self.changed or name.startswith("chat_template")
            if name.startswith(PREFIXES) and copied:
                write_file(folder / name, path.read_bytes())
        if self.changed:
            write_file(folder / "tokenizer.json", _encoded(self.data))
            for name, config in self.configs.items():
                write_file(folder / name, _encoded(self._with_added(config)))

    def _with_added(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """A tokenizer_config.json that repeats the added tokens repeats those there are now."""
        if "added_tokens_decoder" not in config:
            return dict(config)
        return {**config, "added_tokens_decoder": {str(token["id"]): _settings(token) for token in self.added}}


def read_tokenizer(folder: Path) -> Tokenizer | None:
    """The tokenizer in a model's folder, None where there is none.

    Special tokens that only its configuration names are added, as transformers adds them when it loads it.

    Raises:
        CheckpointError: its files cannot be read, or are of no kind known here.
        UnavailableError: there is no tokenizer.json, and no transformers to make it from the older files.
    """
    path = folder / "tokenizer.json"
    if path.exists():
        data = _read(path)
    elif any((folder / name).exists() for name in _OLDER):
        data = _converted(folder)
    else:
        return None
    configs = {name: _read(folder / name) for name in _CONFIGS if (folder / name).exists()}
    vocab = data.get("model", {}).get("vocab") if isinstance(data.get("model"), dict) else None
    if not isinstance(vocab, (dict, list)):
        raise CheckpointError(f"{path}: says no vocabulary. {_REMEDY}")
    found = Tokenizer(folder, data, configs)
    completed = found.with_tokens(_named_in(configs, found.vocab))
    return found if len(completed.vocab) == len(found.vocab) else completed


def read_chat_template(folder: Path) -> str | None:
    """The chat template of the model in `folder`, the one called "default" where it has several."""
    path = folder / "chat_template.jinja"
    if path.exists():
        return path.read_text("utf-8")
    for name in ("tokenizer_config.json", "chat_template.json"):
        path = folder / name
        template = _read(path).get("chat_template") if path.exists() else None
        if isinstance(template, list):
            template = {item["name"]: item["template"] for item in template}.get("default")
        if template:
            return template
    return None


def write_chat_template(folder: Path, template: str) -> None:
    """Make `template` the chat template of the model in `folder`: what newer and older programs read."""
    write_file(folder / "chat_template.jinja", template.encode())
    path = folder / "tokenizer_config.json"
    if path.exists():
        write_file(path, _encoded({**_read(path), "chat_template": template}))


def _entry(token: Mapping[str, Any], number: int) -> dict[str, Any]:
    special = token.get("special", False)
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": not special, "special": special}
    return {"id": number, **_settings(plain | dict(token))}


def _settings(token: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in token.items() if key not in ("id", "__type")}


def _named_in(configs: Mapping[str, Mapping[str, Any]], vocab: Mapping[str, int]) -> list[dict[str, Any]]:
    """The tokens that configurations name and the vocabulary lacks."""
    config = configs.get("tokenizer_config.json", {})
    decoder = config.get("added_tokens_decoder") or {}
    found = [dict(decoder[number]) for number in sorted(decoder, key=int)]
    for part in configs.values():
        found += [_special(value) for key, value in part.items() if key.endswith("_token") and value]
        found += [_special(value) for value in part.get("additional_special_tokens") or ()]
    return [token for token in found if token["content"] not in vocab]


def _special(token: str | Mapping[str, Any]) -> dict[str, Any]:
    return {"special": True, **({"content": token} if isinstance(token, str) else token)}


def _model_without(model: Mapping[str, Any], gone: set[str]) -> dict[str, Any]:
    vocab = model["vocab"]
    if isinstance(vocab, list):  # ids are places, and those without a row are the last
        return {**model, "vocab": [piece for piece in vocab if piece[0] not in gone]}
    left = {**model, "vocab": {token: number for token, number in vocab.items() if token not in gone}}
    if "merges" in model:
        pairs = [(merge, merge.split(" ") if isinstance(merge, str) else merge) for merge in model["merges"]]
        left["merges"] = [merge for merge, pair in pairs if not gone & {*pair, "".join(pair)}]
    return left


def _config_without(config: Mapping[str, Any], gone: set[str]) -> dict[str, Any]:
    def names(value: Any) -> bool:
        return (value.get("content") if isinstance(value, dict) else value) in gone

    left = {key: value for key, value in config.items() if not (key.endswith("_token") and names(value))}
    several = "additional_special_tokens"
    return left | ({several: [value for value in left[several] if not names(value)]} if left.get(several) else {})


def _converted(folder: Path) -> dict[str, Any]:
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        problem = f"{folder}: has no tokenizer.json, and only transformers reads its older files ({error})"
        raise UnavailableError(f"{problem}; pip install transformers, or fetch tokenizer.json") from None
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        return json.loads(tokenizer.backend_tokenizer.to_str())
    except Exception as error:  # whatever a converter stumbles over
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{folder}: its tokenizer cannot be brought into tokenizer.json: {reason}") from None


def _read(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {str(error)[:200]}. {_REMEDY}") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} is not a map. {_REMEDY}")
    return data


def _encoded(data: Mapping[str, Any]) -> bytes:
    return (json.dumps(data, indent=2, ensure_ascii=False) + "\n").encode()

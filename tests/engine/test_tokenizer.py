"""Tokenizers as data: what is read, changed and written is what transformers reads, adds and finds again."""

import json
import sys

import pytest

from freemerge.checkpoint.tokenizer import (
    Tokenizer,
    read_chat_template,
    read_tokenizer,
    write_chat_template,
)
from freemerge.errors import CheckpointError, UnavailableError
from freemerge.testing import tiny_tokenizer

WORDS = ["ab", "abc", "th", "the"]


def write(folder, words=WORDS, added=("<|end|>",), template=None, **config):
    folder.mkdir(exist_ok=True)
    found = tiny_tokenizer(words, added, template)
    repeated = {str(token["id"]): token for token in found["tokenizer.json"]["added_tokens"]}
    found["tokenizer_config.json"] |= {"added_tokens_decoder": repeated} | config
    for name, data in found.items():
        (folder / name).write_text(json.dumps(data))
    return folder


def loaded(folder):
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(folder)


def test_the_vocabulary_is_the_one_transformers_loads(tmp_path):
    tokenizer = read_tokenizer(write(tmp_path / "a", pad_token="<pad>", additional_special_tokens=["<|x|>", "ab"]))
    assert tokenizer.vocab == loaded(tmp_path / "a").get_vocab()
    assert tokenizer.changed  # <pad> and <|x|> are in no vocabulary but that of the configuration
    assert not read_tokenizer(write(tmp_path / "b")).changed


@pytest.mark.parametrize("name", ["PreTrainedTokenizerFast", "LlamaTokenizerFast"])
def test_tokens_added_have_the_ids_transformers_gives_them(tmp_path, name):
    folder = write(tmp_path / "a", tokenizer_class=name)
    special = {"content": "<|s|>", "special": True, "normalized": False}
    ours = read_tokenizer(folder).with_tokens([{"content": "xyz"}, special, {"content": "ab"}, {"content": "<s>"}])
    (tmp_path / "out").mkdir()
    ours.write(tmp_path / "out")
    theirs = loaded(folder)
    theirs.add_tokens(["xyz"])
    theirs.add_tokens(["<|s|>"], special_tokens=True)
    theirs.add_tokens(["ab", "<s>"])
    found = loaded(tmp_path / "out")
    assert ours.vocab == found.get_vocab() == theirs.get_vocab()
    for text in ("the xyz abc <|s|>", "abxyz</s>", "xyzxyz th"):
        assert found(text).input_ids == theirs(text).input_ids
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["tokenizer.json", "tokenizer_config.json"]
    decoder = json.loads((tmp_path / "out/tokenizer_config.json").read_text())["added_tokens_decoder"]
    assert decoder[str(ours.vocab["xyz"])]["content"] == "xyz"


def test_nothing_new_leaves_it_and_its_files_as_they_are(tmp_path):
    folder = write(tmp_path / "a")
    (folder / "tokenizer.model").write_bytes(b"\x00model")
    tokenizer = read_tokenizer(folder)
    assert tokenizer.with_tokens([{"content": "<s>"}]) is tokenizer
    assert tokenizer.below(1000) is tokenizer
    (tmp_path / "out").mkdir()
    tokenizer.write(tmp_path / "out")
    for path in folder.iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()


def test_tokens_without_a_row_go_with_their_merges_and_settings(tmp_path):
    folder = write(tmp_path / "a", pad_token="<|end|>", additional_special_tokens=["<|end|>", "<s>"])
    tokenizer = read_tokenizer(folder)
    left = tokenizer.below(tokenizer.vocab["the"])
    assert tokenizer.vocab.keys() - left.vocab.keys() == {"the", "<|end|>"}
    assert ["th", "e"] not in left.data["model"]["merges"]
    assert ["t", "h"] in left.data["model"]["merges"]
    (tmp_path / "out").mkdir()
    left.write(tmp_path / "out")
    found = loaded(tmp_path / "out")
    assert found.get_vocab() == left.vocab
    assert found.tokenize("the abc") == ["th", "e", "abc"]
    assert json.loads((tmp_path / "out/tokenizer_config.json").read_text())["additional_special_tokens"] == ["<s>"]


def test_other_kinds_of_models(tmp_path):
    unigram = Tokenizer(tmp_path, {"model": {"vocab": [["<unk>", 0.0], ["a", -1.0], ["b", -2.0]]}}, {})
    assert unigram.vocab == {"<unk>": 0, "a": 1, "b": 2}
    assert unigram.below(2).vocab == {"<unk>": 0, "a": 1}
    words = Tokenizer(tmp_path, {"model": {"vocab": {"a": 0, "b": 1}}, "added_tokens": []}, {})
    assert words.below(1).vocab == {"a": 0}
    merges = Tokenizer(tmp_path, {"model": {"vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]}}, {})
    assert merges.below(2).data["model"]["merges"] == []


def test_no_files_are_no_tokenizer(tmp_path):
    assert read_tokenizer(tmp_path) is None
    assert read_chat_template(tmp_path) is None


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"model": {"vocab": 3}}'])
def test_a_broken_file_is_named_with_what_to_do(tmp_path, text):
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json.*AutoTokenizer"):
        read_tokenizer(tmp_path)


def test_older_files_go_through_transformers(tmp_path, monkeypatch):
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "ab", "##c"]))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    pytest.importorskip("transformers")
    assert read_tokenizer(tmp_path).vocab["##c"] == 6
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UnavailableError, match=r"pip install transformers, or fetch tokenizer\.json"):
        read_tokenizer(tmp_path)
    monkeypatch.undo()
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "NoSuchTokenizer"}')
    (tmp_path / "vocab.txt").rename(tmp_path / "vocab.json")
    with pytest.raises(CheckpointError, match=r"cannot be brought into tokenizer\.json"):
        read_tokenizer(tmp_path)


def test_a_chat_template_is_read_from_wherever_it_stands(tmp_path):
    write(tmp_path / "a", template="{{ 'config' }}")
    assert read_chat_template(tmp_path / "a") == "{{ 'config' }}"
    several = [{"name": "rag", "template": "r"}, {"name": "default", "template": "d"}]
    assert read_chat_template(write(tmp_path / "b", chat_template=several)) == "d"
    (tmp_path / "b/chat_template.jinja").write_text("{{ 'file' }}")
    assert read_chat_template(tmp_path / "b") == "{{ 'file' }}"
    (tmp_path / "c").mkdir()
    (tmp_path / "c/chat_template.json").write_text('{"chat_template": "j"}')
    assert read_chat_template(tmp_path / "c") == "j"


def test_a_chat_template_is_written_where_any_reader_looks(tmp_path):
    folder = write(tmp_path / "a", template="{{ 'before' }}")
    write_chat_template(folder, "{{ 'after' }}")
    assert (folder / "chat_template.jinja").read_text() == "{{ 'after' }}"
    assert json.loads((folder / "tokenizer_config.json").read_text())["chat_template"] == "{{ 'after' }}"
    assert loaded(folder).chat_template == "{{ 'after' }}"

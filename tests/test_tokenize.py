"""Tokenising: nothing is lost, faults are told, and a learnt vocabulary is always the same."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest

from distilbert_jax.data import tokenize
from distilbert_jax.errors import UserError

tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")

VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcde", *(f"##{c}" for c in "abcde")]
TEXTS = ["The quick brown fox jumps over the lazy dog.", "A quicker dog; the laziest foxes!"] * 3


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    return tmp_path


def pieces(tokenizer, documents, length):
    """The pieces of documents, as lists."""
    spec = tokenize.spec(tokenizer)
    ids, sizes = tokenize.cut(*tokenize.TextEncoder(spec)(documents), length, spec)
    assert ids.dtype == spec.dtype and sizes.sum() == len(ids)
    return [piece.tolist() for piece in np.split(ids, sizes.cumsum()[:-1])] if len(sizes) else []


def test_folder_with_vocab_and_config_only(folder):
    tokenizer = tokenize.load_tokenizer(str(folder), len(VOCABULARY))
    assert tokenizer.get_vocab() == {token: i for i, token in enumerate(VOCABULARY)}


def test_wrong_size_gives_both_numbers(folder):
    with pytest.raises(UserError, match="has 15 tokens, the model 14"):
        tokenize.load_tokenizer(str(folder), 14)
    assert len(tokenize.load_tokenizer(str(folder), 16)) == 15  # a model may have spare rows


def test_folder_without_vocabulary(folder):
    (folder / "vocab.txt").unlink()
    with pytest.raises(UserError, match="all of them special"):
        tokenize.load_tokenizer(str(folder), None)


@pytest.mark.parametrize("content", [None, "{"])
def test_no_tokenizer_is_one_line(tmp_path, content):
    if content:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match="no tokenizer in ") as caught:
        tokenize.load_tokenizer(str(tmp_path), None)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_missing_special_token(tmp_path):
    backend = tokenize.train_wordpiece(TEXTS, 100).backend_tokenizer
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, cls_token="[CLS]", pad_token="[PAD]").save_pretrained(tmp_path)
    with pytest.raises(UserError, match="has no sep, mask token"):
        tokenize.load_tokenizer(str(tmp_path), None)


@pytest.mark.parametrize("name", ["rxn-bert", "minilm-l6"])
def test_real_tokenizers(shared, name):
    size = json.loads((shared / name / "config.json").read_text())["vocab_size"]
    tokenizer = tokenize.load_tokenizer(str(shared / name), size)
    text = "CCO.CC(=O)O>>CC(=O)OCC " * 100
    whole = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(whole) > 512  # neither cut nor padded
    cut = pieces(tokenizer, [text], 128)
    assert [token for piece in cut for token in piece[1:-1]] == whole


def test_fingerprint_ignores_truncation_only(shared, tmp_path):
    tokenizer = transformers.AutoTokenizer.from_pretrained(shared / "minilm-l6")
    assert tokenizer.backend_tokenizer.truncation
    loaded = tokenize.load_tokenizer(str(shared / "minilm-l6"), None)
    assert tokenize.spec(loaded).fingerprint == tokenize.spec(tokenizer).fingerprint
    for name in ("vocab.txt", "config.json"):
        shutil.copy(shared / "minilm-l6" / name, tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    cased = tokenize.load_tokenizer(str(tmp_path), None)
    assert tokenize.spec(cased).fingerprint != tokenize.spec(loaded).fingerprint


def test_pieces_lose_nothing():
    tokenizer = tokenize.train_wordpiece(TEXTS, 200)
    documents = [*TEXTS, "the " * 50, " ", "dog"]
    for length in (3, 8, 512):
        found = pieces(tokenizer, documents, length)
        cls, sep = tokenizer.cls_token_id, tokenizer.sep_token_id
        expected = []
        for document in documents:
            ids = tokenizer.encode(document, add_special_tokens=False)
            expected += [[cls, *ids[i:i + length - 2], sep]
                         for i in range(0, len(ids), length - 2)]
        assert found == expected
    assert tokenize.spec(tokenizer).dtype == np.uint8


def test_words_are_looked_up_only_where_that_gives_the_same():
    """Of BERT's own tokenizers, unless an added token may reach over a space."""
    tokenizer = tokenize.train_wordpiece(TEXTS, 200)
    assert tokenize.TextEncoder(tokenize.spec(tokenizer))._by_words
    tokenizer.add_tokens(["lazy dog"])
    assert not tokenize.TextEncoder(tokenize.spec(tokenizer))._by_words
    (piece,) = pieces(tokenizer, ["the lazy dog"], 64)
    assert piece[-2] == tokenizer.convert_tokens_to_ids("lazy dog")


def test_special_tokens_in_text_are_ordinary_text():
    tokenizer = tokenize.train_wordpiece([*TEXTS, "[sep] [mask]"], 200)
    (piece,) = pieces(tokenizer, ["dog [SEP] [MASK]"], 64)
    assert not set(piece[1:-1]) & set(tokenizer.all_special_ids)
    assert tokenizer.encode("[MASK]", add_special_tokens=False) == [tokenizer.mask_token_id]


def test_batches_respect_the_limit(monkeypatch):
    monkeypatch.setattr(tokenize, "BATCH_CHARACTERS", 10)
    assert list(tokenize._batches(["aaaa"] * 7)) == [["aaaa"] * 3, ["aaaa"] * 3, ["aaaa"]]


def test_learnt_vocabulary(tmp_path):
    tokenizer = tokenize.train_wordpiece(TEXTS, 90)
    assert tokenizer.convert_ids_to_tokens(range(5)) == list(tokenize.SPECIAL_TOKENS)
    assert len(tokenizer) <= 90
    assert tokenizer.tokenize("THE  dog dög") == ["the", "dog", "[UNK]"]
    tokenizer.model_max_length = 33
    tokenizer.save_pretrained(tmp_path)
    again = tokenize.load_tokenizer(str(tmp_path), len(tokenizer))
    assert tokenize.spec(again).fingerprint == tokenize.spec(tokenizer).fingerprint
    assert again.model_max_length == 33


def test_learnt_vocabulary_never_exceeds_what_was_asked():
    documents = [" ".join(chr(c) for c in range(0x4E00, 0x4E00 + 500)), "aaa bbb aaa"]
    assert len(tokenize.train_wordpiece(documents, 20)) <= 20


def test_learnt_vocabulary_is_the_same_in_another_process():
    texts = ["abcd bcda cdab dabc " * 3, "many words tie here and none is common"]
    code = ("from distilbert_jax.data import tokenize\n"
            f"print(tokenize.spec(tokenize.train_wordpiece({texts!r}, 40)).fingerprint)")
    other = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    here = tokenize.spec(tokenize.train_wordpiece(texts, 40))
    assert other.stdout.strip() == here.fingerprint


def test_no_words():
    for documents, vocab_size in (([" ", ""], 100), (["abcdef"], 10)):
        with pytest.raises(UserError, match=f"a vocabulary of {vocab_size}: .* no words, or none"):
            tokenize.train_wordpiece(documents, vocab_size)


def test_added_special_tokens_in_text_are_found(tmp_path):
    """As the teacher's own tokenizer finds them; [MASK] and its like stay ordinary text."""
    tokenizer = tokenize.train_wordpiece(TEXTS, 200)
    tokenizer.add_special_tokens({"additional_special_tokens": ["[E1]", "[/E1]"]})
    text = "the [E1] dog[/E1] the"
    (piece,) = pieces(tokenizer, [text], 64)
    assert piece == tokenizer(text)["input_ids"]
    (piece,) = pieces(tokenizer, ["[E1] [MASK]"], 64)
    assert tokenizer.mask_token_id not in piece
    assert tokenizer.convert_tokens_to_ids("[E1]") in piece


@pytest.mark.parametrize("lowercase", [True, False])
def test_a_learnt_vocabulary_keeps_accents_and_syllables(lowercase):
    text = "서울은 대한민국의 수도이다 möchte mochte naïve"
    tokenizer = tokenize.train_wordpiece([text] * 30, 300, lowercase)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert len(set(map(tuple, (tokenizer.encode(w) for w in ("möchte", "mochte"))))) == 2
    upper = tokenize.train_wordpiece(["Ab ab"] * 30, 100, lowercase).tokenize("Ab ab")
    assert (upper[0] == upper[-1]) == lowercase


@pytest.mark.parametrize("absent", ["[UNK]", "[MASK]"])
def test_a_special_token_must_be_in_the_vocabulary(absent, toy, tmp_path):
    """transformers would add it at the end, as a token that the model does not have."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "ba", "be"]
    (tmp_path / "vocab.txt").write_text("".join(f"{w}\n" for w in words if w != absent))
    shutil.copy(toy / "teacher" / "config.json", tmp_path)
    with pytest.raises(UserError) as error:
        tokenize.load_tokenizer(str(tmp_path), None)
    assert absent in str(error.value)


def test_one_token_cannot_be_the_mask_and_something_else(toy, tmp_path):
    shutil.copytree(toy / "teacher", tmp_path / "one")
    path = tmp_path / "one" / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"mask_token": "[UNK]"}))
    with pytest.raises(UserError, match=r"has one token, \[UNK\], as mask and for something else"):
        tokenize.load_tokenizer(str(tmp_path / "one"), None)


def test_words_of_a_list_begin_as_within_a_text(tmp_path):
    """A byte-level tokenizer marks a space before a word; as it is, none of a list has one."""
    learnt = tokenizers.Tokenizer(tokenizers.models.BPE())
    learnt.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    learnt.train_from_iterator(["a dog a fox"], tokenizers.trainers.BpeTrainer(
        vocab_size=30, special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"],
        initial_alphabet=["Ġ", *"adfgox"], show_progress=False))
    model = json.loads(learnt.to_str())["model"]
    tokenizer = transformers.RobertaTokenizer(
        vocab=model["vocab"], merges=[tuple(pair) for pair in model["merges"]])
    assert tokenizer(["a", "dog"], is_split_into_words=True)["input_ids"] != (
        tokenizer(" a dog")["input_ids"])
    expected = tokenizer(" a dog")["input_ids"]
    tokenize.within_texts(tokenizer)
    tokenizer.save_pretrained(tmp_path)
    for found in (tokenizer, tokenize.load_tokenizer(str(tmp_path), None)):
        assert found(["a", "dog"], is_split_into_words=True)["input_ids"] == expected
        assert found("a dog")["input_ids"] == expected  # as pipeline() asks


def test_other_tokenizers_stay_as_they_are(folder):
    tokenizer = tokenize.load_tokenizer(str(folder), None)
    before = tokenizer.backend_tokenizer.to_str(), dict(tokenizer.init_kwargs)
    tokenize.within_texts(tokenizer)
    assert (tokenizer.backend_tokenizer.to_str(), tokenizer.init_kwargs) == before

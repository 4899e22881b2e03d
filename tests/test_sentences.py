"""Sentences of texts: where one ends, each once, and which are held out."""

import json

import pytest

from distilbert_jax.data import sentences
from distilbert_jax.data.sentences import divide, read, tokenised
from distilbert_jax.data.tokenize import load_tokenizer
from distilbert_jax.errors import UserError


@pytest.mark.parametrize("text, expected", [
    ("One ends. Two ends! Three?", ["One ends.", "Two ends!", "Three?"]),
    ("a line\nand another \n\n the last", ["a line", "and another", "the last"]),
    ("Mr. Smith met J. Doe in St. Ives. He left.",
     ["Mr. Smith met J. Doe in St. Ives.", "He left."]),
    ("It cost 3.50 pounds, e.g. in 1999. 7 of them came.",
     ["It cost 3.50 pounds, e.g. in 1999.", "7 of them came."]),
    ('He said "Go." Then (as we know) he went.', ['He said "Go."', "Then (as we know) he went."]),
    ("it ends. but not here", ["it ends. but not here"]),
    ("これは。あれは？", ["これは。", "あれは？"]),
    ("Élan won. École lost.", ["Élan won.", "École lost."]), ("  \n ", []),
    ("A letter: B.\nAnother line", ["A letter: B.", "Another line"])])
def test_where_a_sentence_ends(text, expected):
    assert divide(text) == expected


def test_each_different_sentence_is_taken_once_in_any_order(tmp_path):
    lines = [f"Text {i} is here. It repeats." for i in range(60)]
    one, other = tmp_path / "one.txt", tmp_path / "other.txt"
    one.write_text("\n".join(lines))
    other.write_text("\n".join(lines[::-1] + lines))
    first, second = (read([str(path)], (), 0.2, None, "") for path in (one, other))
    assert first.train == second.train and first.valid == second.valid
    assert first.digest == second.digest and (first.read, second.read) == (120, 240)
    assert sorted(first.train + first.valid) == sorted(
        [f"Text {i} is here." for i in range(60)] + ["It repeats."])
    few = read([str(one)], (), 0.2, 10, "")
    assert few.train == first.train[:10] and few.valid == first.valid
    assert few.digest != first.digest


def test_a_field_holds_whole_sentences_and_valid_is_left_out(tmp_path):
    path, valid = tmp_path / "rows.jsonl", tmp_path / "valid.txt"
    path.write_text("".join(json.dumps({"title": f"A. B {i}", "text": "X. Y"}) + "\n"
                            for i in range(9)))
    valid.write_text("A. B 3\nnew\n")
    found = read([str(path)], [str(valid)], 0.5, None, "title")
    assert sorted(found.train) == [f"A. B {i}" for i in range(9) if i != 3]
    assert sorted(found.valid) == ["A. B 3", "new"]


def test_nothing_to_learn_from(tmp_path):
    (tmp_path / "empty.txt").write_text("  \n\n")
    with pytest.raises(UserError, match="^no sentences in "):
        read([str(tmp_path / "empty.txt")], (), 0.2, None, "")
    (tmp_path / "one.txt").write_text("One.\n")
    with pytest.raises(UserError, match="1 different sentences are too few"):
        read([str(tmp_path / "one.txt")], (), 0.2, None, "")


def test_tokens_prompt_and_what_is_cut(toy):
    tokenizer = load_tokenizer(str(toy / "teacher"), None)
    found = tokenised(["ba be", "ba " * 30], tokenizer, 8, "da ")
    assert found.ids[0].tolist() == tokenizer("da ba be")["input_ids"]
    assert found.lengths.tolist() == [5, 8] and found.cut == 1
    assert all(positions.tolist() == [0] for positions in found.positions)


def test_the_digest_tells_where_sentences_end():
    assert sentences.digest(["ab", "c"]) != sentences.digest(["a", "bc"])

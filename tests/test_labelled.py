"""Labelled files: what is read from each form, and one line for each that cannot be."""

import json
import os

import pytest

from distilbert_jax.data import targets
from distilbert_jax.data.labelled import Columns, Labelled, read
from distilbert_jax.errors import UserError


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


@pytest.mark.parametrize("name, content", [
    ("a.csv", 'text,label\n"one, two",x\nthree,y\n'),
    ("a.CSV", b"\xef\xbb\xbftext,label\r\n\"one, two\",x\r\nthree,y\r\n"),
    ("a.csv", 'text,label\n"one, two", x\nthree,y \n'),  # spaces are no part of a class
    ("a.tsv", "text\tlabel\none, two\tx\nthree\ty\n"),
    ("a.jsonl", '{"text": "one, two", "label": "x"}\n{"label": "y", "text": "three"}\n')])
def test_forms(name, content, tmp_path):
    found = read([write(tmp_path / name, content)], Columns(), "train")
    assert found.texts == [("one, two",), ("three",)] and found.labels == ["x", "y"]
    assert found.where[0].startswith(str(tmp_path / name))


def test_quotes_are_literal_between_tabs(tmp_path):
    content = 'text\tlabel\n"one\tx\ntwo "2"\ty\n'
    found = read([write(tmp_path / "a.tsv", content)], Columns(), "dev")
    assert found.texts == [('"one',), ('two "2"',)]


def test_pairs_and_numbers_from_parquet_and_saved_datasets(tmp_path):
    import datasets

    rows = {"sentence1": ["a", "b"], "sentence2": ["c", "d"], "score": [0.5, 1.0]}
    data = datasets.Dataset.from_dict(rows)
    data.to_parquet(tmp_path / "a.parquet")
    datasets.DatasetDict({"train": data, "validation": data.select([1])}).save_to_disk(
        str(tmp_path / "saved"))
    found = read([str(tmp_path / "a.parquet")], Columns(), "train")
    assert found.texts == [("a", "c"), ("b", "d")] and targets.kind_of(found) == "regress"
    assert targets.numbers(found) == [0.5, 1.0]
    assert read([str(tmp_path / "saved")], Columns(), "dev").texts == [("b", "d")]


def test_classes_of_a_saved_dataset_have_their_names(tmp_path):
    import datasets

    features = datasets.Features({"text": datasets.Value("string"),
                                  "label": datasets.ClassLabel(names=["bad", "good"])})
    datasets.Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]}, features).save_to_disk(
        str(tmp_path / "saved"))
    assert read([str(tmp_path / "saved")], Columns(), "train").labels == ["good", "bad"]
    some = datasets.Dataset.from_dict({"text": ["c", "d"], "label": [-1, 0]}, features)
    datasets.DatasetDict({"train": some.select([1]), "unsupervised": some}).save_to_disk(
        str(tmp_path / "parts"))  # as IMDB's are called; -1 is no class
    found = read([str(tmp_path / "parts")], Columns(), "unlabelled", False)
    assert found.texts == [("c",), ("d",)] and found.labels == [None, "bad"]
    tags = datasets.Features({
        "tokens": datasets.List(datasets.Value("string")),
        "ner_tags": datasets.List(datasets.ClassLabel(names=["O", "B-PER"]))})
    datasets.DatasetDict({"train": datasets.Dataset.from_dict(
        {"tokens": [["a", "b"]], "ner_tags": [[1, 0]]}, tags)}).save_to_disk(str(tmp_path / "tags"))
    assert read([str(tmp_path / "tags")], Columns(), "train").labels == [["B-PER", "O"]]
    assert read([str(tmp_path / "tags")], Columns(), "unlabelled", None).labels == [None]


def test_tagged_words(tmp_path):
    content = "-DOCSTART- -X- O\n\nEU NNP B-ORG\nrejects VBZ O\n\nPeter NNP B-PER\n"
    found = read([write(tmp_path / "a.conll", content)], Columns(), "train")
    assert found.texts == [("EU", "rejects"), ("Peter",)] and found.tagged
    assert targets.kind_of(found) == "tag"
    names = targets.class_names(found)
    assert names == ("O", "B-ORG", "B-PER")
    assert targets.classes(found, names) == [[1, 0], [2]]
    spaces = "10\u00a0000 CD B-SUM\n\nNew York\t\tB-LOC\t\n \t\nparis\tB-LOC\n"
    found = read([write(tmp_path / "b.conll", spaces)], Columns(), "train")
    assert found.texts == [("10\u00a0000",), ("New York",), ("paris",)]
    assert found.labels == [["B-SUM"], ["B-LOC"], ["B-LOC"]]


@pytest.mark.parametrize("labels, kind", [
    (["1", "0"], "classify"), (["1.5", "2"], "regress"), ([1, 0], "classify"),
    ([1.0, 0.5], "regress"), (["a", "1.5"], "classify")])
def test_the_kind_goes_by_the_labels(labels, kind, tmp_path):
    lines = [json.dumps({"text": "a", "label": label}) for label in labels]
    found = read([write(tmp_path / "a.jsonl", "\n".join(lines))], Columns(), "train")
    assert targets.kind_of(found) == kind


def test_labels_are_matched_by_name_in_any_case(tmp_path):
    found = read([write(tmp_path / "a.csv", "text,label\na,Yes\nb,no\n")], Columns(), "train")
    assert targets.classes(found, ("no", "yes")) == [1, 0]
    numbers = read([write(tmp_path / "n.csv", "text,label\na,10\nb,9\n")], Columns(), "train")
    assert targets.class_names(numbers) == ("9", "10")
    written = read([write(tmp_path / "h.jsonl", '{"text": "a", "label": 1.0}\n'
                         '{"text": "b", "label": 0}\n')], Columns(), "train")
    assert targets.class_names(written) == ("0", "1")
    assert targets.classes(written, ("0", "1")) == [1, 0]


BAD = [  # (file, content, columns, parts of the message)
    ("a.csv", "title,label\na,x\n", Columns(), ["name the column of the text", "title, label"]),
    ("a.csv", "text,sentence,label\na,b,x\n", Columns(), ["name the column of the text"]),
    ("a.csv", "text,class\na,x\n", Columns(), ["no column label", "--label", "text, class"]),
    ("a.csv", "text,label,score\na,x,1\n", Columns(), ["name the column of the label"]),
    ("a.csv", "text,label\na,x\n", Columns(("body",)), ["no column body of --text"]),
    ("a.csv", "text,label\na,x\n", Columns(label="y"), ["no column y"]),
    ("a.csv", "text,label\na,x\n", Columns(("label",)), ["--text and --label both name the col"]),
    ("a.csv", "text,label\na,x\nb\n", Columns(), ["a.csv:3: 1 columns", "first line has 2"]),
    ("a.csv", "text,label\na,\n", Columns(), ["a.csv:2: no label"]),
    ("a.csv", "text,label\n ,x\n", Columns(), ["a.csv:2: the text is empty"]),
    ("a.csv", "text,text\na,x\n", Columns(), ["two columns have one name"]),
    ("a.csv", 'text,label\n"a,x\n', Columns(), ["not a table"]),
    ("a.csv", "text,label\n", Columns(), ["no examples in"]),
    ("a.csv", b"text,label\n\xff\xfea,x\n", Columns(), ["a.csv:2: not UTF-8"]),
    ("a.jsonl", '{"text": 3, "label": "x"}', Columns(), ["text is int, not text"]),
    ("a.jsonl", '{"text": "a", "label": "x"', Columns(), ["a.jsonl:1: not JSON"]),
    ("a.jsonl", '{"text": null, "label": "x"}', Columns(), ["a.jsonl:1: text is missing"]),
    ("a.jsonl", '{"text": "a", "label": ["x", "y"]}', Columns(), ["label is a list: one label"]),
    ("a.jsonl", '{"text": "a", "label": {"x": 0}}', Columns(), ["label is a dict: one label"]),
    ("a.jsonl", '{"text": "a", "label": NaN}', Columns(), ["a.jsonl:1: no label"]),
    ("a.jsonl", '{"text": "a", "label": Infinity}', Columns(), ["label inf is not finite"]),
    ("a.jsonl", '{"text": "\\ud83d", "label": "x"}', Columns(), ["half a surrogate pair"]),
    ("a.jsonl", '{"tokens": ["a", "b"], "tags": ["O"]}', Columns(), ["2 words need a list of as"]),
    ("a.jsonl", '{"tokens": ["a"], "tags": [null]}', Columns(), ["1 words need a list of as many"]),
    ("a.jsonl", '{"tokens": ["a"], "label": "pos"}', Columns(), ["column label, found pos"]),
    ("a.txt", "text label\n", Columns(), ["labelled data is read from .csv .tsv"]),
    ("a.xlsx", "PK", Columns(), ["labelled data is read from .csv .tsv"]),
    ("a.parquet", "PAR1", Columns(), ["a.parquet: cannot be read"]),
    ("a.csv.gz", b"\x1f\x8b\x08\x00", Columns(), ["a.csv.gz: damaged gzip"]),
    ("a.conll", "word\n", Columns(), ["a.conll:1: a line has a word and its tag", '"tokens"']),
]


@pytest.mark.parametrize("name, content, columns, parts", BAD)
def test_files_that_cannot_be(name, content, columns, parts, tmp_path):
    with pytest.raises(UserError) as error:
        read([write(tmp_path / name, content)], columns, "train")
    assert all(part in str(error.value) for part in parts), error.value
    assert "\n" not in str(error.value)


def test_texts_and_pairs_in_one_part(tmp_path):
    names = [write(tmp_path / "a.csv", "text,label\na,x\n"),
             write(tmp_path / "b.csv", "text1,text2,label\na,b,x\n")]
    with pytest.raises(UserError, match="some hold single texts, some pairs"):
        read(names, Columns(), "train")


def test_labels_that_are_not_asked_for(tmp_path):
    name = write(tmp_path / "a.csv", "text,label,score\na,x,1\n")
    assert read([name], Columns(), "unlabelled", None).labels == [None]
    name = write(tmp_path / "a.jsonl", '{"text": "a"}\n{"text": "b", "label": "x"}\n')
    assert read([name], Columns(), "test", False).labels == [None, "x"]  # which is then refused
    name = write(tmp_path / "b.csv", "text,label\na,-1\nb,-1\n")
    assert read([name], Columns(), "test", False).labels == [None, None]  # as in GLUE's test files
    assert read([name], Columns(), "dev").labels == ["-1", "-1"]  # a class like any other


@pytest.mark.parametrize("labels, message", [
    (["Pos", "pos"], "'Pos' and 'pos' differ in case alone"),
    (["a\tb", "c"], "holds a tab"), (["1,5", "2,5"], "decimal comma: write a point")])
def test_labels_that_mislead(labels, message):
    found = Labelled([("a",), ("b",)], labels, ["a.csv:2", "a.csv:3"])
    with pytest.raises(UserError, match=message):
        targets.kind_of(found)
        targets.class_names(found)


def test_labels_that_cannot_be(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        read([str(tmp_path / "absent.csv")], Columns(), "train")
    one = read([write(tmp_path / "a.csv", "text,label\na,x\nb,x\n")], Columns(), "train")
    with pytest.raises(UserError, match="all labels are 'x'"):
        targets.class_names(one)
    with pytest.raises(UserError, match="label 'x' is not among the labels y, z"):
        targets.classes(one, ("y", "z"))
    with pytest.raises(UserError, match="label 'x' is not a finite number"):
        targets.numbers(one)
    with pytest.raises(UserError, match="holds no tagged words"):
        targets.kind_of(one, "tag")
    nan = read([write(tmp_path / "n.csv", "text,label\na,nan\n")], Columns(), "train")
    with pytest.raises(UserError, match="is not a finite number"):
        targets.numbers(nan)
    tags = write(tmp_path / "t.conll", "a O\n")
    with pytest.raises(UserError, match="some hold tagged words, some texts"):
        read([tags, os.fspath(tmp_path / "a.csv")], Columns(), "train")

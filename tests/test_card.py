"""A model card: the hub reads its front matter, and what the teacher's says is handed on."""

import functools
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import ModelCard

from distilbert_jax.export import card as module
from distilbert_jax.export.card import USAGE, Result, card


def files_that_name(folder, *places):
    """The files of a folder that say where they were made: none should, as it may be published."""
    here = [str(place).encode() for place in (*places, Path(__file__).parents[1])]
    return [file for file in folder.rglob("*") if file.is_file() and any(
        place in file.read_bytes() for place in here)]


def snippets(text):
    """The Python in a card."""
    return [code.split("```")[0] for code in text.split("```python\n")[1:]]


@pytest.mark.parametrize("kind", USAGE)
def test_the_hub_reads_it(kind, tmp_path):
    text = card(kind, "A student", "Distilled.", folder="small", origin="org/big-teacher",
                results=[Result("accuracy", "top-1", "held-out texts", 0.94521, (0.9432, 0.94761)),
                         Result("f1", "F1", "dev", 0.5)], mask="<mask>")
    found = ModelCard(text)
    assert found.data.pipeline_tag == kind and found.data.base_model == "org/big-teacher"
    result, bare = found.data.eval_results
    assert (result.metric_type, result.metric_value, result.dataset_name) == (
        "accuracy", 0.9452, "held-out texts")
    assert result.metric_name == "top-1 (95 % interval 0.9432 to 0.9476)"
    assert (bare.metric_name, bare.metric_value) == ("F1", 0.5)
    assert found.text.strip().startswith("# A student\n\nDistilled.\n\n```python\nfrom ")
    for code in snippets(found.text):
        compile(code, kind, "exec")
    assert ('"A sentence with a <mask>."' in text) == (kind == "fill-mask")


def test_licence_and_language_are_the_teacher_s(tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: mit\nlanguage: de\n---\n\n# Big\n")
    text = card("fill-mask", "A student", "", folder="student", origin=str(tmp_path))
    found = ModelCard(text).data
    assert (found.license, found.language, found.base_model) == ("mit", "de", None)
    assert str(tmp_path) not in text  # no path of this machine


@pytest.mark.parametrize("content", [None, "# no front matter\n", "---\n: [\n---\n", "---\n- a\n"])
def test_a_teacher_whose_card_says_nothing(content, tmp_path):
    if content is not None:
        (tmp_path / "README.md").write_text(content)
    found = ModelCard(card("fill-mask", "A student", "", folder="student", origin=str(tmp_path)))
    assert (found.data.license, found.data.base_model) == (None, None)


@pytest.mark.parametrize("name", ["bert-base-uncased", "org/big-teacher"])
def test_a_model_on_the_hub_is_named_and_its_card_read_from_the_cache(name, tmp_path, monkeypatch):
    def known():
        found = ModelCard(card("fill-mask", "A student", "", folder="student", origin=name)).data
        return found.base_model, found.license, found.language

    monkeypatch.setattr(module, "try_to_load_from_cache", functools.partial(
        huggingface_hub.try_to_load_from_cache, cache_dir=tmp_path))
    assert known() == (name, None, None)
    place = tmp_path / f"models--{name.replace('/', '--')}"
    for path, text in (("refs/main", "abc"), ("snapshots/abc/README.md",
                                              "---\nlicense: mit\nlanguage: de\n---\n\n# Big\n")):
        (place / path).parent.mkdir(parents=True)
        (place / path).write_text(text)
    assert known() == (name, "mit", "de")
    (place / "snapshots/abc/README.md").unlink()
    (place / ".no_exist/abc").mkdir(parents=True)
    (place / ".no_exist/abc/README.md").touch()  # the hub has said that there is none
    assert known() == (name, None, None)


def test_a_folder_is_no_name_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "teacher").mkdir()
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n")  # of something else
    for origin in ("teacher", "", "../teacher", "gs://bucket/teacher", "a..b", "a" * 200):
        found = ModelCard(card("fill-mask", "A model", "", folder="model", origin=origin)).data
        assert found.base_model == (origin if origin[0:1] == "a" else None)
        assert found.license is None


def test_datasets_are_those_of_the_hub():
    words = ["hf:org/texts:de", "a.txt", "hf:imdb", "tfds:imdb", "hf:org/texts"]
    found = ModelCard(card("fill-mask", "A model", "", folder="model", origin="", corpus=words))
    assert found.data.datasets == ["org/texts", "imdb"]

"""A model card: the hub reads its front matter, and what the teacher's says is handed on."""

import pytest
from huggingface_hub import ModelCard

from distilbert_jax.export.card import USAGE, Result, card


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
    for code in found.text.split("```python\n")[1:]:
        compile(code.split("```")[0], kind, "exec")
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

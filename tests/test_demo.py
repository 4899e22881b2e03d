"""The page beside a folder: what is known of the model is in it, whole and harmless."""

import html.parser
import json

import pytest

from distilbert_jax.errors import UserError
from distilbert_jax.export import demo


class Scripts(html.parser.HTMLParser):
    """The text of each script of a page, as a browser divides it."""

    def __init__(self, page):
        super().__init__()
        self.found, self.tags = {}, []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)

    def handle_data(self, data):
        if self.tags[-1:] == ["script"] and data.strip():
            self.found[len(self.found)] = data


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "stu dent" / "onnx").mkdir(parents=True)
    (tmp_path / "stu dent" / "onnx" / "model_quantized.onnx").write_bytes(b"")
    return tmp_path / "stu dent"


def test_what_is_known_is_in_the_page(folder):
    texts = [("the [MASK] </script><b> & \"barks\" 東",), ("two",)]
    answers = [[["dog", 0.5], ["cat", 0.25]], []]
    path = demo.write(folder, "mlm", texts, {"name": "bert", "answers": answers})
    assert path == folder.parent / "stu dent.html"
    page = Scripts(path.read_text(encoding="utf-8"))
    assert page.tags.count("script") == 2 and "b" not in page.tags
    about = json.loads(page.found[0])
    assert about["model"] == "stu dent" and about["output"] == "mlm"
    assert about["examples"] == [list(row) for row in texts]
    assert about["teacher"] == {"name": "bert", "answers": answers}
    assert about["library"].startswith("https://") and "@huggingface/transformers@" in (
        about["library"])


def test_all_that_the_page_needs_is_in_it(folder):
    """But for the library, nothing is loaded from elsewhere."""
    page = demo.write(folder, "states").read_text(encoding="utf-8")
    assert page.count("https://") == 1 and "src=" not in page and "<link" not in page


def test_without_the_int8_file(folder):
    (folder / "onnx" / "model_quantized.onnx").unlink()
    with pytest.raises(UserError, match="model_quantized.onnx is not there, which the page would"):
        demo.write(folder, "mlm")
    assert not list(folder.parent.glob("*.html"))

"""A report as a page: all of it, in one file, and nothing in it is read as HTML."""

import base64
import shutil
import subprocess

import pytest
from PIL import Image

from distilbert_jax.evaluation.page import summary, write_report

PICTURE = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJg"
    "gg==")


def test_the_page_holds_the_report_and_its_pictures(tmp_path):
    (tmp_path / "losses.png").write_bytes(PICTURE)
    text = ("# <b>MRPC</b> & more\n\n| model | score |\n|---|--:|\n| teacher | 84.72 |\n\n"
            "![losses](losses.png)\n\n```\n<script>alert(1)</script>\n```\n")
    write_report(tmp_path, text)
    assert (tmp_path / "report.md").read_text() == text
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<title>&lt;b&gt;MRPC&lt;/b&gt; &amp; more</title>" in page
    assert '<td style="text-align:right">84.72</td>' in page
    assert f'src="data:image/png;base64,{base64.b64encode(PICTURE).decode()}"' in page
    assert "<script" not in page and "<b>" not in page
    assert "http" not in page and "<link" not in page  # it needs no other file
    shown = summary(tmp_path)
    assert "84.72" in shown and "<h1" not in shown and "script" not in shown
    assert "<table>" in shown and 'alt="losses" src="data:image/png;base64,' in shown
    assert summary(tmp_path / "nowhere") is None


def seen(page, folder, size, *flags):
    """How many pixels have each colour, in a browser's window of this size."""
    subprocess.run(
        [BROWSER, "--headless", "--no-sandbox", "--disable-gpu",
         "--window-size={},{}".format(*size), f"--user-data-dir={folder / 'browser'}",
         f"--screenshot={folder / 'page.png'}", *flags,
         page.as_uri()], check=True, capture_output=True, timeout=120)
    with Image.open(folder / "page.png") as picture:
        assert picture.size == size
        return dict(map(reversed, picture.convert("RGB").getcolors(2**16)))


BROWSER = next(filter(None, map(shutil.which, (
    "chromium", "chromium-browser", "google-chrome"))), None)


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium")
@pytest.mark.parametrize("flags, paper", [((), (251, 251, 249)),
                                          (("--force-dark-mode",), (22, 25, 31))])
def test_the_page_in_a_browser(tmp_path, flags, paper):
    """Its ground is light or dark, and its picture is drawn whole, below too wide a table."""
    Image.new("RGB", (300, 200), (255, 0, 0)).save(tmp_path / "losses.png")
    row = "|" + " a word |" * 40
    write_report(tmp_path, f"# Red\n\n{row}\n{'|---' * 40}|\n{row}\n\n![losses](losses.png)\n")
    colours = seen(tmp_path / "report.html", tmp_path, (800, 600), *flags)
    assert max(colours, key=colours.get) == paper
    assert 0.99 < colours.get((255, 0, 0), 0) / (300 * 200) <= 1  # its corners are round

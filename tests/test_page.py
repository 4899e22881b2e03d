"""A report as a page: all of it, in one file, and nothing in it is read as HTML."""

import base64

from distilbert_jax.evaluation.page import write_report

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

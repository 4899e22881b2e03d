"""A report's text → report.md for the terminal and for Git, report.html for a browser."""

import base64
import html
from collections.abc import MutableMapping, Sequence
from pathlib import Path
from typing import Any

from markdown_it import MarkdownIt
from markdown_it.renderer import RendererHTML
from markdown_it.token import Token

FILES = ("report.md", "report.html")
STYLE = """
:root { color-scheme: light dark;
        --ink: #1d2330; --paper: #fbfbf9; --line: #d6d8dc; --soft: #f0f1ee }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e6ea; --paper: #16191f; --line: #3a404b; --soft: #20252e } }
body { color: var(--ink); background: var(--paper); margin: 2rem auto; max-width: 72rem;
       padding: 0 1.5rem; font: 16px/1.55 system-ui, sans-serif }
h1, h2 { line-height: 1.25 } h2 { margin-top: 2.2rem }
.wide { overflow-x: auto } table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .35rem .8rem; border-bottom: 1px solid var(--line); white-space: nowrap }
th { background: var(--soft); text-align: left }
pre, code { background: var(--soft); font-size: .9em } code { overflow-wrap: anywhere }
pre { padding: .8rem 1rem; overflow-x: auto }
img { max-width: 100%; background: #fff; border-radius: 4px }
"""


def write_report(folder: Path, text: str) -> None:
    """Write report.md, and report.html: the same in one file, with its pictures inside.

    Args:
        folder: of the report, where the pictures that it names lie.
        text: Markdown; its first line is the title. HTML in it is shown as it is written.
    """
    markdown, page = (folder / name for name in FILES)
    markdown.write_text(text, encoding="utf-8", errors="replace")
    title = html.escape(text.split("\n", 1)[0].lstrip("# "))
    page.write_text(
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<meta name="viewport" '
        f'content="width=device-width">\n<title>{title}</title>\n<style>{STYLE}</style>\n</head>\n'
        f"<body>\n{_parser().render(text, {'folder': folder})}</body>\n</html>\n",
        encoding="utf-8", errors="replace")


def summary(folder: Path) -> str | None:
    """The first table of the report in a folder, and its first picture; None without a report."""
    path = folder / FILES[0]
    if not path.exists():
        return None
    parser, shown = _parser(), []
    tokens = parser.parse(path.read_text(encoding="utf-8"))
    kinds = [token.type for token in tokens]
    if "table_open" in kinds:
        shown += tokens[kinds.index("table_open"):kinds.index("table_close") + 1]
    pictures = [token for token in tokens if any(
        child.type == "image" for child in token.children or ())]
    return parser.renderer.render(shown + pictures[:1], parser.options, {"folder": folder})


def _parser() -> MarkdownIt:
    """Markdown to HTML with pictures inside, in which HTML is text."""
    parser = MarkdownIt("commonmark", {"html": False}).enable("table")
    parser.add_render_rule("image", _image)
    parser.add_render_rule("table_open", lambda *_: '<div class="wide"><table>')
    parser.add_render_rule("table_close", lambda *_: "</table></div>")
    return parser


def _image(_: RendererHTML, tokens: Sequence[Token], number: int, __: Any,
           env: MutableMapping[str, Any]) -> str:
    """A PNG picture of the folder, as part of the page."""
    token = tokens[number]
    picture = base64.b64encode((env["folder"] / str(token.attrs["src"])).read_bytes()).decode()
    return f'<img alt="{html.escape(token.content)}" src="data:image/png;base64,{picture}">'

"""English prose that every machine with this project has: the documentation inside Python code.

Comes in: the sources of the standard library and of our requirements, parsed, never imported.
Goes out: documents, one per docstring or language topic, cleaned down to whole sentences.
"""

import ast
import importlib.util
import pathlib
import pydoc_data.topics
import re
import sysconfig
import warnings
from collections.abc import Iterator

# Read in this order, after the standard library; a package that is not installed is passed over.
# jax and transformers would take longer than all of these and add little.
PACKAGES = ("optax", "orbax", "flax", "numpy", "scipy")
SKIPPED = {"site-packages", "encodings", "multiprocessing", "test", "tests", "idlelib", "lib2to3"}
MOST_CHARACTERS = 2_500_000  # about 7 seconds of parsing on one core

# A line that starts a new paragraph and is itself no prose: rules, doctests, tables, fields,
# directives, and NumPy's "name : type".
_NO_PROSE = re.compile(r"\s*([-=~^*+|`#.]{3,}|>>>|\.\. |:\w|[|+]|\w+:$|[*\w]+(, [*\w]+)* : )")
# The mark of a list item or of Google's "name (type): text", after which a sentence begins.
_ITEM = re.compile(r"\s*([-*] |\d+[.)] |\*{0,2}\w+( \([^)]*\))?: )")
_MARKUP = re.compile(r":[a-z:]+:(?=`)|[`*]+")
_SENTENCES = re.compile(r"[A-Z].{40,}[.!?]")
_UNUSUAL = re.compile(r"[^A-Za-z ,;:.!?'\"()-]")


def python_docs() -> Iterator[str]:
    """Yield English prose in a fixed order, at most MOST_CHARACTERS characters.

    A document holds the paragraphs of one docstring or topic that read as prose, joined by
    spaces; a paragraph met before is dropped. The text depends on the installed versions.
    """
    seen: set[str] = set()
    left = MOST_CHARACTERS
    for text in _texts():
        new = [p for p in _paragraphs(text) if p not in seen]
        seen.update(new)
        document = " ".join(new)
        left -= len(document)
        if left < 0:
            return
        if document:
            yield document


def _texts() -> Iterator[str]:
    """The raw topics, then the raw docstrings, file by file in sorted order."""
    yield from (pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))
    folders = [sysconfig.get_path("stdlib")]
    for spec in map(importlib.util.find_spec, PACKAGES):
        folders += spec.submodule_search_locations if spec else []
    for folder in map(pathlib.Path, folders):
        for path in sorted(folder.rglob("*.py")):
            if SKIPPED.isdisjoint(path.relative_to(folder).parts):
                yield from _docstrings(_parsed(path.read_bytes()))


def _parsed(source: bytes) -> ast.Module:
    """The syntax tree; an empty one for a file that is meant to be broken, or a template."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return ast.parse(source)
        except (SyntaxError, ValueError):
            return ast.Module([], [])


def _docstrings(
    node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
) -> Iterator[str]:
    text = ast.get_docstring(node)
    if text:
        yield text
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _docstrings(child)


def _paragraphs(text: str) -> Iterator[str]:
    """Whole sentences of letters and ordinary punctuation, one paragraph at a time."""
    paragraph: list[str] = []
    for line in [*text.splitlines(), ""]:
        start = _ITEM.match(line)
        if start or not line.strip() or _NO_PROSE.match(line):
            prose = _MARKUP.sub("", " ".join(paragraph))
            unusual = len(_UNUSUAL.findall(prose))
            if _SENTENCES.fullmatch(prose) and unusual < 0.05 * len(prose):
                yield prose
            paragraph = [line[start.end():].strip()] if start else []
        else:
            paragraph.append(line.strip())

"""Every command in a document is one that the program takes, and every flag in one is there.

Nothing is run: the words go through the program's own parser, and the settings are checked.
"""

import ast
import contextlib
import io
import re
import shlex
from pathlib import Path

import pytest

import distilbert_jax.cli
import distilbert_jax.commands.distil
from distilbert_jax.commands import benchmark, main

ROOT = Path(__file__).parents[1]
DOCUMENTS = ("README.md", "tpu/README.md", "experiments/README.md", "experiments/benchmarks.md",
             "distilbert_jax/README.md", "CONTRIBUTING.md", "CHANGELOG.md")
SOURCES = [path.relative_to(ROOT).as_posix() for folder in (
    "distilbert_jax/recipes", "distilbert_jax/commands", "experiments", "experiments/examples")
    for path in sorted((ROOT / folder).glob("*.py"))]
COMMAND = re.compile(r"(distilbert-jax|python experiments/(?!X)[\w/]+\.py)(?![\w/-])")
# What stands for a value in a template, by the flag before it; any other word may be a file.
STAND_INS = {("--shape", "S"): "small", ("--batch-size", "B"): "8", ("--dtype", "D"): "float32",
             ("--compile-only", "TOPOLOGY"): "h100:8"}
# Flags of other programs that documents name.
OTHERS = {"--no-compile", "--only-binary", "--version", "--vocab_transform", "--location",
          "--member", "--recursive", "--role", "--xla_jf_dump_llo_text"}


class Parsed(Exception):
    """The words were read, and the settings are good."""


@pytest.fixture
def parser(monkeypatch):
    """Each command ends as soon as its settings are known."""
    settle = distilbert_jax.cli.settle

    def stop(*given):
        raise Parsed(settle(*given))

    for module in (distilbert_jax.cli, distilbert_jax.commands.distil):
        monkeypatch.setattr(module, "settle", stop)


def commands(text):
    """The commands in Markdown: in blocks of code, a line each, and between backticks."""
    for code in [*blocks(text), *inline(text)]:
        for line in code.split("\n"):
            for part in line.split("&&"):
                if COMMAND.match(part.strip()):
                    yield " ".join(part.split())


def blocks(text):
    """What stands between three backticks, a line continued by a backslash made one."""
    return [re.sub(r"\\\n", " ", block.split("\n", 1)[1]) for block in text.split("```")[1::2]]


def inline(text):
    """What stands between single backticks, in one line."""
    prose = "".join(text.split("```")[::2])
    found = (" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose))
    return [code.replace("| ", "|") for code in found]


def documented(source):
    """The docstrings of a Python file as Markdown: a command at the start of a line is a block."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef):
            text = re.sub(r"\\\n", " ", ast.get_docstring(node) or "")
            yield re.sub(rf"^(?:Command:)? *({COMMAND.pattern}.*)$", r"\n```\n\1\n```\n", text,
                         flags=re.MULTILINE)


def found(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    return [(name, command) for markdown in (documented(text) if name.endswith(".py") else [text])
            for command in commands(markdown)]


ALL = list(dict.fromkeys(pair for name in (*DOCUMENTS, *SOURCES) for pair in found(name)))


def run(words):
    """Give the words of a command to the program."""
    program, *words = words
    if program == "python":
        name = Path(words.pop(0)).stem
        words.insert(0, {"run": "distil"}.get(name, name))
    name, *words = words
    given = [word for word in words if word not in ("...", "…", "--help", "--version")]
    filled = [STAND_INS.get(pair, pair[1]) for pair in zip(["", *given], given, strict=False)]
    for one in name.split("|"):
        assert one in main.COMMANDS, f"no command is called {one}"
        if filled:
            with pytest.raises(Parsed):
                main.COMMANDS[one](filled)


@pytest.mark.parametrize("document, command", ALL)
def test_a_command_is_one_that_the_program_takes(document, command, parser):
    words = shlex.split(command, comments=True)
    if words[0] == "python" and words[1] not in PROGRAMS:  # one with a parser of its own
        source = (ROOT / words[1]).read_text(encoding="utf-8")
        assert all(f'"{word}"' in source for word in words if word.startswith("--"))
    elif words[1:] not in ([], ["--help"], ["--version"], ["X"]) and words[1] != "NAME":
        run(words)


PROGRAMS = {f"experiments/{'run' if name == 'distil' else name}.py" for name in main.COMMANDS}


@pytest.fixture(scope="module")
def flags():
    """All that the commands, the benchmarks, and the scripts beside them take."""
    helped = io.StringIO()
    with contextlib.redirect_stdout(helped):
        for command in (*main.COMMANDS.values(), *benchmark.BENCHMARKS.values()):
            with contextlib.suppress(SystemExit):
                command(["--help"])
    scripts = [path.read_text(encoding="utf-8") for path in (
        *(ROOT / "tpu").glob("[a-z]*"), ROOT / "experiments/chaos.py", *(
            ROOT / "experiments/examples").glob("*.py"))]
    own = re.findall(r"^  (--[\w-]+)(?:, (--[\w-]+))?", helped.getvalue(), flags=re.MULTILINE)
    return {*sum(own, ()), *re.findall(r"--[a-z][\w-]*", "".join(scripts)), *OTHERS}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_a_flag_is_one_that_a_command_has(document, flags):
    text = (ROOT / document).read_text(encoding="utf-8")
    named = {flag for code in [*blocks(text), *inline(text)]
             for flag in re.findall(r"(?<![\w-])--[a-z][\w-]*", code) if not flag.endswith("-")}
    assert named - flags == set()


def test_commands_are_found():
    """As many as there are; a change of how they are written must not hide them."""
    by_document = {name: sum(document == name for document, _ in ALL) for name in (
        *DOCUMENTS, *SOURCES)}
    text = ("```sh\ncd x && python experiments/run.py --steps 1 \\\n  --seed 2  # why\n```\n"
            "`pip x` `python\nexperiments/ship.py --model\nDIR`, `distilbert-jax`, "
            "`distilbert-jax-x`")
    assert list(commands(text)) == [
        "python experiments/run.py --steps 1 --seed 2 # why",
        "python experiments/ship.py --model DIR", "distilbert-jax"]
    assert by_document["README.md"] >= 8 and by_document["experiments/README.md"] >= 20
    assert all(by_document[f"distilbert_jax/recipes/{name}.py"] for name in (
        "bert_base", "few_layers", "half_layers", "quickstart", "rxn_bert", "table_4",
        "three_layers"))
    assert by_document["distilbert_jax/commands/main.py"] >= 20


def test_the_front_page_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150

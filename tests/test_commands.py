"""`distilbert-jax`: the list, the version, a name that is not there; what `pip install` brings."""

import ast
import configparser
import importlib.metadata
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import distilbert_jax
from distilbert_jax.commands import benchmark, main
from distilbert_jax.recipes import recipes

ROOT = Path(__file__).parents[1]
SETUP = configparser.ConfigParser()
SETUP.read(ROOT / "setup.cfg", encoding="utf-8")
# Where the name of a package is not that of its module.
MODULES = {"orbax-checkpoint": "orbax", "scikit-learn": "sklearn", "pyyaml": "yaml",
           "markdown-it-py": "markdown_it"}


def program(*words):
    code = "from distilbert_jax.commands.main import main; main()"
    return subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)


def test_the_list_and_the_version_start_no_jax():
    code = ("import sys; from distilbert_jax.commands.main import main; main()\n"
            "assert not {'jax', 'numpy', 'transformers'} & set(sys.modules)")
    for word in ("--help", "--version"):
        done = subprocess.run([sys.executable, "-c", code, word], capture_output=True, text=True)
        assert not done.returncode, done.stderr
        if word == "--version":
            assert done.stdout == f"distilbert_jax {distilbert_jax.__version__}\n"
            continue
        for name, command in main.COMMANDS.items():
            assert f"  {name:11}{inspect.getdoc(command).splitlines()[0]}\n" in done.stdout


def test_an_unknown_command_names_the_nearest():
    done = program("distill", "--teacher", "x")
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.startswith("error: unknown command 'distill'; did you mean distil? (known: ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("name", main.COMMANDS)
def test_every_command_can_be_run_from_a_clone(name):
    """experiments/NAME.py, of distil run.py, is the command and nothing else."""
    path = ROOT / "experiments" / f"{'run' if name == 'distil' else name}.py"
    tree = ast.parse(path.read_text(encoding="utf-8"))
    document, get, start = tree.body
    assert ast.unparse(get) == "from launch import run"
    assert ast.unparse(start) == f"if __name__ == '__main__':\n    run('{name}')"
    assert f"experiments/{path.name}" in document.value.value


@pytest.mark.parametrize("commands", [main.COMMANDS, benchmark.BENCHMARKS])
def test_every_command_says_what_it_does(commands):
    for name, command in commands.items():
        text = inspect.getdoc(command)
        first, examples = text.splitlines()[0], text.partition("\n\nExamples:\n")[2]
        assert name == command.__name__ and first.endswith(".")
        assert examples.strip() and all(
            line.startswith("    distilbert-jax ") for line in examples.splitlines())


def test_recipes_travel():
    found = recipes()
    assert {"bert_base", "quickstart", "rxn_bert"} <= set(found)
    for recipe in found.values():
        assert "Command: " in recipe.__doc__ and "Hardware:" in recipe.__doc__ and recipe.DISTIL


def required(text):
    """Modules of requirements, one a line."""
    names = (line.split(">")[0].split("=")[0].split("[")[0] for line in text.split("\n") if line)
    return {MODULES.get(name, name).replace("-", "_") for name in names}


def imported(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.split(".")[0]


def test_what_a_user_installs_is_what_the_package_imports():
    """Nothing for developers; what is imported comes along, or by an extra that an error names."""
    user = required(SETUP["options"]["install_requires"])
    asked = set().union(*map(imported, (ROOT / "distilbert_jax").rglob("*.py"))) - set(
        sys.stdlib_module_names) - {"distilbert_jax"}
    extras = {name: required(text) for name, text in SETUP["options.extras_require"].items()}
    assert not user & (extras["dev"] | extras["tfds"])
    # What transformers, orbax and gcsfs bring, and what is compared with where it is installed.
    assert asked - user - set().union(*extras.values()) == {
        "tokenizers", "fsspec", "etils", "google_crc32c", "model2vec", "sentence_transformers"}
    assert user <= asked


def test_the_version_has_one_place():
    assert SETUP["metadata"]["version"] == "attr: distilbert_jax.__version__"
    try:
        installed = importlib.metadata.version("distilbert_jax")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the package is not installed")
    assert installed == distilbert_jax.__version__


def test_compare_takes_folders_without_a_flag(tmp_path):
    done = program("compare", str(tmp_path / "one"), str(tmp_path / "two"), "--output",
                   str(tmp_path / "out"))
    assert done.returncode == 2 and f"error: {tmp_path / 'one'}" in done.stderr
    assert program("compare").stderr == (
        "error: the following arguments are required: DIR (see --help)\n")

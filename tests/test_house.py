"""Imports go one way, down the walk of the README; torch and mesh axes stay where they belong."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "distilbert_jax"
# A module or folder imports only from lines above its own, or from its own folder.
WALK = (
    {"errors"}, {"config"}, {"task_config", "ship_config", "embed_config"}, {"machine"},
    {"data", "kernels"}, {"models"}, {"training"}, {"evaluation", "export"},
    {"benchmark", "convert", "predict"}, {"jobs"}, {"cli", "recipes"}, {"commands"}, {"api"},
    {"__init__"})
RANK = {name: rank for rank, names in enumerate(WALK) for name in names}
FILES = {path.relative_to(ROOT).as_posix(): ast.parse(path.read_text(encoding="utf-8"))
         for path in sorted(ROOT.rglob("*.py"))}


def part(name):
    """`models/encoder.py` → `models`."""
    return name.removesuffix(".py").split("/")[0]


def imports(tree):
    """Full names of all that is imported, anywhere in the file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_every_file_stands_on_the_walk():
    assert {part(name) for name in FILES} - {"__init__"} <= set(RANK)


@pytest.mark.parametrize("name", FILES)
def test_imports_go_one_way(name):
    for imported in imports(FILES[name]):
        package, _, inside = imported.partition(".")
        other = inside.split(".")[0]
        if package == "distilbert_jax" and other not in (part(name), "__version__"):
            assert RANK[other] < RANK[part(name)], f"{name} imports {imported}"


@pytest.mark.parametrize("name", [name for name in FILES if part(name) == "data"])
def test_data_knows_no_jax(name):
    assert not {"jax", "flax"} & {imported.split(".")[0] for imported in imports(FILES[name])}


@pytest.mark.parametrize("name", [name for name in FILES if part(name) == "models"])
def test_models_know_no_training(name):
    ours = [i for i in imports(FILES[name]) if i.startswith("distilbert_jax.")]
    known = {"errors", "config", "machine", "kernels", "models"}
    assert {imported.split(".")[1] for imported in ours} <= known, ours


def test_torch_is_imported_only_where_a_bin_file_is_read_and_to_compare_with():
    def of_torch(tree):
        return any(name.split(".")[0] == "torch" for name in imports(tree))

    functions = [(name, node.name) for name, tree in FILES.items() for node in ast.walk(tree)
                 if isinstance(node, ast.FunctionDef) and of_torch(node)]
    assert functions == [("models/hub.py", "_read_torch")]
    tops = [name for name, tree in FILES.items()
            if any(isinstance(node, ast.Import | ast.ImportFrom) and of_torch(node)
                   for node in tree.body)]
    assert tops == [
        "benchmark/sentence_trainer.py", "benchmark/torch_loop.py", "benchmark/torch_model.py",
        "benchmark/trainer.py"]
    users = [(name, node.name) for name, tree in FILES.items() for node in ast.walk(tree)
             if isinstance(node, ast.FunctionDef)
             and any(module in imported for imported in imports(node)
                     for module in (".torch_loop.", ".torch_model.", ".trainer.",
                                    ".sentence_trainer."))]
    # And so never without being asked for.
    assert users == [("benchmark/sentences.py", "_worker"), ("benchmark/serving.py", "open"),
                     ("benchmark/task.py", "_worker"), ("benchmark/training.py", "__init__")]


def test_mesh_axes_are_named_in_tables_only():
    found = {name for name, tree in FILES.items() for node in ast.walk(tree)
             if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in (
                 "P", "PartitionSpec")
             for argument in ast.walk(node)
             if isinstance(argument, ast.Constant) and argument.value in ("data", "model")}
    assert found == {"machine/sharding.py"}, found

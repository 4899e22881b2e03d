"""Where a report comes from: every call, and settings that a command line takes back."""

import json
import re
import shlex

import pytest

from distilbert_jax.cli import parse
from distilbert_jax.config import CompareConfig, DistilConfig
from distilbert_jax.embed_config import EmbedConfig
from distilbert_jax.errors import UserError
from distilbert_jax.evaluation import report
from distilbert_jax.jobs.provenance import flags, next_steps, note_call, provenance
from distilbert_jax.ship_config import ShipConfig
from distilbert_jax.task_config import FinetuneConfig

CONFIGS = {"ship": ShipConfig, "compare": CompareConfig}


def next_commands(said):
    """The commands that a job's last lines name, read as the program reads them: name → settings.
    """
    found = {}
    for line in said.partition("\nnext: ")[2].splitlines():
        program, name, *words = shlex.split(line)
        assert program == "distilbert-jax" and name not in found
        found[name] = parse(CONFIGS[name], "", "", words)
    return found


def test_commands_to_copy():
    said = "report: x\n" + next_steps(["ship", "--model", "a b/student", "--evaluate", "$c", "d"],
                                      ["compare", "a b"]) + "\n"
    assert next_commands(said) == {
        "ship": ShipConfig(model="a b/student", evaluate=("$c", "d")),
        "compare": CompareConfig(runs=("a b",))}


def test_every_call_is_kept(tmp_path):
    config = DistilConfig(output=str(tmp_path), seed=3)
    for how in ("first --steps 9", "second", "second", "first --steps 9"):
        with report.called(how):
            note_call(config.output)
    text = provenance(config)
    assert re.findall(r"^- ([\d-]+)(.*): `(.*)`$", text, re.M) == [
        (line, often, how) for line, (how, often) in zip(
            [json.loads((tmp_path / "calls.jsonl").read_text().split("\n")[0])["date"]] * 3,
            [("first --steps 9", ""), ("second", ", 2 times"), ("first --steps 9", "")],
            strict=True)]
    assert f"at the last call: `--seed 3 --output {tmp_path}`\n" in text
    assert report.versions() in text
    with pytest.raises(UserError, match="calls.jsonl cannot be written: Not a directory"):
        note_call(str(tmp_path / "calls.jsonl"))


@pytest.mark.parametrize("config", [
    DistilConfig(teacher=("a", "b c"), teacher_weights=(1.0, 2.5), corpus=("x.txt",), steps=7,
                 student_layers="0,2", fold_token_type=False, learning_rate=1e-3, ship=True,
                 alphas={"ce": 1.0, "mlm": 2.0, "cos": 0.0, "hidden": 0.5},
                 mix=(0.25,)),
    FinetuneConfig(model="m", train=("t.csv",), distil=True, baseline=False, epochs=0.5,
                   learning_rate=2e-5, text=("one", "two"), alphas={"hard": 0.0, "soft": 1.0}),
    EmbedConfig(teacher="t", corpus=("c",), sentences=9, normalize=False, choose="even")])
def test_settings_as_flags_give_the_same_settings(config):
    assert parse(type(config), "", "", flags(config)) == config
    assert "--corpus" in flags(config) or "--train" in flags(config)
    assert "--seed" not in flags(config)


def test_a_recipe_is_named_by_its_settings():
    assert flags(DistilConfig(recipe="rxn_bert", steps=3)) == ["--steps", "3"]


def test_a_weight_that_is_left_out_is_0():
    assert flags(DistilConfig(alphas={"ce": 5.0, "mse": 1.5})) == [
        "--alpha-mlm", "0.0", "--alpha-cos", "0.0", "--alpha-mse", "1.5"]

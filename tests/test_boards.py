"""Boards: what is sent to each, beside metrics.jsonl; Weights & Biases is a fake of its calls."""

import dataclasses
import importlib.machinery
import json
import sys
import types

import pytest

from distilbert_jax.config import DistilConfig, LoopConfig
from distilbert_jax.errors import UserError
from distilbert_jax.training.boards import BOARDS
from distilbert_jax.training.metrics_log import MetricsLog


@pytest.fixture
def wandb(monkeypatch):
    """A module with the calls that are made of wandb, and its runs."""
    fake = types.ModuleType("wandb")
    fake.__spec__ = importlib.machinery.ModuleSpec("wandb", None, origin="wandb/__init__.py")
    fake.Error = type("Error", (Exception,), {})
    fake.Settings = dict
    fake.runs = []

    class Run:
        def __init__(self, **given):
            self.given, self.sent, self.ended = given, [], False
            fake.runs.append(self)

        def log(self, figures, step):
            self.sent.append((step, figures))

        def finish(self):
            self.ended = True

    fake.init = lambda **given: Run(**given)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def test_every_board_can_be_asked_for(wandb):
    field, = (field for field in dataclasses.fields(LoopConfig) if field.name == "log_to")
    assert set(field.metadata["choices"]) == set(BOARDS)
    assert "--log-to" not in DistilConfig(log_to="wandb").meaning()  # a continuation may change it


def test_figures_are_sent_and_a_continuation_is_the_same_run(wandb, tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_PROJECT", raising=False)

    def logged(start, output=tmp_path):
        with MetricsLog(output, start, 0, log_to="wandb", settings={"--seed": 3}) as log:
            log.write(start + 1, {"loss": 0.5})
        return wandb.runs[-1]

    first = logged(0)
    assert first.sent == [(1, {"loss": 0.5})] and first.ended
    assert first.given["project"] == "distilbert_jax" and first.given["config"] == {"--seed": 3}
    assert first.given["dir"] == tmp_path and first.given["mode"] is None
    assert logged(1).given["id"] == first.given["id"]
    assert logged(0).given["id"] != first.given["id"]  # begun anew
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    (tmp_path / "other").mkdir()
    assert logged(1, tmp_path / "other").given["project"] == "mine"
    assert not (tmp_path / "tensorboard").exists()
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["loss"] == 0.5


def test_another_process_sends_nothing(wandb, tmp_path):
    BOARDS["wandb"](tmp_path, 0, {}, False).close()
    assert wandb.runs[0].given["mode"] == "disabled" and not list(tmp_path.iterdir())


def test_nobody_is_logged_in(wandb, tmp_path):
    def init(**_):
        raise wandb.Error("No API key configured. Use `wandb login` to log in.\n and more")

    wandb.init = init
    with pytest.raises(UserError) as error:
        MetricsLog(tmp_path, 0, 0, log_to="wandb")
    assert str(error.value) == (
        "--log-to wandb: No API key configured. Use `wandb login` to log in; or set "
        "WANDB_MODE=offline, or leave --log-to out")


@pytest.mark.parametrize("folder", [False, True])
def test_where_it_is_not_installed_nothing_begins(folder, tmp_path, monkeypatch):
    """A folder that wandb has left is none of its modules."""
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    if folder:
        (tmp_path / "wandb").mkdir()
    with pytest.raises(UserError, match="^--log-to wandb needs wandb: pip install wandb, or leave"):
        DistilConfig(log_to="wandb")

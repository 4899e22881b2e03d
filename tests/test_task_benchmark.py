"""The benchmark of training for a task: both sides see the same examples, and are counted right."""

import dataclasses
import time

import numpy as np
import pytest
from test_augment import examples

from distilbert_jax.benchmark import task
from distilbert_jax.benchmark.task import OurSide, TaskProblem
from distilbert_jax.models import hub
from distilbert_jax.models.start import init_params
from distilbert_jax.task_config import FinetuneConfig


@pytest.fixture
def problem(torch_model, tmp_path):
    """24 examples of two classes, 8 in an update; half of them have 7 tokens, half 12."""
    torch_model("BertForMaskedLM").save_pretrained(tmp_path)
    model = hub.load(str(tmp_path))
    one, other = examples(12, 5), examples(12, 10)
    some = one + other
    some = dataclasses.replace(some, labels=[np.array([float(i % 2)]) for i in range(24)])
    shape = dataclasses.replace(
        model.config, task="classify", num_labels=2, mlm_head=False, pooler=False)
    config = FinetuneConfig(model=str(tmp_path), batch_size=8, learning_rate=1e-3, mesh="8x1",
                            dtype="float32")
    params = init_params(shape, 0) | {
        name: model.params[name] for name in ("embeddings", "layers")}
    return TaskProblem(config, str(tmp_path), "bert", shape, params, some, 16, 3, 2)


def test_ours(problem):
    side = OurSide(problem, time.time())
    assert side.round() > 0 and side.round() > 0
    left = side.end()
    assert 0 < left["padding"] < 1 and left["first_update_seconds"] > 0


@pytest.mark.parametrize("padded, computed", [(True, 16), (False, 12)])
def test_trainer(padded, computed, problem):
    """A round is three updates of eight: every example once. A batch of short ones is unlikely."""
    pytest.importorskip("accelerate", reason="the Trainer needs it")
    from distilbert_jax.benchmark.trainer import TrainerSide

    side = TrainerSide(problem, padded, time.time())
    side._collator.real = side._collator.computed = 0  # leaves the first update out
    assert side.round() > 0
    assert side.end()["padding"] == pytest.approx(1 - 9.5 / computed)


def test_table():
    found = {"ours": {"rounds": [10.0, 40.0, 20.0], "first_update_seconds": 5.0, "padding": 0.1,
                      "process_bytes": 1e9},
             "trainer": {"rounds": [10.0, 10.0, 10.0], "first_update_seconds": 15.0,
                         "padding": 0.5, "process_bytes": 2e9}}
    rows = task.table(found, examples=100, epochs=3).splitlines()
    assert rows[2] == "| ours | 20.0 | 1.00 x | 10% | 5.0 | 20 | 1.00 x | 1,000 |"
    assert rows[3] == "| trainer | 10.0 | 2.00 x | 50% | 15.0 | 45 | 2.25 x | 2,000 |"

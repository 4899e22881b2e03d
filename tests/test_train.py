"""The loop: stopped and continued it is bit for bit the run that was not stopped."""

import dataclasses
import shutil
import signal
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from test_checkpoint import numbers, place
from test_sharding import mesh_of

from distilbert_jax import train as loop
from distilbert_jax.config import Masking, TrainConfig
from distilbert_jax.data.batches import row_indices
from distilbert_jax.data.pack import PackedRows
from distilbert_jax.models.encoder import graphdef
from distilbert_jax.optimizer import make_optimizer
from distilbert_jax.student import student_config, student_params
from distilbert_jax.train_step import Objective, init_state, make_train_step

pytestmark = pytest.mark.skipif(jax.device_count() != 8, reason="needs 8 devices")
STEPS = 7


@dataclasses.dataclass(frozen=True)
class Job:
    run: loop.Run
    params: dict  # NumPy
    tx: optax.GradientTransformation
    teacher_params: dict

    def train(self, output, **changes):
        """Train into `output`, with some fields of the run changed."""
        return loop.train(dataclasses.replace(self.run, output=output, **changes),
                          init_state(self.params, self.tx, seed=3), self.teacher_params)


@pytest.fixture(autouse=True)
def log_often(monkeypatch):
    monkeypatch.setattr(loop, "LOG_EVERY", 2)


@pytest.fixture(scope="module")
def job(tiny_model, batch_of, vocabulary):
    """A distillation with dropout, 8 rows an update of 11 there are, so that epochs are mixed."""
    teacher, teacher_params = tiny_model(seed=1, num_hidden_layers=2)
    student = student_config(teacher, 1, dropout=0.2)
    lengths = np.random.default_rng(0).integers(3, 9, (11, 2))
    ids = batch_of(lengths, 16)["input_ids"]
    rows = PackedRows(ids.astype(np.uint8), lengths.astype(np.uint16),
                      np.bincount(ids[ids > 0], minlength=teacher.vocab_size), {})
    config = TrainConfig(batch_size=8, save_every=3, eval_every=3, learning_rate=0.01, clip=1.0)
    tx, mesh = make_optimizer(config, STEPS), mesh_of("8x1")
    graphs = (graphdef(c, "float32") for c in (student, teacher))
    objective = Objective(alpha_ce=5.0, alpha_mlm=2.0, alpha_cos=1.0)
    run = loop.Run(
        config=config, steps=STEPS, settings={"seed": 56}, output=Path(), mesh=mesh, rows=rows,
        vocabulary=vocabulary, label="test",
        train_step=make_train_step(*graphs, tx, objective, Masking()),
        evaluate=lambda params: {"top1": float(params["mlm_head"]["bias"].sum())})
    params, teacher_params = jax.tree.map(
        aligned, (student_params(teacher_params, [1]), teacher_params))
    return Job(run, params, tx, place(teacher_params, "8x1"))


def aligned(x):
    """As float32 on a boundary of 64 bytes, where JAX takes over an array without copying it."""
    memory = np.empty(4 * x.size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    new = memory[start:start + 4 * x.size].view(np.float32).reshape(x.shape)
    new[...] = x
    return new


def metrics(output):
    """The figures in metrics.jsonl, without the clock."""
    return [{k: v for k, v in line.items() if k not in ("seconds", "waiting")}
            for line in loop.read_metrics(output)]


def assert_same(output, state, straight):
    expected_output, expected = straight
    jax.tree.map(np.testing.assert_array_equal, numbers(state), numbers(expected))
    assert metrics(output) == metrics(expected_output)


@pytest.fixture(scope="module")
def straight(job, tmp_path_factory):
    """Output and final state of the run that nobody stopped; and what it left of its start."""
    output = tmp_path_factory.mktemp("straight")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "LOG_EVERY", 2)
        return output, job.train(output)


def test_one_compilation_and_a_start_that_stays(job, tmp_path, caplog):
    def counted(*args):
        return job.run.train_step(*args)

    before = jax.tree.map(np.copy, job.params)
    with jax.log_compiles():
        job.train(tmp_path, train_step=counted)
    assert caplog.text.count("Finished XLA compilation of jit(counted)") == 1
    jax.tree.map(np.testing.assert_array_equal, job.params, before)  # not donated


def test_what_a_run_writes(job, straight):
    output, state = straight
    assert state.step == STEPS
    lines = loop.read_metrics(output)
    assert [line["step"] for line in lines] == [0, 2, 3, 4, 6, 6, STEPS]
    evaluated = [line["step"] for line in lines if "top1" in line]
    assert evaluated == [0, 3, 6]  # the last update is left to the report
    for line in lines:
        rows = [row_indices(56, step, 8, 11) for step in range(line["step"])]
        assert line["tokens_seen"] == sum(int(job.run.rows.segments[r].sum()) for r in rows)
        if "top1" not in line:
            assert line["train_loss"] == pytest.approx(
                5 * line["train_ce"] + 2 * line["train_mlm"] + line["train_cos"], rel=1e-5)
            assert line["train_grad_norm"] > 0
    assert len(list((output / "tensorboard").glob("events.*"))) == 1
    assert {path.name for path in (output / "checkpoints").iterdir()} == {"6", str(STEPS)}


def test_after_a_crash_it_goes_on_from_the_last_checkpoint(job, straight, tmp_path):
    calls = []

    def evaluate(params):
        calls.append(params)
        if len(calls) == 3:  # at update 6, before it is saved
            raise RuntimeError("power cut")
        return job.run.evaluate(params)

    with pytest.raises(RuntimeError, match="power cut"):
        job.train(tmp_path, evaluate=evaluate)
    log = tmp_path / "metrics.jsonl"
    assert [line["step"] for line in loop.read_metrics(tmp_path)] == [0, 2, 3, 4, 6]
    log.write_text(log.read_text() + '{"step": 6, "tok')  # cut off
    assert_same(tmp_path, job.train(tmp_path), straight)
    assert_same(tmp_path, job.train(tmp_path), straight)  # nothing is left to do


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_stops(number, job, straight, tmp_path):
    """It comes while the first of two processes logs update 4, which no checkpoint is due at."""
    before = signal.getsignal(number)

    class Log(loop.MetricsLog):
        def write(self, step, figures):
            super().write(step, figures)
            if step == 4:
                signal.raise_signal(number)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "MetricsLog", Log)
        with pytest.raises(loop.Interrupted, match="stopped at update 5 of 7; the same command"):
            job.train(tmp_path)
    assert signal.getsignal(number) == before
    assert (tmp_path / "checkpoints" / "5").is_dir()
    seconds = loop.read_metrics(tmp_path)[-1]["seconds"]
    assert_same(tmp_path, job.train(tmp_path), straight)
    assert loop.read_metrics(tmp_path)[-1]["seconds"] > seconds


def test_a_second_signal_acts_at_once():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's & ignores it
    try:
        with loop._StopSignal() as stop:
            signal.raise_signal(signal.SIGINT)
            assert stop.signal == signal.SIGINT
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_continuation_on_another_mesh(job, straight, tmp_path):
    expected_output, expected = straight
    output = shutil.copytree(expected_output, tmp_path / "copy")
    shutil.rmtree(output / "checkpoints" / str(STEPS))
    elsewhere = dataclasses.replace(job, teacher_params=place(job.teacher_params, "4x2"))
    state = elsewhere.train(output, mesh=mesh_of("4x2"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-4),
                 numbers(state).params, numbers(expected).params)
    for ours, theirs in zip(metrics(output), metrics(expected_output), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)

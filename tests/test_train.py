"""The loop: stopped and continued it is bit for bit the run that was not stopped."""

import dataclasses
import errno
import json
import os
import re
import shutil
import signal
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_checkpoint import numbers, place
from test_sharding import mesh_of

from distilbert_jax.config import DistilConfig
from distilbert_jax.data.batches import PackedBatches, row_indices
from distilbert_jax.data.pack import PackedRows
from distilbert_jax.errors import UserError
from distilbert_jax.models import bert, distilbert
from distilbert_jax.models.student import student_config, student_params
from distilbert_jax.training import train as loop
from distilbert_jax.training.assemble import assemble
from distilbert_jax.training.metrics_log import read_metrics

pytestmark = pytest.mark.skipif(jax.device_count() != 8, reason="needs 8 devices")
STEPS = 7


@dataclasses.dataclass(frozen=True)
class Job:
    run: loop.Run
    shapes: tuple  # of student and teachers
    params: dict  # NumPy
    teachers: dict

    @property
    def step(self):
        return self.run.assembly.train_step

    def train(self, output, train_step=None, **changes):
        """Train into `output`, with the step or some fields of the run changed."""
        run = dataclasses.replace(self.run, output=output, **changes)
        if train_step:
            run = dataclasses.replace(
                run, assembly=dataclasses.replace(run.assembly, train_step=train_step))
        return loop.train(run, run.assembly.init(self.params), self.teachers)


@pytest.fixture(autouse=True)
def log_often(monkeypatch):
    monkeypatch.setattr(loop, "LOG_EVERY", 2)


@pytest.fixture(scope="module")
def job(tiny_model, batch_of, vocabulary):
    """A distillation with dropout, 8 rows an update of 11 there are, so that epochs are mixed."""
    teacher, teacher_params = tiny_model(seed=1, num_hidden_layers=2)
    _, student = student_config(bert.FAMILY, teacher, 1, dropout=0.2)
    lengths = np.random.default_rng(0).integers(3, 9, (11, 2))
    ids = batch_of(lengths, 16)["input_ids"]
    rows = PackedRows(ids.astype(np.uint8), lengths.astype(np.uint16),
                      np.bincount(ids[ids > 0], minlength=teacher.vocab_size), {})
    config = DistilConfig(batch_size=8, save_every=3, eval_every=4, learning_rate=0.01, clip=1.0,
                          dtype="float32")
    run = loop.Run(
        describe=str,
        config=config, steps=STEPS, settings={"--seed": 56}, output=Path(),
        batches=PackedBatches(rows, config.seed, 8),
        vocabulary=vocabulary, label="test",
        assembly=assemble(config, distilbert.FAMILY, student, [teacher], mesh_of("8x1"), STEPS),
        evaluate=lambda params: {"mlm_loss": float(abs(params["mlm_head"]["bias"]).sum())})
    params, teacher_params = jax.tree.map(
        aligned, (student_params(teacher_params, [1]), teacher_params))
    return Job(run, (student, [teacher]), params, place({"teacher": teacher_params}, "8x1"))


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
            for line in read_metrics(output)]


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
        return job.step(*args)

    before = jax.tree.map(np.copy, job.params)
    with jax.log_compiles():
        job.train(tmp_path, train_step=counted)
    assert caplog.text.count("Finished XLA compilation of jit(counted)") == 1
    jax.tree.map(np.testing.assert_array_equal, job.params, before)  # not donated


def test_a_batch_says_which_rows_of_which_epoch_it_has(job):
    """11 rows, 8 an update: the second batch spans two epochs."""
    batch = loop._reader(job.run)(1)
    assert batch["row"].tolist() == row_indices(56, 1, 8, 11).tolist()
    assert batch["epoch"].tolist() == [0, 0, 0, 1, 1, 1, 1, 1]


def test_what_a_run_writes(job, straight):
    output, state = straight
    assert state.step == STEPS
    lines = read_metrics(output)
    assert [line["step"] for line in lines] == [0, 2, 3, 4, 4, 6, 6, STEPS, STEPS]
    evaluated = {line["step"]: line["mlm_loss"] for line in lines if "mlm_loss" in line}
    assert list(evaluated) == [0, 3, 4, 6, STEPS]  # every fourth, and what is saved
    for line in lines:
        rows = [row_indices(56, step, 8, 11) for step in range(line["step"])]
        assert line["tokens_seen"] == sum(int(job.run.batches.rows.segments[r].sum()) for r in rows)
        if "mlm_loss" not in line:
            assert line["train_loss"] == pytest.approx(
                5 * line["train_ce"] + 2 * line["train_mlm"] + line["train_cos"], rel=1e-5)
            assert line["train_grad_norm"] > 0
    assert len(list((output / "tensorboard").glob("events.*"))) == 1
    saved = {path.name: json.loads((path / "run.json").read_text())
             for path in (output / "checkpoints").iterdir()}
    del evaluated[0]
    best = min((3, 6, STEPS), key=evaluated.get)  # 4 was no checkpoint
    assert set(saved) == {str(best), "6", str(STEPS)}
    assert all(run == {"settings": {"--seed": 56}, "figures": {"mlm_loss": evaluated[int(step)]}}
               for step, run in saved.items())


def test_after_a_crash_it_goes_on_from_the_last_checkpoint(job, straight, tmp_path):
    calls = []

    def evaluate(params):
        calls.append(params)
        if len(calls) == 4:  # at update 6, before it is saved
            raise RuntimeError("power cut")
        return job.run.evaluate(params)

    with pytest.raises(RuntimeError, match="power cut"):
        job.train(tmp_path, evaluate=evaluate)
    log = tmp_path / "metrics.jsonl"
    assert [line["step"] for line in read_metrics(tmp_path)] == [0, 2, 3, 4, 4, 6]
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
            if step == 4 and "train_loss" in figures:
                signal.raise_signal(number)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "MetricsLog", Log)
        with pytest.raises(loop.Interrupted, match=(
                r"stopped at update 5 of 7, saved in \d+\.\d s; the same command goes on")):
            job.train(tmp_path)
    assert signal.getsignal(number) == before
    assert (tmp_path / "checkpoints" / "5").is_dir()
    seconds = read_metrics(tmp_path)[-1]["seconds"]
    assert_same(tmp_path, job.train(tmp_path), straight)
    assert read_metrics(tmp_path)[-1]["seconds"] > seconds


def test_a_second_ctrl_c_loses_what_is_not_saved(job, straight, tmp_path, capfd):
    """And the error says from which update the run goes on."""
    class Log(loop.MetricsLog):
        def write(self, step, figures):
            super().write(step, figures)
            if step == 4 and "train_loss" in figures:
                signal.raise_signal(signal.SIGINT)
                signal.raise_signal(signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's & ignores it
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "MetricsLog", Log)
        patch.setattr(loop.Checkpoints, "poll", loop.Checkpoints.wait)
        with pytest.raises(KeyboardInterrupt) as stopped:
            job.train(tmp_path)
    signal.signal(signal.SIGINT, before)
    assert stopped.value.__notes__ == ["the same command goes on from update 3"]
    assert "to save; press again to lose 1 update\n" in capfd.readouterr().err
    assert_same(tmp_path, job.train(tmp_path), straight)


def test_fewer_steps_than_are_done(job, straight, tmp_path, capfd):
    output = shutil.copytree(straight[0], tmp_path / "copy")
    assert job.train(output, steps=4).step == STEPS
    assert f"test: {STEPS} updates are done, --steps asks for 4\n" in capfd.readouterr().err
    assert metrics(output) == metrics(straight[0])


def test_a_log_that_cannot_be_written(job, tmp_path, monkeypatch):
    """It stops in one line; or goes on, and writes the lines when there is room again."""
    full = []

    class Log(loop.MetricsLog):
        def __init__(self, *args):
            super().__init__(*args)
            self._file = Full(self._file)

    class Full:
        def __init__(self, file):
            self.close, self._write = file.close, file.write

        def write(self, content):
            if full:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return self._write(content[:5])

    monkeypatch.setattr(loop, "MetricsLog", Log)

    def evaluate(params):
        full[:] = [True] if not full and not list(tmp_path.glob("checkpoints/3")) else []
        return job.run.evaluate(params)

    config = dataclasses.replace(job.run.config, on_save_error="continue")
    full[:] = []
    with pytest.raises(UserError, match="metrics.jsonl cannot be written .No space left on device"):
        job.train(tmp_path / "stop", evaluate=evaluate)
    full[:] = []
    job.train(tmp_path, evaluate=evaluate, config=config)
    assert [line["step"] for line in metrics(tmp_path)] == [0, 2, 3, 4, 4, 6, 6, STEPS, STEPS]


def spoilt(job, steps):
    """A step whose loss is not a number at these updates."""
    def step(state, teachers, vocabulary, batch):
        bad = jnp.isin(state.step, jnp.array([s - 1 for s in steps]))
        params = jax.tree.map(lambda x: x * jnp.where(bad, jnp.nan, 1), teachers)
        return job.step(state, params, vocabulary, batch)
    return step


def test_skipped_updates_are_counted_and_logged(job, tmp_path, capfd, monkeypatch):
    """Nothing is saved amid them; a stop there goes back, and counts them again."""
    monkeypatch.setattr(loop, "ESTIMATE_UPDATES", 3)
    config = dataclasses.replace(job.run.config, max_skipped=3)
    options = dict(train_step=spoilt(job, [2, 3, 5]), config=config)
    state = job.train(tmp_path / "a", **options)
    lines = read_metrics(tmp_path / "a")
    assert [x["step"] for x in lines if x.get("train_skipped")] == [2, 3, 5]
    assert {path.name for path in (tmp_path / "a" / "checkpoints").iterdir()} == {"6", str(STEPS)}
    said = capfd.readouterr().err
    assert "update 3 skipped: loss nan, gradient norm nan (2 in a row)\n" in said
    assert "update 5 skipped: loss nan, gradient norm nan (1 in a row)\n" in said
    (left,) = re.finditer(r"about (.*) left: 3 updates of (.*) s\n", said)
    assert said.index("update 0: {") < said.index("compiling the update, once ...\n") < (
        said.index("compiled in ")) < left.start()
    assert left[1].endswith(" seconds") and float(left[2]) > 0
    assert state.step == STEPS and all(
        np.isfinite(x).all() for x in jax.tree.leaves(numbers(state)))


def test_how_long_a_run_still_takes(capfd, monkeypatch):
    """By the updates after the one that was compiled: 20, or as many as end in 5 seconds."""
    def said(seconds, steps):
        clock = iter([1000.0 + seconds * update for update in range(steps)])
        monkeypatch.setattr(loop.time, "monotonic", lambda: next(clock))
        rest = loop._Rest(steps)
        for step in range(31, steps):
            rest.estimate(step)
        return capfd.readouterr().err

    assert said(0.5, 91) == "about 25 seconds left: 50 updates of 0.5 s\n"
    assert said(0.1, 8051) == "about 13 minutes left: 8,000 updates of 0.1 s\n"
    assert said(6.0, 6032) == "about 10 hours left: 6,000 updates of 6 s\n"


def test_too_many_skipped_updates_in_a_row(job, tmp_path):
    """The first four go well; then each attempt ends at the same update."""
    config = dataclasses.replace(job.run.config, max_skipped=3)
    options = dict(train_step=spoilt(job, [4, 5, 6, 7]), config=config)
    rows = ", ".join(map(str, row_indices(56, 5, 8, 11)))
    for _ in range(2):
        with pytest.raises(UserError, match=(
                "update 6 skipped: loss nan, gradient norm nan, as the 2 before it "
                rf"\(--max-skipped 3\); rows of its batch: {rows}; nothing is saved since")):
            job.train(tmp_path, **options)
        assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["3"]


def test_a_stop_amid_skipped_updates_hides_none(job, tmp_path, monkeypatch):
    monkeypatch.setattr(loop.StopSignal, "asked", lambda self: True)
    with pytest.raises(loop.Interrupted, match="the last checkpoint is of update 0; the same"):
        job.train(tmp_path, train_step=spoilt(job, [1]))
    assert not list((tmp_path / "checkpoints").iterdir())


def test_a_continuation_on_another_mesh(job, straight, tmp_path):
    expected_output, expected = straight
    output = shutil.copytree(expected_output, tmp_path / "copy")
    shutil.rmtree(output / "checkpoints" / str(STEPS))
    elsewhere = dataclasses.replace(job, teachers=place(job.teachers, "4x2"))
    state = elsewhere.train(output, assembly=assemble(
        job.run.config, distilbert.FAMILY, *job.shapes, mesh_of("4x2"), STEPS))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-4),
                 numbers(state).params, numbers(expected).params)
    for ours, theirs in zip(metrics(output), metrics(expected_output), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)

"""The benchmark of training: both sides do the same work, and it is counted right."""

import dataclasses
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

from distilbert_jax.benchmark import problem as given
from distilbert_jax.benchmark import training, training_report
from distilbert_jax.benchmark.settings import TrainBenchmark
from distilbert_jax.benchmark.sides import Side
from distilbert_jax.data import tokenize
from distilbert_jax.errors import UserError
from distilbert_jax.models import bert, convert, distilbert
from distilbert_jax.models.student import student_config

ROOT = Path(__file__).parents[1]
TINY = dataclasses.replace(
    given.SHAPES["small"], vocab_size=72, hidden_size=16, num_hidden_layers=2,
    intermediate_size=24, max_position_embeddings=24, hidden_dropout=0.0, attention_dropout=0.0,
    initializer_range=0.3)


@pytest.fixture
def tiny(monkeypatch):
    """The settings of a benchmark of tiny models."""
    monkeypatch.setitem(given.SHAPES, "small", TINY)
    return TrainBenchmark(batch_size=8, sequence_length=16, updates=2, rounds=2, dtype="float32")


@pytest.mark.parametrize("padded", [False, True])
def test_both_sides_train_the_same(padded, tiny):
    """Six updates from the same parameters, without dropout: the losses of all agree."""
    torch = pytest.importorskip("torch")
    from distilbert_jax.benchmark.torch_loop import TorchLoop

    problem = given.problem_of(tiny)
    rows = problem.theirs
    if padded:
        lengths = np.array([14, 3, 9, 14, 5, 11, 7, 2])
        rows = [given.rows_of(batch["input_ids"], lengths) for batch in rows]
    problem = dataclasses.replace(
        problem, student=student_config(bert.FAMILY, TINY, 1, dropout=0.0)[1], ours=3 * rows,
        theirs=3 * rows)
    ours = training.Ours(problem)
    theirs = TorchLoop(problem.teacher, problem.student, problem.config,
                       ours.masked(problem.theirs))
    for module, params, family in (
            (theirs.teacher, ours.teachers["teacher"], bert.FAMILY),
            (theirs.student, ours.start, distilbert.FAMILY)):
        tensors = convert.to_hf(params, family)
        module.load_state_dict({k: torch.tensor(x) for k, x in tensors.items()}, strict=False)
    for number in range(6):
        expected, found = theirs.update(number), ours.update(number)
        for name, value in expected.items():
            np.testing.assert_allclose(found[name], value, rtol=1e-4, err_msg=f"{name} {number}")


def test_states_that_are_kept(tiny):
    """The same masks and losses as with the teacher in the update, whose layers do not count."""
    problem = given.problem_of(dataclasses.replace(tiny, dtype="float32"))
    before = training._given(training.KEPT, problem, [])
    live, kept = training.Ours(problem), training.Ours(before)
    for number in (0, 1):
        expected, found = live.update(number), kept.update(number)
        for name, value in expected.items():
            np.testing.assert_allclose(found[name], value, rtol=1e-3, err_msg=f"{name} {number}")
    assert list(kept._fixed[0]["teacher"]) == ["embeddings", "mlm_head"]
    full = [given.flops(each, each.ours) for each in (problem, before)]
    assert full[0] - full[1] == given.flops(problem, problem.ours) - given.flops(
        dataclasses.replace(problem, teacher=dataclasses.replace(
            problem.teacher, num_hidden_layers=0)), problem.ours) > 0


def test_operations_are_counted(tiny):
    """Against the sum over each product of matrices, document by document."""
    config = dataclasses.replace(TINY, num_hidden_layers=2)
    row = {"segment_ids": np.array([[1, 1, 1, 2, 2, 0]])}  # documents of 3 and 2 tokens
    problem = dataclasses.replace(
        given.problem_of(tiny), student=student_config(bert.FAMILY, config, 1, 0.0)[1])
    d, f, v = 16, 24, 72

    def forward(layers, n):
        products = layers * (4 * [(n, d, d)] + [(n, d, f), (n, f, d), (n, d, n), (n, n, d)])
        return sum(2 * m * k * o for m, k, o in [*products, (n, d, d), (n, d, v)])

    expected = sum(forward(2, n) + 3 * forward(1, n) for n in (3, 2))
    assert given.flops(problem, [row]) == expected


def test_documents_are_the_same_on_both_sides(tiny, toy):
    pytest.importorskip("transformers")
    tokenizer = tokenize.load_tokenizer(str(toy / "teacher"), None)
    spec = tokenize.spec(tokenizer)
    config = dataclasses.replace(
        tiny, corpus=(str(toy / "corpus.txt"),), tokenizer=str(toy / "teacher"), batch_size=4)
    ours, theirs, counts = given.documents(config, spec)
    assert len(ours) == 2 and len(theirs) == given.LENGTHS
    known = {line for line in (toy / "corpus.txt").read_text().splitlines()}
    for batch in [*ours, *theirs]:
        for ids, segments in zip(batch["input_ids"], batch["segment_ids"], strict=True):
            for number in range(1, segments.max() + 1):
                words = tokenizer.decode(ids[segments == number], skip_special_tokens=True)
                assert any(words in text for text in known)
    lengths = [batch["segment_ids"].sum(1) for batch in theirs]
    bins = [x.max() // given.BIN for x in lengths]
    assert bins == sorted(bins) and bins[0] < bins[-1]
    assert all(np.ptp(x) < given.BIN + 2 for x in lengths[:-1])  # a bin, or two neighbours
    per_update = np.mean([np.sum(batch["segment_ids"] > 0) for batch in ours])
    assert np.sum(lengths) / len(theirs) == pytest.approx(per_update, rel=0.15)
    assert counts.sum() > 0 and not counts[tokenizer.mask_token_id]


class Environment:
    """A side that gives a variable of its process."""

    def __init__(self, began):
        pass

    def ready(self):
        return os.environ.get("MALLOC_MMAP_MAX_")


def test_sides_that_keep_their_memory(tiny, monkeypatch):
    monkeypatch.delenv("MALLOC_MMAP_MAX_", raising=False)
    assert [Side(Environment, keep).ready for keep in (True, False)] == ["0", None]
    names, asked = ("ours", "torch", "torch-memory", "torch.compile"), []

    def side(build, keep_memory):
        asked.append((build.args[0], keep_memory))
        return mock.Mock(ready=("cpu", []))

    monkeypatch.setattr(training, "Side", side)
    with pytest.raises(statistics.StatisticsError):  # of no rounds
        training.measure(given.problem_of(tiny), names, rounds=0)
    assert asked == list(zip(names, (False, False, True, True), strict=True))


def test_measured_figures(tiny, tmp_path):
    """Ours alone, in a process of its own."""
    problem = dataclasses.replace(given.problem_of(tiny), devices=1)
    measured = training.measure(problem, ("ours",), rounds=2)
    ours = measured.sides["ours"]
    assert ours.devices == 1 and ours.padding == 0 and len(ours.rounds) == 2
    assert 0 < ours.utilisation < 1 and ours.compiled_bytes > 0
    assert 0 < ours.compile_seconds < ours.first_update_seconds
    assert measured.ratio("ours") == 1
    assert training_report.table(measured).splitlines()[2].startswith("| ours |")


def runs(process: str) -> bool:
    try:
        return " Z " not in Path("/proc", process, "stat").read_text()
    except OSError:
        return False


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="children are found in /proc")
def test_ctrl_c_ends_all_sides(tmp_path):
    """One word, no traceback, and nobody is left; ours waits for its turn, PyTorch starts."""
    pytest.importorskip("torch")
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's & ignores it
    driver = subprocess.Popen(
        [sys.executable, ROOT / "experiments" / "benchmark.py", "train", "--batch-size", "1",
         "--sequence-length", "8", "--output", tmp_path], stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, start_new_session=True,
        env=os.environ | {"JAX_NUM_CPU_DEVICES": "1"})
    signal.signal(signal.SIGINT, before)
    children = Path(f"/proc/{driver.pid}/task/{driver.pid}/children")
    while len(sides := children.read_text().split()) < 3:  # beside multiprocessing's own
        assert driver.poll() is None
        time.sleep(0.1)
    time.sleep(1)
    os.killpg(driver.pid, signal.SIGINT)
    said, _ = driver.communicate(timeout=60)  # ends when nobody is left who could write
    assert said == "interrupted\n" and driver.returncode == 1
    until = time.monotonic() + 60
    while any(map(runs, sides)):
        assert time.monotonic() < until
        time.sleep(0.1)


def test_rows_that_devices_do_not_divide_are_one_line(tiny):
    with pytest.raises(UserError, match="--batch-size 8 .* 8 rows, which 3 devices"):
        training.measure(dataclasses.replace(given.problem_of(tiny), devices=3), ("ours",), 1)


def test_ratio_is_of_rounds_side_by_side():
    side = training.Figures(0.0, [1.0, 20.0, 6.0], 0.0, 0.0, 0.0, 0.0, 0, 0, 0, 1, "float32")
    other = dataclasses.replace(side, rounds=[1.0, 10.0, 2.0])
    assert training.Measured({"ours": side, "torch": other}, 1.0, 0.0).ratio("torch") == 2


def test_sweep(tiny, tmp_path, monkeypatch):
    """Every panel has its points; what is measured in each is what it says."""
    seen = []

    def fake(problem, sides, rounds):
        rows, length = problem.ours[0]["input_ids"].shape
        seen.append((rows, length, problem.teacher.num_hidden_layers, problem.devices, sides))
        figures = training.Figures(float(rows), [1.0], 0.0, 0.0, 0.0, 0.0, 0, 0, 0, 1, "float32")
        return training.Measured(dict.fromkeys(sides, figures), 1.0, 0.0)

    monkeypatch.setattr(training_report, "measure", fake)
    training_report.sweep(dataclasses.replace(tiny, output=str(tmp_path)))
    assert {(n, 16, 2, 0, tiny.sides) for n in training_report.BATCHES} <= set(seen)
    assert {(8, n, 2, 0, tiny.sides) for n in training_report.LENGTHS} <= set(seen)
    assert {(8, 16, n, 0, tiny.sides) for n in training_report.LAYERS} <= set(seen)
    assert (8, 16, 2, 1, ("ours",)) in seen
    found = json.loads((tmp_path / "sweep.json").read_text())["tokens_per_second"]
    assert len(found) == 4 and (tmp_path / "sweep.png").stat().st_size

"""Ablation: rows and seeds in folders of their own, which are run once, and compared in pairs."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
from safetensors.numpy import load_file, save_file

from distilbert_jax.benchmark import latency
from distilbert_jax.config import AblationConfig, DistilConfig
from distilbert_jax.errors import UserError
from distilbert_jax.jobs import ablate as job
from distilbert_jax.jobs.distil import distil
from distilbert_jax.jobs.teacher_states import TeacherStates
from distilbert_jax.recipes import recipes

ROWS = {"all losses": {}, "no MLM": {"alphas": {"ce": 5.0, "cos": 1.0}}}
TOP1 = {"all losses": [0.50, 0.60, 0.55], "no MLM": [0.51, 0.62, 0.56]}
TEACHER = 0.8  # its top-1


@pytest.fixture
def config(toy, tmp_path):
    return AblationConfig(
        teacher=toy / "teacher", corpus=toy / "corpus.txt", valid_share=0.2, sequence_length=24,
        batch_size=8, steps=2, student_layers=1, seed=7, seeds=3, output=tmp_path / "out")


@pytest.fixture
def runs(monkeypatch):
    """The runs that were started, each of which reaches what TOP1 says."""
    started = []

    def distil(run):
        assert Path(run.corpus[0], "manifest.json").exists() and run.steps == 2
        row, seed = Path(run.output).parent.name.replace("-", " "), run.seed
        started.append((row, seed))
        top1 = TOP1[row][seed - 7]
        figures = {"top1": top1, "masked": 99.0} | (
            {"retention": top1 / TEACHER} if TEACHER else {})
        Path(run.output).mkdir(parents=True, exist_ok=True)
        Path(run.output, "report.json").write_text(json.dumps({
            "models": {"student": figures, "student at start": {"top1": 0.1},
                       "teacher": {"top1": TEACHER}},
            "tokens": 2e6, "seconds": 90.0, "settings": run.meaning()}))

    monkeypatch.setattr(job, "distil", distil)
    return started


def test_rows_are_compared_seed_by_seed(config, runs, capsys):
    page = job.ablate(config, ROWS).read_text()
    assert runs == [(row, seed) for seed in (7, 8, 9) for row in ROWS]
    gaps = 100 * np.subtract(TOP1["no MLM"], TOP1["all losses"])
    low, high = scipy.stats.ttest_1samp(gaps, 0).confidence_interval(0.95)
    line, = (row for row in page.splitlines() if row.startswith("| no MLM"))
    assert [cell.strip() for cell in line.split("|")[1:-1]] == [
        "no MLM", "10.00", "56.00", "51.00 to 62.00", "70.00",
        f"{gaps.mean():+.2f} ({low:+.2f} to {high:+.2f})", "2.00", "1.5"]
    assert low < 0 and "- no MLM: no difference is shown" in page
    assert page.strip() in capsys.readouterr().out
    found = json.loads((Path(config.output) / "report.json").read_text())
    assert found["rows"]["no MLM"]["alphas"] == {"ce": 5.0, "cos": 1.0}
    assert [run["seed"] for run in found["rows"]["no MLM"]["figures"]] == [7, 8, 9]
    assert (Path(config.output) / "ablation.png").exists()


def test_a_teacher_that_guesses_nothing(config, runs, monkeypatch):
    """What is kept of its top-1 is not defined, and the rest is said."""
    monkeypatch.setitem(globals(), "TEACHER", 0.0)
    page = job.ablate(config, ROWS).read_text()
    line, = (row for row in page.splitlines() if row.startswith("| no MLM"))
    assert [cell.strip() for cell in line.split("|")[3:6]] == [
        "56.00", "51.00 to 62.00", "not defined"]
    assert (Path(config.output) / "ablation.png").exists()


def test_a_real_run_leaves_what_the_table_needs(config, toy, tmp_path):
    another = tmp_path / "another"
    shutil.copytree(toy / "teacher", another)
    tensors = load_file(another / "model.safetensors")
    tensors = {name: x + np.float32(0.01) for name, x in tensors.items()}
    save_file(tensors, another / "model.safetensors", metadata={"format": "pt"})
    page = job.ablate(dataclasses.replace(config, seeds=1), {"all": {}}).read_text()
    found = json.loads((Path(config.output) / "report.json").read_text())["rows"]["all"]
    run, = found["figures"]
    own = json.loads((Path(config.output) / "all/seed-7/report.json").read_text())
    assert own["models"]["student"]["top1"] == run["top1"] and run["tokens"] > 0
    assert own["models"]["teacher"]["layers"] == 2 and own["updates"] == 2
    assert "1 seed(s)" in page and "no difference" not in page

    log = (Path(config.output) / "all/seed-7/metrics.jsonl").read_bytes()
    job.ablate(dataclasses.replace(config, seeds=1), {"all": {}})  # is finished, and not trained
    again = json.loads((Path(config.output) / "report.json").read_text())["rows"]["all"]
    assert [run | {"latency": 0} for run in again["figures"]] == [run | {"latency": 0}]
    assert (Path(config.output) / "all/seed-7/metrics.jsonl").read_bytes() == log
    for other in ({"learning_rate": 1e-3}, {"teacher": str(another)}):  # is not read as this one
        with pytest.raises(UserError, match="learning-rate|teacher"):
            job.ablate(dataclasses.replace(config, seeds=1, **other), {"all": {}})


def test_runs_that_need_the_same_states_share_one_pass_of_the_teacher(config, monkeypatch):
    """And a run on states that another one has kept is that on its own."""
    monkeypatch.setattr(latency, "REPEATS", 1)
    passes, part = [], TeacherStates._part

    def counted(states, numbers, stopped):
        passes.append(Path(states.config.output).parent.name)
        return part(states, numbers, stopped)

    monkeypatch.setattr(TeacherStates, "_part", counted)
    config = dataclasses.replace(config, seeds=1, kept_maskings=1)
    rows = {"all": {}, "no-cosine": {"alphas": {"ce": 5.0, "mlm": 2.0}}, "more": {"mask_rate": 0.4}}
    job.ablate(config, rows)
    assert passes == ["all", "more"]
    kept = {path.name: json.loads((path / "request.json").read_text())
            for path in Path(config.output, "states").iterdir()}
    assert sorted(each["mask rate"] for each in kept.values()) == [0.15, 0.4]
    run = job._run(config, "no-cosine", rows["no-cosine"], 7)
    own = dataclasses.replace(run, corpus=str(Path(config.output, "data")), states="",
                              output=str(Path(config.output, "own/seed-7")))
    distil(own)
    assert passes[2:] == ["own"]
    for name in ("student/model.safetensors", "states/00000.npy"):
        one, other = (Path(each.output, name) for each in (run, own))
        one = one if one.exists() else Path(run.states, "00000.npy")
        assert one.read_bytes() == other.read_bytes()


@pytest.mark.parametrize("changes, shared", [
    ({"learning_rate": 1e-3, "batch_size": 4, "choose": "greedy", "init": "teacher"}, True),
    ({"alphas": {"mlm": 1.0, "skew": 1.0, "cos": 0.0}, "temperature": 1.0}, True),
    ({"restrict_ce_to_mask": True}, True),  # the cosine loss reads all positions
    ({"restrict_ce_to_mask": True, "alphas": {"ce": 1.0, "cos": 0.0}}, False),
    ({"mask_rate": 0.4}, False), ({"kept_maskings": 2}, False), ({"state_dtype": "exact"}, False),
    ({"dtype": "float64"}, False), ({"teacher": "another"}, False)])
def test_which_runs_share_states(changes, shared, config):
    config = dataclasses.replace(config, kept_maskings=1)
    one, other = (job._run(config, "row", row, 7).states for row in ({}, changes))
    assert Path(one).parent == Path(config.output, "states") and (one == other) == shared
    assert job._run(config, "row", changes, 8).states not in (one, other)


def test_states_of_a_row_of_its_own(config):
    """A row may keep none, or name their folder."""
    assert not job._run(config, "row", {}, 7).states
    kept = dataclasses.replace(config, kept_maskings=1)
    assert not job._run(kept, "row", {"kept_maskings": 0}, 7).states
    assert job._run(config, "row", {"kept_maskings": 1, "states": "mine"}, 7).states == "mine"


@pytest.mark.parametrize("changes, line", [
    ({"alpha": 1}, "row odd changes alpha, which is no setting of distil"),
    ({"init": "odd"}, "row odd: unknown --init 'odd'"),
])
def test_a_row_that_no_run_can_have(changes, line, config, runs):
    with pytest.raises(UserError, match=line):
        job.ablate(config, ROWS | {"odd": changes})
    assert not runs


def test_what_is_missing_is_named(config, runs):
    for name, nothing in (("teacher", ()), ("corpus", ())):
        with pytest.raises(UserError, match=f"--{name} is missing"):
            job.ablate(dataclasses.replace(config, **{name: nothing}), ROWS)


def test_a_difference_has_an_interval_of_students_t():
    assert job.difference([1.0], [3.0]) == (-2.0, None)
    gap, (low, high) = job.difference([1.0, 2.0, 4.0], [0.0, 0.0, 0.0])
    expected = scipy.stats.t.interval(0.95, 2, 7 / 3, scipy.stats.sem([1, 2, 4]))
    assert (gap, low, high) == pytest.approx((7 / 3, *expected))


@pytest.mark.parametrize("name", ["table_4", "three_layers"])
def test_every_row_of_a_recipe_can_be_run(name):
    recipe = recipes()[name]
    for changes in recipe.ABLATION.values():
        DistilConfig(teacher="t", corpus="c", **recipe.DISTIL | changes)

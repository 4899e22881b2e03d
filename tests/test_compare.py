"""Finished runs side by side: each job's own figures, found where it leaves them, or in a list."""

import json
import re
from pathlib import Path

import pytest

from distilbert_jax.errors import UserError
from distilbert_jax.jobs.compare import PLOT, compare

ROOT = Path(__file__).parents[1]
GONE = {"run": "gone", "figure": "top-1", "teacher": 0.9, "student": 0.8, "kept": 0.889,
        "layers": [12, 3], "faster": 3.5}


def shape(layers, parameters, **more):
    return {"layers": layers, "parameters": parameters} | more


MASKED = {"models": {
    "teacher": shape(12, 6675535, top1=0.9475, latency=20.0),
    "student": shape(3, 1931087, top1=0.91, retention=0.9604, retention_interval=[0.95, 0.97],
                     latency=5.0),
    "student at start": shape(3, 1931087, top1=0.5, latency=5.0)}}
TASK = {
    "task": "mrpc", "score": ["f1", "accuracy"],
    "size": {"teacher": shape(6, 22000), "plain": shape(3, 17000), "distilled": shape(3, 17000)},
    "latency_ms": {"teacher": 6.0, "plain": 3.0, "distilled": 2.0},
    "parts": {"dev": {
        "teacher": {"score": 0.8}, "plain": {"score": None},
        "distilled": {"score": 0.76, "retention": 0.95, "retention_interval": [0.92, 0.99]}}}}
ALONE = {"task": "own", "score": ["accuracy"], "size": {"model": shape(6, 22000)},
         "latency_ms": {"model": 6.0}, "parts": {"dev": {"model": {"score": 0.5}}}}
SENTENCES = {
    "size": {"teacher": shape(6, 22000), "student": shape(3, 17000)},
    "sentences_per_second": {"teacher": [100.0, 10.0], "student": [210.0, 25.0]},
    "pairs": {"dev.tsv": {"teacher": {"value": 0.8}, "student": {
        "value": 0.72, "retention": 0.9, "retention_interval": [0.88, 0.91]}}}}


@pytest.fixture
def runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, file, content in (
            ("mlm", "report.json", MASKED), ("task", "metrics.json", TASK),
            ("alone", "metrics.json", ALONE), ("sts", "metrics.json", SENTENCES)):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text(json.dumps(content))
    return tmp_path


def cells(text):
    return [[cell.strip() for cell in line.strip("|").split("|")]
            for line in text.splitlines() if line.startswith("|")][2:]


def test_every_kind_of_run(runs):
    found = compare(["mlm", "task", "alone", "sts"], "plots")
    assert cells(found) == [
        ["mlm", "top-1", "94.75", "91.00", "96.04% (95.00% to 97.00%)", "12 → 3", "1,931,087",
         "4.00"],
        ["task, plain", "mrpc: f1, accuracy", "80.00", "", "", "6 → 3", "17,000", "2.00"],
        ["task", "mrpc: f1, accuracy", "80.00", "76.00", "95.00% (92.00% to 99.00%)", "6 → 3",
         "17,000", "3.00"],
        ["alone", "own: accuracy", "", "50.00", "", "6", "22,000", ""],
        ["sts", "Spearman dev.tsv", "80.00", "72.00", "90.00% (88.00% to 91.00%)", "6 → 3",
         "17,000", "2.50"]]
    assert found.endswith(f"plot: plots/{PLOT}") and (runs / "plots" / PLOT).stat().st_size > 5000


def test_what_a_report_does_not_define_is_not_said(runs):
    """Retention, of a teacher that guesses one word alone, or that scores below 0."""
    (runs / "mlm" / "report.json").write_text(json.dumps({"models": MASKED["models"] | {
        "student": shape(3, 1931087, top1=0.91, latency=5.0)}}))
    (runs / "sts" / "metrics.json").write_text(json.dumps(SENTENCES | {"pairs": {"dev.tsv": {
        "teacher": {"value": -0.1}, "student": {"value": 0.2}}}}))
    found = compare(["mlm", "sts"], "plots")
    assert [row[4] for row in cells(found)] == ["", ""] and "plot" not in found


def test_nothing_to_plot(runs):
    assert "plot" not in compare(["alone"], "plots") and not (runs / "plots" / PLOT).exists()


def test_no_run(runs):
    with pytest.raises(UserError, match="plots holds no finished run of distil, finetune or"):
        compare(["mlm", "plots"])
    with pytest.raises(UserError, match="--output mlm/report.json cannot be used: File exists"):
        compare(["mlm"], "mlm/report.json")


def test_a_list_of_runs_that_are_gone(runs):
    Path("gone.json").write_text(json.dumps([
        GONE, GONE | {"interval": [0.88, 0.9], "parameters": 1931087, "source": "README.md"}]))
    found = cells(compare(["gone.json", "sts"], "plots"))
    assert found[:2] == [
        ["gone", "top-1", "90.00", "80.00", "88.90%", "12 → 3", "", "3.50"],
        ["gone", "top-1", "90.00", "80.00", "88.90% (88.00% to 90.00%)", "12 → 3", "1,931,087",
         "3.50"]]
    assert found[2][0] == "sts" and Path("plots", PLOT).exists()


@pytest.mark.parametrize("content, line", [
    (None, "gone.json cannot be read: No such file"),
    ("[{", "gone.json is not JSON: Expecting property name"),
    ("3", "gone.json, run 1 is 3: an object is expected"),
    (json.dumps([GONE, GONE | {"fastr": 1.0}]),
     "unknown figure in gone.json, run 2: 'fastr'; did you mean faster?"),
    (json.dumps([{"run": "gone"}]),
     "gone.json, run 1 lacks figure, teacher, student, kept, layers, faster"),
    (json.dumps([GONE | {"kept": "88.9 %"}]),
     "gone.json, run 1: kept is '88.9 %': a number is expected"),
    (json.dumps([GONE | {"kept": float("nan")}]),
     "gone.json, run 1: kept is nan: a number is expected"),
    (json.dumps([GONE | {"interval": [0.88]}]),
     "gone.json, run 1: interval is [0.88]: two numbers are expected"),
    (json.dumps([GONE | {"layers": 3}]),
     "gone.json, run 1: layers is 3: two numbers are expected")])
def test_a_list_that_cannot_be_read(content, line, runs):
    if content is not None:
        Path("gone.json").write_text(content)
    with pytest.raises(UserError, match=re.escape(line)):
        compare(["gone.json"], "plots")


def test_the_students_of_the_front_page():
    """What each keeps is its figures' ratio, up to their rounding; the place named has them."""
    listed = ROOT / "experiments/results/students.json"
    for student in json.loads(listed.read_text()):
        near = pytest.approx(student["student"] / student["teacher"], abs=2e-4)
        assert student["kept"] == near, student
        low, high = student.get("interval", [0, 2])
        assert low < student["kept"] < high
        file, _, heading = student["source"].partition("#")
        sections = {}
        for section in re.split(r"^#+ ", (ROOT / file).read_text(), flags=re.MULTILINE):
            title = section.partition("\n")[0]
            sections[re.sub(r"[^\w -]", "", title).strip().lower().replace(" ", "-")] = section
        for model in ("teacher", "student"):
            assert f"{100 * student[model]:.2f}" in sections[heading], (student, model)
    assert "experiments/results/compare.png" in (ROOT / "README.md").read_text()

"""The report: counts, a table that is aligned, a plot, and where the numbers come from."""

import platform

import jax
import numpy as np
import pytest
from matplotlib.figure import Figure

from distilbert_jax.evaluation import report


def test_count_parameters():
    params = {"a": np.zeros((3, 4)), "b": {"c": np.zeros(5), "d": np.zeros(())}}
    assert report.count_parameters(params) == 3 * 4 + 5 + 1
    layers = {n: np.zeros(1000) for n in range(2)}
    assert report.describe_params({"layers": layers}) == "2 layers with 2,000 parameters"
    assert report.describe_params({"layers": {0: layers[0]}}) == "1 layer with 1,000 parameters"


@pytest.fixture
def rows():
    params = {"layers": {0: np.zeros((500, 1000)), 1: np.zeros((1000, 500))}}
    return [report.model_row("teacher", params, {
                "top1": 0.8, "top1_interval": (0.7, 0.85), "perplexity": 2.5}, 0.8, 12.345),
            report.model_row("a much longer name than the others", {"layers": {0: np.zeros(7)}}, {
                "top1": 0.6, "top1_interval": None, "perplexity": 1e7,
                "retention_interval": (0.7, 0.8)}, 0.8, 0.1)]


def test_model_row(rows):
    assert rows[0] == (
        "teacher", "2", "1,000,000", "4.0", "80.00", "70.00 to 85.00", "2.500", "100.00",
        "12.35")
    assert rows[1][4:8] == (
        "60.00", "not defined", "10000000.000", "75.00 (70.00 to 80.00)")
    hopeless = report.model_row("x", {"layers": {}}, {
        "top1": 0.3, "top1_interval": (0.2, 0.4), "perplexity": 9.0, "retention_interval": (2, 3)},
        None, 1.0)
    assert hopeless[7] == "not defined"  # of a teacher that knows nothing


def test_the_table_is_aligned(rows):
    lines = report.table(rows).splitlines()
    assert len(lines) == 4 and len({len(line) for line in lines}) == 1
    bars = [[i for i, c in enumerate(line) if c == "|"] for line in lines]
    assert all(b == bars[0] for b in bars) and len(bars[0]) == len(report.COLUMNS) + 1
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[0] == list(report.COLUMNS)
    assert cells[2:] == [list(row) for row in rows]
    assert all(cell.strip("-") == (":" if i else "") for i, cell in enumerate(cells[1]))


@pytest.mark.parametrize("held", [
    {"retention": 0.5, "top1": 0.3}, {"top1": 0.3}])  # with a teacher, and without
def test_plot(held, tmp_path, monkeypatch):
    """The curve of a sample ends at the figure of all rows, which has its interval."""
    metrics = [{"step": 0, "tokens_seen": 0, **held},
               {"step": 1, "tokens_seen": 10, "train_loss": 3.0, "train_mlm": 2.0},
               {"step": 2, "tokens_seen": 20, "train_loss": 2.0, "train_mlm": 1.5},
               {"step": 2, "tokens_seen": 20, **held}]
    what = next(iter(held))
    end = {"tokens_seen": 20, **held, what: 0.4, f"{what}_interval": (0.35, 0.46)}
    seen, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **more: (
        seen.append(self), save(self, *args, **more)))
    report.plot(metrics, end, (128, 2447), tmp_path / "losses.png", "title")
    assert (tmp_path / "losses.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    axes = seen[0].axes[1]
    curve, (_, _, (bar,)) = axes.lines[0], axes.containers[0]
    np.testing.assert_allclose(curve.get_xydata(), [[0, 100 * held[what]], [20, 40]])
    np.testing.assert_allclose(bar.get_segments()[0], [[20, 35], [20, 46]])
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [
        "in training: 128 of 2,447 rows", "at its end: all 2,447 rows, with the 95 % interval"]


def test_the_curves_of_several_runs(tmp_path, monkeypatch):
    """Losses on the left, a held-out figure on the right; a run that has none is left out."""
    seen = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: seen.append(self))
    lines = [{"tokens_seen": 0, "cosine": 0.1}, {"tokens_seen": 9, "train_loss": 3.0},
             {"tokens_seen": 9, "cosine": 0.4}]
    report.plot_runs({"one": lines, "stopped": []}, ("cosine", "its cosine"), tmp_path / "x", "")
    left, right = seen[0].axes
    (loss,), (held,) = left.lines, right.lines
    np.testing.assert_array_equal(loss.get_xydata(), [[9, 3]])
    np.testing.assert_array_equal(held.get_xydata(), [[0, 0.1], [9, 0.4]])
    assert right.get_ylabel() == "its cosine" and left.get_yscale() == "log"
    assert [text.get_text() for text in left.get_legend().get_texts()] == ["one"]


@pytest.mark.parametrize("figures, line", [
    ({}, "held-out top-1 30.00%, perplexity 2.000"),
    ({"kl": 0.1, "teacher_top1": 0.6, "retention": 0.5, "most_frequent": 0.1},
     "held-out top-1 30.00%, perplexity 2.000; teacher 60.00%, retention 50.00%; KL 0.1000 "
     "nats"),
    ({"kl": 0.1, "teacher_top1": 0.6, "retention": 0.5, "most_frequent": 0.1,
      "top1_interval": (0.25, 0.35), "retention_interval": (0.4, 0.6)},
     "held-out top-1 30.00% (95 % interval 25.00 to 35.00), perplexity 2.000; teacher 60.00%, "
     "retention 50.00% (95 % interval 40.00 to 60.00); KL 0.1000 nats"),
    ({"kl": 0.1, "teacher_top1": 0.06, "most_frequent": 0.1},
     "held-out top-1 30.00%, perplexity 2.000; teacher 6.00%, retention not defined, since the "
     "teacher is no better than always the commonest token (10.00%); KL 0.1000 nats")])
def test_held_out_line(figures, line):
    assert report.held_out_line({"top1": 0.3, "perplexity": 2.0} | figures) == line


def test_versions():
    text = report.versions()
    assert f"jax {jax.__version__}" in text and platform.python_version() in text
    assert f"{jax.device_count()} x " in text and "\n" not in text


def test_describe_data():
    part = {"documents": 1234, "characters": 56789, "pieces": 1300, "tokens": 9876,
            "unknown": 3, "rows": 80}
    manifest = {"request": {"sequence_length": 128}, "documents": [["a.txt", 1000], ["b", 1468]],
                "train": part, "valid": part}
    counted = ("1,234 documents, 56,789 characters → 1,300 pieces, 9,876 tokens (3 unknown) → "
               "80 rows, 96.4% full")
    assert report.describe_data(manifest).split("\n") == [
        "a.txt: 1,000 documents", "b: 1,468 documents", f"train: {counted}", f"held out: {counted}"]


def test_counting(capsys):
    with report.counting("prepare") as progress:
        progress(3, 100)
        progress(5, 250)
    assert not capsys.readouterr().err  # done before it was worth a bar

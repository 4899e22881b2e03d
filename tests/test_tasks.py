"""The table of tasks, metrics of degenerate answers, intervals, and labels of models and data."""

from types import SimpleNamespace

import numpy as np
import pytest
import scipy.special

from distilbert_jax.data.examples import Examples
from distilbert_jax.data.labelled import Columns, Labelled
from distilbert_jax.data.tokenize import load_tokenizer
from distilbert_jax.errors import UserError
from distilbert_jax.evaluation import answers, intervals
from distilbert_jax.evaluation.metrics import METRICS, compute
from distilbert_jax.evaluation.similarity import spearman
from distilbert_jax.evaluation.tasks import OWN_METRICS, TASKS, own_task
from distilbert_jax.jobs import task_report
from distilbert_jax.jobs.task_data import Part, TaskInput, read_task
from distilbert_jax.task_config import EvaluateConfig, FinetuneConfig

FOLDERS = {"cola": "glue/CoLA", "sst2": "glue/SST-2", "mrpc": "glue/MRPC", "stsb": "glue/STS-B",
           "rte": "glue/RTE", "wnli": "glue/WNLI", "imdb": "imdb", "trec": "trec",
           "wnut17": "wnut17"}


@pytest.mark.parametrize("name", TASKS)
def test_a_row_is_judged_by_metrics_of_its_kind(name):
    row = TASKS[name]
    assert row.kind in OWN_METRICS
    assert all(METRICS[metric].kind == row.kind for metric in row.metrics)
    assert row.kind == "classify" or not row.labels


@pytest.mark.parametrize("name", sorted(set(FOLDERS) - {"imdb", "sst2"}))
def test_real_files_are_read_as_their_row_says(name, shared, capsys):
    """As many examples as published, no warning, and every label has its name."""
    tokenizer = load_tokenizer(str(shared / "minilm-l6"), None)
    found = read_task(EvaluateConfig(model="m", task=name, data=shared / FOLDERS[name]), tokenizer,
                      512, dev=())
    assert len(found.parts["dev"]) == TASKS[name].rows["dev"]
    assert "warning" not in capsys.readouterr().err
    if found.kind == "classify" and TASKS[name].labels:
        assert found.labels == tuple(label for _, label in TASKS[name].labels)
        assert set(found.parts["dev"].truth) == set(range(len(found.labels)))


def test_labels_mean_what_they_say(shared):
    """The first examples of dev, read by a person."""
    tokenizer = load_tokenizer(str(shared / "minilm-l6"), None)

    def first(name):
        found = read_task(EvaluateConfig(model="m", task=name, data=shared / FOLDERS[name]),
                          tokenizer, 512, dev=())
        return found.parts["dev"].raw.texts[0][0], found.parts["dev"].raw.labels[0]

    assert first("sst2") == ("it 's a charming and often affecting journey . ", "positive")
    assert first("cola")[1] == "acceptable" and first("rte")[1] == "not_entailment"
    assert first("mrpc")[1] == "equivalent"


def test_metrics_of_a_constant_answer():
    labels = [0, 1, 1, 0]
    found = compute(["accuracy", "f1", "matthews"], labels, [0, 0, 0, 0])
    assert found == {"accuracy": 0.5, "f1": 0.0, "matthews": 0.0, "score": pytest.approx(0.5 / 3)}
    constant = compute(["pearson", "spearman"], [1.0, 2.0, 3.0], [1.0, 1.0, 1.0])
    assert constant == {"pearson": None, "spearman": None, "score": None}


def test_tags_that_are_not_of_entities_are_judged_word_by_word():
    """F1 of entities reads NN as the inside of an entity N."""
    for labels, metrics in ((("O", "B-A"), ("entity_f1", "accuracy_words")),
                            (("O", "S-A"), ("entity_f1", "accuracy_words")),
                            (("DT", "NN"), ("accuracy_words",)), (("0", "1"), ("accuracy_words",))):
        own = own_task("tag", Columns(), 128, labels)
        assert own.metrics == metrics[:1] and TaskInput("own", own, labels, {}).metrics == metrics


def test_a_class_that_is_called_as_a_column(tmp_path):
    labels = ("answer", "question")
    raw = Labelled([("a",)], ["question"], ["x"])
    task = TaskInput("own", own_task("classify", Columns(), 128), labels, {
        "dev": Part(raw, [1], Examples([], [], [], [], [], 0))})
    task_report.write_predictions(tmp_path / "p.tsv", task, "dev", np.zeros((1, 2)))
    assert (tmp_path / "p.tsv").read_text() == (
        "row\tlabel\tanswer\tp(answer)\tquestion\n0\tquestion\tanswer\t0.500000\t0.500000\n")


def test_metrics_by_hand():
    assert compute(["f1"], [1, 1, 0, 0], [1, 0, 1, 0])["f1"] == 0.5
    classes = compute(["f1_macro"], [0, 0, 0, 1], [0, 0, 1, 1])  # 4/5 of the first, 2/3
    assert classes["f1_macro"] == pytest.approx((4 / 5 + 2 / 3) / 2)
    numbers = compute(["spearman", "pearson", "mse"], [1.0, 2.0, 3.0], [1.0, 3.0, 9.0])
    assert numbers["spearman"] == 1.0 and numbers["mse"] == pytest.approx(37 / 3)
    assert numbers["pearson"] == pytest.approx(8 / np.sqrt(2 * 312 / 9))
    one = compute(["pearson", "spearman"], [1.0], [2.0])
    assert one == {"pearson": None, "spearman": None, "score": None}
    words = [["O", "O", "O"], ["A"]], [["O", "A", "A"], ["A"]]
    assert compute(["accuracy_words"], *words)["accuracy_words"] == 0.5
    assert compute(["entity_f1"], [["O"]], [["O"]])["entity_f1"] == 0.0  # there is none to find
    tags = [["B-A", "I-A", "O", "B-B"]]
    assert compute(["entity_f1"], tags, [["B-A", "I-A", "O", "O"]])["entity_f1"] == (
        pytest.approx(2 / 3))
    # seqeval's default: an I- after O opens an entity
    assert compute(["entity_f1"], [["O", "B-A"]], [["O", "I-A"]])["entity_f1"] == 1.0


def test_an_interval_covers_as_often_as_it_says(monkeypatch):
    monkeypatch.setattr(intervals, "DRAWS", 100)
    random, covered = np.random.default_rng(0), 0
    for trial in range(50):
        right = (random.random(200) < 0.8).astype(int)
        drawn = intervals.drawn(["accuracy"], np.ones(200, int), {"m": [right]}, seed=trial)
        low, high = intervals.interval(drawn["m"])
        covered += low <= 0.8 <= high
    assert 44 <= covered <= 50


def test_seeds_are_drawn_too(monkeypatch):
    """Of a seed that is always right and one that never is, none, one or both are the latter."""
    monkeypatch.setattr(intervals, "DRAWS", 50)
    drawn = intervals.drawn(["accuracy"], np.ones(9, int), {"m": [np.ones(9), np.zeros(9)]})
    assert set(drawn["m"]) == {0, 0.5, 1}


def test_a_loss_is_over_what_has_a_label():
    """And finite for an answer that is sure and wrong."""
    some = Examples([], [], [], [], [np.array([1.0, np.nan])], 0)
    sure = np.array([[200, 0], [0, 0]], np.float32)
    assert answers.loss("classify", sure, some) == pytest.approx(-np.log(1e-30))
    assert answers.loss("regress", np.array([[3.0], [9.0]]), some) == 4


def test_a_word_that_was_cut_off_is_tagged_O():
    """Whichever place O has among the names."""
    one = Examples([], [], [np.array([1, 2])], [np.array([0, 1])], [], 0)
    assert answers.answers("tag", np.eye(2)[[1, 0]], one, [3], ("B-A", "O")) == [["O", "B-A", "O"]]


def test_a_model_beside_itself_keeps_everything(monkeypatch):
    monkeypatch.setattr(intervals, "DRAWS", 20)
    given = np.random.default_rng(0).integers(0, 2, 50)
    drawn = intervals.drawn(["accuracy"], np.ones(50, int), {"a": [given], "b": [given]})
    assert (drawn["a"] == drawn["b"]).all()
    assert intervals.interval(np.full(10, np.nan)) is None
    one = intervals.drawn(["accuracy"], np.ones(1, int), {"a": [given[:1]]})
    assert intervals.interval(one["a"]) is None


def read(tmp_path, toy, train, known=(), dev="text,label\nba,a\nbe,b\n", **config):
    tokenizer = load_tokenizer(str(toy / "teacher"), None)
    (tmp_path / "train.csv").write_text(train)
    (tmp_path / "dev.csv").write_text(dev)
    settings = FinetuneConfig(model="m", **config)
    return read_task(settings, tokenizer, 24, known, train=(str(tmp_path / "train.csv"),),
                     dev=(str(tmp_path / "dev.csv"),) if dev else ())


TRAIN = "text,label\nba,a\nbe,b\nbu,a\n"
BAD = [  # (train, known labels, settings, part of the message)
    ("text,label\nba,a\nbe,a\n", (), {}, "all labels are 'a'"),
    (TRAIN, ("a", "c"), {}, "the labels of the model are a, c, those of the data a, b"),
    (TRAIN, ("a", "b", "c"), {}, "the labels of the model are a, b, c, those of the data a, b"),
    (TRAIN, ("LABEL_0", "LABEL_1"), {}, "the labels of the model are LABEL_0, LABEL_1"),
    (TRAIN, ("a", "b", "B"), {}, "two labels of the model have one name: a, b, B: give"),
    (TRAIN, (), {"max_length": 25}, "--max-length 25 is beyond the model's 24 positions"),
    (TRAIN, (), {"kind": "tag"}, "holds no tagged words"),
    (TRAIN, (), {"kind": "regress"}, "label 'a' is not a finite number"),
    ("text,label\nba,0.5\nbe,1.5\n", ("a", "b"), {}, "labels of the data are numbers"),
]


@pytest.mark.parametrize("train, known, config, message", BAD)
def test_data_that_cannot_be(train, known, config, message, tmp_path, toy):
    with pytest.raises(UserError) as error:
        read(tmp_path, toy, train, known, **config)
    assert message in str(error.value)


def test_a_task_has_one_kind(tmp_path, toy):
    with pytest.raises(UserError, match="--kind regress does not go with --task sst2, which is"):
        read(tmp_path, toy, "sentence,label\nba,0\nbe,1\n", dev="sentence,label\nba,0\n",
             task="sst2", kind="regress")


def test_labels_of_dev_must_be_known(tmp_path, toy):
    with pytest.raises(UserError, match="dev.csv:2: label 'c' is not among the labels a, b"):
        read(tmp_path, toy, TRAIN, dev="text,label\nba,c\n")


def test_numbers_stand_for_labels_without_a_name(tmp_path, toy):
    found = read(tmp_path, toy, "text,label\nba,0\nbe,1\n", ("LABEL_0", "LABEL_1"),
                 dev="text,label\nba,1\n")
    assert found.labels == ("0", "1") and found.parts["dev"].truth == [1]
    turned = read(tmp_path, toy, TRAIN, ("B", "A"))
    assert turned.labels == ("B", "A") and turned.parts["train"].examples.labels[0] == 1


def test_a_trained_model_is_judged_where_not_every_class_occurs(tmp_path, toy):
    tokenizer = load_tokenizer(str(toy / "teacher"), None)
    for content, known, labels, truth in (
            ("text,label\nba,b\nbe,b\n", ("a", "b"), ("a", "b"), [1, 1]),
            ("text,label\nba,1\nbe,1\n", ("LABEL_0", "LABEL_1"), ("0", "1"), [1, 1])):
        (tmp_path / "dev.csv").write_text(content)
        found = read_task(EvaluateConfig(model="m", dev=str(tmp_path / "dev.csv")), tokenizer, 24,
                          known, dev=(str(tmp_path / "dev.csv"),))
        assert found.labels == labels and found.parts["dev"].truth == truth
        assert found.name == "dev"


def test_words_of_which_nothing_is_left(tmp_path, toy):
    files = {name: (str(tmp_path / f"{name}.jsonl"),) for name in ("train", "dev")}
    for name, word in (("train", "ba"), ("dev", "\u200b")):  # a zero-width space
        (tmp_path / f"{name}.jsonl").write_text(
            f'{{"tokens": ["{word}", "{word}"], "tags": ["O", "B-A"]}}\n' * 2)
    with pytest.raises(UserError, match="the tokenizer leaves no piece of any word of dev"):
        read_task(FinetuneConfig(model="m"), load_tokenizer(str(toy / "teacher"), None), 24,
                  **files)


def test_numbers_that_are_all_the_same(tmp_path, toy):
    constant = "text,label\nba,0.5\nbe,0.5\n"
    with pytest.raises(UserError, match="all labels of --train are the same"):
        read(tmp_path, toy, constant, dev=constant)


def test_labels_of_unlabelled_files_are_not_read(tmp_path, toy):
    (tmp_path / "train.csv").write_text(TRAIN)
    (tmp_path / "more.csv").write_text("text,label,score\nbe,b,12\n")
    found = read_task(FinetuneConfig(model="m"), load_tokenizer(str(toy / "teacher"), None), 24,
                      train=(str(tmp_path / "train.csv"),), dev=(str(tmp_path / "train.csv"),),
                      unlabelled=(str(tmp_path / "more.csv"),))
    assert found.parts["unlabelled"].truth is None
    assert np.isnan(found.parts["unlabelled"].examples.labels[0]).all()


def test_parts_are_alike(tmp_path, toy):
    with pytest.raises(UserError, match=r"not alike: 1 text\(s\) an example in --train, 2 text"):
        read(tmp_path, toy, TRAIN, dev="sentence1,sentence2,label\nba,be,a\n")


def test_what_is_odd_is_said(tmp_path, toy, capsys):
    read(tmp_path, toy, TRAIN + "ba,b\n" + "da " * 30 + ",b\nна,a\n")
    said = capsys.readouterr().err
    assert "tokens of train are unknown to the tokenizer" in said and "of dev are un" not in said
    assert "warning: 2 of 2 texts of --dev are in --train too" in said
    assert "warning: 1 texts of --train have two labels" in said
    assert "1 were longer and are cut" in said and "text → label; classify: a, b" in said
    read(tmp_path, toy, "text,label\nba,0.5\nbe,-1200.5\n", dev="text,label\nbu,5000.5\nda,1.5\n")
    assert "warning: numbers of --train go up to 1200.5, " in capsys.readouterr().err


def test_test_texts_that_were_trained_on_are_said(tmp_path, toy, capsys):
    (tmp_path / "train.csv").write_text(TRAIN)
    (tmp_path / "test.csv").write_text("text,label\nbu,a\nda,b\n")
    read_task(FinetuneConfig(model="m"), load_tokenizer(str(toy / "teacher"), None), 24, **{
        part: (str(tmp_path / f"{name}.csv"),) for part, name in (
            ("train", "train"), ("dev", "train"), ("test", "test"))})
    assert "warning: 1 of 2 texts of --test are in --train too" in capsys.readouterr().err


def test_a_tenth_is_held_out_where_no_dev_is_given(tmp_path, toy):
    rows = "".join(f"{'ba ' * n}be,{'ab'[n % 2]}\n" for n in range(1, 80))
    found = read(tmp_path, toy, "text,label\n" + rows, dev="")
    assert len(found.parts["train"]) + len(found.parts["dev"]) == 79
    assert 1 <= len(found.parts["dev"]) < 25
    assert not set(found.parts["train"].raw.texts) & set(found.parts["dev"].raw.texts)
    rare = "".join(f"{'ba ' * n}be,only{n}\n" for n in range(80, 120))
    more = read(tmp_path, toy, "text,label\n" + rows + rare, dev="")
    assert len(more.parts["dev"]) == len(found.parts["dev"])  # a class of one stays in training


@pytest.mark.parametrize("labels", [
    ("$ and {", "b_$", "c"), tuple(f"intent {i}" for i in range(300))])
def test_confusion_of_any_labels(labels, tmp_path):
    truth = [0, 1, 2]
    raw = Labelled([("a",)] * 3, list(labels[:3]), ["x"] * 3)
    task = TaskInput("own", own_task("classify", Columns(), 128), labels, {
        "dev": Part(raw, truth, Examples([], [], [], [], [], 0))})
    task_report.plot_confusion(task, np.eye(3, len(labels)), tmp_path / "confusion.png")
    assert (tmp_path / "confusion.png").stat().st_size < 500_000


@pytest.mark.parametrize("logits", [
    np.zeros((3, 2)), 1e3 * np.eye(3, 2, dtype=np.float32), np.eye(3, 2)])
def test_calibration_of_any_answers(logits, tmp_path, monkeypatch):
    """Of a model that knows nothing, of one that is quite sure, and of an ordinary one."""
    said = []
    monkeypatch.setattr("matplotlib.axes.Axes.plot", lambda *_, label="", **__: said.append(label))
    monkeypatch.setattr("matplotlib.axes.Axes.legend", lambda *_, **__: None)
    task = TaskInput("own", own_task("classify", Columns(), 128), ("a", "b"), {
        "dev": Part(Labelled([("a",)] * 3, list("abb"), ["x"] * 3), [0, 1, 1],
                    Examples([], [], [], [], [], 0))})
    task_report.plot_calibration(task, {"model": logits}, tmp_path / "calibration.png")
    sure = scipy.special.softmax(logits, -1).max(-1).mean()
    right = np.mean(logits.argmax(-1) == [0, 1, 1])
    assert said[1] == f"model: sure {sure:.1%}, right {right:.1%}"
    assert (tmp_path / "calibration.png").exists()


def test_nothing_is_kept_of_a_score_below_zero():
    """Of a teacher that is worse than chance the share would be negative, or that of a fault."""
    truth = np.arange(12.0)
    task = TaskInput("own", own_task("regress", Columns(), 128), (), {
        "dev": Part(Labelled([("a",)] * 12, [""] * 12, ["x"] * 12), truth.tolist(),
                    Examples([], [], [], [], [], 0))})
    answers = {"good": truth[:, None], "bad": -truth[:, None] + np.eye(12, 1)}
    for teacher, defined in (("good", True), ("bad", False)):
        found = task_report._judge(task, "dev", {
            role: [SimpleNamespace(found={"dev": answers[name]})]
            for role, name in (("teacher", teacher), ("model", "bad"))})["model"]
        assert found["score"] < 0 and ("retention" in found) == defined
        assert (found["retention_interval"] is not None) == defined
        pairs = spearman(truth.tolist(), {
            "teacher": answers[teacher][:, 0], "student": answers["bad"][:, 0]})
        assert ("retention" in pairs["student"]) == defined

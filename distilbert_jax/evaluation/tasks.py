"""The table of tasks: which columns and labels their files have, and how they are judged.

A row replaces what a user's own data has to say by flags; the metrics go by the kind of task.
"""

import dataclasses
import re
from collections.abc import Sequence

from distilbert_jax.data.labelled import Columns
from distilbert_jax.evaluation.metrics import METRICS


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """A row of TASKS."""

    kind: str  # classify, regress or tag
    columns: Columns = Columns()
    labels: tuple[tuple[str, str], ...] = ()  # (as written in the files, its name), in order
    metrics: tuple[str, ...]  # the mean of them is the score (GLUE, Wang et al. 2019)
    rows: dict[str, int] = dataclasses.field(default_factory=dict)  # file → examples expected
    files: tuple[tuple[str, str], ...] = (
        ("train", "train.tsv"), ("dev", "dev.tsv"), ("test", "test.tsv"))
    max_length: int = 128
    epochs: int = 3

    def __post_init__(self) -> None:
        assert set(self.metrics) <= set(METRICS), self.metrics


def _binary(negative: str, positive: str) -> tuple[tuple[str, str], ...]:
    return ("0", negative), ("1", positive)


_PAIR = ("sentence1", "sentence2")
_NEWS = "entailment", "not_entailment"

TASKS = {
    "cola": Task(kind="classify", columns=Columns(("3",), "1", header=False),
                 labels=_binary("unacceptable", "acceptable"), metrics=("matthews",),
                 rows={"train": 8551, "dev": 1043}, max_length=64, epochs=5),
    "sst2": Task(kind="classify", columns=Columns(("sentence",), "label"),
                 labels=_binary("negative", "positive"), metrics=("accuracy",),
                 rows={"train": 67349, "dev": 872}, max_length=64),
    "mrpc": Task(kind="classify", columns=Columns(("#1 String", "#2 String"), "Quality"),
                 labels=_binary("not_equivalent", "equivalent"), metrics=("f1", "accuracy"),
                 rows={"train": 3668, "dev": 408}, epochs=5),
    "stsb": Task(kind="regress", columns=Columns(_PAIR, "score"), metrics=("pearson", "spearman"),
                 rows={"train": 5749, "dev": 1500}, epochs=4),
    "qqp": Task(kind="classify", columns=Columns(("question1", "question2"), "is_duplicate"),
                labels=_binary("not_duplicate", "duplicate"), metrics=("f1", "accuracy"),
                rows={"train": 363846, "dev": 40430}),
    "mnli": Task(kind="classify", columns=Columns(_PAIR, "gold_label"), metrics=("accuracy",),
                 labels=tuple((n, n) for n in ("entailment", "neutral", "contradiction")),
                 files=(("train", "train.tsv"), ("dev", "dev_matched.tsv"),
                        ("test", "test_matched.tsv")), rows={"train": 392702, "dev": 9815}),
    "qnli": Task(kind="classify", columns=Columns(("question", "sentence"), "label"),
                 labels=tuple((n, n) for n in _NEWS), metrics=("accuracy",),
                 rows={"train": 104743, "dev": 5463}),
    "rte": Task(kind="classify", columns=Columns(_PAIR, "label"),
                labels=tuple((n, n) for n in _NEWS), metrics=("accuracy",),
                rows={"train": 2490, "dev": 277}, max_length=256, epochs=10),
    "wnli": Task(kind="classify", columns=Columns(_PAIR, "label"), metrics=("accuracy",),
                 labels=_binary("not_entailment", "entailment"), rows={"train": 635, "dev": 71}),
    "imdb": Task(kind="classify", columns=Columns(("text",), "label"), metrics=("accuracy",),
                 files=(("train", "train.tsv.gz"), ("dev", "test.tsv.gz")), max_length=512,
                 rows={"train": 25000, "dev": 25000}, epochs=2),
    "trec": Task(kind="classify", columns=Columns(("text",), "label"), metrics=("accuracy",),
                 labels=tuple((n, n) for n in ("ABBR", "DESC", "ENTY", "HUM", "LOC", "NUM")),
                 files=(("train", "train.tsv"), ("dev", "test.tsv")),
                 rows={"train": 5452, "dev": 500}, max_length=64, epochs=5),
    "wnut17": Task(kind="tag", metrics=("entity_f1",),
                   files=(("train", "train.conll"), ("dev", "dev.conll")),
                   rows={"train": 3394, "dev": 1009}, epochs=4),
}
# What own data is judged by: the first alone.
OWN_METRICS = {"classify": ("accuracy", "f1_macro", "matthews"),
               "regress": ("spearman", "pearson", "mse"), "tag": ("entity_f1", "accuracy_words")}


def own_task(kind: str, columns: Columns, max_length: int, labels: Sequence[str] = ()) -> Task:
    """The row that stands for a user's own data, which is judged by the first metric of its kind;
    tags that are not of entities (B-PER, I-PER), such as parts of speech, by the share of words.
    """
    metrics = OWN_METRICS[kind][:1]
    if kind == "tag" and not any(re.match("[BIES]-", name) for name in labels):
        metrics = ("accuracy_words",)
    return Task(kind=kind, columns=columns, metrics=metrics, max_length=max_length)

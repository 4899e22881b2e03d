"""Answers and labels → metrics, by scikit-learn, scipy and seqeval.

METRICS is the table; each is a function of (labels, answers). A metric that is not defined, such as
the correlation with a constant, is None, neither 0 nor a number that is none.
"""

import dataclasses
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

Values = Sequence[Any] | np.ndarray  # class numbers, numbers, or the tags of each sentence


@dataclasses.dataclass(frozen=True)
class Metric:
    """A row of METRICS: its kind of task, and a function of (labels, answers)."""

    kind: str
    compute: Callable[[Values, Values], float]
    text: str
    hub: str = ""  # its name on the Hugging Face hub, where that is another


def _accuracy(labels: Values, answers: Values) -> float:
    from sklearn.metrics import accuracy_score

    return accuracy_score(labels, answers)


def _f1(average: str) -> Callable[[Values, Values], float]:
    def compute(labels: Values, answers: Values) -> float:
        from sklearn.metrics import f1_score

        return f1_score(labels, answers, average=average, zero_division=0)

    return compute


def _matthews(labels: Values, answers: Values) -> float:
    from sklearn.metrics import matthews_corrcoef

    return matthews_corrcoef(labels, answers)


def _correlation(name: str) -> Callable[[Values, Values], float]:
    def compute(labels: Values, answers: Values) -> float:
        import scipy.stats

        if len(labels) < 2:
            return math.nan
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of constants; it is NaN then
            return float(getattr(scipy.stats, name)(labels, answers)[0])

    return compute


def _mse(labels: Values, answers: Values) -> float:
    from sklearn.metrics import mean_squared_error

    return mean_squared_error(labels, answers)


def _entity_f1(labels: Values, answers: Values) -> float:
    """seqeval's default, which is that of conlleval: an I- after O begins an entity."""
    from seqeval.metrics import f1_score

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tags that are in neither scheme
        return f1_score(list(map(list, labels)), list(map(list, answers)), zero_division=0)


def _word_accuracy(labels: Values, answers: Values) -> float:
    return _accuracy([tag for tags in labels for tag in tags],
                     [tag for tags in answers for tag in tags])


METRICS = {
    "accuracy": Metric("classify", _accuracy, "share of right answers"),
    "f1": Metric("classify", _f1("binary"), "F1 of the second of two classes"),
    "f1_macro": Metric("classify", _f1("macro"), "mean F1 of all classes", "f1"),
    "matthews": Metric("classify", _matthews, "Matthews' correlation",
                       "matthews_correlation"),
    "pearson": Metric("regress", _correlation("pearsonr"), "Pearson's correlation",
                      "pearsonr"),
    "spearman": Metric("regress", _correlation("spearmanr"), "Spearman's rank correlation",
                       "spearmanr"),
    "mse": Metric("regress", _mse, "mean squared error"),
    "entity_f1": Metric("tag", _entity_f1, "F1 of whole entities", "f1"),
    "accuracy_words": Metric("tag", _word_accuracy, "share of words tagged right",
                             "accuracy"),
}


def compute(
    names: Sequence[str], labels: Values, answers: Values
) -> dict[str, float | None]:
    """Metrics by name; `score` is the mean of them. What is not defined is None.

    Args:
        names: rows of METRICS.
        labels, answers: class numbers, numbers, or the tags of each sentence.
    """
    found: dict[str, float | None] = {}
    for name in names:
        value = float(METRICS[name].compute(labels, answers))
        found[name] = value if math.isfinite(value) else None
    return found | {"score": score(names, labels, answers)}


def score(names: Sequence[str], labels: Values, answers: Values) -> float | None:
    """The mean of some metrics, or None if one of them is not defined."""
    value = float(np.mean([METRICS[name].compute(labels, answers) for name in names]))
    return value if math.isfinite(value) else None

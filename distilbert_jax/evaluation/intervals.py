"""95 % intervals of scores and of their differences, by bootstrap over examples and seeds.

Each draw takes examples with replacement, the same ones for every model, and of each model's seeds
some with replacement, so that differences are paired (Efron and Tibshirani 1993, chapter 13).
"""

from collections.abc import Mapping, Sequence

import numpy as np

from distilbert_jax.evaluation.metrics import Values, score

DRAWS = 1000
LEVELS = (2.5, 97.5)  # per cent


def drawn(
    names: Sequence[str], labels: Values, answers: Mapping[str, Sequence[Values]],
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """Scores of each model in each draw.

    Args:
        names: metrics whose mean is the score.
        labels: of the examples.
        answers: model → the answers of each of its seeds.
        seed: of the draws.

    Returns:
        Model → [DRAWS], NaN where the score is not defined, and of one example: the mean over the
        drawn seeds.
    """
    random = np.random.default_rng(seed)
    found = {model: np.full(DRAWS, np.nan) for model in answers}
    if len(labels) < 2:  # every draw would be the same, and the interval a point
        return found
    arrays = {model: [_array(own) for own in runs] for model, runs in answers.items()}
    truth = _array(labels)
    for draw in range(DRAWS):
        some = random.integers(0, len(truth), len(truth))
        for model, runs in arrays.items():
            picked = random.integers(0, len(runs), len(runs))
            values = {run: score(names, truth[some], runs[run][some]) for run in set(picked)}
            own = [values[run] for run in picked if values[run] is not None]
            found[model][draw] = np.mean(own) if own else np.nan
    return found


def _array(values: Values) -> np.ndarray:
    """One element an example, also where each is a list of tags."""
    out = np.empty(len(values), object if isinstance(values[0], (list, tuple)) else None)
    out[:] = values
    return out


def interval(values: np.ndarray) -> tuple[float, float] | None:
    """The middle 95 % of draws; None where too many of them are not defined."""
    known = values[np.isfinite(values)]
    if len(known) < 0.9 * len(values):
        return None
    low, high = np.percentile(known, LEVELS)
    return float(low), float(high)


def drawn_means(values: Mapping[str, np.ndarray], seed: int = 0) -> dict[str, np.ndarray]:
    """The mean of each model's values in each draw, the same examples for all: [DRAWS] each.

    Of one example NaN, as every draw would be the same, and the interval a point.

    Args:
        values: model → its value for each example.
        seed: of the draws.
    """
    random = np.random.default_rng(seed)
    count = len(next(iter(values.values())))
    found = {model: np.full(DRAWS, np.nan) for model in values}
    for draw in range(DRAWS if count > 1 else 0):
        some = random.integers(0, count, count)
        for model, own in values.items():
            found[model][draw] = own[some].mean()
    return found

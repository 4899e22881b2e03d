"""The gate: a shipped file's answers beside our own model's, and how far apart they may be.

Shapes on which graphs break, and rows of real text, go through the file's own runtime. Figures come
out, and what is wrong with them by the limits of the format.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from distilbert_jax.data.examples import Examples
from distilbert_jax.errors import first_line
from distilbert_jax.export.exportable import Exportable, Run, reference

SHAPES = ((1, 1), (1, 7), (3, 33), (2, 128))  # rows, tokens; of several rows some are padded
BATCH = 8  # rows of real text, at most
BATCH_TOKENS = 2048  # with their padding, at most
LARGEST_ANSWER = 2**26  # numbers in the answer to a batch
SPARE = 2  # answers that may differ, however few there are
GRAPH_BYTES = 100_000  # of a file, that are no weights

Figures = dict[str, float]


@dataclasses.dataclass(frozen=True)
class Limit:
    """The worst value of a figure with which a file is shipped."""

    text: str  # of the figure
    most: float | None = None
    least: float | None = None
    counted: bool = False  # over answers, of which SPARE more may differ

    def refuses(self, name: str, figures: Figures) -> str:
        """Say what is beyond the limit; "" where nothing is, or there is no such figure."""
        if name not in figures:
            return ""
        value = figures[name]
        spare = SPARE / figures["answers"] if self.counted and "answers" in figures else 0.0
        if self.most is not None and not value <= self.most + spare:  # NaN is refused
            return f"{self.text} is {value:.4g}, at most {self.most + spare:.4g} is allowed"
        if self.least is not None and not value >= self.least - spare:
            return f"{self.text} is {value:.4g}, at least {self.least - spare:.4g} is allowed"
        return ""


FLOAT32 = {
    "difference": Limit("the largest difference of an answer", most=1e-4),
    "padding": Limit("the largest difference that padding makes", most=1e-5),
    "same": Limit("the share of equal answers", least=0.999, counted=True),
    "correlation": Limit("the correlation of the answers", least=0.9999),
    "cosine_worst": Limit("the worst cosine of pooled states", least=0.9999),
}
# Measured on two real models with a scale for each column: 99.88 % equal answers, cosines of 0.994
# and, at worst, 0.979. With one scale for each kernel they are 0.964 and 0.856, of which top-1 and
# Spearman's correlation hardly tell.
INT8 = {
    "same": Limit("the share of equal answers", least=0.995, counted=True),
    "top1_lost": Limit("the loss of top-1", most=3e-3, counted=True),
    "perplexity_ratio": Limit("the perplexity, over float32's,", most=1.01),
    "score_lost": Limit("the loss of score", most=3e-3, counted=True),
    "correlation": Limit("the correlation of the answers", least=0.99),
    "cosine_mean": Limit("the mean cosine of pooled states", least=0.99),
    "cosine_worst": Limit("the worst cosine of pooled states", least=0.97),
    "size": Limit("the size, over float32's,", most=0.27),
}


@dataclasses.dataclass(frozen=True)
class Trial:
    """Rows of text on which a file is judged.

    Of a masked language model, `positions` of the examples are hidden tokens, and `labels` what
    they were. `score` is a function of the answers of all examples in their order: logits [P, C]
    at all positions, or pooled states [P, D]; None where there is nothing to be right about.
    `texts` are a few of the rows as they were given, each a text or a pair.
    """

    text: str  # of where the rows come from
    examples: Examples
    score: Callable[[np.ndarray], float | None] | None = None
    texts: tuple[tuple[str, ...], ...] = ()


class Gate:
    """Our model's answers to shapes and texts, computed once, and the judgement of any file."""

    def __init__(self, model: Exportable, trial: Trial) -> None:
        """Let our own model answer.

        Args:
            model: what is shipped.
            trial: the rows of text.
        """
        self.model, self.trial = model, trial
        self._shapes = list(_shapes(model))
        own = reference(model, BATCH)
        self._expected = [own(*batch) for batch in self._shapes]
        self._ours = _collect(own, model, trial.examples)
        self.own = _absolute(model.output, self._ours, trial)

    def judge(self, run: Run, limits: dict[str, Limit], size: int) -> tuple[Figures, list[str]]:
        """Judge a file.

        Args:
            run: the file in its own runtime.
            limits: of its format.
            size: of the file [bytes].

        Returns:
            Figures, and what is wrong, each in a few words; [] if it may be shipped.
        """
        weights = sum(leaf.nbytes for leaf in jax.tree.leaves(self.model.params))
        figures = {"size": max(0, size - GRAPH_BYTES) / weights}
        try:
            figures |= self._on_shapes(run)
            found = _collect(run, self.model, self.trial.examples)
        except Exception as error:  # whatever a runtime raises, the file does not do
            return figures, [f"it fails: {first_line(error)}"]
        figures |= _absolute(self.model.output, found, self.trial)
        figures |= _relative(self.model.output, self._ours, found)
        for name in {"top1", "score"} & self.own.keys() & figures.keys():
            figures[f"{name}_lost"] = self.own[name] - figures[name]
        if "perplexity" in figures:
            figures["perplexity_ratio"] = figures["perplexity"] / self.own["perplexity"]
        problems = [limit.refuses(name, figures) for name, limit in limits.items()]
        if not self._refuses_long_rows(run):
            problems.append(f"a row of {self.model.config.positions + 1} tokens is answered, and "
                            f"there are {self.model.config.positions} positions")
        return figures, [problem for problem in problems if problem]

    def _on_shapes(self, run: Run) -> Figures:
        """The largest differences to our answers, and between answers that padding must not change.

        Differences count in full up to answers of 10, and in proportion to larger ones.
        """
        difference = padding = 0.0
        for (ids, mask, types), expected in zip(self._shapes, self._expected, strict=True):
            found = run(ids, mask, types)
            if found.shape != expected.shape:
                raise ValueError(f"{ids.shape} tokens give an answer of {list(found.shape)}, not "
                                 f"{list(expected.shape)}")
            counts = _real(expected, mask)
            if not np.isfinite(found[counts]).all():
                raise ValueError(f"an answer to {ids.shape} tokens is not finite")
            unit = max(1.0, np.abs(expected[counts]).max() / 10)
            difference = max(difference, float(np.abs(found - expected)[counts].max() / unit))
            if not mask.all():
                other = run(np.where(mask > 0, ids, ids[0, 0]), mask, types)
                padding = max(padding, float(np.abs(found - other)[counts].max() / unit))
        return {"difference": difference, "padding": padding}

    def _refuses_long_rows(self, run: Run) -> bool:
        ids = np.full((1, self.model.config.positions + 1), self._shapes[0][0][0, 0])
        try:
            run(ids, np.ones_like(ids), np.zeros_like(ids))
        except Exception:  # each runtime has its own
            return True
        return False


def _shapes(model: Exportable) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Batches of made-up ids: those of SHAPES, and a row as long as the model takes."""
    random = np.random.default_rng(0)
    config = model.config
    words = np.delete(np.arange(config.vocab_size), config.pad_token_id)
    for rows, length in (*SHAPES, (1, config.positions)):
        shape = rows, min(length, config.positions)
        lengths = np.linspace(shape[1], (shape[1] + 1) // 2, rows).astype(int)
        mask = (np.arange(shape[1]) < lengths[:, None]).astype(np.int64)
        types = random.integers(0, max(1, config.type_vocab_size), shape)
        yield np.where(mask > 0, random.choice(words, shape), config.pad_token_id), mask, types


def _real(answers: np.ndarray, mask: np.ndarray) -> Any:
    """The index of the answers that mean something: at tokens, or all rows'."""
    return mask > 0 if answers.ndim == 3 else slice(None)


def _collect(run: Run, model: Exportable, examples: Examples) -> np.ndarray:
    """What is compared of the answers to all examples, in their order: [P, ...].

    Similar lengths go together, padded to the longest of them.
    """
    found: list[np.ndarray] = [np.empty(0)] * len(examples)
    tokens = min(BATCH_TOKENS, LARGEST_ANSWER // model.config.vocab_size)
    order = np.argsort(examples.lengths, kind="stable").tolist()
    while order:
        length = int(examples.lengths[order[-1]])
        some = order[-max(1, min(BATCH, tokens // length)):]
        del order[-len(some):]
        ids, mask, types = np.zeros((3, len(some), length), np.int64)
        ids[:] = model.config.pad_token_id
        for row, number in enumerate(some):
            size = len(examples.ids[number])
            ids[row, :size], mask[row, :size] = examples.ids[number], 1
            types[row, :size] = examples.types[number]
        answers = run(ids, mask, types)
        for row, number in enumerate(some):
            found[number] = _kept(model.output, answers[row], examples, number)
    return np.concatenate(found)


def _kept(output: str, answers: np.ndarray, examples: Examples, number: int) -> np.ndarray:
    """Of the answers to a row: the mean state [1, D], logits [p, C], or of a hidden token, [p, 2],
    the likeliest token and the loss."""
    if output == "states":
        return answers[:len(examples.ids[number])].mean(0)[None]
    if answers.ndim == 1:
        return answers[None]
    logits = answers[examples.positions[number]]
    if output == "tag":
        return logits
    labels = examples.labels[number].astype(int)
    best = logits.max(-1)
    total = best + np.log(np.exp(logits - best[:, None]).sum(-1, dtype=np.float64))
    return np.stack([logits.argmax(-1), total - logits[np.arange(len(labels)), labels]], axis=-1)


def _absolute(output: str, found: np.ndarray, trial: Trial) -> Figures:
    """How good answers are."""
    if output == "mlm":
        labels = np.concatenate(trial.examples.labels)
        return {"answers": float(len(found)), "top1": float(np.mean(found[:, 0] == labels)),
                "perplexity": float(np.exp(found[:, 1].mean()))}
    score = trial.score(found) if trial.score else None
    return {} if score is None else {"score": score}


def _relative(output: str, ours: np.ndarray, found: np.ndarray) -> Figures:
    """How alike two models' answers are."""
    if output == "states":
        cosines = (ours * found).sum(-1) / (
            np.linalg.norm(ours, axis=-1) * np.linalg.norm(found, axis=-1))
        return {"cosine_mean": float(cosines.mean()), "cosine_worst": float(cosines.min())}
    if output == "regress":
        constant = len(ours) < 3 or not ours.std()
        return {} if constant else {
            "correlation": float(np.corrcoef(ours[:, 0], found[:, 0])[0, 1])}
    best = [answers[:, 0] if output == "mlm" else answers.argmax(-1) for answers in (ours, found)]
    return {"answers": float(len(ours)), "same": float(np.mean(best[0] == best[1]))}

"""The rows of text on which shipped files are judged: from a user's files, a run, or made up."""

import dataclasses
import itertools
import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from distilbert_jax.data import labelled, sources, targets
from distilbert_jax.data.examples import Examples, encode
from distilbert_jax.data.labelled import Columns, Labelled
from distilbert_jax.data.pack import PackedRows
from distilbert_jax.errors import UserError
from distilbert_jax.evaluation import answers, metrics
from distilbert_jax.evaluation.report import UNKNOWN
from distilbert_jax.export.exportable import Exportable, reference
from distilbert_jax.export.gate import Trial
from distilbert_jax.jobs.task_data import TaskInput, read_task
from distilbert_jax.jobs.task_model import order
from distilbert_jax.ship_config import ShipConfig
from distilbert_jax.task_config import TaskData

if TYPE_CHECKING:
    import transformers

    Tokenizer = transformers.PreTrainedTokenizerFast

DOCUMENTS = 500  # of a corpus, at most
SHOWN = 3  # of the rows, as examples
TOKENS = 60_000  # of all rows, at most
LENGTH = 256  # tokens of a document; what is longer is cut
HIDDEN = 0.15  # share of the tokens that a masked language model guesses
SEED = 20191001
DRAWN, DRAWN_LENGTH, ROUNDS = 32, 48, 8  # made-up rows, their tokens, steps in which words appear


def trial_of(
    config: ShipConfig, model: Exportable, labels: Sequence[str], tokenizer: "Tokenizer"
) -> Trial:
    """The rows that --evaluate names, or others where it names none.

    Args:
        config: of the shipment.
        model: what is shipped.
        labels: of a task's head, in the order of its logits.
        tokenizer: of the model.

    Raises:
        UserError: a file that cannot be read, or that does not suit the model.
    """
    if not config.evaluate:
        return default(model, tokenizer)
    names = ", ".join(pathlib.PurePath(name).name for name in config.evaluate)
    tables = [_is_table(name, config, model) for name in config.evaluate]
    if any(tables) != all(tables):
        raise UserError(f"--evaluate {' '.join(config.evaluate)}: some are labelled files, some "
                        "texts: give one kind")
    if model.output == "mlm" and any(tables):
        raise UserError(f"--evaluate {config.evaluate[0]} is a table, and {config.model} guesses "
                        "hidden words: give texts (.txt, .jsonl, ...)")
    if not any(tables):
        texts = _documents(config.evaluate)
        if not texts:
            raise UserError(f"--evaluate: there is no text in {names}")
        return _of_documents(texts, model, tokenizer, f"documents of {names}")
    if model.output == "states":
        return _of_pairs(config, model, tokenizer, names)
    data = TaskData(task=config.task, text=config.text, label=config.label, kind=model.output)
    task = read_task(data, tokenizer, model.config.positions, labels, dev=config.evaluate)
    return of_task(task, labels, names)


def _is_table(name: str, config: ShipConfig, model: Exportable) -> bool:
    """Whether a file is read as labelled data; records may be either, as the model needs."""
    ending = labelled.ending(name)
    if ending in (".csv", ".tsv", ".conll"):
        return True
    records = ending in labelled.FORMATS or name.startswith("hf:") or pathlib.Path(name).is_dir()
    return records and bool(model.config.task or config.text or config.label)


def default(model: Exportable, tokenizer: "Tokenizer") -> Trial:
    """Documentation of Python or, where the tokenizer does not know its words, made-up rows."""
    texts = _documents(["python-docs"])
    ids = np.concatenate(_encoded(texts, model, tokenizer).ids)
    if np.mean(ids == tokenizer.unk_token_id) <= UNKNOWN:
        return _of_documents(texts, model, tokenizer, "texts of Python's documentation")
    return _unlabelled(_made_up(model, tokenizer), model, tokenizer,
                       "made-up rows (no text was given)")


def of_task(task: TaskInput, labels: Sequence[str], names: str) -> Trial:
    """Examples of a task, and its score.

    Args:
        task: of which the part "dev" is taken.
        labels: of the model's head, in the order of its logits.
        names: of the files.
    """
    part = task.parts["dev"]
    examples = _within(part.examples)
    truth = part.truth[:len(examples)]
    columns = order(tuple(labels), task.labels)

    def score(found: np.ndarray) -> float | None:
        return answers.figures(task.kind, task.task.metrics, found[:, columns], examples, truth,
                               task.labels)["score"]

    return Trial(f"{len(examples):,} examples of {names}", examples, score,
                 () if task.kind == "tag" else tuple(part.raw.texts[:SHOWN]))


def of_packed(packed: PackedRows, tokenizer: "Tokenizer") -> Trial:
    """The documents of a run's held-out rows, of which some tokens are hidden."""
    ids: list[np.ndarray] = []
    for row, segments in zip(packed.rows, packed.segments, strict=True):
        ends = np.cumsum(segments[segments > 0].astype(int))
        ids += [np.asarray(piece, np.int32) for piece in np.split(row, ends)[:len(ends)]]
        if len(ids) >= DOCUMENTS:
            break
    return _guessing(_within(_plain(ids)), tokenizer, "documents that the run held out")


def of_sentences(examples: Examples) -> Trial:
    """The sentences that a run held out."""
    examples = _within(examples)
    return Trial(f"{len(examples):,} sentences that the run held out", examples)


def _documents(names: Sequence[str]) -> list[str]:
    """The first documents of some sources."""
    return list(itertools.islice(sources.Documents(names), DOCUMENTS))


def _of_documents(
    texts: Sequence[str], model: Exportable, tokenizer: "Tokenizer", what: str
) -> Trial:
    """Documents without labels."""
    trial = _unlabelled(_encoded(texts, model, tokenizer), model, tokenizer, what)
    return dataclasses.replace(trial, texts=tuple((text,) for text in texts[:SHOWN]))


def _unlabelled(
    examples: Examples, model: Exportable, tokenizer: "Tokenizer", what: str
) -> Trial:
    """Examples that have no labels but, of a masked language model, their hidden tokens."""
    examples = _within(examples)
    if model.output == "mlm":
        return _guessing(examples, tokenizer, what)
    return Trial(f"{len(examples):,} {what}", examples)


def _guessing(examples: Examples, tokenizer: "Tokenizer", what: str) -> Trial:
    """Examples in which some tokens are hidden, to be guessed."""
    masked = hidden(examples, tokenizer.all_special_ids, tokenizer.mask_token_id)
    if not len(masked):
        raise UserError(f"none of {len(examples):,} {what} has a token that could be hidden")
    return Trial(f"{len(masked):,} {what}, {masked.starts[-1]:,} hidden tokens", masked)


def _of_pairs(config: ShipConfig, model: Exportable, tokenizer: "Tokenizer", names: str) -> Trial:
    """Pairs of texts and how alike they are, beside the cosines of their states (Spearman)."""
    columns = Columns(tuple(config.text), config.label)
    read = labelled.read(config.evaluate, columns, "dev")
    if read.tagged or len(read.texts[0]) != 2:
        raise UserError(f"--evaluate {names} holds no pairs of texts with a score, by which a "
                        "sentence encoder is judged: name two columns by --text, or give texts")
    read = read.some(range(min(len(read), TOKENS // 30)))
    truth = targets.numbers(read)
    both = Labelled([(text,) for texts in zip(*read.texts, strict=True) for text in texts],
                    [None] * 2 * len(read), read.where * 2)
    examples = encode(both, None, tokenizer, min(LENGTH, model.config.positions))

    def score(found: np.ndarray) -> float | None:
        unit = found / np.linalg.norm(found, axis=-1, keepdims=True)
        one, other = np.split(unit, 2)
        return metrics.score(["spearman"], truth, (one * other).sum(-1))

    return Trial(f"{len(read):,} pairs of {names}", examples, score, tuple(read.texts[:SHOWN]))


def _encoded(texts: Sequence[str], model: Exportable, tokenizer: "Tokenizer") -> Examples:
    """Documents; of a model that tags words, split at spaces."""
    tagged = model.output == "tag"
    some = [tuple(text.split()) if tagged else (text,) for text in texts]
    read = Labelled(some, [None] * len(some), [""] * len(some), tagged)
    return encode(read, None, tokenizer, min(LENGTH, model.config.positions))


def _plain(ids: list[np.ndarray]) -> Examples:
    """Rows of one token type, answered at their first token."""
    zero = np.zeros(1, np.int32)
    return Examples(ids, [np.zeros_like(row) for row in ids], [zero] * len(ids), [zero] * len(ids),
                    [np.full(1, np.nan)] * len(ids), 0)


def _within(examples: Examples) -> Examples:
    """The first examples that have TOKENS together, at least one."""
    return examples.some(np.arange(max(1, int((np.cumsum(examples.lengths) <= TOKENS).sum()))))


def hidden(examples: Examples, special_ids: Sequence[int], mask_id: int) -> Examples:
    """Hide some tokens of each example, which become its labels; those without any are left out.

    Args:
        examples: of which ids and types are taken.
        special_ids: that are not hidden.
        mask_id: which replaces a hidden token.
    """
    random = np.random.default_rng(SEED)
    parts: dict[str, list[np.ndarray]] = {
        name: [] for name in ("ids", "types", "positions", "words", "labels")}
    for ids, types in zip(examples.ids, examples.types, strict=True):
        ordinary = np.flatnonzero(~np.isin(ids, special_ids))
        count = min(len(ordinary), max(1, round(HIDDEN * len(ids))))
        at = np.sort(random.choice(ordinary, count, replace=False)).astype(np.int32)
        if count:
            shown = ids.copy()
            shown[at] = mask_id
            for name, values in zip(parts, (shown, types, at, np.zeros_like(at),
                                            ids[at].astype(float)), strict=True):
                parts[name].append(values)
    return Examples(**parts, cut=0)


def _made_up(model: Exportable, tokenizer: "Tokenizer") -> Examples:
    """Rows of random words; those of a masked language model are drawn from the model itself.

    It begins with masks and fills some of them in each round, each by what it expects there
    (Ghazvininejad et al. 2019, "Mask-Predict", with draws instead of the likeliest word).
    """
    random = np.random.default_rng(SEED)
    length = min(DRAWN_LENGTH, model.config.positions)
    words = np.setdiff1d(np.arange(len(tokenizer)), tokenizer.all_special_ids)
    ids = random.choice(words, (DRAWN, length)).astype(np.int64)
    ids[:, 0], ids[:, -1] = tokenizer.cls_token_id, tokenizer.sep_token_id
    if model.output == "mlm":
        run = reference(model)
        ids[:, 1:-1] = tokenizer.mask_token_id
        rounds = np.array([random.permutation(length - 2) % ROUNDS for _ in range(DRAWN)])
        for number in range(ROUNDS):
            logits = run(ids, np.ones_like(ids), np.zeros_like(ids))[:, 1:-1, words]
            drawn = words[(logits + random.gumbel(size=logits.shape)).argmax(-1)]
            ids[:, 1:-1] = np.where(rounds == number, drawn, ids[:, 1:-1])
    return _plain(list(ids.astype(np.int32)))

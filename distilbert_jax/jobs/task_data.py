"""Labelled files → what every training and judgement of a task shares: checked, tokenised examples.

All that can be wrong with the data is found here, before anything is trained.
"""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from distilbert_jax.data import labelled, sources, targets
from distilbert_jax.data.examples import Examples, encode, unknown
from distilbert_jax.data.labelled import Columns, Labelled
from distilbert_jax.data.tokenize import within_texts
from distilbert_jax.errors import UserError, choose
from distilbert_jax.evaluation.report import UNKNOWN
from distilbert_jax.evaluation.tasks import OWN_METRICS, TASKS, Task, own_task
from distilbert_jax.machine.progress import say
from distilbert_jax.task_config import TaskData

if TYPE_CHECKING:
    import transformers

DEV_SHARE = 0.1  # of the training examples, where no --dev is given
LARGE = 20.0  # numbers beyond it are far from where a new head begins


@dataclasses.dataclass(frozen=True)
class Part:
    """Some examples: as they were read, their labels in numbers or tags, and tokenised."""

    raw: Labelled
    truth: list[Any] | None  # class numbers, numbers, or the tags of each sentence; None: none
    examples: Examples

    def __len__(self) -> int:
        return len(self.raw)


@dataclasses.dataclass(frozen=True)
class TaskInput:
    """All data of a task."""

    name: str
    task: Task
    labels: tuple[str, ...]  # names of the classes in the order of the logits; () for numbers
    parts: dict[str, Part]  # train, dev, test, unlabelled: those that there are

    @property
    def kind(self) -> str:
        """classify, regress or tag."""
        return self.task.kind

    @property
    def outputs(self) -> int:
        """Logits that the head has."""
        return max(1, len(self.labels))

    @property
    def metrics(self) -> tuple[str, ...]:
        """All that is reported: first those whose mean is the score."""
        more = [name for name in OWN_METRICS[self.kind]
                if name not in self.task.metrics and name != "entity_f1"]  # not of other tags
        return (*self.task.metrics, *more)

    def digest(self, *names: str) -> str:
        """SHA-256 of texts and labels of some parts."""
        whole = hashlib.sha256()
        for name in names:
            if name in self.parts:
                raw = self.parts[name].raw
                whole.update(json.dumps([name, raw.texts, list(map(str, raw.labels))]).encode())
        return whole.hexdigest()


def read_task(
    config: TaskData, tokenizer: "transformers.PreTrainedTokenizerFast", positions: int,
    known: Sequence[str] = (), **files: Sequence[str],
) -> TaskInput:
    """Read and check the data of a task.

    Args:
        config: which task, or the columns of own data.
        tokenizer: of the model.
        positions: tokens of the longest example that the model takes.
        known: names of the labels of a model that was trained for the task; () where the data say
            which there are.
        files: part → files: train, dev, test, unlabelled; those of the task's folder are added.

    Raises:
        UserError: see data/labelled.py; labels that do not match, too few examples, or a length
            beyond the model's positions.
    """
    row = TASKS[choose(config.task, TASKS, "--task")] if config.task else None
    files = _files(config, row, files)
    columns = row.columns if row and not (config.text or config.label) else Columns(
        tuple(config.text), config.label, row.columns.header if row else True)
    raw = {name: labelled.read(names, columns, name, {"test": False, "unlabelled": None}.get(
        name, True)) for name, names in files.items() if names}
    first = raw["train" if "train" in raw else "dev"]
    kind = targets.kind_of(first, config.kind or (row.kind if row else ""))
    _check_alike(raw)
    if "train" in raw and "dev" not in raw:
        raw |= _held_out(raw["train"], kind)
    _check_overlap(raw)
    if row and kind != row.kind:
        raise UserError(f"--kind {kind} does not go with --task {config.task}, which is there to "
                        f"{row.kind}")
    length = config.max_length or min(row.max_length if row else 128, positions)
    if length > positions:
        raise UserError(f"--max-length {length} is beyond the model's {positions} positions")
    raw, labels = _named(raw, row.labels if row else (), kind, known)
    task = row or own_task(kind, columns, length, labels)
    if kind == "tag":
        within_texts(tokenizer)
    parts = {}
    for name, part in raw.items():
        numbers, truth = _truth(part, kind, labels)
        parts[name] = Part(part, truth, encode(part, numbers, tokenizer, length))
    own = Path((files.get("train") or files["dev"])[0]).name.split(".")[0]
    found = TaskInput(config.task or own, task, labels, parts)
    say(f"{first.columns}; {kind}" + (f": {targets.some(labels)}" if labels else ""))
    _check_expected(found, config.task, tokenizer)
    return found


def _files(
    config: TaskData, row: Task | None, given: dict[str, Sequence[str]]
) -> dict[str, Sequence[str]]:
    """The files of each part: those given, and else those in the task's folder."""
    files = {name: tuple(names) for name, names in given.items() if names}
    if config.data:
        if not row:
            raise UserError(f"--data {config.data} is the folder of a task: name it by --task "
                            f"(known: {', '.join(TASKS)}), or give files by --train and --dev")
        if not Path(config.data).is_dir():
            raise UserError(f"--data {config.data} is not a folder")
        for name, file in row.files:
            path = Path(config.data, file)
            if name in given and name not in files and (path.exists() or name != "test"):
                files[name] = (str(path),)
    if "train" in given and "train" not in files:
        raise UserError("--train is missing: give labelled files, or --task and --data")
    if "train" not in given and "dev" not in files:
        raise UserError("--dev is missing: give labelled files, or --task and --data")
    return files


def _check_alike(raw: dict[str, Labelled]) -> None:
    """Raise a UserError if one part holds pairs or words where another holds texts."""
    shapes = {name: "words" if part.tagged else f"{len(part.texts[0])} text(s) an example"
              for name, part in raw.items()}
    if len(set(shapes.values())) > 1:
        raise UserError("the parts are not alike: " + ", ".join(
            f"{shape} in --{name}" for name, shape in shapes.items()))


def _held_out(train: Labelled, kind: str) -> dict[str, Labelled]:
    """A part of the training examples to be judged on, by the hash of their texts; a class that
    would be in that part alone stays in the training."""
    held = [sources.is_held_out("\n".join(texts), DEV_SHARE) for texts in train.texts]
    if kind == "classify":
        taught = {label for h, label in zip(held, train.labels, strict=True) if not h}
        held = [h and label in taught for h, label in zip(held, train.labels, strict=True)]
    if len(set(held)) < 2:
        raise UserError(f"{len(train)} examples with {len(set(train.texts))} different texts are "
                        "too few to hold some out: give --dev")
    return {"train": train.some([i for i, h in enumerate(held) if not h]),
            "dev": train.some([i for i, h in enumerate(held) if h])}


def _check_overlap(raw: dict[str, Labelled]) -> None:
    """Say how many texts that are judged on are in the training too, or have two labels there."""
    if "train" not in raw:
        return
    labels: dict[tuple[str, ...], set[str]] = {}
    for texts, label in zip(raw["train"].texts, raw["train"].labels, strict=True):
        labels.setdefault(texts, set()).add(str(label))
    for name in ("dev", "test"):
        texts = raw[name].texts if name in raw else []
        if both := sum(own in labels for own in texts):
            say(f"warning: {both:,} of {len(texts):,} texts of --{name} are in --train too")
    if twice := sum(len(found) > 1 for found in labels.values()):
        say(f"warning: {twice:,} texts of --train have two labels")


def _named(
    raw: dict[str, Labelled], written: Sequence[tuple[str, str]], kind: str, known: Sequence[str]
) -> tuple[dict[str, Labelled], tuple[str, ...]]:
    """Labels under their names, and the names in the order of the logits.

    Args:
        raw: the parts.
        written: labels as files of a known task have them, and their names.
        kind: of the task.
        known: names of the labels of a model that was trained for it.

    Raises:
        UserError: the labels of the model are not those of the data.
    """
    if kind == "regress":
        if known:
            raise UserError(f"the model chooses among {targets.some(known)}, the labels of the "
                            "data are numbers: give --kind classify, or another model")
        return raw, ()
    written = dict(written)
    if written:
        raw = {name: dataclasses.replace(part, labels=[
            written.get(targets.class_name(label), label) for label in part.labels])
            for name, part in raw.items()}
    first = raw["train" if "train" in raw else "dev"]
    judged = bool(known) and "train" not in raw  # where not every class has to occur
    own = tuple(written.values()) or targets.class_names(first, 1 if judged else 2)
    if not known:
        return raw, own
    if len({name.lower() for name in known}) < len(known):
        raise UserError(f"two labels of the model have one name: {targets.some(known)}: give each "
                        "its own, also in small letters, in id2label of its config.json")
    if {name.lower() for name in known} == {name.lower() for name in own}:
        return raw, tuple(known)
    # Models of some trainers have names that say nothing; numbers in the data mean their order.
    plain = [f"LABEL_{i}" for i in range(len(known))]
    numbers = list(written) or list(own)
    places = [str(i) for i in range(len(known))]
    if list(known) == plain and (numbers == places or (judged and set(numbers) <= set(places))):
        return raw, tuple(written.values()) or tuple(places)
    if judged and {n.lower() for n in own} < {n.lower() for n in known}:
        return raw, tuple(known)
    raise UserError(f"the labels of the model are {targets.some(known)}, those of the data "
                    f"{targets.some(own)}: rename them in the data or in the model's config.json")


def _truth(part: Labelled, kind: str, labels: tuple[str, ...]) -> tuple[Any, Any]:
    """Labels as numbers for training, and as they are judged."""
    if all(label is None for label in part.labels):
        return None, None
    known = [i for i, label in enumerate(part.labels) if label is not None]
    if len(known) < len(part):
        missing = next(i for i, label in enumerate(part.labels) if label is None)
        raise UserError(f"{part.where[missing]}: no label, where others have one")
    if kind == "regress":
        numbers = targets.numbers(part)
        return numbers, numbers
    numbers = targets.classes(part, labels)
    return numbers, part.labels if kind == "tag" else numbers


def _check_expected(
    found: TaskInput, name: str, tokenizer: "transformers.PreTrainedTokenizerFast"
) -> None:
    """Say what was read, and where its numbers are not the published ones."""
    for part, count in found.task.rows.items():
        if part in found.parts and len(found.parts[part]) != count:
            say(f"warning: {name} has {count:,} examples in {part}, these files "
                f"{len(found.parts[part]):,}: figures are not comparable with published ones")
    if "train" in found.parts:
        train = found.parts["train"]
        if len(train) < 2:
            raise UserError(f"{len(train)} example is too few to train on")
        numbers = np.concatenate(train.examples.labels)
        if len(np.unique(numbers[~np.isnan(numbers)])) < 2:
            raise UserError("all labels of --train are the same: there is nothing to learn")
        if found.kind == "regress" and (largest := np.abs(numbers).max()) > LARGE:
            say(f"warning: numbers of --train go up to {largest:g}, and a head begins near 0 and "
                "moves in small steps: divide them, so that most are below 10")
    for part, content in found.parts.items():
        if not content.examples.starts[-1]:
            raise UserError(f"the tokenizer leaves no piece of any word of {part}")
        share = content.examples.lengths
        line = (f"{part}: {len(content):,} examples of {share.mean():.1f} tokens on average, the "
                f"longest of {share.max()}")
        if content.examples.cut:
            line += f"; {content.examples.cut:,} were longer and are cut"
        say(line)
        warn_of_unknown(part, content.examples, tokenizer)


def warn_of_unknown(
    part: str, examples: Examples, tokenizer: "transformers.PreTrainedTokenizerFast"
) -> None:
    """Say so where the tokenizer does not know many of a part's tokens."""
    if (share := unknown(examples, tokenizer)) > UNKNOWN:
        say(f"warning: {share:.1%} of the tokens of {part} are unknown to the tokenizer: is the "
            "model one of their language?")

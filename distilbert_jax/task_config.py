"""The settings of what is done with labelled data, as config.py has those of pretraining.

Every other module receives these dataclasses; nothing here imports jax.
"""

import dataclasses
from collections.abc import Mapping, Sequence

from distilbert_jax.config import (
    BY_CONTENT,
    FREE,
    Config,
    DataConfig,
    LoopConfig,
    Word,
    Words,
    check,
    check_choose,
    check_temperature,
    check_weights,
    flag,
    option,
)
from distilbert_jax.errors import UserError, choose


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskData(Config):
    """Labelled data, and what there is to be done with it."""

    task: str = option(
        "", "data", "a task whose files, columns, labels and metrics are known: cola, sst2, ...; "
        "without it, columns and kind are taken from the files; sts judges sentence encoders")
    data: Word = option("", "data", "folder of the task's files: train.tsv, dev.tsv, ...",
                        **BY_CONTENT)
    dev: Words = option(
        (), "data", "labelled files that the model is judged on; default, in training: a tenth of "
        "the examples, chosen by the hash of the text", nargs="+", **BY_CONTENT)
    text: Words = option(
        (), "data", "the column of the text, or the two columns of a pair; default: text, or "
        "sentence1 and sentence2", nargs="+")
    label: str = option("", "data", "the column of the label; default: label or score")
    kind: str = option(
        "", "data", "classify, regress or tag; default: tag for files in CoNLL's form, regress "
        "for numbers with decimals, else classify")
    max_length: int | None = option(
        None, "data", "tokens of the longest example; what is longer is cut, and counted; default: "
        "the task's, or 128", type=int)

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self, "max_length", self.max_length is None or self.max_length >= 8,
              "must be at least 8")
        if self.kind:
            choose(self.kind, ("classify", "regress", "tag"), "--kind")
        check(self, "text", len(self.text) <= 2, "must be one column or two")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinetuneConfig(LoopConfig, TaskData):
    """Training for a task, with a teacher or without."""

    model: Word = option(
        "", "models", "Hugging Face folder to start from; with --teacher by default the teacher",
        **BY_CONTENT)
    teacher: Word = option(
        "", "models", "folder of a model fine-tuned for the task, whose answers are learnt too",
        **BY_CONTENT)
    distil: bool = option(
        False, "models", "fine-tune --model first, and distil it into --student-layers")
    student_layers: str | int | Sequence[int] = option(
        "", "models", "how many layers of --model to keep (evenly chosen), or which: 0,3,5; "
        "default: all of them, or half of a teacher's")
    choose: str = option(
        "", "models", "how so many layers are chosen: even, or greedy, which removes the one "
        "without which the teacher's answers are read best from the states that are left, again "
        "and again; default: greedy where the student starts at its teacher")
    baseline: bool = option(
        True, "models", "with a teacher, also train the student without it, for comparison",
        **FREE)
    train: Words = option(
        (), "data", "labelled files: .csv, .tsv, .jsonl, .parquet, .conll", nargs="+",
        **BY_CONTENT)
    test: Words = option(
        (), "data", "files to answer in the end, with labels or without", nargs="+", **BY_CONTENT)
    unlabelled: Words = option(
        (), "data", "files without labels from which the teacher's answers are learnt",
        nargs="+", **BY_CONTENT)
    augment: int = option(
        0, "data", "variants of each training text, in which --model's masked-language head chose "
        "some of the words, and from which the teacher's answers are learnt")
    epochs: float | None = option(
        None, "training", "passes over the data; default: the task's, or 3", type=float)
    seeds: int = option(
        1, "training", "how often to train, each time with another seed, for intervals", **FREE)
    temperature: float = option(2.0, "losses", "temperature of the teacher's answers")
    alphas: Mapping[str, float] = option(
        {"hard": 0.1, "soft": 0.9}, "losses", "weight of the", each="alpha",
        needs=("targets", "answers", "hidden"))
    hidden_map: str = option(
        "", "losses", "which layers are compared, student:teacher, counted from 1: 1:2,3:6; "
        "default: every layer of the student, evenly")
    batch_size: int = option(32, "training", "examples per update, over all devices")
    learning_rate: float | None = option(
        None, "training", "peak of the learning rate; default: 5e-5 at 768 units, inversely as the "
        "width of the model", type=float)
    warmup: float = option(
        0.1, "training", "share of the updates over which the rate rises, before it falls to 0")
    weight_decay: float = option(0.01, "training", "decoupled decay of the matrices")
    clip: float = option(1.0, "training", "largest global norm of the gradient")

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self, "seeds", self.seeds >= 1, "must be at least 1")
        check(self, "augment", 0 <= self.augment <= 1000, "must be 0 to 1000")
        check(self, "epochs", self.epochs is None or 0 < self.epochs < float("inf"),
              "must be positive, finite")
        check_temperature(self)
        check_weights(self.alphas)
        if self.teacher and self.distil:
            raise UserError("--distil trains its own teacher from --model: leave out --teacher")
        if not (self.teacher or self.model):
            raise UserError("--model is missing: give the Hugging Face folder to start from")
        if self.task == "sts":
            raise UserError("--task sts judges sentence encoders (distilbert-jax evaluate); they "
                            "are trained by embed, and scorers of pairs by --kind "
                            "regress")
        if not self.taught:
            for name in ("unlabelled", "hidden_map", "augment"):
                if getattr(self, name):
                    raise UserError(f"{flag(name)} needs a teacher: give --teacher or --distil")
        check_choose(self)
        if self.choose == "greedy" and not self._starts_at_teacher:
            raise UserError("--choose greedy keeps layers of the teacher, and the student starts "
                            "at --model: leave out --model, or give --distil")

    @property
    def taught(self) -> bool:
        """Whether there is a teacher."""
        return bool(self.teacher or self.distil)

    @property
    def _starts_at_teacher(self) -> bool:
        return bool(self.distil or (self.teacher and not self.model))

    @property
    def greedy(self) -> bool:
        """Whether the student's layers are chosen by the teacher's answers."""
        return (self._starts_at_teacher and "," not in self.student_layers
                and self.choose != "even")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateConfig(DataConfig, TaskData):
    """The judgement of a model: on labelled data, or as a masked language model on texts."""

    model: Word = option("", "models", "Hugging Face folder to judge")
    teacher: Word = option(
        "", "models", "model to compare with: of a masked language model another, of a sentence "
        "encoder its teacher")
    pooling: str = option(
        "", "models", "with --task sts, of folders without modules.json: mean, cls, max or "
        "mean_sqrt_len_tokens")
    retrieval: Words = option(
        (), "data", "with --task sts, JSON lines of title and text: titles look for their texts",
        nargs="+")
    dtype: str = option("auto", "devices", "as for training")
    mesh: str = option("", "devices", "DATAxMODEL, e.g. 8x1; default: all devices on data")
    output: Word = option("", "output", "folder for metrics.json and predictions.tsv; default: "
                          "figures are printed alone")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.model:
            raise UserError("--model is missing: give the Hugging Face folder to judge")
        if self.on_texts and (self.task or self.data or self.dev):
            raise UserError("--corpus and --valid are texts for a masked language model, --task, "
                            "--data and --dev labelled data: give one or the other")
        if self.teacher and not self.on_texts and self.task != "sts":
            raise UserError(f"--teacher {self.teacher} is compared on texts: give --corpus or "
                            "--valid, or --task sts for sentence encoders")
        for name in ("pooling", "retrieval"):
            if getattr(self, name) and self.task != "sts":
                raise UserError(f"{flag(name)} is for sentence encoders: give --task sts")

    @property
    def on_texts(self) -> bool:
        """Whether texts are given, on which hidden words are guessed."""
        return bool(self.corpus or self.valid)

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
    check_output,
    check_temperature,
    check_weights,
    flag,
    option,
)
from distilbert_jax.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskData(Config):
    """Labelled data, and what there is to be done with it."""

    task: str = option(
        "", "data", "a task whose files, columns, labels and metrics are known: cola, sst2, "
        "...; without it, columns and kind are taken from the files; sts is for sentence encoders",
        metavar="NAME")
    data: Word = option("", "data", "folder of the task's files: train.tsv, dev.tsv, ...",
                        **BY_CONTENT)
    dev: Words = option(
        (), "data", "labelled files that the model is judged on; default, in training: a tenth of "
        "the examples, chosen by the hash of the text", nargs="+", **BY_CONTENT)
    text: Words = option(
        (), "data", "the column of the text, or the two columns of a pair; default: text, or "
        "sentence1 and sentence2", metavar="COLUMN", nargs="+")
    label: str = option(
        "", "data", "the column of the label; default: label or score", metavar="COLUMN")
    kind: str = option(
        "", "data", "what is learnt: a class, a number, or a tag for each word; default: tag "
        "for files in CoNLL's form, regress for numbers with decimals, else classify",
        choices=("classify", "regress", "tag"))
    max_length: int | None = option(
        None, "data", "tokens of the longest example; longer ones are cut, and counted; "
        "default: the task's, or 128", type=int)

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self, "max_length", self.max_length is None or self.max_length >= 8,
              "must be at least 8")
        check(self, "text", len(self.text) <= 2, "must be one column or two")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinetuneConfig(LoopConfig, TaskData):
    """Training for a task, with a teacher or without."""

    model: Word = option(
        "", "models", "Hugging Face folder to start from; default: the one of --teacher",
        **BY_CONTENT)
    teacher: Word = option(
        "", "models", "folder of a model that was fine-tuned for the task, whose answers are "
        "learnt too", **BY_CONTENT)
    distil: bool = option(
        False, "models", "fine-tune --model first, then distil it into --student-layers")
    student_layers: str | int | Sequence[int] = option(
        "", "models", "how many layers of --model to keep, or which, counted from 0: 0,3,5; "
        "default: all of them, or half of a teacher's", metavar="N|N,N,...")
    choose: str = option(
        "", "models", "how the layers that are kept are chosen: even, at equal distances; or "
        "greedy, which removes one layer after the other, each time the one whose loss is felt "
        "least in the teacher's answers (as a linear map predicts them from the shortened model's "
        "states); default: greedy where the student starts as layers of its teacher, else even",
        choices=("even", "greedy"))
    baseline: bool = option(
        True, "models", "with a teacher, also train the student without it, for comparison",
        **FREE)
    train: Words = option(
        (), "data", "labelled files: .csv, .tsv, .jsonl, .parquet, .conll", nargs="+",
        **BY_CONTENT)
    test: Words = option(
        (), "data", "files to answer at the end, with labels or without", nargs="+", **BY_CONTENT)
    unlabelled: Words = option(
        (), "data", "files without labels, for which the student learns the teacher's answers",
        nargs="+", **BY_CONTENT)
    augment: int = option(
        0, "data", "how many variants of each training text to add, in which the masked-language "
        "head of --model replaces some words or, where it has none, others of the training texts "
        "do; the student learns the teacher's answers to them")
    epochs: float | None = option(
        None, "training", "passes over the data; default: the task's, or 3", type=float)
    seed: int = option(
        LoopConfig.seed, "training", "seed of the head's initialisation, of the order of the "
        "examples, of dropout and of --augment")
    seeds: int = option(
        1, "training", "how often to train, each time with another seed; several give intervals",
        **FREE)
    temperature: float = option(2.0, "losses", "temperature of the teacher's answers")
    alphas: Mapping[str, float] = option(
        {"hard": 0.1, "soft": 0.9}, "losses", "weight of the", each="alpha",
        needs=("targets", "answers", "hidden"))
    hidden_map: str = option(
        "", "losses", "for --alpha-hidden and --alpha-inner: which layers are compared, as "
        "student:teacher, counted from 1: 1:2,3:6; default: every layer of the student, with "
        "layers of the teacher at even distances", metavar="S:T,...")
    batch_size: int = option(32, "training", "examples in an update, over all devices")
    learning_rate: float | None = option(
        None, "training", "peak of the learning rate; default: 5e-5 at 768 units, inversely as the "
        "width of the model", type=float)
    warmup: float = option(
        0.1, "training", "share of the updates over which the rate rises, before it falls to 0")
    weight_decay: float = option(0.01, "training", "decoupled weight decay, of the matrices only")
    clip: float = option(
        1.0, "training", "largest global norm of the gradient; a larger one is scaled down to it")

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
        "", "models", "model to compare with: for a masked language model another one, for a "
        "sentence encoder its teacher")
    kind: str = option(
        "", "data", "what was learnt: a class, a number, or a tag for each word; default: what the "
        "model was trained for", choices=("classify", "regress", "tag"))
    pooling: str = option(
        "", "models", "with --task sts, for folders without modules.json: how the states of a "
        "text become one vector", metavar="mean|cls|max|mean_sqrt_len_tokens")
    retrieval: Words = option(
        (), "data", "with --task sts, JSON lines of title and text: titles look for their texts",
        nargs="+")
    dtype: str = option(
        "auto", "devices", "dtype of matrix products (float64: of everything); auto is bfloat16 "
        "on TPU, GPU and CPUs that multiply it (AMX, AVX512-BF16), float32 on others",
        choices=("auto", "float32", "bfloat16", "float64"))
    mesh: str = option(
        "", "devices", "over how many devices the rows are divided, and over how many the "
        "matrices, e.g. 8x1 or 4x2; default: the rows over all devices", metavar="DATAxMODEL")
    output: Word = option(
        "", "output", "folder for metrics.json and predictions.tsv; default: figures are only "
        "printed")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.model:
            raise UserError("--model is missing: give the Hugging Face folder to judge")
        if self.output:
            check_output(self.output)
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

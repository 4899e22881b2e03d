"""The settings of the benchmarks, as the command line gives them."""

import dataclasses
from collections.abc import Sequence

from distilbert_jax.benchmark.serving import RUNTIMES
from distilbert_jax.config import Config, Word, Words, check, option
from distilbert_jax.embed_config import EmbedConfig
from distilbert_jax.errors import UserError
from distilbert_jax.task_config import TaskData


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadBenchmark(Config):
    """The vocabulary head on its own."""

    shape: str = option(
        "small", "models", "small has 4 layers of 256, bert-base 12 of 768, both with 30,522 "
        "words", choices=("small", "bert-base"))
    batch_size: int = option(32, "training", "rows of an update")
    sequence_length: int = option(128, "data", "tokens in a row")
    rounds: int = option(
        5, "output", "how often each side is timed, in turn; the median counts")

    LEAST_ROUNDS = 0  # compiles only

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("batch_size", 1), ("sequence_length", 8),
                            ("rounds", self.LEAST_ROUNDS)):
            check(self, name, getattr(self, name) >= least, f"must be at least {least}")
        check(self, "sequence_length", self.sequence_length <= 512, "must be at most 512")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainBenchmark(HeadBenchmark):
    """Our update beside PyTorch's."""

    corpus: Words = option(
        (), "data", "documents as for distil: ours packed, PyTorch's padded in groups of about "
        "one length; default: full rows, the same on both sides", nargs="+")
    tokenizer: str = option("", "models", "Hugging Face folder, for --corpus", metavar="DIR")
    updates: int = option(4, "training", "updates of ours in a round")
    dtype: str = option(
        "auto", "devices", "dtype of matrix products; auto as for distil",
        choices=("auto", "float32", "bfloat16"))
    sides: tuple[str, ...] = option(
        ("ours", "torch", "torch-memory"), "devices", "what is measured, ours first; torch is "
        "eager, as one types it; torch-memory and torch.compile keep freed memory, as ours does, "
        "by glibc's variables; ours-kept has the teacher's states computed before (default: ours "
        "torch torch-memory)",
        choices=("ours", "ours-kept", "torch", "torch-memory", "torch.compile"), nargs="+")
    sweep: bool = option(
        False, "output", "plot tokens per second over batch, row length, layers and devices")
    output: str = option("benchmark", "output", "folder for figures and plots", metavar="DIR")

    LEAST_ROUNDS = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self, "updates", self.updates >= 1, "must be at least 1")
        if self.sides[0] != "ours":
            raise UserError(f"--sides {' '.join(self.sides)} must begin with ours, which masks "
                            "for the others")
        if bool(self.corpus) != bool(self.tokenizer):
            raise UserError("--corpus and --tokenizer belong together: give both, or neither")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskBenchmark(TaskData):
    """Our training for a task beside the Hugging Face Trainer's."""

    model: str = option("", "models", "Hugging Face folder to start from", metavar="DIR")
    train: Words = option((), "data", "labelled files, as for finetune", nargs="+")
    batch_size: int = option(32, "training", "examples of an update")
    updates: int = option(20, "training", "updates in a round")
    rounds: int = option(5, "output", "how often each side is timed, in turn; the median counts")
    dtype: str = option(
        "auto", "devices", "dtype of matrix products; auto as for finetune",
        choices=("auto", "float32", "bfloat16"))
    sides: tuple[str, ...] = option(
        ("ours", "trainer", "trainer-padded"), "devices", "what is measured, ours first; "
        "trainer pads each batch to its longest example, trainer-padded to the task's length "
        "(default: all)", choices=("ours", "trainer", "trainer-padded"), nargs="+")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.model:
            raise UserError("--model is missing: give the Hugging Face folder to start from")
        for name, least in (("batch_size", 1), ("updates", 2), ("rounds", 1)):
            check(self, name, getattr(self, name) >= least, f"must be at least {least}")
        if self.sides[0] != "ours":
            raise UserError(f"--sides {' '.join(self.sides)} must begin with ours, which the "
                            "others are compared with")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SentenceBenchmark(EmbedConfig):
    """Our training of a sentence encoder beside that of sentence-transformers."""

    updates: int = option(20, "training", "updates in a round")
    minutes: float = option(
        10.0, "training", "that each side trains, compilation included, before both are judged")
    rounds: int = option(5, "output", "how often each side is timed, in turn; the median counts")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("updates", 2), ("rounds", 1)):
            check(self, name, getattr(self, name) >= least, f"must be at least {least}")
        check(self, "minutes", 0 < self.minutes < float("inf"), "must be positive, finite")
        if self.student or self.choose == "greedy":
            raise UserError("both sides start as layers of --teacher, evenly chosen or named by "
                            "--student-layers: leave out --student and --choose")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServingBenchmark(Config):
    """Latency of models in each runtime that serves them."""

    model: Words = option(
        (), "models", "Hugging Face folders; the files that ship leaves in them are timed too",
        nargs="+", metavar="DIR")
    teacher: Word = option(
        "", "models", "folder of the teacher, in PyTorch; default: ratios are to the first model")
    evaluate: Words = option(
        (), "data", "texts, or labelled files, that are answered one by one in all rounds together",
        nargs="+")
    text: Words = option(
        (), "data", "the column of the text, or the two columns of a pair; default: text, or "
        "sentence1 and sentence2", metavar="COLUMN", nargs="+")
    threads: int | Sequence[int] = option(
        (1, 2), "devices", "how many threads a runtime computes with; each number is measured "
        "(default: 1 2)", nargs="+", type=int)
    runtimes: Words = option(
        RUNTIMES, "devices", "which runtimes are measured (default: all)", choices=RUNTIMES,
        nargs="+")
    rounds: int = option(25, "output", "how often each side is timed, in turn")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.model:
            raise UserError("--model is missing: give one or several Hugging Face folders")
        check(self, "rounds", self.rounds >= 1, "must be at least 1")
        if min(self.threads) < 1:
            raise UserError(f"--threads {min(self.threads)} must be at least 1")


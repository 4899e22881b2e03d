"""The settings of a run: what comes in from the command line, validated, goes out frozen.

Every other module receives these dataclasses; nothing here imports jax.
"""

import contextlib
import dataclasses
import importlib.util
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from distilbert_jax.errors import UserError, choose

# What a person may write in Python; held as a str, and as a tuple of them.
Word = str | os.PathLike[str]
Words = Word | Sequence[Word]

GROUPS = ("models", "data", "training", "losses", "devices", "output")  # of --help, in this order


FREE = {"continued": "free"}  # may differ between a run and its continuation
BY_CONTENT = {"continued": "by content"}  # a continuation compares what was read, not its name


def option(default: Any, group: str, text: str, **extra: Any) -> Any:
    """A dataclass field that is also a command-line flag of the same name.

    Args:
        default: its value where nothing is given.
        group: of --help.
        text: of --help, from which a flag without text is left out; the default is added, unless
            it says "default:" itself.
        extra: "choices", the words that it may be; or "metavar", how --help writes a value that is
            neither a number, a folder (Word) nor files (Words); or "positional", for words without
            a flag before them. A field belongs to the meaning of a
            run, unless FREE or BY_CONTENT is among them.
    """
    if isinstance(default, dict):
        return dataclasses.field(
            default_factory=default.copy, metadata={"group": group, "help": text, **extra})
    return dataclasses.field(default=default, metadata={"group": group, "help": text, **extra})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Masking:
    """How positions are chosen and replaced for the masked-language-model loss (DistilBERT, A.6).

    The reference draws over the whole micro-batch and lets a random replacement be any id; here
    the number is fixed per row and a special token is neither masked nor drawn.
    """

    rate: float = 0.15  # share of a row's real tokens that is predicted
    mask: float = 0.8  # share of those replaced by [MASK]
    keep: float = 0.1  # share left as they are; the rest becomes a random ordinary token
    smoothing: float = 0.7  # a token is chosen with probability proportional to count**-smoothing


# Held-out figures hide every chosen token and choose uniformly, so that they read as
# "how often is a hidden token guessed", independent of the corpus counts.
EVALUATION_MASKING = Masking(mask=1.0, keep=0.0, smoothing=0.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Settings that Python may give in the form a person writes, held in one form.

    Words that are not among the choices of a field are a UserError."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = _as_flag(field, getattr(self, field.name))
            object.__setattr__(self, field.name, value)
            if (choices := field.metadata.get("choices")) and value != field.default:
                for word in value if isinstance(value, tuple) else (value,):
                    choose(word, choices, flag(field.name))


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig(Config):
    """Which documents there are, and how they are brought into rows."""

    corpus: Words = option(
        (), "data", "text, JSON-lines or parquet files (globs; .gz, .zst, .bz2, .xz), folders of "
        "them or saved by datasets, paragraphs:FILE (empty lines between documents), "
        "hf:NAME[:CONFIG], tfds:NAME, python-docs, or one folder that `prepare` made; files and "
        "folders may lie under gs://; one line of text is one document", nargs="+",
        **BY_CONTENT)
    mix: float | Sequence[float] = option(
        (), "data", "a weight for each corpus: documents are drawn in this ratio until one "
        "corpus is used up; default: one corpus after the other", nargs="+", type=float)
    text_field: str = option(
        "", "data", "field or column that holds the text of a record; default: text, or the "
        "only one that holds a string", metavar="NAME")
    valid: Words = option(
        (), "data", "held-out corpus, named like --corpus; default: a part of the corpus, chosen "
        "by the hash of each document", nargs="+", **BY_CONTENT)
    valid_share: float = option(
        0.02, "data", "share of the documents held out when --valid is not given")
    sequence_length: int = option(128, "data", "tokens in a packed row")
    workers: int = option(
        0, "data", "processes that prepare the corpus; the result does not depend on their "
        "number; default: one for each core", **FREE)

    LARGEST_LENGTH = 2**16 - 1  # lengths of segments are stored as uint16

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("sequence_length", 8), ("workers", 0)):
            check(self, name, getattr(self, name) >= least, f"must be at least {least}")
        check(self, "sequence_length", self.sequence_length <= self.LARGEST_LENGTH,
              f"must be at most {self.LARGEST_LENGTH}")
        check(self, "valid_share", 0 < self.valid_share < 1, "must lie between 0 and 1")
        if self.mix and len(self.mix) != len(self.corpus):
            raise UserError(f"--mix has {len(self.mix)} weights, --corpus {len(self.corpus)} "
                            "words: give one weight for each")
        if not all(0 < weight < float("inf") for weight in self.mix):
            raise UserError(f"--mix {' '.join(map(str, self.mix))} must be positive, finite")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrepareConfig(DataConfig):
    """The preparation of a corpus on its own, for any number of runs."""

    tokenizer: Word = option(
        "", "models", "Hugging Face folder whose tokenizer is used, usually the teacher's")
    shard: str = option(
        "0/1", "data", "prepare only the I-th of N parts, counted from 0, on this machine; all "
        "N write into the same folder, and the last one to finish completes it", metavar="I/N")
    output: Word = option(
        "prepared", "output", "folder for the prepared corpus; may be gs://BUCKET/NAME")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_output(self.output)
        match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", self.shard)
        if not match or int(match[1]) >= int(match[2]):
            raise UserError(f"--shard {self.shard} must look like 0/4: a part, counted from 0, of "
                            "how many")

    @property
    def part(self) -> tuple[int, int]:
        """`shard` as numbers: which, of how many."""
        which, parts = map(int, self.shard.split("/"))
        return which, parts


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoopConfig(Config):
    """What every training has in common: its updates, its devices, its folder."""

    steps: int | None = option(
        None, "training", "updates; default: as many as --epochs says", **FREE)
    batch_size: int = option(128, "training", "rows in an update, over all devices")
    accumulate: int = option(
        1, "training", "micro-batches that an update is cut into, to save memory; the result is "
        "the same")
    remat: bool = option(
        False, "training", "compute each layer a second time for its gradient, to save memory; "
        "the result is the same", **FREE)
    optimizer: str = option(
        "adamw", "training", "adamw, or muon, which trains the matrices of the layers and "
        "leaves embeddings, heads, biases and norms to adamw", choices=("adamw", "muon"))
    learning_rate: float = option(5e-4, "training", "peak of the learning rate")
    warmup: float = option(
        0.05, "training", "share of the updates over which the rate rises, before it falls to 0")
    weight_decay: float = option(0.0, "training", "decoupled weight decay, of the matrices only")
    clip: float = option(
        5.0, "training", "largest global norm of the gradient; a larger one is scaled down to it")
    dropout: float = option(
        0.1, "training", "dropout rate in the model that is trained, for all kinds of dropout")
    seed: int = option(56, "training", "seed of initialisation, data order, masks and dropout")
    dtype: str = option(
        "auto", "devices", "dtype of matrix products (float64: of everything); auto is bfloat16 "
        "on TPU, GPU and CPUs that multiply it (AMX, AVX512-BF16), float32 on others",
        choices=("auto", "float32", "bfloat16", "float64"))
    mesh: str = option(
        "", "devices", "over how many devices the rows are divided, and over how many the "
        "matrices, e.g. 8x1 or 4x2; default: the rows over all devices", metavar="DATAxMODEL",
        **FREE)
    output: Word = option(
        "output", "output", "folder for checkpoints, figures and the model", **FREE)
    save_every: int = option(500, "output", "updates between checkpoints", **FREE)
    eval_every: int = option(250, "output", "updates between held-out evaluations", **FREE)
    keep: int = option(
        2, "output", "how many of the newest checkpoints to keep; the best by held-out loss is "
        "kept too", **FREE)
    on_save_error: str = option(
        "stop", "output", "what to do when a checkpoint cannot be written (disk full)",
        choices=("stop", "continue"), **FREE)
    log_to: str = option(
        "tensorboard", "output", "where the figures of metrics.jsonl are shown too: in "
        "OUTPUT/tensorboard, or on Weights & Biases (pip install wandb)",
        choices=("tensorboard", "wandb"), **FREE)
    finish: str = option(
        "", "output", "train nothing, and write model and report from the last checkpoint that "
        "there is, or the best by held-out loss; the run can go on afterwards, by the same command "
        "without it", choices=("last", "best"), **FREE)
    ship: bool = option(
        False, "output", "also write the model as ONNX, in float32 and int8, each compared with "
        "it on held-out data before it is kept, as `ship` does", **FREE)
    max_skipped: int = option(
        10, "training", "an update whose loss or gradient is not finite is skipped; after so "
        "many in a row the run stops", **FREE)

    LARGEST_SEED = 2**32 - 1

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least = {"batch_size": 1, "accumulate": 1, "save_every": 1, "eval_every": 1,
                    "keep": 1, "max_skipped": 1, "seed": 0}
        if self.steps is not None:
            at_least["steps"] = 1
        for name, least in at_least.items():
            check(self, name, getattr(self, name) >= least, f"must be at least {least}")
        check(self, "seed", self.seed <= self.LARGEST_SEED, f"must be at most {self.LARGEST_SEED}")
        for name in ("learning_rate", "clip"):
            value = getattr(self, name)
            check(self, name, value is None or 0 < value < float("inf"),
                  "must be positive, finite")
        check(self, "weight_decay", 0 <= self.weight_decay < float("inf"),
              "must be 0 or a positive, finite number")
        for name, most in {"steps": 2**31 - 1, "batch_size": 2**24, "learning_rate": 1e6,
                           "weight_decay": 1e6}.items():
            check(self, name, (getattr(self, name) or 0) <= most, f"must be at most {most}")
        for name in ("warmup", "dropout"):
            check(self, name, 0 <= getattr(self, name) < 1, "must be in [0, 1)")
        check(self, "accumulate", self.batch_size % self.accumulate == 0,
              f"must divide --batch-size {self.batch_size}")
        if self.log_to == "wandb" and not _installed("wandb"):
            raise UserError("--log-to wandb needs wandb: pip install wandb, or leave it out")
        check_output(self.output)

    def meaning(self) -> dict[str, Any]:
        """What a continuation must share, by flag; not what is known by its content."""
        settings = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if each := field.metadata.get("each"):
                settings |= {flag(f"{each}_{name}"): part for name, part in value.items() if part}
            elif "continued" not in field.metadata:
                settings[flag(field.name)] = value
        return settings


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig(LoopConfig, DataConfig):
    """What distillation and masked-language-model training have in common."""

    steps: int | None = option(
        None, "training", "updates; default: three passes over the data", **FREE)
    mask_rate: float = option(
        Masking.rate, "training", "share of each row's tokens that is chosen for prediction in "
        "training; held-out figures always use 0.15")
    output: Word = option(
        "output", "output", "folder for checkpoints, figures and the model; may be gs://BUCKET/NAME",
        **FREE)

    MASKING = Masking()

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self, "mask_rate", 0 < self.mask_rate < 1, "must lie between 0 and 1")

    @property
    def masking(self) -> Masking:
        """How tokens are chosen and replaced in training."""
        return dataclasses.replace(self.MASKING, rate=self.mask_rate)

    def updates(self, rows: int) -> int:
        """Updates of the run on a corpus of so many rows: `steps`, or three passes."""
        return self.steps or max(1, math.ceil(3 * rows / self.batch_size))


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistilConfig(TrainConfig):
    """A distillation: teachers, which student, and the weights of the losses."""

    teacher: Words = option(
        (), "models", "Hugging Face folder, or hub name where there is a network; or several, of "
        "one tokenizer, of which the first gives the student its layers and is what it is judged "
        "against", nargs="+", metavar="DIR", **BY_CONTENT)
    teacher_weights: float | Sequence[float] = option(
        (), "models", "how much each --teacher counts; they are divided by their sum, so that "
        "the weights of the losses keep their meaning; default: all alike", nargs="+",
        type=float, **BY_CONTENT)
    student_layers: str | int | Sequence[int] = option(
        "", "models", "how many of the teacher's layers to keep (evenly chosen), or which, "
        "counted from 0: 0,2,4,7,9,11; default: half of them", metavar="N|N,N,...")
    choose: str = option(
        "even", "models", "how the layers that are kept are chosen: even, as the original does, "
        "or greedy, which removes one layer after the other, each time the one without which the "
        "teacher's predictions change least, and exchanges some", choices=("even", "greedy"))
    init: str = option(
        "teacher", "models", "what the student starts from: the teacher's parameters, or random "
        "ones", choices=("teacher", "random"))
    student: Word = option(
        "", "models", "Hugging Face folder of a model that the student starts from, in place of "
        "layers of the teacher: of any depth and width, with the teacher's tokenizer",
        **BY_CONTENT)
    fold_token_type: bool = option(
        True, "models", "add the teacher's embedding of token type 0 to the student's "
        "positions, so that both begin with equal embeddings; the original drops it")
    freeze_position_embeddings: bool = option(
        False, "models", "keep the student's position embeddings as they are at the start")
    temperature: float = option(2.0, "losses", "temperature of the soft targets")
    alphas: Mapping[str, float] = option(
        {"ce": 5.0, "mlm": 2.0, "cos": 1.0}, "losses", "weight of the", each="alpha",
        needs=("labels", "logits", "last", "hidden", "qkv"))
    hidden_map: str = option(
        "", "losses", "for --alpha-hidden and --alpha-inner: which layers are compared, as "
        "student:teacher, counted from 1: 1:4,2:8; default: every layer of the student, with "
        "layers of the teacher at even distances", metavar="S:T,...")
    relation_heads: int = option(
        0, "losses", "heads that queries, keys and values are cut into for --alpha-relation, of "
        "any number that divides both widths; default: as many as the teacher has attention heads")
    restrict_ce_to_mask: bool = option(
        False, "losses", "KL and squared error of logits on masked positions only, instead of "
        "all real tokens")
    kept_maskings: int = option(
        0, "training", "run the teacher once, before the updates, on each row masked in so many "
        "ways, and keep its last states on disk: the updates read them in turn and do not run the "
        "teacher; default: 0, the teacher runs in every update, and each pass masks anew")
    state_dtype: str = option(
        "bfloat16", "training", "the states are kept in bfloat16, or exact: in the dtype that the "
        "teacher gives", choices=("bfloat16", "exact"))
    states: Word = option(
        "", "training", "folder that keeps the states, for several runs of one seed; default: "
        "OUTPUT/states", metavar="DIR", **FREE)
    compile_only: str = option(
        "", "devices", "TPUs or GPUs that need not be here, e.g. v5e:2x4 or h100:8: only compile "
        "the update for them, on this machine, and say whether it fits and how long the run would "
        "take", metavar="TOPOLOGY", **FREE)
    recipe: str = option(
        "", "output", "a set of other defaults that belong together", metavar="NAME", **FREE)

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self, "relation_heads", self.relation_heads >= 0, "must be 0 or more")
        check_choose(self, default="even")
        if self.student and (self.student_layers or self.init == "random" or self.greedy):
            raise UserError(f"--student {self.student} is a start of its own: leave out "
                            "--student-layers, --init and --choose")
        if self.greedy and self.init == "random":
            raise UserError("--choose greedy keeps layers of the teacher, --init random none: "
                            "leave out one of them")
        check_temperature(self)
        check_weights(self.alphas)
        check(self, "kept_maskings", self.kept_maskings >= 0, "must be 0 or more")
        self._check_teachers()
        if self.states and not self.kept_maskings:
            raise UserError(f"--states {self.states} is the folder for what --kept-maskings keeps: "
                            "add --kept-maskings 1, or leave out --states")
        if "://" in self.states:
            raise UserError(f"--states {self.states} must be a folder of this machine")

    def _check_teachers(self) -> None:
        """Raise a UserError unless each teacher has a name and a weight of its own."""
        teachers, weights = self.teacher, self.teacher_weights
        if "" in teachers:
            raise UserError("--teacher is empty: give a Hugging Face folder")
        if len(set(teachers)) < len(teachers):
            raise UserError(f"--teacher {' '.join(teachers)} names one twice: give it a larger "
                            "--teacher-weights")
        if weights and len(weights) != len(teachers):
            raise UserError(f"--teacher-weights has {len(weights)} numbers, --teacher "
                            f"{len(teachers)} folders: give one for each")
        if not all(0 < weight <= 1e9 for weight in weights):
            raise UserError(f"--teacher-weights {' '.join(map(str, weights))} must be positive, at "
                            "most 1e9: leave out a teacher that is not to count")
        if self.kept_maskings and len(teachers) > 1:
            raise UserError(f"--kept-maskings {self.kept_maskings} keeps the states of one "
                            f"teacher, and --teacher names {len(teachers)}: leave it out")

    @property
    def shares(self) -> tuple[float, ...]:
        """The share of each teacher in the losses that compare with one; they sum to 1."""
        weights = self.teacher_weights or (1.0,) * len(self.teacher)
        return tuple(weight / math.fsum(weights) for weight in weights)

    @property
    def greedy(self) -> bool:
        """Whether the student's layers are chosen by the teacher's predictions."""
        return self.choose == "greedy"

    @property
    def frozen(self) -> tuple[str, ...]:
        """Parameters of the student, by the beginning of their path, that keep their start."""
        return ("student/embeddings/position",) if self.freeze_position_embeddings else ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class AblationConfig(DistilConfig):
    """One distillation several times, each time with something else changed."""

    # Refused: each says why below. Without a text they are not in --help.
    compile_only: str = option("", "devices", "", metavar="TOPOLOGY", **FREE)
    finish: str = option("", "output", "", metavar="last|best", **FREE)
    states: Word = option("", "training", "", **FREE)
    output: Word = option(
        "output", "output", "folder for the runs, the report and the plot", **FREE)
    seeds: int = option(
        3, "training", "runs of each row, with seeds from --seed on; several give intervals",
        **FREE)

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self, "seeds", self.seeds >= 1, "must be at least 1")
        if self.compile_only:
            raise UserError("--compile-only belongs to distil: leave it out")
        if self.finish:
            raise UserError("--finish belongs to distil: give it with the --output of one run")
        if self.states:
            raise UserError(f"--states {self.states} holds the states of one seed: leave it out, "
                            "and OUTPUT/states keeps those of all runs")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompareConfig(Config):
    """A comparison of finished runs."""

    runs: Words = option(
        (), "models", "folders that distil, finetune or embed have left, or JSON files that list "
        "runs", nargs="+", metavar="DIR", positional=True)
    output: Word = option(".", "output", "folder for compare.png")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainConfig(TrainConfig):
    """Masked-language-model training of a BERT, from scratch or from a folder (adaptation)."""

    model: Word = option(
        "", "models", "Hugging Face folder to start from, with its tokenizer; default: start "
        "from nothing", **BY_CONTENT)
    vocab_size: int = option(
        8192, "models", "words of the WordPiece vocabulary that is learnt without --model")
    lowercase: bool = option(
        True, "models", "whether that vocabulary is uncased; accents are kept in any case")
    hidden_size: int = option(256, "models", "width of the model, without --model")
    num_hidden_layers: int = option(4, "models", "layers, without --model")
    num_attention_heads: int = option(4, "models", "attention heads, without --model")

    MASKING = Masking(smoothing=0.0)  # as BERT was trained; rare words first would be slow

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("vocab_size", 100), ("hidden_size", 1), ("num_hidden_layers", 1),
                            ("num_attention_heads", 1)):
            check(self, name, getattr(self, name) >= least, f"must be at least {least}")
        check(self, "vocab_size", self.vocab_size <= 2**24, f"must be at most {2**24}")
        check(self, "num_attention_heads", self.hidden_size % self.num_attention_heads == 0,
              f"must divide --hidden-size {self.hidden_size}")
        for name in ("vocab_size", "lowercase", "hidden_size", "num_hidden_layers",
                     "num_attention_heads"):
            check(self, name, not self.model or getattr(self, name) == getattr(type(self), name),
                  f"is for a model from nothing, and --model {self.model} is what it is: leave out "
                  "one of them")


def _as_flag(field: dataclasses.Field, value: Any) -> Any:
    """What a person writes in Python, as the command line would give it: a str or Path where
    several are possible, a Path or number or list of numbers where a word is expected."""
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    name = flag(field.name)
    if isinstance(field.default, tuple):
        if value is None or isinstance(value, (bytes, dict)):
            raise UserError(f"{name} {value!r} must be a word or a list of them")
        value = (value,) if isinstance(value, (str, int, float)) else value
        if not isinstance(value, (list, tuple)):
            raise UserError(f"{name} {value!r} must be a list")
        value = tuple(os.fspath(v) if isinstance(v, os.PathLike) else v for v in value)
        kind = field.metadata.get("type", str)
        if not all(isinstance(v, (int, float) if kind is float else kind) for v in value):
            raise UserError(f"{name} {value!r} must hold " + (
                "numbers" if kind is float else "names"))
        return value
    if isinstance(field.default, str) and not isinstance(value, str):
        numbers = value if isinstance(value, (list, tuple)) else [value]
        return ",".join(map(str, numbers)) if value is not None else field.default
    kind = field.metadata.get("type", int if field.default is None else type(field.default))
    if kind in (int, float, bool) and not (value is None and field.default is None):
        known = {int: int, float: (int, float), bool: bool}[kind]
        if not isinstance(value, known) or (isinstance(value, bool) and kind is not bool):
            said = {int: "a whole number", float: "a number", bool: "True or False"}[kind]
            raise UserError(f"{name} {value!r} must be {said}")
    return value


def check_choose(config: Any, default: str = "") -> None:
    """Raise a UserError for a --choose that is given beside the layers themselves."""
    if config.choose != default and "," in config.student_layers:
        raise UserError(f"--student-layers {config.student_layers} names the layers: leave out "
                        "--choose")


def check_temperature(config: Any) -> None:
    """Raise a UserError unless the temperature is one at which a softmax can be computed."""
    check(config, "temperature", 0 < config.temperature < float("inf"), "must be positive, finite")
    check(config, "temperature", 1e-3 <= config.temperature <= 1e3, "must be 0.001 to 1000")


def check_weights(alphas: Mapping[str, float]) -> None:
    """Raise a UserError unless all weights are finite, not negative, and one is positive."""
    for name, weight in alphas.items():
        if not 0 <= weight < float("inf"):
            raise UserError(f"--alpha-{name} {weight} must be 0 or a positive, finite number")
        if weight > 1e9:
            raise UserError(f"--alpha-{name} {weight} must be at most 1e9")
    if not any(alphas.values()):
        raise UserError("all loss weights are 0: give at least one --alpha-... above 0")


def _installed(module: str) -> bool:
    """Whether a module can be imported; a folder of its name, as wandb makes one, is none."""
    found = importlib.util.find_spec(module)
    return bool(found and found.origin)


def compute_dtype(name: str, platform: str) -> str:
    """The dtype of matrix products that --dtype means on "cpu", "gpu" or "tpu"."""
    if name != "auto":
        return name
    fast = platform != "cpu" or {"amx_bf16", "avx512_bf16"} & set(cpu_flags())
    return "bfloat16" if fast else "float32"


def cpu_flags() -> list[str]:
    """What this machine's processor can do, in Linux's words; nothing elsewhere."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("flags"):
                return line.split()
    return []


def flag(name: str) -> str:
    """The command-line spelling of a field: `batch_size` → `--batch-size`."""
    return "--" + name.replace("_", "-")


def check(config: Any, name: str, good: bool, rule: str) -> None:
    """Raise a UserError that names the flag, its value and the rule unless `good`."""
    if not good:
        raise UserError(f"{flag(name)} {getattr(config, name)} {rule}")


def check_output(name: str) -> None:
    """Raise a UserError unless it is a folder of this machine, or one in a bucket."""
    if not name.strip():
        raise UserError("--output is empty: name a folder")
    if not name.isprintable():
        raise UserError(f"--output {name!r} holds characters that cannot be printed")
    scheme, found, rest = name.partition("://")
    if found and (scheme != "gs" or not re.fullmatch(r"[a-z0-9][\w.-]+/.*[^/]/?", rest)):
        raise UserError(f"--output {name} must be a folder of this machine, or look like "
                        "gs://bucket/name")

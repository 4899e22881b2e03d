"""The settings of distilling a sentence encoder, as task_config.py has those of a task.

Every other module receives these dataclasses; nothing here imports jax.
"""

import dataclasses
from collections.abc import Mapping, Sequence

from distilbert_jax.config import (
    BY_CONTENT,
    FREE,
    LoopConfig,
    Word,
    Words,
    check,
    check_choose,
    check_weights,
    option,
)
from distilbert_jax.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class EmbedConfig(LoopConfig):
    """The distillation of a sentence encoder into the space of its own vectors."""

    teacher: Word = option(
        "", "models", "sentence-transformers folder, or hub name where there is a network",
        **BY_CONTENT)
    pooling: str = option(
        "", "models", "for a teacher without modules.json: how the states of a text become one "
        "vector", metavar="mean|cls|max|mean_sqrt_len_tokens")
    normalize: bool = option(
        True, "models", "whether the vectors of such a teacher are scaled to length 1")
    student_layers: str | int | Sequence[int] = option(
        "", "models", "how many layers to keep, or which, counted from 0: 0,3,5; default: half "
        "of the teacher's, or all of --student's", metavar="N|N,N,...")
    choose: str = option(
        "", "models", "how the layers that are kept are chosen: even, or greedy, which removes "
        "one layer after the other, each time the one without which the vectors change least; "
        "default: greedy for layers of the teacher", choices=("even", "greedy"))
    student: Word = option(
        "", "models", "folder of an encoder that the student starts from, in place of layers of "
        "the teacher: of any width, with a tokenizer of its own", **BY_CONTENT)
    corpus: Words = option(
        (), "data", "texts whose sentences are learnt from, named as for distil", nargs="+",
        **BY_CONTENT)
    text_field: str = option(
        "", "data", "field of a record that holds one sentence, which is not divided; default: "
        "the field text, divided into sentences", metavar="NAME")
    sentences: int | None = option(
        None, "data", "sentences to learn from, chosen by their hash; default: all", type=int)
    valid: Words = option(
        (), "data", "held-out texts, named like --corpus; default: a part of the sentences, chosen "
        "by hash", nargs="+", **BY_CONTENT)
    valid_share: float = option(
        0.02, "data", "share of the sentences held out when --valid is not given")
    max_length: int = option(
        128, "data", "tokens of the longest sentence; longer ones are cut, and counted")
    vectors: Word = option(
        "", "data", "folder that keeps the teacher's vectors, for several students; default: "
        "OUTPUT/vectors", **FREE)
    vector_dtype: str = option(
        "float32", "data", "dtype in which --vectors keeps the teacher's vectors",
        choices=("float16", "float32"))
    sts: Words = option(
        (), "data", "files of score, sentence1, sentence2 on which all models are judged",
        nargs="+", **FREE)
    retrieval: Words = option(
        (), "data", "JSON-lines files of title and text: each title is a query for its own text",
        nargs="+", **FREE)
    epochs: float = option(1.0, "training", "passes over the sentences")
    alphas: Mapping[str, float] = option(
        {"vector": 1.0}, "losses", "weight of the", each="alpha",
        needs=("vectors", "similarities", "hidden"))
    seed: int = option(
        LoopConfig.seed, "training", "seed of the order of the sentences, of dropout, and of the "
        "Dense between vectors of different widths")
    similarity_temperature: float = option(
        0.05, "losses", "temperature by which cosines within the batch are divided")
    hidden_map: str = option(
        "", "losses", "for --alpha-hidden and --alpha-inner: which layers are compared, as "
        "student:teacher, counted from 1: 1:2,3:6; default: every layer of the student, with "
        "layers of the teacher at even distances", metavar="S:T,...")
    batch_size: int = option(64, "training", "sentences in an update, over all devices")
    learning_rate: float | None = option(
        None, "training", "peak of the learning rate; default: 5e-4 at 768 units, inversely as the "
        "width of the student", type=float)
    warmup: float = option(
        0.1, "training", "share of the updates over which the rate rises, before it falls to 0")
    weight_decay: float = option(0.01, "training", "decoupled weight decay, of the matrices only")
    clip: float = option(
        1.0, "training", "largest global norm of the gradient; a larger one is scaled down to it")
    dropout: float = option(
        0.0, "training", "dropout rate in the student, for all kinds of dropout")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.teacher:
            raise UserError("--teacher is missing: give a sentence-transformers folder")
        if not self.corpus:
            raise UserError("--corpus is missing: give texts whose sentences are learnt from")
        check(self, "epochs", 0 < self.epochs < float("inf"), "must be positive, finite")
        check(self, "sentences", self.sentences is None or self.sentences >= 1,
              "must be at least 1")
        check(self, "max_length", self.max_length >= 8, "must be at least 8")
        check(self, "valid_share", 0 < self.valid_share < 1, "must lie between 0 and 1")
        check(self, "similarity_temperature", 0 < self.similarity_temperature < float("inf"),
              "must be positive, finite")
        check_weights(self.alphas)
        check_choose(self)
        if self.choose == "greedy" and self.student:
            raise UserError("--choose greedy keeps layers of the teacher, and the student starts "
                            "at --student: leave out one of them")

    @property
    def greedy(self) -> bool:
        """Whether the student's layers are chosen by the teacher's vectors."""
        return not self.student and "," not in self.student_layers and self.choose != "even"

"""Settings of the benchmark → what every side is given: shapes, batches, and their operations."""

import dataclasses
import itertools

import numpy as np

from distilbert_jax.benchmark.settings import TrainBenchmark
from distilbert_jax.config import DistilConfig
from distilbert_jax.data import batches, pack, sources, tokenize
from distilbert_jax.errors import UserError
from distilbert_jax.models import bert
from distilbert_jax.models.encoder import EncoderConfig
from distilbert_jax.models.student import student_config

SHAPES = {  # of the teacher; the student has half its layers
    "small": EncoderConfig(
        vocab_size=30522, hidden_size=256, num_hidden_layers=4, num_attention_heads=4,
        intermediate_size=1024, max_position_embeddings=512, type_vocab_size=2),
    "bert-base": bert.BASE}
LENGTHS = 8  # batches of PyTorch's round over documents, from the shortest to the longest
BIN = 4  # tokens; the original puts documents into one batch whose lengths fall into one bin
DOCUMENTS = 50_000  # read of a corpus, at most

Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Problem:
    """What each side is given, in a form that another process can be sent."""

    teacher: EncoderConfig
    student: EncoderConfig
    config: DistilConfig
    counts: np.ndarray  # [V] of the tokens
    special_ids: list[int]
    mask_id: int
    ours: list[Batch]  # packed rows, not masked
    theirs: list[Batch]  # one document a row; masked before they are given to PyTorch
    devices: int = 0  # of ours, on CPU; 0: as many as the trainer takes


def width(batch: Batch) -> int:
    """Tokens of the longest row of PyTorch's; ours are full, but for a few."""
    return int((batch["segment_ids"] > 0).sum(1).max())


def flops(problem: Problem, given: list[Batch]) -> float:
    """Operations of the models themselves on the real tokens of some batches.

    A product of [m, k] and [k, n] has 2 m k n. The teacher goes forward once, the student forward
    and backward, which is three times as much; attention counts within documents. Embeddings,
    softmaxes and the optimizer do not count, nor does what was computed before: the layers of a
    teacher whose states are kept.
    """
    sizes = np.concatenate([
        np.bincount(batch["segment_ids"][row], minlength=2)[1:]
        for batch in given for row in range(len(batch["segment_ids"]))]).astype(float)

    def forward(shape: EncoderConfig, layers: int) -> float:
        width, words = shape.hidden_size, shape.vocab_size
        layer = (8 * width**2 + 4 * width * shape.intermediate_size) * sizes.sum() + (
            4 * width * (sizes**2).sum())
        head = (2 * width**2 + 2 * width * words) * sizes.sum()
        return layers * layer + head

    live = 0 if problem.config.kept_maskings else problem.teacher.num_hidden_layers
    return forward(problem.teacher, live) + 3 * forward(
        problem.student, problem.student.num_hidden_layers)


def problem_of(config: TrainBenchmark) -> Problem:
    """The models of `config.shape` on full rows or, with a corpus, on its documents.

    Raises:
        UserError: the corpus or the tokenizer cannot be used, or it is too small.
    """
    teacher = SHAPES[config.shape]
    train = DistilConfig(batch_size=config.batch_size, sequence_length=config.sequence_length,
                        dtype=config.dtype, steps=1000, warmup=0.0)
    if config.corpus:
        tokenizer = tokenize.load_tokenizer(config.tokenizer, None)
        teacher = dataclasses.replace(teacher, vocab_size=len(tokenizer))
        ours, theirs, counts = documents(config, tokenize.spec(tokenizer))
        special, mask = tokenizer.all_special_ids, tokenizer.mask_token_id
    else:
        ours = theirs = full_rows(config, teacher.vocab_size)
        counts, special, mask = np.ones(teacher.vocab_size, np.int64), [0, 1, 2, 3, 4], 4
    _, student = student_config(
        bert.FAMILY, teacher, teacher.num_hidden_layers // 2, train.dropout)
    return Problem(teacher, student, train, counts, special, mask, ours, theirs)


def full_rows(config: TrainBenchmark, words: int) -> list[Batch]:
    """Rows of one document each, of random words."""
    random, shape = np.random.default_rng(0), (config.batch_size, config.sequence_length)
    return [rows_of(random.integers(5, words, shape), np.full(*shape))
            for _ in range(config.updates)]


def rows_of(ids: np.ndarray, lengths: np.ndarray) -> Batch:
    """A document of some length in each row."""
    column = np.broadcast_to(np.arange(ids.shape[1], dtype=np.int32), ids.shape)
    real = (column < lengths[:, None]).astype(np.int32)
    numbers = np.arange(len(ids), dtype=np.int32)
    return {"input_ids": ids.astype(np.int32) * real, "segment_ids": real,
            "position_ids": column * real, "row": numbers, "epoch": numbers * 0}


def documents(
    config: TrainBenchmark, spec: tokenize.Spec
) -> tuple[list[Batch], list[Batch], np.ndarray]:
    """Batches of the corpus for both sides, with the same tokens an update, and word counts.

    Ours are rows packed by the trainer's preparation. PyTorch's are batches as the original
    groups them: documents of about the same length, each batch padded to its longest. The batches
    chosen lie evenly from the shortest documents to the longest.
    """
    texts = list(itertools.islice(sources.Documents(config.corpus), DOCUMENTS))
    length, rows = config.sequence_length, config.batch_size
    ids, sizes = tokenize.cut(*tokenize.TextEncoder(spec)(texts), length, spec)
    counts = np.bincount(ids, minlength=spec.size)
    shard = pack.pack(ids, sizes, length, spec.pad_id)
    packed = pack.PackedRows(shard["row"], shard["segments"], counts, {})
    random = np.random.default_rng(0)
    each = max(1, round(rows * len(sizes) / len(packed)))  # documents of an update
    if len(packed) < rows * config.updates or len(sizes) < each * LENGTHS:
        raise UserError(f"--corpus gives {len(packed)} rows, and {rows * config.updates} are "
                        "needed: give more, or lower --batch-size")
    ours = [batches.read(packed, chosen) for chosen in random.choice(
        len(packed), (config.updates, rows), replace=False)]

    order = random.permutation(len(sizes))
    order = order[np.argsort(sizes[order] // BIN, kind="stable")]
    grouped = order[:len(order) // each * each].reshape(-1, each)
    places = (np.arange(LENGTHS) + 0.5) * len(grouped) / LENGTHS
    begins, column, theirs = sizes.cumsum() - sizes, np.arange(length), []
    for group in grouped[places.astype(int)]:
        at = np.minimum(begins[group][:, None] + column, len(ids) - 1)
        theirs.append(rows_of(ids[at], sizes[group]))
    return ours, theirs, counts

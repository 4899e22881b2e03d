"""The benchmarks of `distilbert-jax benchmark`: each function is one, named in BENCHMARKS."""

import dataclasses
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from distilbert_jax.benchmark import preparation, problem, training_report
from distilbert_jax.benchmark.head import table
from distilbert_jax.benchmark.settings import (
    HeadBenchmark,
    SentenceBenchmark,
    ServingBenchmark,
    TaskBenchmark,
    TrainBenchmark,
)
from distilbert_jax.cli import Command, about, listing, parse
from distilbert_jax.config import PrepareConfig
from distilbert_jax.errors import UserError, choose
from distilbert_jax.evaluation.report import versions
from distilbert_jax.jobs.time_sentences import time_sentences
from distilbert_jax.jobs.time_serving import time_serving
from distilbert_jax.jobs.time_task import time_task


def train(argv: Sequence[str]) -> None:
    """Our update beside PyTorch's, in real tokens per second.

    Examples:
        distilbert-jax benchmark train
        distilbert-jax benchmark train --sides ours --batch-size 8 --rounds 3
        distilbert-jax benchmark train --tokenizer DIR --corpus text.jsonl --dtype bfloat16
    """
    config = parse(TrainBenchmark, *_about(train), argv)
    if len(config.sides) > 1 and not find_spec("torch"):
        raise UserError("PyTorch is not installed, which ours is compared with: pip install torch, "
                        "or --sides ours")
    try:
        Path(config.output).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {config.output} cannot be used: {error.strerror}") from error
    print((training_report.sweep if config.sweep else training_report.run)(config))
    print(f"{versions()}\nfigures and plot: {config.output}")


def finetune(argv: Sequence[str]) -> None:
    """Our training for a task beside the Hugging Face Trainer's, in examples per second.

    Examples:
        distilbert-jax benchmark finetune --model DIR --train a.csv
        distilbert-jax benchmark finetune --model DIR --task mrpc --data MRPC --sides ours trainer
    """
    print(time_task(parse(TaskBenchmark, *_about(finetune), argv)))
    print(versions())


def embed(argv: Sequence[str]) -> None:
    """Our training of a sentence encoder beside that of sentence-transformers.

    Both start as layers of the teacher and learn its vectors by squared error, from the same
    sentences and for the same minutes.

    Examples:
        distilbert-jax benchmark embed --teacher DIR --corpus text.jsonl --sts pairs.tsv
    """
    print(time_sentences(parse(SentenceBenchmark, *_about(embed), argv)))
    print(versions())


def latency(argv: Sequence[str]) -> None:
    """Milliseconds of a request to a model in each runtime that serves it, and to its teacher.

    Examples:
        distilbert-jax benchmark latency --model DIR --teacher DIR
        distilbert-jax benchmark latency --model DIR DIR --runtimes onnx int8 --threads 1
    """
    print(time_serving(parse(ServingBenchmark, *_about(latency), argv)))


def head(argv: Sequence[str]) -> None:
    """Memory and time of the fused vocabulary head beside the dense one.

    Examples:
        distilbert-jax benchmark head
        distilbert-jax benchmark head --shape bert-base --rounds 3
    """
    config = parse(HeadBenchmark, *_about(head), argv)
    width = problem.SHAPES[config.shape].hidden_size
    print(table(config.batch_size, config.sequence_length, width, config.rounds))
    print(versions())


def prepare(argv: Sequence[str]) -> None:
    """How fast a corpus is prepared, and how much memory ten times as large a corpus takes.

    Examples:
        distilbert-jax benchmark prepare --tokenizer DIR --corpus text.jsonl --workers 2
    """
    config = parse(PrepareConfig, *_about(prepare), argv)
    if not (config.tokenizer and config.corpus):
        raise UserError("--tokenizer or --corpus is missing (see --help)")
    workers = config.workers or 1
    print(preparation.describe(preparation.measure(dataclasses.replace(config, workers=workers))))


BENCHMARKS: dict[str, Command] = {
    job.__name__: job for job in (train, finetune, embed, latency, head, prepare)}


def run(argv: Sequence[str]) -> None:
    """Run the benchmark that the first word names; without one, list all of them."""
    if argv[:1] in ([], ["--help"], ["-h"]):
        print(listing("distilbert-jax benchmark", "Measure, side by side in one run.", BENCHMARKS))
        return
    BENCHMARKS[choose(argv[0], BENCHMARKS, "benchmark")](argv[1:])


def _about(job: Command) -> tuple[str, str]:
    return about("distilbert-jax benchmark", job, BENCHMARKS)

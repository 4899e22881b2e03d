"""Measure, side by side in one run:

    python experiments/benchmark.py train     our update beside PyTorch's
    python experiments/benchmark.py finetune  our training for a task beside the Trainer's
    python experiments/benchmark.py embed     our training of a sentence encoder beside
                                              sentence-transformers', and what comes of both
    python experiments/benchmark.py latency   a model in each runtime that serves it
    python experiments/benchmark.py head      the fused vocabulary head beside the dense one
    python experiments/benchmark.py prepare   the preparation of a corpus, and of ten times as much

Each with --help.
"""

import dataclasses
from importlib.util import find_spec
from pathlib import Path

from launch import launch

from distilbert_jax.benchmark import head, preparation, problem, training_report
from distilbert_jax.benchmark.settings import (
    HeadBenchmark,
    SentenceBenchmark,
    ServingBenchmark,
    TaskBenchmark,
    TrainBenchmark,
)
from distilbert_jax.cli import parse
from distilbert_jax.config import PrepareConfig
from distilbert_jax.errors import UserError, choose
from distilbert_jax.evaluation.report import versions
from distilbert_jax.jobs.time_sentences import time_sentences
from distilbert_jax.jobs.time_serving import time_serving
from distilbert_jax.jobs.time_task import time_task


def train(argv: list[str]) -> None:
    """Our update beside PyTorch's, in real tokens per second."""
    config = parse(TrainBenchmark, train.__doc__, argv, {})
    if len(config.sides) > 1 and not find_spec("torch"):
        raise UserError("PyTorch is not installed, which ours is compared with: pip install torch, "
                        "or --sides ours")
    try:
        Path(config.output).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {config.output} cannot be used: {error.strerror}") from error
    print((training_report.sweep if config.sweep else training_report.run)(config))
    print(f"{versions()}\nfigures and plot: {config.output}")


def finetune(argv: list[str]) -> None:
    """Our training for a task beside the Hugging Face Trainer's, in examples per second."""
    print(time_task(parse(TaskBenchmark, finetune.__doc__, argv, {})))
    print(versions())


def embed(argv: list[str]) -> None:
    """Our training of a sentence encoder beside that of sentence-transformers: layers of the
    teacher, the squared error to its vectors, the same sentences, for the same minutes."""
    print(time_sentences(parse(SentenceBenchmark, embed.__doc__, argv, {})))
    print(versions())


def latency(argv: list[str]) -> None:
    """Milliseconds of a request to a model in each runtime that serves it, and to its teacher."""
    print(time_serving(parse(ServingBenchmark, latency.__doc__, argv, {})))


def fused_head(argv: list[str]) -> None:
    """Memory and time of the fused vocabulary head beside the dense one."""
    config = parse(HeadBenchmark, fused_head.__doc__, argv, {})
    width = problem.SHAPES[config.shape].hidden_size
    print(head.table(config.batch_size, config.sequence_length, width, config.rounds))
    print(versions())


def prepare(argv: list[str]) -> None:
    """How fast a corpus is prepared, and how much memory ten times as large a corpus takes."""
    config = parse(PrepareConfig, prepare.__doc__, argv, {})
    if not (config.tokenizer and config.corpus):
        raise UserError("--tokenizer or --corpus is missing (see --help)")
    workers = config.workers or 1
    print(preparation.describe(preparation.measure(dataclasses.replace(config, workers=workers))))


JOBS = {"train": train, "finetune": finetune, "embed": embed, "latency": latency,
        "head": fused_head, "prepare": prepare}


def main(argv: list[str]) -> None:
    if argv[:1] in ([], ["--help"], ["-h"]):
        print(__doc__)
        return
    JOBS[choose(argv[0], JOBS, "benchmark")](argv[1:])


if __name__ == "__main__":
    launch(main)

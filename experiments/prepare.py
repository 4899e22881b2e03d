"""Prepare a corpus once, for any number of runs: tokens, packed rows, shards with checksums.

    python experiments/prepare.py --tokenizer teacher --corpus texts/*.jsonl.gz --output prepared
    python experiments/run.py --teacher teacher --corpus prepared

Stopped, the same command goes on. Several machines that share a disk add --shard 0/4, 1/4, ...
"""

from launch import launch

from distilbert_jax.cli import parse
from distilbert_jax.config import PrepareConfig
from distilbert_jax.data.prepare import prepare
from distilbert_jax.data.tokenize import load_tokenizer
from distilbert_jax.errors import UserError
from distilbert_jax.evaluation import report


def main(argv: list[str]) -> None:
    config = parse(PrepareConfig, __doc__, argv, {})
    for name in ("tokenizer", "corpus"):
        if not getattr(config, name):
            raise UserError(f"--{name} is missing (see --help)")
    tokenizer = load_tokenizer(config.tokenizer, None)
    with report.counting("prepare") as progress:
        prepared = prepare(config, tokenizer, config.output, progress, config.part)
    if prepared is None:
        print(f"part {config.shard} is done; the last of the others completes {config.output}")
    else:
        print(f"{report.describe_data(prepared.manifest)}\nprepared: {config.output}")


if __name__ == "__main__":
    launch(main)

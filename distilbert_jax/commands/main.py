"""`distilbert-jax NAME FLAG VALUE ...`: each function here is a command, named in COMMANDS.

The first line of its docstring stands in the list of commands, all of it in its --help. Imports
are inside, so that the list and the version are there at once, without JAX.
"""

import sys
from collections.abc import Sequence

from distilbert_jax import __version__
from distilbert_jax.cli import Command, about, listing, parse, read
from distilbert_jax.errors import UserError, choose

TEXT = """Distil encoders in JAX: a teacher goes in, a student with fewer layers comes out.

`distilbert-jax distil` alone runs a small example from nothing, in minutes."""


def distil(argv: Sequence[str]) -> None:
    """Distil a masked language model into one with fewer layers.

    Without teacher, corpus and recipe the quickstart runs: it trains a small teacher on the
    documentation of Python itself, distils it, and reports, in minutes and without a network.

    Examples:
        distilbert-jax distil
        distilbert-jax distil --teacher DIR --corpus text.jsonl --student-layers 6 --output small
        distilbert-jax distil --recipe rxn_bert --teacher DIR --corpus reactions.txt.gz --mesh 8x1
    """
    from distilbert_jax.commands import distil as command
    from distilbert_jax.config import DistilConfig
    from distilbert_jax.recipes import recipes

    config = command.settings(read(DistilConfig, *_about(distil), argv, recipes()))
    if config.compile_only:
        print(command.forecast(config))
    else:
        command.run(config)


def finetune(argv: Sequence[str]) -> None:
    """Train a model for a task: fine-tune it, distil it, or both.

    Examples:
        distilbert-jax finetune --model DIR --train a.csv --dev b.csv
        distilbert-jax finetune --model DIR --train a.csv --dev b.csv --distil --student-layers 3
        distilbert-jax finetune --teacher DIR --task mrpc --data MRPC --seeds 5 --output mrpc
    """
    from distilbert_jax.jobs.finetune import finetune as job
    from distilbert_jax.task_config import FinetuneConfig

    job(parse(FinetuneConfig, *_about(finetune), argv))


def embed(argv: Sequence[str]) -> None:
    """Distil a sentence encoder into a smaller one in the space of its own vectors.

    Examples:
        distilbert-jax embed --teacher DIR --corpus text.jsonl --student-layers 3
        distilbert-jax embed --teacher DIR --pooling mean --corpus text.jsonl --sts pairs.tsv
        distilbert-jax embed --teacher DIR --student OTHER --corpus text.jsonl --ship
    """
    from distilbert_jax.embed_config import EmbedConfig
    from distilbert_jax.jobs.embed import embed as job

    job(parse(EmbedConfig, *_about(embed), argv))


def ship(argv: Sequence[str]) -> None:
    """Write a model as ONNX, StableHLO or LiteRT, and check each file before it is kept.

    Examples:
        distilbert-jax ship --model DIR
        distilbert-jax ship --model DIR --formats onnx int8 --evaluate dev.tsv --output shipped
        distilbert-jax ship --model DIR --demo --teacher DIR --output shipped
    """
    from distilbert_jax.jobs.ship import ship as job
    from distilbert_jax.ship_config import ShipConfig

    job(parse(ShipConfig, *_about(ship), argv))


def evaluate(argv: Sequence[str]) -> None:
    """Judge a model of any of these kinds, trained here or elsewhere.

    Examples:
        distilbert-jax evaluate --model DIR --dev labelled.csv --output judged
        distilbert-jax evaluate --model DIR --teacher DIR --corpus text.jsonl
        distilbert-jax evaluate --model DIR --task sts --dev pairs.tsv
    """
    from distilbert_jax.jobs.evaluate import evaluate as job
    from distilbert_jax.task_config import EvaluateConfig

    job(parse(EvaluateConfig, *_about(evaluate), argv))


def prepare(argv: Sequence[str]) -> None:
    """Tokenise and pack a corpus once, for any number of distillations.

    Stopped, the same command goes on. Several machines that share a disk add --shard 0/4, 1/4, ...

    Examples:
        distilbert-jax prepare --tokenizer TEACHER --corpus texts/*.jsonl.gz --output prepared
        distilbert-jax prepare --tokenizer TEACHER --corpus hf:NAME --workers 8 --shard 0/4
        distilbert-jax distil --teacher TEACHER --corpus prepared
    """
    from distilbert_jax.config import PrepareConfig
    from distilbert_jax.data.prepare import prepare as job
    from distilbert_jax.data.tokenize import load_tokenizer
    from distilbert_jax.evaluation import report

    config = parse(PrepareConfig, *_about(prepare), argv)
    for name in ("tokenizer", "corpus"):
        if not getattr(config, name):
            raise UserError(f"--{name} is missing (see --help)")
    tokenizer = load_tokenizer(config.tokenizer, None)
    with report.counting("prepare") as progress:
        prepared = job(config, tokenizer, config.output, progress, config.part)
    if prepared is None:
        print(f"part {config.shard} is done; the last of the others completes {config.output}")
    else:
        print(f"{report.describe_data(prepared.manifest)}\nprepared: {config.output}")


def pretrain(argv: Sequence[str]) -> None:
    """Train a BERT with the masked-language-model loss, from nothing or from a model.

    Examples:
        distilbert-jax pretrain --corpus texts/*.txt --output teacher
        distilbert-jax pretrain --model DIR --corpus texts/*.txt --output adapted
        distilbert-jax pretrain --corpus hf:NAME --hidden-size 512 --num-hidden-layers 6
    """
    from distilbert_jax.config import PretrainConfig
    from distilbert_jax.jobs.pretrain import pretrain as job

    job(parse(PretrainConfig, *_about(pretrain), argv))


def ablate(argv: Sequence[str]) -> None:
    """Distil several times, each time with something else changed, and compare.

    A recipe names the rows; all else is a setting of distil.

    Examples:
        distilbert-jax ablate --recipe table_4 --teacher DIR --corpus text.jsonl --seeds 5
        distilbert-jax ablate --recipe three_layers --teacher DIR --corpus text.jsonl
        distilbert-jax ablate --recipe table_4 --teacher DIR --corpus text.jsonl --steps 500
    """
    from distilbert_jax.config import AblationConfig
    from distilbert_jax.jobs.ablate import ablate as job
    from distilbert_jax.recipes import recipes

    known = {name: recipe for name, recipe in recipes().items() if hasattr(recipe, "ABLATION")}
    config = parse(AblationConfig, *_about(ablate), argv,
                   {name: recipe.DISTIL for name, recipe in known.items()})
    if not config.recipe:
        raise UserError(f"--recipe is missing: one of {', '.join(sorted(known))} has the rows")
    job(config, known[config.recipe].ABLATION)


def compare(argv: Sequence[str]) -> None:
    """Put finished runs into one table and one plot.

    Examples:
        distilbert-jax compare small smaller
        distilbert-jax compare output/* --output compared
        distilbert-jax compare students.json --output plots
    """
    from distilbert_jax.config import CompareConfig
    from distilbert_jax.jobs.compare import compare as job

    config = parse(CompareConfig, *_about(compare), argv)
    print(job(config.runs, config.output))


def benchmark(argv: Sequence[str]) -> None:
    """Measure speed beside PyTorch, the Hugging Face Trainer and other runtimes.

    Examples:
        distilbert-jax benchmark train
        distilbert-jax benchmark latency --model DIR --teacher DIR
        distilbert-jax benchmark train --sides ours --dtype bfloat16
    """
    from distilbert_jax.commands import benchmark as command

    command.run(argv)


COMMANDS: dict[str, Command] = {
    command.__name__: command for command in (
        distil, finetune, embed, ship, evaluate, prepare, pretrain, ablate, compare,
        benchmark)}


def main() -> None:
    """Be the program `distilbert-jax`."""
    name, *words = sys.argv[1:] or ["--help"]
    if name in ("--help", "-h"):
        print(listing("distilbert-jax", TEXT, COMMANDS))
    elif name == "--version":
        print(f"distilbert_jax {__version__}")
    else:
        run(name, words)


def run(name: str, argv: Sequence[str] | None = None) -> None:
    """Run a command as a program does: a mistake ends it in one line and exit code 2.

    Args:
        name: of the command.
        argv: its words; by default those of this process.
    """
    try:
        command = COMMANDS[choose(name, COMMANDS, "command")]
    except UserError as error:
        print("error:", error, file=sys.stderr)
        sys.exit(2)
    from distilbert_jax.commands.launch import launch

    launch(command, sys.argv[1:] if argv is None else argv)


def _about(command: Command) -> tuple[str, str]:
    return about("distilbert-jax", command, COMMANDS)

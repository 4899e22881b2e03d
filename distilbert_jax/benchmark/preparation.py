"""Speed and memory of the preparation, on a corpus and on one ten times as large."""

import dataclasses
import pathlib
import pickle
import resource
import subprocess
import sys
import tempfile
import time

from distilbert_jax.config import PrepareConfig
from distilbert_jax.data import blocks, prepare, sources, tokenize

CHARACTERS = 3 * blocks.BLOCK_CHARACTERS  # of the smaller corpus
TIMES = 10


@dataclasses.dataclass(frozen=True)
class Figures:
    """What one preparation took, in a process of its own."""

    tokens: int
    seconds: float
    core_seconds: float  # of this process and its workers
    memory: float  # largest resident memory of this process and its workers together [MB]


def measure(config: PrepareConfig) -> list[Figures]:
    """Prepare `config.corpus`, cut or repeated to CHARACTERS, and TIMES as much of it."""
    measured = []
    with tempfile.TemporaryDirectory() as folder:
        corpus = pathlib.Path(folder, "corpus.txt")
        for times in (1, TIMES):
            _write_corpus(corpus, config.corpus, times * CHARACTERS)
            sized = dataclasses.replace(config, corpus=(str(corpus),), output=f"{folder}/{times}")
            done = subprocess.run(
                [sys.executable, "-c", "from distilbert_jax.benchmark import preparation\n"
                 "preparation.serve()"], input=pickle.dumps(sized), capture_output=True,
                check=True)
            measured.append(pickle.loads(done.stdout))
    return measured


def _write_corpus(path: pathlib.Path, names: tuple[str, ...], characters: int) -> None:
    with path.open("w", encoding="utf-8") as file:
        while characters > 0:
            for document in sources.Documents(names):
                characters -= file.write(" ".join(document.splitlines()) + "\n")
                if characters <= 0:
                    break


def serve() -> None:
    """Prepare the pickled settings on the standard input; pickled figures go to the output."""
    config: PrepareConfig = pickle.load(sys.stdin.buffer)
    tokenizer = tokenize.load_tokenizer(config.tokenizer, None)
    who = resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN
    before, began = [resource.getrusage(w) for w in who], time.monotonic()
    prepared = prepare.prepare(config, tokenizer, config.output)
    seconds, after = time.monotonic() - began, [resource.getrusage(w) for w in who]
    own, worker = (usage.ru_maxrss / 1000 for usage in after)  # kilobytes
    figures = Figures(
        tokens=sum(int(part.counts.sum()) for part in (prepared.train, prepared.valid)),
        seconds=seconds,
        core_seconds=sum(b.ru_utime + b.ru_stime - a.ru_utime - a.ru_stime
                         for a, b in zip(before, after, strict=True)),
        memory=own + (config.workers * worker if config.workers > 1 else 0))
    sys.stdout.buffer.write(pickle.dumps(figures))


def describe(measured: list[Figures]) -> str:
    """A line for each corpus, and one for how memory grew."""
    lines = [f"{m.tokens:,} tokens: {m.seconds:.1f} s; {m.tokens / m.seconds / 1e6:.2f} M tokens a "
             f"second, {m.tokens / m.core_seconds / 1e6:.2f} M of each core; {m.memory:,.0f} MB"
             for m in measured]
    growth = measured[-1].memory / measured[0].memory - 1
    return "\n".join([*lines, f"memory of {TIMES} times the corpus: {growth:+.1%}"])

"""Time models in each runtime that serves them, beside their teacher in PyTorch."""

import datetime
import os
from collections.abc import Sequence

import numpy as np

from distilbert_jax.benchmark import serving, serving_table
from distilbert_jax.benchmark.serving import Batch, Contender, Requests
from distilbert_jax.benchmark.settings import ServingBenchmark
from distilbert_jax.data import labelled, sources
from distilbert_jax.data.examples import encode
from distilbert_jax.data.labelled import Columns, Labelled
from distilbert_jax.data.tokenize import load_tokenizer
from distilbert_jax.errors import UserError
from distilbert_jax.export.exportable import Exportable
from distilbert_jax.machine.progress import say
from distilbert_jax.models import hub

SHAPES = ((1, 32), (1, 128), (8, 32), (8, 128))  # rows, tokens
TEXTS = "texts"


def time_serving(config: ServingBenchmark) -> str:
    """Measure, and give the tables with their caption.

    Raises:
        UserError: anything in the settings or files that the user can mend.
    """
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_setaffinity") else 0
    if max(config.threads) > cpus:
        raise UserError(f"--threads {max(config.threads)}: each side is pinned to as many CPUs, "
                        f"and this process may use {cpus} (0: the system cannot pin)")
    contenders, requests = _sides(config)
    before = os.getloadavg()[0]
    names, pages, count = [f"{b}×{t}" for b, t in SHAPES], [], 0
    for threads in config.threads:
        say(f"latency: {len(contenders)} sides with {threads} thread(s), {config.rounds} rounds")
        found = serving.measure(contenders, requests, threads, config.rounds)
        said = f"{threads} thread" + "s" * (threads > 1)
        pages.append(f"{said}, {config.rounds} rounds:\n\n"
                     f"{serving_table.of_requests(contenders, found, names)}")
        if config.evaluate:
            count = sum(map(len, requests[0][TEXTS]))
            pages.append(f"{said}, {count:,} rows of {' '.join(map(str, config.evaluate))}, one by "
                         f"one:\n\n{serving_table.of_texts(contenders, found, TEXTS, count)}")
    pages.append(f"{serving_table.caption((before, os.getloadavg()[0]))} {datetime.date.today()}.")
    return "\n\n".join(pages)


def _sides(config: ServingBenchmark) -> tuple[list[Contender], list[Requests]]:
    """All that can be timed, the teacher first, and the requests to each."""
    names = [*([config.teacher] if config.teacher else []), *config.model]
    contenders, requests, outputs = [], [], {}
    for name in names:
        found = hub.load_any(name)
        output = outputs.setdefault(name, Exportable.of(found).output)
        role = "teacher" if name == config.teacher else "student"
        own = _requests(config, found, output)
        for runtime in ("torch",) if role == "teacher" else config.runtimes:
            contender = Contender(found.folder, runtime, output, role)
            if lack := contender.lacks():
                say(f"left out: {name} in {contender.text}: {lack}")
                continue
            contenders.append(contender)
            requests.append(own)
    if len(set(outputs.values())) > 1:
        raise UserError("these models do not answer the same: " + ", ".join(
            f"{name}: {output}" for name, output in outputs.items()) + "; compare like with like")
    if not contenders:
        raise UserError("nothing is left that could be timed")
    return contenders, requests


def _requests(config: ServingBenchmark, found: hub.Pretrained, output: str) -> Requests:
    """Batches of random ids for each shape, the same in each round, and the user's texts."""
    random = np.random.default_rng(0)
    requests: Requests = {}
    for rows, tokens in SHAPES:
        length = min(tokens, found.config.positions)
        ids = random.integers(0, found.config.vocab_size, (rows, length))
        requests[f"{rows}×{tokens}"] = [[_batch(ids)]] * config.rounds
    if config.evaluate:
        batches = _texts(config, found, output)
        requests[TEXTS] = [batches[i::config.rounds] for i in range(config.rounds)]
    return requests


def _texts(config: ServingBenchmark, found: hub.Pretrained, output: str) -> list[Batch]:
    """The user's texts, a row each; of a sentence encoder, both texts of a pair."""
    tokenizer = load_tokenizer(str(found.folder), found.config.vocab_size)
    names = [str(name) for name in config.evaluate]
    if all(labelled.ending(name) in labelled.FORMATS for name in names):
        texts: Sequence[tuple[str, ...]] = labelled.read(
            names, Columns(tuple(config.text)), "dev", None).texts
    else:
        texts = [(text,) for text in sources.Documents(names)]
    if output == "states":
        texts = [(text,) for row in texts for text in row]
    if len(texts) < config.rounds:
        raise UserError(f"--evaluate {' '.join(names)} holds {len(texts)} texts, fewer than "
                        f"--rounds {config.rounds}")
    read = Labelled(list(texts), [None] * len(texts), [""] * len(texts))
    examples = encode(read, None, tokenizer, found.config.positions)
    return [_batch(ids[None], types[None]) for ids, types in zip(
        examples.ids, examples.types, strict=True)]


def _batch(ids: np.ndarray, types: np.ndarray | None = None) -> Batch:
    ids = ids.astype(np.int64)
    return ids, np.ones_like(ids), np.zeros_like(ids) if types is None else types.astype(np.int64)



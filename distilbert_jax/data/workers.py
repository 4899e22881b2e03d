"""Blocks → their shards on disk, written by as many processes as there are cores."""

import concurrent.futures
import contextlib
import itertools
import os
import pathlib
import pickle
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO

from distilbert_jax.data.blocks import Block, Job, Shards
from distilbert_jax.errors import UserError


def write_blocks(job: Job, blocks: Iterable[Block], workers: int) -> Iterator[dict[str, Any]]:
    """Write all blocks, a single one in this process, several by worker processes.

    At most twice as many blocks as workers are held in memory.

    Args:
        job: tokenizer, row length and folder.
        blocks: taken one by one, as workers become free.
        workers: how many processes; with 1 everything is written in this one; 0, one per core.

    Yields:
        The figures of each block, in the order in which blocks are finished.

    Raises:
        UserError: a worker ended.
        OSError: a file cannot be written.
    """
    workers = workers or _cores()
    blocks = iter(blocks)
    first = list(itertools.islice(blocks, 2))
    if len(first) < 2 or workers == 1:
        shards = Shards(job)
        yield from map(shards.write, itertools.chain(first, blocks))
        return
    with Workers(job) as pool, concurrent.futures.ThreadPoolExecutor(workers) as threads:
        try:
            waiting: set[concurrent.futures.Future[dict[str, Any]]] = set()
            for block in itertools.chain(first, blocks):
                waiting.add(threads.submit(pool.write, block))
                if len(waiting) == 2 * workers:
                    done, waiting = concurrent.futures.wait(
                        waiting, return_when=concurrent.futures.FIRST_COMPLETED)
                    yield from (future.result() for future in done)
            yield from (future.result() for future in concurrent.futures.as_completed(waiting))
        except BaseException:
            threads.shutdown(wait=False, cancel_futures=True)
            pool.kill()
            raise


def _cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Workers:
    """One process for each thread that writes a block, started when the thread first does.

    `multiprocessing` would import the program that was started, JAX included, again in each.
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        self._own = threading.local()
        self._processes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
            process.stdout.close()
            process.wait()

    def kill(self) -> None:
        """End all processes at once."""
        for process in self._processes:
            process.kill()

    def write(self, block: Block) -> dict[str, Any]:
        """Have a block written by the process of this thread, and return its figures."""
        try:
            if not hasattr(self._own, "process"):
                self._own.process = self._start()
            _send(self._own.process.stdin, block)
            answer = pickle.load(self._own.process.stdout)
        except (EOFError, BrokenPipeError, pickle.UnpicklingError) as error:
            raise UserError(
                f"a process that prepares data ended (code {self._own.process.wait()}): out of "
                "memory? give fewer --workers; the same command goes on") from error
        if isinstance(answer, Exception):
            raise answer
        return answer

    def _start(self) -> "subprocess.Popen[bytes]":
        package = str(pathlib.Path(__file__).parents[2])
        path = os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])])
        alone = {"TOKENIZERS_PARALLELISM": "false", "OPENBLAS_NUM_THREADS": "1"}
        process = subprocess.Popen(
            [sys.executable, "-P", "-c", "from distilbert_jax.data import workers\n"
             "workers.serve()"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            env=os.environ | alone | {"PYTHONPATH": path}, start_new_session=True)
        self._processes.append(process)
        _send(process.stdin, self._job)
        return process


def serve() -> None:
    """Be a worker: read a job, then blocks, from standard input, and answer with figures."""
    answers, sys.stdout = sys.stdout.buffer, sys.stderr
    shards = Shards(pickle.load(sys.stdin.buffer))
    with contextlib.suppress(EOFError, BrokenPipeError):
        while True:
            block = pickle.load(sys.stdin.buffer)
            try:
                answer: dict[str, Any] | OSError = shards.write(block)
            except OSError as error:
                answer = error
            _send(answers, answer)


def _send(stream: BinaryIO, value: object) -> None:
    pickle.dump(value, stream, pickle.HIGHEST_PROTOCOL)
    stream.flush()

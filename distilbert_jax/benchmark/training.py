"""Our update beside one in PyTorch: the same documents, losses and shapes, in turn, in one run.

Each side lives in a process of its own, so that its peak of memory is its own, and works only
while the others wait. Ours is the trainer's step on all its devices; PyTorch's is torch_loop.py.
"""

import dataclasses
import multiprocessing
import os
import resource
import signal
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from multiprocessing.connection import Connection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from distilbert_jax.benchmark.problem import Batch, Problem, flops, width
from distilbert_jax.config import Masking
from distilbert_jax.errors import UserError
from distilbert_jax.machine.sharding import (
    make_mesh,
    one_each,
    place,
    place_rows,
    replicated,
    rows_each,
    shardings,
)
from distilbert_jax.models import distilbert
from distilbert_jax.models.start import init_params
from distilbert_jax.models.student import (
    choose_layers,
    student_params,
)
from distilbert_jax.training.assemble import assemble
from distilbert_jax.training.labels import Vocabulary, mask_tokens, row_keys, vocabulary

PRODUCT = 2048  # rows and columns of the matrices whose product is timed

@dataclasses.dataclass(frozen=True)
class Figures:
    """What one side was measured at."""

    tokens_per_second: float  # real ones, the median of the rounds
    rounds: list[float]  # tokens per second of each
    padding: float  # share of the positions
    utilisation: float  # of the rate of matrix products, by the model's own operations
    first_update_seconds: float  # from the start of its process to the end of its first update
    compile_seconds: float
    process_bytes: int  # largest resident memory
    device_bytes: int  # largest memory of all devices that are not the CPU
    compiled_bytes: int  # arguments, results and temporaries of all devices, by the compiler
    devices: int
    dtype: str


@dataclasses.dataclass(frozen=True)
class Measured:
    """All sides of one run."""

    sides: dict[str, Figures]
    product_rate: float  # of matrix products in the compute dtype, the best side's [FLOP/s]
    load: float  # average of the machine before it began

    def ratio(self, other: str) -> float:
        """How many times as fast ours is: the median over rounds, whose moods both sides share."""
        pairs = zip(self.sides["ours"].rounds, self.sides[other].rounds, strict=True)
        return statistics.median(a / b for a, b in pairs)


class Ours:
    """The trainer's step."""

    def __init__(self, problem: Problem):
        """Random parameters; the step is compiled."""
        config = problem.config
        if problem.devices:
            jax.config.update("jax_num_cpu_devices", problem.devices)
        mesh = make_mesh("")
        rows_each(config, mesh)  # or an error
        self.devices, self.platform = mesh.size, jax.default_backend()
        assembly = assemble(
            config, distilbert.FAMILY, problem.student, problem.teacher, mesh, config.steps)
        teacher = jax.device_get(init_params(problem.teacher, config.seed))
        self.start = student_params(teacher, choose_layers(
            str(problem.student.num_hidden_layers), problem.teacher.num_hidden_layers))
        self.teachers = assembly.teachers(teacher)
        self.dtype = str(assembly.dtype)
        state = assembly.init(self.start)
        self._key = jax.device_get(state.key)
        self._words = vocabulary(problem.counts, problem.special_ids, problem.mask_id)
        self._state = place(state, shardings(state, mesh))
        self._fixed = (assembly.place(self.teachers),
                       jax.device_put(self._words, replicated(mesh)))
        self._batches = [place_rows(batch, mesh, config.batch_size) for batch in problem.ours]
        lowered = assembly.jitted(self._state, self._fixed[0]).lower(
            self._state, *self._fixed, self._batches[0])
        began = time.perf_counter()
        self._step = lowered.compile()
        self.compile_seconds = time.perf_counter() - began
        self.product = _product(mesh, self.dtype)

    def masked(self, theirs: list[Batch]) -> list[Batch]:
        """Mask the batches of the other sides as ours are masked in the step."""
        def mask(batch: dict[str, jax.Array], words: Vocabulary) -> dict[str, jax.Array]:
            keys = jax.vmap(jax.random.split)(row_keys(self._key, batch))[:, 0]
            return mask_tokens(keys, batch, words, Masking())

        return [jax.device_get(jax.jit(mask)(batch, self._words)) for batch in theirs]

    def update(self, number: int) -> dict[str, Any]:
        """One update on the batch of this number; the losses, which may not be there yet."""
        self._state, metrics = self._step(self._state, *self._fixed, self._batches[number])
        return metrics

    def memory(self) -> tuple[int, int]:
        """Peak of the devices' memory, and what the compiler says that the step needs [bytes]."""
        stats = [device.memory_stats() or {} for device in jax.local_devices()]
        need = self._step.memory_analysis()
        return (sum(s.get("peak_bytes_in_use", 0) for s in stats),
                self.devices * (need.argument_size_in_bytes + need.output_size_in_bytes
                                + need.temp_size_in_bytes - need.alias_size_in_bytes))


def _product(mesh: Mesh, dtype: str) -> Callable[[], float]:
    """A function that multiplies square matrices, a pair on each device, and gives FLOP/s."""
    call = jax.jit(lambda a, b: jnp.einsum("nij,njk->nik", a, b),
                   in_shardings=one_each(mesh), out_shardings=one_each(mesh))
    one = np.random.default_rng(0).normal(size=(PRODUCT, PRODUCT)).astype(dtype)
    each = jax.device_put(np.broadcast_to(one, (mesh.size, *one.shape)), one_each(mesh))

    def rate() -> float:
        began = time.perf_counter()
        call(each, each).block_until_ready()
        return 2 * mesh.size * PRODUCT**3 / (time.perf_counter() - began)

    return rate


def serve(side: str, began: float, pipe: Connection) -> None:
    """Be one side, in a process of its own: the problem is received, then each True is a round.

    What is sent: first the platform and the masked batches, then (seconds, FLOP/s of products) of
    each round, and at the end what is known of the side beside its speed; or a UserError.
    """
    try:
        _serve(side, pipe.recv(), began, pipe)
    except UserError as error:
        pipe.send(error)
    except (EOFError, ConnectionError):  # the driver is gone
        pass


def _serve(side: str, problem: Problem, began: float, pipe: Connection) -> None:
    if side == "ours":
        # What is compiled is timed, and so not looked up.
        jax.config.update("jax_enable_compilation_cache", False)
        worker, masked = (ours := Ours(problem)), ours.masked(problem.theirs)
        numbers, compiling = range(len(problem.ours)), ours.compile_seconds
    else:
        from distilbert_jax.benchmark.torch_loop import TorchLoop

        worker = TorchLoop(problem.teacher, problem.student, problem.config,
                           problem.theirs, compiled=side == "torch.compile")
        numbers, compiling, masked = range(len(problem.theirs)), 0.0, None
    _seconds(worker, [0])
    first = time.time() - began
    _seconds(worker, numbers)  # warm, and other shapes compiled
    worker.product()
    pipe.send((worker.platform, masked))
    while pipe.recv():
        pipe.send((_seconds(worker, numbers), worker.product()))
    device, need = worker.memory()
    pipe.send({
        "first_update_seconds": first, "compile_seconds": compiling, "device_bytes": device,
        "process_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        "compiled_bytes": need, "devices": worker.devices, "dtype": worker.dtype})


def _seconds(worker: Any, numbers: Iterable[int]) -> float:
    """The time of some updates, until the losses of the last are on the host."""
    began, means = time.perf_counter(), {}
    for number in numbers:
        means = worker.update(number)
    for value in means.values():
        float(value)
    return time.perf_counter() - began


class _Side:
    """The driver's end of one side."""

    def __init__(self, name: str, problem: Problem):
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        self._process = context.Process(
            target=serve, args=(name, time.time(), other), daemon=True)
        # Ctrl-C reaches all processes of a terminal: the driver ends, and its sides with it.
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        self._process.start()
        signal.signal(signal.SIGINT, before)
        other.close()
        self.platform, self.masked = self._ask(problem)

    def round(self) -> tuple[float, float]:
        """Seconds of its updates, and the rate of a matrix product [FLOP/s]."""
        return self._ask(True)

    def end(self) -> dict[str, Any]:
        """Let it go; what it knows of itself."""
        known = self._ask(False)
        self._process.join()
        return known

    def _ask(self, what: Any) -> Any:
        try:
            self._pipe.send(what)
            answer = self._pipe.recv()
        except (EOFError, ConnectionError):
            self._process.join()
            raise UserError(f"a side of the benchmark ended by itself, with code "
                            f"{self._process.exitcode}; what it said stands above") from None
        if isinstance(answer, UserError):
            raise answer
        return answer


def measure(problem: Problem, sides: Sequence[str], rounds: int) -> Measured:
    """Time the sides in turn.

    Args:
        problem: the same for all.
        sides: "ours", which has to be the first, and any of "torch", "torch.compile".
        rounds: how often each of them goes through its batches.

    Raises:
        UserError: a side broke down, or they do not run on the same kind of device.
    """
    # What one side does not use of an accelerator's memory is left to the others.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    load = os.getloadavg()[0]
    running: dict[str, _Side] = {}
    for name in sides:
        given = problem if name == "ours" else dataclasses.replace(
            problem, ours=[], theirs=running["ours"].masked)
        running[name] = _Side(name, given)
        if running[name].platform != running["ours"].platform:
            raise UserError(f"ours runs on {running['ours'].platform}, {name} on "
                            f"{running[name].platform}: install both for the same device")
    timed: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in running.items():
            timed[name].append(side.round())
    product = max(statistics.median(rate for _, rate in times) for times in timed.values())
    figures = {}
    for name, side in running.items():
        given = problem.ours if name == "ours" else problem.theirs
        tokens = sum(int((batch["segment_ids"] > 0).sum()) for batch in given)
        speeds = [tokens / seconds for seconds, _ in timed[name]]
        median = statistics.median(speeds)
        figures[name] = Figures(
            tokens_per_second=median, rounds=speeds, padding=1 - tokens / sum(
                width(batch) * len(batch["input_ids"]) for batch in given),
            utilisation=median * flops(problem, given) / tokens / product, **side.end())
    return Measured(figures, product, load)

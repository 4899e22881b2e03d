"""Our update beside one in PyTorch: the same documents, losses and shapes, in turn, in one run.

Ours is the trainer's step on all its devices, with the teacher in it or its states computed before
(as they are kept on the disk, which is not read here); PyTorch's is torch_loop.py.
"""

import dataclasses
import functools
import os
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from distilbert_jax.benchmark.problem import Batch, Problem, flops, width
from distilbert_jax.benchmark.sides import Side, peak_bytes
from distilbert_jax.config import Masking
from distilbert_jax.errors import UserError
from distilbert_jax.machine.memory import keep_memory
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
from distilbert_jax.training.labels import Vocabulary, mask_tokens, vocabulary
from distilbert_jax.training.train_step import label_keys

PRODUCT = 2048  # rows and columns of the matrices whose product is timed
KEPT = "ours-kept"  # the side whose teacher's states are computed before

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
            config, distilbert.FAMILY, problem.student, [problem.teacher], mesh, config.steps)
        teacher = jax.device_get(init_params(problem.teacher, config.seed))
        self.start = student_params(teacher, choose_layers(
            str(problem.student.num_hidden_layers), problem.teacher.num_hidden_layers))
        self.teachers = assembly.teachers(teacher)
        self.dtype = str(assembly.dtype)
        state = assembly.init(self.start)
        self._key = jax.device_get(state.key)
        self._words = vocabulary(problem.counts, problem.special_ids, problem.mask_id)
        self._state = place(state, shardings(state, mesh))
        words = jax.device_put(self._words, replicated(mesh))
        self._fixed = (assembly.place(assembly.taught(self.teachers)), words)
        self._batches = [place_rows(batch, mesh, config.batch_size) for batch in problem.ours]
        if config.kept_maskings:
            teachers = assembly.place(self.teachers)
            states = jax.jit(assembly.states_step)
            for batch in self._batches:
                batch["masking"] = batch["epoch"]
                batch["teacher_states"] = states(teachers, words, self._state.key, batch).astype(
                    assembly.states_like(teachers, words, batch).dtype)
        lowered = assembly.jitted(self._state, self._fixed[0]).lower(
            self._state, *self._fixed, self._batches[0])
        began = time.perf_counter()
        self._step = lowered.compile()
        self.compile_seconds = time.perf_counter() - began
        self.product = _product(mesh, self.dtype)

    def masked(self, theirs: list[Batch]) -> list[Batch]:
        """Mask the batches of the other sides as ours are masked in the step."""
        def mask(batch: dict[str, jax.Array], words: Vocabulary) -> dict[str, jax.Array]:
            return mask_tokens(label_keys(self._key, batch), batch, words, Masking())

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


class _Timed:
    """One side of the benchmark in its process."""

    def __init__(self, side: str, problem: Problem, began: float):
        """Build it, and make its first update; `began` is when its process was started."""
        self._masked, self._compiling = None, 0.0
        if side in ("ours", KEPT):
            keep_memory()
            # What is compiled is timed, and so not looked up.
            jax.config.update("jax_enable_compilation_cache", False)
            self._worker = Ours(problem)
            self._masked = self._worker.masked(problem.theirs)
            self._numbers, self._compiling = (
                range(len(problem.ours)), self._worker.compile_seconds)
        else:
            from distilbert_jax.benchmark.torch_loop import TorchLoop

            self._worker = TorchLoop(problem.teacher, problem.student, problem.config,
                                     problem.theirs, compiled=side == "torch.compile")
            self._numbers = range(len(problem.theirs))
        _seconds(self._worker, [0])
        self._first = time.time() - began
        _seconds(self._worker, self._numbers)  # warm, and other shapes compiled
        self._worker.product()

    def ready(self) -> tuple[str, list[Batch] | None]:
        """The platform, and the batches that ours masked for the others."""
        return self._worker.platform, self._masked

    def round(self) -> tuple[float, float]:
        """Seconds of its updates, and the rate of a matrix product [FLOP/s]."""
        return _seconds(self._worker, self._numbers), self._worker.product()

    def end(self) -> dict[str, Any]:
        """What is known of it beside its speed."""
        device, need = self._worker.memory()
        return {"first_update_seconds": self._first, "compile_seconds": self._compiling,
                "device_bytes": device, "process_bytes": peak_bytes(), "compiled_bytes": need,
                "devices": self._worker.devices, "dtype": self._worker.dtype}


def _seconds(worker: Any, numbers: Iterable[int]) -> float:
    """The time of some updates, until the losses of the last are on the host."""
    began, means = time.perf_counter(), {}
    for number in numbers:
        means = worker.update(number)
    for value in means.values():
        float(value)
    return time.perf_counter() - began


def measure(problem: Problem, sides: Sequence[str], rounds: int) -> Measured:
    """Time the sides in turn.

    Args:
        problem: the same for all.
        sides: "ours", which has to be the first, and any of "torch" (as one types it),
            "torch-memory" (the same, and its C library keeps freed memory, as that of ours does),
            "torch.compile" (that too), KEPT.
        rounds: how often each of them goes through its batches.

    Raises:
        UserError: a side broke down, or they do not run on the same kind of device.
    """
    # What one side does not use of an accelerator's memory is left to the others.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    load = os.getloadavg()[0]
    running: dict[str, Side] = {}
    given: dict[str, Problem] = {}
    for name in sides:
        given[name] = _given(name, problem, running["ours"].ready[1] if running else [])
        running[name] = Side(functools.partial(_Timed, name, given[name]),
                             name in ("torch-memory", "torch.compile"))
        if (own := running[name].ready[0]) != (first := running["ours"].ready[0]):
            raise UserError(f"ours runs on {first}, {name} on {own}: install both for the same "
                            "device")
    timed: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in running.items():
            timed[name].append(side.round())
    product = max(statistics.median(rate for _, rate in times) for times in timed.values())
    figures = {}
    for name, side in running.items():
        batches = given[name].ours or problem.theirs
        tokens = sum(int((batch["segment_ids"] > 0).sum()) for batch in batches)
        speeds = [tokens / seconds for seconds, _ in timed[name]]
        median = statistics.median(speeds)
        figures[name] = Figures(
            tokens_per_second=median, rounds=speeds, padding=1 - tokens / sum(
                width(batch) * len(batch["input_ids"]) for batch in batches),
            utilisation=median * flops(given[name], batches) / tokens / product, **side.end())
    return Measured(figures, product, load)


def _given(name: str, problem: Problem, masked: list[Batch]) -> Problem:
    """What a side is given: ours packed rows, PyTorch's the documents that ours has masked."""
    if name == KEPT:
        return dataclasses.replace(
            problem, config=dataclasses.replace(problem.config, kept_maskings=1))
    return problem if name == "ours" else dataclasses.replace(
        problem, ours=[], theirs=masked)

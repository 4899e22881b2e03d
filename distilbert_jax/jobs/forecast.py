"""The update of a run, compiled for TPUs that are not here: does it fit, and what will it take.

The compiler is that of jax[tpu], which needs no TPU. It proves that the program compiles, is
divided and fits; times are rooflines, not measurements.
"""

import dataclasses
import math
import os
import re
from importlib.util import find_spec
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies

from distilbert_jax.benchmark import hlo
from distilbert_jax.config import DistilConfig, check
from distilbert_jax.data import pack, prepare
from distilbert_jax.errors import UserError, choose, first_line
from distilbert_jax.jobs.setup import student_shape
from distilbert_jax.machine.progress import say
from distilbert_jax.machine.sharding import make_mesh, rows_each, shardings
from distilbert_jax.models.encoder import EncoderConfig, abstract_params
from distilbert_jax.models.family import Family
from distilbert_jax.training.assemble import Assembly, assemble
from distilbert_jax.training.labels import vocabulary

GIB = 2**30
EFFICIENCY = 0.5  # share of the roofline's speed that is assumed: no TPU was measured yet
DOUBLINGS = 10  # of the batch that is asked for, at most, in the search for a larger one
BEYOND = 1.25  # times what seems to fit is tried: short of memory, the compiler finds ways


@dataclasses.dataclass(frozen=True)
class Chip:
    """Peaks of one chip (Austin et al. 2025, How to Scale Your Model, chapter 2)."""

    memory: float  # that the compiler gives to a program [bytes]
    flops: float  # of bfloat16 products [1/s]
    traffic: float  # to and from memory [bytes/s]
    exchange: float  # with both neighbours along one axis of the torus [bytes/s]
    options: dict[str, str] = dataclasses.field(default_factory=dict)  # of the topology


CHIPS = {
    "v4": Chip(30.75 * GIB, 2.75e14, 1.2e12, 9e10, {"chip_config_name": "megacore"}),
    "v5e": Chip(15.75 * GIB, 1.97e14, 8.1e11, 9e10),
    "v5p": Chip(95.74 * GIB, 4.59e14, 2.8e12, 1.8e11),
    "v6e": Chip(31.25 * GIB, 9.2e14, 1.6e12, 1.8e11)}


@dataclasses.dataclass(frozen=True)
class Compiled:
    """One attempt."""

    rows: int  # of a micro-batch on each device of the data axis
    temporaries: float  # bytes of memory on each chip
    flops: int  # of the matrix products of an update, on all chips
    program: Any  # None if it does not fit


def compile_only(config: DistilConfig, family: Family, teacher: EncoderConfig) -> str:
    """Compile the update that `config` asks for, for the chips of `config.compile_only`.

    Args:
        config: as for distil; corpus and teacher need not be there.
        family, teacher: of the teacher; its shape is enough.

    Returns:
        Markdown: memory of a chip, operations, traffic and exchanges with their times, and the
        hours of the run.

    Raises:
        UserError: it does not fit, with the micro-batch that does; or settings, teacher and
            topology do not go together; or jax[tpu] is not installed.
    """
    check(config, "sequence_length", config.sequence_length <= teacher.positions,
          f"is beyond the model's {teacher.positions} positions")
    check(config, "dtype", config.dtype != "float64", "is nothing that a TPU computes in")
    step = _Step(config, family, teacher, *_topology(config.compile_only))
    asked = step.compile(step.rows)
    best = step.largest(asked)
    if asked.program is None:
        way_out = f"{step.flags(best.rows)} fits" if best else "not even one row fits"
        raise UserError(
            f"{config.compile_only} has {step.chip.memory / GIB:.2f} GiB a chip, and an update "
            f"with {asked.rows} rows at a time on each needs "
            f"{(asked.temporaries + step.fixed) / GIB:.2f} GiB: {way_out}"
            + ("" if config.remat else "; --remat needs less"))
    return _report(step, asked, best)


class _Step:
    """The update that is asked for, on a mesh of chips."""

    def __init__(self, config: DistilConfig, family: Family, teacher: EncoderConfig, chip: Chip,
                 topology: Any):
        self.config, self.teacher, self.chip = config, teacher, chip
        self.family, self.student = student_shape(config, family, teacher)
        self.mesh = make_mesh(config.mesh, topology)
        self.rows = rows_each(config, self.mesh)
        self.steps = _steps(config)
        assembly = self._assemble(config)
        self.dtype = assembly.dtype
        self.state = jax.eval_shape(assembly.init, abstract_params(self.student))
        whole = jax.eval_shape(assembly.teachers, abstract_params(teacher))
        self.whole, self.teachers = whole, assembly.taught(whole)
        self.fixed = self.bytes_each(self.state) + self.bytes_each(self.teachers)

    def _assemble(self, config: DistilConfig) -> Assembly:
        return assemble(
            config, self.family, self.student, self.teacher, self.mesh, self.steps or 1)

    def compile(self, rows: int) -> Compiled:
        """Compile for micro-batches of `rows` on each device, of a larger batch if need be."""
        say(f"compiling for {rows} rows at a time on each device; this may take minutes")
        config, at_once = self.config, rows * self.mesh.shape["data"]
        batch_size = max(config.batch_size, at_once)
        step = self._assemble(dataclasses.replace(
            config, batch_size=batch_size, accumulate=batch_size // at_once))
        words = vocabulary(np.ones(self.teacher.vocab_size), [0, 1, 2, 3, 4], 4)
        ids = jax.ShapeDtypeStruct((batch_size, config.sequence_length), jnp.int32)
        numbers = jax.ShapeDtypeStruct((batch_size,), jnp.int32)
        batch = {name: ids for name in ("input_ids", "segment_ids", "position_ids")} | {
            name: numbers for name in ("row", "epoch")}
        if config.kept_maskings:
            states = step.states_like(self.whole, words, batch)
            batch |= {"masking": numbers, "teacher_states": states}
        traced = step.jitted(self.state, self.teachers).trace(
            self.state, self.teachers, words, batch)
        flops = hlo.product_flops(traced.jaxpr)
        try:
            program = traced.lower().compile()
        except jax.errors.JaxRuntimeError as error:
            return Compiled(rows, _overflow(error), flops, None)
        return Compiled(rows, program.memory_analysis().temp_size_in_bytes, flops, program)

    def largest(self, tried: Compiled) -> Compiled | None:
        """The largest micro-batch found to fit: foretold from what a row takes, then compiled."""
        whole = self.config.batch_size // self.mesh.shape["data"]
        sizes = [n for n in range(1, whole + 1) if whole % n == 0] + [
            whole * 2**n for n in range(1, DOUBLINGS + 1)]
        best = tried if tried.program else None
        while True:
            room = (self.chip.memory - self.fixed) * tried.rows / tried.temporaries
            sizes = [n for n in sizes if n <= BEYOND * room
                     and (n > best.rows if best else n < tried.rows)]
            if not sizes:
                return best
            tried = self.compile(sizes.pop())
            if tried.program:
                return tried

    def flags(self, rows: int) -> str:
        """How micro-batches of `rows` on each device are asked for."""
        whole = self.config.batch_size // self.mesh.shape["data"]
        if rows <= whole:
            return f"--accumulate {whole // rows}"
        return f"--batch-size {rows * self.mesh.shape['data']}"

    def bytes_each(self, tree: Any) -> int:
        """Bytes of a tree on each chip."""
        leaves = jax.tree.leaves(jax.tree.map(
            lambda x, place: math.prod(place.shard_shape(x.shape)) * x.dtype.itemsize,
            tree, shardings(tree, self.mesh)))
        return sum(leaves)


def _topology(name: str) -> tuple[Chip, Any]:
    """Peaks and devices of a topology, e.g. v5e:2x4."""
    kind, colon, _ = name.partition(":")
    if not colon:
        raise UserError(f"--compile-only {name} must look like v5e:2x4: a kind of chip, and how "
                        "many along each axis")
    chip = CHIPS[choose(kind, CHIPS, "chip of --compile-only")]
    if not find_spec("libtpu"):
        raise UserError('--compile-only needs the TPU compiler: pip install "jax[tpu]"')
    # It would look for the TPU that it runs on, wait for a metadata server, and complain.
    os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
                   "TPU_MIN_LOG_LEVEL": "3", "TPU_STDERR_LOG_LEVEL": "3", "TPU_WORKER_ID": "0",
                   "TPU_WORKER_HOSTNAMES": "localhost", "TPU_ACCELERATOR_TYPE": "v5litepod-8"}
    jax.config.update("jax_platforms", "cpu")
    # What is compiled for absent devices cannot be read back.
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        return chip, topologies.get_topology_desc(
            platform="tpu", topology_name=name, **chip.options)
    except jax.errors.JaxRuntimeError as error:
        reason = first_line(error).partition(": ")[2]
        raise UserError(f"--compile-only {name}: {reason}") from error


def _overflow(error: Exception) -> float:
    """Bytes that the compiler says it would need; other errors pass."""
    text = str(error)
    found = re.search(r"\(([\d.]+)([KMGT])\) exceeds available|Used ([\d.]+)([KMGT]) of", text)
    if "RESOURCE_EXHAUSTED" not in text or not found:
        raise error
    number, unit = [text for text in found.groups() if text]
    return float(number) * 2.0 ** {"K": 10, "M": 20, "G": 30, "T": 40}[unit]


def _steps(config: DistilConfig) -> int | None:
    """Updates of the run; None where they depend on a corpus that is not prepared."""
    if config.steps or not prepare.is_prepared(config.corpus):
        return config.steps
    return config.updates(len(pack.load(config.corpus[0], verify=False).train))


def _report(step: _Step, asked: Compiled, best: Compiled) -> str:
    chip, memory, times = step.chip, _memory(step, asked), _times(step, asked)
    seconds = max(times[0][2], times[1][2]) + sum(time for _, _, time in times[2:])
    tokens = step.config.batch_size * step.config.sequence_length
    lines = [
        _title(step), "", "| memory of a chip | GiB |", "|---|--:|",
        *(f"| {name} | {size / GIB:.3f} |" for name, size in memory.items()),
        f"| together, of {chip.memory / GIB:.2f} | {sum(memory.values()) / GIB:.3f} |",
        "", f"It fits. {_more(step, asked, best)}",
        "", "| an update, on each chip | | at the chip's peak |", "|---|--:|--:|",
        *(f"| {name} | {amount} | {1e3 * time:.2f} ms |" for name, amount, time in times), "",
        f"{asked.flops / tokens / 1e6:.0f} MFLOP a token. Roofline, the larger of the first two "
        f"and the exchanges: {1e3 * seconds:.2f} ms, {tokens / seconds:,.0f} tokens/s. With "
        f"{EFFICIENCY:.0%} of that, an assumption (no TPU was measured): "
        f"{EFFICIENCY * tokens / seconds:,.0f} tokens/s.", _cost(step, seconds / EFFICIENCY)]
    return "\n".join(lines)


def _title(step: _Step) -> str:
    config, mesh = step.config, "x".join(map(str, step.mesh.devices.shape))
    layers = f"{step.teacher.num_hidden_layers} layers → {step.student.num_hidden_layers}"
    again = ", each layer computed twice" if config.remat else ""
    return (f"{config.compile_only}, mesh {mesh}: {layers}, {step.dtype}{again}; updates of "
            f"{config.batch_size:,} rows of {config.sequence_length} tokens, {step.rows} at a time "
            "on each device of the data axis")


def _memory(step: _Step, asked: Compiled) -> dict[str, int]:
    """What lies in a chip's memory → bytes."""
    need = asked.program.memory_analysis()
    return {
        "student, float32": step.bytes_each(step.state.params),
        f"teacher, {step.dtype}": step.bytes_each(step.teachers),
        "moments of the optimizer": step.bytes_each(step.state.opt_state),
        "activations and other temporaries": need.temp_size_in_bytes,
        "program": need.generated_code_size_in_bytes}


def _times(step: _Step, asked: Compiled) -> list[tuple[str, str, float]]:
    """(What, how much, seconds at the peak) on a chip: products, memory, each collective."""
    program, chip = hlo.read(asked.program.as_text()), step.chip
    flops = asked.flops / step.mesh.size
    return [
        ("matrix products", f"{flops / 1e12:.3f} TFLOP", flops / chip.flops),
        ("memory, each result written and read once", f"{program.traffic / 1e9:.2f} GB",
         program.traffic / chip.traffic),
        *((f"{each.kind} over {each.devices} chips, {each.count} times",
           f"{each.bytes / 1e6:,.1f} MB", each.seconds(chip.exchange))
          for each in program.collectives if each.devices > 1)]


def _more(step: _Step, asked: Compiled, best: Compiled) -> str:
    if best.rows == asked.rows:
        return "No larger micro-batch was found to."
    return (f"The largest micro-batch that was found to has {best.rows} rows: "
            f"{step.flags(best.rows)}.")


def _cost(step: _Step, seconds: float) -> str:
    """Hours of the run, or of a billion tokens, at so many seconds an update."""
    tokens = step.config.batch_size * step.config.sequence_length
    steps = step.steps or math.ceil(1e9 / tokens)
    hours = steps * seconds / 3600
    what = (f"The run, {steps:,} updates of {tokens:,} tokens" if step.steps else
            "A billion tokens (the run's length is not known: give --steps, or a prepared corpus)")
    return f"{what}: {hours:.2f} hours, {hours * step.mesh.size:,.1f} chip-hours."

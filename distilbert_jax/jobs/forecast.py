"""The update of a run, compiled for chips that are not here: does it fit, and what will it take.

The compilers are those of jax[tpu] and jax[cuda12] (`benchmark/chips.py`), which need no chip. They
prove that the program compiles, is divided and fits; times are rooflines, not measurements.
"""

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from distilbert_jax.benchmark import hlo
from distilbert_jax.benchmark.chips import GIB, SHARE, Chip, topology
from distilbert_jax.benchmark.kernel_costs import KernelFlops
from distilbert_jax.config import DistilConfig, check
from distilbert_jax.data import pack, prepare
from distilbert_jax.errors import UserError
from distilbert_jax.jobs.setup import student_shape
from distilbert_jax.machine.progress import say
from distilbert_jax.machine.sharding import make_mesh, rows_each, shardings
from distilbert_jax.models.encoder import EncoderConfig, abstract_params
from distilbert_jax.models.family import Family
from distilbert_jax.training.assemble import Assembly, assemble
from distilbert_jax.training.labels import vocabulary

REACHED = 0.3, 0.6  # share of the kernels' peaks that is assumed, at least and at most
DOUBLINGS = 10  # of the batch that is asked for, at most, in the search for a larger one
BEYOND = 1.25  # times what seems to fit is tried: short of memory, the compiler finds ways


@dataclasses.dataclass(frozen=True)
class Compiled:
    """One attempt."""

    rows: int  # of a micro-batch on each device of the data axis
    temporaries: float  # bytes of memory on each chip
    known: KernelFlops  # operations of the kernels whose inside the program does not show
    program: Any  # None if it does not fit


def compile_only(
    config: DistilConfig, family: Family, teachers: Sequence[EncoderConfig]
) -> str:
    """Compile the update that `config` asks for, for the chips of `config.compile_only`.

    Args:
        config: as for distil; corpus and teachers need not be there.
        family: of the first teacher; teachers: their shapes are enough.

    Returns:
        Markdown: memory of a chip, operations, traffic, kernels and exchanges with their times,
        and the hours of the run.

    Raises:
        UserError: it does not fit, with the micro-batch that does; or settings, teacher and
            topology do not go together; or the compiler is not installed.
    """
    positions = min(teacher.positions for teacher in teachers)
    check(config, "sequence_length", config.sequence_length <= positions,
          f"is beyond the model's {positions} positions")
    check(config, "dtype", config.dtype != "float64", "is not forecast: the peaks that are known "
          "are those of bfloat16")
    chip, devices = topology(config.compile_only)
    check(config, "dtype", not chip.card or config.dtype != "float32", "is not forecast for GPUs: "
          "the peaks that are known are those of bfloat16")
    step = _Step(config, family, teachers, chip, devices)
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

    def __init__(self, config: DistilConfig, family: Family, shapes: Sequence[EncoderConfig],
                 chip: Chip, devices: Any):
        """`shapes` are those of the teachers, the first of which is of this family."""
        self.config, self.shapes, self.chip = config, shapes, chip
        self.family, self.student = student_shape(config, family, shapes[0])
        self.mesh = make_mesh(config.mesh, devices)
        self.rows = rows_each(config, self.mesh)
        self.steps = _steps(config)
        assembly = self._assemble(config)
        self.dtype = assembly.dtype
        self.state = jax.eval_shape(assembly.init, abstract_params(self.student))
        whole = jax.eval_shape(assembly.teachers, *map(abstract_params, shapes))
        self.whole, self.teachers = whole, assembly.taught(whole)
        self.fixed = self.bytes_each(self.state) + self.bytes_each(self.teachers)

    def _assemble(self, config: DistilConfig) -> Assembly:
        return assemble(
            config, self.family, self.student, self.shapes, self.mesh, self.steps or 1)

    def trace(self, rows: int) -> jax.stages.Traced:
        """The update with micro-batches of `rows` on each device, of a larger batch if need be."""
        config, at_once = self.config, rows * self.mesh.shape["data"]
        batch_size = max(config.batch_size, at_once)
        step = self._assemble(dataclasses.replace(
            config, batch_size=batch_size, accumulate=batch_size // at_once))
        words = vocabulary(np.ones(self.student.vocab_size), [0, 1, 2, 3, 4], 4)
        ids = jax.ShapeDtypeStruct((batch_size, config.sequence_length), jnp.int32)
        numbers = jax.ShapeDtypeStruct((batch_size,), jnp.int32)
        batch = {name: ids for name in ("input_ids", "segment_ids", "position_ids")} | {
            name: numbers for name in ("row", "epoch")}
        if config.kept_maskings:
            states = step.states_like(self.whole, words, batch)
            batch |= {"masking": numbers, "teacher_states": states}
        return step.jitted(self.state, self.teachers).trace(
            self.state, self.teachers, words, batch)

    def compile(self, rows: int) -> Compiled:
        """Compile the update with micro-batches of `rows` on each device."""
        say(f"compiling for {rows} rows at a time on each device; this may take minutes")
        traced = self.trace(rows)
        known = hlo.kernel_flops(traced.jaxpr)
        try:
            program = traced.lower().compile()
        except jax.errors.JaxRuntimeError as error:
            return Compiled(rows, _overflow(error), known, None)
        temporaries = program.memory_analysis().temp_size_in_bytes
        # A TPU's compiler refuses what does not fit, a GPU's does not.
        fits = self.fixed + temporaries <= self.chip.memory or not self.chip.card
        return Compiled(rows, temporaries, known, program if fits else None)

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
    chip, memory = step.chip, _memory(step, asked)
    program = hlo.read(asked.program.as_text(), asked.known)
    exchanges = [each for each in program.collectives if each.devices > 1]
    seconds = program.seconds(chip.flops, chip.traffic) + sum(
        each.seconds(chip.exchange) for each in exchanges)
    return "\n".join([
        _title(step), "", "| memory of a chip | GiB |", "|---|--:|",
        *(f"| {name} | {size / GIB:.3f} |" for name, size in memory.items()),
        f"| together, of {chip.memory / GIB:.2f} | {sum(memory.values()) / GIB:.3f} |",
        "", f"It fits. {_more(step, asked, best)}",
        "", "| an update, on each chip | | at the chip's peak |", "|---|--:|--:|",
        *_rows(program, exchanges, chip), "", _speed(step, program, seconds),
        _cost(step, seconds), *([_GPU] if chip.card else [])])


_GPU = (
    "Compiled without the card: no kernel was tuned to it, cuDNN was not asked whether it can do "
    f"what it is given, nothing was timed. jax gives a program {SHARE:.0%} of a GPU's memory.")


def _rows(
    program: hlo.Program, exchanges: list[hlo.Collective], chip: Chip
) -> list[str]:
    """What an update costs: products and traffic, what binds of both, by groups, and exchanges."""
    peaks = chip.flops, chip.traffic
    groups = program.groups(*peaks)
    rows = [
        ("matrix products", f"{program.flops / 1e12:.3f} TFLOP", program.flops / chip.flops),
        ("memory, as often as a kernel reads or writes it", f"{program.traffic / 1e9:.2f} GB",
         program.traffic / chip.traffic),
        ("**kernels, one after another, each as long as the longer of its two**",
         f"{sum(count for _, count, _ in groups):,}", program.seconds(*peaks)),
        *((f"of these: {name}", f"{count:,}", time) for name, count, time in groups),
        *((f"{each.kind} over {each.devices} chips, {each.count} times",
           f"{each.bytes / 1e6:,.1f} MB", each.seconds(chip.exchange)) for each in exchanges)]
    return [f"| {name} | {amount} | {1e3 * time:.2f} ms |" for name, amount, time in rows]


def _speed(step: _Step, program: hlo.Program, seconds: float) -> str:
    """Tokens a second at the peaks, and at what may be reached of them."""
    tokens = step.config.batch_size * step.config.sequence_length
    rate = program.flops / step.chip.flops / seconds  # share of the matrix rate, at the peaks
    low, high = REACHED
    return (
        f"{program.flops * step.mesh.size / tokens / 1e6:.0f} MFLOP a token. Kernels and exchanges "
        f"at their peaks: {1e3 * seconds:.2f} ms, {tokens / seconds:,.0f} tokens/s, {rate:.0%} of "
        f"the matrix rate. With {low:.0%} to {high:.0%} of that, an assumption (no such chip was "
        f"measured): {low * tokens / seconds:,.0f} to {high * tokens / seconds:,.0f} tokens/s, "
        f"{low * rate:.0%} to {high * rate:.0%} of the matrix rate. The best that others have "
        "published: 25 % for encoders on an H100 (ModernBERT), 19 to 26 % for decoders distilled "
        "on TPU7x.")


def _title(step: _Step) -> str:
    config, mesh = step.config, "x".join(map(str, step.mesh.devices.shape))
    depths = " + ".join(str(shape.num_hidden_layers) for shape in step.shapes)
    layers = f"{depths} layers → {step.student.num_hidden_layers}"
    again = ", each layer computed twice" if config.remat else ""
    return (f"{config.compile_only}, mesh {mesh}: {layers}, {step.dtype}{again}; updates of "
            f"{config.batch_size:,} rows of {config.sequence_length} tokens, {step.rows} at a time "
            "on each device of the data axis")


def _memory(step: _Step, asked: Compiled) -> dict[str, int]:
    """What lies in a chip's memory → bytes."""
    need = asked.program.memory_analysis()
    return {
        "student, float32": step.bytes_each(step.state.params),
        f"teacher{'s' * (len(step.shapes) > 1)}, {step.dtype}": step.bytes_each(step.teachers),
        "moments of the optimizer": step.bytes_each(step.state.opt_state),
        "activations and other temporaries": need.temp_size_in_bytes,
        "program": need.generated_code_size_in_bytes}


def _more(step: _Step, asked: Compiled, best: Compiled) -> str:
    if best.rows == asked.rows:
        return "No larger micro-batch was found to."
    return (f"The largest micro-batch that was found to has {best.rows} rows: "
            f"{step.flags(best.rows)}.")


def _cost(step: _Step, seconds: float) -> str:
    """Hours of the run, or of a billion tokens, at so many seconds an update at the peaks."""
    tokens = step.config.batch_size * step.config.sequence_length
    steps = step.steps or math.ceil(1e9 / tokens)
    most, least = (steps * seconds / share / 3600 for share in REACHED)
    what = (f"The run, {steps:,} updates of {tokens:,} tokens" if step.steps else
            "A billion tokens (the run's length is not known: give --steps, or a prepared corpus)")
    return (f"{what}: {least:.2f} to {most:.2f} hours, {least * step.mesh.size:,.1f} to "
            f"{most * step.mesh.size:,.1f} chip-hours.")

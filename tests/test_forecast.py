"""What a compiled update costs is read rightly; for every TPU it fits and is divided as meant."""

import dataclasses
import json
import math
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distilbert_jax.benchmark import hlo
from distilbert_jax.benchmark import problem as sides
from distilbert_jax.config import DistilConfig
from distilbert_jax.errors import UserError
from distilbert_jax.jobs import forecast as tpu
from distilbert_jax.machine.sharding import by_rows, make_mesh, replicated, shardings
from distilbert_jax.models import bert

ROOT = Path(__file__).parents[1]


def test_collectives_count_as_often_as_their_loop_turns():
    mesh, each = make_mesh("4x2"), 6 * 5 * 4  # bytes of a float32 [6, 5]

    def step(x):
        def turn(total, _):
            return total + jax.lax.psum(x * total.sum(), "data"), None

        total, _ = jax.lax.scan(turn, jnp.zeros((6, 5)), None, length=3)
        return jax.lax.all_gather(total, "model")

    both = jax.shard_map(step, in_specs=jax.P("data"), out_specs=jax.P(), mesh=mesh,
                         check_vma=False)
    program = hlo.read(jax.jit(both).lower(jnp.ones((24, 5))).compile().as_text())
    found = {(c.kind, c.devices): (c.count, c.bytes) for c in program.collectives}
    assert found == {("all-reduce", 4): (3, 3 * each), ("all-gather", 2): (1, 2 * each)}
    gather, reduce = program.collectives
    assert reduce.seconds(1e9) == pytest.approx(3 * each * 2 * 3 / 4 / 1e9)
    assert gather.seconds(1e9) == pytest.approx(2 * each / 2 / 1e9)
    assert (2, 6, 5) in program.shapes and program.traffic >= 3 * 2 * each


def test_what_is_fetched_ahead_is_not_written_anew():
    """In the TPU compiler's words: both ways into a chip's fast memory, S(1)."""
    program = hlo.read("""
ENTRY %main (x: f32[1024]) -> f32[256] {
  %x = f32[1024]{0:T(1024)} parameter(0)
  %made = f32[1024]{0:T(1024)} negate(%x)
  %copy-start = (f32[1024]{0:T(1024)S(1)}, f32[1024]{0:T(1024)}, u32[]{:S(2)}) copy-start(%made)
  %copied = f32[1024]{0:T(1024)S(1)} copy-done(%copy-start)
  %slice-start = ((f32[1024]{0:T(1024)}), f32[256]{0:T(1024)S(1)}, s32[]{:S(2)}) slice-start(%made)
  ROOT %sliced = f32[256]{0:T(1024)S(1)} slice-done(%slice-start)
}""")
    assert program.traffic == 2 * 4096 and program.shapes == {(1024,)}


@pytest.mark.parametrize("shape, accumulate", [("8x1", 1), ("4x2", 2), ("2x4", 4)])
def test_gradients_are_added_up_once_an_update(
        shape, accumulate, problem, vocabulary, x64):
    mesh = make_mesh(shape)
    state = problem.state()
    layout, whole = shardings(state, mesh), replicated(mesh)
    step = jax.jit(problem.step(accumulate, mesh), out_shardings=(layout, whole), in_shardings=(
        layout, shardings(problem.teachers, mesh), whole, by_rows(mesh)))
    text = step.lower(state, problem.teachers, vocabulary, problem.batches[0])
    program = hlo.read(text.compile().as_text())
    moved = sum(c.bytes for c in program.collectives
                if c.kind == "all-reduce" and c.devices == mesh.shape["data"])
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(problem.params))
    assert whole / mesh.shape["model"] <= moved < 1.1 * whole


@pytest.mark.parametrize("accumulate, mesh", [(1, None), (2, None), (2, "4x2")])
def test_products_are_counted(accumulate, mesh, problem, vocabulary, x64):
    mesh = mesh and make_mesh(mesh)
    rows, batch = 8, problem.batches[0]
    traced = jax.jit(problem.step(accumulate, mesh)).trace(
        problem.state(), problem.teachers, vocabulary, batch)
    full = dict(batch, segment_ids=np.ones((rows, 16), np.int32))  # a product knows no segments
    one = sides.Problem(
        problem.teacher, problem.student, DistilConfig(), np.ones(72), [], 4, [], [])
    assert hlo.product_flops(traced.jaxpr) == pytest.approx(sides.flops(one, [full]), rel=0.02)


def test_kernels_and_branches_are_counted():
    from jax.experimental import pallas as pl

    def kernel(x, y):
        y[...] = jax.lax.cond(x[0, 0] > 0, lambda: x[...] @ x[...], lambda: x[...])

    call = pl.pallas_call(kernel, grid=(3,), out_shape=jax.ShapeDtypeStruct((8, 8), "float32"))
    assert hlo.product_flops(jax.make_jaxpr(call)(jnp.ones((8, 8))).jaxpr) == 3 * 2 * 8**3


@pytest.mark.parametrize("settings, line", [
    ({"compile_only": "v5e"}, "must look like v5e:2x4"),
    ({"compile_only": "v5:2x4"}, "unknown chip of --compile-only 'v5'; did you mean v5p?"),
    ({"sequence_length": 1024}, "--sequence-length 1024 is beyond the model's 512 positions"),
    ({"dtype": "float64"}, "--dtype float64 is nothing that a TPU computes in"),
])
def test_what_cannot_be_compiled(settings, line):
    with pytest.raises(UserError, match=line.replace("?", r"\?")):
        tpu.compile_only(DistilConfig(**{"compile_only": "v5e:2x4"} | settings), bert.FAMILY,
                         bert.BASE)


@pytest.mark.skipif(bool(find_spec("libtpu")), reason="the TPU compiler is here")
def test_without_the_compiler():
    with pytest.raises(UserError, match=r'pip install "jax\[tpu\]"'):
        tpu.compile_only(DistilConfig(compile_only="v5e:2x4"), bert.FAMILY,
                         bert.BASE)


# Runs without the flags and devices that the tests' own JAX is given.
COMPILE = """
import dataclasses, json, sys
from distilbert_jax.benchmark import hlo
from distilbert_jax.jobs import forecast as tpu
from distilbert_jax.config import DistilConfig
from distilbert_jax.models import bert
from distilbert_jax.machine.sharding import make_mesh
import jax
topology, mesh, batch_size = sys.argv[1:]
config = DistilConfig(compile_only=topology, mesh=mesh, batch_size=int(batch_size), accumulate=2)
step = tpu._Step(config, bert.FAMILY, dataclasses.replace(bert.BASE, num_hidden_layers=2),
                 *tpu._topology(topology))
done = step.compile(step.rows)
program = hlo.read(done.program.as_text())
need = done.program.memory_analysis()
print(json.dumps({
    "rows": step.rows, "shapes": sorted(program.shapes), "flops": done.flops,
    "sizes": [4 * leaf.size for leaf in jax.tree.leaves(step.state.params)],
    "arguments": need.argument_size_in_bytes, "fixed": step.fixed,
    "collectives": [dataclasses.asdict(c) for c in program.collectives]}))
"""


def compiled(*arguments):
    environment = {k: v for k, v in os.environ.items()
                   if k not in ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES")}
    done = subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True,
                          cwd=ROOT, env=environment)
    return done


tpu_compile = [pytest.mark.tpu_compile, pytest.mark.skipif(
    not find_spec("libtpu"), reason='no TPU compiler: pip install "jax[tpu]"')]


class TestTPU:
    pytestmark = tpu_compile

    @pytest.mark.parametrize("topology, mesh", [
        *((topology, mesh) for topology in ("v4:2x2x2", "v5e:2x4", "v5p:2x2x2", "v6e:2x4")
          for mesh in ("8x1", "4x2", "2x4")), ("v5e:16x16", "256x1")])
    def test_the_update_is_divided_as_meant(self, topology, mesh):
        data, model = map(int, mesh.split("x"))
        done = compiled("-c", COMPILE, topology, mesh, 32 * data)
        assert not done.returncode, done.stderr
        found = json.loads(done.stdout.splitlines()[-1])
        words, positions = bert.BASE.vocab_size, found["rows"] * 128
        logits = [shape for shape in found["shapes"] for size in (words, words // model)
                  if size in shape and math.prod(shape) // size >= positions]
        scores = [shape for shape in found["shapes"] if shape[-2:] == [128, 128]]
        assert found["rows"] == 16 and not logits and not scores
        moved = sum(c["bytes"] for c in found["collectives"]
                    if c["kind"] == "all-reduce" and c["devices"] == data)
        assert sum(found["sizes"]) / model <= moved < 1.01 * sum(found["sizes"])
        assert found["fixed"] == pytest.approx(found["arguments"], rel=0.02)

    @pytest.fixture
    def command(self, tmp_path):
        """Of BERT-base, but for its layers; nothing but its config.json is there."""
        shape = bert.FAMILY.to_hf(dataclasses.replace(bert.BASE, num_hidden_layers=2))
        (tmp_path / "config.json").write_text(json.dumps(shape | {"model_type": "bert"}))
        return "experiments/run.py", "--compile-only", "v5e:2x4", "--mesh", "8x1", "--teacher", \
            tmp_path

    def test_the_command(self, command):
        done = compiled(*command, "--steps", 300)
        assert not done.returncode, done.stderr
        for text in ("| matrix products |", "It fits. The largest micro-batch that was found to ",
                     "| all-reduce over 8 chips, ", "The run, 300 updates of 16,384 tokens: "):
            assert text in done.stdout

    def test_too_large_a_batch(self, command):
        done = compiled(*command, "--batch-size", 2**16, "--sequence-length", 512)
        assert done.returncode == 2 and "Traceback" not in done.stderr
        line, = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        needs, accumulate = re.fullmatch(
            r"error: v5e:2x4 has 15.75 GiB a chip, and an update with 8192 rows at a time on "
            r"each needs (.*) GiB: --accumulate (\d+) fits; --remat needs less", line).groups()
        assert float(needs) > 15.75 and int(accumulate) > 1

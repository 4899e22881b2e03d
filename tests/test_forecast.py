"""What a compiled update costs is read rightly; for every chip it fits and is divided as meant."""

import collections
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

from distilbert_jax.benchmark import chips, hlo
from distilbert_jax.benchmark import problem as sides
from distilbert_jax.benchmark.chips import CHIPS, topology
from distilbert_jax.config import DistilConfig
from distilbert_jax.errors import UserError
from distilbert_jax.jobs import forecast
from distilbert_jax.kernels import attention, products
from distilbert_jax.kernels.products import device_here
from distilbert_jax.machine.sharding import by_rows, make_mesh, replicated, shardings
from distilbert_jax.models import bert

ROOT = Path(__file__).parents[1]


SMALL = dataclasses.replace(
    bert.BASE, num_hidden_layers=2, hidden_size=128, num_attention_heads=2, intermediate_size=256,
    vocab_size=1000)


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
    assert (2, 6, 5) in program.shapes and program.traffic >= 3 * each


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


def test_what_is_fetched_ahead_is_read_by_whom_it_is_for():
    program = hlo.read("""
ENTRY %main (x: f32[1024]) -> f32[512] {
  %x = f32[1024]{0:T(1024)} parameter(0)
  %slice-start = ((f32[1024]{0:T(1024)}), f32[256]{0:T(1024)S(1)}, s32[]{:S(2)}) slice-start(%x)
  %first = f32[256]{0:T(1024)S(1)} slice-done(%slice-start)
  %slice-start.1 = ((f32[1024]{0:T(1024)}), f32[256]{0:T(1024)S(1)}, s32[]{:S(2)}) slice-start(%x)
  %second = f32[256]{0:T(1024)S(1)} slice-done(%slice-start.1)
  %both = f32[512]{0:T(1024)S(1)} custom-call(%first, %second), custom_call_target="ConcatBitcast"
  %near = f32[512]{0:T(1024)S(1)} negate(%both)
  ROOT %made = f32[512]{0:T(1024)} negate(%near)
}""")
    assert [each.bytes for each in program.kernels] == [2048, 2048]


# A product that reads two arrays and writes one; a sum that reads that one, and one that reads
# both; in a loop of three, a row that is cut out of an array, and put into another in place.
BY_HAND = """
HloModule step, is_scheduled=true

%fused (p0: bf16[64,128], p1: bf16[128,256]) -> bf16[64,256] {
  %p0 = bf16[64,128]{1,0} parameter(0)
  %p1 = bf16[128,256]{1,0} parameter(1)
  %inside = f32[64,256]{1,0} dot(%p0, %p1), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %narrow = bf16[64,256]{1,0} convert(%inside)
}

%fused.row (p2: bf16[64,256], p3: bf16[64,256], p4: s32[]) -> bf16[64,256] {
  %p2 = bf16[64,256]{1,0} parameter(0)
  %p3 = bf16[64,256]{1,0} parameter(1)
  %p4 = s32[] parameter(2)
  %zero = s32[] constant(0)
  %flat = bf16[64,1,256]{2,1,0} bitcast(%p2)
  %row = bf16[1,1,256]{2,1,0} dynamic-slice(%flat, %p4, %zero, %zero), dynamic_slice_sizes={1,1,256}
  %same = bf16[1,256]{1,0} bitcast(%row)
  ROOT %put = bf16[64,256]{1,0} dynamic-update-slice(%p3, %same, %p4, %zero)
}

%body (carry: (s32[], bf16[64,256], bf16[64,256])) -> (s32[], bf16[64,256], bf16[64,256]) {
  %carry = (s32[], bf16[64,256]{1,0}, bf16[64,256]{1,0}) parameter(0)
  %turn = s32[] get-tuple-element(%carry), index=0
  %from = bf16[64,256]{1,0} get-tuple-element(%carry), index=1
  %to = bf16[64,256]{1,0} get-tuple-element(%carry), index=2
  %moved = bf16[64,256]{1,0} fusion(%from, %to, %turn), kind=kLoop, calls=%fused.row
  ROOT %next = (s32[], bf16[64,256]{1,0}, bf16[64,256]{1,0}) tuple(%turn, %from, %moved)
}

%condition (carried: (s32[], bf16[64,256], bf16[64,256])) -> pred[] {
  %carried = (s32[], bf16[64,256]{1,0}, bf16[64,256]{1,0}) parameter(0)
  ROOT %true = pred[] constant(true)
}

ENTRY %main (x: bf16[64,128], w: bf16[128,256], turns: s32[]) -> bf16[64,256] {
  %x = bf16[64,128]{1,0} parameter(0)
  %w = bf16[128,256]{1,0} parameter(1)
  %turns = s32[] parameter(2)
  %made = bf16[64,256]{1,0} fusion(%x, %w), kind=kOutput, calls=%fused, \
metadata={op_name="jit(step)/transpose(jvp(attention))/dot_general"}
  %sum = bf16[64,256]{1,0} add(%made, %made), metadata={op_name="jit(step)/optimizer/add"}
  %again = bf16[64,256]{1,0} add(%made, %sum), metadata={op_name="jit(step)/jvp()/add"}
  %start = (s32[], bf16[64,256]{1,0}, bf16[64,256]{1,0}) tuple(%turns, %again, %sum)
  %loop = (s32[], bf16[64,256]{1,0}, bf16[64,256]{1,0}) while(%start), condition=%condition, \
body=%body, metadata={op_name="jit(step)/jvp(head)/while"}, \
backend_config={"known_trip_count":{"n":"3"}}
  ROOT %end = bf16[64,256]{1,0} get-tuple-element(%loop), index=2
}"""


def test_kernels_are_counted_by_hand():
    x, w, made, row = 2 * 64 * 128, 2 * 128 * 256, 2 * 64 * 256, 2 * 256  # bytes
    program, product = hlo.read(BY_HAND), 2 * 64 * 128 * 256
    # So that the product takes 1 s, and what it reads and writes half of that.
    flops, traffic = float(product), 2.0 * (x + w + made)
    expected = {"attention": (1, 1.0), "optimizer": (1, 2 * made / traffic),
                "everything else": (1, 3 * made / traffic),
                "vocabulary head": (3, 3 * (2 * row + 4) / traffic)}
    groups = {name: (count, seconds) for name, count, seconds in program.groups(flops, traffic)}
    assert groups == {name: (n, pytest.approx(time)) for name, (n, time) in expected.items()}
    assert next(iter(groups)) == "attention" and list(groups)[-1] == "vocabulary head"
    assert program.flops == product
    assert program.traffic == (x + w + made) + 2 * made + 3 * made + 3 * (2 * row + 4)
    # The larger of the two sums would let each kernel run beside the others.
    together = sum(time for _, time in expected.values())
    assert program.seconds(flops, traffic) == pytest.approx(together)
    assert together > 1.1 * max(program.flops / flops, program.traffic / traffic)


@pytest.mark.parametrize("line, flops", [
    # Queries [2, 128, 4, 64]; two products with [2, 4, 128, 128] forward, five backward.
    ('(bf16[2,4,128,64]{3,1,2,0}, u8[0]{0}) custom-call(%q, %q, %q), custom_call_target='
     '"__cudnn$fmhaScaleBiasSoftmax", backend_config={"cudnn_fmha_backend_config": '
     '{"intermediate_tensor_shape": {"element_type": "BF16", "dimensions": ["2", "4", "128", '
     '"128"]}}}', 2 * 2 * (2 * 4 * 128 * 128 * 64)),
    ('(bf16[2,128,4,64]{3,2,1,0}, u8[0]{0}) custom-call(%q, %q, %q), custom_call_target='
     '"__cudnn$fmhaScaleBiasSoftmaxBackward", backend_config={"cudnn_fmha_backend_config": '
     '{"intermediate_tensor_shape": {"dimensions": ["2", "4", "128", "128"]}}}',
     5 * 2 * (2 * 4 * 128 * 128 * 64)),
    ('(f32[64,256]{1,0}, s8[4096]{0}) custom-call(%x, %w), custom_call_target="__cublas$gemm", '
     'backend_config={"gemm_backend_config":{"dot_dimension_numbers":'
     '{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"]}}}',
     2 * 64 * 128 * 256),
    ('f32[64,256]{1,0} convolution(%x, %w), dim_labels=bf_io->bf', 2 * 64 * 128 * 256),
    # Eight products [4, 16] x [16, 32], as a TPU's compiler writes them.
    ('f32[8,4,32]{2,1,0} convolution(%left, %right), window={size=8 stride=7 lhs_dilate=8}, '
     'dim_labels=0bf_0io->0bf', 8 * 2 * 4 * 16 * 32),
    ('f32[6,10]{1,0} custom-call(%x), custom_call_target="tpu_custom_call"', 12345)])
def test_products_of_every_kind_are_counted(line, flops):
    program = hlo.read(f"""
ENTRY %main (q: bf16[2,128,4,64]) -> f32[64,256] {{
  %q = bf16[2,128,4,64]{{3,2,1,0}} parameter(0)
  %x = f32[64,128]{{1,0}} parameter(1)
  %w = f32[128,256]{{1,0}} parameter(2)
  %left = f32[8,4,16]{{2,1,0}} parameter(3)
  %right = f32[8,16,32]{{2,1,0}} parameter(4)
  ROOT %made = {line}
}}""", {((6, 10),): 12345})
    assert program.flops == flops


def test_what_is_gathered_and_scattered_is_read_in_part():
    table, few = 4 * 1000 * 16, 4 * 8 * 16
    program = hlo.read("""
ENTRY %main (table: f32[1000,16], ids: s32[8,1]) -> f32[1000,16] {
  %table = f32[1000,16]{1,0} parameter(0)
  %ids = s32[8,1]{1,0} parameter(1)
  %found = f32[8,16]{1,0} gather(%table, %ids), offset_dims={1}
  %all = f32[1000,16]{1,0} negate(%table)
  ROOT %added = f32[1000,16]{1,0} scatter(%all, %ids, %found), update_window_dims={1}, to_apply=%add
}""")
    assert [each.bytes for each in program.kernels] == [few + 32 + few, 2 * table, 3 * few + 32]


def traced_step(problem, vocabulary, accumulate, mesh):
    """The update of a tiny problem, laid out on the mesh if there is one."""
    state, layouts = problem.state(), {}
    if mesh:
        layout, whole = shardings(state, mesh), replicated(mesh)
        layouts = {"out_shardings": (layout, whole), "in_shardings": (
            layout, shardings(problem.teachers, mesh), whole, by_rows(mesh))}
    return jax.jit(problem.step(accumulate, mesh), **layouts).trace(
        state, problem.teachers, vocabulary, problem.batches[0])


@pytest.mark.parametrize("shape, accumulate", [("8x1", 1), ("4x2", 2), ("2x4", 4)])
def test_gradients_are_added_up_once_an_update(
        shape, accumulate, problem, vocabulary, x64):
    mesh = make_mesh(shape)
    traced = traced_step(problem, vocabulary, accumulate, mesh)
    program = hlo.read(traced.lower().compile().as_text())
    moved = sum(c.bytes for c in program.collectives
                if c.kind == "all-reduce" and c.devices == mesh.shape["data"])
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(problem.params))
    assert whole / mesh.shape["model"] <= moved < 1.1 * whole


@pytest.mark.parametrize("accumulate, mesh", [(1, None), (2, None), (1, "8x1")])
def test_products_are_counted(accumulate, mesh, problem, vocabulary, x64):
    mesh = mesh and make_mesh(mesh)
    rows, batch = 8, problem.batches[0]
    traced = traced_step(problem, vocabulary, accumulate, mesh)
    full = dict(batch, segment_ids=np.ones((rows, 16), np.int32))  # a product knows no segments
    one = sides.Problem(
        problem.teacher, problem.student, DistilConfig(), np.ones(72), [], 4, [], [])
    expected = pytest.approx(sides.flops(one, [full]), rel=0.02)
    program = hlo.read(traced.lower().compile().as_text())
    assert hlo.product_flops(traced.jaxpr) == expected
    assert program.flops * (mesh.size if mesh else 1) == expected


def test_kept_states_leave_out_the_layers_of_the_teacher():
    """And no other product of the update."""
    def flops(maskings):
        config = DistilConfig(batch_size=16, accumulate=1, kept_maskings=maskings)
        step = forecast._Step(config, bert.FAMILY, [SMALL], CHIPS["v6e"], None)
        return hlo.product_flops(step.trace(step.rows).jaxpr)

    width, length = SMALL.hidden_size, 128
    layer = 4 * 2 * width**2 + 2 * 2 * width * SMALL.intermediate_size + 2 * 2 * width * length
    assert flops(0) - flops(1) == 16 * length * SMALL.num_hidden_layers * layer


def test_kernels_and_branches_are_counted():
    from jax.experimental import pallas as pl

    def kernel(x, y):
        y[...] = jax.lax.cond(x[0, 0] > 0, lambda: x[...] @ x[...], lambda: x[...])

    call = pl.pallas_call(kernel, grid=(3,), out_shape=jax.ShapeDtypeStruct((8, 8), "float32"))
    jaxpr = jax.make_jaxpr(jax.jit(call))(jnp.ones((8, 8))).jaxpr
    assert hlo.product_flops(jaxpr) == 3 * 2 * 8**3
    assert hlo.kernel_flops(jaxpr) == {((8, 8),): 3 * 2 * 8**3}


def test_kernels_are_named_by_their_scope(dropping, vocabulary, x64):
    """Forward and backward: the products of the head and of attention in a compiled step."""
    program = traced_step(dropping, vocabulary, 1, None).lower().compile()
    flops = collections.Counter()
    for each in hlo.read(program.as_text()).kernels:
        flops[each.group] += each.count * each.flops
    shape, positions = dropping.teacher, 8 * 16
    layers, models = 2 + 3 * 1, 1 + 3  # the student goes forward and backward
    scores = 2 * 2 * positions * 16 * shape.hidden_size
    words = 2 * positions * shape.hidden_size * shape.vocab_size
    assert set(flops) == {"attention", "vocabulary head", "optimizer", "products of the layers",
                          "everything else"}
    assert flops["attention"] == layers * scores
    assert flops["vocabulary head"] == pytest.approx(models * words, rel=0.05)  # sums of columns


@pytest.mark.parametrize("kind", [kind for kind in CHIPS if CHIPS[kind].card])
def test_cards_are_described(kind):
    """What a core multiplies in a cycle, at its clock, is about the peak of the datasheet."""
    chip = CHIPS[kind]
    text = chip.card.description()
    fields = dict(re.findall(r"(\w+): ([\d.]+)", text))
    assert text.count("{") == text.count("}") and f'"{chip.card.name}"' in text
    assert 0.75 * int(fields["device_memory_size"]) == chip.memory
    assert int(fields["memory_bandwidth"]) == chip.traffic
    operations = {8: 2048, 9: 4096, 10: 8192}[chip.card.capability]
    rate = operations * int(fields["core_count"]) * float(fields["clock_rate_ghz"]) * 1e9
    assert 0.9 < chip.flops / rate < 1.01

@pytest.mark.parametrize("settings, line", [
    ({"compile_only": "v5e"}, "must look like v5e:2x4 or h100:8"),
    ({"compile_only": "h100:0"}, "h100:0 must say how many GPUs of one host, 1 to 8: h100:1"),
    ({"compile_only": "h100:2x4"}, "must say how many GPUs of one host, 1 to 8: h100:1"),
    ({"compile_only": "v5:2x4"}, "unknown chip of --compile-only 'v5'; did you mean v5p?"),
    ({"sequence_length": 1024}, "--sequence-length 1024 is beyond the model's 512 positions"),
    ({"dtype": "float64"}, "--dtype float64 is not forecast: the peaks that are known"),
])
def test_what_cannot_be_compiled(settings, line):
    with pytest.raises(UserError, match=line.replace("?", r"\?")):
        forecast.compile_only(DistilConfig(**{"compile_only": "v5e:2x4"} | settings), bert.FAMILY,
                         [bert.BASE])


@pytest.mark.parametrize("name, extra", [("v5e:2x4", "tpu"), ("h100:1", "cuda12")])
def test_without_the_compiler(name, extra, monkeypatch):
    monkeypatch.setattr(chips, "find_spec", lambda package: None)
    with pytest.raises(UserError, match=rf'pip install "jax\[{extra}\]"'):
        topology(name)


@pytest.mark.parametrize("package", ["jax_cuda12_plugin", "jax_cuda13_plugin"])
def test_either_compiler_for_gpus_will_do(package, monkeypatch):
    monkeypatch.setattr(chips, "find_spec", lambda name: name == package or None)
    monkeypatch.setattr(chips, "_gpus", lambda card, number: f"{number} of {card.name}")
    monkeypatch.setattr(jax.config, "update", lambda *setting: None)
    assert topology("h200:2") == (CHIPS["h200"], "2 of NVIDIA H200")


def test_an_absent_card_is_one_that_cudnn_attends_on():
    """The devices of this machine say nothing of it."""
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H100", num_cores=1, platform="gpu")
    with jax.sharding.use_abstract_mesh(
            jax.sharding.AbstractMesh((1,), ("data",), abstract_device=device)):
        platform, capability = device_here()
    query = jax.ShapeDtypeStruct((1, 128, 2, 64), "bfloat16")
    mask = attention.AttentionMask(jnp.ones((1, 128), jnp.int32))
    assert platform == "gpu" and not attention._gpu_lacks(query, mask, capability, drops=False)


@pytest.mark.parametrize("platform, device, kernels", [
    ("cuda", ("gpu", "9.0"), {
        "@__cudnn$fmhaScaleBiasSoftmax(": 2, 'name = "_forward"': 1, 'name = "_backward"': 1,
        'name = "row_losses"': 1, 'name = "layer_norm"': 4}),
    ("tpu", ("tpu", "TPU v6 lite"), {"@tpu_custom_call(": 6})])
def test_a_switch_leaves_an_update_without_kernels(platform, device, kernels, monkeypatch):
    """Lowered without its device; the teacher has two layers, the student one."""
    inside = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
    monkeypatch.setattr(inside, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(inside, "check_compute_capability", lambda least: True)
    monkeypatch.setattr(products, "device_here", lambda: device)

    def update():
        config = DistilConfig(batch_size=16, accumulate=1, dtype="bfloat16")
        step = forecast._Step(config, bert.FAMILY, [SMALL], CHIPS["h100"], None)
        return step.trace(step.rows).lower(lowering_platforms=(platform,)).as_text()

    text = update()
    assert {kernel: text.count(kernel) for kernel in kernels} == kernels
    monkeypatch.setenv("DISTILBERT_JAX_KERNELS", "xla")
    assert "custom_call" not in update()


def test_float32_has_no_known_peak_on_gpus(monkeypatch):
    monkeypatch.setattr(forecast, "topology", lambda name: (CHIPS["h100"], None))
    with pytest.raises(UserError, match="--dtype float32 is not forecast for GPUs"):
        forecast.compile_only(
            DistilConfig(compile_only="h100:1", dtype="float32"), bert.FAMILY, [bert.BASE])


# Runs without the flags and devices that the tests' own JAX is given.
COMPILE = """
import dataclasses, json, sys
from distilbert_jax.benchmark import hlo
from distilbert_jax.benchmark.chips import topology
from distilbert_jax.jobs import forecast
from distilbert_jax.config import DistilConfig
from distilbert_jax.models import bert
from distilbert_jax.machine.sharding import make_mesh
import jax
name, mesh, batch_size = sys.argv[1:]
config = DistilConfig(compile_only=name, mesh=mesh, batch_size=int(batch_size), accumulate=2)
step = forecast._Step(config, bert.FAMILY, [dataclasses.replace(bert.BASE, num_hidden_layers=2)],
                      *topology(name))
done = step.compile(step.rows)
program = hlo.read(done.program.as_text(), done.known)
traced = hlo.product_flops(step.trace(step.rows).jaxpr) / step.mesh.size
need = done.program.memory_analysis()
print(json.dumps({
    "rows": step.rows, "shapes": sorted(program.shapes), "flops": program.flops, "traced": traced,
    "sizes": [4 * leaf.size for leaf in jax.tree.leaves(step.state.params)],
    "arguments": need.argument_size_in_bytes, "fixed": step.fixed,
    "collectives": [dataclasses.asdict(c) for c in program.collectives]}))
"""


def compiled(*arguments, **more):
    environment = more | {k: v for k, v in os.environ.items()
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
        # What the model axis does not divide, each of its devices computes.
        assert 0.98 < found["flops"] / found["traced"] < (1.02 if model == 1 else 1.2)

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
                     "| all-reduce over 8 chips, ", "The run, 300 updates of 16,384 tokens: ",
                     "| **kernels, one after another", "| of these: vocabulary head | "):
            assert text in done.stdout

    def test_too_large_a_batch(self, command):
        done = compiled(*command, "--batch-size", 2**16, "--sequence-length", 512)
        assert done.returncode == 2 and "Traceback" not in done.stderr
        line, = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        needs, accumulate = re.fullmatch(
            r"error: v5e:2x4 has 15.75 GiB a chip, and an update with 8192 rows at a time on "
            r"each needs (.*) GiB: --accumulate (\d+) fits; --remat needs less", line).groups()
        assert float(needs) > 15.75 and int(accumulate) > 1


# Attention on one card, as the kernel of the platform does it; its gradient where it drops out.
ATTEND = """
import sys
import jax
from distilbert_jax.benchmark import hlo
from distilbert_jax.benchmark.chips import topology
from distilbert_jax.kernels.attention import AttentionMask, attention
from distilbert_jax.kernels.dropout import Dropout
from distilbert_jax.machine.sharding import make_mesh, on_mesh, replicated
name, size, rate = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
mesh = make_mesh("1x1", topology(name)[1])
query = jax.ShapeDtypeStruct((2, 256, 4, size), "bfloat16")
segments = jax.ShapeDtypeStruct((2, 256), "int32")
seeds = jax.ShapeDtypeStruct((2, 2), "uint32")

def attend(x, segments, seeds):
    return attention(x, x, x, AttentionMask(segments), Dropout(rate, seeds) if rate else None)

def gradient(x, segments, seeds):
    return jax.grad(lambda x: (attend(x, segments, seeds) ** 2).sum().astype("float32"))(x)

call = on_mesh(gradient if rate else attend, mesh)
traced = jax.jit(call, in_shardings=replicated(mesh)).trace(query, segments, seeds)
text = traced.lower().compile().as_text()
program = hlo.read(text, hlo.kernel_flops(traced.jaxpr))
scores = [shape for shape in program.shapes if shape[-2:] == (256, 256)]
print(mesh.devices.flat[0].device_kind, text.count('target="__cudnn$fmha'),
      text.count('target="__gpu$xla.gpu.triton"'), len(scores), program.flops, sep="; ")
"""


def assembled(folder, kernel):
    """What the assembler says of a Pallas kernel in a dump of XLA's."""
    file, = [each for each in folder.glob("*.ptx") if f".entry {kernel}(" in each.read_text()]
    tools = find_spec("nvidia.cuda_nvcc").submodule_search_locations[0]
    target = re.search(r"\.target (\w+)", file.read_text())[1]
    done = subprocess.run([f"{tools}/bin/ptxas", "-v", f"-arch={target}", file, "-o", "/dev/null"],
                          capture_output=True, text=True, check=True)
    return done.stderr


# The vocabulary head on one card with all its losses and gradients; words are no round number.
PROJECT = """
import sys
import jax
from distilbert_jax.benchmark import hlo
from distilbert_jax.benchmark.chips import topology
from distilbert_jax.kernels.head import Head, Targets, Term, fused_losses
from distilbert_jax.machine.sharding import make_mesh, on_mesh, replicated
mesh = make_mesh("1x1", topology(sys.argv[1])[1])
states, weights = jax.ShapeDtypeStruct((32, 256, 64), "bfloat16"), jax.ShapeDtypeStruct(
    (32, 256), "float32")
head = Head(states, jax.ShapeDtypeStruct((5000, 64), "float32"),
            jax.ShapeDtypeStruct((5000,), "float32"))
targets = Targets(jax.ShapeDtypeStruct((32, 256), "int32"), weights, weights)

def losses(student, teacher, targets):
    terms = {name: Term(1.0, targets.soft_weights.sum(), None) for name in ("ce", "mlm", "mse")}
    return fused_losses(student, [(1.0, teacher)], targets, terms, 2.0)[0]

call = on_mesh(jax.grad(losses), mesh)
traced = jax.jit(call, in_shardings=replicated(mesh)).trace(head, head, targets)
text = traced.lower().compile().as_text()
program = hlo.read(text, hlo.kernel_flops(traced.jaxpr))
large = [kernel.bytes for kernel in program.kernels if kernel.bytes > 512 * 5120 * 4]
print(mesh.devices.flat[0].device_kind, len(large), max(large), program.flops, sep="; ")
"""

# The gradient of layer normalization on one card.
NORMALISE = """
import sys
import jax
from distilbert_jax.benchmark import hlo
from distilbert_jax.benchmark.chips import topology
from distilbert_jax.kernels.layer_norm import layer_norm
from distilbert_jax.machine.sharding import make_mesh, on_mesh, replicated
mesh, size = make_mesh("1x1", topology(sys.argv[1])[1]), int(sys.argv[2])
x = jax.ShapeDtypeStruct((8, 100, size), "bfloat16")
scale = jax.ShapeDtypeStruct((size,), "float32")

def pull(x, cotangent, scale, bias):
    return jax.vjp(lambda *a: layer_norm(*a, 1e-12), x, scale, bias)[1](cotangent)

call = jax.jit(on_mesh(pull, mesh), in_shardings=replicated(mesh))
program = hlo.read(call.lower(x, x, scale, scale).compile().as_text())
print(mesh.devices.flat[0].device_kind, max(each.bytes for each in program.kernels), sep="; ")
"""


class TestGPU:
    pytestmark = [pytest.mark.gpu_compile, pytest.mark.skipif(
        not find_spec("jax_cuda12_plugin"),
        reason='no CUDA compiler: pip install "jax[cuda12]"')]

    @pytest.mark.parametrize("kind", [kind for kind in CHIPS if CHIPS[kind].card])
    def test_cudnn_attends_on_every_card(self, kind):
        """It is given the mask as a matrix."""
        done = compiled("-c", ATTEND, f"{kind}:1", 64, 0.0)
        assert not done.returncode, done.stderr
        assert done.stdout.splitlines()[-1] == (
            f"{CHIPS[kind].card.name}; 1; 0; 1; {2 * 2 * (2 * 4 * 256 * 256 * 64)}")

    @pytest.mark.parametrize("size", [64, 128])
    @pytest.mark.parametrize("kind", [kind for kind in CHIPS if CHIPS[kind].card])
    def test_our_kernel_drops_out_on_every_card(self, kind, size):
        """No scores are in memory; it has two products forward and seven backward."""
        done = compiled("-c", ATTEND, f"{kind}:1", size, 0.1)
        assert not done.returncode, done.stderr
        assert done.stdout.splitlines()[-1] == (
            f"{CHIPS[kind].card.name}; 0; 2; 0; {9 * 2 * (2 * 4 * 256 * 256 * size)}")

    @pytest.mark.parametrize("kind", [kind for kind in CHIPS if CHIPS[kind].card])
    def test_our_kernel_of_the_losses_on_every_card(self, kind, tmp_path):
        """Of 512 positions and 5,000 words, filled up to 5,120, it reads the logits of both models
        and writes the gradient; beside the two products nothing has logits in memory."""
        done = compiled("-c", PROJECT, f"{kind}:1", XLA_FLAGS=f"--xla_dump_to={tmp_path}")
        assert not done.returncode, done.stderr
        logits, numbers = 512 * 5120 * 4, 512 * 4
        assert done.stdout.splitlines()[-1] == (
            f"{CHIPS[kind].card.name}; 3; {2 * logits + logits // 2 + 7 * numbers}; "
            f"{4 * 2 * 32 * 256 * 5120 * 64}")
        assert "0 bytes spill stores, 0 bytes spill loads" in assembled(tmp_path, "row_losses")

    @pytest.mark.parametrize("size", [768, 1024])
    @pytest.mark.parametrize("kind", [kind for kind in CHIPS if CHIPS[kind].card])
    def test_our_gradient_of_layer_norm_on_every_card(self, kind, size, tmp_path):
        """It reads two arrays and writes a third, and what its 13 programs leave."""
        done = compiled("-c", NORMALISE, f"{kind}:1", size, XLA_FLAGS=f"--xla_dump_to={tmp_path}")
        assert not done.returncode, done.stderr
        assert done.stdout.splitlines()[-1] == (
            f"{CHIPS[kind].card.name}; {3 * 800 * size * 2 + size * 4 + 2 * 13 * size * 4}")
        assert "0 bytes spill stores, 0 bytes spill loads" in assembled(tmp_path, "layer_norm")

    def test_an_update_has_neither_scores_nor_logits_in_memory(self):
        """Of BERT-base, but for its layers; the mask that cuDNN gets has no heads."""
        done = compiled("-c", COMPILE, "h100:1", "1x1", 32)
        assert not done.returncode, done.stderr
        found = json.loads(done.stdout.splitlines()[-1])
        words, positions = bert.BASE.vocab_size, found["rows"] * 128
        logits = [shape for shape in found["shapes"] for size in (words, words + -words % 128)
                  if size in shape and math.prod(shape) // size >= positions]
        scores = [shape for shape in found["shapes"]
                  if shape[-2:] == [128, 128] and math.prod(shape) > positions * 128]
        assert found["rows"] == 16 and not logits and not scores

    @pytest.fixture
    def command(self, tmp_path):
        """Of a BERT of two layers; nothing but its config.json is there."""
        shape = bert.FAMILY.to_hf(SMALL)
        (tmp_path / "config.json").write_text(json.dumps(shape | {"model_type": "bert"}))
        return "experiments/run.py", "--compile-only", "h100:2", "--teacher", tmp_path

    def test_the_command(self, command):
        done = compiled(*command, "--steps", 300)
        assert not done.returncode, done.stderr
        for text in ("h100:2, mesh 2x1: 2 layers → 1, bfloat16", "| together, of 59.33 | ",
                     "| **kernels, one after another", "| of these: attention | ",
                     "| all-reduce over 2 chips, ", "The run, 300 updates of ",
                     "no kernel was tuned to it"):
            assert text in done.stdout

    def test_too_large_a_batch(self, command):
        done = compiled(*command, "--batch-size", 2**17, "--sequence-length", 512)
        assert done.returncode == 2 and "Traceback" not in done.stderr
        line, = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        needs, accumulate = re.fullmatch(
            r"error: h100:2 has 59.33 GiB a chip, and an update with 65536 rows at a time on "
            r"each needs (.*) GiB: --accumulate (\d+) fits; --remat needs less", line).groups()
        assert float(needs) > 59.33 and int(accumulate) > 1

"""Where arrays lie, and that it changes nothing: every mesh takes the same steps."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, PartitionSpec

from distilbert_jax.errors import UserError
from distilbert_jax.machine.sharding import (
    SHARDING_ROWS,
    by_rows,
    local_rows,
    make_mesh,
    place_rows,
    replicated,
    shardings,
)
from distilbert_jax.machine.trees import path_name
from distilbert_jax.models.encoder import abstract_params

pytestmark = pytest.mark.skipif(
    jax.device_count() != 8, reason="needs 8 devices (JAX_NUM_CPU_DEVICES=8)")


def mesh_of(shape):
    """Like make_mesh, also on fewer devices than there are."""
    data, model = map(int, shape.split("x"))
    devices = np.array(jax.devices()[:data * model]).reshape(data, model)
    return Mesh(devices, ("data", "model"), axis_types=(AxisType.Auto,) * 2)


@pytest.mark.parametrize("shape, sizes", [
    ("", (8, 1)), ("8x1", (8, 1)), ("4x2", (4, 2)), ("1x8", (1, 8))])
def test_mesh(shape, sizes):
    mesh = make_mesh(shape)
    assert dict(mesh.shape) == dict(zip(("data", "model"), sizes, strict=True))
    assert mesh.axis_types == (AxisType.Auto,) * 2


@pytest.mark.parametrize("shape, message", [
    ("16x1", "--mesh 16x1 needs 16 devices, found 8 (simulate them with JAX_NUM_CPU_DEVICES=16)"),
    ("1x1", "needs 1 devices, found 8"),
    *[(bad, "must look like 8x1") for bad in ("8", "8x", "x8", "0x8", "-1x8", "2x2x2", "8 x 1")]])
def test_meshes_that_cannot_be(shape, message):
    with pytest.raises(UserError) as error:
        make_mesh(shape)
    assert message in str(error.value)


def test_parameters_lie_where_the_rows_say(tiny_model):
    config, params = tiny_model(num_hidden_layers=2)
    params = {"student": params,
              "projections": {"hidden": {"1": {"kernel": np.zeros((16, 24))}}}}
    mesh = mesh_of("2x4")
    placed = jax.device_put(params, shardings(params, mesh))
    used = set()
    for path, leaf in jax.tree_util.tree_leaves_with_path(placed):
        rows = [(p, s) for p, s in SHARDING_ROWS if re.search(p + "$", path_name(path))]
        assert len(rows) <= 1
        spec = rows[0][1] if rows else PartitionSpec()
        used |= {pattern for pattern, _ in rows}
        expected = tuple(size // (4 if axis == "model" else 1) for size, axis in zip(
            leaf.shape, [*spec, *[None] * leaf.ndim], strict=False))
        assert leaf.addressable_shards[0].data.shape == expected, path_name(path)
    assert used == {pattern for pattern, _ in SHARDING_ROWS}


def test_what_the_mesh_does_not_divide_is_replicated(tiny_model):
    config, _ = tiny_model(vocab_size=30522)
    places = shardings(abstract_params(config), mesh_of("2x4"))
    assert places["embeddings"]["word"]["embedding"] == replicated(mesh_of("2x4"))
    assert places["mlm_head"]["bias"] == replicated(mesh_of("2x4"))
    assert places["layers"][0]["ffn"]["up"]["kernel"].spec == PartitionSpec(None, "model")
    twice = shardings(abstract_params(config), mesh_of("4x2"))
    assert twice["embeddings"]["word"]["embedding"].spec == PartitionSpec("model", None)


def test_moments_lie_like_their_parameters(problem):
    mesh = mesh_of("2x4")
    places = shardings(jax.eval_shape(problem.state), mesh)
    adam = [s for s in jax.tree.leaves(places.opt_state, is_leaf=lambda x: hasattr(x, "mu"))
            if hasattr(s, "mu")]
    assert len(adam) == 1
    assert adam[0].mu == adam[0].nu == places.params == {
        "student": shardings(problem.params, mesh), "projections": {}}
    assert places.step == places.key == adam[0].count == replicated(mesh)


def run(problem, vocabulary, shape, accumulate=1):
    """The state and losses after three steps on a mesh, placed as in train.py."""
    mesh = mesh_of(shape)
    state = problem.state()
    places, whole = shardings(state, mesh), replicated(mesh)
    teacher_places = shardings(problem.teachers, mesh)
    step = jax.jit(
        problem.step(accumulate, mesh), donate_argnums=0, out_shardings=(places, whole),
        in_shardings=(places, teacher_places, whole, by_rows(mesh)))
    state = jax.device_put(state, places)
    teacher = jax.device_put(problem.teachers, teacher_places)
    losses = []
    for batch in problem.batches:
        state, metrics = step(state, teacher, vocabulary, jax.device_put(batch, by_rows(mesh)))
        losses.append({name: float(value) for name, value in metrics.items()})
    assert jax.tree.map(lambda leaf: leaf.sharding, state) == places
    jax.tree.map(np.testing.assert_array_equal, teacher, problem.teachers)
    return jax.device_get(state), losses


@pytest.fixture(scope="module")
def on_one_device(dropping, vocabulary):
    with jax.enable_x64(True):
        return run(dropping, vocabulary, "1x1")


@pytest.mark.parametrize("shape, accumulate", [
    ("8x1", 1), ("4x2", 2), ("2x4", 1), ("2x4", 4), ("1x8", 1)])
def test_every_mesh_takes_the_same_steps(
        shape, accumulate, dropping, vocabulary, on_one_device, x64, caplog):
    with jax.log_compiles():
        state, losses = run(dropping, vocabulary, shape, accumulate)
    assert caplog.text.count("Finished XLA compilation of jit(train_step)") == 1
    expected, expected_losses = on_one_device
    for ours, theirs in zip(losses, expected_losses, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-11)
    for part in ("params", "opt_state"):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-11),
                     getattr(state, part), getattr(expected, part))
    assert state.step == 3


def test_one_process_gives_all_rows():
    batch = np.arange(48).reshape(16, 3)
    for shape in ("8x1", "4x2", "1x8"):
        mesh = mesh_of(shape)
        assert local_rows(mesh, 16).tolist() == list(range(16))
        placed = place_rows({"ids": batch}, mesh, 16)["ids"]
        assert placed.sharding == by_rows(mesh)
        np.testing.assert_array_equal(placed, batch)


TWO_PROCESSES = """
import sys, jax, numpy as np
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
from distilbert_jax.machine.sharding import local_rows, make_mesh, place_rows
for shape in ("4x1", "2x2", "1x4"):
    mesh, batch = make_mesh(shape), np.arange(24).reshape(8, 3)
    own = local_rows(mesh, 8)
    placed = place_rows({"ids": batch[own]}, mesh, 8)["ids"]
    assert placed.shape == batch.shape
    for shard in placed.addressable_shards:
        np.testing.assert_array_equal(shard.data, batch[shard.index])
    total = jax.jit(lambda x: (x * np.arange(8)[:, None]).sum())(placed)
    assert int(total) == (batch * np.arange(8)[:, None]).sum()
    with open(sys.argv[3], "a") as file:  # the standard output is Gloo's as well
        print(shape, own.tolist(), file=file)
"""


def test_each_of_two_processes_reads_only_its_own_rows(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    files = [tmp_path / str(number) for number in range(2)]
    processes = [subprocess.Popen(
        [sys.executable, "-c", TWO_PROCESSES, address, str(number), file],
        cwd=Path(__file__).parents[1], env=os.environ | {"JAX_NUM_CPU_DEVICES": "2"})
        for number, file in enumerate(files)]
    assert [process.wait(timeout=300) for process in processes] == [0, 0]
    said = [file.read_text().splitlines() for file in files]
    everything, (first, second) = list(range(8)), (list(range(4)), list(range(4, 8)))
    assert said == [[f"4x1 {first}", f"2x2 {first}", f"1x4 {everything}"],
                    [f"4x1 {second}", f"2x2 {second}", f"1x4 {everything}"]]

"""Checkpoints: what comes back is what went in, on any mesh; another run and damage are told."""

import dataclasses
import errno
import json
import os
import re
import resource
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_seal import DAMAGES, assert_every_damage_is_found, flip
from test_sharding import mesh_of

from distilbert_jax.errors import UserError
from distilbert_jax.machine import seal
from distilbert_jax.machine.sharding import shardings
from distilbert_jax.training.checkpoint import (
    Checkpoints,
    abstract,
    refuse_other_run,
    refuse_to_finish,
)
from distilbert_jax.training.train_step import init_state

pytestmark = pytest.mark.skipif(jax.device_count() != 8, reason="needs 8 devices")
SETTINGS = {"--teacher": "a" * 64, "--temperature": 2.0}


@pytest.fixture(scope="module")
def state(tiny_model):
    """Parameters, moments that are not 0, and a key."""
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tiny_model()[1])
    tx = optax.adamw(0.1)
    state = init_state(params, tx, seed=7)
    _, moments = tx.update(params, state.opt_state, params)
    return dataclasses.replace(state, opt_state=moments)


def at(state, step):
    return dataclasses.replace(state, step=jnp.asarray(step, jnp.int32))


def place(state, shape):
    return jax.device_put(state, shardings(state, mesh_of(shape)))


def like(state, shape="8x1"):
    return abstract(state, shardings(state, mesh_of(shape)))


def save(output, *states, **options):
    with Checkpoints(output, SETTINGS, **options) as checkpoints:
        for state in states:
            checkpoints.save(state)


def restore(output, wanted):
    with Checkpoints(output, SETTINGS) as checkpoints:
        return checkpoints.restore(wanted)


def numbers(state):
    """As NumPy arrays, the key as its data."""
    return jax.tree.map(np.asarray, dataclasses.replace(state, key=jax.random.key_data(state.key)))


@pytest.fixture(scope="module")
def saved(state, tmp_path_factory):
    """A run that saved updates 3, 5 and 9 from a 8x1 mesh, and left the block at once."""
    output = tmp_path_factory.mktemp("saved")
    save(output, *(place(at(state, step), "8x1") for step in (3, 5, 9)))
    return output


@pytest.mark.parametrize("shape", ["8x1", "4x2", "1x1"])
def test_bit_for_bit_on_any_mesh(shape, state, saved):
    back = restore(saved, like(state, shape))
    assert jax.tree.structure(back) == jax.tree.structure(state)
    assert back.step == 9
    assert jax.tree.map(lambda x: x.sharding, back) == shardings(state, mesh_of(shape))
    assert back.key.dtype == state.key.dtype
    jax.tree.map(np.testing.assert_array_equal, numbers(back), numbers(at(state, 9)))


def test_two_are_kept(saved):
    assert {path.name for path in (saved / "checkpoints").iterdir()} == {"5", "9"}


def test_saving_the_same_update_twice(state, tmp_path):
    save(tmp_path, at(state, 3), at(state, 3))
    save(tmp_path, at(state, 3))
    assert restore(tmp_path, like(state)).step == 3


def test_the_beginning(state, tmp_path):
    assert restore(tmp_path, like(state)) is None
    refuse_other_run(tmp_path / "absent", SETTINGS)


def test_another_run_is_refused_field_by_field(state, saved):
    refuse_other_run(saved, SETTINGS)
    refuse_other_run(saved, {"--temperature": 2.0})  # the rest is not known yet
    other = SETTINGS | {"--teacher": "b" * 64, "--temperature": 4.0}
    for refuse in (lambda: refuse_other_run(saved, other),
                   lambda: Checkpoints(saved, other).restore(like(state))):
        with pytest.raises(UserError) as error:
            refuse()
        assert str(error.value) == (
            f"{saved} holds the checkpoints of another run (--teacher was aaaaaaaaaaaa…, is "
            "bbbbbbbbbbbb…; --temperature was 2.0, is 4.0); choose another --output, or remove it")


def test_a_setting_that_is_no_longer_given_is_another_run(state, tmp_path):
    """The weight of a loss, say, that is 0 now: it is no longer among the settings."""
    given = SETTINGS | {"--alpha-cos": 1.0, "--model": ""}
    with Checkpoints(tmp_path, given) as checkpoints:
        checkpoints.save(at(state, 3))
    for settings, line in ((SETTINGS | {"--model": ""}, "--alpha-cos was 1.0, is none"),
                           (given | {"--model": "mine"}, "--model was none, is mine")):
        with pytest.raises(UserError, match=re.escape(f"another run ({line});")):
            Checkpoints(tmp_path, settings).restore(like(state))


def folder_of(output, step):
    return output / "checkpoints" / str(step)


@pytest.mark.parametrize("kind", DAMAGES)
def test_damage_to_any_file_is_found(kind, saved, tmp_path):
    """Every file that Orbax or we wrote, one after the other."""
    folder = shutil.copytree(folder_of(saved, 9), tmp_path / "9")
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 8 and any("ocdbt" in path.name for path in files)
    assert_every_damage_is_found(folder, kind)


def largest(folder):
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


@pytest.mark.parametrize("kind", [*DAMAGES, "empty folder"])
def test_it_goes_back_to_the_newest_sound_one(kind, state, saved, tmp_path, capfd):
    output = shutil.copytree(saved, tmp_path / "copy")
    folder = folder_of(output, 9)
    if kind == "empty folder":
        shutil.rmtree(folder)
        folder.mkdir()
    else:
        DAMAGES[kind](largest(folder))
    (output / "checkpoints" / "stray.txt").write_text("")
    (output / "checkpoints" / "stray").mkdir()
    (output / "checkpoints" / "12.new.orbax-checkpoint-tmp" / "d").mkdir(parents=True)
    (output / "checkpoints" / "3.old").mkdir()
    refuse_other_run(output, SETTINGS)
    back = restore(output, like(state))
    jax.tree.map(np.testing.assert_array_equal, numbers(back), numbers(at(state, 5)))
    said = capfd.readouterr().err
    assert said.startswith(f"checkpoint {folder} is not sound: ") and said.count("\n") == 1
    assert said.endswith("; going back to update 5\n")
    left = {path.name for path in (output / "checkpoints").iterdir()}
    assert left == {"5", "stray", "stray.txt"}
    save(output, at(state, 9))  # which can be saved anew
    assert restore(output, like(state)).step == 9


def test_an_older_damaged_one_is_named_and_removed(state, saved, tmp_path, capfd):
    output = shutil.copytree(saved, tmp_path / "copy")
    flip(largest(folder_of(output, 5)))
    assert restore(output, like(state)).step == 9
    assert capfd.readouterr().err.endswith("is damaged (its SHA-256 differs)\n")
    assert not folder_of(output, 5).exists()


def test_without_a_sound_one_it_stops_and_removes_nothing(state, saved, tmp_path):
    output = shutil.copytree(saved, tmp_path / "copy")
    (folder_of(output, 9) / "sha256.json").unlink()
    flip(folder_of(output, 5) / "run.json")
    for refuse in (lambda: refuse_other_run(output, SETTINGS),
                   lambda: restore(output, like(state))):
        with pytest.raises(UserError) as error:
            refuse()
        assert str(error.value) == (
            f"no checkpoint in {output / 'checkpoints'} is sound ({folder_of(output, 9)}: "
            "sha256.json is missing): put back a copy, or remove that folder to train from the "
            "beginning")
    assert folder_of(output, 9).exists() and folder_of(output, 5).exists()


def test_a_sound_one_of_another_shape_is_named(state, saved):
    other = dataclasses.replace(state, params={"other": jnp.zeros(3)})
    with pytest.raises(UserError) as error:
        restore(saved, like(other))
    assert f"checkpoint {folder_of(saved, 9)} cannot be read" in str(error.value)
    assert "\n" not in str(error.value)


def test_the_last_and_the_best_are_kept(state, tmp_path):
    losses = {1: 3.0, 2: 1.0, 3: None, 4: 2.0, 5: float("nan"), 6: 1.5}
    with Checkpoints(tmp_path, SETTINGS, keep=2) as checkpoints:
        for step, loss in losses.items():
            checkpoints.save(at(state, step), None if loss is None else {"mlm_loss": loss})
    assert checkpoints.steps == [2, 5, 6]
    run = json.loads((folder_of(tmp_path, 2) / "run.json").read_text())
    assert run == {"settings": SETTINGS, "figures": {"mlm_loss": 1.0}}
    save(tmp_path, at(state, 7), keep=1)
    assert checkpoints.steps == [2, 7]


def restore_best(output, wanted):
    with Checkpoints(output, SETTINGS) as checkpoints:
        return checkpoints.restore(wanted, best=True)


def test_the_best_is_read_where_it_is_asked_for(state, tmp_path):
    with pytest.raises(UserError, match="--finish last: there is no checkpoint in .*checkpoints; "):
        refuse_to_finish(tmp_path, "last")
    save(tmp_path, at(state, 1))
    refuse_to_finish(tmp_path, "last")
    for refuse in (lambda: refuse_to_finish(tmp_path, "best"),
                   lambda: restore_best(tmp_path, like(state))):
        with pytest.raises(UserError, match="--finish best: no checkpoint in .* has held-out fig"):
            refuse()
    with Checkpoints(tmp_path, SETTINGS, keep=9) as checkpoints:
        for step, loss in {2: 2.0, 3: 1.0, 4: float("nan"), 5: 3.0, 6: 1.0}.items():
            checkpoints.save(at(state, step), {"mlm_loss": loss})
    refuse_to_finish(tmp_path, "best")
    assert restore_best(tmp_path, like(state)).step == 3
    assert restore(tmp_path, like(state)).step == 6
    for damaged, best in ((3, 6), (6, 2)):
        flip(largest(folder_of(tmp_path, damaged)))
        assert restore_best(tmp_path, like(state)).step == best


def no_space(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


FULL = {  # what fails when the disk is full: in Orbax at once and in its thread, and in ours
    "at once": "orbax.checkpoint.StandardCheckpointer.save",
    "writing": "orbax.checkpoint._src.serialization.jax_array_handlers.serialization."
               "async_serialize_from_host",
    "committing": "orbax.checkpoint._src.checkpointers.async_checkpointer._on_commit_callback",
    "hashing": "distilbert_jax.machine.seal._digest",
    "sealing": "distilbert_jax.machine.seal.write_json",
    "naming": "pathlib.Path.rename",
}


@pytest.mark.parametrize("where", FULL)
@pytest.mark.parametrize("policy", ["stop", "continue"])
def test_a_full_disk(policy, where, state, tmp_path, monkeypatch, capfd):
    """Said in one line; the last sound one stays; the next save has room again."""
    save(tmp_path, at(state, 3))
    said = (f"update 5 cannot be saved in {tmp_path / 'checkpoints'} (No space left on device); "
            "update 3 is the last saved")
    with Checkpoints(tmp_path, SETTINGS, on_save_error=policy) as checkpoints:
        with monkeypatch.context() as patch:
            patch.setattr(FULL[where], no_space)
            if policy == "stop":
                with pytest.raises(UserError) as error:
                    checkpoints.save(at(state, 5))
                    checkpoints.wait()
                assert str(error.value) == f"{said}; when there is room, the same command goes on"
            else:
                checkpoints.save(at(state, 5))
                checkpoints.wait()
                assert capfd.readouterr().err == f"{said}; going on without\n"
        assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["3"]
        checkpoints.save(at(state, 6))
    assert capfd.readouterr().err == ""
    jax.tree.map(np.testing.assert_array_equal, numbers(restore(tmp_path, like(state))),
                 numbers(at(state, 6)))


def test_a_failed_save_is_told_by_the_next_one_and_at_the_end(state, tmp_path, monkeypatch):
    monkeypatch.setattr(seal, "_digest", no_space)
    with pytest.raises(UserError, match="update 3 cannot be saved"):
        save(tmp_path, at(state, 3), at(state, 5))
    with pytest.raises(UserError, match="update 5 cannot be saved"):
        save(tmp_path, at(state, 5))
    with pytest.raises(RuntimeError, match="first"), Checkpoints(tmp_path, SETTINGS) as checkpoints:
        checkpoints.save(at(state, 5))
        raise RuntimeError("first")
    assert checkpoints.steps == []


def test_the_system_refuses_to_write(state, tmp_path):
    """No file may grow beyond 2,000 bytes: a real error from below, in whoever writes."""
    save(tmp_path, at(state, 3))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Checkpoints(tmp_path, SETTINGS) as checkpoints:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
        try:
            with pytest.raises(UserError, match=r"update 5 cannot .* \(File too large\)"):
                checkpoints.save(at(state, 5))
                checkpoints.wait()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert restore(tmp_path, like(state)).step == 3


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(UserError, match="checkpoints cannot be used: File exists"):
        Checkpoints(tmp_path, SETTINGS)

"""Every setting that gives a run its meaning reaches the update: without it, another program."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from test_sharding import mesh_of

from distilbert_jax.config import DistilConfig, Masking, PretrainConfig
from distilbert_jax.models import bert
from distilbert_jax.models.student import student_config
from distilbert_jax.training import assemble as module
from distilbert_jax.training.assemble import assemble

STEPS = 10
BASE = dict(batch_size=8, sequence_length=16, dtype="float32", warmup=0.5, weight_decay=0.1,
            alphas={"ce": 5.0, "mlm": 2.0, "cos": 1.0, "hidden": 1.0})
CHANGES = {
    "temperature": 3.0, "restrict_ce_to_mask": True, "hidden_map": "1:1", "dropout": 0.3,
    "learning_rate": 1e-3, "warmup": 0.2, "weight_decay": 0.0, "clip": 1.0, "accumulate": 2,
    "freeze_position_embeddings": True, "remat": True, "dtype": "bfloat16",
    **{f"alphas without {name}": BASE["alphas"] | {name: 0.0} for name in BASE["alphas"]}}


@pytest.fixture(scope="module")
def program(tiny_model, batch_of, vocabulary):
    """Function (config, steps) → the text of its update, traced only."""
    teacher, teacher_params = tiny_model(seed=1, num_hidden_layers=2)
    batch = batch_of([[9, 7]] * 8, 16)

    def trace(config, steps=STEPS):
        family, student = student_config(bert.FAMILY, teacher, 1, config.dropout)
        distils = isinstance(config, DistilConfig)
        assembly = assemble(config, family, student, [teacher] if distils else [],
                            mesh_of("1x1"), steps)
        params = jax.tree.map(jnp.asarray, tiny_model(
            num_hidden_layers=1, type_vocab_size=0)[1])
        teachers = assembly.teachers(teacher_params) if distils else {}
        traced = jax.make_jaxpr(assembly.train_step)(
            assembly.init(params), teachers, vocabulary, batch)
        # What is a function in the text has an address.
        return "\n".join(line for line in str(traced).splitlines() if "0x" not in line)

    return trace


@pytest.fixture(scope="module")
def base(program):
    return program(DistilConfig(**BASE))


@pytest.mark.parametrize("name", CHANGES)
def test_a_setting_changes_the_update(name, program, base):
    assert program(DistilConfig(**BASE | {name.split()[0]: CHANGES[name]})) != base


def test_nothing_else_does(program, base):
    """Neither a second look nor what only says where or how often."""
    assert program(DistilConfig(**BASE)) == base
    assert program(DistilConfig(**BASE, keep=5, eval_every=3, output="elsewhere")) == base


def test_the_rate_falls_over_the_steps_of_the_run(program, base):
    assert program(DistilConfig(**BASE), steps=2 * STEPS) != base


def test_rows_of_an_update_are_cut(program):
    text = program(DistilConfig(**BASE | {"accumulate": 4}))
    assert "length=4" in text and "length=4" not in program(DistilConfig(**BASE))


@pytest.mark.parametrize("config, masking", [
    (DistilConfig(**BASE), Masking()), (PretrainConfig(), Masking(smoothing=0.0)),
    (DistilConfig(**BASE, mask_rate=0.4), Masking(rate=0.4)),
    (PretrainConfig(mask_rate=0.3), Masking(rate=0.3, smoothing=0.0))])
def test_how_a_job_masks(config, masking, program, monkeypatch):
    seen, mask = [], module.LABELS["mlm"]

    def noted(keys, batch, vocabulary, masking):
        seen.append(masking)
        return mask(keys, batch, vocabulary, masking)

    monkeypatch.setitem(module.LABELS, "mlm", noted)
    program(dataclasses.replace(config, batch_size=8))
    assert set(seen) == {masking}

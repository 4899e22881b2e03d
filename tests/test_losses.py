"""The losses against torch's modules and against their definitions in NumPy float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distilbert_jax.training import losses

RANDOM = np.random.default_rng(0)
STUDENT, TEACHER = 3 * RANDOM.normal(size=(2, 3, 5, 11))  # [B, K, V], also as [B, T, D]
LABELS = RANDOM.integers(0, 11, (3, 5))
WEIGHTS = np.array([[1, 1, 0, 0, 1], [0, 0, 0, 0, 0], [1, 0, 1, 1, 1.0]])
CHOSEN = WEIGHTS > 0
TAU = 3.0

# name → (ours as a function of the student, the student's array)
OURS = {
    "kl": lambda s: losses.kl_sum(s, jnp.asarray(TEACHER), jnp.asarray(WEIGHTS), TAU),
    "mlm": lambda s: losses.mlm_sum(s, jnp.asarray(LABELS), jnp.asarray(WEIGHTS)),
    "cosine": lambda s: losses.cosine_sum(s, jnp.asarray(TEACHER), jnp.asarray(WEIGHTS)),
    "mse": lambda s: losses.mse_sum(s, jnp.asarray(TEACHER), jnp.asarray(WEIGHTS)),
}


def log_softmax(x):
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def by_definition(name):
    if name == "kl":
        t, s = log_softmax(TEACHER / TAU), log_softmax(STUDENT / TAU)
        each = TAU**2 * (np.exp(t) * (t - s)).sum(-1)
    elif name == "mlm":
        each = -np.take_along_axis(log_softmax(STUDENT), LABELS[..., None], -1)[..., 0]
    elif name == "cosine":
        norms = np.linalg.norm(STUDENT, axis=-1) * np.linalg.norm(TEACHER, axis=-1)
        each = 1 - (STUDENT * TEACHER).sum(-1) / norms
    else:
        each = ((STUDENT - TEACHER) ** 2).sum(-1)
    return each[CHOSEN].sum()


def by_torch(name):
    """Value and gradient of torch's own modules over the chosen positions, times their number."""
    torch = pytest.importorskip("torch")
    student = torch.tensor(STUDENT, requires_grad=True)
    s, t, n = student[CHOSEN], torch.tensor(TEACHER)[CHOSEN], int(CHOSEN.sum())
    if name == "kl":
        value = n * TAU**2 * torch.nn.KLDivLoss(reduction="batchmean")(
            (s / TAU).log_softmax(-1), (t / TAU).softmax(-1))
    elif name == "mlm":
        value = n * torch.nn.CrossEntropyLoss()(s, torch.tensor(LABELS)[CHOSEN])
    elif name == "cosine":
        value = n * torch.nn.CosineEmbeddingLoss()(s, t, torch.ones(n))
    else:
        value = torch.nn.MSELoss(reduction="sum")(s, t)
    value.backward()
    return value.item(), student.grad.numpy()


@pytest.mark.parametrize("name", OURS)
def test_value_and_gradient(name, x64):
    value, gradient = jax.value_and_grad(OURS[name])(jnp.asarray(STUDENT))
    np.testing.assert_allclose(value, by_definition(name), rtol=1e-12)
    torch_value, torch_gradient = by_torch(name)
    np.testing.assert_allclose(value, torch_value, rtol=1e-12)
    np.testing.assert_allclose(gradient, torch_gradient, rtol=0, atol=1e-12)
    assert (np.asarray(gradient)[~CHOSEN] == 0).all()


def test_a_perfect_student_loses_nothing():
    x, weights = jnp.asarray(TEACHER, jnp.float32), jnp.ones((3, 5))
    for loss in (losses.mse_sum, losses.cosine_sum, lambda *a: losses.kl_sum(*a, TAU)):
        np.testing.assert_allclose(loss(x, x, weights), 0, atol=15 * np.finfo(np.float32).eps)


@pytest.mark.parametrize("name", ["kl", "mlm"])
def test_extreme_logits_are_finite_in_float32(name):
    extreme = jnp.where(jnp.asarray(STUDENT) > 0, 1e4, -1e4).astype(jnp.float32)
    value, gradient = jax.value_and_grad(OURS[name])(extreme)
    assert jnp.isfinite(value) and jnp.isfinite(gradient).all()


def test_cosine_of_zeros_is_finite_and_of_halves_is_wide():
    zeros = jnp.zeros((2, 4))
    value, gradient = jax.value_and_grad(losses.cosine_sum)(zeros, zeros, jnp.ones(2))
    assert value == 2 and jnp.isfinite(gradient).all()
    halves = jnp.asarray(STUDENT[0], jnp.bfloat16)
    assert losses.cosine_sum(halves, halves, jnp.ones(5)).dtype == jnp.float32

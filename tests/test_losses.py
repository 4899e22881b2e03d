"""Every row of LOSSES by its definition in NumPy float64; those that torch has, also against it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distilbert_jax.kernels.head import CLOSED, Head, Targets, Term, fused_losses
from distilbert_jax.training import losses
from distilbert_jax.training.losses import LOSSES

RANDOM = np.random.default_rng(0)
STUDENT, TEACHER = 3 * RANDOM.normal(size=(2, 3, 5, 11))  # [B, K, V], also as [B, T, D]
LABELS = RANDOM.integers(0, 11, (3, 5))
WEIGHTS = np.array([[1, 1, 0, 0, 1], [0, 0, 0, 0, 0], [1, 0, 1, 1, 1.0]])
CHOSEN = WEIGHTS > 0
TAU = 3.0
SETTINGS = {"temperature": TAU, "similarity_temperature": 0.5}
KNOWN = RANDOM.integers(0, 2, 15) + 0.0  # sentences of a batch that are there


def ours(name, student, teacher=TEACHER):
    row = LOSSES[name]
    target = LABELS if row.needs in ("labels", "targets") else teacher
    settings = {setting: SETTINGS[setting] for setting in row.settings}
    target = jnp.asarray(target, float if row.needs == "targets" else None)
    more = (target.reshape(15, 11), jnp.asarray(KNOWN)) if row.needs == "similarities" else ()
    return row.sum(student, target, jnp.asarray(WEIGHTS), *more, **settings)


def log_softmax(x):
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def kl(s, t):
    t, s = log_softmax(t / TAU), log_softmax(s / TAU)
    return TAU**2 * (np.exp(t) * (t - s)).sum(-1)


def cosine(s, t):
    return 1 - (s * t).sum(-1) / (np.linalg.norm(s, axis=-1) * np.linalg.norm(t, axis=-1))


def similarities(s, t):
    """KL of softmaxes of cosines to the teacher's vectors that are there."""
    def unit(x):
        return x / np.linalg.norm(x, axis=-1, keepdims=True)

    there = unit(t.reshape(15, 11))[KNOWN > 0]
    own, theirs = (log_softmax(unit(x) @ there.T / 0.5) for x in (s, t))
    return (np.exp(theirs) * (theirs - own)).sum(-1)


# A new row of LOSSES is written down here once more, after its paper; the tests do the rest.
DEFINITIONS = {
    "ce": kl,
    "mlm": lambda s, _: -np.take_along_axis(log_softmax(s), LABELS[..., None], -1)[..., 0],
    "cos": cosine,
    "mse": lambda s, t: ((s - t) ** 2).sum(-1),
    "hidden": lambda s, t: ((s - t) ** 2).sum(-1) / (t**2).sum(-1),
}
DEFINITIONS |= {"hard": DEFINITIONS["mlm"], "soft": kl, "vector": DEFINITIONS["mse"],
                "angle": cosine, "similarity": similarities}


@pytest.mark.parametrize("name, other", [("hard", LABELS / 2.0), ("soft", TEACHER[..., :1])])
def test_one_logit_is_a_number(name, other, x64):
    """As in transformers, the loss of a regression is the squared error."""
    row, numbers = LOSSES[name], STUDENT[..., :1]
    settings = {setting: SETTINGS[setting] for setting in row.settings}
    found = row.sum(jnp.asarray(numbers), jnp.asarray(other), jnp.asarray(WEIGHTS), **settings)
    errors = (numbers[..., 0] - other.reshape(3, 5)) ** 2
    np.testing.assert_allclose(found, (WEIGHTS * errors).sum(), rtol=1e-12)


def by_torch(name):
    """Value and gradient of torch's own modules over the chosen positions, times their number."""
    torch = pytest.importorskip("torch")
    student = torch.tensor(STUDENT, requires_grad=True)
    s, t, n = student[CHOSEN], torch.tensor(TEACHER)[CHOSEN], int(CHOSEN.sum())
    value = {
        "ce": lambda: n * TAU**2 * torch.nn.KLDivLoss(reduction="batchmean")(
            (s / TAU).log_softmax(-1), (t / TAU).softmax(-1)),
        "mlm": lambda: n * torch.nn.CrossEntropyLoss()(s, torch.tensor(LABELS)[CHOSEN]),
        "cos": lambda: n * torch.nn.CosineEmbeddingLoss()(s, t, torch.ones(n)),
        "mse": lambda: torch.nn.MSELoss(reduction="sum")(s, t)}[name]()
    value.backward()
    return value.item(), student.grad.numpy()


@pytest.mark.parametrize("name", LOSSES)
def test_value_and_gradient(name, x64):
    """The gradient against differences of the definition along random directions."""
    value, gradient = jax.value_and_grad(lambda s: ours(name, s))(jnp.asarray(STUDENT))
    define = DEFINITIONS[name]
    np.testing.assert_allclose(value, define(STUDENT, TEACHER)[CHOSEN].sum(), rtol=1e-12)
    assert (np.asarray(gradient)[~CHOSEN] == 0).all()
    for _ in range(3):
        direction = RANDOM.normal(size=STUDENT.shape)
        up, down = (define(STUDENT + step * direction, TEACHER)[CHOSEN].sum()
                    for step in (1e-5, -1e-5))
        np.testing.assert_allclose((gradient * direction).sum(), (up - down) / 2e-5, rtol=1e-6)


@pytest.mark.parametrize("name", ["ce", "mlm", "cos", "mse"])
def test_equals_torch(name, x64):
    value, gradient = jax.value_and_grad(lambda s: ours(name, s))(jnp.asarray(STUDENT))
    torch_value, torch_gradient = by_torch(name)
    np.testing.assert_allclose(value, torch_value, rtol=1e-12)
    np.testing.assert_allclose(gradient, torch_gradient, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", [n for n, row in LOSSES.items() if row.needs not in (
    "labels", "targets")])
def test_a_perfect_student_loses_nothing(name):
    x = jnp.asarray(TEACHER, jnp.float32)
    np.testing.assert_allclose(ours(name, x, x), 0, atol=30 * np.finfo(np.float32).eps)


@pytest.mark.parametrize("name", [n for n, row in LOSSES.items() if row.needs != "hidden"])
def test_extreme_values_are_finite_in_float32(name):
    extreme = jnp.where(jnp.asarray(STUDENT) > 0, 1e4, -1e4).astype(jnp.float32)
    value, gradient = jax.value_and_grad(lambda s: ours(name, s))(extreme)
    assert jnp.isfinite(value) and jnp.isfinite(gradient).all()


@pytest.mark.parametrize("name", [n for n, row in LOSSES.items() if row.needs in (
    "last", "hidden")])
def test_zeros_are_finite_and_halves_are_wide(name):
    value, gradient = jax.value_and_grad(LOSSES[name].sum)(
        jnp.zeros((2, 4)), jnp.zeros((2, 4)), jnp.ones(2))
    assert jnp.isfinite(value) and jnp.isfinite(gradient).all()
    halves = jnp.asarray(STUDENT[0], jnp.bfloat16)
    assert LOSSES[name].sum(halves, halves, jnp.ones(5)).dtype == jnp.float32


def test_cosine_of_zeros():
    assert losses.cos_sum(jnp.zeros((2, 4)), jnp.zeros((2, 4)), jnp.ones(2)) == 2


@pytest.mark.parametrize("name", [n for n, row in LOSSES.items() if row.needs in (
    "labels", "logits")])
def test_the_fused_head_has_the_value_and_gradient_of_the_row(name, x64):
    """Whether it is written out there (CLOSED) or differentiated."""
    row, weight = LOSSES[name], jnp.asarray(7.0)

    def definition(*given):
        return row.sum(*given, **{setting: SETTINGS[setting] for setting in row.settings})

    def fused(states):
        heads = [Head(x, jnp.eye(11), jnp.zeros(11)) for x in (states, jnp.asarray(TEACHER))]
        targets = Targets(jnp.asarray(LABELS), jnp.asarray(WEIGHTS), jnp.asarray(WEIGHTS))
        return fused_losses(*heads, targets, {name: Term(2.0, weight, definition)}, TAU)[0]

    student = jnp.asarray(STUDENT)
    found = jax.value_and_grad(fused)(student)
    expected = jax.value_and_grad(lambda s: 2.0 * ours(name, s) / weight)(student)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-12),
                 found, expected)


def test_what_is_closed_is_a_loss():
    assert set(CLOSED) <= set(LOSSES)

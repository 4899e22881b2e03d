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
SEGMENTS = np.array([[1, 1, 0, 0, 2], [0, 0, 0, 0, 0], [1, 0, 1, 1, 2]])  # 0 where WEIGHTS are
SETTINGS = {"temperature": TAU, "similarity_temperature": 0.5, "relation_heads": 1}
KNOWN = RANDOM.integers(0, 2, 15) + 0.0  # sentences of a batch that are there


def ours(name, student, teacher=TEACHER):
    return LOSSES[name].sum(*given(name, student, teacher), **settings_of(name))


def settings_of(name):
    return {setting: SETTINGS[setting] for setting in LOSSES[name].settings}


def given(name, student, teacher):
    """What the sum of a row takes, beside its settings."""
    row = LOSSES[name]
    target = LABELS if row.needs in ("labels", "targets") else teacher
    target = jnp.asarray(target, float if row.needs == "targets" else None)
    more = (target.reshape(15, 11), jnp.asarray(KNOWN)) if row.needs == "similarities" else ()
    if row.needs == "qkv":
        student, target, more = three(student), three(target), (jnp.asarray(SEGMENTS),)
    return student, target, jnp.asarray(WEIGHTS), *more


def three(x):
    """Queries, keys and values that are made of x, and differ."""
    return jnp.stack([x, x[..., ::-1] ** 2 / 9, -0.5 * x])


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


def skewed(s, t):
    p, q = (np.exp(log_softmax(x / TAU)) for x in (t, s))
    return TAU**2 * (p * np.log(p / (0.1 * p + 0.9 * q))).sum(-1)


def relations(q_k_v, heads, row, at):
    """Of each of the three, of each head: a position's softmax over its own document."""
    there = SEGMENTS[row] == SEGMENTS[row, at]
    for x in q_k_v:
        for part in np.split(x[row], heads, axis=-1):
            z = part[there] @ part[at] / np.sqrt(part.shape[-1])
            yield np.exp(z - z.max()) / np.exp(z - z.max()).sum()


def related(s, t, heads=1):
    """Of queries, keys and values [3, B, T, D], whose widths may differ."""
    found = np.zeros(SEGMENTS.shape)
    for row, at in np.ndindex(*SEGMENTS.shape):
        found[row, at] = np.mean([(p * np.log(p / q)).sum() for q, p in zip(
            relations(s, heads, row, at), relations(t, heads, row, at), strict=True)])
    return found


# A new row of LOSSES is written down here once more, after its paper; the tests do the rest.
DEFINITIONS = {
    "ce": kl,
    "mlm": lambda s, _: -np.take_along_axis(log_softmax(s), LABELS[..., None], -1)[..., 0],
    "cos": cosine,
    "mse": lambda s, t: ((s - t) ** 2).sum(-1),
    "hidden": lambda s, t: ((s - t) ** 2).sum(-1) / (t**2).sum(-1),
}
DEFINITIONS |= {"hard": DEFINITIONS["mlm"], "soft": kl, "vector": DEFINITIONS["mse"],
                "angle": cosine, "similarity": similarities, "inner": cosine, "skew": skewed,
                "relation": lambda s, t: related(*(np.asarray(three(x)) for x in (s, t)))}


@pytest.mark.parametrize("name, other", [("hard", LABELS / 2.0), ("soft", TEACHER[..., :1])])
def test_one_logit_is_a_number(name, other, x64):
    """As in transformers, the loss of a regression is the squared error."""
    row, numbers = LOSSES[name], STUDENT[..., :1]
    found = row.sum(jnp.asarray(numbers), jnp.asarray(other), jnp.asarray(WEIGHTS),
                    **settings_of(name))
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
    "last", "hidden", "qkv", "vectors", "similarities")])
def test_zeros_are_finite_and_sums_of_halves_are_wide(name):
    zeros = jnp.zeros((3, 5, 11))
    value, gradient = jax.value_and_grad(lambda s: ours(name, s, zeros))(zeros)
    assert jnp.isfinite(value) and jnp.isfinite(gradient).all()
    halves = given(name, *(jnp.asarray(x, jnp.bfloat16) for x in (STUDENT, TEACHER)))
    wide = [x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x for x in halves]
    found, expected = (LOSSES[name].sum(*x, **settings_of(name)) for x in (halves, wide))
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize("heads, widths", [(1, (6, 4)), (2, (6, 4)), (3, (9, 9)), (4, (4, 12))])
def test_relations_of_any_number_of_heads_and_of_other_widths(heads, widths, x64):
    q_k_v = [RANDOM.normal(size=(3, 3, 5, width)) for width in widths]

    def loss(student):
        return losses.relation_sum(student, jnp.asarray(q_k_v[1]), jnp.asarray(WEIGHTS),
                                   jnp.asarray(SEGMENTS), relation_heads=heads)

    value, gradient = jax.value_and_grad(loss)(jnp.asarray(q_k_v[0]))
    expected = (WEIGHTS * related(*q_k_v, heads)).sum()
    np.testing.assert_allclose(value, expected, rtol=1e-12)
    direction = RANDOM.normal(size=q_k_v[0].shape)
    up, down = ((WEIGHTS * related(q_k_v[0] + step * direction, q_k_v[1], heads)).sum()
                for step in (1e-5, -1e-5))
    np.testing.assert_allclose((gradient * direction).sum(), (up - down) / 2e-5, rtol=1e-6)


def test_relations_equal_torch(x64):
    """Values and gradients of torch's own operations, a document at a time."""
    torch = pytest.importorskip("torch")
    heads, d = 2, 3
    ours, theirs = RANDOM.normal(size=(2, 3, 3, 5, heads * d))
    student, teacher = torch.tensor(ours, requires_grad=True), torch.tensor(theirs)
    value = 0
    for row, number in ((0, 1), (0, 2), (2, 1), (2, 2)):
        at = torch.tensor(np.flatnonzero(SEGMENTS[row] == number))
        s, t = (x[:, row, at].unflatten(-1, (heads, d)).transpose(1, 2) for x in (student, teacher))
        scores = [x @ x.transpose(-1, -2) / d**0.5 for x in (s, t)]
        value = value + torch.nn.KLDivLoss(reduction="sum")(
            scores[0].log_softmax(-1), scores[1].softmax(-1)) / (3 * heads)
    value.backward()
    found, gradient = jax.value_and_grad(losses.relation_sum)(
        jnp.asarray(ours), jnp.asarray(theirs), jnp.asarray(SEGMENTS > 0, float),
        jnp.asarray(SEGMENTS), heads)
    np.testing.assert_allclose(found, value.item(), rtol=1e-12)
    np.testing.assert_allclose(gradient, student.grad.numpy(), rtol=0, atol=1e-12)


def test_packed_relations_are_those_of_separate_rows(x64):
    s, t = RANDOM.normal(size=(2, 3, 1, 8, 6))
    segments = np.array([[1, 1, 1, 2, 2, 2, 2, 0]])

    def loss(s, t, segments):
        given = (jnp.asarray(x) for x in (s, t, (segments > 0) + 0.0, segments))
        return losses.relation_sum(*given, relation_heads=2)

    both = jax.value_and_grad(loss)
    value, gradient = both(s, t, segments)
    apart = [both(s[:, :, at], t[:, :, at], np.ones((1, at.stop - at.start), int))
             for at in (slice(0, 3), slice(3, 7))]
    np.testing.assert_allclose(value, sum(value for value, _ in apart), rtol=1e-12)
    np.testing.assert_allclose(
        gradient, np.concatenate([*(part for _, part in apart), np.zeros((3, 1, 1, 6))], 2),
        rtol=0, atol=1e-12)


def test_the_backward_pass_of_relations_keeps_no_scores():
    """It computes them again, one head at a time."""
    x = jnp.ones((3, 2, 64, 16))

    def loss(x):
        return losses.relation_sum(
            x, jnp.zeros_like(x), jnp.ones((2, 64)), jnp.ones((2, 64), int), 8)

    kept = jax.tree.leaves(jax.vjp(loss, x)[1])
    assert kept and all(leaf.size <= x.size for leaf in kept), [leaf.shape for leaf in kept]


def test_skew_kl_is_bounded_where_kl_is_not(x64):
    """A word that the student thinks impossible."""
    student, teacher = jnp.array([[0.0, 400.0]]), jnp.array([[400.0, 0.0]])
    given = student, teacher, jnp.ones(1), 1.0
    assert losses.ce_sum(*given) > 399
    np.testing.assert_allclose(losses.skew_sum(*given), -np.log(0.1), rtol=1e-12)


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
        own, theirs = (Head(x, jnp.eye(11), jnp.zeros(11)) for x in (states, jnp.asarray(TEACHER)))
        targets = Targets(jnp.asarray(LABELS), jnp.asarray(WEIGHTS), jnp.asarray(WEIGHTS))
        return fused_losses(
            own, [(1.0, theirs)], targets, {name: Term(2.0, weight, definition)}, TAU)[0]

    student = jnp.asarray(STUDENT)
    found = jax.value_and_grad(fused)(student)
    expected = jax.value_and_grad(lambda s: 2.0 * ours(name, s) / weight)(student)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-12),
                 found, expected)


def test_what_is_closed_is_a_loss():
    assert set(CLOSED) <= set(LOSSES)

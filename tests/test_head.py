"""The fused head gives the numbers of losses.py, on every mesh, and never holds all logits."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_sharding import mesh_of

from distilbert_jax.benchmark.head import compare, dense_losses
from distilbert_jax.kernels import head as fused_head
from distilbert_jax.kernels import row_losses, tile_losses
from distilbert_jax.kernels.head import Head, Targets, Term, fused_losses
from distilbert_jax.training.losses import LOSSES

ROWS, LENGTH, WIDTH, TEACHER_WIDTH, TEMPERATURE = 8, 13, 16, 24, 1.7
TOLERANCE = {"float64": 1e-10, "float32": 1e-5, "bfloat16": 1e-2}
TERMS = {
    "all": {"ce": 5.0, "mlm": 2.0, "mse": 0.1}, "distilled": {"ce": 5.0, "mlm": 2.0},
    "labels": {"mlm": 1.0}, "logits": {"mse": 0.5},
    "no closed form": {"reverse": 3.0, "mlm": 2.0}}


def reverse_sum(student, teacher, weights):
    """Σ w KL(student ‖ teacher): a loss that the head has never heard of."""
    s, t = (jax.nn.log_softmax(x) for x in (student, teacher))
    return (weights * (jnp.exp(s) * (s - t)).sum(-1)).sum()


DEFINITIONS = {"ce": functools.partial(LOSSES["ce"].sum, temperature=TEMPERATURE),
               "mlm": LOSSES["mlm"].sum, "mse": LOSSES["mse"].sum, "reverse": reverse_sum}


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch):
    """104 positions are then five chunks, the last of them not full."""
    monkeypatch.setattr(fused_head, "LEAST", 24)


@pytest.fixture(params=["chunks", "kernel", "tiles"])
def path(request, monkeypatch):
    """How the closed losses are computed: by XLA, or by the kernel of GPUs or those of TPUs,
    interpreted.

    In the GPU's, 72 words are filled up to 128, of which a tile has 48: padding begins in the
    second, and the third is nothing else and reaches beyond it. In the TPU's, they are three tiles,
    the last of them not full, and 104 positions two chunks of four blocks, likewise.
    """
    if request.param == "kernel":
        monkeypatch.setattr(row_losses, "TILE", 48)
        monkeypatch.setattr(fused_head, "_kernel", lambda dtype: functools.partial(
            row_losses.row_losses, interpret=True))
    if request.param == "tiles":
        monkeypatch.setattr(tile_losses, "BLOCK", 16)
        monkeypatch.setattr(tile_losses, "TILE", 32)
        monkeypatch.setattr(tile_losses, "room", lambda models: 64)
        monkeypatch.setattr(fused_head, "_tiles", lambda models: functools.partial(
            tile_losses.tile_losses, interpret=True))
    return request.param


def rounded(x, dtype):
    """Float64 numbers that `dtype` can hold."""
    return np.asarray(np.asarray(x, jnp.dtype(dtype)), np.float64)


def make(words=72, dtype="float64"):
    """(student's hidden states and parameters, teacher, targets), as float64 numbers of `dtype`."""
    random = np.random.default_rng(0)

    def normal(*shape):
        return rounded(random.normal(0, 0.5, shape), dtype)

    def head(width):
        return Head(normal(ROWS, LENGTH, width), normal(words, width), normal(words))

    real = np.arange(LENGTH) < random.integers(4, LENGTH + 1, ROWS)[:, None]
    masked = real & (random.random(real.shape) < 0.3)
    targets = random.integers(0, words, real.shape), np.float32(masked), np.float32(real)
    return (head(WIDTH), normal(WIDTH, WIDTH)), head(TEACHER_WIDTH), Targets(
        *map(jnp.asarray, targets))


def value_and_gradients(losses, student, teacher, targets, factors, dtype="float64"):
    """(total, means) and gradients in hidden states, transform, embedding and bias."""
    wide = jnp.promote_types(dtype, jnp.float32)

    def cast(head):
        return Head(head.states.astype(dtype), head.embedding.astype(wide), head.bias.astype(wide))

    def loss(student, teachers):
        head, transform = student
        states = head.states if transform is None else jnp.tanh(
            head.states @ transform.astype(dtype))
        terms = {name: Term(factor, getattr(
            targets, "label_weights" if name == "mlm" else "soft_weights").sum(),
            DEFINITIONS[name])
            for name, factor in factors.items()}
        return losses(
            head._replace(states=states), list(teachers.items()), targets, terms, TEMPERATURE)

    student = cast(student[0]), jax.tree.map(lambda x: x.astype(wide), student[1])
    teachers = jax.tree.map(
        cast, teacher if isinstance(teacher, dict) else {1.0: teacher},
        is_leaf=lambda x: isinstance(x, Head)) if factors.keys() - {"mlm"} else {}
    return jax.jit(jax.value_and_grad(loss, has_aux=True))(student, teachers)


def assert_close(found, expected, tolerance):
    """Relative to the size of each array as a whole."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for ours, theirs in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs)
        assert np.linalg.norm(ours - theirs) <= tolerance * np.linalg.norm(theirs)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("terms", TERMS)
def test_numbers_of_the_readable_truth(terms, dtype, path, x64):
    """Against float64 on the same, rounded, values."""
    problem = make(dtype=dtype)
    found = value_and_gradients(fused_losses, *problem, TERMS[terms], dtype)
    expected = value_and_gradients(dense_losses, *problem, TERMS[terms])
    assert set(found[0][1]) == set(TERMS[terms])
    assert_close(found, expected, TOLERANCE[dtype])


def test_labels_and_biases_of_halves_are_wide(x64):
    """Logits are not rounded to bfloat16, though the gradient in them is for the products after."""
    (student, _), *rest = make(dtype="bfloat16")
    found, expected = (
        value_and_gradients(losses, (student, None), *rest, TERMS["all"], dtype)
        for losses, dtype in ((fused_losses, "bfloat16"), (dense_losses, "float64")))
    assert_close(found[0], expected[0], 1e-5)
    assert_close(found[1][0].bias, expected[1][0].bias, 1e-5)


def two_teachers():
    """(student, {share: teacher} of two of other widths, targets)."""
    student, first, targets = make()
    random = np.random.default_rng(2)
    second = Head(*(random.normal(0, 0.5, shape) for shape in (
        (ROWS, LENGTH, 8), (72, 8), (72,))))
    return student, {0.7: first, 0.3: second}, targets


@pytest.mark.parametrize("terms", ["all", "no closed form"])
def test_a_weighted_sum_over_teachers(terms, path, x64):
    problem = two_teachers()
    found, expected = (value_and_gradients(losses, *problem, TERMS[terms])
                       for losses in (fused_losses, dense_losses))
    assert_close(found, expected, TOLERANCE["float64"])
    student, teachers, targets = problem
    (value, _), _ = value_and_gradients(fused_losses, student, teachers[0.7], targets, TERMS[terms])
    assert abs(found[0][0] / value - 1) > 1e-3


@pytest.mark.skipif(jax.device_count() != 8, reason="needs 8 devices (JAX_NUM_CPU_DEVICES=8)")
@pytest.mark.parametrize("shape", ["8x1", "2x4"])
def test_several_teachers_on_a_mesh(shape, x64):
    problem, factors = two_teachers(), TERMS["all"] | TERMS["no closed form"]
    expected = value_and_gradients(dense_losses, *problem, factors)
    with jax.set_mesh(mesh_of(shape)):
        found = value_and_gradients(fused_losses, *problem, factors)
    assert_close(jax.device_get(found), expected, 1e-10)


def test_kl_from_several_has_the_gradient_of_kl_from_their_mean(x64):
    """Σ w KL(p_t ‖ q) − KL(Σ w p_t ‖ q) is a number of the teachers alone, here in NumPy."""
    student, teachers, targets = two_teachers()
    logits = {share: head.bias + head.states @ head.embedding.T for share, head in teachers.items()}
    soft = {share: np.exp(x / TEMPERATURE) / np.exp(x / TEMPERATURE).sum(-1, keepdims=True)
            for share, x in logits.items()}
    mean = sum(share * p for share, p in soft.items())
    mixture = Head(TEMPERATURE * np.log(mean), np.eye(72), np.zeros(72))
    (several, _), gradients = value_and_gradients(
        fused_losses, student, teachers, targets, {"ce": 5.0})
    (single, _), expected = value_and_gradients(
        fused_losses, student, mixture, targets, {"ce": 5.0})
    assert_close(gradients, expected, 1e-10)
    apart = sum(share * (p * np.log(p / mean)).sum(-1) for share, p in soft.items())
    real = np.asarray(targets.soft_weights)
    np.testing.assert_allclose(several - single, 5 * TEMPERATURE**2 * (
        real * apart).sum() / real.sum(), rtol=1e-10)


ROWS_OF_WORDS = 32, 24, 4096  # rows, positions of one, words


def program(names, teachers, monkeypatch):
    """The text of the compiled gradient of those losses, in chunks of 48 positions."""
    monkeypatch.setattr(fused_head, "LEAST", 24)
    rows, length, words = ROWS_OF_WORDS

    def head(width):
        return Head(*(jax.ShapeDtypeStruct(shape, "float32") for shape in (
            (rows, length, width), (words, width), (words,))))

    def step(student, teachers, targets):
        terms = {name: Term(1.0, targets.soft_weights.sum(), DEFINITIONS[name]) for name in names}
        shares = [1 / len(teachers)] * len(teachers)
        return jax.value_and_grad(fused_losses, has_aux=True)(
            student, list(zip(shares, teachers, strict=True)), targets, terms, 2.0)

    weights = jax.ShapeDtypeStruct((rows, length), "float32")
    targets = Targets(jax.ShapeDtypeStruct((rows, length), "int32"), weights, weights)
    return jax.jit(step).lower(
        head(8), [head(width) for width in teachers], targets).compile(
            {"xla_cpu_use_fusion_emitters": True}).as_text()  # as outside of tests


def test_no_logits_of_all_positions_of_any_teacher(monkeypatch):
    """Nor of the student: the largest array of the program has a sixteenth of these positions."""
    text = program(("ce", "mlm", "mse", "reverse"), (8, 16), monkeypatch)
    sizes = [np.prod([int(n) for n in shape.split(",")]) for shape in re.findall(
        r"f32\[([\d,]+)\]", text)]
    assert max(sizes) == np.prod(ROWS_OF_WORDS) // 16


def test_arrays_of_logits_on_a_cpu(monkeypatch):
    """Of each model: products, logits, powers; and the gradient. No square is kept in memory, nor
    is it made by another exponential."""
    text = program(("ce", "mlm"), (8,), monkeypatch)
    assert len(re.findall(r"f32\[48,4096\]\S* exponential\(", text)) == 2
    whole = [line for line in text.splitlines() if re.search(r"= f32\[48,4096\]\S* fusion\(", line)]
    assert len(whole) == 7


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_student_close_to_its_teacher(dtype, path, x64):
    """Where the two softmaxes nearly cancel, and an error of either would show."""
    (student, _), _, targets = make(dtype=dtype)
    random = np.random.default_rng(1)
    teacher = Head(*(rounded(x + 0.05 * random.normal(size=x.shape), dtype) for x in student))
    found, expected = (
        value_and_gradients(losses, (student, None), teacher, targets, {"ce": 1.0}, as_dtype)
        for losses, as_dtype in ((fused_losses, dtype), (dense_losses, "float64")))
    assert_close(found, expected, TOLERANCE[dtype])


def test_what_all_logits_have_in_common(path, x64):
    """An offset of 50 beside the teacher's changes no softmax, and no figure but by rounding.

    Of so many words Σ p (t − s) would no longer be exact enough if the offset were in it.
    """
    (student, _), _, targets = make(8000, dtype="float32")
    random = np.random.default_rng(1)
    teacher = Head(*(rounded(x + 0.1 * random.normal(size=x.shape), "float32") for x in student))
    student = student._replace(bias=rounded(student.bias + 50, "float32"))
    found, expected = (
        value_and_gradients(losses, (student, None), teacher, targets, TERMS["distilled"], dtype)
        for losses, dtype in ((fused_losses, "float32"), (dense_losses, "float64")))
    assert_close(found, expected, TOLERANCE["float32"])


def test_only_the_total_and_only_the_student_have_a_gradient(x64):
    (student, _), teacher, targets = jax.tree.map(jnp.asarray, make())
    terms = {name: Term(1.0, jnp.ones(()), DEFINITIONS[name]) for name in ("ce", "mlm")}

    def loss(student, teacher, terms):
        total, means = fused_losses(student, [(1.0, teacher)], targets, terms, TEMPERATURE)
        return 3 * total + 7 * means["ce"]

    ours, theirs, weights = jax.grad(loss, argnums=(0, 1, 2))(student, teacher, terms)
    expected = jax.grad(lambda s: dense_losses(
        s, [(1.0, teacher)], targets, terms, TEMPERATURE)[0])(student)
    assert_close(ours, jax.tree.map(lambda g: 3 * g, expected), 1e-12)
    assert not any(np.any(x) for x in jax.tree.leaves((theirs, weights)))


@pytest.mark.skipif(jax.device_count() != 8, reason="needs 8 devices (JAX_NUM_CPU_DEVICES=8)")
@pytest.mark.parametrize("words", [72, 73])  # 73: no mesh divides them
@pytest.mark.parametrize("shape", ["8x1", "4x2", "2x4", "1x8"])
def test_every_mesh(shape, words, x64):
    """The same numbers; gradients are added up once, and neither words nor logits gathered."""
    (student, _), teacher, targets = make(words)
    data, model = map(int, shape.split("x"))

    def loss(losses):
        def call(student, teacher, targets):
            terms = {"ce": Term(5.0, targets.soft_weights.sum(), DEFINITIONS["ce"]),
                     "mlm": Term(2.0, targets.label_weights.sum(), DEFINITIONS["mlm"])}
            return losses(student, [(1.0, teacher)], targets, terms, TEMPERATURE)
        return jax.jit(jax.value_and_grad(call, has_aux=True))

    expected = loss(dense_losses)(student, teacher, targets)
    mesh = mesh_of(shape)
    with jax.set_mesh(mesh):
        divided = fused_head.head_specs(mesh.abstract_mesh, ROWS, words)[1]
        rows, of_words = (jax.NamedSharding(mesh, spec) for spec in (jax.P("data"), divided))
        head = Head(rows, of_words, of_words)
        placed = jax.device_put((student, teacher, targets), (head, head, rows))
        call = loss(fused_losses).lower(*placed).compile()
        found = call(*placed)
    assert_close(jax.device_get(found), expected, 1e-12)

    parts = words // (model if words % model == 0 else 1)
    gradient = f"f64[{WIDTH},{parts}]"
    collectives = re.findall(r"= (.*) (all-\w+|reduce-scatter|collective-permute)(?:-start)?\(",
                             call.as_text())
    reduced = [result for result, kind in collectives if kind == "all-reduce"]
    gathered = [result for result, kind in collectives if kind != "all-reduce"]
    rows_are_divided = data > 1 or words % model > 0
    assert sum(gradient in result for result in reduced) == rows_are_divided
    # What may be gathered: hidden states of rows that were divided over both axes.
    assert all(f"{LENGTH},{WIDTH}]" in result for result in gathered), gathered


@pytest.mark.skipif(jax.device_count() != 8, reason="needs 8 devices (JAX_NUM_CPU_DEVICES=8)")
@pytest.mark.parametrize("shape", ["8x1", "2x4"])
def test_a_loss_without_closed_form_on_a_mesh(shape, x64):
    """Its gradient comes from all words, and each device keeps that of its own."""
    problem, factors = make(), TERMS["no closed form"]
    expected = value_and_gradients(dense_losses, *problem, factors)
    with jax.set_mesh(mesh_of(shape)):
        found = value_and_gradients(fused_losses, *problem, factors)
    assert_close(jax.device_get(found), expected, 1e-10)


@pytest.mark.skipif(jax.device_count() != 8, reason="needs 8 devices (JAX_NUM_CPU_DEVICES=8)")
@pytest.mark.parametrize("shape", ["8x1", "4x2"])
def test_rows_divided_by_the_caller(shape, path, x64):
    """Then sums and gradients are those of the device's own rows, and the caller adds them up."""
    (student, _), teacher, targets = make()
    weight = targets.soft_weights.sum()

    def call(losses, student, teacher, targets):
        terms = {name: Term(factor, weight, DEFINITIONS[name])
                 for name, factor in TERMS["distilled"].items()}
        return jax.value_and_grad(losses, has_aux=True)(
            student, [(1.0, teacher)], targets, terms, TEMPERATURE)

    def own_rows(student, teacher, targets):
        values, gradients = call(fused_losses, student, teacher, targets)
        values, parameters = jax.lax.psum((values, gradients[1:]), "data")
        return values, Head(gradients.states, *parameters)

    rows, whole = jax.P("data"), jax.P()
    head = Head(rows, whole, whole)
    with jax.set_mesh(mesh_of(shape)):
        found = jax.jit(jax.shard_map(
            own_rows, in_specs=(head, head, rows), out_specs=(whole, head), check_vma=False,
            axis_names={"data"}))(student, teacher, targets)
    assert_close(jax.device_get(found), call(dense_losses, student, teacher, targets), 1e-12)


@pytest.mark.parametrize("terms, gradients, calls", [
    ("all", True, 1), ("all", False, 0), ("no closed form", True, 0)])
def test_when_the_kernel_is_taken(terms, gradients, calls, monkeypatch):
    """Lowered without its device. Values alone need no gradient, and other losses need logits."""
    monkeypatch.setattr(fused_head, "has_triton", lambda dtype: True)
    (student, _), teacher, targets = make()
    terms = {name: Term(factor, jnp.ones(()), DEFINITIONS[name])
             for name, factor in TERMS[terms].items()}

    def loss(student, teacher):
        return fused_losses(student, [(1.0, teacher)], targets, terms, TEMPERATURE)[0]

    heads = [jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, "float32"), head)
             for head in (student, teacher)]
    traced = jax.jit(jax.grad(loss) if gradients else loss).trace(*heads)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call @__gpu$xla.gpu.triton(") == calls


def test_memory(monkeypatch):
    monkeypatch.setattr(fused_head, "LEAST", 256)
    found = compare(rows=32, length=128, words=4096, width=64, dtype="float32", repeats=0)
    assert found["dense"]["bytes"] > 3 * 4 * 32 * 128 * 4096
    assert found["dense"]["bytes"] > 10 * found["fused"]["bytes"]


def test_times_are_taken_in_turn():
    found = compare(rows=2, length=8, words=40, width=8, dtype="bfloat16", repeats=1)
    assert all(found[name]["ms"] > 0 for name in ("dense", "fused"))

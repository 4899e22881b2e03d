"""One update: its gradients and six of its successors equal torch's; how it is cut is no matter."""

import copy
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import masked
from flax import nnx
from test_sharding import mesh_of

from distilbert_jax.config import EVALUATION_MASKING, Masking, TrainConfig
from distilbert_jax.machine.sharding import by_rows, replicated, shardings
from distilbert_jax.models import bert, convert, distilbert
from distilbert_jax.models.encoder import graphdef
from distilbert_jax.models.families import FAMILIES
from distilbert_jax.models.student import student_config, student_params
from distilbert_jax.training import losses
from distilbert_jax.training.labels import mask_tokens, row_keys
from distilbert_jax.training.labels import vocabulary as vocabulary_of
from distilbert_jax.training.losses import LOSSES
from distilbert_jax.training.objective import (
    Objective,
    Pair,
    at_masked,
    loss_counts,
    observe,
    total_loss,
)
from distilbert_jax.training.optimizer import make_optimizer
from distilbert_jax.training.train_step import init_state, make_eval_step, make_train_step

mask = jax.jit(mask_tokens, static_argnums=3)
label_keys = jax.jit(lambda key, batch: jax.vmap(jax.random.split)(row_keys(key, batch))[:, 0])
TOLERANCE = {"float32": 2e-5, "float64": 1e-9}
OBJECTIVES = {
    restrict: Objective(weights={"ce": 5.0, "mlm": 2.0, "cos": 1.0, "mse": 0.1, "hidden": 3.0},
                        pairs=(Pair(layer_map=((0, 1), (2, 0))),), restrict_ce_to_mask=restrict)
    for restrict in (False, True)}
ROWS = [[16], [11], [7], [14], [5], [16]]  # one document each, as torch has no packing


@pytest.fixture(scope="module")
def models(torch_model):
    """A BERT and a DistilBERT of transformers, in float64."""
    return (torch_model("BertForMaskedLM", seed=1, num_hidden_layers=1).double(),
            torch_model("DistilBertForMaskedLM", seed=2).double())


def torch_losses(teacher, student, batch, objective):
    """The training loss written out after REFERENCE A.7, on a masked batch; means by name."""
    import torch

    batch = {name: torch.tensor(np.asarray(value)) for name, value in batch.items()}
    ids, real = batch["input_ids"].long(), batch["segment_ids"] > 0
    labels = torch.full(ids.shape, -100)
    row, column = torch.nonzero(batch["label_weights"], as_tuple=True)
    labels[row, batch["masked_positions"][row, column].long()] = batch["labels"][row, column].long()

    s = student(ids, attention_mask=real, output_hidden_states=True)
    with torch.no_grad():
        t = teacher(ids, attention_mask=real, output_hidden_states=True)
    chosen = labels > -1 if objective.restrict_ce_to_mask else real
    soft, logits, tau = t.logits[chosen], s.logits[chosen], objective.temperature
    s_hidden, t_hidden = s.hidden_states[-1][real], t.hidden_states[-1][real]
    nn = torch.nn

    def relative_error(own, theirs):
        x, y = s.hidden_states[own][real], t.hidden_states[theirs][real]
        return ((x - y) ** 2).sum(-1) / (y ** 2).sum(-1)

    return {
        "hidden": sum(relative_error(*both).mean() for both in objective.pairs[0].layer_map) / 2,
        "ce": tau**2 * nn.KLDivLoss(reduction="batchmean")(
            (logits / tau).log_softmax(-1), (soft / tau).softmax(-1)),
        "mlm": nn.CrossEntropyLoss(ignore_index=-100)(
            s.logits.flatten(0, 1), labels.flatten()),
        "mse": nn.MSELoss(reduction="sum")(logits, soft) / len(logits),
        "cos": nn.CosineEmbeddingLoss()(s_hidden, t_hidden, torch.ones(len(s_hidden)))}


def total(means, objective):
    return sum(objective.weights[name] * mean for name, mean in means.items())


@pytest.fixture(scope="module")
def torch_gradients(models, batch_of, vocabulary):
    """restrict_ce_to_mask → (masked batch, torch's loss, its gradient by name)."""
    teacher, student = models
    batch = mask(jax.random.split(jax.random.key(0), len(ROWS)), batch_of(ROWS, 16), vocabulary,
                 Masking(rate=0.3))
    expected = {}
    for restrict, objective in OBJECTIVES.items():
        student.zero_grad()
        loss = total(torch_losses(teacher, student, batch, objective), objective)
        loss.backward()
        expected[restrict] = loss.item(), {
            name: p.grad.numpy().copy() for name, p in student.named_parameters()}
    return jax.device_get(batch), expected


def assert_gradients(teacher, student, batch, objective, dtype, expected):
    """Our loss and gradients, by Hugging Face name, against (torch's loss, its gradients)."""
    (teacher_config, teacher_params), (config, params) = teacher, student
    expected_loss, expected_gradients = expected

    def loss(params, teacher_params, batch):
        student = nnx.merge(graphdef(config, dtype, dtype), params)
        teacher = nnx.merge(graphdef(teacher_config, dtype, dtype), teacher_params)
        counts = loss_counts(batch, objective)
        value, means = total_loss(student, [teacher], batch, objective, counts, {})
        return value, total(means, objective)

    with jax.enable_x64(dtype == "float64"):
        cast = jax.tree.map(lambda x: jnp.asarray(x, dtype), (params, teacher_params))
        values, gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(*cast, batch)
    np.testing.assert_allclose(values, expected_loss, rtol=TOLERANCE[dtype])
    ours = convert.to_hf(gradients, FAMILIES["distilbert"])
    assert set(ours) == set(expected_gradients)
    scale = max(abs(g).max() for g in expected_gradients.values())
    for name, gradient in expected_gradients.items():
        np.testing.assert_allclose(
            ours[name], gradient, rtol=0, atol=TOLERANCE[dtype] * scale, err_msg=name)


@pytest.mark.parametrize("restrict", OBJECTIVES)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_gradients_equal_torch(dtype, restrict, models, from_torch, torch_gradients):
    batch, expected = torch_gradients
    assert_gradients(*map(from_torch, models), batch, OBJECTIVES[restrict], dtype,
                     expected[restrict])


@pytest.mark.parametrize("name", ["rxn-bert", "minilm-l6"])
def test_gradients_of_a_real_teacher_equal_torch(name, shared, from_torch, batch_of, x64):
    """Real layers and embeddings; the MLM head that minilm-l6 lacks is transformers' random one."""
    torch = pytest.importorskip("torch")
    import transformers

    torch.manual_seed(0)
    teacher = transformers.BertForMaskedLM.from_pretrained(shared / name).double().eval()
    config, params = from_torch(teacher)
    _, shape = student_config(bert.FAMILY, config, 2, dropout=0.0)
    start = student_params(params, [0, config.num_hidden_layers - 1])
    student = transformers.DistilBertForMaskedLM(
        transformers.DistilBertConfig(**distilbert.FAMILY.to_hf(shape))).double().eval()
    tensors = convert.to_hf(start, distilbert.FAMILY)
    missing, unexpected = student.load_state_dict(
        {key: torch.tensor(x) for key, x in tensors.items()}, strict=False)
    assert missing == ["vocab_projector.weight"] and not unexpected  # tied

    words = vocabulary_of(np.ones(config.vocab_size), [0, 1, 2, 3], 4)
    batch = mask(jax.random.split(jax.random.key(0), 2), batch_of([[40], [31]], 40), words,
                 Masking(rate=0.3))
    loss = total(torch_losses(teacher, student, batch, OBJECTIVES[False]), OBJECTIVES[False])
    loss.backward()
    expected = {key: p.grad.numpy() for key, p in student.named_parameters()}
    assert_gradients((config, params), (shape, start), jax.device_get(batch), OBJECTIVES[False],
                     "float64", (loss.item(), expected))


def test_six_updates_equal_torch(x64, models, from_torch, batch_of, vocabulary):
    """AdamW with decay, schedule and clipping, over masks drawn from the same keys."""
    import torch

    (teacher, torch_student), steps = models, 6
    student = copy.deepcopy(torch_student)
    (teacher_config, teacher_params), (config, params) = map(from_torch, models)
    objective = OBJECTIVES[False]
    settings = TrainConfig(learning_rate=2e-3, warmup=0.5, weight_decay=0.1, clip=30.0)
    tx = make_optimizer(settings, steps)
    graphs = (graphdef(c, "float64", "float64") for c in (config, teacher_config))
    own, theirs = graphs
    step = jax.jit(make_train_step(own, {"teacher": theirs}, tx, objective, masked()))
    state = init_state({"student": jax.tree.map(jnp.asarray, params), "projections": {}}, tx, 3)

    matrices = [p for p in student.parameters() if p.ndim > 1]
    vectors = [p for p in student.parameters() if p.ndim == 1]
    adam = torch.optim.AdamW(
        [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}],
        lr=settings.learning_rate, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.1)
    warmup = 3
    schedule = torch.optim.lr_scheduler.LambdaLR(
        adam, lambda done: min((done + 1) / warmup, (steps - done) / (steps - warmup + 1)))
    clipped = []
    for number in range(steps):
        batch = batch_of(ROWS, 16, seed=number)
        keys = label_keys(state.key, batch)
        hidden = mask(keys, batch, vocabulary, Masking())
        state, metrics = step(state, {"teacher": teacher_params}, vocabulary, batch)

        adam.zero_grad()
        means = torch_losses(teacher, student, hidden, objective)
        loss = total(means, objective)
        loss.backward()
        # torch.nn.utils.clip_grad_norm_ would add 1e-6 to the norm; Optax, like the paper, does
        # not.
        norm = torch.sqrt(sum((p.grad**2).sum() for p in student.parameters())).item()
        clipped.append(norm > settings.clip)
        for p in student.parameters():
            p.grad *= min(1.0, settings.clip / norm)
        adam.step()
        schedule.step()
        expected = {name: mean.item() for name, mean in means.items()}
        expected |= {"loss": loss.item(), "grad_norm": norm,
                     "tokens": sum(size for row in ROWS for size in row), "skipped": 0}
        assert set(metrics) == set(expected)
        for name, value in expected.items():
            np.testing.assert_allclose(metrics[name], value, rtol=1e-9, err_msg=name)
    assert any(clipped) and not all(clipped)
    ours = convert.to_hf(jax.device_get(state.params["student"]), FAMILIES["distilbert"])
    for name, p in student.named_parameters():
        p = p.detach().numpy()
        np.testing.assert_allclose(ours[name], p, rtol=0, atol=1e-9 * abs(p).max(), err_msg=name)


@pytest.fixture(scope="module")
def step(problem):
    with jax.enable_x64(True):
        return jax.jit(problem.step())


def test_micro_batches_change_nothing(x64, dropping, vocabulary, step):
    """Not even what is dropped."""
    results = []
    for cut in (jax.jit(dropping.step(accumulate)) for accumulate in (1, 2, 4)):
        state = dropping.state()
        for batch in dropping.batches[:2]:
            state, metrics = cut(state, dropping.teachers, vocabulary, batch)
        results.append((state.params, metrics))
    _, still = step(dropping.state(), dropping.teachers, vocabulary, dropping.batches[0])
    _, drops = cut(dropping.state(), dropping.teachers, vocabulary, dropping.batches[0])
    assert abs(still["cos"] / drops["cos"] - 1) > 1e-3
    for result in results[1:]:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-11),
                     result, results[0])


def test_rematerialisation_changes_nothing(x64, dropping, vocabulary):
    """Not even what is dropped."""
    given = dropping.state(), dropping.teachers, vocabulary, dropping.batches[0]
    kept, again = (jax.jit(dropping.step(remat=remat))(*given) for remat in (False, True))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-11),
                 (kept[0].params, kept[1]), (again[0].params, again[1]))


@pytest.mark.parametrize("shape, accumulate", [("1x1", 1), ("8x1", 1), ("4x2", 2)])
def test_an_update_that_is_not_finite_is_skipped(shape, accumulate, x64, problem, vocabulary):
    """One row of one micro-batch on one device spoils the loss, or the gradient alone."""
    mesh = mesh_of(shape)
    state, batch = problem.state(), problem.batches[0]
    places, whole = shardings(state, mesh), replicated(mesh)
    step = jax.jit(problem.step(accumulate), out_shardings=(places, whole), in_shardings=(
        places, shardings(problem.teachers, mesh), whole, by_rows(mesh)))
    teacher = problem.teachers
    state, metrics = step(state, teacher, vocabulary, batch)
    assert metrics["skipped"] == 0

    word = batch["input_ids"][5][1]  # its embedding in the teacher overflows
    spoilt = jax.tree.map(np.copy, teacher)
    spoilt["teacher"]["embeddings"]["word"]["embedding"][word] = np.inf
    after, metrics = step(state, spoilt, vocabulary, batch)
    assert metrics["skipped"] == 1 and not np.isfinite(metrics["loss"])
    jax.tree.map(np.testing.assert_array_equal, (after.params, after.opt_state),
                 (state.params, state.opt_state))
    assert after.step == state.step + 1
    after, metrics = step(after, teacher, vocabulary, batch)
    assert metrics["skipped"] == 0


def test_a_finite_loss_with_an_infinite_gradient_is_skipped(x64, problem, vocabulary):
    @jax.custom_vjp
    def spoil(x):
        return x

    spoil.defvjp(lambda x: (x, None), lambda _, g: (g * jnp.inf,))
    own, theirs = (graphdef(c, "float64", "float64") for c in (problem.student, problem.teacher))
    tx = make_optimizer(TrainConfig(), 3)
    step = make_train_step(own, {"teacher": theirs}, tx, Objective(weights={"cos": 1.0}), masked())
    state = dataclasses.replace(problem, tx=tx).state()
    row = LOSSES["cos"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(LOSSES, "cos", dataclasses.replace(
            row, sum=lambda *args: spoil(row.sum(*args))))
        after, metrics = jax.jit(step)(
            state, problem.teachers, vocabulary, problem.batches[0])
    assert np.isfinite(metrics["loss"]) and metrics["skipped"] == 1
    jax.tree.map(np.testing.assert_array_equal, (after.params, after.opt_state),
                 (state.params, state.opt_state))


EMPTY = {  # rows of a batch with too little in them
    "an all-padding row": [[], [9, 7], [], [4]],
    "nothing but padding": [[], [], [], []],
    "nothing to mask": [[2], [2, 2], [2], [2]],  # [CLS] [SEP]
}


@pytest.mark.parametrize("restrict", OBJECTIVES)
def test_little_in_a_batch_is_finite(restrict, x64, problem, vocabulary, batch_of):
    objective = dataclasses.replace(
        OBJECTIVES[restrict], pairs=(Pair(layer_map=((0, 0), (1, 2))),))
    step = jax.jit(dataclasses.replace(problem, objective=objective).step())
    for what, rows in EMPTY.items():
        after, metrics = step(problem.state(), problem.teachers, vocabulary,
                              batch_of(rows, 16))
        assert metrics["skipped"] == 0, what
        assert all(np.isfinite(x) for x in metrics.values()), what
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(after.params)), what
        if what == "nothing but padding":
            assert metrics["loss"] == metrics["grad_norm"] == metrics["tokens"] == 0


def test_the_teacher_is_an_argument(x64, problem, vocabulary):
    """Nothing as large as a matrix is baked into the step."""
    jaxpr = jax.make_jaxpr(problem.step())(
        problem.state(), problem.teachers, vocabulary, problem.batches[0])
    assert sum(np.size(constant) for constant in jaxpr.consts) == 0
    literals = [v.val for e in jaxpr.eqns for v in e.invars if hasattr(v, "val")]
    assert max(map(np.size, literals)) == 1


def test_the_step_masks_anew_and_leaves_the_rest_as_it_is(x64, problem, vocabulary, step):
    state, batch = problem.state(), problem.batches[0]
    teacher = jax.tree.map(jnp.asarray, problem.teachers)
    first, metrics = step(state, teacher, vocabulary, batch)
    again, same = step(state, teacher, vocabulary, batch)
    jax.tree.map(np.testing.assert_array_equal, (first.params, metrics), (again.params, same))
    assert first.step == 1 and (jax.random.key_data(first.key) == jax.random.key_data(
        state.key)).all()
    jax.tree.map(np.testing.assert_array_equal, teacher, problem.teachers)
    later = dict(batch, epoch=batch["epoch"] + 1)
    assert step(state, teacher, vocabulary, later)[1]["mlm"] != metrics["mlm"]


@functools.partial(jax.jit, static_argnums=0)
def predict(graph, params, batch):
    """Last hidden states, and logits at the masked positions."""
    model = nnx.merge(graph, params)
    hidden = observe(model, batch).last
    return hidden, model.mlm_logits(at_masked(hidden, batch))


def test_without_a_teacher_it_is_masked_language_modelling(x64, problem, vocabulary):
    graph = graphdef(problem.student, "float64", "float64")
    step = make_train_step(
        graph, {}, optax.sgd(0.1), Objective(weights={"mlm": 1.0}), masked())
    state = dataclasses.replace(problem, tx=optax.sgd(0.1)).state()
    _, metrics = jax.jit(step)(state, {}, vocabulary, problem.batches[0])
    assert set(metrics) == {"mlm", "loss", "grad_norm", "tokens", "skipped"}
    keys = label_keys(state.key, problem.batches[0])
    batch = mask(keys, problem.batches[0], vocabulary, Masking())
    _, logits = predict(graph, state.params["student"], batch)
    nll = losses.mlm_sum(logits, batch["labels"], batch["label_weights"])
    np.testing.assert_allclose(metrics["mlm"], nll / batch["label_weights"].sum(), rtol=1e-12)
    assert metrics["mlm"] == metrics["loss"]


def saying(params, token):
    """The parameters of a model that nearly always guesses this token."""
    head = params["mlm_head"]
    return params | {"mlm_head": head | {"bias": np.asarray(head["bias"]) + 20 * (
        np.arange(len(head["bias"])) == token)}}


def test_evaluation(x64, problem, vocabulary):
    """Against the same sums taken outside, of the same masked batch."""
    graphs = [graphdef(c, "float64", "float64") for c in (problem.student, problem.teacher)]
    raw, key = problem.batches[0], jax.random.key(1)
    batch = mask(jax.jit(row_keys)(key, raw), raw, vocabulary, EVALUATION_MASKING)
    real, weights = batch["segment_ids"] > 0, np.asarray(batch["label_weights"])
    common = np.bincount(np.asarray(batch["labels"])[weights > 0]).argmax()
    params = tuple(saying(own, common) for own in (problem.params, problem.teacher_params))
    sums = jax.jit(make_eval_step(*graphs))(
        params[0], {"teacher": params[1]}, vocabulary, raw, key)
    assert (sums["correct"] != sums["correct"][::-1]).any()  # of rows in their order

    found = []
    for graph, values in zip(graphs, params, strict=True):
        hidden, logits = predict(graph, values, batch)
        found.append((np.asarray(hidden)[real], np.asarray(jax.nn.log_softmax(logits))))
    (hidden, student), (target, teacher) = found
    at_label = (np.arange(student.shape[-1]) == np.asarray(batch["labels"])[..., None])
    cosine = (hidden * target).sum(-1) / np.linalg.norm(hidden, axis=-1) / np.linalg.norm(
        target, axis=-1)
    expected = {
        "masked": weights.sum(1), "tokens": real.sum(), "cosine": cosine.sum(),
        "nll": -(student[at_label] * weights.ravel()).sum(),
        "teacher_nll": -(teacher[at_label] * weights.ravel()).sum(),
        "correct": ((student.argmax(-1) == batch["labels"]) * weights).sum(1),
        "teacher_correct": ((teacher.argmax(-1) == batch["labels"]) * weights).sum(1),
        "kl": ((np.exp(teacher) * (teacher - student)).sum(-1) * weights).sum(),
        "most_frequent": ((batch["labels"] == np.argmax(vocabulary.counts)) * weights).sum()}
    assert set(sums) == set(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(sums[name], value, rtol=1e-10, err_msg=name)


def test_a_teacher_s_dropout_is_off(x64, problem, vocabulary):
    """Whatever its config.json says."""
    def metrics(rate):
        teacher = dataclasses.replace(
            problem.teacher, hidden_dropout=rate, attention_dropout=rate)
        step = dataclasses.replace(problem, teacher=teacher).step()
        return jax.jit(step)(
            problem.state(), problem.teachers, vocabulary, problem.batches[0])[1]

    assert metrics(0.5) == metrics(0.0)


def test_the_order_of_rows_changes_nothing(x64, dropping, vocabulary):
    """Not even what is masked or dropped: a row means the same wherever it stands."""
    step = jax.jit(dropping.step())
    order = np.random.default_rng(0).permutation(8)
    found = [step(dropping.state(), dropping.teachers, vocabulary, batch)[1] for batch in (
        dropping.batches[0], {name: x[order] for name, x in dropping.batches[0].items()})]
    for name, value in found[0].items():
        np.testing.assert_allclose(found[1][name], value, rtol=1e-12, err_msg=name)


def test_frozen_parameters_stay_and_count_in_no_norm(x64, problem, vocabulary):
    graphs = [graphdef(c, "float64", "float64") for c in (problem.student, problem.teacher)]
    frozen = ("student/embeddings/position",)
    tx = make_optimizer(TrainConfig(weight_decay=0.5, warmup=0.0), 4, frozen)
    state = dataclasses.replace(problem, tx=tx).state()

    def run(frozen):
        step = make_train_step(graphs[0], {"teacher": graphs[1]}, tx, problem.objective, masked(),
                               frozen=frozen)
        return jax.jit(step)(state, problem.teachers, vocabulary, problem.batches[0])

    (after, metrics), (_, free) = run(frozen), run(())
    positions = [s.params["student"]["embeddings"]["position"]["embedding"]
                 for s in (after, state)]
    np.testing.assert_array_equal(*positions)
    # Of the free run's squared norm, what the positions have is missing.
    _, gradient = jax.jit(jax.value_and_grad(lambda x: total_of(
        problem, graphs, state, x, vocabulary)))(positions[1])
    missing = free["grad_norm"] ** 2 - metrics["grad_norm"] ** 2
    np.testing.assert_allclose(missing, (gradient ** 2).sum(), rtol=1e-9)
    assert missing > 0


def total_of(problem, graphs, state, positions, vocabulary):
    """The loss of the first batch as a function of the position embeddings alone."""
    student = state.params["student"]
    student = student | {"embeddings": student["embeddings"] | {
        "position": {"embedding": positions}}}
    batch = jax.tree.map(jnp.asarray, problem.batches[0])
    labelled = mask_tokens(jax.vmap(jax.random.split)(row_keys(state.key, batch))[:, 0], batch,
                           jax.tree.map(jnp.asarray, vocabulary), Masking())
    own, teacher = (nnx.merge(graph, params) for graph, params in zip(
        graphs, jax.tree.map(jnp.asarray, (student, problem.teacher_params)), strict=True))
    counts = loss_counts(labelled, problem.objective)
    return total_loss(own, [teacher], labelled, problem.objective, counts, {})[0]


@pytest.mark.skipif(jax.device_count() != 8, reason="needs 8 devices")
def test_pmap_takes_the_same_update_as_the_mesh_8x1(x64, problem, vocabulary):
    """The mission names pmap; jit with NamedSharding, today's pjit, is the path, and equals it.

    Each of eight devices has one row, the whole batch's weights divide its losses, and gradients
    are summed over devices: the data-parallel step as one would write it with jax.pmap.
    """
    graphs = [graphdef(c, "float64", "float64") for c in (problem.student, problem.teacher)]
    state, batch, mesh = problem.state(), problem.batches[0], mesh_of("8x1")
    layout, whole = shardings(state, mesh), replicated(mesh)
    expected, metrics = jax.jit(problem.step(mesh=mesh), in_shardings=(
        layout, shardings(problem.teachers, mesh), whole, by_rows(mesh)))(
        state, problem.teachers, vocabulary, batch)

    labelled = mask(label_keys(state.key, batch), batch, vocabulary, Masking())
    counts = loss_counts(labelled, problem.objective)
    teacher = jax.tree.map(jnp.asarray, problem.teacher_params)

    def gradients(params, batch):
        def loss(params):
            own, theirs = (nnx.merge(graph, each) for graph, each in zip(
                graphs, (params, teacher), strict=True))
            return total_loss(own, [theirs], batch, problem.objective, counts, {})[0]
        return jax.lax.psum(jax.value_and_grad(loss)(params), "data")

    rows = jax.tree.map(lambda x: x.reshape(8, 1, *x.shape[1:]), labelled)
    total, grads = jax.tree.map(lambda x: x[0], jax.pmap(gradients, "data", in_axes=(None, 0))(
        state.params["student"], rows))
    np.testing.assert_allclose(total, metrics["loss"], rtol=1e-12)
    updates, _ = problem.tx.update(
        {"student": grads, "projections": {}}, state.opt_state, state.params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-11),
                 optax.apply_updates(state.params, updates), expected.params)

"""Training for a task equals torch's: logits of every head, six updates; and what it means.

Packed examples mean what each would alone, token types count, and examples without labels teach
by the teacher's answers alone.
"""

import copy
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_examples import examples
from test_sharding import mesh_of

from distilbert_jax.data.examples import lay, rows_of
from distilbert_jax.evaluation import answers
from distilbert_jax.models import hub
from distilbert_jax.models.convert import to_hf
from distilbert_jax.models.encoder import graphdef
from distilbert_jax.models.families import FAMILIES
from distilbert_jax.task_config import FinetuneConfig
from distilbert_jax.training.assemble import assemble

KINDS = ("classify", "regress", "tag")
LENGTHS = [9, 5, 12, 7, 3, 8]
TAGGED = [[1, 3, 6], [2], [1, 2, 3, 7], [1, 5], [1], [1, 4]]
CONFIG = FinetuneConfig(
    model="m", dtype="float64", learning_rate=2e-3, warmup=0.5, weight_decay=0.1, clip=0.5,
    dropout=0.0, batch_size=6, alphas={"hard": 0.3, "soft": 0.7}, temperature=3.0)


@pytest.fixture(scope="module")
def torch_task(torch_model):
    """Function (model type, kind) → a tiny torch model with the head, and its folder's content."""
    def build(kind, task, seed=0):
        family = FAMILIES[kind].for_task(task)
        outputs = 1 if task == "regress" else 3
        more = {"problem_type": "regression"} if task == "regress" else {}
        model = torch_model(family.architecture, seed, num_labels=outputs, **more)
        return model.double()

    return build


def read(model, folder):
    model.save_pretrained(folder)
    found = hub.load_task(str(folder))
    tensors = {name: x.numpy() for name, x in model.state_dict().items()}  # in float64
    from distilbert_jax.models.convert import from_hf

    return found, from_hf(tensors, found.family, found.config)[1]


def some(task, labels=True):
    found = examples(LENGTHS, TAGGED if task == "tag" else None)
    if task == "regress":
        found = dataclasses.replace(found, labels=[x + 0.25 for x in found.labels])
    return found if labels else dataclasses.replace(
        found, labels=[np.full(len(x), np.nan) for x in found.labels])


def torch_logits(model, found):
    """[P, C] at the answered positions, an example at a time."""
    import torch

    out = []
    typed = "distil" not in model.config.model_type and model.config.type_vocab_size > 1
    for ids, types, positions in zip(found.ids, found.types, found.positions, strict=True):
        more = {"token_type_ids": torch.tensor(types)[None].long()} if typed else {}
        logits = model(torch.tensor(ids)[None].long(), **more).logits
        out.append(logits[0][positions] if logits.ndim == 3 else logits)
    return torch.cat(out)


@pytest.mark.parametrize("task", KINDS)
@pytest.mark.parametrize("kind", ["bert", "distilbert", "roberta"])
def test_logits_of_every_head_equal_torch(kind, task, torch_task, tmp_path, x64):
    model = torch_task(kind, task)
    found, params = read(model, tmp_path / "model")
    assert found.config.task == task and found.config.num_labels == (1 if task == "regress" else 3)
    assert found.labels == (() if task == "regress" else ("LABEL_0", "LABEL_1", "LABEL_2"))
    data = some(task)
    if kind != "bert":
        data = dataclasses.replace(data, types=[0 * types for types in data.types])
    expected = torch_logits(model, data).detach().numpy()
    graph = graphdef(found.config, "float64", "float64")
    ours = answers.logits(graph, params, data, mesh_of("1x1"))
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-9 * abs(expected).max())
    written = to_hf(params, found.family)
    state = model.state_dict()
    assert set(written) <= set(state)
    assert all(np.array_equal(x, state[name].numpy()) for name, x in written.items())
    left_out = {name.rsplit(".", 1)[0] for name in set(state) - set(written)}
    assert left_out <= {"bert.embeddings", "roberta.embeddings", "distilbert.embeddings"}


def torch_loss(model, data, target):
    """Hard loss and, with a teacher's logits, the soft one; means over all answered positions."""
    import torch

    logits = torch_logits(model, data)
    labels = torch.tensor(np.concatenate(data.labels))
    if logits.shape[1] == 1:
        hard = torch.nn.MSELoss()(logits[:, 0], labels)
        soft = None if target is None else torch.nn.MSELoss()(logits, target)
    else:
        hard = torch.nn.CrossEntropyLoss()(logits, labels.long())
        soft = None if target is None else 9 * torch.nn.KLDivLoss(reduction="batchmean")(
            (logits / 3).log_softmax(-1), (target / 3).softmax(-1))
    return hard if soft is None else 0.3 * hard + 0.7 * soft


@pytest.mark.parametrize("task, taught", [(task, False) for task in KINDS] + [
    ("classify", True), ("regress", True)])
def test_six_updates_equal_torch(task, taught, torch_task, tmp_path, x64):
    """AdamW with decay, schedule and clipping, over packed examples, with a teacher and without."""
    import torch

    model = torch_task("bert", task, seed=1)
    found, params = read(model, tmp_path / "model")
    data, target, given = some(task), None, None
    if taught:
        target = torch_logits(torch_task("bert", task, seed=2), data).detach()
        given = target.numpy()
    shape = dataclasses.replace(found.config, hidden_dropout=0.0, attention_dropout=0.0)
    assembly = assemble(CONFIG, found.family, shape, [shape] if taught else [], mesh_of("1x1"), 6)
    state = assembly.init(assembly.cast(params))
    batch = rows_of(data, lay(LENGTHS, 16), 16, 8, given) | {
        "row": np.arange(3, dtype=np.int32), "epoch": np.zeros(3, np.int32)}
    step = jax.jit(assembly.train_step)

    student, steps, warmup = copy.deepcopy(model), 6, 3
    matrices = [p for p in student.parameters() if p.ndim > 1]
    vectors = [p for p in student.parameters() if p.ndim == 1]
    adam = torch.optim.AdamW([{"params": matrices}, {"params": vectors, "weight_decay": 0.0}],
                             lr=2e-3, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        adam, lambda done: min((done + 1) / warmup, (steps - done) / (steps - warmup + 1)))
    for _ in range(steps):
        state, metrics = step(state, {}, None, batch)
        adam.zero_grad()
        loss = torch_loss(student, data, target)
        loss.backward()
        used = [p for p in student.parameters() if p.grad is not None]
        norm = torch.sqrt(sum((p.grad**2).sum() for p in used)).item()
        for p in used:
            p.grad *= min(1.0, 0.5 / norm)
        adam.step()
        schedule.step()
        np.testing.assert_allclose(metrics["loss"], loss.item(), rtol=1e-9)
        np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-9)
    ours = to_hf(jax.device_get(state.params["student"]), found.family)
    theirs = dict(student.named_parameters())
    for name, x in ours.items():
        p = theirs[name].detach().numpy()
        np.testing.assert_allclose(x, p, rtol=0, atol=1e-9 * abs(p).max(), err_msg=name)


@pytest.fixture(scope="module")
def task_model(tiny_model):
    return tiny_model(num_hidden_layers=2, task="classify", num_labels=3, mlm_head=False)


def taken(model, data, rows, length, mesh="1x1", alphas=None, given=None, **config):
    """Loss, gradient norm and new parameters of one update."""
    shape, params = model
    settings = dataclasses.replace(CONFIG, alphas=alphas or CONFIG.alphas, **config)
    teachers = [shape] if given is not None else []
    assembly = assemble(settings, FAMILIES["bert"].for_task("classify"), shape, teachers,
                        mesh_of(mesh), 6)
    state = assembly.init(assembly.cast(params))
    batch = rows_of(data, rows, length, 6, given) | {
        "row": np.arange(len(rows), dtype=np.int32), "epoch": np.zeros(len(rows), np.int32)}
    state, metrics = assembly.jitted(state, {})(state, {}, None, batch)
    return jax.device_get((metrics["loss"], metrics["grad_norm"], state.params["student"]))


def assert_near(one, other, tolerance=1e-11):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=tolerance), one, other)


def test_packed_is_one_example_a_row(task_model, x64):
    data = some("classify")
    alone = taken(task_model, data, [[i] for i in range(6)], 16)
    assert_near(alone, taken(task_model, data, lay(LENGTHS, 16), 16))
    assert_near(alone, taken(task_model, data, [[5, 1, 0], [2, 3, 4]], 32))
    assert_near(alone, taken(task_model, data, [[i] for i in range(6)] + [[], []], 24, "8x1"))
    assert_near(alone, taken(task_model, data, [[5, 1, 0], [], [2, 3, 4], []], 32, "4x2"))
    assert_near(alone, taken(task_model, data, [[5, 1, 0], [2], [3], [4]], 32, accumulate=2))


def test_token_types_count(task_model, x64):
    data = some("classify")
    blind = dataclasses.replace(data, types=[0 * types for types in data.types])
    rows = lay(LENGTHS, 16)
    assert abs(taken(task_model, data, rows, 16)[0] - taken(task_model, blind, rows, 16)[0]) > 1e-6


def test_without_labels_only_the_teacher_teaches(task_model, x64):
    rows = lay(LENGTHS, 16)
    given = np.random.default_rng(0).normal(size=(6, 3))
    none = taken(task_model, some("classify", labels=False), rows, 16, given=given)
    soft = taken(task_model, some("classify"), rows, 16, given=given,
                 alphas={"hard": 0.0, "soft": CONFIG.alphas["soft"]})
    assert_near(none, soft)
    shuffled = dataclasses.replace(some("classify"), labels=some("classify").labels[::-1])
    assert_near(soft, taken(task_model, shuffled, rows, 16, given=given,
                            alphas={"hard": 0.0, "soft": CONFIG.alphas["soft"]}))


def test_dropout_reaches_the_head(task_model, x64):
    shape, params = task_model
    graph = graphdef(dataclasses.replace(shape, head_dropout=0.5), "float64", "float64")
    model = nnx.merge(graph, params)
    states = jnp.asarray(np.random.default_rng(0).normal(size=(2, 1, 16)))
    keys = jax.random.split(jax.random.key(0), 2)
    assert not np.allclose(model.task_logits(states, keys), model.task_logits(states))

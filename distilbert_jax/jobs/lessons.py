"""A teacher for a task → what its student learns from: its answers, and which layers to keep.

The answers are computed once and kept beside the data, sealed; so are the variants of the training
texts, to which only a teacher knows answers.
"""

import dataclasses
import functools
import json
import operator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from distilbert_jax.data.examples import Examples
from distilbert_jax.data.tokenize import spec
from distilbert_jax.errors import UserError
from distilbert_jax.evaluation import answers
from distilbert_jax.evaluation.augment import by_frequency, by_model, unlabelled, variants
from distilbert_jax.jobs import task_report
from distilbert_jax.jobs.kept_layers import check_kept, kept_layers
from distilbert_jax.jobs.task_model import Job, Trained, cut, on_devices, order
from distilbert_jax.machine import seal, store
from distilbert_jax.machine.progress import say
from distilbert_jax.machine.seal import fingerprint
from distilbert_jax.machine.sharding import first_process_first
from distilbert_jax.models import hub, student

SAMPLE, SAMPLE_TOKENS = 1024, 2**16  # on which layers are chosen, at most


@dataclasses.dataclass(frozen=True)
class Lessons:
    """A teacher, all examples of the training, and its answers to them."""

    teacher: hub.Pretrained
    examples: Examples
    answers: np.ndarray  # [P, C] logits in the order of our labels
    digest: str


def check_output(output: str) -> None:
    """Raise a UserError if the folder holds something else under the names that are used here."""
    answers = Path(output, "answers")
    if answers.exists() and not (answers / "request.json").exists():
        raise UserError(f"{answers} was not made by this command: remove it, or name another "
                        "--output")
    check_kept(output)


def lessons_of(job: Job, teacher: Trained, start: hub.Pretrained) -> Lessons:
    """The teacher's answers to all that the student is trained on.

    Args:
        job: what is trained.
        teacher: judged.
        start: from which --augment draws words, if it has a masked-language head.

    Raises:
        UserError: the folder of answers is damaged, or holds those of something else.
    """
    score = task_report.figures(job.task, "dev", teacher.found["dev"])["score"]
    say("teacher: score on dev " + ("not defined" if score is None else f"{100 * score:.2f}"))
    config, model = job.config, teacher.model
    words = start if start.config.mlm_head else None
    source = fingerprint(words.params) if words else "the training texts"
    request = {
        "teacher": fingerprint(model.params), "tokenizer": spec(job.tokenizer).fingerprint,
        "data": job.task.digest("train", "unlabelled"), "dtype": config.dtype,
        "augment": [config.augment, config.seed, source] if config.augment else None}
    folder = Path(config.output) / "answers"
    given = [job.task.parts[name].examples for name in ("train", "unlabelled")
             if name in job.task.parts]
    if not folder.exists():
        _answer(job, folder, given, model, words, request)
    if fault := seal.find_fault(folder):
        raise UserError(f"{folder} is damaged ({fault}): remove it, and the teacher answers again")
    before = json.loads((folder / "request.json").read_text())
    if other := [name for name in request if request[name] != before.get(name)]:
        raise UserError(f"{folder} holds answers for another {', '.join(other)}: remove it, or "
                        "choose another --output")
    if config.augment:
        given += unlabelled(given[0], np.load(folder / "variants.npy"))
    return Lessons(model, functools.reduce(operator.add, given), np.load(folder / "logits.npy"),
                   json.dumps(request))


def _answer(job: Job, folder: Path, given: list[Examples], model: hub.Pretrained,
            words: hub.Pretrained | None, request: dict[str, Any]) -> None:
    """Let the teacher answer everything, by all processes, and write it down."""
    drawn = None
    if job.config.augment:
        drawn = _variants(job, given[0], words)
        given = given + unlabelled(given[0], drawn)
    graph, params = on_devices(job.config, job.mesh, model)
    found = np.concatenate([
        answers.logits(graph, params, examples, job.mesh, "teacher") for examples in given])
    with first_process_first():
        if jax.process_index() == 0:
            with store.whole_folder(folder) as new:
                np.save(new / "logits.npy", found[:, order(model.labels, job.task.labels)])
                if drawn is not None:
                    np.save(new / "variants.npy", drawn)
                (new / "request.json").write_text(json.dumps(request, indent=1))
                seal.seal(new)


def _variants(job: Job, examples: Examples, words: hub.Pretrained | None) -> np.ndarray:
    """Training examples with other words, by a masked language model or by how often they occur."""
    special = job.tokenizer.all_special_ids
    if words:
        draw = by_model(*on_devices(job.config, job.mesh, words), job.mesh,
                        job.tokenizer.mask_token_id, special)
    else:
        draw = by_frequency(examples, special)
    return variants(examples, draw, job.config.augment, special, job.config.seed)


def choose_layers(job: Job, teacher: hub.Pretrained, count: int) -> list[int]:
    """Remove the layer without which the teacher's answers are read best, until `count` are left.

    No layer is trained for it: a linear map is fitted from the states of the layers that are left,
    at the positions that the task's head reads, to the answers of the whole teacher, on a sample
    of the training examples. The result is kept in OUTPUT/layers.json, so that a continuation on
    other devices keeps the same layers.

    Raises:
        UserError: the file holds what was chosen of another teacher, by other data, or in another
            number.
    """
    request = {"teacher": fingerprint(teacher.params), "data": job.task.digest("train"),
               "layers": count}
    found = kept_layers(job.config.output, request, lambda: _removals(job, teacher, count))
    layers, share = found["removals"][-1]["left"], found["removals"][-1]["readable"]
    say(f"layers {', '.join(map(str, layers))} of the teacher are kept: from their states a linear "
        f"map reads {share:.1%} of the variance of its answers (evenly chosen: "
        f"{found['evenly']:.1%})")
    return layers


def _removals(job: Job, teacher: hub.Pretrained, count: int) -> dict[str, Any]:
    """A row for each removal: which layers are left, and how well the answers are read."""
    train = job.task.parts["train"].examples
    drawn = np.random.default_rng(0).permutation(len(train))[:SAMPLE]
    tokens = np.cumsum(train.lengths[drawn])
    some = train.some(drawn[:max(1, int((tokens <= SAMPLE_TOKENS).sum()))])
    total = teacher.config.num_hidden_layers
    choices = sum(range(count + 1, total + 1)) + count * (total - count)
    say(f"choosing layers: at least {choices} selections of the teacher's {total} layers read "
        f"{len(some):,} training examples of {int(some.lengths.sum()):,} tokens")
    graph, params = on_devices(job.config, job.mesh, teacher)
    whole = answers.logits(graph, params, some, job.mesh, "layers")

    def lost(layers: list[int]) -> float:
        shape = dataclasses.replace(teacher.config, num_hidden_layers=len(layers))
        kept = teacher.params | {"layers": cut(teacher.params["layers"], layers)}
        graph, params = on_devices(
            job.config, job.mesh, dataclasses.replace(teacher, config=shape, params=kept))
        states = answers.collect(answers.states_step(graph, job.mesh), params, some, job.mesh,
                                 "layers")
        return 1 - answers.readable(states, whole)

    removals = student.remove_layers(total, count, lost)
    return {"removals": [{"left": left, "readable": 1 - loss} for left, loss in removals],
            "evenly": 1 - lost(student.choose_layers(str(count), total))}

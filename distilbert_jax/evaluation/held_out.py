"""Held-out masked-language modelling: packed rows and parameters in, figures of both models out.

Beside them the counts of each row, from which the intervals of several models are drawn together.
"""

import collections
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from distilbert_jax.data.batches import read
from distilbert_jax.data.pack import PackedRows
from distilbert_jax.evaluation import intervals
from distilbert_jax.machine.progress import bar
from distilbert_jax.machine.sharding import local_rows, place_rows
from distilbert_jax.training.labels import Vocabulary

SEED = 20191001  # which tokens are hidden; the same for every model and run
BATCH_TOKENS = 8192  # at most, in a power of two of rows


def held_out(
    eval_step: Callable[..., dict[str, Any]],
    params: dict[str, Any],
    teachers: dict[str, Any],
    vocabulary: Vocabulary,
    packed: PackedRows,
    mesh: Mesh,
    rows: int | None = None,
) -> dict[str, float]:
    """Evaluate on `rows` randomly chosen rows, or on all.

    Args:
        eval_step: jitted, from make_eval_step.
        params: of the student; teachers: name → parameters; {} without a teacher.
        vocabulary: of the tokenizer.
        packed: the held-out rows.
        mesh: where batches are laid.
        rows: how many, always the same ones; None for all.

    Returns:
        `mlm_loss` [nats per masked token], `perplexity`, `top1` (share in [0, 1]), `masked`
        (their number), `most_frequent` (top-1 of always saying the commonest token); with a
        teacher also its `teacher_mlm_loss`, `teacher_perplexity`, `teacher_top1`, and `kl` [nats
        per masked token], `retention` = top-1 of the student over the teacher's (not defined,
        and absent, where the teacher's is not above `most_frequent`) and, if both are equally
        wide, `cosine`. Sums are taken in float64 over all batches.
    """
    return held_out_rows(eval_step, params, teachers, vocabulary, packed, mesh, rows)[0]


def held_out_rows(
    eval_step: Callable[..., dict[str, Any]],
    params: dict[str, Any],
    teachers: dict[str, Any],
    vocabulary: Vocabulary,
    packed: PackedRows,
    mesh: Mesh,
    rows: int | None = None,
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Evaluate as `held_out` does, and count in each row.

    Returns:
        The figures; and [R] each, in an order that is the same for every model: `masked` and
        `correct`, with a teacher also `teacher_correct`.
    """
    key = jax.random.key(SEED)
    total: dict[str, float] = collections.defaultdict(float)
    counts: dict[str, list[np.ndarray]] = collections.defaultdict(list)
    progress = bar(total=min(rows or len(packed), len(packed)), desc="evaluate", unit=" rows",
                   leave=False, delay=1)
    for batch, count in some_rows(packed, mesh, rows):
        sums = eval_step(params, teachers, vocabulary, batch, key)
        for name, value in jax.device_get(sums).items():
            total[name] += float(value.sum())
            if value.ndim:
                counts[name].append(value[:count])  # without the rows of padding
        progress.update(count)
    progress.close()
    return _figures(total), {name: np.concatenate(parts) for name, parts in counts.items()}


def top1_intervals(
    masked: np.ndarray, correct: Mapping[str, np.ndarray]
) -> dict[str, dict[str, tuple[float, float] | None]]:
    """95 % intervals of top-1, by bootstrap over rows, the same rows drawn for every model.

    Args:
        masked: hidden tokens of each row, [R].
        correct: model → how many of them it guesses, [R]; "teacher", if it is there, is whom others
            are compared with.

    Returns:
        Model → `top1_interval` and, beside a teacher, `retention_interval`: of its share of the
        teacher's top-1. None where too many draws are not defined.
    """
    drawn = intervals.drawn_means({"": masked, **correct})
    found = {}
    with np.errstate(divide="ignore", invalid="ignore"):
        for name in correct:
            found[name] = {"top1_interval": intervals.interval(drawn[name] / drawn[""])}
            if "teacher" in correct and name != "teacher":
                found[name]["retention_interval"] = intervals.interval(
                    drawn[name] / drawn["teacher"])
    return found


def some_rows(
    packed: PackedRows, mesh: Mesh, rows: int | None
) -> Iterator[tuple[dict[str, jax.Array], int]]:
    """Batches of `rows` randomly chosen rows, always the same ones, or of all, on the mesh.

    Yields:
        A batch as read from disk, with rows of padding so that all are of one shape, and how many
        others there are in it.
    """
    data = mesh.shape["data"]
    taken = 2 ** int(math.log2(max(1, BATCH_TOKENS // packed.rows.shape[1])))
    size = math.ceil(taken / data) * data  # blank rows at the end change no mask before them
    own = local_rows(mesh, size)
    order = np.random.default_rng(SEED).permutation(len(packed))[:rows]
    for start in range(0, len(order), taken):
        chosen = np.sort(order[start:start + taken])
        mine = chosen[own[own < len(chosen)]]  # of this process; the last batch is not full
        yield place_rows(_filled(read(packed, mine), len(own)), mesh, size), len(chosen)


def _filled(batch: dict[str, np.ndarray], size: int) -> dict[str, np.ndarray]:
    """Add rows of padding up to `size`, so that one shape is compiled."""
    return {name: np.pad(x, ((0, size - len(x)), *[(0, 0)] * (x.ndim - 1)))
            for name, x in batch.items()}


def _figures(total: Mapping[str, float]) -> dict[str, float]:
    masked, tokens = max(total["masked"], 1.0), max(total["tokens"], 1.0)
    figures = {"masked": total["masked"], "most_frequent": total["most_frequent"] / masked}
    for who in ("", "teacher_"):
        if f"{who}nll" in total:
            loss = total[f"{who}nll"] / masked
            figures |= {f"{who}mlm_loss": loss, f"{who}perplexity": math.exp(min(loss, 700.0)),
                        f"{who}top1": total[f"{who}correct"] / masked}
    if "kl" in total:
        figures["kl"] = total["kl"] / masked
        if total["teacher_correct"] > total["most_frequent"]:
            figures["retention"] = total["correct"] / total["teacher_correct"]
    if "cosine" in total:
        figures["cosine"] = total["cosine"] / tokens
    return figures

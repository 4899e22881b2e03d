"""Teacher parameters → student parameters: which layers are kept, and what is dropped."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from distilbert_jax.errors import UserError
from distilbert_jax.models.encoder import EncoderConfig
from distilbert_jax.models.family import Family


def choose_layers(wish: str, teacher_layers: int) -> list[int]:
    """The teacher layers that the student starts from.

    Args:
        wish: "" for half of them, a number of evenly spread layers, or a list "0,2,4,7,9,11".
        teacher_layers: how many there are.

    Returns:
        Ascending layer numbers. Even spreading is a rounded linspace from the first to the last,
        which gives the reference's 0, 2, 4, 7, 9, 11 for 12 → 6.

    Raises:
        UserError: not numbers, out of range or repeated.
    """
    try:
        numbers = [int(word) for word in wish.split(",") if word] if wish else []
    except ValueError as error:
        raise UserError(f"--student-layers {wish} must be a number or a list like 0,2,4") from error
    if "," in wish:
        layers = numbers
        if len(set(layers)) < len(layers):
            raise UserError(f"--student-layers {wish} names a layer twice")
        bad = [n for n in layers if not 0 <= n < teacher_layers]
    else:
        count = numbers[0] if numbers else max(1, teacher_layers // 2)
        bad = [] if 1 <= count <= teacher_layers else [count]
        layers = [] if bad else np.rint(np.linspace(0, teacher_layers - 1, count)).astype(int)
    if bad or not len(layers):
        raise UserError(f"--student-layers {wish}: the teacher has {teacher_layers} layers, "
                        f"0 to {teacher_layers - 1}")
    return sorted(int(n) for n in layers)


def remove_layers(
    total: int, count: int, change: Callable[[list[int]], float]
) -> list[tuple[list[int], float]]:
    """Remove one layer after the other, then exchange some: each time what costs least.

    Greedy removal makes total + (total - 1) + … calls, where all subsets would make many more. It
    can end where no good choice is near, so afterwards one layer that is left is exchanged for one
    that was removed, as long as that costs less.

    Args:
        total: layers of the teacher.
        count: layers that are left in the end.
        change: ascending layer numbers → what is lost with these alone.

    Returns:
        (the layers left, what is lost) after each removal and each exchange; of none, all layers
        and 0.
    """
    def cheapest(choices: list[list[int]]) -> tuple[list[int], float]:
        costs = [change(layers) for layers in choices]
        best = int(np.argmin(costs))
        return choices[best], costs[best]

    steps = [(list(range(total)), 0.0)]
    while len(left := steps[-1][0]) > count:
        steps.append(cheapest([[n for n in left if n != out] for out in left]))
    while removed := sorted(set(range(total)) - set(steps[-1][0])):
        left, cost = steps[-1]
        better = cheapest([sorted({*left, back} - {out}) for out in left for back in removed])
        if better[1] >= cost:
            break
        steps.append(better)
    return steps


def student_config(
    family: Family, teacher: EncoderConfig, num_layers: int, dropout: float
) -> tuple[Family, EncoderConfig]:
    """Family and shape of a student of `num_layers` layers, with a head and without a pooler.

    BERT's is a DistilBERT; every other family's is of the family itself.
    """
    family, shape = family.student(teacher)
    return family, dataclasses.replace(
        shape, num_hidden_layers=num_layers, pooler=False, mlm_head=True, hidden_dropout=dropout,
        attention_dropout=dropout)


def student_params(
    teacher: dict[str, Any], layers: list[int], fold_token_type: bool = True,
    token_types: bool = False,
) -> dict[str, Any]:
    """Copy the student's start out of the teacher (Sanh et al. 2019, section 3).

    Args:
        teacher: its parameters, with MLM head.
        layers: the teacher layer of each student layer.
        fold_token_type: add token type 0, which the teacher adds to every token, to the
            positions, so that the embeddings equal the teacher's; False drops it, as the
            reference does. The MLM head's transform is copied, which the reference does only on
            request.
        token_types: whether the student has token types, so that the teacher's are copied.

    Returns:
        A nested dict of the student's shapes, sharing arrays with the teacher.
    """
    embeddings = dict(teacher["embeddings"])
    types = None if token_types else embeddings.pop("token_type", None)
    if fold_token_type and types:
        type_0 = types["embedding"][0]
        embeddings["position"] = {"embedding": embeddings["position"]["embedding"] + type_0}
    return {
        "embeddings": embeddings,
        "layers": {i: teacher["layers"][n] for i, n in enumerate(layers)},
        "mlm_head": teacher["mlm_head"],
    }

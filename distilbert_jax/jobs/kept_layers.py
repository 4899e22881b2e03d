"""OUTPUT/layers.json: which layers of its teacher a student keeps, chosen once for a run.

A job says what its choice depends on and how it is made; a continuation, on whatever devices, keeps
what the file says.
"""

from collections.abc import Callable
from typing import Any

import jax

from distilbert_jax.errors import UserError
from distilbert_jax.jobs.task_model import read_json
from distilbert_jax.machine import seal, store
from distilbert_jax.machine.sharding import first_process_first

NAME = "layers.json"


def check_kept(output: str) -> None:
    """Raise a UserError if the folder holds something else under the name of the choice."""
    name = store.join(output, NAME)
    if store.exists(name) and not {"request", "removals"} <= read_json(store.path(name)).keys():
        raise UserError(f"{name} was not made by this command: remove it, or name another "
                        "--output")


def kept_layers(output: str, request: dict[str, Any], removals: Callable[[], dict[str, Any]]
                ) -> dict[str, Any]:
    """The choice of layers in OUTPUT/layers.json, which is made there first if there is none.

    Args:
        output: folder of the job, here or under gs://.
        request: what the choice depends on.
        removals: makes the choice, by all processes.

    Raises:
        UserError: the file holds a choice for another request, or something else.
    """
    check_kept(output)
    name = store.join(output, NAME)
    path = store.path(name)
    found = read_json(path)
    if found and (other := [part for part in request
                            if request[part] != found["request"].get(part)]):
        raise UserError(f"{path} was made for another {', '.join(other)}: remove it, or choose "
                        "another --output")
    if not found:
        made = removals()
        with first_process_first():
            if jax.process_index() == 0:
                with store.errors_about(name):
                    path.parent.mkdir(parents=True, exist_ok=True)
                    seal.write_json(path, {"request": request} | made)
    return read_json(path)

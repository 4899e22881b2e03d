"""Where the figures of a run are shown while it goes on: a row of BOARDS each.

All that a board is given stands in metrics.jsonl too (metrics_log.py), so a board may be lost.
"""

import os
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from distilbert_jax.errors import UserError, first_line
from distilbert_jax.machine import store


class Board(Protocol):
    """A board, made from the run's folder, the updates done before, the settings, and whether
    this process is the one that writes."""

    name: str  # of what it leaves in the run's folder

    def add(self, step: int, figures: Mapping[str, float]) -> None:
        """Show the figures of an update."""

    def flush(self) -> None:
        """Write down what is left."""

    def close(self) -> None:
        """Write down what is left, and end."""


class TensorBoard:
    """Files in OUTPUT/tensorboard, which `tensorboard --logdir OUTPUT` shows."""

    name = "tensorboard"

    def __init__(self, output: str | Path, start: int, _: Mapping[str, Any], writes: bool):
        from tensorboardX import SummaryWriter  # slow to import

        self._writer = SummaryWriter(str(store.local(output) / self.name),
                                     purge_step=start + bool(start), write_to_disk=writes)
        self.flush, self.close = self._writer.flush, self._writer.close

    def add(self, step: int, figures: Mapping[str, float]) -> None:
        """Show the figures of an update."""
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)


class WeightsAndBiases:
    """A run on Weights & Biases; a continuation goes on with the same, by OUTPUT/wandb-run.

    The project is WANDB_PROJECT or distilbert_jax; wandb's other variables hold too, such as
    WANDB_MODE=offline.
    """

    name = "wandb-run"

    def __init__(
        self, output: str | Path, start: int, settings: Mapping[str, Any], writes: bool,
    ):
        """Begin or continue the run.

        Raises:
            UserError: nobody is logged in, or there is no way to the server.
        """
        import wandb

        try:
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT") or "distilbert_jax", name=str(output),
                id=_run_id(output, start) if writes else None, resume="allow",
                dir=store.local(output), config=dict(settings),
                mode=None if writes else "disabled", settings=wandb.Settings(console="off"))
        except wandb.Error as error:
            raise UserError(f"--log-to wandb: {first_line(error).rstrip('.')}; or set "
                            "WANDB_MODE=offline, or leave --log-to out") from error

    def add(self, step: int, figures: Mapping[str, float]) -> None:
        """Send the figures of an update; of those that were sent before it was repeated, none."""
        self._run.log(dict(figures), step=step)

    def flush(self) -> None:
        """Do nothing: wandb sends by itself."""

    def close(self) -> None:
        """Wait until all is sent."""
        self._run.finish()


def _run_id(output: str | Path, start: int) -> str:
    """The run's name on the server: another one for each run, kept in its folder."""
    path = store.fetch(store.join(output, WeightsAndBiases.name))
    if not start or not path.is_file():
        with store.whole_file(path) as new:
            new.write_text(uuid.uuid4().hex[:8])
    return path.read_text()


BOARDS: dict[str, Callable[[str | Path, int, Mapping[str, Any], bool], Board]] = {
    "tensorboard": TensorBoard, "wandb": WeightsAndBiases}

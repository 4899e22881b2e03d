"""A command as one of several processes; test_two_processes starts it as a program."""

import os
import sys


def small(patch):
    """Leave out what is seen elsewhere and slow; `patch` is setattr, or undoes it too."""
    from distilbert_jax.evaluation import held_out, intervals
    from distilbert_jax.jobs import distil

    patch(distil, "_write_report", lambda *_: None)
    patch(held_out, "BATCH_TOKENS", 256)
    patch(intervals, "DRAWS", 50)


if __name__ == "__main__":
    if sys.argv[1] == "distil":  # scikit-learn, of tasks, asks for torch where it is in the table
        sys.modules["torch"] = None  # transformers would import it, and nothing here needs it
    from distilbert_jax.commands.main import run
    from distilbert_jax.machine import processes

    processes.HEARTBEAT_SECONDS = int(os.environ.get("HEARTBEAT_SECONDS", "60"))
    small(setattr)
    run(sys.argv[1], sys.argv[2:])

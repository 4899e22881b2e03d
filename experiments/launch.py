"""What every entry point shares: recipes, several processes, one line and code 2 for an error."""

import importlib
import os
import pkgutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))  # so that a clone runs without being installed

from distilbert_jax.config import UserError  # noqa: E402
from distilbert_jax.train import Interrupted  # noqa: E402

INTERRUPTED = 75  # EX_TEMPFAIL: the same command goes on


def recipes() -> dict[str, ModuleType]:
    """The files of experiments/recipes by name."""
    names = [m.name for m in pkgutil.iter_modules([str(HERE / "recipes")])]
    return {name: importlib.import_module(f"recipes.{name}") for name in names}


def connect() -> None:
    """Join the other processes of the run, if the environment says that there are any.

    Either JAX_COORDINATOR_ADDRESS (host:port of the first one), JAX_NUM_PROCESSES and
    JAX_PROCESS_ID are set, or several workers of a TPU slice (TPU_WORKER_HOSTNAMES) are known to
    JAX itself. All but the first are silent.

    Raises:
        UserError: only some are set, or they are not numbers, or the others do not answer.
    """
    import jax

    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    values = [os.environ.get(name) for name in names]
    missing = [name for name, value in zip(names, values, strict=True) if not value]
    if len(missing) < len(names):
        if missing:
            raise UserError(f"{' and '.join(missing)} not set, which several processes need beside "
                            f"{' and '.join(n for n in names if n not in missing)}")
        address, number, index = values
        if not (number.isdecimal() and index.isdecimal() and int(index) < int(number)):
            raise UserError(f"JAX_NUM_PROCESSES {number} and JAX_PROCESS_ID {index} must be whole "
                            "numbers, the second below the first")
        arguments = (address, int(number), int(index))
    elif "," in os.environ.get("TPU_WORKER_HOSTNAMES", ""):
        arguments = ()
    else:
        return
    try:
        jax.distributed.initialize(*arguments)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"the processes of this run do not find each other: "
                        f"{str(error).splitlines()[0]}") from error
    if jax.process_index():
        sys.stdout = open(os.devnull, "w")


def launch(main: Callable[[list[str]], None]) -> None:
    """Run `main` with the command line; what the user can mend ends in one line and code 2."""
    try:
        connect()
        main(sys.argv[1:])
    except UserError as error:
        print("error:", *str(error).split("\n"), file=sys.stderr)
        sys.exit(2)
    except Interrupted as stopped:
        print(stopped, file=sys.stderr)
        sys.exit(INTERRUPTED)
    except KeyboardInterrupt:  # outside the training loop, where there is nothing to save
        sys.exit("interrupted")

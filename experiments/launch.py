"""What every entry point shares: recipes, and one line and exit code 2 for an error."""

import importlib
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


def launch(main: Callable[[list[str]], None]) -> None:
    """Run `main` with the command line; what the user can mend ends in one line and code 2."""
    try:
        main(sys.argv[1:])
    except UserError as error:
        print("error:", *str(error).split("\n"), file=sys.stderr)
        sys.exit(2)
    except Interrupted as stopped:
        print(stopped, file=sys.stderr)
        sys.exit(INTERRUPTED)
    except KeyboardInterrupt:  # outside the training loop, where there is nothing to save
        sys.exit("interrupted")

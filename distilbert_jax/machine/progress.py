"""Progress bars and the lines between them; of several processes the first alone shows any."""

import sys
import warnings
from typing import Any

import jax
from tqdm import TqdmWarning

with warnings.catch_warnings():
    warnings.simplefilter("ignore", TqdmWarning)  # a notebook without ipywidgets gets lines of text
    from tqdm.auto import tqdm


def bar(**options: Any) -> "tqdm[Any]":
    """A tqdm bar that moves twice a second on a terminal or in a notebook, and four times a minute
    in a file."""
    seen = sys.stderr.isatty() or "ipykernel" in sys.modules
    return tqdm(mininterval=0.5 if seen else 15, disable=jax.process_index() != 0, **options)


def say(line: str) -> None:
    """Print a line to stderr without breaking a bar."""
    if jax.process_index() == 0:
        tqdm.write(line, file=sys.stderr)

"""Progress bars and the lines between them; of several processes the first alone shows any."""

import sys
from typing import Any

import jax
from tqdm import tqdm


def bar(**options: Any) -> "tqdm[Any]":
    """A tqdm bar that moves twice a second on a terminal, and four times a minute in a file."""
    return tqdm(mininterval=0.5 if sys.stderr.isatty() else 15,
                disable=jax.process_index() != 0, **options)


def say(line: str) -> None:
    """Print a line to stderr without breaking a bar."""
    if jax.process_index() == 0:
        tqdm.write(line, file=sys.stderr)

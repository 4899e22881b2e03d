"""What the user can mend: one error class, and the choice of a known name."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """An error that the user can mend; the command line prints its one line and exits with 2."""


def choose(name: str, known: Iterable[str], what: str) -> str:
    """Return `name` when it is one of `known`.

    Args:
        name: what the user wrote.
        known: the names that exist.
        what: what is being named, for the message, e.g. "recipe".

    Raises:
        UserError: unknown name; the message suggests the nearest one and lists all.
    """
    known = sorted(known)
    if name in known:
        return name
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise UserError(f"unknown {what} {name!r}{hint} (known: {', '.join(known)})")

"""What ends a run: what the user can mend, in one line, and a signal; and the words for them."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """An error that the user can mend; the command line prints its one line and exits with 2."""


class Interrupted(Exception):
    """A run was asked to stop (Ctrl-C, SIGTERM) and has saved its state; the same call goes on."""


def first_line(error: BaseException) -> str:
    """Shorten what a library raised to its first line that says something.

    Returns:
        At most 200 characters; the name of the error's type where it says nothing. A line that
        ends with a colon goes on in the next.
    """
    lines = (str(error).strip() or type(error).__name__).splitlines()
    said = lines.pop(0).strip()
    while lines and said.endswith(":"):
        said += f" {lines.pop(0).strip()}"
    return said[:200]


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
    raise UserError(f"unknown {what} {name!r}{nearest(name, known)} (known: {', '.join(known)})")


def nearest(name: str, known: Iterable[str]) -> str:
    """"; did you mean NEAREST?", or "" if none of the known names is near."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {near[0]}?" if near else ""

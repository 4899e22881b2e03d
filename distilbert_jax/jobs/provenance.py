"""Where a report comes from: every call that worked in its folder, the settings, the versions.

A run that was stopped is the work of several calls, and only all of them together made it: each is
a line of OUTPUT/calls.jsonl.
"""

import dataclasses
import datetime
import itertools
import json
import shlex

import jax

from distilbert_jax.config import LoopConfig, flag
from distilbert_jax.errors import UserError
from distilbert_jax.evaluation import report
from distilbert_jax.machine import store

CALLS = "calls.jsonl"


def note_call(output: str) -> None:
    """Append how the job was called to OUTPUT/calls.jsonl; of several processes the first does.

    Raises:
        UserError: the file cannot be written.
    """
    if jax.process_index():
        return
    path = store.path(output) / CALLS
    line = json.dumps({"date": str(datetime.date.today()), "call": report.call()})
    try:
        with store.errors_about(output):
            before = _read(path)
            with store.whole_file(path) as new:
                new.write_text(f"{before}{line}\n")
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from error


def provenance(config: LoopConfig) -> str:
    """The last part of a report, in Markdown: calls, settings and versions."""
    path = store.path(config.output) / CALLS
    with store.errors_about(config.output):
        noted = [json.loads(line) for line in _read(path).splitlines()]
    calls = []
    for call, same in itertools.groupby(noted, key=lambda one: one["call"]):
        dates = [one["date"] for one in same]
        when = " to ".join(dict.fromkeys((dates[0], dates[-1])))
        often = f", {len(dates)} times" if len(dates) > 1 else ""
        calls.append(f"- {when}{often}: `{call}`")
    return ("## Provenance\n\n" + "\n".join(calls) + "\n\nSettings other than the defaults, at the "
            f"last call: `{shlex.join(flags(config))}`\n\n{report.versions()}\n")


def flags(config: LoopConfig) -> list[str]:
    """The settings that differ from the defaults, as words of a command line; without a recipe,
    whose settings are among them."""
    words: list[str] = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if each := field.metadata.get("each"):
            plain = field.default_factory()
            for name in plain | value:
                if value.get(name, 0.0) != plain.get(name, 0.0):
                    words += [flag(f"{each}_{name}"), str(value.get(name, 0.0))]
        elif value == field.default or field.name == "recipe":
            continue
        elif isinstance(value, bool):
            words.append(flag(field.name) if value else flag(f"no_{field.name}"))
        else:
            words += [flag(field.name), *map(str, value if isinstance(value, tuple) else [value])]
    return words


def next_steps(*commands: list[str]) -> str:
    """Lines to copy: what may be done with what a job has left.

    Args:
        commands: the words of each, after the program's name.
    """
    return "next: " + "\n      ".join(shlex.join(["distilbert-jax", *words]) for words in commands)


def _read(path: store.AnyPath) -> str:
    try:
        return path.read_text()
    except FileNotFoundError:
        return ""

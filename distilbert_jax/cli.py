"""Dataclasses of settings ↔ the command line: each field is a flag, an error is one line."""

import argparse
import dataclasses
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

from distilbert_jax.config import GROUPS, Word, Words, flag
from distilbert_jax.errors import UserError, choose, nearest

Command = Callable[[Sequence[str]], None]
Recipes = Mapping[str, Mapping[str, Any]]  # name → the settings whose defaults it changes


def listing(program: str, text: str, commands: Mapping[str, Command]) -> str:
    """The help of a program that has several commands: the first line of the docstring of each."""
    lines = "\n".join(f"  {name:11}{inspect.getdoc(command).splitlines()[0]}"
                      for name, command in commands.items())
    return (f"usage: {program} NAME [FLAG VALUE ...]\n\n{text}\n\n{lines}\n\n"
            f"{program} NAME --help lists the flags of one of them, with examples.")


def about(program: str, command: Command, commands: Mapping[str, Command]) -> tuple[str, str]:
    """How one of several commands is called, and the text of its help, as `parse` takes them."""
    others = ", ".join(name for name in commands if name != command.__name__)
    return (f"{program} {command.__name__}",
            f"{inspect.getdoc(command)}\n\nother commands ({program} NAME --help): {others}")


def parse(config_class: type, program: str, text: str, argv: Sequence[str],
          recipes: Recipes | None = None) -> Any:
    """Read the command line into `config_class`: `read`, then `settle`."""
    return settle(config_class, read(config_class, program, text, argv, recipes or ()), recipes)


def read(config_class: type, program: str, text: str, argv: Sequence[str],
         recipes: Iterable[str] = ()) -> dict[str, Any]:
    """Read the command line.

    Args:
        config_class: of the settings; each field with metadata is one flag.
        program: how the command is called.
        text: of `--help`; from "Examples:" on it stands below the flags.
        argv: the words after the program's name.
        recipes: the names that `--help` lists.

    Returns:
        What was given, by the name of its setting; a weight of a loss as "alpha_NAME".

    Raises:
        UserError: an unknown flag, or a value of another kind.
    """
    above, examples, below = text.partition("\n\nExamples:\n")
    parser = _Parser(
        description=above, epilog="examples:\n" + below if examples else "",
        argument_default=argparse.SUPPRESS, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage=f"{program} [FLAG VALUE ...]")
    groups = {name: parser.add_argument_group(name) for name in GROUPS}
    for name, group, help_text, kind in _flags(config_class):
        if name == "recipe":
            help_text += f" (known: {', '.join(sorted(recipes))})"
        word = name if kind.pop("positional", False) else flag(name)
        groups[group].add_argument(
            word, help=help_text.replace("%", "%%") or argparse.SUPPRESS, **kind)
    given = vars(parser.parse_args(argv))
    return {name: tuple(v) if isinstance(v, list) else v for name, v in given.items()}


def settle(config_class: type, given: Mapping[str, Any], recipes: Recipes | None = None) -> Any:
    """Put what was given over the defaults of its recipe, and check it.

    Args:
        config_class: of the settings.
        given: by the name of each; of a table of weights one as "alpha_NAME".
        recipes: that "recipe" may name.

    Returns:
        A `config_class`.

    Raises:
        UserError: an unknown setting or recipe, or a value that cannot be.
    """
    tables = {field.name: field for field in dataclasses.fields(config_class)
              if "each" in field.metadata}
    known = {name for name, *_ in _flags(config_class)} | set(tables)
    for name in given:
        if name not in known:
            raise UserError(f"unknown setting {name!r}" + (
                nearest(name, known) or f" (known: {', '.join(sorted(known))})"))
    recipe, recipes = str(given.get("recipe") or ""), recipes or {}
    settings = dict(recipes[choose(recipe, recipes, "--recipe")]) if recipe else {}
    for table, field in tables.items():
        prefix = f"{field.metadata['each']}_"
        weights = {name.removeprefix(prefix): weight for name, weight in given.items()
                   if name.startswith(prefix)}
        before = given.get(table) or settings.get(table) or field.default_factory()
        if not isinstance(before, Mapping):
            raise UserError(f"{table} {before!r} must hold weights by name")
        settings[table] = {**before, **weights}
        for name, weight in settings[table].items():
            if not isinstance(weight, int | float):
                raise UserError(f"{flag(prefix + name)} {weight!r} must be a number")
        given = {name: value for name, value in given.items()
                 if name != table and not name.startswith(prefix)}
    return config_class(**settings | given)


def _flags(config_class: type) -> Iterator[tuple[str, str, str, dict[str, Any]]]:
    """Each flag: its name with underscores, its group, its help, and what argparse needs."""
    from distilbert_jax.training.losses import LOSSES  # here, because it starts JAX

    for field in dataclasses.fields(config_class):
        meta = field.metadata
        if "each" not in meta:
            yield field.name, meta["group"], _help(field), _kind(field)
            continue
        defaults = field.default_factory()
        for name, row in LOSSES.items():
            if row.needs in meta["needs"]:
                yield (f"{meta['each']}_{name}", meta["group"],
                       f"{meta['help']} {row.text} (default: {defaults.get(name, 0.0)})",
                       {"type": float, "metavar": "FLOAT"})


def _help(field: dataclasses.Field) -> str:
    text = field.metadata["help"]
    if field.default in (None, "", ()) or "default:" in text:
        return text
    default = field.default
    return f"{text} (default: {('off', 'on')[default] if isinstance(default, bool) else default})"


def _kind(field: dataclasses.Field) -> dict[str, Any]:
    """What a flag takes, as argparse wants to know it."""
    meta = field.metadata
    if isinstance(field.default, bool):
        return {"action": argparse.BooleanOptionalAction}
    kind = meta.get("type", int if field.default is None else type(field.default))
    metavar = meta.get("metavar") or "|".join(meta.get("choices", ())) or {
        int: "INT", float: "FLOAT"}.get(kind) or {Word: "DIR", Words: "FILE"}[field.type]
    several = {"nargs": meta["nargs"], "action": "extend"} if "nargs" in meta else {}
    return {"type": str if kind is tuple else kind, "metavar": metavar,
            "positional": meta.get("positional", False)} | several


class _Parser(argparse.ArgumentParser):
    """argparse, with one line for an error instead of the whole usage."""

    def error(self, message: str) -> NoReturn:
        unknown = message.removeprefix("unrecognized arguments: ").split()
        if len(unknown) < len(message.split()) and unknown and unknown[0].startswith("-"):
            name = unknown[0].split("=")[0]
            raise UserError(f"unknown flag {name!r}" + (
                nearest(name, self._option_string_actions) or " (see --help)"))
        raise UserError(message.removeprefix("argument ") + " (see --help)")

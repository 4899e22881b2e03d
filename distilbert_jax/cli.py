"""Dataclasses of settings ↔ the command line: each field is a flag, an error is one line."""

import argparse
import dataclasses
from collections.abc import Sequence
from typing import Any, NoReturn

from distilbert_jax.config import GROUPS, flag
from distilbert_jax.errors import UserError, choose
from distilbert_jax.training.losses import LOSSES


class _Parser(argparse.ArgumentParser):
    """argparse, with one line for an error instead of the whole usage."""

    def error(self, message: str) -> NoReturn:
        unknown = message.removeprefix("unrecognized arguments: ").split()
        if len(unknown) < len(message.split()) and unknown and unknown[0].startswith("-"):
            choose(unknown[0].split("=")[0], self._option_string_actions, "flag")
        raise UserError(message.removeprefix("argument ") + " (see --help)")


def parse(config_class: type, description: str, argv: Sequence[str],
          recipes: dict[str, dict[str, Any]]) -> Any:
    """Read the command line into `config_class`.

    Args:
        config_class: DistilConfig, PretrainConfig or PrepareConfig; each field with metadata
            is one flag.
        description: first line of `--help`.
        argv: the words after the program's name.
        recipes: recipe name → the defaults it sets; flags that are given win over them.

    Returns:
        A `config_class`.

    Raises:
        UserError: unknown flag or recipe, or a value that cannot be.
    """
    parser = _Parser(
        description=description, argument_default=argparse.SUPPRESS, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter, usage="%(prog)s [FLAG VALUE ...]")
    groups = {name: parser.add_argument_group(name) for name in GROUPS}
    for field in dataclasses.fields(config_class):
        meta = dict(field.metadata)
        group = groups[meta["group"]]
        if "each" in meta:
            weights = field.default_factory()
            rows = {name: row for name, row in LOSSES.items() if row.needs in meta["needs"]}
            for name, row in rows.items():
                group.add_argument(
                    flag(f"{meta['each']}_{name}"), type=float, metavar="X",
                    help=f"{meta['help']} {row.text} (default: {weights.get(name, 0.0)})")
            continue
        text = meta["help"].replace("%", "%%")
        if field.default not in (None, "", ()) and "default:" not in text:
            text += f" (default: {field.default})"
        if field.name == "recipe":
            text += f" (known: {', '.join(sorted(recipes))})"
        if isinstance(field.default, bool):
            kind = {"action": argparse.BooleanOptionalAction}
        else:
            value_type = int if field.name == "steps" else type(field.default)
            value_type = meta.get("type", str if value_type is tuple else value_type)
            kind = {"type": value_type, "metavar": "X"}
            kind |= {"nargs": meta["nargs"], "action": "extend"} if "nargs" in meta else {}
        group.add_argument(flag(field.name), help=text, **kind)
    given = vars(parser.parse_args(argv))
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
    recipe = given.get("recipe", "")
    defaults = recipes[choose(recipe, recipes, "--recipe")] if recipe else {}
    return config_class(**_merged(config_class, defaults, given))


def _merged(
    config_class: type, defaults: dict[str, Any], given: dict[str, Any]
) -> dict[str, Any]:
    """The defaults of a recipe, and what is given over them; of a table, item by item."""
    for field in dataclasses.fields(config_class):
        if each := field.metadata.get("each"):
            names = [key for key in given if key.startswith(f"{each}_")]
            items = {name.removeprefix(f"{each}_"): given.pop(name) for name in names}
            before = defaults.get(field.name, field.default_factory())
            defaults = defaults | {field.name: {**before, **items}}
    return defaults | given

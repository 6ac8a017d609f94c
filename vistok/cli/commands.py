"""Commands: how ``--help`` shows them, without types of flags and with paragraphs that fit the terminal."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup


def without_types_of_flags(parameters: Iterable[Any]) -> list[Any]:
    """Remove the ``<bool>`` beside flags such as ``--resume``, which take no value."""
    shown = list(parameters)
    for parameter in shown:
        if getattr(parameter, "is_flag", False) and parameter.metavar is None:
            parameter.metavar = ""
    return shown


TEXTS = ("prompt", "negative_prompt", "question")
"""The parameters that may be empty texts."""


class Command(TyperCommand):
    def get_params(self, ctx: Any) -> list[Any]:
        return without_types_of_flags(super().get_params(ctx))

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Refuse empty values, as of ``--out "$FOLDER"`` with an empty variable: they would be the current folder."""
        if "" in args or any(text.startswith("--") and text.endswith("=") for text in args):
            given, _, _ = self.make_parser(ctx).parse_args(list(args))
            for parameter in self.get_params(ctx):
                value = given.get(parameter.name)
                if "" in (value if isinstance(value, list | tuple) else [value]) and parameter.name not in TEXTS:
                    raise typer.BadParameter("it is empty; give a value, or leave it out", ctx=ctx, param=parameter)
        return super().parse_args(ctx, args)


class Group(TyperGroup):
    def get_params(self, ctx: Any) -> list[Any]:
        return without_types_of_flags(super().get_params(ctx))


def help_of(command: Any) -> str:
    """The docstring of a command, with the lines of each paragraph joined; the terminal wraps them."""
    return re.sub(r"(?<![.\n])\n(?!\n)", " ", inspect.getdoc(command) or "")

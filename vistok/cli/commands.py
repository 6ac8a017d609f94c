"""How commands are shown by --help: flags without a type, and paragraphs that fit the terminal."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable
from typing import Any

from typer.core import TyperCommand, TyperGroup


def without_types_of_flags(parameters: Iterable[Any]) -> list[Any]:
    """``--resume`` takes no value, and ``<bool>`` beside it looks as if it did."""
    shown = list(parameters)
    for parameter in shown:
        if getattr(parameter, "is_flag", False) and parameter.metavar is None:
            parameter.metavar = ""
    return shown


class Command(TyperCommand):
    def get_params(self, ctx: Any) -> list[Any]:
        return without_types_of_flags(super().get_params(ctx))


class Group(TyperGroup):
    def get_params(self, ctx: Any) -> list[Any]:
        return without_types_of_flags(super().get_params(ctx))


def help_of(command: Any) -> str:
    """The docstring of a command, whose lines are joined where a sentence goes on: the terminal breaks them."""
    return re.sub(r"(?<![.\n])\n(?!\n)", " ", inspect.getdoc(command) or "")

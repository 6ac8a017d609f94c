"""How ``--help`` shows commands: flags without a type, and paragraphs that fit the terminal."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable
from typing import Any

from typer.core import TyperCommand, TyperGroup


def without_types_of_flags(parameters: Iterable[Any]) -> list[Any]:
    """Remove the ``<bool>`` beside flags such as ``--resume``, which take no value."""
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
    """The docstring of a command, with the lines of each paragraph joined; the terminal wraps them."""
    return re.sub(r"(?<![.\n])\n(?!\n)", " ", inspect.getdoc(command) or "")

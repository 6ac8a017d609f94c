"""The consoles that all commands print with, and the options that several commands share."""

from __future__ import annotations

import shlex
import sys
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from vistok.config import Allowed

output, errors = Console(soft_wrap=True, highlight=False), Console(stderr=True, soft_wrap=True, highlight=False)

Dtype = Annotated[
    str | None, typer.Option(help="Precision of weights and computation: fp32, bf16 or fp16; as saved by default.")
]
Commands = Annotated[
    bool, typer.Option("--allow-commands", help="Let data.root='pipe:COMMAND' of this command line run a command.")
]
Environment = Annotated[
    bool,
    typer.Option("--allow-environment", help="Let KEY='${oc.env:NAME}' of this command line read the environment."),
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps, …; a GPU if there is one by default.")]


def allowed_by(commands: bool, environment: bool) -> Allowed:
    """What the overrides of this command line may do."""
    from vistok.config import Allowed

    return Allowed(commands=commands, environment=environment)


def command_line() -> str:
    """This command, as it can be typed again."""
    return f"vistok {shlex.join(sys.argv[1:])}"


def print_table(table: Table) -> None:
    """Print a table, fitted to a terminal; in files and pipes it is as wide as it needs, so that names stay whole."""
    for column in table.columns:
        column.overflow = "fold"
    console = output if output.is_terminal else Console(width=1000)
    console.print(table, soft_wrap=False)

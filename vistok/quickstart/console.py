"""The quickstart's output on the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vistok.utils.report import Score


class Stages:
    """Numbered headlines for the stages of a long job."""

    def __init__(self, names: Sequence[str]):
        self._names = list(names)
        self._console = Console(highlight=False, soft_wrap=True)

    def begin(self, name: str, what: str) -> None:
        """Print the headline of the stage ``name``, with ``what`` it does."""
        number = self._names.index(name) + 1
        self._console.print(f"[bold]{number}/{len(self._names)} {escape(name)}[/]  [dim]{escape(what)}[/]")


def print_summary(lines: Sequence[Score], report: str) -> None:
    """Print the table of scores and the report's path."""
    table = Table("score", box=SIMPLE)
    table.add_column("value", justify="right")
    table.add_column("target")
    for line in lines:
        colour = {True: "green", False: "red", None: "default"}[line.met]
        table.add_row(line.name, line.value, f"[{colour}]{escape(line.verdict)}[/]")
    console = Console(highlight=False, soft_wrap=True)
    console.print(table, soft_wrap=False)
    console.print(f"Pictures, curves and what to do next: [bold]{escape(report)}[/]")

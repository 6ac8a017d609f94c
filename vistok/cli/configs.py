"""``vistok configs``: the training configs that ship with the package."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated

import typer
from rich.box import SIMPLE
from rich.markup import escape
from rich.table import Table

from vistok.cli.console import output, print_table
from vistok.utils.files import make_folder


def configs(
    name: Annotated[
        str | None,
        typer.Argument(metavar="NAME", help="A config as they are listed, to print; or a part of names to list."),
    ] = None,
    copy: Annotated[
        Path | None, typer.Option(help="Copy what is named into this folder, to change it there: --copy .")
    ] = None,
) -> None:
    """List the shipped configs, print one, or copy some of them; `vistok train NAME` runs one."""
    from vistok.utils.recipes import find_recipe, recipes, summary

    found = [recipe for recipe in recipes() if name is None or name.removesuffix(".yaml") in recipe]
    exact = [recipe for recipe in found if name is not None and recipe == name.removesuffix(".yaml")]
    found = exact or found
    if not found:
        find_recipe(name or "")  # raises, with the nearest names
    if copy is not None:
        _copy([(recipe, find_recipe(recipe)) for recipe in found], copy.expanduser())
    elif exact:
        output.print(escape(find_recipe(exact[0]).read_text(encoding="utf-8").rstrip()))
    else:
        table = Table("config", "what it trains", box=SIMPLE)
        for recipe in found:
            table.add_row(recipe, escape(summary(recipe)))
        print_table(table)


def _copy(found: list[tuple[str, Path]], folder: Path) -> None:
    """Copy configs into ``folder``; copy nothing if one of the files exists already."""
    targets = [(file, folder / f"{recipe}.yaml") for recipe, file in found]
    if len(targets) == 1:
        targets = [(found[0][1], folder / found[0][1].name)]
    present = [target for _, target in targets if target.exists()]
    if present:
        raise FileExistsError(f"{present[0]} exists already; choose another folder with --copy, or remove it first")
    for file, target in targets:
        make_folder(target.parent)
        shutil.copyfile(file, target)
        output.print(escape(str(target)))

"""``vistok convert`` and ``models``: what there is, and how official weights get in."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.box import SIMPLE
from rich.markup import escape
from rich.table import Table

from vistok.cli.console import output, print_table


def convert(
    system: Annotated[
        str, typer.Argument(metavar="SYSTEM", help="What the file holds: system, or system/part (`vistok models`).")
    ],
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The released file: safetensors or torch.")],
    out: Annotated[Path, typer.Option(help="Folder for the converted model; must not exist yet.")],
    config: Annotated[
        Path | None,
        typer.Option(help="JSON file with the reference's own arguments; not needed for released file names."),
    ] = None,
) -> None:
    """Turn an official checkpoint into a vistok model, which vistok.load reads."""
    from vistok.checkpoints import convert as read_official
    from vistok.checkpoints import official_name
    from vistok.utils.files import read_json

    if out.exists():
        raise FileExistsError(f"{out} exists already; choose another folder or remove it first")
    name = official_name(system, file.name)
    model = read_official(name, file, read_json(config) if config is not None else None)
    model.save_pretrained(out)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    output.print(f"{name}: {type(model).__name__} with {parameters:,} parameters, saved in {escape(str(out))}")


def models() -> None:
    """List every model: sizes, parameters, official checkpoints, papers."""
    from vistok.checkpoints.catalogue import catalogue

    systems = Table("system", "in configs", "kind", "parameters", "arXiv", box=SIMPLE)
    released = Table("system", "official checkpoint", box=SIMPLE)
    for item in catalogue():
        sizes = "\n".join(f"{name} {_short(count)}" for name, count in item.sizes.items())
        systems.add_row(item.official, item.name, item.kind, sizes, item.paper, end_section=True)
        for checkpoint in item.checkpoints:
            released.add_row(item.official, escape(checkpoint))
    print_table(systems)
    output.print(
        "vistok convert reads these files; vistok.load also fetches those whose name begins with a hub repository:"
    )
    print_table(released)


def _short(count: int) -> str:
    return f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.1f} M"

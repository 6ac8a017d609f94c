"""``vistok probe`` and ``vistok compare``: quick evaluations of one tokenizer or several."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE
from rich.markup import escape
from rich.table import Table

from vistok.cli.console import (
    Commands,
    Device,
    Environment,
    allowed_by,
    command_line,
    errors,
    output,
    print_table,
)

Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="data.KEY=VALUE", help="Other images: data.root=photos/")
]
TrainImages = Annotated[int, typer.Option(help="Images that are fitted to, at most.")]
TestImages = Annotated[int, typer.Option(help="Held-out images that everything is scored on, at most.")]
TrainSplit = Annotated[str, typer.Option(help="Split of the data that is fitted to.")]
TestSplit = Annotated[str, typer.Option(help="Split of the data that is scored on.")]
Network = Annotated[
    str | None,
    typer.Option(
        help="What distances are measured by: efficientnet_lite0 (the default, extra: teachers), inception (rFID), or "
        "none; of clips i3d, i3d_torchscript (runs the code in --weights), or none (the default)."
    ),
]
Weights = Annotated[Path | None, typer.Option(help="Local file with that network's weights.")]
LpipsWeights = Annotated[Path | None, typer.Option(help="Local file with all LPIPS weights; no LPIPS without.")]
Generator = Annotated[
    list[str] | None,
    typer.Option(metavar="KEY=VALUE", help="Changes to the small generator's config: model.dim=512 optimizer.lr=3e-4"),
]
Seed = Annotated[int, typer.Option(help="Of the small generator.")]


def probe(
    run: Annotated[str, typer.Argument(metavar="TOKENIZER", help="Run of a tokenizer, saved tokenizer, or hub id.")],
    out: Annotated[Path, typer.Option(help="Folder for tokens, result.json and report.html; continued if it exists.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="data.KEY=VALUE", help="Other images than the run's: data.root=photos/"),
    ] = None,
    steps: Annotated[int, typer.Option(help="Of training the small generator; 0 trains none.")] = 1000,
    train_images: TrainImages = 50_000,
    test_images: TestImages = 10_000,
    train_split: TrainSplit = "train",
    test_split: TestSplit = "test",
    network: Network = None,
    weights: Weights = None,
    lpips_weights: LpipsWeights = None,
    generator: Generator = None,
    seed: Seed = 0,
    allow_commands: Commands = False,
    allow_environment: Environment = False,
    device: Device = None,
) -> None:
    """Evaluate a tokenizer quickly: reconstructions, use of its codes, and a small generator on its tokens.

    With data.num_frames a tokenizer of images is evaluated on clips, frame by frame.
    """
    from vistok.probing import probe as judge

    result = judge(
        run,
        out,
        overrides or (),
        settings=_settings(
            weights,
            lpips_weights,
            generator,
            steps=steps,
            train_images=train_images,
            test_images=test_images,
            train_split=train_split,
            test_split=test_split,
            network=network,
            seed=seed,
        ),
        device=device,
        command=command_line(),
        allowed=allowed_by(allow_commands, allow_environment),
    )
    _print([result], out)


def compare(
    runs: Annotated[list[str], typer.Argument(metavar="TOKENIZER…", help="Runs, saved tokenizers, or hub ids.")],
    out: Annotated[Path, typer.Option(help="Folder for tokens, result.json and report.html; continued if it exists.")],
    overrides: Overrides = None,
    steps: Annotated[int, typer.Option(help="Of training a small generator on each one's tokens; 0 trains none.")] = 0,
    train_images: TrainImages = 5000,
    test_images: TestImages = 2000,
    train_split: TrainSplit = "train",
    test_split: TestSplit = "test",
    network: Network = None,
    weights: Weights = None,
    lpips_weights: LpipsWeights = None,
    generator: Generator = None,
    seed: Seed = 0,
    allow_commands: Commands = False,
    allow_environment: Environment = False,
    device: Device = None,
) -> None:
    """Compare several tokenizers on one set of images: rate, distortion, distances, probes, speed.

    The images are those of the first tokenizer's run, or those that --set names.
    """
    from vistok.probing import compare as judge

    result = judge(
        runs,
        out,
        overrides or (),
        settings=_settings(
            weights,
            lpips_weights,
            generator,
            steps=steps,
            train_images=train_images,
            test_images=test_images,
            train_split=train_split,
            test_split=test_split,
            network=network,
            seed=seed,
        ),
        device=device,
        command=command_line(),
        allowed=allowed_by(allow_commands, allow_environment),
    )
    _print(result["tokenizers"], out)


def _settings(weights: Path | None, lpips_weights: Path | None, generator: list[str] | None, **others: Any) -> Any:
    from vistok.probing import ProbeSettings

    return ProbeSettings(
        weights=None if weights is None else str(weights),
        lpips_weights=None if lpips_weights is None else str(lpips_weights),
        generator=tuple(generator or ()),
        **others,
    )


def _print(results: list[dict[str, Any]], out: Path) -> None:
    """Print a row per measure and a column per tokenizer, which fits a terminal better than the transpose."""
    from vistok.probing.report import table, warnings_of

    rows = table(results)
    shown = Table("", *(escape(str(row["tokenizer"])) for row in rows), box=SIMPLE)
    for name in list(rows[0])[1:]:
        shown.add_row(name, *(_text(row[name]) for row in rows))
    print_table(shown)
    for note in warnings_of(results):
        errors.print(f"[yellow]Note:[/] {escape(note)}")
    output.print(f"Pictures and everything that these scores depend on are in {escape(str(out / 'report.html'))}")


def _text(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.4g}" if isinstance(value, float) else escape(str(value))

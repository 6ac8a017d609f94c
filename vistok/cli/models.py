"""``vistok convert``, ``pipeline`` and ``models``: converting official weights, and listing all models."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE
from rich.markup import escape
from rich.table import Table

from vistok.cli.console import output, print_table
from vistok.utils.files import read_lines


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
    from vistok.utils.files import missing_file, read_object
    from vistok.utils.outputs import appearing

    with appearing(out):
        for path in (file, config):
            if path is not None and not path.is_file():
                raise FileNotFoundError(missing_file(path))
        name = official_name(system, file.name)
        model = read_official(name, file, read_object(config) if config is not None else None)
        model.save_pretrained(out)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    output.print(f"{name}: {type(model).__name__} with {parameters:,} parameters, saved in {escape(str(out))}")


def pipeline(
    tokenizer: Annotated[
        str, typer.Argument(metavar="TOKENIZER", help="Run, saved or converted tokenizer, or hub id of one.")
    ],
    generator: Annotated[
        str,
        typer.Argument(metavar="GENERATOR", help="Run or checkpoint, saved or converted generator, or hub id."),
    ],
    out: Annotated[Path, typer.Option(help="Folder for the pipeline; must not exist yet.")],
    options: Annotated[
        list[str] | None,
        typer.Argument(metavar="OPTION=VALUE", help="Default sampling options of the pipeline: guidance_scale=4"),
    ] = None,
    classes: Annotated[
        Path | None,
        typer.Option(help="Text file with a class name a line; those of the generator by default."),
    ] = None,
    text_encoder: Annotated[
        str | None,
        typer.Option(help="What reads prompts for a generator of text features: a Hugging Face folder or name."),
    ] = None,
    clean_texts: Annotated[
        bool,
        typer.Option(
            "--clean-texts", help="Of the text encoder: first take markup, addresses and odd signs out of prompts."
        ),
    ] = False,
) -> None:
    """Put a tokenizer and a generator into one folder, which `vistok sample` and vistok.pipeline read."""
    from vistok.config import override
    from vistok.pipelines import assemble
    from vistok.utils.outputs import appearing

    with appearing(out):
        names = read_lines(classes) if classes is not None else None
        pipe = assemble(
            tokenizer,
            generator,
            class_names=names,
            sampling=override({}, options or ()),
            text_encoder=text_encoder,
            clean_texts=clean_texts,
        )
        pipe.save_pretrained(out)
    named = f", {len(pipe.class_names):,} class names" if pipe.class_names else ""
    parts = f"{type(pipe.tokenizer).__name__} and {type(pipe.generator).__name__}"
    output.print(f"{parts}{named}, saved in {escape(str(out))}")


def models(
    word: Annotated[
        str | None, typer.Argument(metavar="WORD", help="Only what has this word in its names: generator, 2406.06525.")
    ] = None,
) -> None:
    """List models: sizes, recipes, papers, licences, and official checkpoints with their tokenizers."""
    # Read as JSON, since vistok.checkpoints imports torch.
    found = json.loads((files("vistok") / "checkpoints" / "catalogue.json").read_text(encoding="utf-8"))
    recipes = _recipes()
    systems = Table("system", "in configs", "kind", "parameters", "recipes", "licence of code", "arXiv", box=SIMPLE)
    released = Table("official checkpoint", "system", "goes with", "licence of weights", box=SIMPLE)
    for item in found:
        own = recipes.get(item["name"], [])
        files_shown = [file for file in item["checkpoints"] if _has(word, _texts(file) + _names(item))]
        if not files_shown and not _has(word, _names(item) + own):
            continue
        sizes = "\n".join(f"{name} {_short(count)}" for name, count in item["sizes"].items())
        kind = f"{item['kind']} of {item['tokenizer']}" if item["tokenizer"] else item["kind"]
        shown = own if word or len(own) <= 3 else [*own[:3], f"… {len(own) - 3} more"]
        row = (item["official"], item["name"], kind, sizes, "\n".join(shown), item["licence"], item["paper"])
        systems.add_row(*row, end_section=True)
        for file in files_shown:
            goes_with = escape(file["tokenizer"] or "")
            released.add_row(escape(file["id"]), file["official"], goes_with, file["licence"])
    if not systems.rows:
        raise ValueError(f"no model has {word!r} in its names; `vistok models` lists all")
    print_table(systems)
    if not released.rows:
        return
    output.print(
        "vistok.load and vistok.pipeline fetch the files whose name begins with a hub repository; vistok convert reads "
        "all, once they are here:"
    )
    print_table(released)


def _names(item: dict[str, Any]) -> list[str]:
    return [item[key] for key in ("official", "name", "kind", "paper")]


def _texts(file: dict[str, Any]) -> list[str]:
    return [file["id"], file["official"]]


def _has(word: str | None, texts: list[str]) -> bool:
    return word is None or any(word.lower() in text.lower() for text in texts)


def _recipes() -> dict[str, list[str]]:
    """Names of shipped configs by the name of the model that they train."""
    from vistok.utils.recipes import models_of_configs

    found: dict[str, list[str]] = {}
    for config, model in models_of_configs().items():
        found.setdefault(model, []).append(config)
    return found


def _short(count: int) -> str:
    return f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.1f} M"

"""``vistok quickstart``, ``train`` and ``report``, and ``tokenize`` and ``import-tokens``, which make token caches."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Annotated, Any, cast

import typer
from rich.box import SIMPLE
from rich.markup import escape
from rich.table import Table

from vistok.cli.console import Commands, Device, Environment, allowed_by, errors, output, print_table
from vistok.utils.files import read_lines
from vistok.utils.recipes import find_recipe, recipes


def quickstart(
    out: Annotated[Path, typer.Option(help="Folder for everything it makes; must not exist yet.")] = Path("quickstart"),
    system: Annotated[
        str | None, typer.Option(help="What is trained; a wrong name lists all, and none is the quickest.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of everything.")] = 0,
) -> None:
    """Run the whole chain on embedded digits, in three to seven minutes on two cores, offline.

    Trains a tokenizer and a generator, samples, scores the samples, and writes report.html.
    """
    from vistok.quickstart import Recipe
    from vistok.quickstart import quickstart as run

    run(out, Recipe(system=system, seed=seed))


def train(
    config: Annotated[
        str,
        typer.Argument(
            metavar="CONFIG",
            help="YAML file, or the name of one that ships: `vistok configs`.",
            autocompletion=lambda incomplete: [name for name in recipes() if name.startswith(incomplete)],
        ),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Changes to it: data.root=photos/ optimizer.lr=2e-4"),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the run's newest checkpoint, if it has one.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what it would take, and show the first batch.")
    ] = False,
    profile: Annotated[
        bool, typer.Option("--profile", help="Only time a few steps, and write a torch profiler trace.")
    ] = False,
    allow_commands: Commands = False,
    allow_environment: Environment = False,
) -> None:
    """Train a tokenizer on images, or a generator on the tokens of one.

    The config names the model, the data, and the folder of the run (output_dir).

    On several GPUs: accelerate launch -m vistok train … (add --use_fsdp --fsdp_version 2 to shard the model), or
    torchrun -m vistok train …
    """
    if resume + dry_run + profile > 1:
        raise typer.BadParameter("--resume, --dry-run and --profile exclude each other")
    from vistok.config import load_config
    from vistok.train.tasks import any_config

    allowed = allowed_by(allow_commands, allow_environment)
    values = load_config(find_recipe(config), overrides or (), target=any_config(), allowed=allowed)
    if dry_run:
        _dry_run(values)
    elif profile:
        _profile(values)
    else:
        _train(values, resume=resume)


def _train(config: dict[str, Any], *, resume: bool) -> None:
    from vistok.train import TrainingInterrupted
    from vistok.train import train as run
    from vistok.utils.processes import is_first_process

    try:
        folder = run(config, resume=resume)
    except TrainingInterrupted as stop:
        if is_first_process():
            errors.print(escape(str(stop)))
        # SIGTERM from a scheduler is a normal end. After Ctrl-C the shell must not run the next command of a script.
        raise typer.Exit(0 if stop.signal == signal.SIGTERM else 130) from stop
    if is_first_process():
        output.print(f"The run is in {escape(str(folder))}")


def _dry_run(config: dict[str, Any]) -> None:
    from vistok.train.preview import preview
    from vistok.utils.processes import is_first_process

    found = preview(config)
    if not is_first_process():
        return
    table = Table("dry run", "", box=SIMPLE, show_header=False)
    for name, count in found.parameters.items():
        table.add_row(f"parameters of the {name}", f"{count:,}")
    for purpose, size in found.memory.items():
        table.add_row(f"memory for {purpose}{' (estimate)' * (purpose == 'activations')}", _bytes(size))
    table.add_row("memory per device (estimate)", _bytes(sum(found.memory.values())))
    table.add_row(f"{found.unit} per epoch", f"{found.units_per_epoch:,}")
    if found.held_out:
        table.add_row("held-out samples", f"{found.held_out:,}")
    table.add_row("operations per step (estimate)", f"{found.operations / 1e12:.3g} TFLOP")
    table.add_row("samples per step", f"{found.batch_size:,}")
    table.add_row("steps", f"{found.steps:,} ({found.epochs:.3g} epochs)")
    print_table(table)
    output.print(f"The first batch is in {escape(str(found.picture))}; nothing was trained")


def _profile(config: dict[str, Any]) -> None:
    from vistok.train.profile import profile
    from vistok.utils.processes import is_first_process

    found = profile(config)
    if not is_first_process():
        return
    table = Table("per step", "ms", "share", box=SIMPLE)
    for phase, seconds in found.seconds.items():
        table.add_row(phase, f"{1000 * seconds:.1f}", f"{seconds / found.step_seconds:.0%}")
    table.add_row("step", f"{1000 * found.step_seconds:.1f}", "100%")
    print_table(table)
    unit = found.unit.removesuffix("_per_second")
    output.print(f"{found.units_per_second:,.0f} {unit}/s; the trace is in {escape(str(found.trace))}")


def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a training run.")],
) -> None:
    """Write the report.html of a training run again: of an interrupted run, or after images were added.

    Training writes it at its end.
    """
    from vistok.train.report import write_run_report

    output.print(f"Pictures, curves and codes are shown in {escape(str(write_run_report(run)))}")


def tokenize(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Run of a tokenizer, saved tokenizer, or hub id.")],
    out: Annotated[Path, typer.Option(help="Folder for the token cache; must not exist yet.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="data.KEY=VALUE", help="Other images than the run's: data.root=photos/"),
    ] = None,
    augmentation: Annotated[
        str,
        typer.Option(
            help="Views stored of each image: none, only itself; flip, also its mirror image; ten_crop, ten "
            "crops of it at 1.1 times the size, or ten_crop:1.05; or random:K, K of those that training would see."
        ),
    ] = "none",
    text_encoder: Annotated[
        str | None,
        typer.Option(help="Also store features of the captions: a Hugging Face text encoder, by folder or name."),
    ] = None,
    text_tokenizer: Annotated[
        str | None,
        typer.Option(help="Also store ids of the captions: bytes, a tokenizer.json, or a Hugging Face folder or name."),
    ] = None,
    text_positions: Annotated[
        str, typer.Option(help="Of the text encoder: those of the text, or all (of CLIP's towers).")
    ] = "text",
    clean_texts: Annotated[
        bool,
        typer.Option(
            "--clean-texts", help="Of the text encoder: first take markup, addresses and odd signs out of captions."
        ),
    ] = False,
    text_length: Annotated[int, typer.Option(help="Tokens of a caption at most; longer ones are cut.")] = 120,
    refuse_long_texts: Annotated[
        bool, typer.Option("--refuse-long-texts", help="A caption that is too long is an error.")
    ] = False,
    text_dtype: Annotated[str, typer.Option(help="Of stored features: float16 or float32.")] = "float16",
    given_frames: Annotated[
        int, typer.Option(help="Of clips: also store the tokens of the first frames, to predict the rest from.")
    ] = 0,
    latents: Annotated[
        bool,
        typer.Option("--latents", help="Of multi_scale_bsq: store what is quantized, for bitwise self-correction."),
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where a killed run stopped.")] = False,
    allow_commands: Commands = False,
    allow_environment: Environment = False,
    device: Device = None,
) -> None:
    """Encode images into a cache of tokens, which generators train on.

    On several GPUs, or in several processes: torchrun --nproc_per_node=8 -m vistok tokenize …
    """
    from vistok.pipelines.folders import load_tokenizer
    from vistok.pipelines.runs import data_of_run
    from vistok.text import PromptEncoder, open_text_encoder, open_text_tokenizer
    from vistok.train.tokenize import tokenize as write_cache
    from vistok.utils.devices import choose_device
    from vistok.utils.processes import Processes

    processes = Processes.join()
    tokenizer = load_tokenizer(run).to(choose_device(device) if device else processes.device())
    allowed = allowed_by(allow_commands, allow_environment)
    data = data_of_run(run, overrides or (), input_shape=tokenizer.input_shape, allowed=allowed)
    if text_dtype not in ("float16", "float32"):
        raise ValueError(f"--text-dtype is float16 or float32, not {text_dtype!r}")
    encoders = []
    if clean_texts and text_encoder is None:
        raise ValueError("--clean-texts is of the text encoder: give --text-encoder, too")
    if text_encoder is not None:
        positions = cast(Any, text_positions)
        encoders.append(open_text_encoder(text_encoder, text_length, positions, clean=clean_texts))
    encoders += [] if text_tokenizer is None else [open_text_tokenizer(text_tokenizer, text_length)]
    text = PromptEncoder(encoders)
    cache = write_cache(
        tokenizer,
        data,
        out,
        augmentation=augmentation,
        text=text.to(tokenizer.device),
        refuse_long_texts=refuse_long_texts,
        feature_dtype="float16" if text_dtype == "float16" else "float32",
        given_frames=given_frames,
        latents=latents,
        resume=resume,
        processes=processes,
    )
    if not processes.is_first:
        return
    views = f" in {cache.views} views each" if cache.views > 1 else ""
    output.print(f"{len(cache):,} images{views}, {cache.spec['length']} tokens per image, are in {escape(str(out))}")
    for part, counts in cache.texts.items():
        output.print(
            f"{counts['texts']:,} captions as {part}, {counts['texts_cut']:,} of them cut; "
            f"{counts['samples_without']:,} images without one"
        )


def import_tokens(
    format_name: Annotated[str, typer.Argument(metavar="FORMAT", help="A format below; a wrong name lists all.")],
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="The folder or file that holds the tokens.")],
    tokenizer: Annotated[str, typer.Option(help="What made them: a run, saved or converted tokenizer, or hub id.")],
    out: Annotated[Path, typer.Option(help="Folder for the token cache; must not exist yet.")],
    classes: Annotated[
        Path | None,
        typer.Option(help="Text file with a class name a line; the cache's or the ids by default."),
    ] = None,
) -> None:
    """Convert tokens that another codebase has cached into a cache that generators train on.

    llamagen: a folder with NAME_codes/*.npy and NAME_labels/*.npy.
    mar: a folder with CLASS/NAME.npz, moments and moments_flip.
    jsonl: a file of RAR or TiTok, {"class_id": 3, "tokens": [5, 1, …]} a line.
    """
    from vistok.pipelines.folders import load_tokenizer
    from vistok.train.import_tokens import import_tokens as write_cache

    names = tuple(read_lines(classes)) if classes is not None else None
    cache = write_cache(format_name, source, load_tokenizer(tokenizer), out, classes=names)
    output.print(f"{len(cache):,} samples in {cache.views} views each are in {escape(str(out))}")


def _bytes(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"

"""The ``vistok`` command: parses, calls, prints. What is heavy is imported by the command that needs it."""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.table import Table

EPILOG = "VISTOK_DEBUG=1 in the environment shows the traceback of an error."

app = typer.Typer(
    name="vistok",
    help="Autoregressive visual generation: train tokenizers and generators, sample, evaluate.",
    epilog=EPILOG,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
output, errors = Console(soft_wrap=True, highlight=False), Console(stderr=True, soft_wrap=True, highlight=False)

Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps, …; a GPU if there is one by default.")]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; a failure that a user can act upon is one message and exit code 2."""
    _show_logs()
    try:
        app(arguments, prog_name="vistok")
    except Exception as error:
        if os.environ.get("VISTOK_DEBUG") or not _is_for_users(error):
            raise
        errors.print(f"[bold red]Error:[/] {escape(_message(error))}")
        sys.exit(2)


def _is_for_users(error: Exception) -> bool:
    """Bad input and failing files, and the errors that vistok itself defines."""
    return isinstance(error, ValueError | OSError) or type(error).__module__.startswith("vistok.")


def _message(error: Exception) -> str:
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return f"{error}. Nothing was left half-written; free some space and run the command again."
    return str(error) or type(error).__name__


def _show_logs() -> None:
    """vistok's own messages (images left out, weights dropped) go to standard error, as they come."""
    import logging

    from rich.logging import RichHandler

    logger = logging.getLogger("vistok")
    if not logger.handlers:
        logger.addHandler(RichHandler(console=errors, show_time=False, show_path=False))
        logger.setLevel(logging.INFO)


@app.callback(invoke_without_command=True)
def root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        from vistok._version import __version__

        output.print(f"vistok {__version__}")
        raise typer.Exit


@app.command()
def quickstart(
    out: Annotated[Path, typer.Option(help="Folder for everything it makes; must not exist yet.")] = Path("quickstart"),
    system: Annotated[str, typer.Option(help="What is trained: vit_vqgan, flextok, dar or xar.")] = "vit_vqgan",
    seed: Annotated[int, typer.Option(help="Of everything.")] = 0,
) -> None:
    """The whole chain on embedded digits, in five to ten minutes on a CPU, without a network.

    Trains a tokenizer and a generator, samples, scores the samples, and writes report.html.
    """
    from vistok.quickstart import Recipe
    from vistok.quickstart import quickstart as run

    run(out, Recipe(system=system, seed=seed))


@app.command()
def train(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file: configs/cifar10/vit_vqgan.yaml")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Changes to it: data.root=photos/ optimizer.lr=2e-4"),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the run's newest checkpoint.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what it would take, and show the first batch.")
    ] = False,
    profile: Annotated[
        bool, typer.Option("--profile", help="Only time a few steps, and write a torch profiler trace.")
    ] = False,
) -> None:
    """Train a tokenizer on images, or a generator on the tokens of one.

    The config says what is trained, on what, and in which folder (output_dir) the run goes.

    On several GPUs: accelerate launch -m vistok train … (add --use_fsdp --fsdp_version 2 to shard the model), or
    torchrun -m vistok train …
    """
    if resume + dry_run + profile > 1:
        raise typer.BadParameter("--resume, --dry-run and --profile exclude each other")
    from vistok.config import load_config

    values = load_config(config, overrides or ())
    if dry_run:
        _dry_run(values)
    elif profile:
        _profile(values)
    else:
        _train(values, resume)


def _train(config: dict[str, Any], resume: bool) -> None:
    from vistok.train import TrainingInterrupted
    from vistok.train import train as run

    try:
        folder = run(config, resume=resume)
    except TrainingInterrupted as stop:
        if os.environ.get("RANK", "0") == "0":
            errors.print(escape(str(stop)))
        # A scheduler's SIGTERM was served; after Ctrl-C a shell must not go on to its next command.
        raise typer.Exit(0 if stop.signal == signal.SIGTERM else 130) from stop
    if os.environ.get("RANK", "0") == "0":
        output.print(f"The run is in {escape(str(folder))}")


def _dry_run(config: dict[str, Any]) -> None:
    from vistok.train.preview import preview

    found = preview(config)
    table = Table("dry run", "", box=SIMPLE, show_header=False)
    for name, count in found.parameters.items():
        table.add_row(f"parameters of the {name}", f"{count:,}")
    for purpose, size in found.memory.items():
        table.add_row(f"memory for {purpose}{' (estimate)' * (purpose == 'activations')}", _bytes(size))
    table.add_row("memory per device (estimate)", _bytes(sum(found.memory.values())))
    table.add_row(f"{found.unit} per epoch", f"{found.units_per_epoch:,}")
    table.add_row("samples per step", f"{found.batch_size:,}")
    table.add_row("steps", f"{found.steps:,} ({found.epochs:.3g} epochs)")
    _print_table(table)
    output.print(f"The first batch is in {escape(str(found.picture))}; nothing was trained")


def _profile(config: dict[str, Any]) -> None:
    from vistok.train.profile import profile

    found = profile(config)
    table = Table("per step", "ms", "share", box=SIMPLE)
    for phase, seconds in found.seconds.items():
        table.add_row(phase, f"{1000 * seconds:.1f}", f"{seconds / found.step_seconds:.0%}")
    table.add_row("step", f"{1000 * found.step_seconds:.1f}", "100%")
    _print_table(table)
    unit = found.unit.removesuffix("_per_second")
    output.print(f"{found.units_per_second:,.0f} {unit}/s; the trace is in {escape(str(found.trace))}")


@app.command()
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
            help="Views stored of each image: none, only itself; flip, also its mirror image; ten_crop, LlamaGen's "
            "crops of it; or random:K, K of those that training would see."
        ),
    ] = "none",
    resume: Annotated[bool, typer.Option("--resume", help="Go on where a killed run stopped.")] = False,
    device: Device = None,
) -> None:
    """Turn images into a cache of tokens, which generators train on.

    On several GPUs, or in several processes: torchrun --nproc_per_node=8 -m vistok tokenize …
    """
    from vistok.pipelines import choose_device, load_tokenizer
    from vistok.processes import Processes
    from vistok.runs import data_of_run
    from vistok.train.tokenize import tokenize as write_cache

    processes = Processes.join()
    tokenizer = load_tokenizer(run).to(choose_device(device) if device else processes.device())
    data = data_of_run(run, overrides or (), image_shape=tokenizer.image_shape)
    cache = write_cache(tokenizer, data, out, augmentation=augmentation, resume=resume, processes=processes)
    if not processes.is_first:
        return
    views = f" in {cache.views} views each" if cache.views > 1 else ""
    output.print(f"{len(cache):,} images{views}, {cache.spec['length']} tokens per image, are in {escape(str(out))}")


@app.command("import-tokens")
def import_tokens(
    format_name: Annotated[str, typer.Argument(metavar="FORMAT", help="llamagen, mar or jsonl.")],
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="The folder or file that holds the tokens.")],
    tokenizer: Annotated[str, typer.Option(help="What made them: a run, saved or converted tokenizer, or hub id.")],
    out: Annotated[Path, typer.Option(help="Folder for the token cache; must not exist yet.")],
    classes: Annotated[
        Path | None, typer.Option(help="Text file with a class name a line; MAR's folder names or the ids by default.")
    ] = None,
) -> None:
    """Turn the tokens that another codebase has cached into a cache that generators train on.

    llamagen: a folder with NAME_codes/*.npy and NAME_labels/*.npy.
    mar: a folder with CLASS/NAME.npz, moments and moments_flip.
    jsonl: a file of RAR or TiTok, {"class_id": 3, "tokens": [5, 1, …]} a line.
    """
    from vistok.pipelines import load_tokenizer
    from vistok.train.import_tokens import import_tokens as write_cache

    names = tuple(classes.read_text().splitlines()) if classes is not None else None
    cache = write_cache(format_name, source, load_tokenizer(tokenizer), out, classes=names)
    output.print(f"{len(cache):,} samples in {cache.views} views each are in {escape(str(out))}")


@app.command()
def sample(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Run of a generator, pipeline folder, or hub id.")],
    out: Annotated[Path, typer.Option(help="Folder for the samples; must not exist yet, or be empty.")],
    options: Annotated[
        list[str] | None,
        typer.Argument(metavar="OPTION=VALUE", help="More sampling options: guidance_interval=[0,64]"),
    ] = None,
    classes: Annotated[
        str | None,
        typer.Option(help="Classes by id or by name, separated by commas, taken in turn; all of them by default."),
    ] = None,
    num: Annotated[int, typer.Option("--num", "--num-images", help="How many images.")] = 64,
    seed: Annotated[int, typer.Option(help="Image i of a seed is always the same.")] = 0,
    batch_size: Annotated[int, typer.Option(help="Images generated at a time; does not change them.")] = 64,
    npz: Annotated[bool, typer.Option("--npz", help="Also write samples.npz for ADM-style evaluators.")] = False,
    temperature: Annotated[float | None, typer.Option(help="0 takes the likeliest token.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Draw among the k likeliest tokens only; 0 is off.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Draw within this probability mass only; 1 is off.")] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="Classifier-free guidance; 1 is off.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where a killed run stopped.")] = False,
    compiled: Annotated[
        bool, typer.Option("--compile", help="Compile the steps first: worth it for many images on a GPU.")
    ] = False,
    device: Device = None,
) -> None:
    """Generate images: a PNG each, an overview grid.png, and samples.json with what made them.

    Sampling options that are not given are those saved with the pipeline.

    On several GPUs, or in several processes: torchrun --nproc_per_node=8 -m vistok sample … (with --num-images:
    torchrun takes --num for an option of its own).
    """
    from vistok.config import override
    from vistok.pipelines import pipeline
    from vistok.processes import Processes
    from vistok.samples import write_samples

    named = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "guidance_scale": guidance_scale}
    sampling = override({key: value for key, value in named.items() if value is not None}, options or ())
    processes = Processes.join()
    pipe = pipeline(run, device=device or processes.device())
    write_samples(
        pipe.compile() if compiled else pipe,
        out,
        num,
        classes=classes.split(",") if classes is not None else None,
        seed=seed,
        batch_size=batch_size,
        npz=npz,
        sampling=sampling,
        resume=resume,
        processes=processes,
    )
    if processes.is_first:
        output.print(f"{num:,} samples are in {escape(str(out))}; see {escape(str(out / 'grid.png'))}")


@app.command()
def reconstruct(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Run, saved tokenizer, pipeline, or hub id.")],
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="Image files; cropped to the right size.")],
    out: Annotated[Path, typer.Option(help="PNG file: originals over their reconstructions.")] = Path(
        "reconstruction.png"
    ),
    tokens: Annotated[
        str | None,
        typer.Option(
            metavar="K,K,…",
            help="Decode from the first K tokens, for each K, such as 1,2,4,256: a row of pictures per image.",
        ),
    ] = None,
    device: Device = None,
) -> None:
    """Encode and decode images, and look at what is lost."""
    from vistok.pipelines import choose_device, load_tokenizer
    from vistok.samples import reconstruct_files, reconstruct_prefixes

    tokenizer = load_tokenizer(run).to(choose_device(device))
    if tokens is not None:
        lengths = _whole_numbers(tokens, "--tokens")
        for image, decibels in zip(images, reconstruct_prefixes(tokenizer, images, lengths, out), strict=True):
            scores = ", ".join(f"{value:.2f} dB at {length}" for length, value in zip(lengths, decibels))
            output.print(f"{escape(str(image))}  PSNR {scores}")
        output.print(f"Originals and their reconstructions are in {escape(str(out))}")
        return
    for image, decibels in zip(images, reconstruct_files(tokenizer, images, out), strict=True):
        output.print(f"{escape(str(image))}  PSNR {decibels:.2f} dB")
    output.print(f"Originals over reconstructions are in {escape(str(out))}")


@app.command("eval")
def evaluate(
    what: Annotated[
        str,
        typer.Argument(
            metavar="IMAGES|RUN",
            help="Folder of images, ADM-style .npz, webdataset .tar, or run with samples; or run of a tokenizer.",
        ),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="data.KEY=VALUE", help="For a tokenizer: other images than the run's test split."),
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option(help="What the images are compared with: images in any of these forms, or .npz statistics."),
    ] = None,
    protocol: Annotated[
        str | None,
        typer.Option(
            help="torch-fidelity (default), adm, clean-fid, dinov2, or reconstruction (IMAGES are those of the "
            "reference, reconstructed). For a tokenizer: reconstruction adds rFID, perturbation is pFID."
        ),
    ] = None,
    metrics: Annotated[
        str | None, typer.Option(help="Some of fid,sfid,is,kid,prc; by default all that protocol and reference allow.")
    ] = None,
    weights: Annotated[
        Path | None, typer.Option(help="Local file with the feature network's weights; downloaded once by default.")
    ] = None,
    lpips_weights: Annotated[
        Path | None, typer.Option(help="For reconstructions: local file with all LPIPS weights; no LPIPS without.")
    ] = None,
    crop: Annotated[
        int | None, typer.Option(help="Bring the reference's files to this size by ADM's centre crop.")
    ] = None,
    make_reference: Annotated[
        Path | None, typer.Option(metavar="FILE.npz", help="Instead of scoring: make a reference file of IMAGES.")
    ] = None,
    split: Annotated[
        str | None, typer.Option(help="With --make-reference: which images these are: train, val or test.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Images at a time.")] = 64,
    out: Annotated[Path | None, typer.Option(help="JSON file for scores and everything they depend on.")] = None,
    device: Device = None,
) -> None:
    """Score images against a reference (FID, IS, KID, …), or the reconstructions of a tokenizer (PSNR, SSIM, LPIPS).

    A tokenizer is scored on the test split of its training data; --reference or data.root=… names other images. Several
    processes share the work: torchrun --nproc-per-node 8 -m vistok eval …
    """
    from vistok.files import write_json
    from vistok.processes import Processes
    from vistok.runs import holds_tokenizer_only

    processes = Processes.join()
    if holds_tokenizer_only(what):
        from vistok.evaluations import score_tokenizer

        result = score_tokenizer(
            what,
            overrides or (),
            reference=reference,
            protocol=protocol,
            weights=weights,
            lpips_weights=lpips_weights,
            batch_size=batch_size,
            device=device,
            processes=processes,
        )
    elif overrides:
        raise typer.BadParameter(f"only the run of a tokenizer takes {overrides[0]}")
    elif make_reference is not None:
        from vistok.evaluations import make_reference_file

        told = make_reference_file(
            what,
            make_reference,
            protocol=protocol or "torch-fidelity",
            weights=weights,
            split=split,
            crop=crop,
            batch_size=batch_size,
            device=device,
            processes=processes,
        )
        if processes.is_first:
            made = f"{escape(str(make_reference))} stands for {told.count:,} images"
            output.print(f"The reference {made} (fingerprint {told.fingerprint[:12]}…)")
        return
    else:
        if reference is None:
            raise typer.BadParameter("images need one to be compared with", param_hint="--reference")
        from vistok.eval import evaluate as score
        from vistok.evaluations import open_lpips

        result = score(
            what,
            reference,
            protocol=protocol or "torch-fidelity",
            metrics=metrics.split(",") if metrics is not None else None,
            weights=weights,
            lpips=open_lpips(lpips_weights),
            crop=crop,
            batch_size=batch_size,
            device=device,
            processes=processes,
        )
    if not processes.is_first:
        return
    _print_scores(result)
    if out is not None:
        write_json(out, result)
        output.print(f"Everything these scores depend on is in {escape(str(out))}")


@app.command()
def benchmark(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Run of a generator, pipeline folder, or hub id.")],
    out: Annotated[Path, typer.Option(help="Folder for features, scores and report.html; continued if it exists.")],
    options: Annotated[
        list[str] | None,
        typer.Argument(metavar="OPTION=VALUE", help="Sampling options that differ from the pipeline's: top_k=100"),
    ] = None,
    num: Annotated[int, typer.Option("--num", "--num-images", help="Images per guidance scale.")] = 50_000,
    labels: Annotated[
        str | None,
        typer.Option(help="balanced (classes in turn), random (uniform) or none; balanced if there are classes."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Image i of a seed is always the same.")] = 0,
    guidance_sweep: Annotated[
        str | None, typer.Option(help="Scales to compare, such as 1.0,1.5,2.0; features of earlier ones are reused.")
    ] = None,
    reference: Annotated[
        str | None, typer.Option(help="As for vistok eval; without one only the Inception Score is computed.")
    ] = None,
    protocol: Annotated[str, typer.Option(help="adm, torch-fidelity, clean-fid or dinov2.")] = "adm",
    weights: Annotated[
        Path | None, typer.Option(help="Local file with the feature network's weights; downloaded once by default.")
    ] = None,
    eval_size: Annotated[
        int | None, typer.Option(help="Resize images to this side first (bicubic), as LlamaGen does from 384 to 256.")
    ] = None,
    save_npz: Annotated[
        bool, typer.Option("--save-npz", help="Also write samples.npz for ADM-style evaluators.")
    ] = False,
    batch_size: Annotated[int, typer.Option(help="Images at a time; does not change them.")] = 64,
    device: Device = None,
) -> None:
    """Generate many images and score them, with features instead of images kept; the same command continues it.

    Several processes share the work: torchrun --nproc-per-node 8 -m vistok benchmark …
    """
    import shlex

    from vistok.config import override
    from vistok.eval.benchmark import benchmark as measure
    from vistok.pipelines import pipeline
    from vistok.processes import Processes

    processes = Processes.join()
    device = device or str(processes.device())
    result = measure(
        pipeline(run, device=device),
        out,
        num_images=num,
        labels=labels,
        seed=seed,
        guidance_scales=_numbers(guidance_sweep) if guidance_sweep is not None else None,
        sampling=override({}, options or ()),
        reference=reference,
        protocol=protocol,
        weights=weights,
        eval_size=eval_size,
        save_npz=save_npz,
        batch_size=batch_size,
        device=device,
        processes=processes,
        command=f"vistok {shlex.join(sys.argv[1:])}",
    )
    if not processes.is_first:
        return
    for scored in result["runs"]:
        if scored["guidance_scale"] is not None:
            output.print(f"guidance scale {scored['guidance_scale']}")
        _print_scores(scored)
    output.print(f"Scores, samples and classes are shown in {escape(str(out / 'report.html'))}")


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise ValueError(f"expected numbers separated by commas, such as 1.0,1.5,2.0; got {text!r}") from error


def _whole_numbers(text: str, option: str) -> list[int]:
    """The integers of "1,2,4"."""
    parts = text.split(",")
    if not all(part.strip().isdecimal() for part in parts):
        raise ValueError(f"{option} takes whole numbers with commas between them, such as 1,2,4; got {text!r}")
    return [int(part) for part in parts]


def _print_scores(result: dict[str, Any]) -> None:
    images, reference = result["images"], result["reference"]
    count = "an unknown number of" if images["count"] is None else f"{images['count']:,}"
    output.print(f"{count} images ({escape(images['source'])}) against {escape(reference['source'])}")
    table = Table("score", "value", title=f"protocol: {result['protocol']}", title_justify="left", box=SIMPLE)
    for name, value in result["scores"].items():
        table.add_row(name, "infinite" if value is None else f"{value:.4f}")
    _print_table(table)
    for warning in result["warnings"]:
        errors.print(f"[yellow]Note:[/] {escape(warning)}")


@app.command()
def convert(
    system: Annotated[
        str, typer.Argument(metavar="SYSTEM", help="What the file holds, such as llamagen or llamagen/gpt.")
    ],
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The released file: safetensors or torch.")],
    out: Annotated[Path, typer.Option(help="Folder for the converted model; must not exist yet.")],
    config: Annotated[
        Path | None,
        typer.Option(help="JSON file with the reference's own arguments; not needed for released file names."),
    ] = None,
) -> None:
    """Turn an official checkpoint into a vistok model, which vistok.load reads."""
    from vistok.files import read_json
    from vistok.hub import convert as read_official
    from vistok.hub import official_name

    if out.exists():
        raise FileExistsError(f"{out} exists already; choose another folder or remove it first")
    name = official_name(system, file.name)
    model = read_official(name, file, read_json(config) if config is not None else None)
    model.save_pretrained(out)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    output.print(f"{name}: {type(model).__name__} with {parameters:,} parameters, saved in {escape(str(out))}")


@app.command()
def models() -> None:
    """List every model: sizes, parameters, official checkpoints, papers."""
    from vistok.catalogue import catalogue

    systems = Table("system", "in configs", "kind", "parameters", "arXiv", box=SIMPLE)
    released = Table("system", "official checkpoint", box=SIMPLE)
    for item in catalogue():
        sizes = "\n".join(f"{name} {_short(count)}" for name, count in item.sizes.items())
        systems.add_row(item.official, item.name, item.kind, sizes, item.paper, end_section=True)
        for checkpoint in item.checkpoints:
            released.add_row(item.official, escape(checkpoint))
    _print_table(systems)
    output.print(
        "vistok convert reads these files; vistok.load also fetches those whose name begins with a hub repository:"
    )
    _print_table(released)


def _print_table(table: Table) -> None:
    """Fit a table to the terminal; elsewhere it gets all the width it needs, so that names stay whole."""
    for column in table.columns:
        column.overflow = "fold"
    console = output if output.is_terminal else Console(width=1000)
    console.print(table, soft_wrap=False)


def _short(count: int) -> str:
    return f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.1f} M"


def _bytes(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"

"""``vistok eval`` and ``benchmark``: scores, with everything that they depend on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, cast

import typer
from rich.box import SIMPLE
from rich.markup import escape
from rich.table import Table

from vistok.cli.console import (
    Commands,
    Device,
    Dtype,
    Environment,
    allowed_by,
    command_line,
    errors,
    output,
    print_table,
)

TorchScript = Annotated[
    bool,
    typer.Option(
        "--torchscript",
        help="For clips: --weights is a TorchScript file, such as i3d_torchscript.pt. The code in it is run: say so "
        "only of a file that you trust.",
    ),
]


def evaluate(
    what: Annotated[
        str,
        typer.Argument(
            metavar="IMAGES|RUN",
            help="Folder of images, ADM-style .npz, webdataset .tar, or run with samples; or run of a tokenizer, or of "
            "a generator of ids that decode to embeddings.",
        ),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="data.KEY=VALUE",
            help="For a tokenizer: other images than the run's test split; for ids: the images. A tokenizer that "
            "decodes with texts reads those of the images as its run did; text.encoder=… says how, text=null decodes "
            "without.",
        ),
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option(help="What the images are compared with: images in any of these forms, or .npz statistics."),
    ] = None,
    protocol: Annotated[
        str | None,
        typer.Option(
            help="torch-fidelity (default), adm, clean-fid, dinov2, or reconstruction (IMAGES are those of the "
            "reference, reconstructed). For a tokenizer: reconstruction adds rFID, perturbation is pFID. For folders "
            "of clips, FVD: stylegan-v and others; a wrong name lists all."
        ),
    ] = None,
    metrics: Annotated[
        str | None, typer.Option(help="Some of fid,sfid,is,kid,prc; by default all that protocol and reference allow.")
    ] = None,
    weights: Annotated[
        Path | None, typer.Option(help="Local file with the feature network's weights; downloaded once by default.")
    ] = None,
    torchscript: TorchScript = False,
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
    batch_size: Annotated[int, typer.Option(help="Images read at a time; does not change a score.")] = 64,
    out: Annotated[Path | None, typer.Option(help="JSON file for scores and everything they depend on.")] = None,
    allow_commands: Commands = False,
    allow_environment: Environment = False,
    device: Device = None,
) -> None:
    """Score images against a reference (FID, IS, KID, …), or the reconstructions of a tokenizer (PSNR, SSIM, LPIPS).

    A tokenizer is scored on the test split of its training data; --reference or data.root=… names other images. Several
    processes share the work: torchrun --nproc-per-node 8 -m vistok eval …
    """
    from vistok.eval.video_protocols import is_video_protocol
    from vistok.pipelines.runs import holds_generator, holds_tokenizer_only
    from vistok.utils.files import check_file_to_write, write_json
    from vistok.utils.processes import Processes

    processes = Processes.join()
    if out is not None:
        check_file_to_write(out)
    given = {
        "--reference": reference,
        "--protocol": protocol,
        "--metrics": metrics,
        "--weights": weights,
        "--torchscript": torchscript or None,
        "--lpips-weights": lpips_weights,
        "--crop": crop,
        "--make-reference": make_reference,
        "--split": split,
    }
    work: dict[str, Any] = {"batch_size": batch_size, "device": device, "processes": processes}
    allowed = allowed_by(allow_commands, allow_environment)
    if make_reference is None:
        _refuse(given, "--split", why="it goes with --make-reference")
    if holds_tokenizer_only(what):
        from vistok.pipelines.evaluations import score_tokenizer

        why = f"{what} is a tokenizer, which is scored without it"
        _refuse(given, "--metrics", "--crop", "--make-reference", why=why)
        result = score_tokenizer(
            what,
            overrides or (),
            reference=reference,
            protocol=protocol,
            weights=weights,
            torchscript=torchscript,
            lpips_weights=lpips_weights,
            allowed=allowed,
            **work,
        )
    elif overrides and holds_generator(what):
        from vistok.pipelines.evaluations import score_generated_ids

        _refuse(given, *given, why=f"{what} generates ids, which are scored without it")
        result = score_generated_ids(what, overrides, batch_size=batch_size, device=device, allowed=allowed)
    elif overrides:
        raise typer.BadParameter(f"only the run of a tokenizer takes {overrides[0]}")
    elif make_reference is not None:
        _refuse(
            given, "--reference", "--metrics", "--torchscript", "--lpips-weights", why="a reference is made without it"
        )
        _make_reference(what, make_reference, protocol=protocol, weights=weights, split=split, crop=crop, **work)
        return
    elif protocol is not None and is_video_protocol(protocol):
        from vistok.pipelines.evaluations import score_clips

        _refuse(given, "--metrics", "--crop", "--lpips-weights", why="clips are scored without it")
        if reference is None:
            raise typer.BadParameter("clips need some to be compared with", param_hint="--reference")
        result = score_clips(what, reference, protocol=protocol, weights=weights, torchscript=torchscript, **work)
    else:
        from vistok.eval import evaluate as score
        from vistok.pipelines.evaluations import open_lpips

        _refuse(given, "--torchscript", why="it is for clips; networks of images are read without it")
        if reference is None:
            raise typer.BadParameter("images need one to be compared with", param_hint="--reference")
        result = score(
            what,
            reference,
            protocol=protocol or "torch-fidelity",
            metrics=[metric.strip() for metric in metrics.split(",")] if metrics is not None else None,
            weights=weights,
            lpips=open_lpips(lpips_weights),
            crop=crop,
            **work,
        )
    if not processes.is_first:
        return
    _print_scores(result)
    _print_notes(result["warnings"])
    if out is not None:
        write_json(out, result)
        output.print(f"Everything these scores depend on is in {escape(str(out))}")


def _refuse(given: Mapping[str, Any], *options: str, why: str) -> None:
    """Refuse the first of ``options`` that was given."""
    for option in options:
        if given[option] is not None:
            raise typer.BadParameter(why, param_hint=option)


def _make_reference(images: str, path: Path, *, protocol: str | None, processes: Any, **options: Any) -> None:
    from vistok.pipelines.evaluations import make_reference_file

    told = make_reference_file(images, path, protocol=protocol or "torch-fidelity", processes=processes, **options)
    if processes.is_first:
        made = f"{escape(str(path))} stands for {told.count:,} images"
        output.print(f"The reference {made} (fingerprint {str(told.fingerprint)[:12]}…)")


def benchmark(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Run of a generator, pipeline folder, or hub id.")],
    out: Annotated[Path, typer.Option(help="Folder for features, scores and report.html; continued if it exists.")],
    options: Annotated[
        list[str] | None,
        typer.Argument(metavar="OPTION=VALUE", help="Sampling options that differ from the pipeline's: top_k=100"),
    ] = None,
    num: Annotated[
        int | None,
        typer.Option(
            "--num",
            "--num-images",
            help="Images or clips per setting; 50,000 images, or as many clips as the protocol has.",
        ),
    ] = None,
    labels: Annotated[
        str | None,
        typer.Option(help="balanced (classes in turn), random (uniform) or none; balanced if there are classes."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Image i of a seed is always the same.")] = 0,
    guidance_sweep: Annotated[
        str | None, typer.Option(help="Scales to compare, such as 1.0,1.5,2.0; features of earlier ones are reused.")
    ] = None,
    temperature_sweep: Annotated[
        str | None, typer.Option(help="Temperatures to compare, each with every scale, such as 0.9,1.0.")
    ] = None,
    guidance_search: Annotated[
        bool,
        typer.Option(
            "--guidance-search",
            help="Walk in steps of 0.25 to the scale of a local minimum of FID; goes on if stopped.",
        ),
    ] = False,
    guidance_start: Annotated[
        float | None, typer.Option(help="Where the search begins; the pipeline's own scale by default.")
    ] = None,
    reference: Annotated[
        str | None, typer.Option(help="As for vistok eval; without one only the Inception Score is computed.")
    ] = None,
    protocol: Annotated[
        str | None,
        typer.Option(
            help="adm (the default), torch-fidelity, clean-fid or dinov2; of clips a video protocol (a wrong name "
            "lists them), or own-FRAMESxSIDE for other sizes."
        ),
    ] = None,
    weights: Annotated[
        Path | None, typer.Option(help="Local file with the feature network's weights; downloaded once by default.")
    ] = None,
    torchscript: TorchScript = False,
    eval_size: Annotated[
        int | None, typer.Option(help="Resize images to this side first (bicubic), as some papers do from 384 to 256.")
    ] = None,
    save_npz: Annotated[
        bool, typer.Option("--save-npz", help="Also write samples.npz for ADM-style evaluators.")
    ] = False,
    batch_size: Annotated[int, typer.Option(help="Images at a time; does not change them.")] = 64,
    dtype: Dtype = None,
    device: Device = None,
) -> None:
    """Generate many images or clips, keep their features, and score them; repeat the command to continue a stopped one.

    Several processes share the work: torchrun --nproc-per-node 8 -m vistok benchmark … (with --num-images: torchrun
    takes --num for an option of its own).
    """
    from vistok.config import override
    from vistok.eval.benchmark import benchmark as measure
    from vistok.eval.video_protocols import is_video_protocol
    from vistok.pipelines import pipeline
    from vistok.pipelines.evaluations import measure_clips
    from vistok.utils.processes import Processes

    processes = Processes.join()
    device = device or str(processes.device())
    if guidance_start is not None and not guidance_search:
        raise typer.BadParameter("it is where a search begins; add --guidance-search", param_hint="--guidance-start")
    pipe, sampling = pipeline(run, device=device, dtype=dtype), override({}, options or ())
    given: dict[str, Any] = {
        "seed": seed,
        "guidance_scales": _numbers(guidance_sweep) if guidance_sweep is not None else None,
        "temperatures": _numbers(temperature_sweep) if temperature_sweep is not None else None,
        "sampling": sampling,
        "reference": reference,
        "weights": weights,
        "batch_size": batch_size,
        "device": device,
        "processes": processes,
        "command": command_line(),
    }
    if len(pipe.tokenizer.input_shape) == 4:
        of_images = {
            "--labels": labels,
            "--eval-size": eval_size,
            "--save-npz": save_npz or None,
            "--guidance-search": guidance_search or None,
        }
        _refuse(of_images, *of_images, why="it is for images; this pipeline generates clips")
        if not is_video_protocol(protocol):
            raise typer.BadParameter(_clip_protocols(pipe.tokenizer.input_shape), param_hint="--protocol")
        result = measure_clips(pipe, out, num_clips=num, protocol=protocol, torchscript=torchscript, **given)
    else:
        _refuse({"--torchscript": torchscript or None}, "--torchscript", why="it is for clips")
        result = measure(
            pipe,
            out,
            num_images=50_000 if num is None else num,
            labels=cast(Any, labels),  # measure checks it
            protocol=protocol or "adm",
            search_from=_search_start(pipe, sampling, guidance_start) if guidance_search else None,
            eval_size=eval_size,
            save_npz=save_npz,
            **given,
        )
    if not processes.is_first:
        return
    _print_sweep(result)
    _print_notes(dict.fromkeys(note for scored in result["runs"] for note in scored["warnings"]))
    if "found" in result:
        output.print(f"the search ends at guidance scale {result['found']:g}")
    output.print(f"Scores, samples and classes are shown in {escape(str(out / 'report.html'))}")


def _clip_protocols(shape: tuple[int, ...]) -> str:
    from vistok.eval.video_protocols import VIDEO_PROTOCOLS

    known = ", ".join(VIDEO_PROTOCOLS)
    return f"this pipeline generates clips; take one of {known}, or own-{shape[1]}x{shape[2]}"


def _search_start(pipe: Any, sampling: dict[str, Any], start: float | None) -> float:
    """The guidance scale at which a search begins."""
    own = getattr(pipe.options(**sampling), "guidance_scale", None)
    if own is None:
        raise ValueError(f"{type(pipe.generator).__name__} has no guidance scale to search")
    if start is None and not isinstance(own, int | float):
        raise ValueError(f"the pipeline's guidance scale is {own}; say where the search begins with --guidance-start")
    return float(own if start is None else start)


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise ValueError(f"expected numbers separated by commas, such as 1.0,1.5,2.0; got {text!r}") from error


def _print_scores(result: dict[str, Any]) -> None:
    images, reference = result["images"], result["reference"]
    count = "an unknown number of" if images["count"] is None else f"{images['count']:,}"
    what = "clips" if "video_protocol" in result else "images"
    output.print(f"{count} {what} ({escape(images['source'])}) against {escape(reference['source'])}")
    table = Table("score", "value", title=f"protocol: {result['protocol']}", title_justify="left", box=SIMPLE)
    for name, value in result["scores"].items():
        table.add_row(name, _number(value))
    print_table(table)


def _print_sweep(result: dict[str, Any]) -> None:
    """Print a table with a row for each setting; the best one is marked."""
    from vistok.eval.report import best_run, score_rows

    runs = result["runs"]
    count, reference = runs[0]["images"]["count"], runs[0]["reference"]["source"]
    what = "clips" if "video_protocol" in runs[0] else "images"
    output.print(f"{count:,} {what} per setting against {escape(reference)}, protocol {result['protocol']}")
    rows, best = score_rows(runs), best_run(runs)
    table = Table(*rows[0], *([""] if best is not None else []), box=SIMPLE)
    for index, row in enumerate(rows):
        spreads = {name: runs[index]["scores"].get(f"{name}_std") for name in row}
        cells = [
            (value if isinstance(value, str) else _number(value, "–"))
            + ("" if spreads[name] is None else f" ± {_number(spreads[name])}")
            for name, value in row.items()
        ]
        marked = best is not None and best[0] == index
        mark = [f"lowest {best[1]}" if marked else ""] if best is not None else []
        table.add_row(*cells, *mark, style="bold" if marked else None)
    print_table(table)


def _number(value: float | None, absent: str = "infinite") -> str:
    """Format with four decimals, or four significant digits for small values such as kernel distances."""
    if value is None:
        return absent
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4f}" if abs(value) >= 0.1 or value == 0 else f"{value:#.4g}"


def _print_notes(notes: Iterable[str]) -> None:
    for note in notes:
        errors.print(f"[yellow]Note:[/] {escape(note)}")

"""``vistok sample``, ``pairs``, ``reconstruct``, ``demo`` and ``caption``: commands that run trained models."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from vistok.cli.console import Commands, Device, Dtype, Environment, allowed_by, output
from vistok.utils.files import read_lines


def sample(
    run: Annotated[
        str,
        typer.Argument(
            metavar="RUN",
            help="Run of a generator or its checkpoint, pipeline folder, or hub id; see --tokenizer.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder for the samples; must not exist yet, or be empty.")],
    options: Annotated[
        list[str] | None,
        typer.Argument(metavar="OPTION=VALUE", help="More sampling options: guidance_interval=[0,64]"),
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(help="RUN is a generator alone (converted, or an official id), whose tokens this one decodes."),
    ] = None,
    classes: Annotated[
        str | None,
        typer.Option(help="Classes by id or by name, separated by commas, taken in turn; all of them by default."),
    ] = None,
    prompt: Annotated[
        list[str] | None, typer.Option(help="A text to generate from; can be given several times, taken in turn.")
    ] = None,
    prompts: Annotated[Path | None, typer.Option(help="Text file with a prompt a line, taken in turn.")] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="What guidance leads away from.")] = None,
    num: Annotated[int, typer.Option("--num", "--num-images", help="How many images.")] = 64,
    seed: Annotated[int, typer.Option(help="Image i of a seed is always the same.")] = 0,
    batch_size: Annotated[int, typer.Option(help="Images generated at a time; changes them by rounding at most.")] = 64,
    npz: Annotated[bool, typer.Option("--npz", help="Also write samples.npz for ADM-style evaluators.")] = False,
    temperature: Annotated[float | None, typer.Option(help="0 takes the likeliest token.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Draw among the k likeliest tokens only; 0 is off.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Draw within this probability mass only; 1 is off.")] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="Classifier-free guidance; 1 is off.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where a killed run stopped.")] = False,
    compiled: Annotated[
        bool, typer.Option("--compile", help="Compile the steps first: worth it for many images on a GPU.")
    ] = False,
    dtype: Dtype = None,
    device: Device = None,
) -> None:
    """Generate images: a PNG each, an overview grid.png, and samples.json with all settings.

    Sampling options that are not given are those saved with the pipeline.

    On several GPUs, or in several processes: torchrun --nproc_per_node=8 -m vistok sample … (with --num-images:
    torchrun takes --num for an option of its own).
    """
    from vistok.config import override
    from vistok.pipelines import pipeline
    from vistok.pipelines.samples import write_samples
    from vistok.utils.processes import Processes

    named = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "guidance_scale": guidance_scale}
    sampling = override({key: value for key, value in named.items() if value is not None}, options or ())
    processes = Processes.join()
    parts = (run,) if tokenizer is None else (tokenizer, run)
    pipe = pipeline(*parts, device=device or processes.device(), dtype=dtype)
    write_samples(
        pipe.compile() if compiled else pipe,
        out,
        num,
        classes=classes.split(",") if classes is not None else None,
        prompts=_prompts(prompt, prompts),
        negative_prompt=negative_prompt,
        seed=seed,
        batch_size=batch_size,
        npz=npz,
        sampling=sampling,
        resume=resume,
        processes=processes,
    )
    if processes.is_first:
        what = "1 sample is" if num == 1 else f"{num:,} samples are"
        output.print(f"{what} in {escape(str(out))}; see {escape(str(out / 'grid.png'))}")


def pairs(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Run of a generator, pipeline folder, or hub id.")],
    out: Annotated[Path, typer.Option(help="Folder for the pairs; must not exist yet, or be empty.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE", help="The real images: data.root=photos/ data.limit=200000; and sampling options."
        ),
    ] = None,
    sigma: Annotated[float, typer.Option(help="Share of the real images' tokens that are kept, 0 to 1.")] = 0.7,
    seed: Annotated[int, typer.Option(help="Of all that is drawn.")] = 0,
    batch_size: Annotated[int, typer.Option(help="Images generated at a time; changes them by rounding at most.")] = 64,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where a killed run stopped.")] = False,
    allow_commands: Commands = False,
    allow_environment: Environment = False,
    dtype: Dtype = None,
    device: Device = None,
) -> None:
    """Generate images of partly real tokens, paired with the real images, for the post-training of a tokenizer.

    To train a tokenizer on the pairs: data.root=PAIRS/generated data.target_root=PAIRS/real; see
    `vistok configs cifar10/post_training`.

    On several GPUs, or in several processes: torchrun --nproc_per_node=8 -m vistok pairs …
    """
    from vistok.config import override
    from vistok.pipelines import pipeline
    from vistok.pipelines.pairs import write_pairs
    from vistok.pipelines.runs import data_of_run
    from vistok.utils.processes import Processes

    processes = Processes.join()
    pipe = pipeline(run, device=device or processes.device(), dtype=dtype)
    of_data = [text for text in overrides or () if text.startswith("data.")]
    allowed = allowed_by(allow_commands, allow_environment)
    record = write_pairs(
        pipe,
        data_of_run(run, of_data, input_shape=pipe.tokenizer.input_shape, allowed=allowed),
        out,
        sigma=sigma,
        seed=seed,
        batch_size=batch_size,
        sampling=override({}, [text for text in overrides or () if text not in of_data]),
        resume=resume,
        processes=processes,
    )
    if processes.is_first:
        count = record["images"] - len(record["unreadable"])
        output.print(f"{count:,} pairs are in {escape(str(out))}: generated/ and real/")


def reconstruct(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Run, saved tokenizer, pipeline, or hub id.")],
    images: Annotated[
        list[Path],
        typer.Argument(
            metavar="IMAGE...",
            help="Image files (videos, for a tokenizer of clips), cropped to the right size; or folders.",
        ),
    ],
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
    from vistok.pipelines.folders import load_tokenizer
    from vistok.pipelines.samples import reconstruct_files, reconstruct_prefixes
    from vistok.pipelines.texts import check_needs_no_text
    from vistok.utils.devices import choose_device

    tokenizer = load_tokenizer(run).to(choose_device(device))
    check_needs_no_text(run, tokenizer, "image files")
    of_clips = len(tokenizer.input_shape) == 4
    images = [file for given in images for file in _files(given, of_clips=of_clips)]
    if tokens is not None:
        lengths = _whole_numbers(tokens, "--tokens")
        for image, decibels in zip(images, reconstruct_prefixes(tokenizer, images, lengths, out), strict=True):
            scores = ", ".join(f"{value:.2f} dB at {length}" for length, value in zip(lengths, decibels))
            output.print(f"{escape(str(image))}  PSNR {scores}")
        output.print(f"Originals and their reconstructions are in {escape(str(out))}")
        return
    for image, value in zip(images, reconstruct_files(tokenizer, images, out), strict=True):
        output.print(f"{escape(str(image))}  PSNR {value:.2f} dB")
    output.print(f"Originals over reconstructions are in {escape(str(out))}")


def demo(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="Runs, saved tokenizers, pipelines, or hub ids.")],
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int | None, typer.Option(help="A free one from 7860 on by default.")] = None,
    max_upload: Annotated[float, typer.Option(metavar="MB", help="Larger uploads are refused.")] = 10,
    device: Device = None,
) -> None:
    """Try runs in a browser: generate images, reconstruct an image, look at its tokens and swap them.

    The demo listens on this machine only, unless --host says otherwise, and keeps no files of visitors.
    """
    from vistok.demo import launch

    launch(runs, host=host, port=port, max_upload_mb=max_upload, device=device)


FROM_FOLDER = 16
"""The most files of a folder that are read."""


def _files(path: Path, *, of_clips: bool = False) -> list[Path]:
    """A file itself; of a folder the first image files, or videos, in it and in its subfolders."""
    from vistok.data.formats import is_image
    from vistok.data.video_files import is_frame_folder, videos_below

    if not path.is_dir():
        return [path]
    if of_clips:
        found = [path] if is_frame_folder(path) else videos_below(path)
    else:
        found = sorted(file for file in path.rglob("*") if is_image(file.name) and not file.name.startswith("."))
    what = "videos" if of_clips else "image files"
    if not found:
        raise FileNotFoundError(f"there are no {what} in {path}")
    if len(found) > FROM_FOLDER:
        output.print(f"{escape(str(path))} has {len(found):,} {what}; these are the first {FROM_FOLDER}")
    return found[:FROM_FOLDER]


def caption(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Run, pipeline folder, or hub id, that writes texts.")],
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="Image files; cropped to the right size.")],
    question: Annotated[str | None, typer.Option(help="What is asked about each image.")] = None,
    max_tokens: Annotated[int, typer.Option(help="The longest answer.")] = 64,
    device: Device = None,
) -> None:
    """Describe images in words, a line for each."""
    from vistok.data.decoding import ImageDecoder
    from vistok.data.pictures import open_picture
    from vistok.pipelines import pipeline

    pipe = pipeline(run, device=device)
    channels, side, _ = pipe.tokenizer.image_shape("captioning files")
    decoder = ImageDecoder(channels, side=side)
    files = [file for path in images for file in _files(path)]
    pictures = [open_picture(file, decoder) for file in files]
    for image, text in zip(files, pipe.caption(pictures, question=question, max_tokens=max_tokens), strict=True):
        line = "".join(letter if letter.isprintable() else " " for letter in text)
        output.print(f"{escape(str(image))}  {escape(line)}")


def _prompts(given: list[str] | None, file: Path | None) -> list[str] | None:
    """The prompts of the command line, followed by the nonempty lines of ``file``."""
    if not given and file is None:
        return None
    lines = read_lines(file) if file is not None else []
    prompts = [*(given or ()), *(line.strip() for line in lines if line.strip())]
    if not prompts:
        raise ValueError(f"{file} holds no prompts: a text a line is expected")
    return prompts


def _whole_numbers(text: str, option: str) -> list[int]:
    """The integers of "1,2,4"."""
    parts = text.split(",")
    if not all(part.strip().isdecimal() for part in parts):
        raise ValueError(f"{option} takes whole numbers with commas between them, such as 1,2,4; got {text!r}")
    return [int(part) for part in parts]

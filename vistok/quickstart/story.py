"""The report of the quickstart of images: its pictures and texts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Any

import torch
from PIL import Image

from vistok.data.pictures import save_png, to_pil
from vistok.data.sheets import sheet
from vistok.quickstart.pages import (
    NOTE,
    charts_of,
    distinct_score,
    environment_facts,
    recognised_score,
    seconds_score,
)
from vistok.quickstart.scores import CLASSES, Digits, DigitScores, decode, encode, nearest, reconstruct
from vistok.quickstart.systems import System
from vistok.tokenizers.base import Tokenizer
from vistok.train.monitor import read_metrics
from vistok.types import TokenSpec
from vistok.utils.report import (
    Charts,
    Commands,
    Facts,
    Paragraph,
    Picture,
    Score,
    ScoreTable,
    Section,
    write_report,
)

ROWS = 10


@dataclass(frozen=True)
class Pictures:
    """The report's pictures.

    Attributes:
        samples: generated digits, a column per class.
        nearest: generated digits over the training digits nearest to them.
        reconstructions: held-out digits over their reconstructions.
        prefixes: held-out digits decoded from more and more of their tokens; None if tokens are not ordered.
    """

    samples: Image.Image
    nearest: Image.Image
    reconstructions: Image.Image
    prefixes: Image.Image | None

    def save(self, folder: Path) -> None:
        """Write each picture as a PNG file."""
        for name, image in vars(self).items():
            if image is not None:
                save_png(image, folder / f"{name}.png")


def draw(generated: Digits, train: Digits, held_out: Digits, *, tokenizer: Tokenizer) -> Pictures:
    """Draw everything. Nothing is picked: the first digits of each class, and evenly spread held-out digits."""
    shown = [generated.pixels[generated.labels == label][:ROWS] for label in range(CLASSES)]  # by class (rows, C, H, W)
    firsts = torch.stack([row[0] for row in shown])
    originals = held_out.pixels[:: max(1, len(held_out) // (2 * CLASSES))][: 2 * CLASSES]
    classes = [str(label) for label in range(CLASSES)]
    pairs = torch.stack([originals, reconstruct(tokenizer, originals)])  # (2, 2 * CLASSES, C, H, W)
    return Pictures(
        samples=sheet(to_pil(torch.stack(shown, 1).flatten(0, 1)), CLASSES, column_labels=classes),
        nearest=sheet(
            to_pil(torch.cat([firsts, train.pixels[nearest(firsts, train.pixels)]])),
            CLASSES,
            column_labels=classes,
            row_labels=("made", "real"),
        ),
        reconstructions=sheet(
            to_pil(pairs.unflatten(1, (-1, CLASSES)).transpose(0, 1).flatten(0, 2)),
            CLASSES,
            row_labels=("real", "decoded") * (len(originals) // CLASSES),
        ),
        prefixes=_prefixes(tokenizer, held_out) if tokenizer.spec.prefixes_decode else None,
    )


def curves(runs: tuple[Path, Path], spec: TokenSpec) -> Charts:
    """Training curves of the tokenizer and of the generator."""
    tokenizer, generator = (read_metrics(run / "metrics.jsonl") for run in runs)
    named = [
        ("Tokenizer: PSNR in dB", tokenizer, "psnr"),
        ("Tokenizer: share of codes used", tokenizer, "codebook_usage"),
        ("Generator: " + ("nats per token" if spec.discrete else "loss"), generator, "loss"),
    ]
    return charts_of(
        named,
        "From metrics.jsonl of both runs, which have a report.html each. TensorBoard shows all of it: tensorboard "
        "--logdir with this folder.",
    )


def _prefixes(tokenizer: Tokenizer, digits: Digits, rows: int = 5) -> Image.Image:
    """A row for each of some digits: the digit, and decodings of its first 1, 2, 4, … tokens with the same noise."""
    originals = digits.pixels[:: max(1, len(digits) // rows)][:rows]
    ids, ladder = encode(tokenizer, originals), prefix_ladder(tokenizer.spec)
    decoded = [decode(tokenizer, ids[:, :length]) for length in ladder]
    rows_of_images = torch.stack([originals, *decoded], 1)  # (rows, columns, C, H, W)
    labels = ["real", *map(str, ladder)]
    return sheet(to_pil(rows_of_images.flatten(0, 1)), len(labels), column_labels=labels)


def prefix_ladder(spec: TokenSpec) -> list[int]:
    """Numbers of first tokens to decode: doubled each time, up to all tokens; for scales, after each scale."""
    if spec.prefix_step is None:
        return sorted({spec.decodable(count) for count in range(1, spec.length + 1)})
    steps = [spec.prefix_step << power for power in range((spec.length // spec.prefix_step).bit_length())]
    return sorted({*steps, spec.length})


def score_lines(scores: DigitScores, seconds: float, system: System, *, spec: TokenSpec) -> list[Score]:
    """The scores as the report shows them, with targets."""
    return [
        recognised_score(
            scores.recognised,
            system,
            "Generated digits that a classifier, fitted to real digits only, takes for the class asked for.",
        ),
        Score(
            "recognised_real", f"{scores.recognised_real:.1%}", "The same classifier on real digits it has not seen."
        ),
        Score(
            "frechet",
            f"{scores.frechet:.1f}",
            "Distance of generated from training digits, in the classifier's features; 0 is equal.",
            "at most 5 × real",
            scores.frechet <= 5 * scores.frechet_real,
        ),
        Score("frechet_real", f"{scores.frechet_real:.1f}", "The same for as many real digits held out from training."),
        distinct_score(scores.distinct),
        Score(
            "copies",
            f"{scores.copies:.1%}",
            "Generated token sequences that a training digit has too, in any view that the generator saw.",
            "below 10 %",
            scores.copies < 0.1,
        ),
        Score("psnr", f"{scores.psnr:.1f} dB", f"Held-out digits after {spec.length} tokens and back."),
        seconds_score(seconds, system),
    ]


def write_story(
    path: Path,
    pictures: Pictures,
    lines: list[Score],
    *,
    curves: Charts,
    system: System,
    spec: TokenSpec,
    protocol: Mapping[str, Any],
) -> None:
    """Write the report of a quickstart."""
    shown = {line.name: line.value for line in lines}
    kind = "tokens" if spec.discrete else "vectors"
    count = f"{spec.length} {kind}" if spec.grid is None else f"{'×'.join(map(str, spec.grid))} {kind}"
    write_report(
        path,
        title=f"Digits, written in {kind}",
        kicker="vistok quickstart",
        lead=(
            f"{system.summary}. The tokenizer learned to write each 32×32 digit as {count}, and the generator to "
            f"write such {kind} for a given class. {shown['recognised']} of the generated digits are recognised as the "
            f"one asked for; of real digits, {shown['recognised_real']} are."
        ),
        sections=[
            Section("Generated digits", [_samples(pictures)]),
            Section("Scores", [ScoreTable(lines), Paragraph(NOTE)]),
            Section("New, or copied?", [Paragraph(ABOUT_COPIES), _nearest(pictures)]),
            Section(f"What {count} keep of an image", [_reconstructions(pictures), *_coarse_to_fine(pictures)]),
            Section("Training curves", [curves]),
            Section("Go on", [Commands(_next_commands(path.parent))]),
            Section("Where these numbers come from", [Facts(_facts(protocol))]),
        ],
    )


SCALE = 1.0
"""CSS pixels per pixel of the pictures, which are already enlarged."""
ABOUT_COPIES = (
    "There are so few training digits that a generator could learn them by heart. It trains on many slightly turned, "
    "shifted and scaled views of each. Equal tokens are counted above; near copies would show here."
)


def _samples(pictures: Pictures) -> Picture:
    return Picture(
        pictures.samples,
        "One column per class, the first ten of each; none were picked.",
        "Generated digits, one column for each of the classes 0 to 9",
        SCALE,
    )


def _nearest(pictures: Pictures) -> Picture:
    return Picture(
        pictures.nearest,
        "Above: the first sample of each class. Below: the training digit that differs least from it, pixel by pixel.",
        "Generated digits over the training digits nearest to them",
        SCALE,
    )


def _reconstructions(pictures: Pictures) -> Picture:
    return Picture(
        pictures.reconstructions,
        "Rows in pairs: held-out digits, and below them what the tokenizer makes of their tokens.",
        "Real digits over their reconstructions",
        SCALE,
    )


def _coarse_to_fine(pictures: Pictures) -> list[Picture]:
    if pictures.prefixes is None:
        return []
    caption = (
        "These tokens are ordered, and any first ones decode. Left: a held-out digit; then what 1, 2, 4, … of its "
        "tokens say of it."
    )
    return [Picture(pictures.prefixes, caption, "Real digits beside decodings of ever more of their tokens", SCALE)]


def _next_commands(out: Path) -> list[str]:
    tokenizer, generator = quote(str(out / "tokenizer")), quote(str(out / "generator"))
    return [
        "# More digits: 32 threes and fives",
        f"vistok sample {generator} --classes 3,5 --num 32 --out more-digits/",
        "",
        "# PSNR and SSIM of the tokenizer on the held-out digits",
        f"vistok eval {tokenizer}",
        "",
        "# The same chain on your own pictures (a folder for each class, or one for all)",
        f"vistok train {tokenizer}/config.yaml output_dir=runs/tokenizer \\",
        "    data.source=folder data.root=photos/ data.channels=3 \\",
        "    data.affine=null data.flip=true",
        "vistok tokenize runs/tokenizer --augmentation flip --out tokens/",
        f"vistok train {generator}/config.yaml output_dir=runs/generator tokens=tokens/",
        "vistok sample runs/generator --num 1000 --out samples/",
        "",
        "# FID and more; the Inception weights are fetched once, or named with --weights",
        "vistok eval samples/ --reference photos/",
        "",
        "# Every model there is; vistok configs: larger recipes",
        "vistok models",
    ]


def _facts(protocol: Mapping[str, Any]) -> dict[str, str]:
    return {
        "Data": f"{protocol['training_digits']:,} training and {protocol['held_out_digits']:,} held-out digits of "
        f"{protocol['data']}",
        "Classifier": protocol["classifier"],
        "Generated": f"{protocol['generated_digits']:,} digits, {protocol['frechet_digits']:,} of them for the Fréchet "
        "distance: of each class as many as are held out",
        "Copies": protocol["copies"],
        **environment_facts(protocol),
    }

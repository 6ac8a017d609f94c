"""The report of the quickstart of clips: its pictures and texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vistok.data.movies import contact_sheet, gif_bytes, save_gif, save_mp4, side_by_side, to_frames
from vistok.data.pictures import save_png
from vistok.quickstart.clip_scores import Clips, ClipScores, repeat_given
from vistok.quickstart.pages import (
    NOTE,
    charts_of,
    distinct_score,
    environment_facts,
    recognised_score,
    seconds_score,
)
from vistok.quickstart.scores import CLASSES, nearest, reconstruct
from vistok.quickstart.systems import System
from vistok.tokenizers.base import Tokenizer
from vistok.train.monitor import read_metrics
from vistok.types import TokenSpec
from vistok.utils.report import (
    Animation,
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

SHOWN = 5  # clips of each class
PAIRS = 10  # held-out clips shown with predictions and reconstructions


@dataclass(frozen=True)
class ClipPictures:
    """Pictures, and movies (T, H, W, C) uint8 that show many clips at once.

    Attributes:
        samples: generated clips, a row for each class.
        nearest: the first sample of each class over the training clip nearest to it.
        predictions: held-out clips, over predictions from their first frames, over repeated frames.
        reconstructions: held-out clips over their reconstructions.
        frames: the first sample of each class, with its frames in a row.
        prediction_frames: the frames of three held-out clips, each over the predicted frames.
    """

    samples: np.ndarray
    nearest: np.ndarray
    predictions: np.ndarray
    reconstructions: np.ndarray
    frames: Image.Image
    prediction_frames: Image.Image

    def save(self, folder: Path) -> None:
        """Write each movie as MP4 and GIF, each picture as PNG."""
        for name, shown in vars(self).items():
            if isinstance(shown, Image.Image):
                save_png(shown, folder / f"{name}.png")
            else:
                save_mp4(shown, folder / f"{name}.mp4")
                save_gif(shown, folder / f"{name}.gif")


def draw(
    generated: Clips,
    predicted: Tensor,
    asked: Tensor,
    train: Clips,
    *,
    tokenizer: Tokenizer,
    given: int,
) -> ClipPictures:
    """Draw everything. Nothing is picked: the first clips of each class, and evenly spread held-out clips.

    Args:
        predicted: predictions (N, 1, T, H, W) from the first ``given`` frames of the clips ``asked``.
        asked: held-out clips (N, 1, T, H, W).
    """
    firsts = torch.stack([generated.pixels[generated.labels == label][0] for label in range(CLASSES)])
    columns = torch.cat([generated.pixels[generated.labels == label][:SHOWN] for label in range(CLASSES)])
    chosen = torch.arange(min(PAIRS, len(asked))) * len(asked) // min(PAIRS, len(asked))
    real, made = asked[chosen], predicted[chosen]
    pairs = [to_frames(clips[:3]) for clips in (real, made)]
    return ClipPictures(
        samples=side_by_side(to_frames(columns), len(columns) // CLASSES),
        nearest=_rows(firsts, train.pixels[nearest(firsts, train.pixels)]),
        predictions=_rows(real, made, repeat_given(real, given)),
        reconstructions=_rows(real, reconstruct(tokenizer, real)),
        frames=contact_sheet(to_frames(firsts), real.shape[2]),
        prediction_frames=contact_sheet([clip for pair in zip(*pairs) for clip in pair], real.shape[2]),
    )


def _rows(*clips: Tensor) -> np.ndarray:
    """A movie with a row for each batch of clips."""
    return side_by_side(np.concatenate([to_frames(batch) for batch in clips]), len(clips[0]))


def curves(runs: Sequence[Path]) -> Charts:
    """Training curves of the tokenizer, the generator and the predictor."""
    tokenizer, generator, predictor = (read_metrics(run / "metrics.jsonl") for run in runs)
    named = [
        ("Tokenizer: PSNR in dB", tokenizer, "psnr"),
        ("Generator: nats per token", generator, "loss"),
        ("Predictor: nats per token", predictor, "loss"),
    ]
    return charts_of(
        named,
        "From metrics.jsonl of the runs, which have a report.html each. TensorBoard shows all of it: tensorboard "
        "--logdir with this folder.",
    )


def score_lines(scores: ClipScores, seconds: float, system: System, *, spec: TokenSpec, num_frames: int) -> list[Score]:
    """The scores as the report shows them, with targets."""
    predicted = f"{system.given_frames + 1} to {num_frames}"
    return [
        recognised_score(
            scores.recognised,
            system,
            "Generated frames that a classifier, fitted to real frames only, takes for the digit asked for.",
        ),
        Score("recognised_real", f"{scores.recognised_real:.1%}", "The same classifier on real clips it has not seen."),
        Score(
            "displacement",
            f"{scores.displacement:.2f} px",
            "How far the centre of mass of a generated digit moves from frame to frame.",
            "within 20 % of real",
            abs(scores.displacement / scores.displacement_real - 1) <= 0.2,
        ),
        Score("displacement_real", f"{scores.displacement_real:.2f} px", "The same of clips held out from training."),
        Score(
            "prediction",
            f"{scores.prediction:.1f} dB",
            f"PSNR of frames {predicted} of held-out clips, predicted from the {system.given_frames} before.",
            "above repeating and black",
            scores.prediction > max(scores.prediction_repeat, scores.prediction_black),
        ),
        Score(
            "prediction_repeat",
            f"{scores.prediction_repeat:.1f} dB",
            f"The same where frame {system.given_frames} is repeated instead.",
        ),
        Score(
            "prediction_black",
            f"{scores.prediction_black:.1f} dB",
            "The same of black frames: what a predictor gets that says nothing.",
        ),
        distinct_score(scores.distinct),
        Score(
            "copies",
            f"{scores.copies:.1%}",
            "Generated token sequences that a training clip has too, in any view that the generator saw.",
            "0 %",
            scores.copies == 0,
        ),
        Score("psnr", f"{scores.psnr:.1f} dB", f"Held-out clips after {spec.length} tokens and back."),
        seconds_score(seconds, system),
    ]


COPIED = (
    "There are 1,433 training digits, each on one path. The generator trains on clips from random places of these "
    "paths. Equal tokens are counted above; near copies would show here."
)


def write_story(
    path: Path,
    pictures: ClipPictures,
    lines: list[Score],
    *,
    curves: Charts,
    system: System,
    tokenizer: Tokenizer,
    protocol: Mapping[str, Any],
) -> None:
    """Write the report of a quickstart of clips."""
    shown = {line.name: line.value for line in lines}
    _, length, side, _ = tokenizer.input_shape
    count, scale = f"{tokenizer.spec.length} tokens", 2 if side >= 24 else 3
    write_report(
        path,
        title="Digits that move",
        kicker="vistok quickstart",
        lead=(
            f"{system.summary}. The tokenizer learned to write a clip of {length} frames of {side}×{side} pixels as "
            f"{count}, and the generators to write such tokens for a given class, or for given frames. "
            f"{shown['recognised']} of the generated frames are recognised as the digit asked for; of real ones, "
            f"{shown['recognised_real']} are."
        ),
        sections=[
            Section("Generated clips", _samples(pictures, scale)),
            Section("Scores", [ScoreTable(lines), Paragraph(NOTE)]),
            Section(f"What follows {protocol['given_frames']} frames?", _predictions(pictures, scale, protocol)),
            Section("New, or copied?", [Paragraph(COPIED), _nearest(pictures, scale)]),
            Section(f"What {count} keep of a clip", [_reconstructions(pictures, scale)]),
            Section("Training curves", [curves]),
            Section("Go on", [Commands(_next_commands(path.parent, protocol["given_frames"]))]),
            Section("Where these numbers come from", [Facts(_facts(protocol))]),
        ],
    )


def _animation(frames: np.ndarray, caption: str, description: str, scale: float) -> Animation:
    return Animation(gif_bytes(frames), round(frames.shape[2] * scale), caption, description)


def _samples(pictures: ClipPictures, scale: float) -> list[Animation | Picture]:
    return [
        _animation(
            pictures.samples,
            f"One row per class, the first {SHOWN} of each; none were picked.",
            "Generated clips that play, one row for each of the classes 0 to 9",
            scale,
        ),
        Picture(
            pictures.frames,
            "The first clip of each class, frame by frame.",
            "The frames of a generated clip of each class in a row",
            1.25,
        ),
    ]


def _predictions(pictures: ClipPictures, scale: float, protocol: Mapping[str, Any]) -> list[Animation | Picture]:
    given = protocol["given_frames"]
    return [
        _animation(
            pictures.predictions,
            f"Above: held-out clips. In the middle: what the predictor makes of their first {given} frames; it writes "
            f"these anew, too. Below: frame {given}, repeated.",
            "Held-out clips over predictions over a repeated frame",
            scale,
        ),
        Picture(
            pictures.prediction_frames,
            f"Rows in pairs: a held-out clip, and below it the prediction. The first {given} frames were given.",
            "Frames of held-out clips over predicted frames",
            1.25,
        ),
    ]


def _nearest(pictures: ClipPictures, scale: float) -> Animation:
    return _animation(
        pictures.nearest,
        "Above: the first sample of each class. Below: the training clip that differs least from it, pixel by pixel.",
        "Generated clips over the training clips nearest to them",
        scale,
    )


def _reconstructions(pictures: ClipPictures, scale: float) -> Animation:
    return _animation(
        pictures.reconstructions,
        "Above: held-out clips. Below: what the tokenizer makes of their tokens.",
        "Real clips over their reconstructions",
        scale,
    )


def _next_commands(out: Path, given: int) -> list[str]:
    tokenizer, generator = quote(str(out / "tokenizer")), quote(str(out / "generator"))
    return [
        "# More clips: 32 threes and fives, as MP4, GIF and pictures",
        f"vistok sample {generator} --classes 3,5 --num 32 --out more-clips/",
        "",
        "# PSNR and SSIM of the tokenizer on held-out clips",
        f"vistok eval {tokenizer}",
        "",
        "# The same chain on your own videos (a folder for each class, or one for all)",
        f"vistok train {tokenizer}/config.yaml output_dir=runs/tokenizer \\",
        "    data.source=videos data.name=null data.root=clips/ data.channels=3",
        f"vistok tokenize runs/tokenizer --augmentation random:8 --given-frames {given} --out tokens/",
        f"vistok train {generator}/config.yaml output_dir=runs/generator tokens=tokens/",
        "vistok sample runs/generator --num 100 --out samples/",
        "",
        "# The recipes of the paper",
        "vistok configs ucf101",
        "vistok configs k600",
    ]


def _facts(protocol: Mapping[str, Any]) -> dict[str, str]:
    return {
        "Data": f"{protocol['training_clips']:,} training and {protocol['held_out_clips']:,} held-out clips of "
        f"{protocol['data']}",
        "Classifier": protocol["classifier"],
        "Generated": f"{protocol['generated_clips']:,} clips of {protocol['frames']} frames; "
        f"{protocol['predicted_clips']:,} predictions",
        "Copies": protocol["copies"],
        **environment_facts(protocol),
    }

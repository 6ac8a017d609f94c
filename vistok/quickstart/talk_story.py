"""The report of the quickstart of a conversational model: its pictures and texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from vistok.data.pictures import save_png, to_pil
from vistok.data.sheets import sheet
from vistok.pipelines import Message
from vistok.quickstart.pages import charts_of, environment_facts, seconds_score
from vistok.quickstart.scores import CLASSES
from vistok.quickstart.systems import System
from vistok.train.monitor import read_metrics
from vistok.utils.report import (
    Block,
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

if TYPE_CHECKING:
    from vistok.quickstart.talk import Judged

COLUMNS, ROWS = 12, 10


@dataclass(frozen=True)
class TalkPictures:
    """The report's pictures.

    Attributes:
        conversations: the images of conversations, a column for each.
        drawings: drawn digits, a column per class.
        edits: held-out digits over their edits.
    """

    conversations: Image.Image
    drawings: Image.Image
    edits: Image.Image

    def save(self, folder: Path) -> None:
        """Write each as a PNG file."""
        for name, image in vars(self).items():
            save_png(image, folder / f"{name}.png")


def draw(judged: Judged, talks: Sequence[Sequence[Message]]) -> TalkPictures:
    """Draw everything; nothing is picked."""
    images = [[m.image for m in talk if m.role == "assistant" and m.image is not None] for talk in talks]
    per_class, each = max(1, len(judged.drawn) // CLASSES), max(1, len(judged.edited) // COLUMNS)
    shown = [label * per_class + row for row in range(min(ROWS, per_class)) for label in range(CLASSES)]
    pairs = torch.cat([judged.shown.pixels[::each][:COLUMNS], judged.edited[::each][:COLUMNS]])
    return TalkPictures(
        conversations=sheet([image for turn in zip(*images, strict=True) for image in turn], len(talks)),
        drawings=sheet(to_pil(judged.drawn[shown]), CLASSES, column_labels=[str(label) for label in range(CLASSES)]),
        edits=sheet(to_pil(pairs), len(pairs) // 2, row_labels=("shown", "made")),
    )


def curves(runs: tuple[Path, Path]) -> Charts:
    """Training curves of the tokenizer and of the generator."""
    tokenizer, generator = (read_metrics(run / "metrics.jsonl") for run in runs)
    named = [
        ("Tokenizer: PSNR in dB", tokenizer, "psnr"),
        ("Generator: error of images", generator, "flow"),
        ("Generator: nats per word", generator, "text"),
    ]
    return charts_of(named, "From metrics.jsonl of both runs, which have a report.html each.")


def score_lines(scores: Mapping[str, float], seconds: float, system: System) -> list[Score]:
    """The scores as the report shows them, with targets."""

    def share(name: str, meaning: str, least: float | None = None) -> Score:
        value = scores[name]
        if least is None:
            return Score(name, f"{value:.1%}", meaning)
        return Score(name, f"{value:.1%}", meaning, f"at least {100 * least:.0f} %", value >= least)

    return [
        share(
            "drawings", 'Drawn digits ("draw a seven") that a classifier of real digits recognises.', system.recognised
        ),
        share("captions", 'Held-out digits that the model names ("seven").', system.captions),
        share("edits", 'Held-out digits that are changed ("now a three") and recognised as such.', system.edits),
        share("edits_kept", "The same edits, still in the hand of the shown digit.", system.edits),
        share("turns", "Digits that the model drew and changed a turn later, recognised.", system.edits),
        share("turns_kept", "The same, still in the hand that they were drawn in.", system.edits),
        share("recognised_real", "The classifier on real digits it has not seen."),
        share("style_real", "The classifier of hands on real digits it has not seen."),
        Score(
            "copies",
            f"{scores['copies']:.1%}",
            "Drawings and edits whose latents a training digit has too, in any view that the generator saw.",
            "0",
            scores["copies"] == 0,
        ),
        share("distinct", "Different drawings and edits among all."),
        Score("psnr", f"{scores['psnr']:.1f} dB", "Held-out digits as latents and back."),
        seconds_score(seconds, system),
    ]


def write_story(
    path: Path,
    pictures: TalkPictures,
    lines: list[Score],
    talk: Sequence[Message],
    *,
    charts: Charts,
    system: System,
    protocol: Mapping[str, Any],
) -> None:
    """Write the report."""
    values = {line.name: line.value for line in lines}
    write_report(
        path,
        title="Digits, drawn, read and changed",
        kicker="vistok quickstart",
        lead=(
            f"{system.summary}. {values['drawings']} of its drawings are recognised, {values['captions']} of held-out "
            f"digits are named right, and {values['edits']} of edits show what was asked for."
        ),
        sections=[
            Section("A conversation", _transcript(talk)),
            Section("Scores", [ScoreTable(lines)]),
            Section(
                "More conversations",
                [
                    Picture(
                        pictures.conversations,
                        "A column each: a digit is drawn, and changed twice, into the third and the sixth after it. "
                        "None were picked.",
                        "Digits that were drawn, over what they were changed into",
                    )
                ],
            ),
            Section(
                "Drawings",
                [Picture(pictures.drawings, "A column per class.", "Drawn digits, a column for each of 0 to 9")],
            ),
            Section(
                "Edits",
                [
                    Picture(
                        pictures.edits,
                        "Above: held-out digits. Below: what they were changed into; the hand stays.",
                        "Held-out digits over their edits",
                    )
                ],
            ),
            Section("Training curves", [charts]),
            Section("Go on", [Commands(_next_commands(path.parent))]),
            Section("Where these numbers come from", [Facts(_facts(protocol))]),
        ],
    )


def _transcript(talk: Sequence[Message]) -> list[Block]:
    blocks: list[Block] = []
    for message in talk:
        if message.text is not None:
            blocks.append(Paragraph(f"{message.role}: {message.text}"))
        if message.image is not None:
            blocks.append(Picture(message.image, message.role, f"an image of the {message.role}", scale=4))
    return blocks


def _next_commands(out: Path) -> list[str]:
    generator = quote(str(out / "generator"))
    return [
        "# Sixteen sevens",
        f'vistok sample {generator} --prompt "draw a seven" --num 16 --out sevens/',
        "",
        "# What an image shows, in a word",
        f"vistok caption {generator} sevens/000000.png",
        "",
        "# A conversation, in Python",
        f'python -c \'import vistok; chat = vistok.pipeline("{out / "generator"}").chat(); '
        'chat("draw a seven"); chat("now a three").image.save("three.png")\'',
    ]


def _facts(protocol: Mapping[str, Any]) -> dict[str, str]:
    return {
        "Data": f"{protocol['training_digits']:,} training and {protocol['held_out_digits']:,} held-out images of "
        f"{protocol['data']}",
        "Classifiers": protocol["classifiers"],
        "Judged": f"{protocol['drawings']:,} drawings, {protocol['captions']:,} captions, {protocol['edits']:,} edits "
        f"of held-out digits, {protocol['turns']:,} changes of drawings",
        "Copies": protocol["copies"],
        **environment_facts(protocol),
    }

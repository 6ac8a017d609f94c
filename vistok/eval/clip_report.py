"""The report page of a benchmark of clips: scores, animations, frames, and how to repeat it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vistok.data.movies import contact_sheet, gif_bytes, side_by_side
from vistok.eval.report import repeat_blocks, score_blocks, setting_text, sweep_sections
from vistok.utils.report import REPORT_FILE, Animation, Block, Notes, Picture, Section
from vistok.utils.report import write_report as write_page

PLAYED, SHEETS = 16, 4
WIDTH = 640  # CSS pixels


def write_clip_report(
    result: Mapping[str, Any], previews: Sequence[Sequence[Image.Image]], num_frames: int, folder: str | Path
) -> Path:
    """Write ``report.html`` for the ``result`` of a benchmark of clips.

    Args:
        previews: for every run some clips, each as a picture with all frames below one another.
        num_frames: frames of a clip.
    """
    runs, plan = result["runs"], result["benchmark"]
    notes = list(dict.fromkeys(note for run in runs for note in run["warnings"]))
    sections = [Section("Scores", list(score_blocks(runs))), *(sweep_sections(runs) if len(runs) > 1 else ())]
    if notes:
        sections.append(Section("Before you compare", [Notes(notes)]))
    for run, columns in zip(runs, previews):
        clips = [np.asarray(column).reshape(num_frames, -1, column.width, 3) for column in columns[:PLAYED]]
        sections.append(Section(f"Clips, {setting_text(run)}", list(_clips(clips))))
    recorded = {"plan": plan} | {name: runs[0][name] for name in ("reference", "network", "versions")}
    sections.append(Section("How to repeat it", list(repeat_blocks(result, recorded, "clips"))))
    path = Path(folder) / REPORT_FILE
    write_page(
        path,
        title="Generation benchmark",
        kicker=f"protocol {result['protocol']}",
        lead=(
            f"{plan['num_images']:,} clips per setting, from {plan['labels']}, seed {plan['seed']}, against "
            f"{runs[0]['reference']['source']}."
        ),
        sections=sections,
    )
    return path


def _clips(clips: Sequence[np.ndarray]) -> list[Block]:
    movie, sheet = side_by_side(clips), contact_sheet(clips[:SHEETS])
    played, still = f"The first {len(clips)} clips.", f"The first {min(len(clips), SHEETS)}, frame by frame."
    return [
        Animation(gif_bytes(movie), min(WIDTH, 4 * movie.shape[2]), played, "Generated clips that play"),
        Picture(sheet, still, "Frames of generated clips in rows", WIDTH / sheet.width),
    ]

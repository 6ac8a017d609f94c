"""Model cards: what a pipeline on the hub is, how to load it, its licence, its scores, and how it was trained."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from vistok.checkpoints import registry
from vistok.eval.record import RESULT_FILE
from vistok.eval.report import best_run
from vistok.pipelines.display import describe, describe_tokens
from vistok.pipelines.runs import RUN_CONFIG
from vistok.utils.files import read_json

if TYPE_CHECKING:
    from huggingface_hub import ModelCard

    from vistok.pipelines.generation import Pipeline

TEMPLATE = Path(__file__).with_name("card.md")
CARD = "README.md"
SHOWN_CLASSES = 40
WITHOUT_LICENCE = "No licence was given by who uploaded it; ask before you use it."


def model_card(
    pipe: Pipeline,
    repo_id: str,
    *,
    licence: str | None = None,
    scores: Mapping[str, float] | str | Path | None = None,
    run: str | Path | None = None,
) -> ModelCard:
    """The model card of a pipeline.

    Args:
        licence: of the weights, by its short name on the hub, such as "apache-2.0".
        scores: values by name; or a benchmark's folder or result.json, of which the setting with the lowest distance
            counts.
        run: the training run whose config.yaml the card quotes.

    Raises:
        FileNotFoundError: the folder ``run`` has no config.yaml, or the folder ``scores`` no result.json.
        ValueError: the result.json holds no scores.
    """
    from huggingface_hub import ModelCard, ModelCardData

    names = [pipe.tokenizer.registry_name, pipe.generator.registry_name]
    entries = [registry.entry(name) for name in names]
    values, scored_by = _scores(scores)
    data = ModelCardData(
        license=licence,
        library_name="vistok",
        pipeline_tag=_task(pipe),
        tags=["vistok", "autoregressive-image-generation", *names],
    )
    classes = [name.split(",")[0] for name in pipe.class_names]
    shown = ", ".join(classes[:SHOWN_CLASSES]) + (f", … ({len(classes):,})" if len(classes) > SHOWN_CLASSES else "")
    return ModelCard.from_template(
        data,
        template_str=TEMPLATE.read_text(encoding="utf-8"),
        name=repo_id.rpartition("/")[2],
        repo_id=repo_id,
        summary=f"An autoregressive generator of {describe_tokens(pipe.tokenizer.spec)}, with the tokenizer that makes "
        "them and turns them into pictures.",
        description=describe(pipe),
        call=_call(pipe),
        parts=[(entry.kind, entry.name, entry.paper) for entry in entries],
        classes=shown,
        scores=[(name, f"{value:.4g}") for name, value in values.items()],
        scored_by=scored_by,
        licence=WITHOUT_LICENCE if licence is None else f"The weights are under {licence}.",
        training=_training(run),
    )


def push_to_hub(pipe: Pipeline, repo_id: str, card: ModelCard, *, private: bool, token: str | None) -> str:
    """Upload a pipeline with its card as one commit; returns the address."""
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    with TemporaryDirectory(prefix="vistok-") as folder:
        pipe.save_pretrained(Path(folder) / "pipeline")
        card.save(Path(folder) / "pipeline" / CARD)
        api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo_id, folder_path=Path(folder) / "pipeline", commit_message="Upload a pipeline")
    return f"https://huggingface.co/{repo_id}"


def _task(pipe: Pipeline) -> str | None:
    """The pipeline tag of the hub; None for clips without texts, for which it has no tag."""
    of_clips = len(pipe.tokenizer.input_shape) == 4
    if pipe.text.parts:
        return "text-to-video" if of_clips else "text-to-image"
    return None if of_clips else "unconditional-image-generation"


def _call(pipe: Pipeline) -> str:
    made = "videos" if len(pipe.tokenizer.input_shape) == 4 else "images"
    if pipe.text.parts:
        what = 'prompt="…"'
    elif pipe.class_names:
        what = f"[{pipe.class_names[0].split(',')[0]!r}]"
    else:
        what = "[0]" if pipe.generator.condition_spec.num_classes else "num_images=4"
    return f"{made} = pipe({what}, seed=0).{made}"


def _scores(scores: Mapping[str, float] | str | Path | None) -> tuple[Mapping[str, float], str]:
    """Scores by name, and how they were measured."""
    if scores is None or isinstance(scores, Mapping):
        return scores or {}, "As given by who uploaded it."
    path = Path(scores)
    path = path / RESULT_FILE if path.is_dir() else path
    result = read_json(path)
    runs = result.get("runs", [result]) if isinstance(result, dict) else []
    if not isinstance(runs, list) or not runs or not all(isinstance(run, dict) and _is_scored(run) for run in runs):
        raise ValueError(f"{path} holds no scores of vistok benchmark or vistok eval")
    found = best_run(runs)
    best = runs[0 if found is None else found[0]]
    settings = {name: best[name] for name in ("guidance_scale", "temperature") if best.get(name) is not None}
    how = ", ".join(f"{name} {json.dumps(value)}" for name, value in settings.items())
    count, against = (best.get(side, {}).get(fact) for side, fact in (("images", "count"), ("reference", "source")))
    number = f"{count:,} images" if count else "images"
    values = {name: value for name, value in best["scores"].items() if value is not None}
    return values, f"Protocol {result.get('protocol', 'unknown')}, {number}" + (
        f" against {against}" if against else ""
    ) + (f", {how}." if how else ".")


def _is_scored(run: Mapping[str, Any]) -> bool:
    """Whether a run of a result has finite numbers by name, and tells of both sides as results do."""
    scores, sides = run.get("scores"), [run.get(name, {}) for name in ("images", "reference")]
    return (
        isinstance(scores, dict)
        and all(type(value) in (int, float) and math.isfinite(value) for value in scores.values() if value is not None)
        and all(isinstance(side, dict) for side in sides)
        and isinstance(sides[0].get("count", 0), int | None)
    )


def _training(run: str | Path | None) -> str:
    if run is None:
        return ""
    file = Path(run) / RUN_CONFIG
    if not file.is_file():
        raise FileNotFoundError(f"{run} is no training run: it has no {RUN_CONFIG}")
    return file.read_text(encoding="utf-8").rstrip()

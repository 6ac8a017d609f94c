"""Pipelines by name: saved ones, runs, checkpoints of runs, and a tokenizer and a generator from wherever they come."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from vistok.checkpoints import OfficialCheckpoint
from vistok.checkpoints.model import find_official
from vistok.checkpoints.weights import STATE
from vistok.pipelines.folders import home_of, load_generator, load_tokenizer, read_settings
from vistok.pipelines.generation import NO_TEXT, Pipeline
from vistok.text import TEXT, PromptEncoder
from vistok.utils.devices import choose_device, choose_dtype
from vistok.utils.paths import local


def pipeline(
    source: str | Path,
    generator: str | Path | None = None,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
) -> Pipeline:
    """Load a pipeline; or put one together: ``vistok.pipeline(tokenizer, generator)``.

    Args:
        source: a pipeline's folder or hub id, a generator's run or one of its checkpoints (RUN/checkpoints/step-N), or
            the id of an official generator, whose tokenizer is fetched with it. With ``generator``: a tokenizer, as
            ``vistok.load`` takes it.
        generator: the same of a generator.
        device: None takes a GPU if there is one.
        dtype: of all weights and computation, as torch has it or "fp32", "bf16" or "fp16"; None keeps that of the
            saved weights.

    Raises:
        CheckpointError: nothing there, no whole pipeline, or damaged weights.
        ValueError: parts that do not fit each other, an unknown dtype, or a device that is not there.
    """
    source = local(source)
    if generator is not None:
        return assemble(source, generator).to(choose_device(device), choose_dtype(dtype))
    official = _official(source)
    tokenizer = (
        home_of(source) if (Path(source) / STATE).is_file() else None if official is None else official.tokenizer
    )
    if tokenizer is None:
        return Pipeline.from_pretrained(source, device=device, dtype=dtype)
    return assemble(tokenizer, source).to(choose_device(device), choose_dtype(dtype))


def _official(source: str | Path) -> OfficialCheckpoint | None:
    """The released file of that id; None if there is none."""
    official = None if Path(source).exists() else find_official(str(source))
    return None if official is None else official[1]


def assemble(
    tokenizer: str | Path,
    generator: str | Path,
    *,
    class_names: Sequence[str] | None = None,
    sampling: Mapping[str, Any] | None = None,
    text: PromptEncoder | None = None,
) -> Pipeline:
    """A pipeline of two parts, each a saved or converted model, a run, a checkpoint of a run, or a hub id.

    Class names, sampling options and text encoders are those of the generator's run, if it is one; a released
    generator of text features has the text encoder that its authors used, which the first prompt opens.

    Args:
        class_names: in place of the generator's.
        sampling: default options that differ from the generator's.
        text: what turns prompts into conditions, in place of the generator's.

    Raises:
        CheckpointError: nothing there, damaged weights, or another kind of model.
        ValueError: the generator models other tokens than the tokenizer's, or ``text`` makes what it does not take.
    """
    tokenizer, generator = local(tokenizer), local(generator)
    home = home_of(generator)
    settings = read_settings(home) if home is not None else {"class_names": (), "sampling": {}}
    if class_names is not None:
        settings["class_names"] = tuple(class_names)
    settings["sampling"] = settings["sampling"] | dict(sampling or {})
    model, official = load_generator(generator), _official(generator)
    if text is None:
        text = PromptEncoder.load(home / TEXT) if home is not None else NO_TEXT
        features = model.condition_spec.features
        if official is not None and official.text_encoder is not None and features is not None:
            text = PromptEncoder.named(*official.text_encoder, features.length)
    return Pipeline(load_tokenizer(tokenizer), model, **settings, text=text)

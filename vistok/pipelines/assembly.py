"""Opens pipelines: from a saved folder, a run, a checkpoint of a run, or a tokenizer and a generator given apart."""

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
from vistok.text import TEXT, PromptEncoder, open_text_encoder
from vistok.types import ConditionSpec
from vistok.utils.devices import choose_device, choose_dtype
from vistok.utils.paths import local


def pipeline(
    source: str | Path,
    generator: str | Path | None = None,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
) -> Pipeline:
    """Load a pipeline, or combine a tokenizer and a generator: ``vistok.pipeline(tokenizer, generator)``.

    Args:
        source: a pipeline's folder or hub id, a generator's run or one of its checkpoints (RUN/checkpoints/step-N), or
            the id of an official generator, whose tokenizer is fetched with it. With ``generator``: a tokenizer, as
            ``vistok.load`` takes it.
        generator: a generator, as ``vistok.load`` takes it.
        device: None takes a GPU if there is one.
        dtype: of all weights and computation: a ``torch.dtype``, "fp32", "bf16" or "fp16"; None keeps that of the
            saved weights.

    Raises:
        CheckpointError: nothing is found, the pipeline is incomplete, or weights are damaged.
        ValueError: the parts do not fit each other, the dtype is unknown, or the device is not available.
    """
    source = local(source)
    if generator is not None:
        return assemble(source, generator).to(choose_device(device), choose_dtype(dtype))
    if (Path(source) / STATE).is_file():
        tokenizer: str | Path | None = home_of(source)
    else:
        official = _official(source)
        tokenizer = None if official is None else official.tokenizer
    if tokenizer is None:
        return Pipeline.from_pretrained(source, device=device, dtype=dtype)
    return assemble(tokenizer, source).to(choose_device(device), choose_dtype(dtype))


def _official(source: str | Path) -> OfficialCheckpoint | None:
    """The official checkpoint with the id ``source``; None if there is none."""
    official = None if Path(source).exists() else find_official(str(source))
    return None if official is None else official[1]


def assemble(
    tokenizer: str | Path,
    generator: str | Path,
    *,
    class_names: Sequence[str] | None = None,
    sampling: Mapping[str, Any] | None = None,
    text_encoder: str | None = None,
    clean_texts: bool = False,
) -> Pipeline:
    """Combine a tokenizer and a generator, each a saved or converted model, a run, a checkpoint of a run, or a hub id.

    If the generator belongs to a run, the run's class names, sampling options and text encoders are used. An official
    generator of text features gets the text encoder that its authors used; the first prompt loads that encoder.

    Args:
        class_names: names that replace the generator's.
        sampling: default options that differ from the generator's.
        text_encoder: Hugging Face folder or name of the text encoder, for a generator of text features that records
            none.
        clean_texts: clean prompts before they are encoded, as LlamaGen does; needs ``text_encoder``.

    Raises:
        CheckpointError: nothing is found, weights are damaged, or a part is another kind of model.
        ValueError: the generator models other tokens than the tokenizer makes; it takes no text features, takes other
            features than the text encoder makes, or was trained with another encoder; or ``clean_texts`` lacks a
            ``text_encoder``.
    """
    tokenizer, generator = local(tokenizer), local(generator)
    home = home_of(generator)
    settings = read_settings(home) if home is not None else {"class_names": (), "sampling": {}}
    if class_names is not None:
        settings["class_names"] = tuple(class_names)
    settings["sampling"] = settings["sampling"] | dict(sampling or {})
    codec, model, official = load_tokenizer(tokenizer), load_generator(generator), _official(generator)
    text, features = PromptEncoder.load(home / TEXT) if home is not None else NO_TEXT, model.condition_spec.features
    if official is not None and official.text_encoder is not None and features is not None:
        text = PromptEncoder.named(*official.text_encoder, features.length)
    if text_encoder is not None:
        text = _read_by(text_encoder, clean_texts, model.condition_spec, text)
    elif clean_texts:
        raise ValueError("texts are cleaned for a text encoder: name it, too")
    return Pipeline(codec, model, **settings, text=text)


def _read_by(name: str, clean: bool, spec: ConditionSpec, trained: PromptEncoder) -> PromptEncoder:
    """Open the text encoder ``name`` and check it against ``spec`` and the encoders that the generator records."""
    if spec.features is None:
        raise ValueError(f"this generator takes {spec.describe()}, not the features of a text encoder")
    prompts = PromptEncoder([open_text_encoder(name, spec.features.length, clean=clean)])
    if prompts.spec.features != spec.features:
        raise ValueError(f"this generator takes {spec.describe()}, and {name} makes {prompts.spec.describe()}")
    own = prompts.identities["features"]
    known = trained.identities.get("features", own)
    if any(known[key] not in (None, own[key]) for key in ("kind", "hash")):
        raise ValueError(
            f"the generator was trained with features of {known['name']} ({known['kind']}), not of {name} "
            f"({own['kind']}): leave the text encoder out"
        )
    return prompts

"""The last stages of the quickstart of clips: samples, predictions, scores, report."""

from __future__ import annotations

from typing import cast

import torch

from vistok.pipelines import Pipeline
from vistok.quickstart.chain import Chain, Outcome
from vistok.quickstart.clip_scores import (
    COPIES_OF_CLIPS,
    Clips,
    fit_frame_classifier,
    load_clips,
    score_clips,
)
from vistok.quickstart.clip_story import curves, draw, score_lines, write_story
from vistok.quickstart.console import Stages
from vistok.quickstart.scores import CLASSES

PREDICTED = 100
"""Most held-out clips whose frames are predicted."""


def present(chain: Chain, stages: Stages) -> Outcome:
    """Sample, predict, score and write the report."""
    recipe, pipe, given = chain.recipe, chain.pipe, chain.system.given_frames
    each = max(recipe.samples_per_class // 5, 1)
    train, test = (load_clips(chain.split(name)) for name in ("train", "test"))

    stages.begin("samples", f"{each} clips of each class, and predictions of held-out clips")
    samples = pipe(list(range(CLASSES)), num_images_per_label=each, seed=recipe.seed, batch_size=128)
    generated = Clips(samples.pixels, torch.arange(CLASSES).repeat_interleave(each))
    asked = spread(test, PREDICTED)
    predicted = cast(Pipeline, chain.predictor)(
        frames=asked.pixels[:, :, :given], seed=recipe.seed, batch_size=128
    ).pixels

    stages.begin("scores", "by a classifier that is fitted to real frames now")
    scores = score_clips(
        generated,
        samples.tokens,
        (asked.pixels, predicted),
        given=given,
        classifier=fit_frame_classifier(train, steps=recipe.classifier_steps, seed=recipe.seed),
        tokenizer=pipe.tokenizer,
        cache=chain.cache,
        train=train,
        test=test,
    )

    stages.begin("report", "clips that play, pictures and curves")
    pictures = draw(generated, predicted, asked.pixels, train, tokenizer=pipe.tokenizer, given=given)
    pictures.save(chain.out)
    length = pipe.tokenizer.input_shape[1]
    protocol = {
        "data": f"scikit-learn's digits, 8x8, moving in frames of {chain.data.image_size} px; the last fifth of each "
        "class is held out",
        "classifier": "a small convolutional network, fitted to frames of real training clips only",
        "training_clips": len(train),
        "held_out_clips": len(test),
        "generated_clips": len(generated),
        "predicted_clips": len(predicted),
        "frames": length,
        "given_frames": given,
        "copies": COPIES_OF_CLIPS,
        **chain.facts,
    }
    spec = pipe.tokenizer.spec
    seconds = chain.seconds
    lines = score_lines(scores, seconds, chain.system, spec=spec, num_frames=length)
    write_story(
        chain.report,
        pictures,
        lines,
        curves=curves([chain.out / name for name in ("tokenizer", "generator", "predictor")]),
        system=chain.system,
        tokenizer=pipe.tokenizer,
        protocol=protocol,
    )
    return Outcome(scores, seconds, protocol, lines)


def spread(clips: Clips, count: int) -> Clips:
    """At most ``count`` clips, evenly spread, because the clips are sorted by class."""
    chosen = torch.arange(min(count, len(clips))) * len(clips) // min(count, len(clips))
    return Clips(clips.pixels[chosen], clips.labels[chosen])

"""The last stages of the quickstart of images: samples, scores, report."""

from __future__ import annotations

from typing import Any

import torch

from vistok.data.captions import spell_digit
from vistok.quickstart.chain import Chain, Outcome
from vistok.quickstart.console import Stages
from vistok.quickstart.scores import (
    CLASSES,
    COPIES_OF_IDS,
    COPIES_OF_LATENTS,
    Digits,
    equal_counts,
    fit_classifier,
    load_digits,
    score,
)
from vistok.quickstart.story import curves, draw, score_lines, write_story


def present(chain: Chain, stages: Stages) -> Outcome:
    """Sample, score and write the report."""
    recipe, pipe = chain.recipe, chain.pipe
    stages.begin("samples", f"{recipe.samples_per_class} digits of each class")
    what: dict[str, Any] = {"class_labels": list(range(CLASSES))}
    if chain.system.text_length:
        what = {"prompt": [spell_digit(digit)[0] for digit in range(CLASSES)]}
    samples = pipe(**what, num_images_per_label=recipe.samples_per_class, seed=recipe.seed, batch_size=250)
    generated = Digits(samples.pixels, torch.arange(CLASSES).repeat_interleave(recipe.samples_per_class))

    stages.begin("scores", "by a classifier that is fitted to real digits now")
    real, held_out = load_digits("train"), load_digits("test")
    scores = score(
        generated,
        samples.tokens,
        classifier=fit_classifier(real, steps=recipe.classifier_steps, seed=recipe.seed),
        tokenizer=pipe.tokenizer,
        cache=chain.cache,
        train=real,
        test=held_out,
    )

    stages.begin("report", "pictures and curves")
    pictures = draw(generated, real, held_out, tokenizer=pipe.tokenizer)
    pictures.save(chain.out)
    protocol = {
        "data": "scikit-learn's digits, 8x8 resized to 32x32; the last fifth of each class is held out",
        "classifier": "a small convolutional network, fitted to augmented real training digits only",
        "training_digits": len(real),
        "held_out_digits": len(held_out),
        "generated_digits": len(generated),
        "frechet_digits": int(equal_counts(generated, held_out).sum()),
        "copies": COPIES_OF_IDS if pipe.tokenizer.spec.discrete else COPIES_OF_LATENTS,
        **chain.facts,
    }
    spec = pipe.tokenizer.spec
    seconds = chain.seconds
    lines = score_lines(scores, seconds, chain.system, spec=spec)
    write_story(
        chain.report,
        pictures,
        lines,
        curves=curves((chain.out / "tokenizer", chain.out / "generator"), spec),
        system=chain.system,
        spec=spec,
        protocol=protocol,
    )
    return Outcome(scores, seconds, protocol, lines)

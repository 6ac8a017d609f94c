"""The last stages of the quickstart of a conversational model: conversations, scores, report."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import cast

import torch
from torch import Tensor

from vistok.data.tokens import TokenCache
from vistok.draws import Keys
from vistok.pipelines import Message, Pipeline
from vistok.quickstart.chain import Chain, Outcome
from vistok.quickstart.console import Stages
from vistok.quickstart.scores import (
    CLASSES,
    COPIES_OF_LATENTS,
    DigitClassifier,
    cached_tokens,
    encode,
    fit_classifier,
    reconstruction_psnr,
    repeated_latents,
    round_trip_error,
)
from vistok.quickstart.styled import STYLE_NAMES, StyledDigits, draw_request, edit_request, load_styled, word
from vistok.quickstart.talk_story import curves, draw, score_lines, write_story
from vistok.types import Condition

TURNS = 3
"""Images in each conversation of the report."""


@dataclass(frozen=True)
class TalkScores:
    """Scores of a conversational model: shares in [0, 1], and ``psnr``.

    Two small classifiers of class and style, trained on real digits only, judge the images.

    Attributes:
        drawings: drawn digits ("draw a seven") that are recognised as the digit asked for.
        captions: held-out digits that are named right ("seven").
        edits: edits of held-out digits ("now a three") that are recognised as the digit asked for.
        edits_kept: the same edits, recognised or not, that keep the style of the held-out digit.
        turns, turns_kept: the same for edits of digits that the model drew in the turn before.
        recognised_real, style_real: held-out digits whose class and style are classified correctly.
        copies: drawings and edits whose latents equal those of a training digit; see ``COPIES_OF_LATENTS``.
        distinct: drawings and edits whose latents equal no earlier ones.
        psnr: of the tokenizer on held-out digits in dB, mean over images.
    """

    drawings: float
    captions: float
    edits: float
    edits_kept: float
    turns: float
    turns_kept: float
    recognised_real: float
    style_real: float
    copies: float
    distinct: float
    psnr: float


def present(chain: Chain, stages: Stages) -> Outcome:
    """Generate drawings, captions and edits, score them, and write the report."""
    recipe, pipe = chain.recipe, chain.pipe
    stages.begin("samples", "drawings, captions and edits")
    real, held_out = load_styled("train"), load_styled("test")
    judged = Judged.of(pipe, held_out, count=CLASSES * recipe.samples_per_class, seed=recipe.seed)

    stages.begin("scores", "by classifiers that are fitted to real digits now")
    fit = {"steps": recipe.classifier_steps, "seed": recipe.seed}
    digits = fit_classifier(real, **fit)
    styles = fit_classifier(real.by_style(), classes=len(STYLE_NAMES), **fit)
    scores = score(judged, digits, styles, pipe=pipe, cache=chain.cache, held_out=held_out)

    stages.begin("report", "conversations, pictures and curves")
    talks = [talk(pipe, first, seed=recipe.seed) for first in range(CLASSES)]
    pictures = draw(judged, talks)
    pictures.save(chain.out)
    protocol = {
        "data": "scikit-learn's digits, 8x8 resized to 32x32, as they are, slanted, thin and bold; the last fifth of "
        "each class is held out",
        "classifiers": "two small convolutional networks, of classes and of styles, fitted to augmented real training "
        "digits only",
        "training_digits": len(real),
        "held_out_digits": len(held_out),
        "drawings": len(judged.drawn),
        "captions": len(held_out),
        "edits": len(judged.edited),
        "turns": len(judged.turned),
        "copies": COPIES_OF_LATENTS,
        **chain.facts,
    }
    seconds = chain.seconds
    lines = score_lines(asdict(scores), seconds, chain.system)
    charts = curves((chain.out / "tokenizer", chain.out / "generator"))
    write_story(chain.report, pictures, lines, talks[7], charts=charts, system=chain.system, protocol=protocol)
    return Outcome(scores, seconds, protocol, lines)


@dataclass(frozen=True)
class Judged:
    """The outputs of a model that are scored.

    Attributes:
        drawn, wanted: pixels (N, 1, 32, 32) of drawings, and the digits asked for, (N,).
        turned, wanted_next: edits of these drawings in the next turn, and the digits asked for.
        shown, edited, wanted_edit: held-out digits, their edits, and the digits asked for.
        said: the caption of every held-out digit.
        latents: (M, L, D), of all drawings and edits.
    """

    drawn: Tensor
    wanted: Tensor
    turned: Tensor
    wanted_next: Tensor
    shown: StyledDigits
    edited: Tensor
    wanted_edit: Tensor
    said: list[str]
    latents: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, pipe: Pipeline, held_out: StyledDigits, *, count: int, seed: int) -> Judged:
        """Generate ``count`` drawings, each edited in a second turn; ``count`` edits of held-out digits; all captions.

        Drawings are spread evenly over the classes, and edits over the held-out digits.
        """
        wanted = torch.arange(count) * CLASSES // count
        steps = 1 + torch.arange(count) % (CLASSES - 1)
        following = (wanted + steps) % CLASSES
        first, second = _two_turns(pipe, wanted, following, seed)
        rows = torch.arange(count) * len(held_out) // count
        shown = held_out.at(rows)
        changed = (shown.labels + steps) % CLASSES
        given = Condition.from_given(encode(pipe.tokenizer, shown.pixels))
        condition = Condition.together(pipe.text.condition([edit_request(d) for d in changed.tolist()]), given)
        edits = pipe(condition=condition, seed=seed + 1, batch_size=250)
        pixels = [pipe.decode(tokens, Keys.range(seed, count)) for tokens in (first, second)]
        latents = torch.cat([first.cpu(), second.cpu(), edits.tokens])
        said = cast(list[str], pipe.caption(held_out.pixels, max_tokens=8, batch_size=250))  # of a batch
        return cls(pixels[0], wanted, pixels[1], following, shown, edits.pixels, changed, said, latents)


def _two_turns(pipe: Pipeline, wanted: Tensor, following: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """The latents of drawings, and of their edits into another digit."""
    options, images = pipe.options(), []
    session = pipe.generator.converse(len(wanted), options, tokenizer=pipe.in_loop)
    for turn, (digits, request) in enumerate(((wanted, draw_request), (following, edit_request))):
        session.ask(pipe.text.condition([request(digit) for digit in digits.tolist()]))
        keys = Keys.range(seed, len(wanted), turn * len(wanted))
        images.append(session.draw(options, pipe.generator.sampling_draws(keys, options)))
    return images[0], images[1]


def talk(pipe: Pipeline, first: int, seed: int) -> list[Message]:
    """A conversation: a digit is drawn and changed twice, and a new chat reads the last image."""
    chat = pipe.chat(seed=seed + first)
    chat(draw_request(first), reply="image")
    for step in range(1, TURNS):
        chat(edit_request((first + 3 * step) % CLASSES), reply="image")
    image = chat.messages[-1].image
    reading = pipe.chat(seed=seed)
    reading(image=image, reply="text")
    return chat.messages + reading.messages


def score(
    judged: Judged,
    digits: DigitClassifier,
    styles: DigitClassifier,
    *,
    pipe: Pipeline,
    cache: TokenCache,
    held_out: StyledDigits,
) -> TalkScores:
    """Score the outputs of a model.

    Args:
        digits, styles: classifiers of classes and of styles.
        cache: the generator's training tokens.
        held_out: the digits that were captioned.
    """

    def recognised(pixels: Tensor, wanted: Tensor) -> float:
        return float((digits.predict(pixels) == wanted).float().mean())

    def kept(pixels: Tensor, before: Tensor) -> float:
        return float((styles.predict(pixels) == before).float().mean())

    named = [said == word(digit) for said, digit in zip(judged.said, held_out.labels.tolist(), strict=True)]
    known = torch.cat([encode(pipe.tokenizer, load_styled("train").pixels), cached_tokens(cache)])
    repeats = repeated_latents(judged.latents, known, tolerance=round_trip_error(pipe.tokenizer, held_out.pixels))
    return TalkScores(
        drawings=recognised(judged.drawn, judged.wanted),
        captions=sum(named) / len(named),
        edits=recognised(judged.edited, judged.wanted_edit),
        edits_kept=kept(judged.edited, judged.shown.styles),
        turns=recognised(judged.turned, judged.wanted_next),
        turns_kept=kept(judged.turned, styles.predict(judged.drawn)),
        recognised_real=digits.accuracy(held_out),
        style_real=styles.accuracy(held_out.by_style()),
        copies=repeats.copies,
        distinct=repeats.distinct,
        psnr=reconstruction_psnr(pipe.tokenizer, held_out.pixels),
    )

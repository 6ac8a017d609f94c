"""Sampling of Ming-UniVision: a session that generates latents and texts in one context."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vistok.draws import Draws
from vistok.generators.ming_univision.context import ALWAYS, IMAGE, KINDS, TEXT, Context, MingLike, Prompt
from vistok.guidance import OFF, PLAIN, ChannelNorm, Guidance, constant
from vistok.types import Condition, Expander, Expands, TokenChunk
from vistok.utils.finite import FirstFailure, check_finite
from vistok.utils.steps import check_steps


@dataclass(frozen=True)
class MingOptions:
    """How images are sampled.

    With the velocities v_all of the whole condition, v_image of the image without the text, and v_none of neither, the
    guided velocity is

        v_none + image_guidance_scale (v_image - v_none) + guidance_scale (v_all - v_image)

    Without an earlier image, it is v_none + guidance_scale (v_all - v_none). The released code always uses the scales
    3 and 1.1.

    Attributes:
        guidance_scale: of the text. Guidance is off if it is 1 and, with an earlier image, image_guidance_scale is 1.
        image_guidance_scale: of an earlier image.
        combination: "sum", or "channel_norm", which scales a velocity down that is longer than v_all (``ChannelNorm``).
        num_steps: network calls of the head per token.
        temperature: factor of the noise that a token starts from.
        time_shift: values above 1 spend more of the steps near the noise.

    Raises:
        ValueError: a value out of its range.
    """

    guidance_scale: float = 3.0
    image_guidance_scale: float = 1.1
    combination: Literal["sum", "channel_norm"] = "sum"
    num_steps: int = 16
    temperature: float = 1.0
    time_shift: float = 1.0

    def __post_init__(self) -> None:
        for name in ("guidance_scale", "image_guidance_scale", "temperature"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be finite and not negative, got {getattr(self, name)}")
        if not 0 < self.time_shift < math.inf:
            raise ValueError(f"time_shift must be finite and positive, got {self.time_shift}")
        if self.combination not in ("sum", "channel_norm"):
            raise ValueError(f"combination must be 'sum' or 'channel_norm', got {self.combination!r}")
        check_steps("num_steps", self.num_steps)

    def guidance(self, *, has_image: bool) -> Guidance:
        """The rows and their scales, with or without an earlier image."""
        combination = PLAIN if self.combination == "sum" else ChannelNorm()
        text, image = constant(self.guidance_scale), constant(self.image_guidance_scale)
        wish = ("labels", "ids")
        nothing = (*wish, "given")
        if has_image and not self.guidance_scale == self.image_guidance_scale == 1:
            return Guidance(((), wish, nothing), (text, image), combination)
        return OFF if self.guidance_scale == 1 or has_image else Guidance(((), nothing), (text,), combination)


class MingSession:
    """One cached context for a batch of conversations: user turns and replies, which are images or texts.

    Args:
        rows: sequences of the batch.
        options: of images, until ``draw`` gets others.
        length: the initial capacity of the cache in entries.

    Attributes:
        context: all entries so far.
        hidden: (R * B, D), the hidden state that predicts the next latent or id.
        tokens: (B, n, C), latents of the last image so far.
    """

    @torch.no_grad()
    def __init__(self, model: MingLike, rows: int, options: MingOptions, tokenizer: Expands, *, length: int):
        self.model, self.options, self._tokenizer = model, options, tokenizer
        self.context, self.guidance = Context(model, rows, length), OFF
        self.tokens = model.output.weight.new_zeros(rows, 0, model.spec.dim)
        self._length = 0  # latents of the current or last image
        self._read = 0  # its latents that were fed
        self._image_stop = -1  # entries of the context up to the end of its last image
        self._reply = -1  # entries of the context before the model's last reply

    # -----------------------------------------------------------------------------------------------------------------
    # Turns

    @torch.no_grad()
    def ask(self, condition: Condition) -> None:
        """Read another user turn.

        If the last entry is an image, its end mark is added first. Text of earlier turns is visible in all rows of
        guidance; ``image_guidance_scale`` applies to the replies of earlier turns, with their images.

        Raises:
            ValueError: a condition that the model does not take, another number of rows, an unfinished image, or no
                room.
        """
        self.model.check_condition(condition)
        self._check_rows(len(condition), "condition")
        self.read(self.model.prompt(condition.to(self.context.visible.device), self._tokenizer).trimmed())

    @torch.no_grad()
    def read(self, prompt: Prompt) -> None:
        """``ask`` with an embedded prompt."""
        context, model = self.context, self.model
        is_open = len(context) == self._image_stop  # the last entry is an image without its end mark
        context.check_room(prompt.embeddings.shape[1] + is_open)
        self.leave_image()
        if self._reply >= 0:
            context.kinds = torch.where(context.kinds == TEXT, ALWAYS, context.kinds)
            context.kinds[:, self._reply :] = IMAGE
        if is_open:
            context.read(model.embed_special(model.image_end, context.rows))
        if prompt.embeddings.shape[1]:
            self.hidden = context.read(prompt.embeddings, prompt.valid, prompt.kinds, prompt.images)[:, -1]
        self._reply = len(context)

    @torch.no_grad()
    def wants_image(self) -> Tensor:
        """(B,) bool, True where the model would begin an image next, not a text.

        Raises:
            ValueError: nothing was asked.
        """
        self._check_asked()
        return self.model.output(self.hidden).argmax(-1) == self.model.image_start

    def _check_rows(self, count: int, what: str) -> None:
        if count != self.context.rows:
            raise ValueError(f"the session has {self.context.rows} rows, the {what} {count}; take as many")

    def _check_asked(self) -> None:
        if not len(self.context):
            raise ValueError("nothing was asked yet, so there is nothing to reply to; ask first")

    @torch.no_grad()
    def begin_image(self, guidance: Guidance, noise: Tensor, hidden: list[Tensor] | None = None) -> None:
        """Branch the context for guidance and feed the mark that starts an image.

        Args:
            guidance: the rows.
            noise: (B, L, C) normal, the initial noise of each latent.
            hidden: for each row of guidance, the entries of the context that it hides, (B, n) bool; None derives them
                from their kinds.

        Raises:
            ValueError: no room for the image, noise of another shape, or guidance of a model without a null condition.
        """
        if guidance.is_on:
            self.model.check_null()
        model, context, weight = self.model, self.context, self.model.output.weight
        self._check_rows(len(noise), "noise")
        if noise.shape[1:] != (model.spec.length, model.spec.dim):
            raise ValueError(
                f"noise must be (B, {model.spec.length}, {model.spec.dim}), got {tuple(noise.shape)}; sampling_draws "
                "makes it"
            )
        context.check_room(1 + model.spec.length, f"entries of an image of {model.spec.length} tokens")
        self.guidance, self._noise = guidance, noise.to(weight)
        if hidden is None:
            hidden = [self._without(parts) for parts in guidance.rows]
        self._kept = context.visible
        context.branch(hidden)
        self._expander: Expander = self._tokenizer.expander()
        self.tokens, self._length = weight.new_zeros(context.rows, 0, model.spec.dim), model.spec.length
        self._read = 0
        self.hidden = context.read(model.embed_special(model.image_start, len(context.visible)))[:, -1]

    @property
    def has_image(self) -> bool:
        """Whether the context has an image that rows of guidance can hide."""
        return bool((self.context.kinds == IMAGE).any())

    @torch.no_grad()
    def draw(self, options: MingOptions, draws: Draws) -> Tensor:
        """Reply with an image: its latents (B, L, C), from the draws of the model's ``sampling_draws``.

        Raises:
            ValueError: nothing was asked, or no room for the image.
        """
        self._check_asked()
        noise = noise_of(draws)
        self.options = options
        self.begin_image(options.guidance(has_image=self.has_image), noise)
        for _ in self.generate():
            pass
        self.leave_image()
        return self.tokens

    @torch.no_grad()
    def append_image(self, tokens: Tensor) -> None:
        """Append given latents (B, L, C) as the model's reply.

        Raises:
            ValueError: nothing was asked, latents of another tokenizer or another number of them, or no room.
        """
        self._check_asked()
        spec = self.model.spec
        spec.check_latents(tokens)
        if tokens.shape[1] != spec.length:
            raise ValueError(f"an image of this model has {spec.length} latents, got {tokens.shape[1]}; resize it")
        self.begin_image(OFF, torch.zeros_like(tokens))
        self.append(tokens)
        self.leave_image()

    def _without(self, parts: tuple[str, ...]) -> Tensor:
        hidden = torch.zeros_like(self.context.visible)
        for part in parts:
            hidden = hidden | (self.context.kinds == KINDS[part])
        return hidden

    @torch.no_grad()
    def append(self, tokens: Tensor) -> None:
        """Set the next places to given latents (B, n, C) instead of drawing them.

        Raises:
            ValueError: latents of another tokenizer, another batch size, or more than places left.
        """
        self.model.spec.check_latents(tokens)
        self._check_rows(len(tokens), "tokens")
        if tokens.shape[1] > self.left:
            raise ValueError(f"{tokens.shape[1]} latents exceed the {self.left} places that are left in the image")
        self.tokens = torch.cat([self.tokens, tokens.to(self.tokens)], 1)

    @property
    def left(self) -> int:
        """The number of latents that are still to be drawn."""
        return self._length - self.tokens.shape[1]

    @torch.no_grad()
    def generate(self, num_tokens: int | None = None) -> Iterator[TokenChunk]:
        """Draw the next latents, one chunk for each place.

        Raises:
            ValueError: more than places left; latents that are not finite.
        """
        count = self.left if num_tokens is None else num_tokens
        if not 0 <= count <= self.left:
            raise ValueError(f"{count} latents were asked for, and the image has {self.left} places left")
        failure = FirstFailure("latents", self.model.embedding.weight.dtype)
        for _ in range(count):
            self.advance()
            place, options = self.tokens.shape[1], self.options
            latents = self.model.flow_head.sample(
                self.model.to_condition(self.hidden),
                self._noise[:, place] * options.temperature,
                self.guidance,
                num_steps=options.num_steps,
                time_shift=options.time_shift,
            )[:, None]
            self.tokens = torch.cat([self.tokens, latents], 1)
            places = torch.full((len(latents), 1), place, device=latents.device)
            failure.note(latents, places)
            yield TokenChunk(places, latents, torch.ones_like(places, dtype=torch.bool))
        failure.check()

    @torch.no_grad()
    def advance(self) -> None:
        """Feed the latents that were not fed yet."""
        new = self.tokens[:, self._read :]
        if new.shape[1]:
            features = self.model.projection(self._expander.step(new))
            kinds = torch.full(features.shape[:2], ALWAYS, device=features.device)
            self.hidden = self.context.read(self.guidance.repeat(features), kinds=self.guidance.repeat(kinds))[:, -1]
            self._read = self.tokens.shape[1]
            self._image_stop = self.context.visible.shape[1]

    # -----------------------------------------------------------------------------------------------------------------
    # After the image

    @torch.no_grad()
    def leave_image(self) -> None:
        """End guidance after an image: only the conditional row is kept. Does nothing if no image is begun.

        Raises:
            ValueError: the image is not finished.
        """
        if self.left:
            raise ValueError(f"the image lacks {self.left} of its {self._length} latents; generate them")
        self.advance()
        if self.guidance.is_on:
            self.hidden = self.hidden[: self.context.rows]
            self.context.join(self._kept)
            self.guidance = OFF

    @torch.no_grad()
    def finish(self) -> Tensor:
        """``leave_image``, and the logits (B, V) of the id after the image.

        Raises:
            ValueError: the image is not finished.
        """
        self.leave_image()
        return self.model.output(self.hidden).float()

    @torch.no_grad()
    def append_text(self, ids: Tensor) -> Tensor:
        """Append given ids (B, n) as the model's reply; return the logits (B, V) of the next id.

        Raises:
            ValueError: nothing was asked, ids that the model does not have, or no room.
        """
        self._check_asked()
        self.model.check_ids(ids)
        self._check_rows(len(ids), "ids")
        self.leave_image()
        self.hidden = self.context.read(self.model.embedding(ids))[:, -1]
        return self.model.output(self.hidden).float()

    @torch.no_grad()
    def write(self, max_tokens: int) -> Tensor:
        """Reply with a text by greedy decoding: ids (B, n), n <= max_tokens, padded with ``end``.

        Raises:
            ValueError: nothing was asked, an unfinished image, or no room.
        """
        self._check_asked()
        self.leave_image()
        ids, self.hidden = write_text(self.model, self.context, self.hidden, max_tokens)
        return ids


def noise_of(draws: Draws | None) -> Tensor:
    """The initial noise of an image, from its draws; ValueError if there is none."""
    if not draws or "noise" not in draws:
        raise ValueError("latents are drawn from noise: pass draws=sampling_draws(Keys.range(seed, B))")
    return draws["noise"]


@torch.no_grad()
def write_text(model: MingLike, context: Context, hidden: Tensor, max_tokens: int) -> tuple[Tensor, Tensor]:
    """Greedy ids (B, n) from the hidden state (B, D) that predicts the first, and the state after the last. Rows that
    have ended are padded with ``end``, which is hidden from later entries.

    Raises:
        ValueError: a model without an id that ends a text, or logits that are not finite.
    """
    if model.end is None:
        raise ValueError("this model has no mark that ends a text")
    ended = torch.zeros(len(hidden), dtype=torch.bool, device=hidden.device)
    ids = [torch.zeros(len(hidden), 0, dtype=torch.int64, device=hidden.device)]
    for _ in range(max_tokens):
        if bool(ended.all()):
            break
        logits = check_finite(model.output(hidden)[:, None], "logits", hidden.dtype)[:, 0]
        new = torch.where(ended, model.end, logits.argmax(-1))
        ids.append(new[:, None])
        hidden = context.read(model.embedding(new)[:, None], valid=~ended[:, None])[:, -1]
        ended = ended | (new == model.end)
    return torch.cat(ids, 1), hidden

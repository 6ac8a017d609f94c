"""Token-Shuffle with windows of one token as a joint model: it trains on streams, and writes texts and images.

Text ids, image ids and special tokens share one vocabulary already. This module adds the special tokens of streams, the
loss of streams, and text generation.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from vistok.data.streams import IMAGE_KIND, KINDS, TEXT_KIND, Streams
from vistok.generators.base import weighted_mean
from vistok.generators.engine.cache import CachedLayers, KVCache
from vistok.nn.attention import Mask
from vistok.nn.masks import visible_causal_mask
from vistok.nn.rotary import Positions
from vistok.types import Condition, GeneratorOutput, IdSpec, JointVocabulary, TokenSpec
from vistok.utils.finite import check_finite


class TokenShuffleLike(Protocol):
    """What this module needs of ``TokenShuffle``; see there."""

    spec: TokenSpec
    vocabulary: JointVocabulary
    text_weight: float
    condition_dropout: float
    text: IdSpec | None
    max_entries: int

    def embed_joint(self, ids: Tensor) -> Tensor: ...

    def transform(
        self, x: Tensor, positions: Positions, mask: Mask | None, kv_cache: CachedLayers | None, *state: Tensor
    ) -> Tensor: ...

    def head(self, hidden: Tensor) -> Tensor: ...

    def new_cache(self, rows: int, length: int, device: torch.device | str | None = None) -> KVCache: ...


def stream_losses(
    model: TokenShuffleLike, streams: Streams, drop: Tensor | None, weights: Tensor | None
) -> GeneratorOutput:
    """Cross entropy in nats of the entries of streams that are in the loss: the mean over image ids, plus
    ``text_weight`` times the mean over text ids and special tokens. Metrics "image_loss", "text_loss" and "accuracy",
    the share of correct image ids.

    Args:
        drop: (B,) uniform; rows below ``condition_dropout`` generate their image without the text before it.

    Raises:
        ValueError: latents, streams of another vocabulary, or longer ones than the model has positions for.
    """
    check(model, streams)
    valid = streams.mask & ~left_out(streams, drop, model.condition_dropout)
    hidden = model.transform(model.embed_joint(streams.ids), positions_of(valid), visible_causal_mask(valid), None)
    places = torch.arange(valid.shape[1], device=valid.device)
    before = torch.where(valid, places, 0).cummax(1).values  # the last valid entry up to each
    learned = streams.in_loss & valid & (places > 0)
    rows, found = learned.nonzero(as_tuple=True)
    logits, ids = model.head(hidden[rows, before[rows, found - 1]]), streams.ids[rows, found]
    losses, images = F.cross_entropy(logits, ids, reduction="none"), streams.kinds[rows, found] == IMAGE_KIND
    counted = torch.ones_like(losses) if weights is None else weights[rows]
    image, text = (weighted_mean(losses, counted * kind) for kind in (images, ~images))
    right = (logits.detach().argmax(-1) == ids).float()
    metrics = {
        "image_loss": image.detach(),
        "text_loss": text.detach(),
        "accuracy": weighted_mean(right, images.float()),
    }
    return GeneratorOutput(image + model.text_weight * text, logits, metrics)


def check(model: TokenShuffleLike, streams: Streams) -> None:
    """Raise ValueError for streams that the model cannot read."""
    if streams.latents is not None:
        raise ValueError("these streams have images as latents; this model reads ids")
    vocabulary, ids = model.vocabulary, streams.ids
    if ids.shape[1] > model.max_entries:
        raise ValueError(
            f"a stream of {ids.shape[1]} entries is longer than the {model.max_entries} positions of this model; take "
            "a template with fewer texts and images, or a larger text_length"
        )
    for number, kind in enumerate(KINDS):
        first, stop = vocabulary.span(kind)
        if bool(((((ids >= first) & (ids < stop)) != (streams.kinds == number)) & streams.mask).any()):
            raise ValueError(
                f"these streams are of another vocabulary: this model's has texts of {vocabulary.text_size} ids and "
                f"images of {vocabulary.image_size}"
            )


def left_out(streams: Streams, drop: Tensor | None, share: float) -> Tensor:
    """(B, N) bool: the texts that are hidden in rows with ``drop`` (B,) below ``share`` and an image in the loss."""
    text, drawn = (streams.kinds == TEXT_KIND) & ~streams.in_loss, (streams.kinds == IMAGE_KIND) & streams.in_loss
    if drop is None:
        return torch.zeros_like(text)
    return text & (drop < share)[:, None] & drawn.any(1, keepdim=True)


def positions_of(valid: Tensor) -> Tensor:
    """Position ids (B, N) int64; invalid entries take no position."""
    return (valid.cumsum(1) - 1).clamp_min(0)


@torch.no_grad()
def write(model: TokenShuffleLike, condition: Condition, max_tokens: int) -> Tensor:
    """Describe given images, optionally as the answer to a text: greedy text ids (B, n), padded with the end token.
    n is at most ``max_tokens``, and at most the length of the longest training text plus its end token."""
    vocabulary, given, asked = model.vocabulary, condition.part("given"), condition.part("ids")
    if given is None or bool(given.dropped.any()):
        raise ValueError("there is nothing to describe: every row of the condition needs the ids of an image (given)")
    rows, there = len(given.values), torch.ones_like(given.values[:, :1], dtype=torch.bool)

    def mark(name: str) -> tuple[Tensor, Tensor]:
        return torch.full_like(given.values[:, :1], vocabulary.special(name)), there

    image = vocabulary.joint(given.values, "image"), there.expand(-1, given.values.shape[1])
    question = [] if asked is None else [(asked.values.clamp_min(0), asked.valid() & ~asked.dropped[:, None])]
    parts = [mark("begin"), mark("begin_image"), image, mark("end_image"), *question, mark("answer")]
    ids, valid = (torch.cat(column, 1) for column in zip(*parts))
    max_tokens = min(max_tokens, model.text.length + 1) if model.text else max_tokens
    cache, end = model.new_cache(rows, ids.shape[1] + max_tokens), vocabulary.special("end")
    said, ended, new = ids.new_zeros(rows, 0), ~there[:, 0], ids.shape[1]
    while said.shape[1] < max_tokens and not bool(ended.all()):
        places, mask = positions_of(valid)[:, -new:], visible_causal_mask(valid, valid.shape[1] - new)
        hidden = model.transform(model.embed_joint(ids[:, -new:]), places, mask, cache.layers)
        logits = check_finite(model.head(hidden[:, -1:]), "logits", hidden.dtype)[:, 0]
        words = torch.cat([logits[:, : vocabulary.text_size], logits[:, end, None]], 1).argmax(-1)
        word = torch.where(ended | (words == vocabulary.text_size), end, words)[:, None]
        ended = ended | (word[:, 0] == end)
        ids, valid, said, new = torch.cat([ids, word], 1), torch.cat([valid, there], 1), torch.cat([said, word], 1), 1
    return said

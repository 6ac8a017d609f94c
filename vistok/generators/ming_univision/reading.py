"""Training streams as entries of Ming-UniVision's language model: ids, loss mask, and what condition dropout hides.

A stream consists of turns: each begins with the user role, and the assistant role stands before the reply. Condition
dropout concerns only the last image of a stream, if it is in the loss, with its start mark: in some samples the text,
or the text and the images before it, are hidden from it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn

from vistok.data.streams import IMAGE_KIND, TEXT_KIND, Streams
from vistok.generators.ming_univision.context import ALWAYS, IMAGE, TEXT
from vistok.types import Expander, JointVocabulary


def expanded(expander: Expander, latents: Tensor, valid: Tensor | None) -> Tensor:
    """Features (B, N, E) of latents (B, N, C); ``valid`` (B, N) bool is False in padding, which may lie anywhere. None
    is no padding.

    A feature depends on all latents before it, so padding is moved behind the valid latents.
    """
    if valid is None:
        return expander.expand(latents)
    first = (~valid).int().sort(dim=1, stable=True).indices  # the valid ones first, in their order
    count = max(1, int(valid.sum(1).max()))
    features = expander.expand(latents.gather(1, first[:, :count, None].expand(-1, -1, latents.shape[2])))
    places = first.argsort(1).clamp_max(count - 1)  # padding gets any feature
    return features.gather(1, places[..., None].expand(-1, -1, features.shape[2]))


@dataclass(frozen=True)
class Reading:
    """The entries of streams for the language model, (B, N) each.

    Attributes:
        ids: int64, of the language model; the patch mark at latents of images.
        valid: bool, False in padding.
        images: bool, True at latents of images.
        learned: bool, True in the loss; an entry is predicted from the one before it.
        kinds: int64, which condition dropout hides an entry: none (``ALWAYS``), ``TEXT`` or ``IMAGE``.
        response: bool, the image that condition dropout concerns, from its start mark on, and all that follows.
        inputs: bool, images in user turns, which may have a router of their own.
    """

    ids: Tensor
    valid: Tensor
    images: Tensor
    learned: Tensor
    kinds: Tensor
    response: Tensor
    inputs: Tensor


class StreamReader(nn.Module):
    """Streams in their joint vocabulary as entries of the language model.

    Args:
        text_size: number of text ids.
        patch: the id at latents of images.
        marks: by the names of the streams' special marks, the ids of the language model for each: none, one or several.
    """

    _own: Tensor
    _counts: Tensor

    def __init__(self, text_size: int, patch: int, marks: Mapping[str, Sequence[int]]):
        super().__init__()
        self.vocabulary = JointVocabulary(text_size, 1)
        own = [[patch], *(list(marks[name]) for name in self.vocabulary.specials)]
        width = max(map(len, own))
        self.register_buffer("_own", torch.tensor([row + [0] * (width - len(row)) for row in own]), persistent=False)
        self.register_buffer("_counts", torch.tensor([len(row) for row in own]), persistent=False)
        self._is_plain = all(len(row) == 1 for row in own)

    def forward(self, streams: Streams) -> Reading:
        """The entries of streams.

        Raises:
            ValueError: streams of another vocabulary, or of image ids.
        """
        vocabulary = self.vocabulary
        if streams.latents is None:
            raise ValueError("these streams have images as ids; this model reads latents")
        ids, images = streams.ids, (streams.kinds == IMAGE_KIND) & streams.mask
        if bool((((ids < vocabulary.text_size) != (streams.kinds == TEXT_KIND)) & streams.mask).any()):
            raise ValueError(
                f"these streams are of another vocabulary: this model's has texts of {vocabulary.text_size} ids"
            )
        begins, answers, starts, ends = (
            (ids == vocabulary.special(name)) & streams.mask for name in ("begin", "answer", "begin_image", "end_image")
        )
        turn, start = begins.cumsum(1), starts.cumsum(1)
        asked = turn > answers.cumsum(1)
        is_last = (start == start[:, -1:]) & (start > 0)
        response = is_last & (is_last & images & streams.in_loss).any(1, keepdim=True)
        shown = ~response & (images | starts | (ends & asked))
        wish = ~response & asked & (turn == turn[:, -1:]) & (streams.kinds == TEXT_KIND) & streams.mask
        kinds = torch.where(shown, IMAGE, torch.where(wish, TEXT, ALWAYS))
        row = (ids - vocabulary.text_size).clamp_min(0)
        own = torch.where((ids < vocabulary.text_size)[..., None], ids[..., None], self._own[row])  # (B, N, R)
        reading = Reading(own[..., 0], streams.mask, images, streams.in_loss, kinds, response, images & asked)
        if self._is_plain:
            return reading
        counts = torch.where(ids < vocabulary.text_size, 1, self._counts[row]) * streams.mask
        places = torch.arange(own.shape[2], device=ids.device)
        return _packed(Reading(own, *_spread(reading, places < counts[..., None])), places < counts[..., None])


def _spread(reading: Reading, there: Tensor) -> list[Tensor]:
    """All fields of a reading but the ids, repeated for each of the R ids that an entry may have: (B, N, R) each."""
    return [getattr(reading, field.name)[..., None].expand_as(there) for field in fields(reading)[1:]]


def _packed(reading: Reading, there: Tensor) -> Reading:
    """The entries (B, N, R) where ``there`` is True, moved to the front of each row, (B, M); the rest is padding."""
    flat = there.flatten(1)
    order = (~flat).int().sort(dim=1, stable=True).indices[:, : int(flat.sum(1).max())]
    columns = {f.name: getattr(reading, f.name).flatten(1).gather(1, order) for f in fields(reading)}
    kept = flat.gather(1, order)
    flags = {name: column & kept for name, column in columns.items() if column.dtype == torch.bool}
    return Reading(**{**columns, **flags})

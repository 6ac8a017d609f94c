"""How Ming-UniVision reads training streams: which entries, what of them rows of guidance do without, what is learned.

A stream is turns: each begins with the human's role, and the model's role stands before the reply. The last image of a
stream that is in the loss, with its start mark, is what guidance would draw: there, and there alone, the text or the
text and the images before it are left out of some samples.
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
    """Features (B, N, E) of latents (B, N, C) of which some, (B, N) bool, are padding on any side; None for no padding.

    A feature depends on all latents before it, so padding must not lie there.
    """
    if valid is None:
        return expander.expand(latents)
    first = (~valid).int().sort(dim=1, stable=True).indices  # the valid ones, in their order
    count = max(1, int(valid.sum(1).max()))
    features = expander.expand(latents.gather(1, first[:, :count, None].expand(-1, -1, latents.shape[2])))
    places = first.argsort(1).clamp_max(count - 1)  # padding has any
    return features.gather(1, places[..., None].expand(-1, -1, features.shape[2]))


@dataclass(frozen=True)
class Reading:
    """The entries that the language model is fed for streams, (B, N) each.

    Attributes:
        ids: int64, of the language model; at images their patch mark.
        valid: bool, False in padding.
        images: bool, where latents are.
        learned: bool, what is in the loss; an entry is predicted from the one before it.
        kinds: int64, what rows of guidance do without: ``ALWAYS`` nothing, ``TEXT`` or ``IMAGE``.
        response: bool, the image that guidance would draw, from its start mark on, and what follows.
        inputs: bool, images that the human shows, which routers of their own may take.
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
        text_size: ids of texts.
        patch: the mark at images.
        marks: by the stream's names, the ids that stand for a mark: none, one, or several.
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
        """
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
    """The other fields of a reading, repeated for each id that an entry may have: (B, N, R) each."""
    return [getattr(reading, field.name)[..., None].expand_as(there) for field in fields(reading)[1:]]


def _packed(reading: Reading, there: Tensor) -> Reading:
    """The entries (B, N, R) that are ``there``, moved together in each row, (B, M); what is left at the end is
    padding."""
    flat = there.flatten(1)
    order = (~flat).int().sort(dim=1, stable=True).indices[:, : int(flat.sum(1).max())]
    columns = {f.name: getattr(reading, f.name).flatten(1).gather(1, order) for f in fields(reading)}
    kept = flat.gather(1, order)
    flags = {name: column & kept for name, column in columns.items() if column.dtype == torch.bool}
    return Reading(**{**columns, **flags})

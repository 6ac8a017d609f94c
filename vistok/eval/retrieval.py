"""Scores of tokenizers that decode to image embeddings: similarity to the images' embeddings, and retrieval.

SEED (arXiv 2307.08041) evaluates its tokens by retrieval. ``Gallery`` shows an embedding as the nearest image of a data
set, which is not a rendering of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from vistok.data.config import DataConfig
from vistok.data.loader import batch_reader, evaluation_loader
from vistok.data.opening import open_source
from vistok.eval.record import describe_tokenizer, library_versions
from vistok.tokenizers.base import Tokenizer
from vistok.utils.progress import track


@dataclass(frozen=True)
class Embeddings:
    """The embeddings of all images of a data set, in order.

    Attributes:
        decoded: (N, E), the embeddings that the images' ids are decoded to.
        targets: (N, E), the images' own embeddings.
        labels: (N,) classes, -1 for images without one.
        ids: (N, L).
    """

    decoded: Tensor
    targets: Tensor
    labels: Tensor
    ids: Tensor


@torch.no_grad()
def embeddings(tokenizer: Tokenizer, data: DataConfig) -> Embeddings:
    """Encode and decode all images of ``data``.

    Raises:
        ValueError: the tokenizer decodes to no embeddings, or has no network for their targets.
    """
    tokenizer.eval()
    parts: list[tuple[Tensor, ...]] = []
    loader = evaluation_loader(open_source(data), data)
    for batch in track(loader, "embeddings", len(loader)):
        pixels = batch.pixels.to(tokenizer.device, tokenizer.dtype)
        ids = tokenizer.encode(pixels)
        made = tokenizer.decode_features(ids), tokenizer.target_features(pixels)
        parts.append((*(part.float().cpu() for part in made), batch.labels, ids.cpu()))
    return Embeddings(*(torch.cat(column) for column in zip(*parts)))


def retrieval_scores(found: Embeddings) -> dict[str, float]:
    """Scores by the cosine between decoded embeddings and targets; means over images.

    Returns:
        ``cosine`` between each decoded embedding and its own target; ``recall_at_1`` and ``recall_at_5``, the share of
        images whose own target is among the 1 or 5 nearest of all targets; and the ``class_scores``.
    """
    decoded, targets = F.normalize(found.decoded, dim=-1), F.normalize(found.targets, dim=-1)
    similar = decoded @ targets.T  # (N, N)
    own = similar.diagonal()
    rank = (similar > own[:, None]).sum(1)
    scores = {"cosine": float(own.mean())}
    scores |= {f"recall_at_{k}": float((rank < k).double().mean()) for k in (1, 5)}
    return scores | class_scores(found)


def class_scores(found: Embeddings, *, without_own: bool = True) -> dict[str, float]:
    """Recall of classes by the nearest target.

    Args:
        without_own: whether to exclude each image's own target.

    Returns:
        ``class_recall``, the share of decoded embeddings whose nearest target is of the same class;
        ``class_recall_of_targets``, the same for the targets themselves, without their own; and
        ``class_recall_by_chance``. Empty without at least two classes.
    """
    labels, classes = found.labels, found.labels.unique()
    if len(classes) < 2 or classes[0] < 0:
        return {}
    decoded, targets = F.normalize(found.decoded, dim=-1), F.normalize(found.targets, dim=-1)
    shares = torch.bincount(labels).double() / len(labels)
    return {
        "class_recall": _class_recall(decoded @ targets.T, labels, without_own=without_own),
        "class_recall_of_targets": _class_recall(targets @ targets.T, labels, without_own=True),
        "class_recall_by_chance": float(shares.square().sum()),
    }


def _class_recall(similar: Tensor, labels: Tensor, *, without_own: bool) -> float:
    nearest = (similar.fill_diagonal_(-torch.inf) if without_own else similar).argmax(1)
    return float((labels[nearest] == labels).double().mean())


def evaluate_embeddings(tokenizer: Tokenizer, data: DataConfig) -> dict[str, Any]:
    """The ``retrieval_scores`` of all images of ``data``, the share of codes used, and what the scores depend on."""
    found = embeddings(tokenizer, data)
    used = torch.bincount(found.ids.flatten(), minlength=tokenizer.spec.num_ids)
    return {
        "protocol": "retrieval",
        "scores": retrieval_scores(found) | {"codes_used": float((used > 0).double().mean())},
        "images": {"source": f"ids of {data.title}", "count": len(found.ids)},
        "reference": {"source": f"embeddings of {data.title}"},
        "tokenizer": describe_tokenizer(tokenizer, data),
        "versions": library_versions(),
        "warnings": [],
    }


class Gallery:
    """Shows embeddings as the nearest images of a data set.

    Args:
        tokenizer: computes the embeddings of the data set's images.
        data: the data set.
    """

    def __init__(self, tokenizer: Tokenizer, data: DataConfig):
        self._reader = batch_reader(open_source(data), data, augmented=False)
        self._targets = F.normalize(embeddings(tokenizer, data).targets, dim=-1)

    def nearest(self, decoded: Tensor) -> Tensor:
        """The indices (B,) of the gallery's images that are nearest to embeddings (B, E), by cosine."""
        return (F.normalize(decoded.float().cpu(), dim=-1) @ self._targets.T).argmax(1)

    def __call__(self, decoded: Tensor) -> Tensor:
        """The images (B, C, H, W) in [-1, 1] nearest to embeddings (B, E). They are not renderings of these."""
        positions = self.nearest(decoded).tolist()
        return torch.cat([self._reader.load(np.array([position]), 0)[0].pixels for position in positions])

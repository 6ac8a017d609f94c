"""Scores of tokenizers that decode to image embeddings: how near these come, and what they find.

SEED (arXiv 2307.08041) judges its tokens by retrieval; an embedding can be shown as the nearest image of a gallery,
which is no rendering of it.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from vistok.data.config import DataConfig
from vistok.data.loader import batch_reader, evaluation_loader
from vistok.data.opening import open_source
from vistok.eval.record import library_versions
from vistok.tokenizers.base import Tokenizer
from vistok.utils.progress import track


@dataclass(frozen=True)
class Embeddings:
    """The embeddings of all images of a data set, in order.

    Attributes:
        decoded: (N, E), what the ids of each image are decoded to.
        targets: (N, E), the embedding of each image.
        labels: (N,) classes, -1 where there is none.
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
        ValueError: a tokenizer that makes no embeddings, or has no network for their targets.
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
    """Scores by cosine.

    ``cosine`` to the own target; ``recall_at_1`` and ``recall_at_5``, how often the own target is among the nearest of
    all; with classes ``class_recall``, how often the nearest target of another image is of the same class,
    ``class_recall_of_targets``, the same of the targets themselves, and ``class_recall_by_chance``.
    """
    decoded, targets = F.normalize(found.decoded, dim=-1), F.normalize(found.targets, dim=-1)
    similar = decoded @ targets.T  # (N, N)
    own = similar.diagonal()
    rank = (similar > own[:, None]).sum(1)
    scores = {"cosine": float(own.mean())}
    scores |= {f"recall_at_{k}": float((rank < k).double().mean()) for k in (1, 5)}
    return scores | class_scores(found)


def class_scores(found: Embeddings, *, without_own: bool = True) -> dict[str, float]:
    """``class_recall`` and its kin, of ``retrieval_scores``; nothing of images without classes.

    Args:
        without_own: whether the own target of each does not count among the nearest.
    """
    labels, classes = found.labels, found.labels.unique()
    if len(classes) < 2 or classes[0] < 0:
        return {}
    decoded, targets = F.normalize(found.decoded, dim=-1), F.normalize(found.targets, dim=-1)
    shares = torch.bincount(labels).double() / len(labels)
    return {
        "class_recall": _class_recall(decoded @ targets.T, labels, without_own),
        "class_recall_of_targets": _class_recall(targets @ targets.T, labels, True),
        "class_recall_by_chance": float(shares.square().sum()),
    }


def _class_recall(similar: Tensor, labels: Tensor, without_own: bool) -> float:
    nearest = (similar.fill_diagonal_(-torch.inf) if without_own else similar).argmax(1)
    return float((labels[nearest] == labels).double().mean())


def evaluate_embeddings(tokenizer: Tokenizer, data: DataConfig) -> dict[str, Any]:
    """The ``retrieval_scores`` of all images of ``data``, with the use of codes, and what they depend on."""
    found = embeddings(tokenizer, data)
    used = torch.bincount(found.ids.flatten(), minlength=tokenizer.spec.num_ids)
    name = f"{data.name or data.root or data.source} ({data.split or 'all images'})"
    return {
        "protocol": "retrieval",
        "scores": retrieval_scores(found) | {"codes_used": float((used > 0).double().mean())},
        "images": {"source": f"ids of {name}", "count": len(found.ids)},
        "reference": {"source": f"embeddings of {name}"},
        "tokenizer": {
            "model": tokenizer.registry_name,
            "fingerprint": tokenizer.fingerprint(),
            "spec": dataclasses.asdict(tokenizer.spec),
            "data": dataclasses.asdict(data),
        },
        "versions": library_versions(),
        "warnings": [],
    }


class Gallery:
    """Images that stand for embeddings: the nearest one of a data set.

    Args:
        tokenizer: makes the embeddings of the gallery's images.
        data: its images.
    """

    def __init__(self, tokenizer: Tokenizer, data: DataConfig):
        self._reader = batch_reader(open_source(data), data, augmented=False)
        self._targets = F.normalize(embeddings(tokenizer, data).targets, dim=-1)

    def nearest(self, decoded: Tensor) -> Tensor:
        """The positions (B,) in the gallery of the images nearest to embeddings (B, E), by cosine."""
        return (F.normalize(decoded.float().cpu(), dim=-1) @ self._targets.T).argmax(1)

    def __call__(self, decoded: Tensor) -> Tensor:
        """Those images, (B, C, H, W) in [-1, 1]. They are no renderings of the embeddings."""
        positions = self.nearest(decoded).tolist()
        return torch.cat([self._reader.load(np.array([position]), 0)[0].pixels for position in positions])

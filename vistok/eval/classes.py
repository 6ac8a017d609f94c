"""Generated images class by class: which classes look alike, repeat themselves, or miss the real images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vistok.eval.features import Extraction


def class_table(
    samples: Extraction, labels: Sequence[int], inside: Tensor | None, names: Sequence[str]
) -> list[dict[str, Any]]:
    """One row per class that occurs.

    Args:
        samples: the features of all images, with "pool" among them.
        labels: N classes, one per image.
        inside: (N,) bool, which images lie in the manifold of the real ones; None if unknown.
        names: of the classes; may be empty.

    Returns:
        Rows with ``class``, ``name``, ``images`` (their number), ``distinct`` (number of different images),
        ``diversity`` and ``precision``. Diversity is the mean squared distance of the class's features from their
        mean, divided by the same of all images: near 0 the class repeats one image, near 1 it is as varied as the whole
        set. Precision is the share of the class's images in the real manifold; None if unknown.
    """
    features, classes = samples.features["pool"].double(), torch.tensor(labels)
    total = (features - features.mean(0)).square().sum(1).mean()
    rows = []
    for label in sorted(set(labels)):
        members = classes == label
        own = features[members]
        spread = (own - own.mean(0)).square().sum(1).mean()
        rows.append(
            {
                "class": label,
                "name": names[label] if names else "",
                "images": len(own),
                "distinct": len(samples.digests[members].unique(dim=0)),
                "diversity": float(spread / total) if len(own) > 1 and total > 0 else None,
                "precision": None if inside is None else float(inside[members].double().mean()),
            }
        )
    return rows

"""The names of ImageNet-1k's classes, as timm ships them (from WordNet)."""

from __future__ import annotations

NUM_CLASSES = 1000


def class_names() -> tuple[str, ...]:
    """The 1,000 names in the usual order of the ids, each with its synonyms: "goldfish, Carassius auratus"."""
    from timm.data import ImageNetInfo

    info = ImageNetInfo("imagenet-1k")
    return tuple(info.index_to_description(index, detailed=False) for index in range(NUM_CLASSES))

"""The order of locality-aware parallel decoding (arXiv 2507.01957).

The places of a group are near known places and far from one another.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

NEIGHBOURS = 1
"""A known place adds to the scores of places at most this many rows and columns away."""


def locality_order(
    grid: tuple[int, int],
    sizes: Sequence[int],
    first: int,
    ties: np.ndarray,
    *,
    proximity_threshold: float,
    repulsion_threshold: float,
) -> np.ndarray:
    """The places (N,) int64 of an image in the order of generation.

    The score of a free place is the sum of 1 / distance over the known places around it. A group is filled in two
    passes. The first goes through the places of score ``proximity_threshold`` or more, by falling score, and takes each
    one that is further than ``repulsion_threshold`` (in rows or columns, the larger) from all places of the group. If
    the group is not full, the second repeatedly takes the remaining place that is furthest from the group. If no more
    places remain than the group needs, it takes them all: those of lower scores first, then those the first pass
    rejected.

    Args:
        grid: (h, w), with h w = N.
        sizes: number of places of each group; the first group has one.
        first: the first place.
        ties: (groups, N) random numbers; among equal scores, the place with the smaller number in the group's row comes
            first.

    Raises:
        ValueError: sizes that do not begin with 1 or do not sum to N, ties of another shape, or first outside the grid.
    """
    height, width = grid
    count = height * width
    if sizes[0] != 1 or sum(sizes) != count or min(sizes) < 1:
        raise ValueError(f"groups of {tuple(sizes)} places must begin with 1 and sum to the {count} of a {grid} grid")
    if ties.shape != (len(sizes), count) or not 0 <= first < count:
        raise ValueError(
            f"ties must be {(len(sizes), count)} and first one of 0..{count - 1}, got {ties.shape} and {first}"
        )
    places = np.stack(np.divmod(np.arange(count), width), 1)  # (N, 2), row and column
    scores, free, order = np.zeros(count), np.ones(count, dtype=bool), []
    newly = [first]
    for group, size in enumerate(sizes):
        if group:
            newly = _group(places, scores, free, size, ties[group], proximity_threshold, repulsion_threshold)
        for place in newly:
            offset = np.abs(places - places[place])
            around = (offset.max(1) <= NEIGHBOURS) & (offset.max(1) > 0)
            scores[around] += 1 / np.sqrt((offset[around] ** 2).sum(1))  # summed in the order of generation
            free[place] = False
        order += newly
    return np.array(order)


def _group(
    places: np.ndarray,
    scores: np.ndarray,
    free: np.ndarray,
    size: int,
    ties: np.ndarray,
    proximity: float,
    repulsion: float,
) -> list[int]:
    """The places of one group, in order."""
    listed = np.flatnonzero(free)
    listed = listed[np.argsort(ties[listed], kind="stable")]
    shuffled = listed
    listed = listed[np.argsort(-scores[listed], kind="stable")]
    near = listed[scores[listed] >= proximity]
    taken: list[int] = []
    rejected: list[int] = []
    for place in near:
        if len(taken) == size:
            break
        apart = all(np.abs(places[place] - places[other]).max() > repulsion for other in taken)
        (taken if apart else rejected).append(int(place))
    if len(taken) == size:
        return taken
    others = np.concatenate([listed[scores[listed] < proximity], np.array(rejected, dtype=listed.dtype)])
    if not taken:
        taken.append(int(shuffled[0]))
        others = others[others != taken[0]]
    if len(taken) + len(others) == size:  # no choice is left: they keep the order of the list
        return taken + others.tolist()
    distances = np.stack([_distance(places[others], places[other]) for other in taken]).min(0)  # (n,)
    while len(taken) < size:
        furthest = int(distances.argmax())  # the first of equally far places
        taken.append(int(others[furthest]))
        distances = np.minimum(distances, _distance(places[others], places[taken[-1]]))
        distances[furthest] = -1
    return taken


def _distance(places: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Euclidean distances (n,) of places (n, 2) from one place (2,)."""
    return np.sqrt(((places - other) ** 2).sum(1))

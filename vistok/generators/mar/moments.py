"""Reads the moments that MAR's caching script writes (github.com/LTH14/mar)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from vistok.data.peers import PeerCache, PeerCacheError, PeerSample, load_array


class MarMoments(PeerCache):
    """MAR's cached moments: ``CLASS/NAME.npz`` with the two views "moments" and "moments_flip", (2D, h, w) each."""

    def __init__(self, root: Path) -> None:
        self._files = sorted(root.glob("*/*.npz"))
        self.classes = tuple(sorted({path.parent.name for path in self._files}))

    def __len__(self) -> int:
        return len(self._files)

    def __iter__(self) -> Iterator[PeerSample]:
        labels = {name: label for label, name in enumerate(self.classes)}
        for path in self._files:
            archive = load_array(path)
            if not {"moments", "moments_flip"} <= set(archive):
                raise PeerCacheError(f"{path} holds {sorted(archive)}; expected moments and moments_flip")
            views = [_moments(archive[name], f"{path}, {name}") for name in ("moments", "moments_flip")]
            if views[0].shape != views[1].shape:
                raise PeerCacheError(f"{path} holds moments {views[0].shape} and moments_flip {views[1].shape}")
            yield PeerSample(np.stack(views), labels[path.parent.name], str(path))


def _moments(values: np.ndarray, where: str) -> np.ndarray:
    """(2D, h, w) float32; PeerCacheError, which says ``where``, if they are no moments."""
    if values.dtype.kind != "f" or values.ndim != 3:
        raise PeerCacheError(f"{where} is {values.dtype} {values.shape}; expected floats (2D, h, w)")
    with np.errstate(over="ignore"):
        values = values.astype(np.float32)
    if not np.isfinite(values).all():
        raise PeerCacheError(f"{where} has values that are not finite, as float32; make the file again")
    return values

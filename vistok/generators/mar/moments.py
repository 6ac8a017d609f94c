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
            views = np.stack([archive["moments"], archive["moments_flip"]])
            if views.dtype.kind != "f" or not np.isfinite(views).all():
                raise PeerCacheError(f"{path} holds {views.dtype} moments, or some that are not finite")
            yield PeerSample(views, labels[path.parent.name], str(path))

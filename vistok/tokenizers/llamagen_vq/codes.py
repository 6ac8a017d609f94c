"""The codes that LlamaGen's extraction writes (github.com/FoundationVision/LlamaGen)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from vistok.data.peers import PeerCache, PeerCacheError, PeerSample, checked_ids, checked_label, load_array


class LlamaGenCodes(PeerCache):
    """LlamaGen's extracted codes: ``NAME_codes/i.npy`` (1, V, L), of V views of an image, and ``NAME_labels/i.npy``
    (1,), in one folder.

    Raises:
        PeerCacheError: not exactly one folder of each kind, or codes without their label.
    """

    def __init__(self, root: Path) -> None:
        codes, labels = ([path for path in root.glob(f"*_{kind}") if path.is_dir()] for kind in ("codes", "labels"))
        if len(codes) != 1 or len(labels) != 1:
            raise PeerCacheError(f"{root} must hold one folder …_codes and one …_labels, as LlamaGen's extraction does")
        self._files = sorted(codes[0].glob("*.npy"), key=lambda path: (len(path.stem), path.stem))
        self._labels = labels[0]
        names = [{path.name for path in folder.glob("*.npy")} for folder in (codes[0], self._labels)]
        for what, lacking, folder in (
            ("codes have no label", names[0] - names[1], self._labels),
            ("labels have no codes", names[1] - names[0], codes[0]),
        ):
            if lacking:
                raise PeerCacheError(
                    f"{len(lacking)} {what} in {folder}, such as {min(lacking)}: the extraction did not finish, or "
                    "files are lost; remove those without a partner, or extract again"
                )

    def __len__(self) -> int:
        return len(self._files)

    def __iter__(self) -> Iterator[PeerSample]:
        for path in self._files:
            codes, label = _one_array(path), _one_array(self._labels / path.name)
            if codes.ndim != 3 or codes.shape[0] != 1 or label.size != 1:
                raise PeerCacheError(
                    f"{path} holds codes {codes.shape} with a label {label.shape}; expected (1, V, L) and one label"
                )
            yield PeerSample(
                checked_ids(codes[0], str(path)), checked_label(label.item(), str(self._labels / path.name)), str(path)
            )


def _one_array(path: Path) -> np.ndarray:
    loaded = load_array(path)
    if isinstance(loaded, dict):
        raise PeerCacheError(f"{path} is an archive of {', '.join(loaded) or 'nothing'}; expected one array, as .npy")
    return loaded

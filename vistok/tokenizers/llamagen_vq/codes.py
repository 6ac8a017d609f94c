"""The codes that LlamaGen's extraction writes (github.com/FoundationVision/LlamaGen)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

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
        missing = [path.name for path in self._files if not (self._labels / path.name).exists()]
        if missing:
            raise PeerCacheError(f"{len(missing)} codes have no label in {self._labels}, such as {missing[0]}")

    def __len__(self) -> int:
        return len(self._files)

    def __iter__(self) -> Iterator[PeerSample]:
        for path in self._files:
            codes, label = load_array(path), load_array(self._labels / path.name)
            if isinstance(codes, dict) or isinstance(label, dict):
                raise PeerCacheError(f"{path} and its label must be one array each")
            if codes.ndim != 3 or codes.shape[0] != 1 or label.size != 1:
                raise PeerCacheError(f"{path} holds codes {codes.shape} with a label {label.shape}; expected (1, V, L)")
            yield PeerSample(
                checked_ids(codes[0], str(path)), checked_label(label.item(), str(self._labels / path.name)), str(path)
            )

"""Sources of images: files, torchvision's datasets, scikit-learn's digits; see also :mod:`vistok.data.folders`,
:mod:`vistok.data.shards` and :mod:`vistok.data.huggingface`.

A source is a map-style dataset of ``(PIL image, label)``. Its decoder chooses the mode, L or RGB; sizes may differ.
A label is the position of the class in ``classes``; all labels are -1 if ``classes`` is empty (unconditional).
"""

from __future__ import annotations

import hashlib
import inspect
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from vistok.data.captions import spell_digit
from vistok.data.decoding import DECODING_ERRORS, ImageDecoder
from vistok.data.digit_variants import PLAIN, VARIANTS
from vistok.data.imagefiles import ImageFiles
from vistok.draws import Keys
from vistok.utils.spelling import suggestion

log = logging.getLogger(__name__)

UNSAFE = ("LSUN", "LSUNClass")
"""Datasets of torchvision that unpickle a file of their folder without checking its hash."""


class UnreadableImageError(Exception):
    """An image that cannot be decoded: ``args`` are its name and the reason."""

    def __str__(self) -> str:
        return ": ".join(self.args)


class ImageSource(ABC):
    """Images with labels, by index.

    Attributes:
        classes: their names, in the order of the labels; empty if the images have no classes.
    """

    classes: tuple[str, ...] = ()

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        """Return an image (mode L or RGB) and its label. Raises UnreadableImageError for a damaged file."""

    @abstractmethod
    def name(self, index: int) -> str:
        """The name of an image in messages: its path, or dataset and position."""

    @abstractmethod
    def fingerprint(self) -> str:
        """A hash that changes when the source holds other images (names and sizes, not contents)."""

    def captions(self, index: int) -> tuple[str, ...]:
        """The texts that describe an image; see :mod:`vistok.data.captions`."""
        return ()


class FileSource(ImageSource):
    """Images that lie in files.

    Args:
        files: the image files.
        labels: one per file.
        decoder: how files become images.
    """

    def __init__(self, files: ImageFiles, labels: Sequence[int], decoder: ImageDecoder) -> None:
        self.files, self._labels, self._decoder = files, labels, decoder

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        try:
            with self.files.open(index) as file:
                return self._decoder.read(file), self._labels[index]
        except DECODING_ERRORS as error:
            raise UnreadableImageError(self.name(index), str(error) or repr(error)) from error

    def name(self, index: int) -> str:
        return self.files.name(index)


class TorchvisionSource(ImageSource):
    """An image classification dataset of torchvision, by name.

    ``split`` is passed on to torchvision (as ``train=`` to datasets that only have training and test images).

    Raises:
        ValueError: an unknown dataset, one without class labels, or an unknown split.
        FileNotFoundError: ``root`` lacks the dataset and ``download`` is off.
    """

    def __init__(
        self,
        name: str,
        root: str | Path,
        *,
        split: str | None = "train",
        download: bool = False,
        decoder: ImageDecoder = ImageDecoder(),  # noqa: B008 (immutable)
    ) -> None:
        self._dataset = _open_torchvision(name, Path(root).expanduser(), split, download=download)
        self._label = f"{name}/{split}"
        self._decoder = decoder
        self.classes = _torchvision_classes(self._dataset, name)

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        try:
            image, label = self._dataset[index]
            return self._decoder.convert(image), int(label)
        except DECODING_ERRORS as error:
            raise UnreadableImageError(self.name(index), str(error)) from error

    def name(self, index: int) -> str:
        return f"{self._label}[{index}]"

    def fingerprint(self) -> str:
        return hash_lines([f"torchvision {self._label} {len(self)}"])


class DigitsSource(ImageSource):
    """scikit-learn's embedded handwritten digits: 1,797 grey images of 8x8, upsampled to 32x32 (bicubic).

    The splits are fixed: the first 80 % of every class, in the data set's order, are ``train``, and the rest is
    ``test``; None is both. Captions spell the digits out: "a seven".

    Args:
        variants: shows every digit several times, one after another, and captions name the variant: ``turned`` (as it
            is, turned left and turned right by 45 degrees) or ``styled`` (as it is, slanted, thin, bold). None shows
            each digit once.

    Raises:
        ValueError: an unknown split, or unknown variants.
    """

    SIZE = 32

    def __init__(
        self,
        *,
        split: str | None = "train",
        decoder: ImageDecoder = ImageDecoder(1),  # noqa: B008 (immutable)
        variants: str | None = None,
    ) -> None:
        from sklearn.datasets import load_digits

        if split not in ("train", "test", None):
            raise ValueError(f"digits have the splits 'train' and 'test' (or null for both), got {split!r}")
        if variants is not None and variants not in VARIANTS:
            raise ValueError(f"data.source=digits takes data.name={' or '.join(VARIANTS)}, or none; got {variants!r}")
        data = load_digits()
        self._split = split
        self._positions = _split_digits(data.target, split)
        self._labels = data.target[self._positions]
        images = np.rint(data.images[self._positions] * (255 / 16)).astype(np.uint8)  # values are 0..16
        size = (self.SIZE, self.SIZE)
        self._images = [Image.fromarray(image).resize(size, Image.Resampling.BICUBIC) for image in images]
        self._decoder, self._variants = decoder, VARIANTS[variants] if variants else (PLAIN,)
        keys = Keys.of(0, self._positions)
        self._strengths = keys.uniform("strength", len(self._variants)).tolist()
        self.classes = tuple("0123456789")

    def __len__(self) -> int:
        return len(self._images) * len(self._variants)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        number, variant = divmod(int(index), len(self._variants))
        image = self._variants[variant].apply(self._images[number], self._strengths[number][variant])
        return self._decoder.convert(image), int(self._labels[number])

    def name(self, index: int) -> str:
        number, variant = divmod(int(index), len(self._variants))
        return " ".join(part for part in (f"digits/{self._positions[number]}", self._variants[variant].words) if part)

    def fingerprint(self) -> str:
        return hash_lines([f"digits {self._split} {len(self)}"])

    def captions(self, index: int) -> tuple[str, ...]:
        number, variant = divmod(int(index), len(self._variants))
        return spell_digit(int(self._labels[number]), self._variants[variant].words)


class Selection(ImageSource):
    """The images of a source at ``indices``."""

    def __init__(self, source: ImageSource, indices: Sequence[int]) -> None:
        self.source, self.indices = source, indices
        self.classes = source.classes

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return self.source[self.indices[index]]

    def name(self, index: int) -> str:
        return self.source.name(self.indices[index])

    def captions(self, index: int) -> tuple[str, ...]:
        return self.source.captions(self.indices[index])

    def fingerprint(self) -> str:
        return hash_lines([self.source.fingerprint(), *map(str, self.indices)])


def hash_lines(lines: Iterable[str]) -> str:
    """The SHA-256 hash of lines of text."""
    digest = hashlib.sha256()
    for line in lines:
        digest.update(line.encode("utf-8", "surrogateescape") + b"\n")
    return digest.hexdigest()


def _open_torchvision(name: str, root: Path, split: str | None, *, download: bool):
    from torchvision import datasets

    exported = {key: getattr(datasets, key) for key in datasets.__all__}
    known = [key for key, value in exported.items() if inspect.isclass(value) and issubclass(value, Dataset)]
    if name not in known:
        raise ValueError(f"torchvision has no dataset {name!r}" + (suggestion(name, known) or f"; it has {known}"))
    if name in UNSAFE:
        raise ValueError(
            f"torchvision's {name} unpickles a file in data.root, which could run anything; it is not read"
        )
    dataset = exported[name]
    accepted = inspect.signature(dataset).parameters
    options: dict[str, Any] = {"download": download} if "download" in accepted else {}
    if "split" in accepted and split is not None:
        options["split"] = split
    elif "train" in accepted:
        if split not in ("train", "test"):
            raise ValueError(f"{name} has the splits 'train' and 'test', got {split!r}")
        options["train"] = split == "train"
    try:
        return dataset(root, **options)
    except (RuntimeError, OSError) as error:
        remedy = "the download failed" if download else "set data.download=true, or data.root to where it lies"
        raise FileNotFoundError(f"{name} is not usable in {root} ({error}); {remedy}") from error


def _torchvision_classes(dataset, name: str) -> tuple[str, ...]:
    if getattr(dataset, "classes", None):
        return tuple(map(str, dataset.classes))
    for attribute in ("targets", "labels", "_labels"):
        labels = getattr(dataset, attribute, None)
        if labels is not None and np.asarray(labels).ndim == 1:
            return tuple(map(str, range(int(np.max(np.asarray(labels))) + 1)))
    raise ValueError(f"torchvision's {name} has no class labels; vistok reads its classification datasets")


def _split_digits(labels: np.ndarray, split: str | None) -> np.ndarray:
    """The positions of a split's digits, ascending."""
    held_out = np.zeros(len(labels), dtype=bool)
    for label in range(10):
        positions = np.flatnonzero(labels == label)
        held_out[positions[len(positions) * 4 // 5 :]] = True
    return np.flatnonzero({None: np.ones_like(held_out), "train": ~held_out, "test": held_out}[split])

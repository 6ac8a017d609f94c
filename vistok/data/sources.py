"""Where images come from: folders, zip files, torchvision's datasets, scikit-learn's digits; see also
:mod:`vistok.data.shards` and :mod:`vistok.data.huggingface`.

A source is a map-style dataset of ``(PIL image, label)``: mode L or RGB as ``channels`` says, whatever the size.
A label is the position of the class in ``classes``, or -1 throughout where ``classes`` is empty (unconditional).
"""

from __future__ import annotations

import hashlib
import inspect
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from vistok.config import nearest
from vistok.data.files import IMAGE_EXTENSIONS, SPLITS, FileTree, open_tree

log = logging.getLogger(__name__)

UNCONDITIONAL = -1
UNSAFE = ("LSUN", "LSUNClass")
"""Datasets of torchvision that unpickle what lies in their folder, without a checksum."""

_LAYOUTS = (
    "accepted layouts: <class>/*, the same under train/, val/ or test/, or images side by side without classes; "
    f"extensions: {' '.join(IMAGE_EXTENSIONS)}"
)
# What Pillow's decoders are known to raise on damaged files, besides OSError.
DECODING_ERRORS = (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError)


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
        """What to call this image in a message: its path, or dataset and position."""

    @abstractmethod
    def fingerprint(self) -> str:
        """A hash that changes when the source holds other images (names and sizes, not contents)."""


class FolderSource(ImageSource):
    """Images in a folder or a .zip file, read in place.

    Images lie in ``<class>/`` folders (at any depth below), or all side by side, which makes the source
    unconditional. Where the folders are called train, val, validation, test (all of them, or at least two), ``split``
    picks one; a root without such folders is all training images. A zip may hold everything inside one more folder.
    Hidden files are ignored; other files are counted in a warning.

    Raises:
        FileNotFoundError: no such root, no such split, or no images.
        ValueError: images both inside and beside class folders.
    """

    def __init__(self, root: str | Path, *, split: str | None = "train", channels: int = 3) -> None:
        self._tree = open_tree(root)
        self._channels = channels
        images = self._tree.images()
        if not images:
            raise FileNotFoundError(f"no images in {root}; {_LAYOUTS}")
        self._prefix = "" if split is None else _split_prefix(images, split, self._tree)
        self._files = sorted(path for path in images if path.startswith(self._prefix))
        self.classes, self._labels = _label(self._files, self._prefix, self._tree)
        _warn_of_other_files(self._tree, self._prefix)

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        try:
            with self._tree.open(self._files[index]) as file, Image.open(file) as image:
                return convert(image, self._channels), self._labels[index]
        except DECODING_ERRORS as error:
            raise UnreadableImageError(self.name(index), str(error)) from error

    def name(self, index: int) -> str:
        return f"{self._tree.root}/{self._files[index]}"

    def fingerprint(self) -> str:
        return hash_lines(f"{path.removeprefix(self._prefix)} {self._tree.size(path)}" for path in self._files)


class TorchvisionSource(ImageSource):
    """An image classification dataset of torchvision, by name.

    ``split`` is handed on as torchvision names it (``train=`` for datasets that only know training and test).

    Raises:
        ValueError: an unknown dataset, one without class labels, or an unknown split.
        FileNotFoundError: ``root`` lacks the dataset and ``download`` is off.
    """

    def __init__(
        self, name: str, root: str | Path, *, split: str | None = "train", download: bool = False, channels: int = 3
    ) -> None:
        self._dataset = _open_torchvision(name, Path(root).expanduser(), split, download)
        self._label = f"{name}/{split}"
        self._channels = channels
        self.classes = _torchvision_classes(self._dataset, name)

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        try:
            image, label = self._dataset[index]
            return convert(image, self._channels), int(label)
        except DECODING_ERRORS as error:
            raise UnreadableImageError(self.name(index), str(error)) from error

    def name(self, index: int) -> str:
        return f"{self._label}[{index}]"

    def fingerprint(self) -> str:
        return hash_lines([f"torchvision {self._label} {len(self)}"])


class DigitsSource(ImageSource):
    """scikit-learn's embedded handwritten digits: 1,797 grey images of 8x8, upsampled to 32x32 (bicubic).

    The split is fixed: of every class, in the data set's order, the first 80 % are ``train`` and the rest is
    ``test``; None is both.
    """

    SIZE = 32

    def __init__(self, *, split: str | None = "train", channels: int = 1) -> None:
        from sklearn.datasets import load_digits

        if split not in ("train", "test", None):
            raise ValueError(f"digits have the splits 'train' and 'test' (or null for both), got {split!r}")
        data = load_digits()
        self._split = split
        self._positions = _split_digits(data.target, split)
        self._labels = data.target[self._positions]
        images = np.rint(data.images[self._positions] * (255 / 16)).astype(np.uint8)  # values are 0..16
        size = (self.SIZE, self.SIZE)
        self._images = [Image.fromarray(image).resize(size, Image.Resampling.BICUBIC) for image in images]
        self._channels = channels
        self.classes = tuple("0123456789")

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return convert(self._images[index], self._channels), int(self._labels[index])

    def name(self, index: int) -> str:
        return f"digits/{self._positions[index]}"

    def fingerprint(self) -> str:
        return hash_lines([f"digits {self._split} {len(self)}"])


class Selection(ImageSource):
    """Some of a source's images, by their indices there."""

    def __init__(self, source: ImageSource, indices: Sequence[int]) -> None:
        self._source, self._indices = source, indices
        self.classes = source.classes

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return self._source[self._indices[index]]

    def name(self, index: int) -> str:
        return self._source.name(self._indices[index])

    def fingerprint(self) -> str:
        return hash_lines([self._source.fingerprint(), *map(str, self._indices)])


def convert(image: Image.Image, channels: int) -> Image.Image:
    """Decode to mode L or RGB."""
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow would clip at 255
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image.convert("L" if channels == 1 else "RGB")


def hash_lines(lines: Iterable[str]) -> str:
    """The SHA-256 of some lines of text."""
    digest = hashlib.sha256()
    for line in lines:
        digest.update(line.encode() + b"\n")
    return digest.hexdigest()


def _split_prefix(images: Sequence[str], split: str, tree: FileTree) -> str:
    """The folder of a split, with its slash; empty if the tree is not divided into splits."""
    tops = {path.partition("/")[0] for path in images}
    splits = tops & set(SPLITS)
    if splits == tops or len(splits) > 1:
        if split not in tops:
            raise FileNotFoundError(f"{tree.root} has no images in {split}/; it has {', '.join(sorted(splits))}")
        return f"{split}/"
    if split != "train":
        raise FileNotFoundError(
            f"{tree.root} is not divided into splits, so it has no {split!r}: put the images into train/ and {split}/, "
            "or name another folder as root with data.split=null"
        )
    return ""


def _label(files: Sequence[str], prefix: str, tree: FileTree) -> tuple[tuple[str, ...], list[int]]:
    """Class names, and the label of every file."""
    folders = [path.removeprefix(prefix).rpartition("/")[0].partition("/")[0] for path in files]
    classes = tuple(sorted(set(folders)))
    if classes == ("",):
        return (), [UNCONDITIONAL] * len(files)
    if "" in classes:
        loose = [path for path, folder in zip(files, folders, strict=True) if not folder]
        raise ValueError(
            f"{tree.root}/{prefix} holds {len(loose)} images (such as {loose[0]}) beside the folders "
            f"{', '.join(classes[1:6])}; {_LAYOUTS}"
        )
    labels = {name: label for label, name in enumerate(classes)}
    return classes, [labels[folder] for folder in folders]


def _warn_of_other_files(tree: FileTree, prefix: str) -> None:
    others = [path for path in tree.others() if path.startswith(prefix)]
    if others:
        shown = ", ".join(others[:5]) + (", …" if len(others) > 5 else "")
        log.warning("%s: %d files are not images and are ignored: %s", tree.root, len(others), shown)


def _open_torchvision(name: str, root: Path, split: str | None, download: bool):
    from torchvision import datasets

    exported = {key: getattr(datasets, key) for key in datasets.__all__}
    known = [key for key, value in exported.items() if inspect.isclass(value) and issubclass(value, Dataset)]
    if name not in known:
        guess = nearest(name, known)
        raise ValueError(
            f"torchvision has no dataset {name!r}; " + (f"did you mean {guess!r}?" if guess else f"it has {known}")
        )
    if name in UNSAFE:
        raise ValueError(
            f"torchvision's {name} unpickles a file in data.root, which could run anything; it is not read"
        )
    dataset = exported[name]
    accepted = inspect.signature(dataset).parameters
    options = {"download": download} if "download" in accepted else {}
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
    """Positions of a split, ascending."""
    held_out = np.zeros(len(labels), dtype=bool)
    for label in range(10):
        positions = np.flatnonzero(labels == label)
        held_out[positions[len(positions) * 4 // 5 :]] = True
    return np.flatnonzero({None: np.ones_like(held_out), "train": ~held_out, "test": held_out}[split])

"""Images of Hugging Face's ``datasets``: from the hub, or saved with ``save_to_disk``."""

from __future__ import annotations

import io
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from vistok.data.captions import CaptionError, texts_of
from vistok.data.decoding import DECODING_ERRORS, ImageDecoder
from vistok.data.sources import ImageSource, UnreadableImageError, hash_lines
from vistok.data.tar import UNCONDITIONAL, check_class
from vistok.signatures import ConfigError

log = logging.getLogger(__name__)


class HuggingFaceSource(ImageSource):
    """A map-style data set with a column of images and, unless it is unconditional, a column of class ids.

    Args:
        name: id on the hub, as ``datasets.load_dataset`` takes it; or None.
        root: folder that ``save_to_disk`` wrote; or None.
        split: of the data set, for example "train", "validation", "train[:10%]"; None if there are no splits.
        image_column: None takes the only column of images.
        label_column: a column of class labels, or of integers, whose classes are named by their ids. None takes the
            only column of class labels; if there is none, the source is unconditional, and a warning names any
            columns of integers.
        caption_column: a column of texts, or of lists of texts; None is no captions.

    Raises:
        ConfigError: ``datasets`` is not installed.
        FileNotFoundError: ``root`` is no folder.
        ValueError: no such split or column, several columns to choose from, or integers that are no class ids.
    """

    def __init__(
        self,
        name: str | None,
        root: str | None,
        *,
        split: str | None = "train",
        decoder: ImageDecoder = ImageDecoder(),  # noqa: B008 (immutable)
        image_column: str | None = None,
        label_column: str | None = None,
        caption_column: str | None = None,
    ) -> None:
        try:
            import datasets
        except ImportError as error:
            raise ConfigError("data.source=huggingface needs datasets; pip install 'vistok[datasets]'") from error
        if not name and not Path(str(root)).is_dir():  # never an address: fsspec's can be anything
            raise FileNotFoundError(f"data.root={root} is no folder that save_to_disk wrote")
        self._label = name or str(root)
        loaded = datasets.load_dataset(name, split=split) if name else datasets.load_from_disk(str(root))
        self._dataset = _pick_split(loaded, split, self._label)
        features = self._dataset.features
        images = [key for key, feature in features.items() if isinstance(feature, datasets.Image)]
        labels = [key for key, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
        values = {key: feature.dtype for key, feature in features.items() if isinstance(feature, datasets.Value)}
        integers = [key for key, dtype in values.items() if dtype.startswith(("int", "uint"))]
        self._image = self._pick("image_column", image_column, images, images)
        if self._image is None:
            raise ValueError(f"{self._label} has no column of images, but {', '.join(features)}")
        self._class = self._pick("label_column", label_column, labels, [*labels, *integers])
        if caption_column is not None and caption_column not in features:
            raise ValueError(f"data.caption_column={caption_column}: {self._label} has {', '.join(features)}")
        self._texts = self._dataset.select_columns([caption_column]) if caption_column is not None else None
        # Otherwise ``datasets`` would decode whole rows, with all the images in them.
        self._dataset = self._dataset.select_columns([self._image, *([self._class] if self._class else [])])
        self.classes = self._class_names() if self._class else ()
        self._fingerprint = hash_lines([f"huggingface {self._dataset._fingerprint} {len(self)}"])
        # Our own decoder reads the files, as in every source; ``datasets`` would try every format that Pillow knows.
        self._dataset = self._dataset.cast_column(self._image, datasets.Image(decode=False))
        if self._class is None and integers:
            log.warning(
                "%s has no column of class labels, so its images are unconditional; if there are class ids in %s, "
                "set data.label_column=…",
                self._label,
                " or ".join(integers),
            )
        self._decoder = decoder

    def _pick(self, key: str, wanted: str | None, usual: Sequence[str], possible: Sequence[str]) -> str | None:
        """The ``wanted`` column, else the only one of the ``usual`` ones; None if there is none."""
        if wanted is not None and wanted not in possible:
            raise ValueError(
                f"data.{key}={wanted}: {self._label} has no such column; it could be {' or '.join(possible) or 'none'}"
            )
        if wanted is None and len(usual) > 1:
            raise ValueError(
                f"{self._label} has several columns to choose from: set data.{key} to {' or '.join(usual)}"
            )
        return wanted or next(iter(usual), None)

    def _class_names(self) -> tuple[str, ...]:
        """The names of the class label column, or the ids as text."""
        feature = self._dataset.features[self._class]
        if hasattr(feature, "names"):
            return tuple(feature.names)
        ids = self._dataset.unique(self._class)
        wrong = [number for number in ids if number is None or number < 0]
        if wrong:
            raise ValueError(f"data.label_column={self._class} of {self._label} holds {wrong[0]}, which is no class id")
        check_class(max(ids))
        return tuple(map(str, range(1 + max(ids))))

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        try:
            row = self._dataset[int(index)]
            held = row[self._image]
            if held is None:
                raise ValueError("it is empty")
            with io.BytesIO(held["bytes"]) if held["bytes"] is not None else open(held["path"], "rb") as file:
                image = self._decoder.read(file)
        except DECODING_ERRORS as error:
            raise UnreadableImageError(self.name(index), str(error)) from error
        return image, row[self._class] if self._class is not None else UNCONDITIONAL

    def name(self, index: int) -> str:
        return f"{self._label}[{index}]"

    def fingerprint(self) -> str:
        return self._fingerprint

    def captions(self, index: int) -> tuple[str, ...]:
        if self._texts is None:
            return ()
        ((column, value),) = self._texts[int(index)].items()
        try:
            return texts_of(value)
        except (TypeError, ValueError) as error:
            raise CaptionError(f"data.caption_column={column} of {self.name(index)}: {error}") from error


def _pick_split(loaded: Any, split: str | None, label: str) -> Any:
    if not isinstance(loaded, dict):
        return loaded
    if split not in loaded:
        raise ValueError(f"{label} has the splits {', '.join(loaded)}; got data.split={split}")
    return loaded[split]

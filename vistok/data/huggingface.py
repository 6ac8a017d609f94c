"""Images of Hugging Face's ``datasets``: from the hub, or saved with ``save_to_disk``."""

from __future__ import annotations

from typing import Any

from PIL import Image

from vistok.config import ConfigError
from vistok.data.sources import DECODING_ERRORS, UNCONDITIONAL, ImageSource, UnreadableImageError, convert, hash_lines


class HuggingFaceSource(ImageSource):
    """A map-style data set with one image column, and a class label column if it is to be conditional.

    Args:
        name: id on the hub, as ``datasets.load_dataset`` takes it; or None.
        root: folder that ``save_to_disk`` wrote; or None.
        split: of the data set, for example "train", "validation", "train[:10%]"; None where there are no splits.

    Raises:
        ConfigError: ``datasets`` is not installed.
        ValueError: no such split, or not exactly one image column.
    """

    def __init__(self, name: str | None, root: str | None, *, split: str | None = "train", channels: int = 3) -> None:
        try:
            import datasets
        except ImportError as error:
            raise ConfigError("data.source=huggingface needs datasets; pip install 'vistok[datasets]'") from error
        self._label = name or str(root)
        loaded = datasets.load_dataset(name, split=split) if name else datasets.load_from_disk(str(root))
        self._dataset = _pick_split(loaded, split, self._label)
        features = self._dataset.features
        images = [key for key, feature in features.items() if isinstance(feature, datasets.Image)]
        if len(images) != 1:
            raise ValueError(f"{self._label} has the image columns {images}; vistok reads data sets with exactly one")
        classes = [key for key, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
        self._image, self._class = images[0], classes[0] if classes else None
        self.classes = tuple(features[self._class].names) if classes else ()
        self._channels = channels

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        try:
            row = self._dataset[int(index)]
            image = convert(row[self._image], self._channels)
        except DECODING_ERRORS as error:
            raise UnreadableImageError(self.name(index), str(error)) from error
        return image, row[self._class] if self._class is not None else UNCONDITIONAL

    def name(self, index: int) -> str:
        return f"{self._label}[{index}]"

    def fingerprint(self) -> str:
        return hash_lines([f"huggingface {self._dataset._fingerprint} {len(self)}"])


def _pick_split(loaded: Any, split: str | None, label: str) -> Any:
    if not isinstance(loaded, dict):
        return loaded
    if split not in loaded:
        raise ValueError(f"{label} has the splits {', '.join(loaded)}; got data.split={split}")
    return loaded[split]

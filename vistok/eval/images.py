"""Sets of images to be scored: folders, .npz batches, tar shards, run folders and tensors, as streams of 8-bit RGB.

``open_images`` checks a set when it is opened (headers only), so that an evaluation of hours does not stop at its last
image; pixels are decoded batch by batch and never kept.
"""

from __future__ import annotations

import io
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor

from vistok.data.pictures import to_uint8
from vistok.eval.decoding import EXTENSIONS, LOSSY_EXTENSIONS, ImageError, common_size, decode, size_of
from vistok.eval.shards import TarImages, shards_in

RUN_MARKERS = ("metrics.jsonl", "config.yaml")
GRID_FILE = "grid.png"  # `vistok sample` puts an overview beside the samples; it is not one of them


class ImageSet(Protocol):
    """A set of equally large RGB images in a fixed order.

    Attributes:
        source: where it came from, for reports.
        count: number of images.
        size: (H, W).
        names: one per image (file names without extension), or None where images have none.
        lossy: number of images from lossily compressed files.
    """

    source: str
    count: int
    size: tuple[int, int]
    names: list[str] | None
    lossy: int

    def batches(self, batch_size: int, start: int = 0, stop: int | None = None) -> Iterator[Tensor]:
        """Yield uint8 (B, 3, H, W) of images ``start`` to ``stop``, in order; the last batch may be smaller."""
        ...


def open_images(source: str | Path | Sequence[str | Path] | Tensor | ImageSet, *, crop: int | None = None) -> ImageSet:
    """Open a set of images.

    Args:
        source: a folder of PNG or JPEG files (sub-folders included, sorted by path), or of webdataset shards; one such
            ``.tar``, or a list of them; an ADM-style ``.npz`` with ``arr_0``, uint8 (N, H, W, 3); a vistok run folder,
            whose ``samples`` are taken; a tensor (N, 1 or 3, H, W), uint8 or float in [-1, 1]; or a set that is open
            already.
        crop: side to which ADM's centre crop brings every image of a folder or shard, whatever its size.

    Raises:
        ImageError: nothing there, no images, mixed sizes without ``crop``, unreadable files, an ``.npz`` without
            ``arr_0``, NaN, or a crop of images that are pixels already.
    """
    if crop is not None and crop < 1:
        raise ImageError(f"crop must be at least 1 pixel, got {crop}")
    if isinstance(source, list | tuple):
        return TarImages([Path(file) for file in source], crop=crop)
    if not isinstance(source, (str, Path)):
        return _no_crop(TensorImages(source) if isinstance(source, Tensor) else source, crop)
    path = Path(source)
    if path.is_dir() and is_run(path):
        return open_images(_samples_of_run(path), crop=crop)
    if path.is_dir():
        shards = shards_in(path)
        return TarImages(shards, crop=crop) if shards else FolderImages(path, crop=crop)
    if not path.exists():
        raise ImageError(f"there is no folder or file {path}")
    if path.suffix == ".npz":
        return _no_crop(NpzImages(path), crop)
    if path.suffix == ".tar":
        return TarImages([path], crop=crop)
    raise ImageError(f"cannot read images from {path}; expected a folder, an .npz or .tar file, or a run folder")


def _no_crop(images: ImageSet, crop: int | None) -> ImageSet:
    if crop is not None and images.size != (crop, crop):
        raise ImageError(
            f"{images.source} holds pixels of {images.size[0]}x{images.size[1]}; crop={crop} applies to image files "
            "only (folders, .tar shards)"
        )
    return images


def is_run(folder: Path) -> bool:
    """Whether ``folder`` is a vistok run, whose own pictures (previews) are not what is to be scored."""
    return any((folder / name).is_file() for name in RUN_MARKERS)


def _samples_of_run(folder: Path) -> Path:
    for candidate in (folder / "samples", folder / "samples.npz"):
        if candidate.exists():
            return candidate
    raise ImageError(
        f"the run {folder} has no samples yet; make some with: vistok sample {folder} --out {folder}/samples"
    )


class FolderImages:
    """PNG and JPEG files of a folder and its sub-folders, sorted by path; converted to RGB.

    Args:
        crop: side to which ADM's centre crop brings every image; None takes files of one size as they are.
    """

    def __init__(self, folder: str | Path, *, crop: int | None = None):
        folder = Path(folder)
        self.source = str(folder)
        self.files = _image_files(folder)
        if not self.files:
            raise ImageError(f"no images in {folder}; expected {', '.join(EXTENSIONS)} files there or in sub-folders")
        self.names = [file.relative_to(folder).with_suffix("").as_posix() for file in self.files]
        self.count = len(self.files)
        self.lossy = sum(file.suffix.lower() in LOSSY_EXTENSIONS for file in self.files)
        self._crop = crop
        sizes = ((str(file), size_of(file, str(file))) for file in self.files)
        self.size = common_size(sizes) if crop is None else (crop, crop)

    def batches(self, batch_size: int, start: int = 0, stop: int | None = None) -> Iterator[Tensor]:
        files = self.files[start:stop]
        with ThreadPoolExecutor(max_workers=4) as pool:  # decoding releases the interpreter lock
            for first in range(0, len(files), batch_size):
                batch = files[first : first + batch_size]
                yield torch.stack(list(pool.map(lambda file: decode(file, str(file), self._crop), batch)))


def _image_files(folder: Path) -> list[Path]:
    files = (
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in EXTENSIONS and path.name != GRID_FILE and not path.name.startswith(".")
    )
    return sorted(files, key=lambda path: path.relative_to(folder).as_posix())


class NpzImages:
    """``arr_0`` of an ADM-style ``.npz``, uint8 (N, H, W, 3), read straight out of the archive."""

    names: ClassVar[None] = None
    lossy: ClassVar[int] = 0
    key: ClassVar[str] = "arr_0"

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.source = str(path)
        try:
            with zipfile.ZipFile(self.path) as archive:
                members = [name.removesuffix(".npy") for name in archive.namelist()]
                if self.key not in members:
                    raise ImageError(
                        f"{path} has no array {self.key!r} of images (N, H, W, 3); it holds: "
                        f"{', '.join(members) or 'nothing'}"
                    )
                with archive.open(f"{self.key}.npy") as file:
                    shape, order, dtype = _read_header(file)
        except (zipfile.BadZipFile, OSError) as error:
            raise ImageError(f"{path} is not a readable .npz file: {error}") from error
        if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or order == "F":
            layout = "column-major " if order == "F" else ""
            raise ImageError(
                f"{self.key!r} of {path} is {layout}{dtype} {shape}; expected row-major uint8 (N, H, W, 3)"
            )
        if shape[0] == 0:
            raise ImageError(f"{path} holds no images: {self.key!r} has shape {shape}")
        self.count = shape[0]
        self.size = (shape[1], shape[2])

    def batches(self, batch_size: int, start: int = 0, stop: int | None = None) -> Iterator[Tensor]:
        height, width = self.size
        bytes_per_image = height * width * 3
        stop = self.count if stop is None else min(stop, self.count)
        with zipfile.ZipFile(self.path) as archive, archive.open(f"{self.key}.npy") as file:
            _read_header(file)
            file.seek(start * bytes_per_image, io.SEEK_CUR)
            for first in range(start, stop, batch_size):
                rows = min(batch_size, stop - first)
                try:
                    data = file.read(rows * bytes_per_image)
                except (zipfile.BadZipFile, zlib.error, EOFError) as error:
                    raise ImageError(f"{self.source} is damaged: {error}") from error
                if len(data) < rows * bytes_per_image:
                    raise ImageError(f"{self.source} ends within image {first + len(data) // bytes_per_image}")
                pixels = np.frombuffer(bytearray(data), np.uint8).reshape(rows, height, width, 3)
                # Contiguous, so that the same images give the same features to the last bit wherever they come from.
                yield torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()  # (B, 3, H, W)


def _read_header(file: IO[bytes]) -> tuple[tuple[int, ...], str, np.dtype]:
    """Shape, memory order ("C" or "F") and dtype of the .npy stream, which is left at its first value."""
    try:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(file)
    except ValueError as error:
        raise ImageError(f"not a .npy array: {error}") from error
    return shape, "F" if fortran else "C", dtype


class TensorImages:
    """Images in memory, grey or RGB: uint8, or float in [-1, 1] that becomes 8-bit by 127.5 x + 128, truncated."""

    source: ClassVar[str] = "tensor"
    names: ClassVar[None] = None
    lossy: ClassVar[int] = 0

    def __init__(self, pixels: Tensor):
        if pixels.ndim != 4 or pixels.shape[1] not in (1, 3) or len(pixels) == 0:
            raise ImageError(f"expected images (N, 1 or 3, H, W) with N > 0, got {tuple(pixels.shape)}")
        if pixels.dtype != torch.uint8:
            try:
                pixels = to_uint8(pixels)
            except ValueError as error:
                raise ImageError(str(error)) from error
        self.pixels = pixels.expand(-1, 3, -1, -1).cpu().contiguous()  # grey becomes RGB
        self.count = len(pixels)
        self.size = (pixels.shape[2], pixels.shape[3])

    def batches(self, batch_size: int, start: int = 0, stop: int | None = None) -> Iterator[Tensor]:
        part = self.pixels[start:stop]
        return iter(part.split(batch_size)) if len(part) else iter(())

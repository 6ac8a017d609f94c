"""Sets of images to be scored, as streams of 8-bit RGB: folders, archives, .npz files, tar shards, runs, tensors.

Files are found and decoded by the same code as in training (:mod:`vistok.data.imagefiles`). ``open_images`` checks all
headers when it opens a set, so that an evaluation of hours does not fail at its last image. Pixels are decoded batch by
batch and never kept.
"""

from __future__ import annotations

import io
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, ClassVar, Protocol, cast

import numpy as np
import torch
from torch import Tensor

from vistok.checkpoints.bounds import OversizedError, check_bytes
from vistok.data.decoding import DECODING_ERRORS, Header, ImageDecoder, Reading
from vistok.data.files import NPY_ERRORS, open_tree, other_format, printable
from vistok.data.folders import divided_at
from vistok.data.formats import extension, image_extensions, is_image, is_lossy, without_extension
from vistok.data.imagefiles import ImageFiles, LeftOut, TreeFiles
from vistok.data.pictures import to_uint8
from vistok.data.shards import ShardFiles, shard_paths
from vistok.data.transforms import center_crop_adm
from vistok.utils.files import cache_folder

RUN_MARKERS = (("metrics.jsonl",), ("config.yaml", "environment.json"))
"""A run folder has all files of one of these sets. A config.yaml alone is not enough: it can lie beside photos."""
FARTHEST = 2.0
"""A float pixel beyond this hints at another range than [-1, 1], of which decoders leave a little."""
THREADS = 4  # decoding releases the interpreter lock


class ImageError(ValueError):
    """A set of images cannot be scored: it is empty, unreadable, of mixed sizes, or of another format."""


@dataclass(frozen=True)
class FilesRead:
    """The files that were read from a folder, an archive or shards, and those that were not.

    Attributes:
        reading: how they were read: "photo" or "raw", see ``vistok.data.decoding.Reading``.
        formats: number of files by extension.
        turned, transparent, deep: number of files that have an EXIF rotation, an alpha channel, or more than 8 bits per
            channel.
        left_out: files that were not read.
        splits: the folder whose sub-folders are splits, all of which were read; None if there are no splits.
    """

    reading: Reading
    formats: dict[str, int]
    turned: int
    transparent: int
    deep: int
    left_out: LeftOut
    splits: str | None = None


class ImageSet(Protocol):
    """A set of equally large RGB images in a fixed order.

    Attributes:
        source: where it came from, for reports.
        count: number of images.
        size: (H, W).
        names: one per image (file names without extension), or None where images have none.
        lossy: number of images from lossily compressed files.
        files_read: the files that were read, or None if the images did not come from files.
    """

    @property
    def source(self) -> str: ...

    @property
    def count(self) -> int: ...

    @property
    def size(self) -> tuple[int, int]: ...

    @property
    def names(self) -> list[str] | None: ...

    @property
    def lossy(self) -> int: ...

    @property
    def files_read(self) -> FilesRead | None: ...

    def batches(self, batch_size: int, start: int = 0, stop: int | None = None) -> Iterator[Tensor]:
        """Yield uint8 (B, 3, H, W) of images ``start`` to ``stop``, in order; the last batch may be smaller."""
        ...


def open_images(
    source: str | Path | Sequence[str | Path] | Tensor | ImageSet,
    *,
    crop: int | None = None,
    reading: Reading = "photo",
) -> ImageSet:
    """Open a set of images.

    Args:
        source: a folder or .zip of image files (sub-folders included, sorted by path), or a folder of webdataset
            shards; one such ``.tar``, a pattern of them (``shards/{00..09}.tar``), or a list; an ADM-style ``.npz``
            with ``arr_0``, uint8 (N, H, W, 3); a vistok run folder, whose ``samples`` are taken; a tensor (N, 1 or 3,
            H, W), uint8 or float in [-1, 1]; or an open ``ImageSet``.
        crop: side in pixels; every image file is resized and cropped to it by ADM's centre crop.
        reading: how image files are read.

    Raises:
        ImageError: there is nothing or no image at ``source``, sizes differ without ``crop``, a file is unreadable, an
            ``.npz`` has no ``arr_0``, values are NaN, or ``crop`` is given for pixels of another size.
    """
    if crop is not None and crop < 1:
        raise ImageError(f"crop must be at least 1 pixel, got {crop}")
    if crop is not None:
        try:
            check_bytes(f"an image of {crop:,} x {crop:,} pixels (crop={crop})", 3 * crop * crop)
        except OversizedError as error:
            raise ImageError(str(error)) from error
    if isinstance(source, list | tuple):
        return TarImages([Path(file) for file in source], crop=crop, reading=reading)
    if not isinstance(source, (str, Path)):
        opened = TensorImages(source) if isinstance(source, Tensor) else source
        return _no_crop(cast(ImageSet, opened), crop)
    path = Path(source).expanduser()
    if path.is_dir() and is_run(path):
        return open_images(_samples_of_run(path), crop=crop, reading=reading)
    if path.is_dir():
        shards = shards_in(path)
        if shards:
            return TarImages(shards, crop=crop, reading=reading)
        return FolderImages(path, crop=crop, reading=reading)
    if not path.exists():
        return TarImages(_shards_of(path), crop=crop, reading=reading)
    if path.suffix == ".npz":
        return _no_crop(NpzImages(path), crop)
    if path.suffix == ".tar":
        return TarImages([path], crop=crop, reading=reading)
    if path.suffix.lower() == ".zip":
        return FolderImages(path, crop=crop, reading=reading)
    raise ImageError(
        f"cannot read images from {path}; expected a folder, a .zip, .npz or .tar file, or a run folder"
        f"{other_format(path) if path.is_file() else ''}"
    )


def _shards_of(pattern: Path) -> list[Path]:
    """The shards that match a pattern. Raises ImageError if the path is no pattern, or nothing matches."""
    if pattern.suffix == ".tar" and any(sign in str(pattern) for sign in "{*?["):
        try:
            return [Path(str(path)) for path in shard_paths(str(pattern))]
        except (OSError, ValueError) as error:
            raise ImageError(str(error)) from error
    raise ImageError(f"there is no folder or file {pattern}")


def shards_in(folder: Path) -> list[Path]:
    """The .tar files of a folder; empty if there are image files beside them."""
    files = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    if any(is_image(path.name) for path in files):
        return []
    return [path for path in files if path.suffix == ".tar"]


def _no_crop(images: ImageSet, crop: int | None) -> ImageSet:
    if crop is not None and images.size != (crop, crop):
        raise ImageError(
            f"{images.source} holds pixels of {images.size[0]}x{images.size[1]}; crop={crop} applies to image files "
            "only (folders, archives, shards)"
        )
    return images


def is_run(folder: Path) -> bool:
    """Whether ``folder`` is a vistok run. Its own pictures are previews, not the samples to be scored."""
    return any(all((folder / name).is_file() for name in names) for names in RUN_MARKERS)


def _samples_of_run(folder: Path) -> Path:
    for candidate in (folder / "samples", folder / "samples.npz"):
        if candidate.exists():
            return candidate
    raise ImageError(
        f"the run {folder} has no samples yet; make some with: vistok sample {folder} --out {folder}/samples"
    )


class FileImages:
    """Image files as a set, in the order of their paths.

    Args:
        files: the image files.
        crop: side in pixels of ADM's centre crop; None takes images of one size as they are.
        reading: how they are read.

    Raises:
        ImageError: there are no images, one cannot be read, or sizes differ.
    """

    def __init__(self, files: ImageFiles, *, crop: int | None, reading: Reading) -> None:
        self.source, self._files, self._crop = files.source, files, crop
        self._decoder = ImageDecoder(3, reading, side=crop)
        if not len(files):
            beside = f" ({files.left_out})" if files.left_out.count else ""
            raise ImageError(f"no images in {self.source}; expected {', '.join(image_extensions())} files{beside}")
        self._order = sorted(range(len(files)), key=files.path)
        paths = [files.path(index) for index in self._order]
        self.names = [printable(without_extension(path)) for path in paths]
        self.count = len(paths)
        self.lossy = sum(map(is_lossy, paths))
        with ThreadPoolExecutor(THREADS) as pool:
            headers = list(pool.map(self._header, self._order))
        sizes = ((files.name(index), header.size) for index, header in zip(self._order, headers))
        self.size = common_size(sizes) if crop is None else (crop, crop)
        self.files_read = FilesRead(
            reading,
            dict(sorted(Counter(map(extension, paths)).items())),
            turned=sum(header.turned for header in headers),
            transparent=sum(header.transparent for header in headers),
            deep=sum(header.deep for header in headers),
            left_out=files.left_out,
            splits=divided_at(paths),
        )

    def batches(self, batch_size: int, start: int = 0, stop: int | None = None) -> Iterator[Tensor]:
        order = self._order[start:stop]
        with ThreadPoolExecutor(THREADS) as pool:
            for first in range(0, len(order), batch_size):
                yield torch.stack(list(pool.map(self._decode, order[first : first + batch_size])))

    def _header(self, index: int) -> Header:
        try:
            with self._files.open(index) as file:
                return self._decoder.header(file)
        except DECODING_ERRORS as error:
            raise ImageError(f"cannot read the image {self._files.name(index)}: {error}") from error

    def _decode(self, index: int) -> Tensor:
        """uint8 (3, H, W)."""
        try:
            with self._files.open(index) as file:
                image = self._decoder.read(file)
        except DECODING_ERRORS as error:
            raise ImageError(f"cannot read the image {self._files.name(index)}: {error}") from error
        if self._crop is not None and image.size != (self._crop, self._crop):
            image = center_crop_adm(image, self._crop)
        if image.size != self.size[::-1]:
            raise ImageError(f"the image {self._files.name(index)} is turned: give crop=SIZE, or turn it first")
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)


class FolderImages(FileImages):
    """The image files of a folder or .zip file, sub-folders included."""

    def __init__(self, folder: str | Path, *, crop: int | None = None, reading: Reading = "photo"):
        try:
            files = TreeFiles(open_tree(folder))
        except (OSError, ValueError) as error:
            raise ImageError(str(error)) from error
        super().__init__(files, crop=crop, reading=reading)


class TarImages(FileImages):
    """The images of webdataset shards in the order of their names, whatever their order in the shards.

    So shards that several processes wrote give the same order as the folder that they were made from. See
    :mod:`vistok.data.tar` for the key and the image of a sample; labels and captions are not read.

    Raises:
        ImageError: as ``FileImages``; or a shard cannot be read, or is given twice.
    """

    def __init__(self, shards: Sequence[Path], *, crop: int | None = None, reading: Reading = "photo"):
        twice = next((path for path, count in Counter(map(str, shards)).items() if count > 1), None)
        try:
            files = ShardFiles(shards, _index_cache())
        except (OSError, ValueError) as error:
            raise ImageError(str(error)) from error
        if twice is not None:
            key = Path(files.path(0)).with_suffix("")
            raise ImageError(f"the key {str(key)!r} has two images: the shard {twice} is given twice")
        super().__init__(files, crop=crop, reading=reading)


def _index_cache() -> Path | None:
    try:
        return cache_folder("shards")
    except RuntimeError:  # no home directory
        return None


def common_size(sizes: Iterable[tuple[str, tuple[int, int]]]) -> tuple[int, int]:
    """The common (H, W) of named images.

    Raises:
        ImageError: sizes differ, or there are no images.
    """
    first: tuple[str, tuple[int, int]] | None = None
    for name, size in sizes:
        first = first or (name, size)
        if size != first[1]:
            raise ImageError(
                f"images of mixed sizes: {first[0]} is {first[1][0]}x{first[1][1]} (height x width), {name} is "
                f"{size[0]}x{size[1]}; bring all to one size first, because a resize changes the score (for a "
                "reference, crop=SIZE, on the command line --crop SIZE, is the centre crop of the ImageNet papers)"
            )
    if first is None:
        raise ImageError("there are no images")
    return first[1]


class NpzImages:
    """``arr_0`` of an ADM-style ``.npz``, uint8 (N, H, W, 3), read straight out of the archive."""

    names: ClassVar[None] = None
    lossy: ClassVar[int] = 0
    key: ClassVar[str] = "arr_0"
    files_read: ClassVar[None] = None

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
        except ImageError:
            raise
        except (*NPY_ERRORS, *DECODING_ERRORS, RuntimeError) as error:  # RuntimeError: zipfile's word for a password
            raise ImageError(f"{path} is not a readable .npz file: {error}") from error
        if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or order == "F":
            layout = "column-major " if order == "F" else ""
            raise ImageError(
                f"{self.key!r} of {path} is {layout}{dtype} {shape}; expected row-major uint8 (N, H, W, 3)"
            )
        if min(shape) < 1:
            raise ImageError(f"{path} holds no images: {self.key!r} has shape {shape}")
        self.count = shape[0]
        self.size = (shape[1], shape[2])

    def batches(self, batch_size: int, start: int = 0, stop: int | None = None) -> Iterator[Tensor]:
        height, width = self.size
        bytes_per_image = height * width * 3
        stop = self.count if stop is None else min(stop, self.count)
        with zipfile.ZipFile(self.path) as archive, archive.open(f"{self.key}.npy") as file:
            _read_header(file)
            for first in range(start, stop, batch_size):
                rows = min(batch_size, stop - first)
                try:
                    if first == start:
                        file.seek(start * bytes_per_image, io.SEEK_CUR)
                    data = file.read(rows * bytes_per_image)
                except DECODING_ERRORS as error:
                    raise ImageError(f"{self.source} is damaged: {error}") from error
                if len(data) < rows * bytes_per_image:
                    raise ImageError(f"{self.source} ends within image {first + len(data) // bytes_per_image}")
                pixels = np.frombuffer(bytearray(data), np.uint8).reshape(rows, height, width, 3)
                # Contiguous, so that the same images give the same features to the last bit from any kind of source.
                yield torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()  # (B, 3, H, W)


def _read_header(file: IO[bytes]) -> tuple[tuple[int, ...], str, np.dtype]:
    """Shape, memory order ("C" or "F") and dtype of a .npy stream; the stream is left at the first value."""
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(file)
    return shape, "F" if fortran else "C", dtype


class TensorImages:
    """Images in memory, grey or RGB: uint8, or float in [-1, 1], which becomes 8 bit by 127.5 x + 128, truncated.

    Attributes:
        doubtful: the smallest and the largest of the float values, if they hint at another range; else None.
    """

    source: ClassVar[str] = "tensor"
    files_read: ClassVar[None] = None
    names: ClassVar[None] = None
    lossy: ClassVar[int] = 0

    def __init__(self, pixels: Tensor):
        if pixels.ndim != 4 or pixels.shape[1] not in (1, 3) or len(pixels) == 0:
            raise ImageError(f"expected images (N, 1 or 3, H, W) with N > 0, got {tuple(pixels.shape)}")
        self.doubtful: tuple[float, float] | None = None
        if pixels.dtype != torch.uint8:
            low, high = float(pixels.min()), float(pixels.max())
            if high > FARTHEST or (low >= 0 and low < high):
                self.doubtful = low, high
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

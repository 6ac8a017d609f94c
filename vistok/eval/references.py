"""The two sides of an evaluation. A side is a set of images, stored statistics of its features, or both.

Stored moments are ``.npz`` files in ADM's layout: ``mu`` and ``sigma`` of the pooled features, ``mu_s`` and ``sigma_s``
of the spatial ones, and often ``arr_0``, images for precision and recall. Files from ``make_reference`` hold some
pooled features in place of images. They also record how they were made, so that a file that does not fit is refused.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vistok.data.decoding import DECODING_ERRORS, Reading
from vistok.data.files import NPY_ERRORS
from vistok.eval.features import extract_features
from vistok.eval.images import ImageError, ImageSet, NpzImages, open_images
from vistok.eval.metrics import Gaussian, check_symmetric, is_positive
from vistok.eval.networks import FeatureNetwork
from vistok.utils.files import atomic_file, check_file_to_write
from vistok.utils.processes import ALONE, Processes

MOMENT_KEYS = {"pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}
ROWS_KEY = "pool"
KEPT_ROWS = 10_000  # pooled features in a reference file; ADM's precision and recall use as many reference images
SPLITS = ("train", "val", "test")
HELD_OUT = ("val", "test")

WRONG_REFERENCE = (
    "reconstructions are compared with the held-out images that were reconstructed, generated images with the training "
    "set. The mix-up is the commonest mistake: one tokenizer scores rFID 4.28 against the training statistics "
    "instead of 2.19, another 2.70 instead of 0.92, a third 1.90 instead of 0.577"
)


class InvalidReferenceError(ValueError):
    """A reference that cannot be used: keys are missing, it is damaged, or it was made by another network or resize."""


NUMBERS = ("count", "crop")
"""The fields of ``Provenance`` that are numbers; the others are texts."""


@dataclass(frozen=True)
class Provenance:
    """What a reference file records about itself; None where it records nothing, as in files of other tools.

    Attributes:
        count: number of images behind the moments.
        network, weights_sha256, resize: what made the features.
        split: "train", "val" or "test".
        crop: side of ADM's centre crop of the images in pixels, 0 if none.
        reading: how the image files were read, "photo" or "raw".
        image_size: height and width of the images, as text "HxW".
        fingerprint: SHA-256 over the images' pixels.
        moments_sha256, rows_sha256: hashes of the moments and of the stored pooled features when the file was made.
    """

    count: int | None = None
    network: str | None = None
    weights_sha256: str | None = None
    resize: str | None = None
    split: str | None = None
    crop: int | None = None
    reading: str | None = None
    image_size: str | None = None
    fingerprint: str | None = None
    moments_sha256: str | None = None
    rows_sha256: str | None = None


@dataclass(frozen=True)
class Reference:
    """One side of an evaluation: usually the reference, but the images that are scored can be stored as well.

    Attributes:
        source: where it came from, for reports.
        images: its images, if it has any.
        gaussians: stored moments by feature name ("pool", "spatial"); empty if they are to be computed from images.
        rows: stored pooled features (n, D) of some of its images, or None.
        provenance: what its file records about itself.
    """

    source: str
    images: ImageSet | None = None
    gaussians: dict[str, Gaussian] = field(default_factory=dict)
    rows: Tensor | None = None
    provenance: Provenance = field(default_factory=Provenance)

    @property
    def moments_sha256(self) -> str | None:
        """Hash of the stored moments in float64: equal for two files that hold the same numbers."""
        if not self.gaussians:
            return None
        digest = hashlib.sha256()
        for name in sorted(self.gaussians):
            for moment in self.gaussians[name]:
                digest.update(moment.contiguous().numpy().data)
        return digest.hexdigest()

    @property
    def rows_sha256(self) -> str | None:
        """Hash of the stored pooled features in float32."""
        return None if self.rows is None else hashlib.sha256(self.rows.contiguous().numpy().data).hexdigest()

    def check_network(self, network: FeatureNetwork, features: dict[str, Tensor]) -> None:
        """Refuse stored features that were not made by ``network``.

        Args:
            features: what ``network`` gives for some images; their widths are compared.

        Raises:
            InvalidReferenceError: the network's name, weights, resize rule or feature width differs.
        """
        recorded = self.provenance
        if recorded.network is not None and recorded.network != network.name:
            raise InvalidReferenceError(
                f"{self.source} holds moments of the network {recorded.network!r}, but the images are scored with "
                f"{network.name!r}; make the reference again with that network"
            )
        stored, used = recorded.weights_sha256, network.weights_sha256
        if stored is not None and used is not None and stored != used:
            raise InvalidReferenceError(
                f"{self.source} was made by {network.name} with weights {stored[:12]}…, but the images "
                f"are scored with weights {used[:12]}…; use the same weights file for both"
            )
        if recorded.resize is not None and recorded.resize != network.resize:
            raise InvalidReferenceError(
                f"{self.source} was made with the resize rule {recorded.resize!r}, but this protocol's is "
                f"{network.resize!r} (clean-fid's number for one published tokenizer is 2.11, ADM's 2.19); make the "
                "reference again by this protocol"
            )
        for name, gaussian in self.gaussians.items():
            if name in features and features[name].shape[1] != len(gaussian.mean):
                raise InvalidReferenceError(
                    f"{self.source} holds {name} moments of {len(gaussian.mean)} features, but {network.name} gives "
                    f"{features[name].shape[1]}; the reference was made by another network"
                )

    def check_held_out(self) -> None:
        """Refuse stored statistics of training images, or of images of unknown origin, as the reference of an rFID.

        Raises:
            InvalidReferenceError: the statistics are not of a held-out split.
        """
        if not self.gaussians or self.provenance.split in HELD_OUT:
            return
        what = "of training images" if self.provenance.split == "train" else "of unknown origin (ADM's are of training)"
        raise InvalidReferenceError(
            f"{self.source} holds statistics {what}, which cannot be the reference of reconstructions: "
            f"{WRONG_REFERENCE}. Give the original images, or a reference made of them with split='val' "
            "(command line: vistok eval IMAGES --make-reference FILE.npz --split val)"
        )


def open_reference(
    source: str | Path | Sequence[str | Path] | Tensor | ImageSet | Reference,
    *,
    crop: int | None = None,
    reading: Reading = "photo",
) -> Reference:
    """Open a side: anything that ``open_images`` takes, or an ``.npz`` with moments.

    Raises:
        InvalidReferenceError: an ``.npz`` has neither images nor complete moments, was changed after it was made, or
            was made with another ``crop``.
        ImageError: see ``open_images``.
    """
    if isinstance(source, Reference):
        return source
    if isinstance(source, (str, Path)) and Path(source).suffix == ".npz" and Path(source).is_file():
        reference = _open_npz(Path(source))
        if reference.gaussians and crop not in (None, reference.provenance.crop):
            made = "an unknown crop" if reference.provenance.crop is None else f"crop {reference.provenance.crop}"
            raise InvalidReferenceError(
                f"{source} holds statistics, which cannot be cropped to {crop}: they were made with {made}; leave crop "
                "out, or name the images"
            )
        if reference.gaussians or crop is None:
            return reference
    images = open_images(source, crop=crop, reading=reading)
    return Reference(source=images.source, images=images)


def _open_npz(path: Path) -> Reference:
    names = [item.name for item in fields(Provenance)]
    wanted = {key for pair in MOMENT_KEYS.values() for key in pair} | {ROWS_KEY, *names}
    try:
        with np.load(path, allow_pickle=False) as file:
            keys = list(file.files)
            arrays = {key: file[key] for key in keys if key in wanted}
    except (*NPY_ERRORS, *DECODING_ERRORS, RuntimeError) as error:  # RuntimeError: zipfile's word for a password
        raise InvalidReferenceError(f"{path} is not a readable .npz file: {error}") from error
    if other := [key for key, array in arrays.items() if not isinstance(array, np.ndarray)]:
        raise InvalidReferenceError(f"{path} is damaged: its member {other[0]!r} is no array; make the file again")
    gaussians = {
        name: _gaussian(path, arrays, *pair) for name, pair in MOMENT_KEYS.items() if any(key in arrays for key in pair)
    }
    if not gaussians and NpzImages.key not in keys:
        raise InvalidReferenceError(
            f"{path} holds neither images ('arr_0') nor moments ('mu' and 'sigma'); "
            f"it holds: {', '.join(keys) or 'nothing'}"
        )
    reference = Reference(
        source=str(path),
        images=NpzImages(path) if NpzImages.key in keys else None,
        gaussians=gaussians,
        rows=_rows(path, arrays[ROWS_KEY], gaussians) if ROWS_KEY in arrays else None,
        provenance=_provenance(path, arrays),
    )
    for what, key in (("moments", "moments_sha256"), ("pooled features", "rows_sha256")):
        recorded = getattr(reference.provenance, key)
        if recorded is not None and recorded != getattr(reference, key):
            raise InvalidReferenceError(
                f"{path} was changed after it was made: its {what} do not have the hash that it records; make it again"
            )
    return reference


def _provenance(path: Path, arrays: dict[str, np.ndarray]) -> Provenance:
    recorded: dict[str, Any] = {}
    for item in fields(Provenance):
        if item.name in arrays:
            if arrays[item.name].size != 1:
                raise InvalidReferenceError(f"{path}: {item.name!r} must be one value, got {arrays[item.name].shape}")
            value: Any = arrays[item.name].item()
            is_number = isinstance(value, int) and not isinstance(value, bool) and value >= 0
            if not (is_number if item.name in NUMBERS else isinstance(value, str)):
                expected = "a whole number from 0" if item.name in NUMBERS else "a text"
                raise InvalidReferenceError(f"{path}: {item.name!r} must be {expected}, got {value!r}"[:500])
            recorded[item.name] = value
    return Provenance(**recorded)


def _rows(path: Path, rows: np.ndarray, gaussians: dict[str, Gaussian]) -> Tensor:
    """Stored pooled features (n, D) as float32."""
    width = len(gaussians["pool"].mean) if "pool" in gaussians else None
    if rows.dtype.kind not in "fiu" or rows.ndim != 2 or width not in (None, rows.shape[1]):
        expected = f"real numbers (n, {'D' if width is None else width})"
        raise InvalidReferenceError(f"{ROWS_KEY!r} of {path} must be {expected}, got {rows.dtype} {rows.shape}")
    with np.errstate(over="ignore"):  # reported below
        values = torch.from_numpy(rows.astype(np.float32))
    if not bool(values.isfinite().all()):
        raise InvalidReferenceError(f"{ROWS_KEY!r} of {path} holds values that are not finite; make it again")
    return values


def _gaussian(path: Path, arrays: dict[str, np.ndarray], mean_key: str, covariance_key: str) -> Gaussian:
    for key, other in ((mean_key, covariance_key), (covariance_key, mean_key)):
        if key not in arrays:
            raise InvalidReferenceError(f"{path} has {other!r} but no {key!r}; both are needed")
        if arrays[key].dtype.kind not in "fiu":
            raise InvalidReferenceError(f"{key!r} of {path} must be real numbers, got {arrays[key].dtype}")
    mean, covariance = (torch.from_numpy(arrays[key].astype(np.float64)) for key in (mean_key, covariance_key))
    if mean.ndim != 1 or not len(mean) or covariance.shape != (len(mean), len(mean)):
        raise InvalidReferenceError(
            f"{mean_key!r} and {covariance_key!r} of {path} must be (D,) and (D, D), got {tuple(mean.shape)} and "
            f"{tuple(covariance.shape)}"
        )
    if not (bool(mean.isfinite().all()) and bool(covariance.isfinite().all())):
        raise InvalidReferenceError(f"{mean_key!r} or {covariance_key!r} of {path} holds values that are not finite")
    try:
        check_symmetric(covariance)
    except ValueError as error:
        raise InvalidReferenceError(f"{covariance_key!r} of {path}: {error}") from error
    if not is_positive(covariance):
        raise InvalidReferenceError(
            f"{covariance_key!r} of {path} is no covariance: it has negative eigenvalues; make the file again"
        )
    return Gaussian(mean, covariance)


def make_reference(
    images: str | Path | Sequence[str | Path] | Tensor | ImageSet,
    path: str | Path,
    network: FeatureNetwork,
    *,
    split: str | None = None,
    crop: int | None = None,
    reading: Reading = "photo",
    batch_size: int = 64,
    processes: Processes = ALONE,
) -> Reference:
    """Write the statistics that scores need of ``images`` to the ``.npz`` file ``path``, atomically.

    The file has ADM's layout: moments of ``network``'s features. It also holds the pooled features of up to 10,000 of
    the images, evenly spread, for precision, recall and KID. It records network, weights, resize, count, split, crop
    and fingerprints, so that ``evaluate`` refuses it where it does not fit.

    Args:
        split: which images these are: "train", "val" or "test". Without a split, the file cannot be used for rFID.
        crop, reading: see ``open_images``; each protocol fixes ``reading``.

    Raises:
        ValueError: the split is unknown, or ``path`` is no .npz.
        FileExistsError: ``path`` exists already.
        ImageError: as ``open_images``; or there is a single image.
    """
    if split is not None and split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; known: {', '.join(SPLITS)}")
    if Path(path).suffix != ".npz":
        raise ValueError(f"a reference is an .npz file; call it {path}.npz in place of {path}")
    if processes.is_first and Path(path).exists():
        raise FileExistsError(f"{path} exists already; choose another file or remove it first")
    check_file_to_write(path)
    images = open_images(images, crop=crop, reading=reading)
    if images.count < 2:
        raise ImageError(f"a reference stands for at least 2 images, and {images.source} has {images.count}")
    names = tuple(name for name in MOMENT_KEYS if name in network(next(iter(images.batches(1)))))
    extraction = extract_features(
        images, network, keep=("pool",), moments=names, batch_size=batch_size, processes=processes
    )
    pool = extraction.features["pool"]
    spread = torch.arange(min(KEPT_ROWS, len(pool))) * len(pool) // min(KEPT_ROWS, len(pool))
    reference = Reference(
        source=str(path),
        gaussians={name: moments.gaussian for name, moments in extraction.moments.items()},
        rows=pool[spread],
    )
    provenance = Provenance(
        count=extraction.count,
        network=network.name,
        weights_sha256=network.weights_sha256,
        resize=network.resize,
        split=split,
        crop=crop or 0,
        reading=images.files_read.reading if images.files_read is not None else None,
        image_size=f"{images.size[0]}x{images.size[1]}",
        fingerprint=extraction.fingerprint,
        moments_sha256=reference.moments_sha256,
        rows_sha256=reference.rows_sha256,
    )
    if processes.is_first:
        _write(reference, provenance, path)
    processes.wait()
    return open_reference(path)


def _write(reference: Reference, provenance: Provenance, path: str | Path) -> None:
    arrays: dict[str, Any] = {
        key: moment.numpy()
        for name, gaussian in reference.gaussians.items()
        for key, moment in zip(MOMENT_KEYS[name], gaussian)
    }
    recorded = {item.name: getattr(provenance, item.name) for item in fields(provenance)}
    arrays |= {key: np.array(value) for key, value in recorded.items() if value is not None}
    if reference.rows is not None:
        arrays[ROWS_KEY] = reference.rows.numpy()
    with atomic_file(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, **arrays)

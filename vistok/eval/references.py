"""What images are compared with: another set of images, or moments of features that were stored once.

Stored moments are ``.npz`` files in ADM's layout: ``mu`` and ``sigma`` of the pooled features, ``mu_s`` and ``sigma_s``
of the spatial ones, and often ``arr_0``, the images for precision and recall. Files made here also name their network.
"""

from __future__ import annotations

import hashlib
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vistok.eval.features import FeatureNetwork, extract_features
from vistok.eval.images import ImageSet, NpzImages, open_images
from vistok.eval.metrics import Gaussian
from vistok.files import atomic_file

MOMENT_KEYS = {"pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}


class InvalidReferenceError(ValueError):
    """A reference that cannot serve: without the keys, damaged, or made by another network."""


@dataclass(frozen=True)
class Reference:
    """The reference side of an evaluation.

    Attributes:
        source: where it came from.
        images: its images, if it has any.
        gaussians: stored moments by feature name ("pool", "spatial"); empty if they are to be computed from images.
        count: number of images behind the stored moments, where the file tells.
        network, weights_sha256: what made the stored moments, where the file tells.
    """

    source: str
    images: ImageSet | None = None
    gaussians: dict[str, Gaussian] = field(default_factory=dict)
    count: int | None = None
    network: str | None = None
    weights_sha256: str | None = None

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

    def check_network(self, network: FeatureNetwork, features: dict[str, Tensor]) -> None:
        """Refuse stored moments of another network than ``network``, whose ``features`` of some images are given.

        Raises:
            InvalidReferenceError: another name, other weights, or another feature width.
        """
        if self.network is not None and self.network != network.name:
            raise InvalidReferenceError(
                f"{self.source} holds moments of the network {self.network!r}, but the images are scored with "
                f"{network.name!r}; make the reference again with that network"
            )
        if None not in (self.weights_sha256, network.weights_sha256) and self.weights_sha256 != network.weights_sha256:
            raise InvalidReferenceError(
                f"{self.source} was made by {network.name} with weights {self.weights_sha256[:12]}…, but the images "
                f"are scored with weights {network.weights_sha256[:12]}…; use the same weights file for both"
            )
        for name, gaussian in self.gaussians.items():
            if name in features and features[name].shape[1] != len(gaussian.mean):
                raise InvalidReferenceError(
                    f"{self.source} holds {name} moments of {len(gaussian.mean)} features, but {network.name} gives "
                    f"{features[name].shape[1]}; the reference was made by another network"
                )


def open_reference(source: str | Path | Tensor | ImageSet | Reference) -> Reference:
    """Open a reference: anything that ``open_images`` takes, or an ``.npz`` with moments.

    Raises:
        InvalidReferenceError: an ``.npz`` with neither images nor complete moments.
        ImageError: see ``open_images``.
    """
    if isinstance(source, Reference):
        return source
    if isinstance(source, (str, Path)) and Path(source).suffix == ".npz" and Path(source).is_file():
        # A run's or a folder's images never have stored moments; only a file can.
        return _open_npz(Path(source))
    images = open_images(source)
    return Reference(source=images.source, images=images)


def _open_npz(path: Path) -> Reference:
    wanted = {key for pair in MOMENT_KEYS.values() for key in pair} | {"count", "network", "weights_sha256"}
    try:
        with np.load(path, allow_pickle=False) as file:
            keys = list(file.files)
            arrays = {key: file[key] for key in keys if key in wanted}
    except (zipfile.BadZipFile, OSError, EOFError, ValueError) as error:
        raise InvalidReferenceError(f"{path} is not a readable .npz file: {error}") from error
    gaussians = {
        name: _gaussian(path, arrays, *pair) for name, pair in MOMENT_KEYS.items() if any(key in arrays for key in pair)
    }
    if not gaussians and NpzImages.key not in keys:
        raise InvalidReferenceError(
            f"{path} holds neither images ('arr_0') nor moments ('mu' and 'sigma'); "
            f"it holds: {', '.join(keys) or 'nothing'}"
        )
    told = {key: arrays[key].item() for key in ("count", "network", "weights_sha256") if key in arrays}
    images = NpzImages(path) if NpzImages.key in keys else None
    return Reference(source=str(path), images=images, gaussians=gaussians, **told)


def _gaussian(path: Path, arrays: dict[str, np.ndarray], mean_key: str, covariance_key: str) -> Gaussian:
    for key, other in ((mean_key, covariance_key), (covariance_key, mean_key)):
        if key not in arrays:
            raise InvalidReferenceError(f"{path} has {other!r} but no {key!r}; both are needed")
    mean, covariance = (torch.from_numpy(arrays[key].astype(np.float64)) for key in (mean_key, covariance_key))
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        raise InvalidReferenceError(
            f"{mean_key!r} and {covariance_key!r} of {path} must be (D,) and (D, D), got {tuple(mean.shape)} and "
            f"{tuple(covariance.shape)}"
        )
    return Gaussian(mean, covariance)


def make_reference(
    images: str | Path | Tensor | ImageSet, path: str | Path, network: FeatureNetwork, *, batch_size: int = 64
) -> Reference:
    """Write the moments of ``network``'s features of ``images`` to the ``.npz`` file ``path``, atomically.

    The file has ADM's layout, and also names network, weights, count and fingerprint of the images, so that
    ``evaluate`` refuses it beside another network.
    """
    images = open_images(images)
    names = tuple(name for name in MOMENT_KEYS if name in network(next(iter(images.batches(1)))))
    extraction = extract_features(images, network, moments=names, batch_size=batch_size)
    arrays = {
        key: moment.cpu().numpy()
        for name, moments in extraction.moments.items()
        for key, moment in zip(MOMENT_KEYS[name], moments.gaussian)
    }
    told = {"count": extraction.count, "fingerprint": extraction.fingerprint, "network": network.name}
    if network.weights_sha256 is not None:
        told["weights_sha256"] = network.weights_sha256
    with atomic_file(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, **arrays, **{key: np.array(value) for key, value in told.items()})
    return open_reference(path)

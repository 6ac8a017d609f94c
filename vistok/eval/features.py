"""Feature networks, and one pass of a network over a set of images that serves every score.

The published scores are made by the Inception network of 2015-12-05. torch-fidelity's ``inception-v3-compat`` is that
network in PyTorch, resize included; here it also gives the spatial features that sFID needs.
"""

from __future__ import annotations

import hashlib
import io
import urllib.error
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from vistok.eval.images import ImageSet
from vistok.eval.metrics import Moments
from vistok.files import sha256
from vistok.hub import CheckpointError, read_weights

INCEPTION = "inception-v3-compat"
# torch-fidelity and pytorch-fid release the same conversion; file names carry the first digits of its SHA-256.
PUBLISHED_HASH = "6726825d"


class FeatureNetwork(Protocol):
    """What turns images into features.

    Attributes:
        name: goes into every score's record.
        weights_sha256: of the weights file, or None where the network did not come from a file.
    """

    name: str
    weights_sha256: str | None

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """uint8 (B, 3, H, W) -> float32 features: ``pool`` (B, D), and if it has them ``spatial`` (B, D') and
        ``logits`` (B, C)."""
        ...


class InceptionV3Compat:
    """torch-fidelity's conversion of the 2015-12-05 Inception graph, in float32.

    One call gives ``pool`` (B, 2048); ``logits`` (B, 1008) without bias; and ``spatial`` (B, 2023), the first 7
    channels of the 17x17 map ``mixed_6/conv`` flattened as (row, column, channel), the order of ADM's statistics.
    Images of any size are resized to 299x299 by the rule of TensorFlow 1 (no antialias, no half-pixel shift).

    Args:
        state_dict: the network's weights.
        weights_sha256: of the file that they came from.
        device: where to compute.

    Raises:
        CheckpointError: weights that do not fit.
    """

    name = INCEPTION
    spatial_channels = 7

    def __init__(self, state_dict: Mapping[str, Tensor], *, weights_sha256: str | None = None, device="cpu"):
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        # The extractor unpickles whatever path it is given. It gets tensors only, from memory.
        buffer = io.BytesIO()
        torch.save(dict(state_dict), buffer)
        buffer.seek(0)
        try:
            self.network = FeatureExtractorInceptionV3(
                self.name, ["2048", "logits_unbiased"], feature_extractor_weights_path=buffer
            )
        except RuntimeError as error:
            raise CheckpointError(f"these are not weights of {self.name}: {error}") from error
        self.device = torch.device(device)
        self.network.to(self.device)
        self.weights_sha256 = weights_sha256
        self._spatial_map: Tensor | None = None
        self.network.Mixed_6d.branch1x1.register_forward_hook(self._keep_spatial_map)

    @classmethod
    def load(cls, weights: str | Path | None = None, *, device="cpu") -> InceptionV3Compat:
        """Read the weights from the file ``weights`` (torch or safetensors), or download them once if it is None.

        Raises:
            CheckpointError: an absent, damaged or unfitting file, or a failed download.
        """
        path = Path(weights) if weights is not None else _download_inception()
        return cls(read_weights(path), weights_sha256=sha256(path), device=device)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """uint8 (B, 3, H, W) -> {"pool", "spatial", "logits"}, float32 on ``device``."""
        with full_precision():
            pool, logits = self.network(images.to(self.device))
        spatial = self._spatial_map[:, : self.spatial_channels].permute(0, 2, 3, 1).flatten(1)  # (B, 17 * 17 * 7)
        self._spatial_map = None
        return {"pool": pool, "spatial": spatial, "logits": logits}

    def _keep_spatial_map(self, module, inputs, output: Tensor) -> None:
        self._spatial_map = output


class CallableNetwork:
    """Any callable as a feature network; scores made with it carry its name and are never called FID.

    Args:
        function: uint8 (B, 3, H, W) -> features (B, D), on whatever device it likes.
        name: what the scores' record calls it.
        weights_sha256: identifies its weights, where there are any.
    """

    def __init__(self, function: Callable[[Tensor], Tensor], name: str, weights_sha256: str | None = None):
        self.function = function
        self.name = name
        self.weights_sha256 = weights_sha256

    @torch.no_grad()
    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        with full_precision():
            features = self.function(images)
        if not isinstance(features, Tensor) or features.ndim != 2 or len(features) != len(images):
            got = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise ValueError(f"the feature function {self.name!r} must return ({len(images)}, D) features, got {got}")
        return {"pool": features.float()}


def _download_inception() -> Path:
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    # torch-fidelity looks in the same place, so that one download serves both.
    path = Path(torch.hub.get_dir()) / "checkpoints" / URL_INCEPTION_V3.rsplit("/", 1)[1]
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(URL_INCEPTION_V3, str(path), hash_prefix=PUBLISHED_HASH, progress=False)
        except (urllib.error.URLError, OSError, RuntimeError) as error:
            raise CheckpointError(
                f"the Inception weights could not be fetched from {URL_INCEPTION_V3}: {error}. Fetch the file "
                "elsewhere and name it with weights=PATH (command line: --weights PATH)"
            ) from error
    return path


@contextmanager
def full_precision() -> Iterator[None]:
    """Switch TF32 off within the block: convolutions use it by default on recent GPUs, and it moves features."""
    cudnn, matmul = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = cudnn, matmul


@dataclass
class Extraction:
    """What one pass over a set of images leaves.

    Attributes:
        count: number of images.
        fingerprint: SHA-256 over the pixels, in order: equal for the same images in a folder, an .npz or a tensor.
        distinct: number of different images.
        features: the kept features, float32 (N, D), on the CPU.
        moments: running moments of the others asked for.
    """

    count: int
    fingerprint: str
    distinct: int
    features: dict[str, Tensor]
    moments: dict[str, Moments]


def extract_features(
    images: ImageSet,
    network: FeatureNetwork,
    *,
    keep: tuple[str, ...] = (),
    moments: tuple[str, ...] = (),
    batch_size: int = 64,
) -> Extraction:
    """Run ``network`` once over ``images``, with a progress bar on a terminal.

    Args:
        keep: features of which every row is kept (precision and recall, kernel distance, Inception Score).
        moments: features of which only the moments are kept (Frechet distances).

    Raises:
        ValueError: features that are not finite.
    """
    kept: dict[str, list[Tensor]] = {name: [] for name in keep}
    running: dict[str, Moments] = {}
    digests: list[bytes] = []
    for batch in _with_progress(images, batch_size):
        digests += [hashlib.sha256(image.numpy().tobytes()).digest() for image in batch.permute(0, 2, 3, 1)]
        features = network(batch)
        for name in {*keep, *moments}:
            if not bool(features[name].isfinite().all()):
                raise ValueError(
                    f"{network.name} gives {name} features that are not finite for images of {images.source}; "
                    "are its weights damaged?"
                )
        for name in keep:
            kept[name].append(features[name].cpu())
        for name in moments:
            if name not in running:
                running[name] = Moments(features[name].shape[1], _float64_device(features[name]))
            running[name].update(features[name])
    return Extraction(
        count=len(digests),
        fingerprint=hashlib.sha256(repr(images.size).encode() + b"".join(digests)).hexdigest(),
        distinct=len(set(digests)),
        features={name: torch.cat(parts) for name, parts in kept.items()},
        moments=running,
    )


def _float64_device(features: Tensor) -> torch.device:
    """Where moments are summed: beside the features on a GPU, else on the CPU (not every accelerator has float64)."""
    return features.device if features.is_cuda else torch.device("cpu")


def _with_progress(images: ImageSet, batch_size: int) -> Iterator[Tensor]:
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    batches = -(-images.count // batch_size)
    yield from track(
        images.batches(batch_size),
        description=f"features of {images.source}",
        total=batches,
        console=console,
        disable=not console.is_terminal,
    )

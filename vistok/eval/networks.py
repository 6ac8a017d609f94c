"""Feature networks: the 2015 Inception of all published FIDs, and any callable.

torch-fidelity's ``inception-v3-compat`` is that Inception in PyTorch. This module adds the spatial features that sFID
needs, and a faster implementation of the same resize. DINOv2 is in ``vistok.eval.dinov2``.
"""

from __future__ import annotations

import io
import urllib.error
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from vistok.checkpoints import CheckpointError, read_weights
from vistok.eval.resize import Rule, resize
from vistok.utils.devices import choose_device
from vistok.utils.files import sha256

INCEPTION = "inception-v3-compat"
# torch-fidelity and pytorch-fid release the same conversion; file names carry the first digits of its SHA-256.
PUBLISHED_HASH = "6726825d"


class FeatureNetwork(Protocol):
    """A feature network of images.

    Attributes:
        name: its name, which every score records.
        resize: the rule by which images are resized to its input; also recorded.
        weights_sha256: of the weights file, or None if the weights did not come from a file.
    """

    @property
    def name(self) -> str: ...

    @property
    def resize(self) -> str: ...

    @property
    def weights_sha256(self) -> str | None: ...

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """uint8 (B, 3, H, W) -> float32 features: ``pool`` (B, D), and of some networks ``spatial`` (B, D') and
        ``logits`` (B, C)."""
        ...


class InceptionV3Compat:
    """torch-fidelity's conversion of the 2015-12-05 Inception graph, in float32.

    One call gives ``pool`` (B, 2048), ``logits`` (B, 1008) without bias, and ``spatial`` (B, 2023). The latter is the
    first 7 channels of the 17x17 map ``mixed_6/conv``, flattened as (row, column, channel) as in ADM's statistics.

    Args:
        state_dict: the network's weights.
        resize: how images of any size are resized to 299x299: "tf1-bilinear", the graph's own rule, or clean-fid's
            "pil-bicubic-float".
        weights_sha256: of the file that the weights came from.
        device: where to compute.

    Raises:
        CheckpointError: the weights do not fit.
    """

    name = INCEPTION
    input_size = 299
    spatial_channels = 7

    def __init__(
        self,
        state_dict: Mapping[str, Tensor],
        *,
        resize: Rule = "tf1-bilinear",
        weights_sha256: str | None = None,
        device: torch.device | str = "cpu",
    ):
        self.network: Any = _build_inception(state_dict)  # Any: the library does not declare its layers
        self.network.to(device, memory_format=torch.channels_last)
        self.resize = resize
        self.weights_sha256 = weights_sha256
        self.device = choose_device(device)
        # The extractor's stages run in sequence; its resize is left out, because ``__call__`` resizes. CPUs and GPUs
        # run the convolutions markedly faster in channels_last, with the same float32 results.
        stages = list(self.network.children())
        self._head: Any = stages.pop()
        self._stages = nn.Sequential(*stages)
        self._spatial_map = torch.empty(0)
        self.network.Mixed_6d.branch1x1.register_forward_hook(self._keep_spatial_map)

    @classmethod
    def load(
        cls, weights: str | Path | None = None, *, resize: Rule = "tf1-bilinear", device: torch.device | str = "cpu"
    ) -> InceptionV3Compat:
        """Read the weights from the file ``weights`` (torch or safetensors), or download them once if it is None.

        Raises:
            CheckpointError: the file is absent, damaged or does not fit, or the download fails.
        """
        path = Path(weights) if weights is not None else _download_inception()
        return cls(read_weights(path), resize=resize, weights_sha256=sha256(path), device=device)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """uint8 (B, 3, H, W) -> {"pool", "spatial", "logits"}, float32 on ``device``."""
        with full_precision():
            pixels = (resize(images.to(self.device), self.input_size, self.resize) - 128) / 128
            pool = self._stages(pixels.contiguous(memory_format=torch.channels_last)).flatten(1)  # (B, 2048)
            logits = self._logits(pool)
        spatial = self._spatial_map[:, : self.spatial_channels].permute(0, 2, 3, 1).flatten(1)  # (B, 17 * 17 * 7)
        self._spatial_map = torch.empty(0)
        return {"pool": pool, "spatial": spatial, "logits": logits}

    def _logits(self, pool: Tensor) -> Tensor:
        """Logits (B, 1008) without the bias, as both suites compute them.

        In float64 on CPU and CUDA, because the float32 product depends on the number of threads.
        """
        weight = self._head.weight
        if pool.device.type in ("cpu", "cuda"):
            return (pool.double() @ weight.double().T).float()
        return pool @ weight.T

    def _keep_spatial_map(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self._spatial_map = output


def _build_inception(state_dict: Mapping[str, Tensor]) -> Any:
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    # The extractor unpickles the file that it is given, so it gets a buffer that holds tensors only.
    buffer = io.BytesIO()
    torch.save(dict(state_dict), buffer)
    buffer.seek(0)
    try:
        return FeatureExtractorInceptionV3(INCEPTION, ["2048"], feature_extractor_weights_path=buffer).eval()
    except RuntimeError as error:
        raise CheckpointError(f"these are not weights of {INCEPTION}: {error}") from error


class CallableNetwork:
    """Any callable as a feature network; its scores record its name and are never called FID.

    Args:
        function: uint8 (B, 3, H, W) -> features (B, D), on any device.
        name: the name that scores record.
        weights_sha256: hash of its weights, if it has any.

    Raises:
        ValueError: the name is Inception's.
    """

    resize = "as the function does"

    def __init__(self, function: Callable[[Tensor], Tensor], name: str, weights_sha256: str | None = None):
        if name == INCEPTION:
            raise ValueError(f"{INCEPTION!r} is the name of the Inception network; give your own network another one")
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

    # torch-fidelity looks in the same place, so one download is enough for both.
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
    """Switch TF32 off within the block: convolutions use it by default on recent GPUs, and it changes features."""
    cudnn, matmul = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = cudnn, matmul

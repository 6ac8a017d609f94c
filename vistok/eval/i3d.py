"""The I3D network whose logits are the features of the Frechet video distance.

I3D: Carreira & Zisserman, arXiv 1705.07750, trained on Kinetics-400. FVD: Unterthiner et al., arXiv 1812.01717. The
PyTorch port here is the one that VideoGPT, TATS and cd-fvd use (``i3d_pretrained_400.pt``, github.com/songweige/TATS).
``TorchScriptI3D`` runs the TorchScript file of StyleGAN-V, which LARP uses.
"""

from __future__ import annotations

import urllib.error
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vistok.checkpoints import CheckpointError, load_strictly, read_weights
from vistok.eval.networks import full_precision
from vistok.utils.devices import choose_device
from vistok.utils.files import sha256

I3D = "i3d-kinetics400"
I3D_RANDOM = "i3d-random-weights"
WEIGHTS_URL = "https://github.com/songweige/TATS/raw/main/tats/fvd/i3d_pretrained_400.pt"
MIN_FRAMES = 9  # fewer leave too little for the last average pool

# Widths of the branches [b0, b1a, b1b, b2a, b2b, b3b] of the mixed blocks.
MIXED = {
    "Mixed_3b": (64, 96, 128, 16, 32, 32),
    "Mixed_3c": (128, 128, 192, 32, 96, 64),
    "Mixed_4b": (192, 96, 208, 16, 48, 64),
    "Mixed_4c": (160, 112, 224, 24, 64, 64),
    "Mixed_4d": (128, 128, 256, 24, 64, 64),
    "Mixed_4e": (112, 144, 288, 32, 64, 64),
    "Mixed_4f": (256, 160, 320, 32, 128, 128),
    "Mixed_5b": (256, 160, 320, 32, 128, 128),
    "Mixed_5c": (384, 192, 384, 48, 128, 128),
}


def same_padding(x: Tensor, kernel: tuple[int, int, int], stride: tuple[int, int, int]) -> Tensor:
    """Pad (B, C, T, H, W) with zeros like TensorFlow's "SAME": it depends on the input's size; an odd one goes last."""
    amounts: list[int] = []
    for size, k, s in reversed(list(zip(x.shape[2:], kernel, stride))):
        total = max(k - (size % s or s), 0)
        amounts += [total // 2, total - total // 2]
    return F.pad(x, amounts)


class Unit3D(nn.Module):
    """Convolution with "SAME" padding, batch norm, ReLU."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int, stride: int = 1):
        super().__init__()
        self.kernel, self.stride = (kernel,) * 3, (stride,) * 3
        self.conv3d = nn.Conv3d(in_channels, out_channels, kernel, stride, bias=False)
        self.bn = nn.BatchNorm3d(out_channels, eps=1e-5)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv3d(same_padding(x, self.kernel, self.stride))))


class MaxPool3D(nn.Module):
    """Max pooling with "SAME" padding by zeros."""

    def __init__(self, kernel: tuple[int, int, int], stride: tuple[int, int, int]):
        super().__init__()
        self.kernel, self.stride = kernel, stride

    def forward(self, x: Tensor) -> Tensor:
        return F.max_pool3d(same_padding(x, self.kernel, self.stride), self.kernel, self.stride)


class Mixed(nn.Module):
    """Four parallel branches: 1x1x1; twice 1x1x1 then 3x3x3; max pooling then 1x1x1."""

    def __init__(self, in_channels: int, widths: tuple[int, ...]):
        super().__init__()
        b0, b1a, b1b, b2a, b2b, b3b = widths
        self.b0 = Unit3D(in_channels, b0, 1)
        self.b1a, self.b1b = Unit3D(in_channels, b1a, 1), Unit3D(b1a, b1b, 3)
        self.b2a, self.b2b = Unit3D(in_channels, b2a, 1), Unit3D(b2a, b2b, 3)
        self.pool, self.b3b = MaxPool3D((3, 3, 3), (1, 1, 1)), Unit3D(in_channels, b3b, 1)
        self.out_channels = b0 + b1b + b2b + b3b

    def forward(self, x: Tensor) -> Tensor:
        branches = self.b0(x), self.b1b(self.b1a(x)), self.b2b(self.b2a(x)), self.b3b(self.pool(x))
        return torch.cat(branches, 1)


class InceptionI3D(nn.Module):
    """I3D. Layers and weights are named as in the port.

    Args:
        num_classes: width of the logits.
        in_channels: 3 for RGB.
    """

    END_POINTS: ClassVar[tuple[str, ...]] = (
        "Conv3d_1a_7x7",
        "MaxPool3d_2a_3x3",
        "Conv3d_2b_1x1",
        "Conv3d_2c_3x3",
        "MaxPool3d_3a_3x3",
        "Mixed_3b",
        "Mixed_3c",
        "MaxPool3d_4a_3x3",
        *(f"Mixed_4{part}" for part in "bcdef"),
        "MaxPool3d_5a_2x2",
        "Mixed_5b",
        "Mixed_5c",
    )

    def __init__(self, num_classes: int = 400, in_channels: int = 3):
        super().__init__()
        units = {"Conv3d_1a_7x7": (64, 7, 2), "Conv3d_2b_1x1": (64, 1, 1), "Conv3d_2c_3x3": (192, 3, 1)}
        pools = {
            "MaxPool3d_2a_3x3": ((1, 3, 3), (1, 2, 2)),
            "MaxPool3d_3a_3x3": ((1, 3, 3), (1, 2, 2)),
            "MaxPool3d_4a_3x3": ((3, 3, 3), (2, 2, 2)),
            "MaxPool3d_5a_2x2": ((2, 2, 2), (2, 2, 2)),
        }
        channels = in_channels
        for name in self.END_POINTS:
            if name in pools:
                layer: nn.Module = MaxPool3D(*pools[name])
            elif name in units:
                width, kernel, stride = units[name]
                layer, channels = Unit3D(channels, width, kernel, stride), width
            else:
                layer = Mixed(channels, MIXED[name])
                channels = layer.out_channels
            self.add_module(name, layer)
        self.logits = nn.ModuleDict({"conv3d": nn.Conv3d(channels, num_classes, 1)})

    def end_points(self, clips: Tensor) -> dict[str, Tensor]:
        """The output (B, C', t, h, w) of every layer, by name, for clips (B, 3, T, H, W) in [-1, 1]."""
        outputs, x = {}, clips
        for name in self.END_POINTS:
            x = outputs[name] = self.get_submodule(name)(x)
        return outputs

    def forward(self, clips: Tensor) -> Tensor:
        """Logits (B, num_classes) of clips (B, 3, T, 224, 224) in [-1, 1], averaged over time.

        Raises:
            ValueError: the clips have fewer than 9 frames.
        """
        if clips.shape[2] < MIN_FRAMES:
            raise ValueError(f"I3D needs clips of at least {MIN_FRAMES} frames, got {clips.shape[2]}")
        x = clips
        for name in self.END_POINTS:
            x = self.get_submodule(name)(x)
        x = F.avg_pool3d(x, (2, 7, 7), stride=1)  # (B, 1024, t - 1, 1, 1)
        return self.logits["conv3d"](x).flatten(2).mean(2)


def preprocess(clips: Tensor, size: int = 224) -> Tensor:
    """Resize clips (B, C, T, H, W), uint8 or float in 0..255, to (B, 3, T, size, size) in [-1, 1].

    Each frame is resized bilinearly, without antialiasing, and its aspect ratio is not kept. Grey becomes RGB.

    Raises:
        ValueError: the clips have another rank, or neither 1 nor 3 channels.
    """
    if clips.ndim != 5 or clips.shape[1] not in (1, 3):
        raise ValueError(f"clips must be (B, 1 or 3, T, H, W), got {tuple(clips.shape)}; are C and T swapped?")
    frames = clips.float().transpose(1, 2)  # (B, T, C, H, W)
    flat = frames.flatten(0, 1)
    if flat.shape[-2:] != (size, size):
        flat = F.interpolate(flat, (size, size), mode="bilinear", align_corners=False)
    resized = flat.unflatten(0, frames.shape[:2]).transpose(1, 2)
    return (2 * resized / 255 - 1).expand(-1, 3, -1, -1, -1)


class I3DNetwork:
    """I3D as a feature network of clips: one call gives ``pool``, its 400 logits.

    Args:
        state_dict: the weights; None draws random ones for tests, and ``name`` says so.
        weights_sha256: of the file that the weights came from.
        device: where to compute.
        seed: of random weights.

    Raises:
        CheckpointError: the weights do not fit.
    """

    resize = "bilinear 224x224 per frame, no antialias"

    def __init__(
        self,
        state_dict: Mapping[str, Tensor] | None,
        *,
        weights_sha256: str | None = None,
        device: torch.device | str = "cpu",
        seed: int = 0,
    ):
        self.name = I3D if state_dict is not None else I3D_RANDOM
        self.weights_sha256 = weights_sha256
        self.device = choose_device(device)
        if state_dict is None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                self.network = InceptionI3D()
        else:
            width, channels = _sizes(state_dict)
            self.network = InceptionI3D(width, channels)
            load_strictly(self.network, state_dict, source="the I3D weights")
        self.network.to(self.device).eval().requires_grad_(False)

    @classmethod
    def load(cls, weights: str | Path | None = None, *, device: torch.device | str = "cpu") -> I3DNetwork:
        """Read the weights from the file ``weights`` (torch or safetensors), or download them once if it is None.

        Raises:
            CheckpointError: the file is absent, damaged or does not fit, or the download fails.
        """
        path = Path(weights) if weights is not None else _download()
        return cls(read_weights(path), weights_sha256=sha256(path), device=device)

    @torch.no_grad()
    def __call__(self, clips: Tensor) -> dict[str, Tensor]:
        """Clips (B, C, T, H, W), uint8 or float in 0..255, to {"pool": (B, 400)} in float32."""
        with full_precision():
            return {"pool": self.network(preprocess(clips.to(self.device)))}


class TorchScriptI3D:
    """StyleGAN-V's TorchScript port (``i3d_torchscript.pt``), the detector of LARP and of cd-fvd's StyleGAN-V mode.

    TorchScript runs the code in the file: load only files that you trust.

    Raises:
        CheckpointError: there is no such file, or it is not TorchScript.
    """

    name = "i3d-torchscript"
    resize = "bilinear 224x224, inside the file"

    def __init__(self, path: str | Path, *, device: torch.device | str = "cpu"):
        path = Path(path)
        if not path.is_file():
            raise CheckpointError(
                f"there is no file {path}; the TorchScript I3D is i3d_torchscript.pt of "
                "github.com/universome/fvd-comparison (mirror: hub repository flateon/FVD-I3D-torchscript)"
            )
        self.weights_sha256: str | None = sha256(path)
        self.device = choose_device(device)
        try:
            self.network = torch.jit.load(str(path), map_location=self.device).eval()
        except RuntimeError as error:
            raise CheckpointError(f"{path} is no TorchScript file: {str(error).splitlines()[0]}") from error

    @torch.no_grad()
    def __call__(self, clips: Tensor) -> dict[str, Tensor]:
        """Clips (B, C, T, H, W), uint8 or float in 0..255, to {"pool": (B, 400)} in float32."""
        clips = clips.to(self.device).float().expand(-1, 3, -1, -1, -1)
        with full_precision():
            return {"pool": self.network(clips, rescale=True, resize=True, return_features=True)}


def _download() -> Path:
    """The published file, fetched once. Its hash is published nowhere, so none is checked; every score records it."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / WEIGHTS_URL.rsplit("/", 1)[1]
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(WEIGHTS_URL, str(path), progress=False)
        except (urllib.error.URLError, OSError, RuntimeError) as error:
            raise CheckpointError(
                f"the I3D weights could not be fetched from {WEIGHTS_URL}: {error}. Fetch the file elsewhere and name "
                "it with weights=PATH (command line: --weights PATH)"
            ) from error
    return path


def _sizes(state: Mapping[str, Tensor]) -> tuple[int, int]:
    """Number of logits and of input channels of a state dict."""
    try:
        return state["logits.conv3d.weight"].shape[0], state["Conv3d_1a_7x7.conv3d.weight"].shape[1]
    except KeyError as error:
        raise CheckpointError(
            f"these are not weights of the I3D port: {error} is absent (rgb_imagenet.pt of pytorch-i3d is another one)"
        ) from error

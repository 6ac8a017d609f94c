"""Scores of reconstructed clips against their originals: PSNR and SSIM.

Originals and reconstructions are float (B, C, T, H, W) in [0, data_range]; scores are float64.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from vistok.eval.reconstruction import SSIM, decibels

Per = Literal["video", "frame"]

# pytorch-msssim's setting, which LARP logs; scikit-image and torchmetrics treat borders differently.
VIDEO_SSIM = SSIM(window="gaussian", window_size=11, covariance="population")


def mean_squared_error(original: Tensor, reconstruction: Tensor, per: Per = "video") -> Tensor:
    """Mean squared error of each clip, (B,), or of each frame, (B, T), in float64.

    Raises:
        ValueError: the shapes differ or are not (B, C, T, H, W), or ``per`` is unknown.
    """
    _check_pair(original, reconstruction)
    if per not in ("video", "frame"):
        raise ValueError(f"per must be 'video' or 'frame', got {per!r}")
    squares = (original.double() - reconstruction.double()).square()
    return squares.mean((1, 2, 3, 4) if per == "video" else (1, 3, 4))


def psnr(original: Tensor, reconstruction: Tensor, per: Per = "video", data_range: float = 1.0) -> Tensor:
    """Peak signal-to-noise ratio in decibels of each clip, (B,), or of each frame, (B, T); infinite for equal ones.

    LARP reports the mean over clips. The mean over frames is never lower: if the errors of a clip's frames differ, the
    logarithm of their mean exceeds the mean of their logarithms.
    """
    return decibels(mean_squared_error(original, reconstruction, per), data_range)


def ssim(original: Tensor, reconstruction: Tensor, variant: SSIM = VIDEO_SSIM) -> Tensor:
    """Structural similarity of each frame, (B, T); the similarity of a clip is the mean over its frames.

    Raises:
        ValueError: the shapes differ, or the frames are smaller than the window.
    """
    _check_pair(original, reconstruction)
    frames = [clips.transpose(1, 2).flatten(0, 1) for clips in (original, reconstruction)]  # (B * T, C, H, W)
    return variant(*frames).unflatten(0, (len(original), original.shape[2]))


def _check_pair(original: Tensor, reconstruction: Tensor) -> None:
    if original.shape != reconstruction.shape or original.ndim != 5:
        raise ValueError(
            "originals and reconstructions must be of one shape (B, C, T, H, W), got "
            f"{tuple(original.shape)} and {tuple(reconstruction.shape)}"
        )
    if original.shape[1] not in (1, 3):
        raise ValueError(
            f"clips have 1 or 3 channels, got {original.shape[1]} in {tuple(original.shape)}; are C and T swapped?"
        )

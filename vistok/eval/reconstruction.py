"""Scores of reconstructions against their originals: PSNR and the SSIM variants that papers report.

Originals and reconstructions are float (B, C, H, W) in [0, data_range]; scores are float64 (B,).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F


def mean_squared_error(original: Tensor, reconstruction: Tensor) -> Tensor:
    """Mean squared error of each image over all pixels and channels: (B,) in float64."""
    _check_pair(original, reconstruction)
    return (original.double() - reconstruction.double()).square().mean(dim=(1, 2, 3))


def decibels(mse: Tensor, data_range: float = 1.0) -> Tensor:
    """Peak signal-to-noise ratio in decibels of a mean squared error; infinite if the error is 0."""
    return 10 * torch.log10(data_range**2 / mse)


def psnr(original: Tensor, reconstruction: Tensor, data_range: float = 1.0) -> Tensor:
    """Peak signal-to-noise ratio per image in decibels, (B,); infinite for equal images.

    Papers report the mean of these decibels over images (scikit-image per image). torchmetrics reports the PSNR of a
    batch's mean error, which is never higher.
    """
    return decibels(mean_squared_error(original, reconstruction), data_range)


@dataclass(frozen=True)
class SSIM:
    """One variant of the structural similarity index (Wang et al. 2004), computed in float64, channels averaged.

    Attributes:
        data_range: the distance between the smallest and the largest possible value.
        window: how the pixels of a window are weighted.
        window_size: side of the window in pixels, odd.
        sigma: standard deviation of the Gaussian window in pixels.
        covariance: ``sample`` multiplies (co)variances by n / (n - 1), n = window_size^2.
        border: ``crop`` scores only whole windows; ``reflect`` pads the image by reflection and scores every pixel.
        k1, k2: the stabilising constants.

    Raises:
        ValueError: the window's side is not odd and positive, or an option is unknown.
    """

    data_range: float = 1.0
    window: Literal["uniform", "gaussian"] = "uniform"
    window_size: int = 7
    sigma: float = 1.5
    covariance: Literal["sample", "population"] = "sample"
    border: Literal["crop", "reflect"] = "crop"
    k1: float = 0.01
    k2: float = 0.03

    def __post_init__(self) -> None:
        if self.window_size < 1 or self.window_size % 2 == 0:
            raise ValueError(f"the window's side must be odd and positive, got {self.window_size}")
        allowed = {
            "window": ("uniform", "gaussian"),
            "covariance": ("sample", "population"),
            "border": ("crop", "reflect"),
        }
        for field, names in allowed.items():
            if getattr(self, field) not in names:
                raise ValueError(f"unknown {field} {getattr(self, field)!r}; known: {', '.join(names)}")

    def __call__(self, original: Tensor, reconstruction: Tensor) -> Tensor:
        """Mean similarity per image, (B,).

        Raises:
            ValueError: the shapes differ, or the images are smaller than the window.
        """
        _check_pair(original, reconstruction)
        if min(original.shape[-2:]) < self.window_size:
            raise ValueError(
                f"SSIM with a {self.window_size}x{self.window_size} window needs images of at least that size, "
                f"got {tuple(original.shape[-2:])}"
            )
        x, y = original.double(), reconstruction.double()
        mean_x, mean_y = self._local_mean(x), self._local_mean(y)
        n = self.window_size**2
        scale = n / (n - 1) if self.covariance == "sample" else 1.0
        var_x = scale * (self._local_mean(x * x) - mean_x**2)
        var_y = scale * (self._local_mean(y * y) - mean_y**2)
        cov = scale * (self._local_mean(x * y) - mean_x * mean_y)
        c1, c2 = (self.k1 * self.data_range) ** 2, (self.k2 * self.data_range) ** 2
        luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
        structure = (2 * cov + c2) / (var_x + var_y + c2)
        return (luminance * structure).mean(dim=(1, 2, 3))

    def _local_mean(self, x: Tensor) -> Tensor:
        """Window averages of (B, C, H, W); the sides shrink by window_size - 1 unless the border is padded."""
        half = self.window_size // 2
        if self.border == "reflect":
            x = F.pad(x, (half, half, half, half), mode="reflect")
        kernel = self._kernel().to(x)
        channels = x.shape[1]
        rows = kernel.view(1, 1, -1, 1).expand(channels, 1, -1, 1)
        columns = kernel.view(1, 1, 1, -1).expand(channels, 1, 1, -1)
        return F.conv2d(F.conv2d(x, rows, groups=channels), columns, groups=channels)

    def _kernel(self) -> Tensor:
        """The window's weights along one axis, (window_size,), which sum to 1; both kinds of window are separable."""
        if self.window == "uniform":
            return torch.full((self.window_size,), 1 / self.window_size, dtype=torch.float64)
        offsets = torch.arange(self.window_size, dtype=torch.float64) - self.window_size // 2
        weights = torch.exp(-(offsets**2) / (2 * self.sigma**2))
        return weights / weights.sum()


# For images in [0, 1]. Never compare one variant with another: on photographs they differ by up to 0.01.
SSIM_VARIANTS: dict[str, SSIM] = {
    "ssim": SSIM(),  # scikit-image's default
    # LlamaGen, GigaTok, D-AR: scikit-image with data_range 2 although images lie in [0, 1], so it is inflated.
    "ssim_llamagen": SSIM(data_range=2.0),
    # scikit-image with gaussian_weights, the setting of the original paper.
    "ssim_gaussian": SSIM(window="gaussian", window_size=11, covariance="population"),
    "ssim_torchmetrics": SSIM(window="gaussian", window_size=11, covariance="population", border="reflect"),
}


def ssim(original: Tensor, reconstruction: Tensor, variant: str = "ssim") -> Tensor:
    """Structural similarity (B,) of images in [0, 1], one value per image.

    Args:
        variant: a name of ``SSIM_VARIANTS``.

    Raises:
        ValueError: the variant is unknown; or as ``SSIM``.
    """
    if variant not in SSIM_VARIANTS:
        raise ValueError(f"unknown SSIM variant {variant!r}; known: {', '.join(SSIM_VARIANTS)}")
    return SSIM_VARIANTS[variant](original, reconstruction)


def _check_pair(original: Tensor, reconstruction: Tensor) -> None:
    if original.shape != reconstruction.shape or original.ndim != 4:
        raise ValueError(
            "originals and reconstructions must be of one shape (B, C, H, W), got "
            f"{tuple(original.shape)} and {tuple(reconstruction.shape)}"
        )

"""Continuous latents as normal distributions: the bottleneck of a variational autoencoder (arXiv 1312.6114)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vistok.draws import Draws

LOG_VARIANCE = (-30.0, 20.0)
"""The range that log-variances are clamped to."""


class LatentScale(nn.Module):
    """Standardises continuous latents for generators: a latent z becomes (z - mean) * scale.

    Args:
        dim: channels D of a latent.
        mean, scale: one number, or one per channel. They are saved in the config, not with the weights.

    Raises:
        ValueError: another number of means or scales than channels.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, dim: int, mean: float | Sequence[float] = 0.0, scale: float | Sequence[float] = 1.0):
        super().__init__()
        self.dim = dim
        self.register_buffer("mean", _per_channel("latent_mean", mean, dim), persistent=False)
        self.register_buffer("scale", _per_channel("latent_scale", scale, dim), persistent=False)

    @property
    def is_uniform(self) -> bool:
        """Whether all channels have the same mean and scale."""
        return bool((self.mean == self.mean[0]).all() and (self.scale == self.scale[0]).all())

    def standardise(self, latents: Tensor) -> Tensor:
        """Raw latents (..., D) of the autoencoder to standardised ones."""
        return (latents - self.mean) * self.scale

    def restore(self, latents: Tensor) -> Tensor:
        """Standardised latents (..., D) to raw ones."""
        return latents / self.scale + self.mean


class GaussianLatents(LatentScale):
    """A Gaussian posterior with diagonal covariance, and the standardisation of its latents.

    Arguments and errors are those of ``LatentScale``.
    """

    def moments(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and clamped log-variance, (B, L, D) each, from an encoder's output (B, L, 2D)."""
        mean, log_variance = hidden.chunk(2, -1)
        return mean, log_variance.clamp(*LOG_VARIANCE)

    def choose(self, mean: Tensor, log_variance: Tensor, draws: Draws | None) -> Tensor:
        """A sample made from the normal draws "posterior" (B, L, D); without draws, the mean."""
        return mean if draws is None else mean + (log_variance / 2).exp() * draws["posterior"]

    def standardised_moments(self, mean: Tensor, log_variance: Tensor) -> Tensor:
        """Means and log-variances of the standardised latents, (..., 2D)."""
        return torch.cat([self.standardise(mean), log_variance + 2 * self.scale.abs().log()], -1)

    @torch.no_grad()
    def fit(self, mean: Tensor, log_variance: Tensor) -> None:
        """Set mean and scale so that samples of these distributions (B, L, D) have mean 0 and standard deviation 1."""
        # The variance of a mixture is the variance of the means plus the mean of the variances.
        variance = mean.var((0, 1), unbiased=False) + log_variance.exp().mean((0, 1))
        self.mean, self.scale = mean.mean((0, 1)), variance.clamp_min(1e-12).rsqrt()


def gaussian_kl(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL divergence of normal distributions from the standard normal in nats, elementwise."""
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance)


def _per_channel(name: str, values: float | Sequence[float], dim: int) -> Tensor:
    tensor = torch.as_tensor(values, dtype=torch.float32)
    if tensor.ndim and tensor.shape != (dim,):
        raise ValueError(f"{name} must be one number or {dim}, one for each channel; got {len(tensor)}")
    return tensor.expand(dim).clone()

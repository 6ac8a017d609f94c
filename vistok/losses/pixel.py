"""Pixel losses: mean absolute error, mean squared error, and the logit-Laplace likelihood."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from vistok.utils.processes import share_of_group


class L1(nn.Module):
    """Mean absolute error over all elements."""

    def forward(self, reconstruction: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
        """Compare two tensors of one shape; returns a scalar.

        Args:
            weight: weights of the elements in the mean; it broadcasts to their shape.

        Raises:
            ValueError: the shapes differ.
        """
        _check_same_shape(reconstruction, target)
        return _mean((reconstruction - target).abs(), weight)


class L2(nn.Module):
    """Mean squared error over all elements."""

    def forward(self, reconstruction: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
        """Compare two tensors of one shape; returns a scalar.

        Args:
            weight: weights of the elements in the mean; it broadcasts to their shape.

        Raises:
            ValueError: the shapes differ.
        """
        _check_same_shape(reconstruction, target)
        return _mean((reconstruction - target).square(), weight)


class LogitLaplace(nn.Module):
    """Negative log-likelihood of squashed pixels under a Laplace distribution in logit space (DALL-E, section A.3).

    A pixel x in [0, 1] is mapped to s in [eps, 1 - eps], so that its logit is finite. The decoder predicts the mean and
    the log of the scale b of logit(s). The density of s is exp(-|logit(s) - mean| / b) / (2 b s (1 - s)).

    Args:
        eps: margin of the squashed range, in (0, 0.5); DALL-E uses 0.1.
    """

    def __init__(self, eps: float = 0.1):
        super().__init__()
        if not 0 < eps < 0.5:
            raise ValueError(f"eps must lie between 0 and 0.5 (exclusive), got {eps}")
        self.eps = eps

    def squash(self, pixels: Tensor) -> Tensor:
        """Map pixels in [0, 1] to [eps, 1 - eps]."""
        return (1 - 2 * self.eps) * pixels + self.eps

    def unsquash(self, squashed: Tensor) -> Tensor:
        """Invert ``squash``. Apply it to the sigmoid of a predicted mean; values outside [eps, 1 - eps] are clamped."""
        return ((squashed - self.eps) / (1 - 2 * self.eps)).clamp(0, 1)

    def forward(self, mean: Tensor, log_scale: Tensor, target: Tensor) -> Tensor:
        """The negative log-likelihood in nats, averaged over all elements.

        Args:
            mean, log_scale: the prediction in logit space, each in the shape of the target.
            target: pixels in [0, 1].

        Raises:
            ValueError: the shapes differ.
        """
        _check_same_shape(mean, target)
        _check_same_shape(log_scale, target)
        squashed = self.squash(target)
        error = (torch.logit(squashed) - mean).abs() * torch.exp(-log_scale)
        return (math.log(2) + log_scale + torch.log(squashed * (1 - squashed)) + error).mean()


def _mean(errors: Tensor, weight: Tensor | None) -> Tensor:
    if weight is None:
        return errors.mean()
    return (errors * weight).sum() / share_of_group(weight.expand_as(errors).sum())


def _check_same_shape(prediction: Tensor, target: Tensor) -> None:
    # With broadcasting, a forgotten axis would give a plausible but wrong number.
    if prediction.shape != target.shape:
        raise ValueError(f"prediction {tuple(prediction.shape)} and target {tuple(target.shape)} differ in shape")

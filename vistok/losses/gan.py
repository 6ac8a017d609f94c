"""Adversarial losses by name, and their regularisers: R1, LeCam, and the adaptive weight.

Discriminator logits may have any shape (one logit per image, patch or token). Losses average over all logits;
``non_saturating_mean`` first averages those of each image.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vistok.utils.processes import mean_over_group


@dataclass(frozen=True)
class GANLoss:
    """The losses of the two sides of an adversarial game, each a scalar function of logits."""

    generator: Callable[[Tensor], Tensor]
    discriminator: Callable[[Tensor, Tensor], Tensor]


def _image_means(logits: Tensor) -> Tensor:
    """The mean logit (B,) of each image, from logits (B, ...)."""
    return logits.flatten(1).mean(1) if logits.ndim > 1 else logits


GAN_LOSSES = {
    # Lim & Ye 2017, with the factor 1/2 of VQGAN.
    "hinge": GANLoss(
        generator=lambda fake: -fake.mean(),
        discriminator=lambda real, fake: (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2,
    ),
    # Binary cross-entropy with the non-saturating generator (Goodfellow et al. 2014), with the factor 1/2 of VQGAN.
    "vanilla": GANLoss(
        generator=lambda fake: F.softplus(-fake).mean(),
        discriminator=lambda real, fake: (F.softplus(-real).mean() + F.softplus(fake).mean()) / 2,
    ),
    # The same without the factor 1/2, as in StyleGAN2 and LARP.
    "non_saturating": GANLoss(
        generator=lambda fake: F.softplus(-fake).mean(),
        discriminator=lambda real, fake: F.softplus(-real).mean() + F.softplus(fake).mean(),
    ),
    # The same for each image's mean logit, as in Open-MAGVIT2.
    "non_saturating_mean": GANLoss(
        generator=lambda fake: F.softplus(-_image_means(fake)).mean(),
        discriminator=lambda real, fake: F.softplus(-_image_means(real)).mean() + F.softplus(_image_means(fake)).mean(),
    ),
    # LSGAN (Mao et al. 2017) with targets 1 for real, -1 for fake, and 0 for the generator.
    "least_squares": GANLoss(
        generator=lambda fake: fake.square().mean(),
        discriminator=lambda real, fake: ((1 - real).square().mean() + (1 + fake).square().mean()) / 2,
    ),
}


class GeneratorLoss(nn.Module):
    """The generator's adversarial loss.

    Args:
        kind: a key of ``GAN_LOSSES``: "hinge", "vanilla", "non_saturating", "non_saturating_mean" or "least_squares".

    Raises:
        ValueError: an unknown kind.
    """

    def __init__(self, kind: str = "hinge"):
        super().__init__()
        self.kind = _check_choice("kind", kind, GAN_LOSSES)

    def forward(self, logits_fake: Tensor) -> Tensor:
        """Return the scalar loss from the discriminator's logits of generated images."""
        return GAN_LOSSES[self.kind].generator(logits_fake)


@dataclass(frozen=True)
class Smoothing:
    """Random soft targets of the discriminator's cross entropy, as in LARP (arXiv 2410.21264).

    With a standard normal n per logit, the target is max(1 - slope |n|, real_floor) for real samples, and
    min(slope |n|, fake_ceiling) for generated ones.

    Raises:
        ValueError: a negative slope, or targets outside [0, 1].
    """

    slope: float = 0.15
    real_floor: float = 0.7
    fake_ceiling: float = 0.3

    def __post_init__(self) -> None:
        if self.slope < 0:
            raise ValueError(f"slope must not be negative, got {self.slope}")
        for name in ("real_floor", "fake_ceiling"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in [0, 1], got {getattr(self, name)}")

    def real_targets(self, noise: Tensor) -> Tensor:
        return (1 - self.slope * noise.abs()).clamp_min(self.real_floor)

    def fake_targets(self, noise: Tensor) -> Tensor:
        return (self.slope * noise.abs()).clamp_max(self.fake_ceiling)


class DiscriminatorLoss(nn.Module):
    """The discriminator's adversarial loss.

    Args:
        kind: a key of ``GAN_LOSSES``: "hinge", "vanilla", "non_saturating", "non_saturating_mean" or "least_squares".
        smoothing: soft targets of the cross entropy, for "vanilla" and "non_saturating".

    Raises:
        ValueError: an unknown kind, or smoothing of a loss that is not a cross entropy.
    """

    def __init__(self, kind: str = "hinge", smoothing: Smoothing | None = None):
        super().__init__()
        self.kind = _check_choice("kind", kind, GAN_LOSSES)
        if smoothing is not None and kind not in ("vanilla", "non_saturating"):
            raise ValueError(f"smoothing needs a cross entropy ('vanilla' or 'non_saturating'), not {kind!r}")
        self.smoothing = smoothing

    def forward(
        self, logits_real: Tensor, logits_fake: Tensor, *, noise: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        """Return the scalar loss from the logits of real and of generated (detached) images.

        Args:
            noise: for smoothing, standard normal numbers in the shapes of the logits of real and generated images.

        Raises:
            ValueError: smoothing without noise.
        """
        if self.smoothing is None:
            return GAN_LOSSES[self.kind].discriminator(logits_real, logits_fake)
        if noise is None:
            raise ValueError("smoothed targets are random: pass noise=(for real logits, for generated logits)")
        targets = self.smoothing.real_targets(noise[0]), self.smoothing.fake_targets(noise[1])
        pairs = zip((logits_real, logits_fake), targets)
        real, fake = (F.binary_cross_entropy_with_logits(logits, target.to(logits)) for logits, target in pairs)
        return (real + fake) / (2 if self.kind == "vanilla" else 1)


def r1_penalty(discriminator: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """Squared norm of the discriminator's gradient at real images (Mescheder et al. 2018).

    Args:
        discriminator: maps images (B, ...) to logits. The penalty is exact only if samples do not influence each other
            (batch statistics mix them a little).
        images: real images (B, ...), in the range that the discriminator is trained on.

    Returns:
        The mean over images of |d sum(D(x)) / dx|^2, a scalar with a graph to the discriminator's parameters.
        The usual regulariser is gamma / 2 times this value, and n times that if it is applied every n steps.
    """
    with torch.enable_grad():
        images = images.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(discriminator(images).sum(), images, create_graph=True)
        return gradient.square().flatten(1).sum(dim=1).mean()


class LeCam(nn.Module):
    """The LeCam regulariser (Tseng et al. 2021): keeps logits near running averages of the other side's logits.

    value = mean(relu(real - average_fake)^2) + mean(relu(average_real - fake)^2). The averages are buffers that start
    at 0 and change in training mode only. Batch means are over all processes.

    Args:
        decay: of the running averages, in [0, 1).
        update: "after_use" compares with the averages of earlier steps (LARP, TiTok); "before_use" first updates them
            with this step (RobusTok).
        compare: "logits" compares every logit (the paper, RobusTok); "batch_means" compares the two batch means
            (LARP, TiTok).

    Raises:
        ValueError: an argument is out of range or unknown.
    """

    average_real: Tensor
    average_fake: Tensor

    def __init__(self, decay: float = 0.999, update: str = "after_use", compare: str = "logits"):
        super().__init__()
        if not 0 <= decay < 1:
            raise ValueError(f"decay must lie in [0, 1), got {decay}")
        self.decay = decay
        self.update = _check_choice("update", update, ("before_use", "after_use"))
        self.compare = _check_choice("compare", compare, ("logits", "batch_means"))
        self.register_buffer("average_real", torch.zeros(()))
        self.register_buffer("average_fake", torch.zeros(()))

    def forward(self, logits_real: Tensor, logits_fake: Tensor) -> Tensor:
        """Return the scalar regulariser; in training mode, update the averages."""
        before = self.average_real.clone(), self.average_fake.clone()
        if self.training:
            self._move_averages(logits_real, logits_fake)
        average_real, average_fake = (
            before if self.update == "after_use" else (self.average_real.clone(), self.average_fake.clone())
        )
        if self.compare == "batch_means":
            logits_real, logits_fake = (mean_over_group(logits.mean()) for logits in (logits_real, logits_fake))
        return F.relu(logits_real - average_fake).square().mean() + F.relu(average_real - logits_fake).square().mean()

    @torch.no_grad()
    def _move_averages(self, logits_real: Tensor, logits_fake: Tensor) -> None:
        for average, logits in ((self.average_real, logits_real), (self.average_fake, logits_fake)):
            average.lerp_(mean_over_group(logits.mean()).to(average), 1 - self.decay)


def adaptive_weight(
    nll_loss: Tensor,
    gan_loss: Tensor,
    last_layer: Tensor,
    eps: float = 1e-4,
    clamp: tuple[float, float] = (0.0, 1e4),
) -> Tensor:
    """The weight that makes the GAN gradient as large as the reconstruction gradient at the decoder's last layer
    (VQGAN).

    Args:
        nll_loss: reconstruction + perceptual loss, a scalar with a graph.
        gan_loss: the generator's loss, a scalar with a graph.
        last_layer: the last layer's weight, which both losses depend on.
        eps: added to the norm of the GAN gradient.
        clamp: (lowest, highest) value returned.

    Returns:
        |d nll / dW| / (|d gan / dW| + eps), clamped; a scalar without a graph. Both losses keep their graphs.

    Raises:
        ValueError: ``last_layer`` does not require a gradient.
    """
    if not last_layer.requires_grad:
        raise ValueError("adaptive_weight needs a last_layer that requires a gradient; this one is frozen")
    (nll_gradient,) = torch.autograd.grad(nll_loss, last_layer, retain_graph=True)
    (gan_gradient,) = torch.autograd.grad(gan_loss, last_layer, retain_graph=True)
    # Losses are means over the batch of a process, so the gradient of the whole batch is the mean over processes.
    nll_gradient, gan_gradient = mean_over_group(nll_gradient), mean_over_group(gan_gradient)
    return (nll_gradient.norm() / (gan_gradient.norm() + eps)).clamp(*clamp).detach()


def _check_choice(name: str, value: str, allowed) -> str:
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; allowed: {', '.join(map(repr, allowed))}")
    return value

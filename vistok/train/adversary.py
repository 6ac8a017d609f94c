"""The discriminator's side of a tokenizer's training."""

from __future__ import annotations

from torch import Tensor, nn

from vistok.config import ConfigError, check, nearest
from vistok.losses import DiscriminatorLoss, GeneratorLoss, LeCam, PatchGAN, StyleGANDiscriminator, r1_penalty
from vistok.train.config import GanConfig

DISCRIMINATORS = {"patchgan": PatchGAN, "stylegan": StyleGANDiscriminator}


class Adversary(nn.Module):
    """A discriminator with its losses. Images are in the tokenizer's native range.

    Args:
        config: the ``losses.gan`` section.
        input_shape: (C, H, W) of the images, or (C, T, H, W).
    """

    def __init__(self, config: GanConfig, input_shape: tuple[int, ...]):
        super().__init__()
        self.config = config
        self.discriminator = build_discriminator(config, input_shape)
        self.generator_loss = GeneratorLoss(config.loss)
        self.discriminator_loss = DiscriminatorLoss(config.loss)
        self.lecam = LeCam() if config.lecam_weight else None

    def fool(self, fake: Tensor) -> Tensor:
        """The generator's loss for reconstructions (B, C, H, W); the discriminator gets no gradient."""
        self.discriminator.requires_grad_(False)
        loss = self.generator_loss(self.discriminator(fake))
        self.discriminator.requires_grad_(True)
        return loss

    def forward(self, real: Tensor, fake: Tensor, step: int) -> dict[str, Tensor]:
        """The discriminator's terms for real images and detached reconstructions: "d_loss" is their sum."""
        logits_real, logits_fake = self.discriminator(real), self.discriminator(fake.detach())
        terms = {"d_loss": self.discriminator_loss(logits_real, logits_fake)}
        terms |= {"d_real": logits_real.detach().mean(), "d_fake": logits_fake.detach().mean()}
        if self.lecam is not None:
            terms["d_lecam"] = self.lecam(logits_real, logits_fake)
            terms["d_loss"] = terms["d_loss"] + self.config.lecam_weight * terms["d_lecam"]
        if self.config.r1_weight and step % self.config.r1_every == 0:
            # Taken rarely and scaled up: "lazy regularisation" of StyleGAN2 (arXiv 1912.04958, appendix B).
            terms["d_r1"] = r1_penalty(self.discriminator, real)
            scale = self.config.r1_weight * self.config.r1_every / 2
            terms["d_loss"] = terms["d_loss"] + scale * terms["d_r1"]
        return terms


def build_discriminator(config: GanConfig, input_shape: tuple[int, ...]) -> nn.Module:
    arguments = dict(config.discriminator)
    name = arguments.pop("name", "patchgan")
    if name not in DISCRIMINATORS:
        near = nearest(name, tuple(DISCRIMINATORS))
        hint = f"; did you mean {near!r}?" if near else ""
        raise ConfigError(f"losses.gan.discriminator.name: unknown {name!r}{hint} Known: {', '.join(DISCRIMINATORS)}.")
    kind = DISCRIMINATORS[name]
    derived = {"in_channels": input_shape[0]}
    if kind is StyleGANDiscriminator:
        derived["image_size"] = input_shape[-1]
    return kind(**check(kind, derived | arguments, "losses.gan.discriminator"))

"""The adversary of a tokenizer: a discriminator with its losses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from torch import Tensor, nn

from vistok.draws import Keys
from vistok.losses import (
    BlurDiscriminator,
    DiffAugment,
    DINODiscriminator,
    Discriminator,
    DiscriminatorLoss,
    GeneratorLoss,
    LeCam,
    PatchGAN,
    PooledDiscriminator,
    Smoothing,
    StyleGANDiscriminator,
    ViTDiscriminator,
    r1_penalty,
)
from vistok.losses.augment import NUM_UNIFORMS
from vistok.signatures import ConfigError, KeysOf, annotations_of, build, check_least
from vistok.utils.spelling import suggestion

DISCRIMINATORS: dict[str, type[Discriminator]] = {
    "patchgan": PatchGAN,
    "stylegan": StyleGANDiscriminator,
    "dino": DINODiscriminator,
    "pooled": PooledDiscriminator,
    "vit": ViTDiscriminator,
    "blur": BlurDiscriminator,
}


GENERATOR_USE = "fool"
"""Keys the draws of the generator's turn; another text would change the numbers of runs that resume."""
GANLossName = Literal["vanilla", "non_saturating", "non_saturating_mean", "hinge", "least_squares"]


def _discriminator_keys(section: Mapping[str, Any]) -> dict[str, Any]:
    """The types of the keys in a ``discriminator`` section; an unknown name is reported later."""
    kind = DISCRIMINATORS.get(section.get("name", "patchgan"))
    return {"name": str, **({} if kind is None else annotations_of(kind))}


@dataclass(frozen=True)
class GanConfig:
    """The adversarial part of a tokenizer's objective.

    Attributes:
        weight: of the generator's loss, from ``start_step`` on.
        loss: vanilla (binary cross entropy, halved as in VQGAN), non_saturating (not halved, as in StyleGAN2 and LARP),
            non_saturating_mean (of each image's mean logit, as in Open-MAGVIT2), hinge, or least_squares.
        generator_loss: a different loss for the generator; None is ``loss``.
        discriminator: {name: patchgan | stylegan | dino | vit | pooled | blur, ...arguments of that discriminator}.
        start_step: the first step at which the adversary takes part.
        every_n_steps: the discriminator is trained on every n-th step only.
        order: whether the model or the adversary is updated first in a step.
        balance: ``fixed`` applies ``weight`` as it is; ``adaptive`` scales it by the ratio of the norms of the
            reconstruction's and the adversary's gradients at the decoder's last layer (VQGAN, arXiv 2012.09841, eq. 7).
        augment: arguments of ``DiffAugment``, which is applied to all images that the discriminator gets; null is off.
        smoothing: soft, random targets of the cross entropies; null uses the targets 0 and 1.
        r1_weight, r1_every: weight of the gradient penalty on real images, which is computed every ``r1_every`` steps
            and multiplied by that number.
        lecam_weight: weight of the LeCam regulariser (arXiv 2104.03310).
        lecam_decay, lecam_update, lecam_compare: see ``LeCam``.
        lr: the discriminator's learning rate; None takes the optimizer's. More in ``players.adversary``.
    """

    weight: float
    loss: GANLossName = "hinge"
    generator_loss: GANLossName | None = None
    discriminator: Annotated[dict[str, Any], KeysOf(_discriminator_keys)] = field(
        default_factory=lambda: {"name": "patchgan"}
    )
    start_step: int = 0
    every_n_steps: int = 1
    order: Literal["model_first", "adversary_first"] = "model_first"
    balance: Literal["fixed", "adaptive"] = "fixed"
    augment: dict[str, Any] | None = None
    smoothing: Smoothing | None = None
    r1_weight: float = 0.0
    r1_every: int = 16
    lecam_weight: float = 0.0
    lecam_decay: float = 0.999
    lecam_update: Literal["after_use", "before_use"] = "after_use"
    lecam_compare: Literal["logits", "batch_means"] = "logits"
    lr: float | None = None

    def __post_init__(self) -> None:
        check_least(self, weight=0, start_step=0, every_n_steps=1, r1_weight=0, r1_every=1, lecam_weight=0)
        DiscriminatorLoss(self.loss, self.smoothing)  # refuses smoothing of other losses
        LeCam(self.lecam_decay)


class Adversary(nn.Module):
    """A discriminator with its losses, for images in the tokenizer's native range.

    Args:
        config: the ``losses.gan`` section.
        input_shape: (C, H, W) of the images, or (C, T, H, W) of the clips.
        value_range: the tokenizer's native range.
    """

    def __init__(self, config: GanConfig, input_shape: tuple[int, ...], value_range: tuple[float, float] = (-1.0, 1.0)):
        super().__init__()
        self.config = config
        self.discriminator = build_discriminator(config, input_shape, value_range)
        self._generator_loss = GeneratorLoss(config.generator_loss or config.loss)
        self.discriminator_loss = DiscriminatorLoss(config.loss, config.smoothing)
        self.augment = None if config.augment is None else build(DiffAugment, config.augment, "losses.gan.augment")
        options = config.lecam_decay, config.lecam_update, config.lecam_compare
        self.lecam = LeCam(*options) if config.lecam_weight else None

    def frozen(self) -> dict[str, nn.Module]:
        """Frozen networks that the discriminator computes with, by name."""
        return self.discriminator.frozen()

    def generator_loss(self, fake: Tensor, keys: Keys) -> Tensor:
        """The generator's loss for reconstructions (B, C, H, W), without gradients for the discriminator.

        Args:
            keys: of the images in this step.
        """
        self.discriminator.requires_grad_(False)
        loss = self._generator_loss(self._logits(fake, keys, GENERATOR_USE))
        self.discriminator.requires_grad_(True)
        return loss

    def _logits(self, images: Tensor, keys: Keys, use: str) -> Tensor:
        """The logits of augmented images; ``use`` keys the random numbers, so that they differ within a step."""
        if self.augment is not None:
            uniforms = keys.uniform(f"augment {use}", NUM_UNIFORMS).to(images.device)
            images = self.augment(images, uniforms.T)
        if self.discriminator.num_uniforms == 0:
            return self.discriminator(images)
        of_batch = Keys(keys.seed, (0,), keys.step)
        uniforms = of_batch.uniform(f"discriminator {use}", self.discriminator.num_uniforms)[0]
        return self.discriminator(images, uniforms)

    def forward(self, real: Tensor, fake: Tensor, keys: Keys) -> dict[str, Tensor]:
        """The discriminator's terms for real images and detached reconstructions; "d_loss" is the loss to minimise.

        Args:
            keys: of the images in this step.
        """
        logits_real, logits_fake = self._logits(real, keys, "real"), self._logits(fake.detach(), keys, "fake")
        terms = {"d_loss": self._loss(logits_real, logits_fake, keys)}
        terms |= {"d_real": logits_real.detach().mean(), "d_fake": logits_fake.detach().mean()}
        if self.lecam is not None:
            terms["d_lecam"] = self.lecam(logits_real, logits_fake)
            terms["d_loss"] = terms["d_loss"] + self.config.lecam_weight * terms["d_lecam"]
        if self.config.r1_weight and keys.step % self.config.r1_every == 0:
            # Computed rarely and scaled up: the "lazy regularisation" of StyleGAN2 (arXiv 1912.04958, appendix B).
            terms["d_r1"] = r1_penalty(self.discriminator, real)
            scale = self.config.r1_weight * self.config.r1_every / 2
            terms["d_loss"] = terms["d_loss"] + scale * terms["d_r1"]
        return terms

    def _loss(self, logits_real: Tensor, logits_fake: Tensor, keys: Keys) -> Tensor:
        if self.config.smoothing is None:
            return self.discriminator_loss(logits_real, logits_fake)
        shape = logits_real.shape[1:]
        noise = tuple(keys.normal(f"smoothing {side}", *shape).to(logits_real.device) for side in ("real", "fake"))
        return self.discriminator_loss(logits_real, logits_fake, noise=noise)


def build_discriminator(
    config: GanConfig, input_shape: tuple[int, ...], value_range: tuple[float, float] = (-1.0, 1.0)
) -> Discriminator:
    arguments = dict(config.discriminator)
    name = arguments.pop("name", "patchgan")
    if not isinstance(name, str) or name not in DISCRIMINATORS:
        hint = suggestion(str(name), tuple(DISCRIMINATORS)) or "."
        raise ConfigError(f"losses.gan.discriminator.name: unknown {name!r}{hint} Known: {', '.join(DISCRIMINATORS)}.")
    kind = DISCRIMINATORS[name]
    derived = kind.arguments_for(input_shape) | kind.arguments_for_range(value_range)
    return build(kind, derived | arguments, "losses.gan.discriminator")

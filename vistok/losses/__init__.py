"""Losses as reusable modules: pixel, perceptual, adversarial and entropy losses. None depends on a tokenizer."""

from vistok.losses.alignment import EncoderConfig, FrozenEncoder, alignment_distance
from vistok.losses.ar_prior import ARPrior
from vistok.losses.augment import DiffAugment
from vistok.losses.blur_discriminator import BlurDiscriminator
from vistok.losses.classifier import ClassifierDistance
from vistok.losses.contrastive import contrastive_loss, symmetric_cross_entropy
from vistok.losses.dino_discriminator import DINODiscriminator
from vistok.losses.discriminators import Discriminator, PatchGAN, StyleGANDiscriminator
from vistok.losses.entropy import BitEntropyLoss, EntropyLoss
from vistok.losses.gan import (
    GAN_LOSSES,
    DiscriminatorLoss,
    GeneratorLoss,
    LeCam,
    Smoothing,
    adaptive_weight,
    r1_penalty,
)
from vistok.losses.perceptual import LPIPS
from vistok.losses.pixel import L1, L2, LogitLaplace
from vistok.losses.pooled_discriminator import PooledDiscriminator
from vistok.losses.semantic import SemanticGuide
from vistok.losses.vit_discriminator import ViTDiscriminator

__all__ = [
    "GAN_LOSSES",
    "L1",
    "L2",
    "LPIPS",
    "ARPrior",
    "BitEntropyLoss",
    "BlurDiscriminator",
    "DINODiscriminator",
    "ClassifierDistance",
    "DiffAugment",
    "Discriminator",
    "DiscriminatorLoss",
    "EncoderConfig",
    "EntropyLoss",
    "FrozenEncoder",
    "GeneratorLoss",
    "LeCam",
    "LogitLaplace",
    "PatchGAN",
    "Smoothing",
    "PooledDiscriminator",
    "SemanticGuide",
    "StyleGANDiscriminator",
    "ViTDiscriminator",
    "adaptive_weight",
    "alignment_distance",
    "contrastive_loss",
    "r1_penalty",
    "symmetric_cross_entropy",
]

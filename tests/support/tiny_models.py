"""One tiny model of every registered name, with random weights; tests of contracts run over all of them.

A new system adds its arguments to ``ARGUMENTS``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from vistok.checkpoints import registry
from vistok.draws import Keys
from vistok.generators.base import Generator
from vistok.generators.engine.autoregressive import AutoregressiveGenerator
from vistok.tokenizers.base import Tokenizer
from vistok.types import Condition, TokenSpec

RASTER = TokenSpec(16, 32, dim=4, grid=(4, 4))
TINY_VIT = {"dim": 32, "num_layers": 1, "num_heads": 2}
VIT = {"dim": 32, "num_layers": 1, "num_heads": 1, "mlp_dim": 32}

ARGUMENTS: dict[str, dict[str, Any]] = {
    "vit_vqgan": {
        "image_size": 16,
        "patch_size": 4,
        "encoder": VIT,
        "decoder": VIT,
        "codebook_size": 32,
        "codebook_embed_dim": 4,
    },
    "llamagen_vq": {
        "image_size": 16,
        "channels": 8,
        "encoder_channel_mult": (1, 1, 2),
        "decoder_channel_mult": (1, 1, 2),
        "res_blocks": 1,
        "z_channels": 8,
        "codebook_size": 32,
        "codebook_embed_dim": 4,
        "norm_groups": 4,
    },
    "kl_vae": {
        "image_size": 16,
        "block_out_channels": (8, 8, 16),
        "layers_per_block": 1,
        "latent_channels": 4,
        "encoder_attention": (2,),
        "norm_groups": 4,
    },
    "flextok": {
        "image_size": 16,
        "patch_size": 4,
        "encoder": {"dim": 32, "num_layers": 1, "head_dim": 16},
        "decoder": {"dim": 32, "num_layers": 1, "head_dim": 16},
        "num_tokens": 8,
        "levels": (4, 4, 2),
        "time_frequencies": 16,
        "num_steps": 2,
    },
    "dar": {
        "image_size": 16,
        "encoder_patch_size": 8,
        "encoder_dim": 64,
        "num_encoder_layers": 1,
        "decoder_dim": 64,
        "num_decoder_layers": 1,
        "codebook_size": 32,
        "codebook_embed_dim": 4,
        "num_tokens": 8,
        "num_groups": 4,
        "group_size": 2,
        "max_tokens": 8,
        "velocity": {"dim": 64, "num_layers": 1, "patch_size": 8},
        "num_steps": 4,
    },
    "gigatok": {
        "image_size": 16,
        "num_tokens": 8,
        "encoder_size": {"dim": 16, "num_layers": 1, "num_heads": 2},
        "decoder_size": {"dim": 24, "num_layers": 2, "num_heads": 2},
        "alignment": {"dim": 12, "layer": 1},
        "channels": 8,
        "encoder_channel_mult": (1, 1, 2),
        "decoder_channel_mult": (1, 1, 2),
        "res_blocks": 1,
        "z_channels": 32,
        "codebook_size": 32,
        "codebook_embed_dim": 8,
        "norm_groups": 4,
    },
    "framewise": {
        "num_frames": 2,
        "tokenizer": {
            "name": "vit_vqgan",
            "image_size": 8,
            "patch_size": 4,
            "encoder": VIT,
            "decoder": VIT,
            "codebook_size": 32,
            "codebook_embed_dim": 4,
        },
    },
    "larp": {
        "num_frames": 4,
        "image_size": 8,
        "temporal_patch_size": 2,
        "patch_size": 4,
        "num_tokens": 6,
        "encoder": {"dim": 16, "num_layers": 1, "num_heads": 2},
        "decoder": {"dim": 16, "num_layers": 1, "num_heads": 2},
        "codebook_size": 32,
        "codebook_dim": 4,
    },
    "maskgit_vqgan": {
        "image_size": 16,
        "channels": 8,
        "channel_mult": (1, 1, 2),
        "res_blocks": 1,
        "codebook_size": 32,
        "codebook_embed_dim": 4,
        "norm_groups": 4,
    },
    "titok": {
        "image_size": 16,
        "encoder_patch_size": 4,
        "decoder_patch_size": 4,
        "encoder": TINY_VIT,
        "decoder": TINY_VIT,
        "num_tokens": 8,
        "token_dim": 4,
        "codebook_size": 32,
        "codec": {
            "codebook_size": 16,
            "codebook_embed_dim": 4,
            "channels": 8,
            "channel_mult": (1, 1, 2),
            "res_blocks": 1,
            "norm_groups": 4,
        },
    },
    "ta_titok": {
        "image_size": 16,
        "encoder_patch_size": 4,
        "decoder_patch_size": 4,
        "encoder": TINY_VIT,
        "decoder": TINY_VIT,
        "num_tokens": 8,
        "token_dim": 4,
        "codebook_size": 32,
        "text_dim": 6,
        "text_length": 5,
    },
    "robustok": {
        "image_size": 16,
        "patch_size": 4,
        "dim": 32,
        "num_layers": 2,
        "num_heads": 2,
        "num_tokens": 16,
        "codebook_size": 32,
        "codebook_embed_dim": 4,
        "drop_path": 0.0,
    },
    "maskgit": {"spec": RASTER, "num_classes": 5, "dim": 16, "num_layers": 2, "num_heads": 2},
    "rar": {"spec": RASTER, "num_classes": 5, "dim": 16, "num_layers": 2, "num_heads": 2},
    "vit_vqgan_gpt": {
        "spec": RASTER,
        "num_classes": 5,
        "dim": 16,
        "num_layers": 2,
        "num_heads": 2,
        "condition_dropout": 0.1,
    },
    "mar": {
        "spec": TokenSpec(16, None, dim=4, grid=(4, 4)),
        "num_classes": 5,
        "dim": 16,
        "num_encoder_layers": 1,
        "num_decoder_layers": 1,
        "num_heads": 2,
        "num_head_layers": 1,
        "head_dim": 16,
        "buffer_size": 2,
    },
    "llama": {"spec": RASTER, "num_classes": 5, "dim": 16, "num_layers": 2, "num_heads": 2, "multiple_of": 16},
    "xar": {
        "spec": TokenSpec(16, None, dim=4, grid=(4, 4)),
        "num_classes": 5,
        "dim": 16,
        "num_encoder_layers": 1,
        "num_decoder_layers": 1,
        "num_heads": 2,
        "layout": {"entity": "cell", "size": 2},
    },
}


def official_vit_config(size: dict[str, int]) -> dict[str, int]:
    """The reference's names for the size of a ViT-VQGAN transformer."""
    return {"dim": size["dim"], "depth": size["num_layers"], "heads": size["num_heads"], "mlp_dim": size["mlp_dim"]}


def names(kind: str) -> list[str]:
    """The registered tokenizers or generators that have arguments here."""
    return [entry.name for entry in registry.ENTRIES if entry.kind == kind and entry.name in ARGUMENTS]


def next_token_generators() -> list[str]:
    """Those generators that predict one id after another."""
    return [name for name in names("generator") if issubclass(registry.entry(name).load(), AutoregressiveGenerator)]


def tiny(name: str, **arguments: Any) -> Tokenizer | Generator:
    """The tiny model of a registered name, in eval mode; ``arguments`` replace some of its own."""
    model = registry.entry(name).load()(**ARGUMENTS[name] | arguments)
    return randomise(model).eval()


def randomise(model: nn.Module) -> nn.Module:
    """Give every trained parameter random values: parameters that start at zero would hide mistakes."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                scale = 0.1 if parameter.ndim == 1 else parameter[0].numel() ** -0.5
                offset = 1.0 if parameter.ndim == 1 else 0.0
                parameter.copy_(offset + scale * torch.randn(parameter.shape, generator=generator))
    return model


def pixels(tokenizer: Tokenizer, batch: int = 3, seed: int = 0) -> torch.Tensor:
    """Random images (B, C, H, W) in [-1, 1] for a tokenizer."""
    return Keys.range(seed, batch).uniform("pixels", *tokenizer.input_shape) * 2 - 1


def token_ids(generator: Generator, batch: int = 3, seed: int = 0) -> torch.Tensor:
    """Random ids (B, L) for a generator."""
    uniforms = Keys.range(seed, batch).uniform("tokens", generator.spec.length)
    return (uniforms * generator.spec.codebook_size).long()


def training_loss(model: Tokenizer | Generator) -> torch.Tensor:
    """The sum of all that a tiny model can be trained on, on one batch of random data."""
    torch.manual_seed(0)
    draws = model.training_draws(Keys.range(0, 3))
    if isinstance(model, Tokenizer):
        output = model(pixels(model), draws=draws)
        terms = [term.mean() for term in output.losses.values()]
        return sum(terms if output.reconstruction is None else [*terms, output.reconstruction.square().mean()])
    spec = model.spec
    tokens = token_ids(model) if spec.discrete else Keys.range(0, 3).normal("x", spec.length, spec.dim)
    return model(tokens, labels(0, 1, 2), draws=draws).loss


def labels(*classes: int) -> Condition:
    return Condition.from_labels(torch.tensor(classes))


CAPTIONS = {"caption_dim": 6, "caption_length": 5}
"""Arguments of a tiny Llama that takes captions."""


def captions(batch: int = 3) -> Condition:
    """Left-padded captions of 5, 4, 3, ... valid positions."""
    features = Keys.range(1, batch).normal("caption", 5, 6)
    mask = torch.arange(5) >= torch.arange(batch)[:, None]
    return Condition.from_features(features, mask)

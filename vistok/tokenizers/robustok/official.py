"""Translates config and state dict of the reference of RobusTok into ours."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vistok.checkpoints import CheckpointError, rename
from vistok.checkpoints.official_config import OfficialConfig

BACKBONES = {
    "vit_small_patch14_dinov2.lvd142m": {"dim": 384, "num_layers": 12, "num_heads": 6},
    "vit_base_patch14_dinov2.lvd142m": {"dim": 768, "num_layers": 12, "num_heads": 12},
    "vit_large_patch14_dinov2.lvd142m": {"dim": 1024, "num_layers": 24, "num_heads": 16},
}
BASE = "vit_base_patch14_dinov2.lvd142m"

_LOSS = "of a training loss, which the run's config names"
_PERTURBATION = "of the perturbation in training, which the run's config names"
_ONE_PRODUCT = "of product quantization, which product_quant 1 is without"
WITHOUT_EFFECT = {
    "model_args.commit_loss_beta": _LOSS,
    "model_args.semantic_guide": _LOSS,
    "model_args.sem_loss_weight": _LOSS,
    "model_args.guide_type_1": _LOSS,
    "model_args.half_sem": _ONE_PRODUCT,
    "model_args.start_drop": _ONE_PRODUCT,
    "alpha": _PERTURBATION,
    "beta": _PERTURBATION,
    "delta": _PERTURBATION,
    "epoch": _PERTURBATION,
}
"""Keys of the reference's config that do not change what the model computes, each with the reason."""

RELEASED = {
    "model_args": {
        "codebook_size": 4096,
        "codebook_embed_dim": 64,
        "v_patch_nums": [16],
        "num_latent_tokens": 256,
        "encoder_model": BASE,
        "decoder_model": BASE,
    }
}


def arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """Our constructor arguments for the reference\'s config.

    Raises:
        CheckpointError: a key that is missing, unknown, or of a value that is not supported.
    """
    given = OfficialConfig(config, WITHOUT_EFFECT)
    unused = "no released model uses it"
    given.require("model_args.enc_type", "dinov2", why=unused)
    given.require("model_args.dec_type", "dinov2", why=unused)
    given.require("model_args.detail_guide", "none", why=unused)
    given.require("model_args.abs_pos_embed", True, why=unused)
    given.require("model_args.product_quant", 1, why=unused)
    given.require("model_args.codebook_drop", 0.0, why=unused)
    num_tokens = given.take("model_args.num_latent_tokens", 256)
    scales, side = list(given.take("model_args.v_patch_nums", [16])), math.isqrt(num_tokens)
    if scales != [side] or side * side != num_tokens:
        raise CheckpointError(
            f"model_args.v_patch_nums {scales} must be the one side of the square of num_latent_tokens {num_tokens}: "
            "tokens of several scales are not supported"
        )
    backbones = [given.take(f"model_args.{part}_model", BASE) for part in ("encoder", "decoder")]
    if backbones[0] != backbones[1] or backbones[0] not in BACKBONES:
        raise CheckpointError(
            f"model_args.encoder_model and decoder_model must be one of {', '.join(BACKBONES)}, both the same; got "
            f"{backbones[0]!r} and {backbones[1]!r}"
        )
    size = BACKBONES[backbones[0]]
    taken = {
        "image_size": given.take("overrides.img_size", 256),
        "patch_size": given.take("overrides.patch_size", 16),
        "dim": given.take("overrides.embed_dim", size["dim"]),
        "num_layers": given.take("overrides.depth", size["num_layers"]),
        "num_heads": given.take("overrides.heads", size["num_heads"]),
        "num_tokens": num_tokens,
        "codebook_size": given.take("model_args.codebook_size", 4096),
        "codebook_embed_dim": given.take("model_args.codebook_embed_dim", 64),
        "codebook_l2_norm": given.take("model_args.codebook_l2_norm", True),
        "drop_path": given.take("drop_path", 0.1),
    }
    given.finish()
    return taken


# Prefixes of keys that are no part of the model: the frozen encoder of the semantic loss, the level of each position,
# and usage counts of the codes.
TRAINING_ONLY = ("semantic_model.", "encoder.lvl1LC", "decoder.lvl1LC", "quantize.ema_vocab_hit_SV")

OFFICIAL_NAMES = [
    (r"encoder\.model\.patch_embed\.proj\.(\w+)", r"encoder.patch_embed.\1"),
    (r"(encoder|decoder)\.lvl_embed\.weight", r"\1.level_embedding.weight"),
    (r"(encoder|decoder)\.model\.cls_token", r"\1.backbone.class_token"),
    (r"(encoder|decoder)\.model\.pos_embed", r"\1.backbone.positions"),
    (r"(encoder|decoder)\.model\.norm\.(\w+)", r"\1.backbone.norm.\2"),
    (r"(encoder|decoder)\.model\.blocks\.(\d+)\.ls([12])\.gamma", r"\1.backbone.blocks.\2.scale\3.gamma"),
    (r"(encoder|decoder)\.model\.blocks\.(\d+)\.attn\.proj\.(\w+)", r"\1.backbone.blocks.\2.attn.out.\3"),
    (r"(encoder|decoder)\.model\.blocks\.(\d+)\.mlp\.fc1\.(\w+)", r"\1.backbone.blocks.\2.mlp.up.\3"),
    (r"(encoder|decoder)\.model\.blocks\.(\d+)\.mlp\.fc2\.(\w+)", r"\1.backbone.blocks.\2.mlp.down.\3"),
    (r"(encoder|decoder)\.model\.blocks\.(.+)", r"\1.backbone.blocks.\2"),
    (r"decoder\.to_pixel\.model\.(\w+)", r"decoder.to_pixels.\1"),
    (r"quant_conv\.(\w+)", r"pre_quant.\1"),
    (r"post_quant_conv\.(\w+)", r"post_quant.\1"),
    (r"quantize\.embedding\.weight", r"quantizer.embedding.weight"),
]


def our_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The reference's state dict under our names, without keys that only its training needs."""
    renamed = rename({key: value for key, value in state.items() if not key.startswith(TRAINING_ONLY)}, OFFICIAL_NAMES)
    points = ("pre_quant.weight", "post_quant.weight")  # 1x1 convolutions, linear layers here
    return {key: value.flatten(1) if key in points and value.ndim == 4 else value for key, value in renamed.items()}

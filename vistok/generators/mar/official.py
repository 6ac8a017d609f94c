"""The reference's arguments and state-dict names of MAR."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vistok.checkpoints.official_config import OfficialConfig
from vistok.types import TokenSpec

SIZES = {
    "base": {
        "dim": 768,
        "num_encoder_layers": 12,
        "num_decoder_layers": 12,
        "num_heads": 12,
        "num_head_layers": 6,
        "head_dim": 1024,
    },
    "large": {
        "dim": 1024,
        "num_encoder_layers": 16,
        "num_decoder_layers": 16,
        "num_heads": 16,
        "num_head_layers": 8,
        "head_dim": 1280,
    },
    "huge": {
        "dim": 1280,
        "num_encoder_layers": 20,
        "num_decoder_layers": 20,
        "num_heads": 16,
        "num_head_layers": 12,
        "head_dim": 1536,
    },
}

WITHOUT_EFFECT = {
    "num_sampling_steps": "an option of sampling",
    "grad_checkpointing": "saves memory in training",
}
"""Arguments of the reference that do not change what the model computes, each with the reason."""


def config(size: str) -> dict[str, Any]:
    """The reference's arguments of a published size."""
    dim, num_encoder_layers, num_decoder_layers, num_heads, num_head_layers, head_dim = SIZES[size].values()
    return {
        "encoder_embed_dim": dim,
        "encoder_depth": num_encoder_layers,
        "encoder_num_heads": num_heads,
        "decoder_embed_dim": dim,
        "decoder_depth": num_decoder_layers,
        "decoder_num_heads": num_heads,
        "diffloss_d": num_head_layers,
        "diffloss_w": head_dim,
        "attn_dropout": 0.1,
        "proj_dropout": 0.1,
    }


def arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """Our constructor's arguments.

    Raises:
        CheckpointError: a key that is missing, unknown, or of a value that is not supported.
    """
    given = OfficialConfig(config, WITHOUT_EFFECT)
    side = given.take("img_size", 256) // given.take("vae_stride", 16)
    taken = {
        "spec": TokenSpec(side * side, None, given.take("vae_embed_dim", 16), grid=(side, side)),
        "num_classes": given.take("class_num", 1000),
        "dim": given.take("encoder_embed_dim"),
        "num_encoder_layers": given.take("encoder_depth"),
        "num_decoder_layers": given.take("decoder_depth"),
        "num_heads": given.take("encoder_num_heads"),
        "decoder_dim": given.take("decoder_embed_dim"),
        "num_decoder_heads": given.take("decoder_num_heads"),
        "num_head_layers": given.take("diffloss_d"),
        "head_dim": given.take("diffloss_w"),
        "patch_size": given.take("patch_size", 1),
        "mlp_ratio": given.take("mlp_ratio", 4.0),
        "buffer_size": given.take("buffer_size", 64),
        "mask_rate_min": given.take("mask_ratio_min", 0.7),
        "diffusion_batch_mul": given.take("diffusion_batch_mul", 4),
        "condition_dropout": given.take("label_drop_prob", 0.1),
        "attn_drop": given.take("attn_dropout", 0.1),
        "proj_drop": given.take("proj_dropout", 0.1),
        "norm_eps": given.take("norm_eps", 1e-6),
    }
    given.finish()
    return taken


OFFICIAL_NAMES = [
    (r"class_emb\.weight", r"class_embedding.weight"),
    (r"fake_latent", r"null_class"),
    (r"(encoder|decoder)_pos_embed_learned", r"\1_positions"),
    (r"diffusion_pos_embed_learned", r"head_positions"),
    (r"z_proj\.(\w+)", r"input.\1"),
    (r"z_proj_ln\.(\w+)", r"input_norm.\1"),
    (r"decoder_embed\.(\w+)", r"bridge.\1"),
    (r"(\w+_blocks\.\d+)\.attn\.proj\.(\w+)", r"\1.attn.out.\2"),
    (r"(\w+_blocks\.\d+)\.mlp\.fc1\.(\w+)", r"\1.mlp.up.\2"),
    (r"(\w+_blocks\.\d+)\.mlp\.fc2\.(\w+)", r"\1.mlp.down.\2"),
    (r"diffloss\.net\.time_embed\.mlp\.(\d)\.(\w+)", r"head.time_embedding.mlp.\1.\2"),
    (r"diffloss\.net\.cond_embed\.(\w+)", r"head.condition.\1"),
    (r"diffloss\.net\.input_proj\.(\w+)", r"head.input.\1"),
    (r"diffloss\.net\.res_blocks\.(\d+)\.in_ln\.(\w+)", r"head.blocks.\1.norm.\2"),
    (r"diffloss\.net\.res_blocks\.(\d+)\.mlp\.0\.(\w+)", r"head.blocks.\1.mlp.up.\2"),
    (r"diffloss\.net\.res_blocks\.(\d+)\.mlp\.2\.(\w+)", r"head.blocks.\1.mlp.down.\2"),
    (r"diffloss\.net\.res_blocks\.(\d+)\.adaLN_modulation\.1\.(\w+)", r"head.blocks.\1.modulation.1.\2"),
    (r"diffloss\.net\.final_layer\.linear\.(\w+)", r"head.output.\1"),
    (r"diffloss\.net\.final_layer\.adaLN_modulation\.1\.(\w+)", r"head.modulation.1.\1"),
]

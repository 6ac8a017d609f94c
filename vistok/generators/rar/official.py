"""The reference's config and state-dict names of RAR."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from vistok.checkpoints.official_config import OfficialConfig
from vistok.types import TokenSpec

CODE_DIMS = {1024: 256, 4096: 64}
"""Code channels of the released tokenizers, by codebook size; the transformer does not depend on them."""

_SAMPLING = "a setting of sampling"
WITHOUT_EFFECT = {
    "model.generator.use_checkpoint": "saves memory in training",
    "model.generator.num_steps": _SAMPLING,
    "model.generator.randomize_temperature": _SAMPLING,
    "model.generator.guidance_scale": _SAMPLING,
    "model.generator.guidance_scale_pow": _SAMPLING,
    "model.generator.guidance_decay": _SAMPLING,
    "sigma": _SAMPLING,
    "guidance_scale": _SAMPLING,
    "guidance_scale_pow": _SAMPLING,
    "randomize_temperature": _SAMPLING,
    "losses.*": "of the reference's training run",
    "experiment.*": "of the reference's training run",
    "training.*": "of the reference's training run",
    "optimizer.*": "of the reference's training run",
    "lr_scheduler.*": "of the reference's training run",
    "dataset.*": "where the reference finds its data",
    "model.vq_model.pretrained_tokenizer_weight": "of the tokenizer",
}
"""Keys of the reference's config that do not change what the model computes, each with the reason."""


def config(size: Mapping[str, int], codebook_size: int) -> dict[str, Any]:
    """The reference's config of one of our sizes."""
    generator = {
        "hidden_size": size["dim"],
        "num_hidden_layers": size["num_layers"],
        "num_attention_heads": size["num_heads"],
        "intermediate_size": size["mlp_dim"],
    }
    return {"model": {"vq_model": {"codebook_size": codebook_size}, "generator": generator}}


def arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """Our constructor's arguments.

    Raises:
        CheckpointError: a key that is missing, unknown, or of a value that is not supported.
    """
    given = OfficialConfig(config, WITHOUT_EFFECT)
    length, codebook_size = given.take("model.generator.image_seq_len", 256), given.take("model.vq_model.codebook_size")
    side = math.isqrt(length)
    grid = (side, side) if side * side == length else None
    dim = given.take("model.generator.hidden_size")
    taken = {
        "spec": TokenSpec(length, codebook_size, CODE_DIMS.get(codebook_size, 256), grid=grid),
        "num_classes": given.take("model.generator.condition_num_classes", 1000),
        "dim": dim,
        "num_layers": given.take("model.generator.num_hidden_layers"),
        "num_heads": given.take("model.generator.num_attention_heads"),
        "mlp_dim": given.take("model.generator.intermediate_size"),
        "condition_dropout": given.take("model.generator.class_label_dropout", 0.1),
        "attn_drop": given.take("model.generator.attn_drop", 0.1),
        "proj_drop": given.take("model.generator.dropout", 0.1),
    }
    given.finish()
    return taken


OFFICIAL_NAMES = [
    (r"cls_token", r"start_token"),
    (r"pos_embed", r"positions"),
    (r"target_aware_pos_embed", r"target_positions"),
    (r"timesteps_embeddings", r"slots"),
    (r"embeddings\.weight", r"token_embedding.weight"),
    (r"blocks\.(\d+)\.attn\.proj\.(\w+)", r"blocks.\1.attn.out.\2"),
    (r"blocks\.(\d+)\.mlp\.fc1\.(\w+)", r"blocks.\1.mlp.up.\2"),
    (r"blocks\.(\d+)\.mlp\.fc2\.(\w+)", r"blocks.\1.mlp.down.\2"),
    (r"blocks\.(\d+)\.adaLN_modulation\.1\.(\w+)", r"blocks.\1.modulation.1.\2"),
    (r"adaln_before_head\.adaLN_modulation\.1\.(\w+)", r"norm.modulation.1.\1"),
    (r"lm_head\.(\w+)", r"output.\1"),
]

"""The reference's config and state-dict names of LPD."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vistok.checkpoints import CheckpointError
from vistok.checkpoints.official_config import OfficialConfig
from vistok.types import TokenSpec

WITHOUT_EFFECT = {"grad_checkpointing": "saves memory in training"}
"""Keys of the reference's config that do not change what the model computes, each with the reason."""


def config(size: Mapping[str, int], image_size: int) -> dict[str, Any]:
    """The reference's config of one of our sizes."""
    return {
        "img_size": image_size,
        "vqgan_stride": 16,
        "decoder_embed_dim": size["dim"],
        "decoder_depth": size["num_layers"],
        "decoder_num_heads": size["num_heads"],
        "mlp_ratio": 4.0,
        "label_drop_prob": 0.1,
        "class_num": 1000,
        "vqgan_vocab_size": 16384,
    }


def arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """Our constructor's arguments. Dropout is 0 if the config does not name it.

    Raises:
        CheckpointError: a key that is missing, unknown, or of a value that is not supported.
    """
    given = OfficialConfig(config, WITHOUT_EFFECT)
    image_size, stride = given.take("img_size", 256), given.take("vqgan_stride", 16)
    if image_size % stride:
        raise CheckpointError(f"img_size {image_size} is no multiple of vqgan_stride {stride}")
    side = image_size // stride
    taken = {
        "spec": TokenSpec(side * side, given.take("vqgan_vocab_size", 16384), 8, grid=(side, side)),
        "num_classes": given.take("class_num", 1000),
        "dim": given.take("decoder_embed_dim"),
        "num_layers": given.take("decoder_depth"),
        "num_heads": given.take("decoder_num_heads"),
        "mlp_ratio": given.take("mlp_ratio", 4.0),
        "condition_dropout": given.take("label_drop_prob", 0.1),
        "attn_drop": given.take("attn_dropout", 0.0),
        "proj_drop": given.take("proj_dropout", 0.0),
    }
    given.finish()
    return taken


OFFICIAL_NAMES = [
    (r"class_emb\.weight", r"class_embedding.weight"),
    (r"token_emb\.weight", r"token_embedding.weight"),
    (r"fake_latent", r"null_class"),
    (r"pos_embed", r"positions"),
    (r"mask_token", r"query"),
    (r"z_proj_ln\.(\w+)", r"input_norm.\1"),
    (r"blocks\.(\d+)\.attn\.proj\.(\w+)", r"blocks.\1.attn.out.\2"),
    (r"blocks\.(\d+)\.mlp\.fc1\.(\w+)", r"blocks.\1.mlp.up.\2"),
    (r"blocks\.(\d+)\.mlp\.fc2\.(\w+)", r"blocks.\1.mlp.down.\2"),
    (r"head\.weight", r"output.weight"),
]

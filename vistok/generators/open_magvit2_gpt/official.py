"""The reference's arguments and state-dict names (github.com/TencentARC/SEED-Voken)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from vistok.checkpoints import CheckpointError
from vistok.checkpoints.official_config import OfficialConfig
from vistok.types import TokenSpec

WITHOUT_EFFECT = {
    "vocab_size": "the heads have the sizes of factorized_bits",
}
"""Arguments of the reference that do not change what the model computes, each with the reason."""


def config(size: Mapping[str, int]) -> dict[str, Any]:
    """The reference's arguments of a released generator."""
    return {
        "vocab_size": 512,
        "block_size": 256,
        "spatial_n_layer": size["num_layers"],
        "factorized_n_layer": size["num_intra_layers"],
        "factorized_bits": [6, 12],
        "n_head": size["num_heads"],
        "dim": size["dim"],
        "cond_dim": size["dim"],
        "token_drop": 0.1,
        "resid_dropout_p": 0.1,
        "token_factorization": True,
        "class_num": 1000,
    }


def arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """Our constructor's arguments.

    Raises:
        CheckpointError: keys that are unknown or not supported.
    """
    given = OfficialConfig(config, WITHOUT_EFFECT)
    dim, length, bits = given.take("dim"), given.take("block_size", 256), tuple(given.take("factorized_bits", (6, 12)))
    side = math.isqrt(length)
    if side * side != length:
        raise CheckpointError(f"block_size {length} is no square; the positions are those of a square raster")
    given.require("token_factorization", True, why="without sub-tokens this is another model")
    given.require("cond_dim", dim, why="the class embedding is the first token")
    for name in ("embd_pdrop", "drop_path_rate"):
        given.require(name, 0.0, why="no released model has it")
    found = {
        "spec": TokenSpec(length, 2 ** sum(bits), dim=sum(bits), grid=(side, side)),
        "num_classes": given.take("class_num", 1000),
        "dim": dim,
        "num_layers": given.take("spatial_n_layer"),
        "num_intra_layers": given.take("factorized_n_layer"),
        "num_heads": given.take("n_head"),
        "factorized_bits": bits,
        "multiple_of": given.take("multiple_of", 256),
        "token_drop": given.take("token_drop", 0.1),
        "attn_drop": given.take("attn_dropout_p", 0.0),
        "proj_drop": given.take("resid_dropout_p", 0.1),
        "ffn_drop": given.take("ffn_dropout_p", 0.1),
        "rope_base": given.take("rope_base", 10000.0),
        "norm_eps": given.take("norm_eps", 1e-5),
    }
    given.finish()
    return found


BLOCKS = {"spatial_blocks": "blocks", "factorized_blocks": "intra_blocks"}
OFFICIAL_NAMES = [
    (r"class_emb\.embedding_table\.weight", r"class_embedding.weight"),
    (r"pre_emb\.weight", r"token_embedding.0.weight"),
    (r"post_emb\.weight", r"token_embedding.1.weight"),
    (r"head\.(\d+)\.weight", r"output.\1.weight"),
    *(
        (rf"{theirs}\.(\d+)\.{part}\.weight", rf"{ours}.\1.{name}.weight")
        for theirs, ours in BLOCKS.items()
        for part, name in (
            (r"attention_norm", "norm1"),
            (r"attention\.wqkv", "attn.qkv"),
            (r"attention\.wo", "attn.out"),
            (r"ffn_norm", "norm2"),
            (r"feed_forward\.w1", "ffn.gate"),
            (r"feed_forward\.w3", "ffn.up"),
            (r"feed_forward\.w2", "ffn.down"),
        )
    ),
]

"""The reference's config and state-dict names of RandAR."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from vistok.checkpoints.official_config import OfficialConfig
from vistok.generators.llama import OFFICIAL_NAMES as LLAMA_NAMES
from vistok.types import TokenSpec

CODE_DIMS = {1024: 256, 16384: 8}
"""Code channels of the released tokenizers, by codebook size; the transformer does not depend on them."""

WITHOUT_EFFECT = {
    "grad_checkpointing": "saves memory in training",
    "zero_class_qk": "the reference reads it nowhere: the class is never rotated",
    "num_inference_steps": "a setting of sampling",
    "initializer_range": "the deviation of weights before training",
    "max_batch_size": "the size of a cache, which is made to measure",
    "max_seq_len": "the size of a cache, which is made to measure",
    "caption_dim": "of models with captions, and this one has classes",
}
"""Keys of the reference's config that do not change what the model computes, each with the reason."""


def config(size: Mapping[str, int], codebook_size: int) -> dict[str, Any]:
    """The reference's config of one of our sizes."""
    return {
        "dim": size["dim"],
        "n_layer": size["num_layers"],
        "n_head": size["num_heads"],
        "block_size": 256,
        "vocab_size": codebook_size,
    }


def arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """Our constructor's arguments.

    Raises:
        CheckpointError: a key that is missing, unknown, or of a value that is not supported.
    """
    given = OfficialConfig(config, WITHOUT_EFFECT)
    given.require("model_type", "c2i", why="no model of captions was released")
    given.require("cls_token_num", 1, why="a class is one token")
    given.require("drop_path_rate", 0.0, why="no released model has it")
    given.require("ffn_dim_multiplier", None, why="no released model has it")
    length, codebook_size = given.take("block_size", 256), given.take("vocab_size", 16384)
    side = math.isqrt(length)
    grid = (side, side) if side * side == length else None
    taken = {
        "spec": TokenSpec(length, codebook_size, CODE_DIMS.get(codebook_size, 8), grid=grid),
        "num_classes": given.take("num_classes", 1000),
        "dim": given.take("dim"),
        "num_layers": given.take("n_layer"),
        "num_heads": given.take("n_head"),
        "num_kv_heads": given.take("n_kv_head", None),
        "multiple_of": given.take("multiple_of", 256),
        "position_order": given.take("position_order", "random"),
        "condition_dropout": given.take("class_dropout_prob", 0.1),
        "token_drop": given.take("token_dropout_p", 0.1),
        "attn_drop": given.take("attn_dropout_p", 0.0),
        "proj_drop": given.take("resid_dropout_p", 0.1),
        "ffn_drop": given.take("ffn_dropout_p", 0.1),
        "rope_base": given.take("rope_base", 10000),
        "norm_eps": given.take("norm_eps", 1e-5),
    }
    given.finish()
    return taken


OFFICIAL_NAMES = [*LLAMA_NAMES, (r"pos_instruct_embeddings", r"position_instruction")]

"""The official generators of LARP: ``Llama`` with absolute positions, conditioned on a class or on given frames.

LARP (arXiv 2410.21264), github.com/hywang66/LARP (MIT).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vistok.checkpoints import CheckpointError, OfficialCheckpoint, OfficialReference, rename
from vistok.checkpoints.official_config import OfficialConfig
from vistok.checkpoints.registry import Licence
from vistok.types import TokenSpec

# Keys of the reference's config that do not change what the model computes.
WITHOUT_EFFECT = {
    "rope_base": "the reference rotates nothing",
    "max_batch_size": "the reference never reads it",
}


def build(model_class: type[Any], config: Mapping[str, Any], state_dict: Mapping[str, Tensor]) -> Any:
    """The generator that the reference's arguments describe, with its weights.

    Raises:
        CheckpointError: arguments that are unknown or not supported, or weights that do not fit.
    """
    arguments = _arguments(config)
    model = model_class(**arguments)
    # Files that were saved after sampling hold the sampling cache.
    state = {key: tensor for key, tensor in state_dict.items() if not re.search(r"\.attention\.kv_cache\.", key)}
    state = rename(state, OFFICIAL_NAMES)
    if "positions" in state:
        state["positions"] = state["positions"].flatten(0, -2)  # (1, positions, D)
    elif arguments["positions"] == "sincos":
        state["positions"] = model.positions  # a fixed table need not be in the file
    return model.with_official_weights(state)


def _arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    given = OfficialConfig(config, WITHOUT_EFFECT)
    given.require("model_type", "class_cond", why="the only model of the reference")
    given.require("drop_path_rate", 0.0, why="no released model has it")
    length, prefix = given.take("max_seq_len"), given.take("cls_token_num", 1)
    frames = given.take("frame_prediction", False)
    if not frames and prefix != 1:
        raise CheckpointError(f"cls_token_num is {prefix}; a class-conditional model has 1 token in front")
    num_classes, dropout = given.take("num_classes", 1000), given.take("class_dropout_prob", 0.1)
    arguments = {
        # The released tokenizer has codes of 16 channels; the transformer itself does not depend on them.
        "spec": TokenSpec(length, given.take("vocab_size"), dim=16),
        "num_classes": 0 if frames else num_classes,
        "condition_tokens": prefix - 1 if frames else 0,
        "condition_dropout": 0.0 if frames else dropout,
        "dim": given.take("dim"),
        "num_layers": given.take("n_layer"),
        "num_heads": given.take("n_head"),
        "num_kv_heads": given.take("n_kv_head", None),
        "multiple_of": given.take("multiple_of", 256),
        "ffn_dim_multiplier": given.take("ffn_dim_multiplier", None) or 1.0,
        "norm_eps": given.take("norm_eps", 1e-5),
        "token_drop": given.take("token_dropout_p", 0.1),
        "attn_drop": given.take("attn_dropout_p", 0.0),
        "proj_drop": given.take("resid_dropout_p", 0.1),
        "ffn_drop": given.take("ffn_dropout_p", 0.1),
        "positions": "sincos" if given.take("use_fixed_pe", False) else "learned",
        "num_positions": length + prefix - 1,
        "drop_before_positions": True,
        "init_std": given.take("initializer_range", 0.02),
    }
    given.finish()
    return arguments


OFFICIAL_NAMES = [
    (r"cls_embedding\.embedding_table\.weight", r"class_embedding.weight"),
    (r"tok_embeddings\.weight", r"token_embedding.weight"),
    (r"abs_pe", r"positions"),
    (r"layers\.(\d+)\.attention_norm\.weight", r"blocks.\1.norm1.weight"),
    (r"layers\.(\d+)\.attention\.wqkv\.weight", r"blocks.\1.attn.qkv.weight"),
    (r"layers\.(\d+)\.attention\.wo\.weight", r"blocks.\1.attn.out.weight"),
    (r"layers\.(\d+)\.ffn_norm\.weight", r"blocks.\1.norm2.weight"),
    (r"layers\.(\d+)\.feed_forward\.w1\.weight", r"blocks.\1.ffn.gate.weight"),
    (r"layers\.(\d+)\.feed_forward\.w3\.weight", r"blocks.\1.ffn.up.weight"),
    (r"layers\.(\d+)\.feed_forward\.w2\.weight", r"blocks.\1.ffn.down.weight"),
]


def _released(frame_prediction: bool) -> dict[str, Any]:
    return {
        "dim": 1280,
        "n_layer": 30,
        "n_head": 20,
        "vocab_size": 8192,
        "max_seq_len": 1024,
        "cls_token_num": 1025 if frame_prediction else 1,
        "num_classes": 101,
        "frame_prediction": frame_prediction,
    }


TOKENIZER = "hywang66/LARP-L-long-tokenizer/model.safetensors"
CHECKPOINTS = (
    OfficialCheckpoint(
        "hywang66/LARP-L-long-AR", "model.safetensors", _released(frame_prediction=False), tokenizer=TOKENIZER
    ),
    OfficialCheckpoint(
        "hywang66/LARP-L-long-AR-FP", "model.safetensors", _released(frame_prediction=True), tokenizer=TOKENIZER
    ),
)

REFERENCE = OfficialReference(build, CHECKPOINTS, Licence("MIT"))

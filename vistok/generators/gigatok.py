"""The official generators of GigaTok: ``Llama`` with learned positions, or with LlamaGen's 2D RoPE.

GigaTok (arXiv 2504.08736), github.com/SilentView/GigaTok (MIT).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypeVar

from torch import Tensor

from vistok.checkpoints import CheckpointError, Model, OfficialCheckpoint, OfficialReference, rename
from vistok.checkpoints.official_config import OfficialConfig
from vistok.checkpoints.registry import Licence
from vistok.types import TokenSpec

T = TypeVar("T", bound=Model)

WITHOUT_EFFECT = {
    "args.initializer_range": "the deviation of weights before training",
    "args.max_batch_size": "the size of a cache, which is made to measure",
    "args.max_seq_len": "the size of a cache, which is made to measure",
    "args.use_flash_attn": "another kernel for the same attention",
    "args.no_adaLN_before": "where adaptive norms begin, which are not supported",
    "args.caption_dim": "of models with captions, which are not supported",
}
"""Arguments of the reference that do not change what the model computes, each with the reason."""

POSITIONS = {"gpt_1d": "learned", "gpt_2d": "rope2d"}


def build(model_class: type[T], config: Mapping[str, Any], state_dict: Mapping[str, Tensor]) -> T:
    """The generator that the reference's arguments describe, with its weights.

    Args:
        config: ``model`` ("gpt_1d" or "gpt_2d") and ``args``.

    Raises:
        CheckpointError: arguments that are unknown or not supported, or weights that do not fit.
    """
    model = model_class(**_arguments(config))
    return model.with_official_weights(rename(state_dict, OFFICIAL_NAMES))


def _arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    given = OfficialConfig(config, WITHOUT_EFFECT)
    kind = given.take("model", "gpt_1d")
    if kind not in POSITIONS:
        raise CheckpointError(f"model {kind!r} is not supported; there are {', '.join(POSITIONS)}")
    given.require("args.model_type", "c2i", why="all released models take classes")
    given.require("args.cls_token_num", 1, why="a class is one token")
    for name, off in (
        ("ffn_dim_multiplier", None),
        ("drop_path_rate", 0.0),
        ("rope", False),
        ("use_adaLN", False),
        ("use_simple_adaLN", False),
    ):
        given.require(f"args.{name}", off, why="no released model has it")
    length, dim = given.take("args.block_size", 256), given.take("args.dim")
    side = math.isqrt(length)
    grid = (side, side) if kind == "gpt_2d" else None
    arguments = {
        # The released tokenizers have codes of 8 channels; the transformer itself does not depend on them.
        "spec": TokenSpec(length, given.take("args.vocab_size", 16384), dim=8, grid=grid),
        "num_classes": given.take("args.num_classes", 1000),
        "dim": dim,
        "num_layers": given.take("args.n_layer"),
        "num_heads": given.take("args.n_head"),
        "num_kv_heads": given.take("args.n_kv_head", None),
        "qk_norm": given.take("args.use_qk_norm", False),
        "multiple_of": given.take("args.multiple_of", 256),
        "condition_dropout": given.take("args.class_dropout_prob", 0.1),
        "token_drop": given.take("args.token_dropout_p", 0.1),
        "attn_drop": given.take("args.attn_dropout_p", 0.0),
        "proj_drop": given.take("args.resid_dropout_p", 0.1),
        "ffn_drop": given.take("args.ffn_dropout_p", 0.1),
        "norm_eps": given.take("args.norm_eps", 1e-5),
        "positions": POSITIONS[kind],
        "rope_base": given.take("args.rope_base", 10000),
        "position_std": dim**-0.5 if kind == "gpt_1d" else None,
    }
    given.finish()
    return arguments


OFFICIAL_NAMES = [
    (r"cls_embedding\.embedding_table\.weight", r"class_embedding.weight"),
    (r"tok_embeddings\.weight", r"token_embedding.weight"),
    (r"positional_embedding", r"positions"),
    (r"layers\.(\d+)\.attention_norm\.weight", r"blocks.\1.norm1.weight"),
    (r"layers\.(\d+)\.attention\.wqkv\.weight", r"blocks.\1.attn.qkv.weight"),
    (r"layers\.(\d+)\.attention\.wo\.weight", r"blocks.\1.attn.out.weight"),
    (r"layers\.(\d+)\.attention\.([qk]_norm)\.(\w+)", r"blocks.\1.attn.\2.\3"),
    (r"layers\.(\d+)\.ffn_norm\.weight", r"blocks.\1.norm2.weight"),
    (r"layers\.(\d+)\.feed_forward\.w1\.weight", r"blocks.\1.ffn.gate.weight"),
    (r"layers\.(\d+)\.feed_forward\.w3\.weight", r"blocks.\1.ffn.up.weight"),
    (r"layers\.(\d+)\.feed_forward\.w2\.weight", r"blocks.\1.ffn.down.weight"),
]


def _released(dim: int, num_layers: int, num_heads: int) -> dict[str, Any]:
    return {"model": "gpt_1d", "args": {"dim": dim, "n_layer": num_layers, "n_head": num_heads}}


_B, _XL, _XXL = _released(768, 12, 12), _released(1280, 36, 20), _released(1536, 48, 24)
TOKENIZERS = {
    "SS": "VQ_SS256_e100",
    "SB": "VQ_SB256_e200",
    "BL": "VQ_BL256_e200",
    "BL_dino_disc": "VQ_BL256_dino_disc",
    "XLXXL": "VQ_XLXXL256_e300",
}
"""The tokenizer of each released generator, by the part of the generator's name after _VQ_."""
CHECKPOINTS = tuple(
    # On Google Drive, linked from the repository's README.
    OfficialCheckpoint("", f"{name}.pt", config, tokenizer=f"{TOKENIZERS[name.partition('_VQ_')[2]]}.pt")
    for name, config in {
        "GPT_B256_e300_VQ_SS": _B,
        "GPT_B256_e300_VQ_SB": _B,
        "GPT_B256_e300_VQ_BL": _B,
        "GPT_B256_e300_VQ_BL_dino_disc": _B,
        "GPT_B256_e300_VQ_XLXXL": _B,
        "GPT_XL256_e300_VQ_BL": _XL,
        "GPT_XXL256_e300_VQ_BL": _XXL,
        "GPT_XXL256_e300_VQ_XLXXL": _XXL,
    }.items()
)

REFERENCE = OfficialReference(build, CHECKPOINTS, Licence("MIT"))

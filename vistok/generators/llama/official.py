"""Official arguments and weight names of the systems that generate with a Llama; see ``Llama.from_official``.

LlamaGen (github.com/FoundationVision/LlamaGen), D-AR (github.com/showlab/D-AR) and GigaTok
(github.com/SilentView/GigaTok).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from vistok.checkpoints import CheckpointError, OfficialCheckpoint
from vistok.types import TokenSpec

SIZES = {
    "B": {"dim": 768, "num_layers": 12, "num_heads": 12},
    "L": {"dim": 1024, "num_layers": 24, "num_heads": 16},
    "XL": {"dim": 1280, "num_layers": 36, "num_heads": 20},
    "XXL": {"dim": 1536, "num_layers": 48, "num_heads": 24},
    "XXXL": {"dim": 2560, "num_layers": 48, "num_heads": 40},
    "1B": {"dim": 2048, "num_layers": 22, "num_heads": 32},
    "3B": {"dim": 3200, "num_layers": 24, "num_heads": 32},
    "7B": {"dim": 4096, "num_layers": 32, "num_heads": 32},
}


def _llamagen(size: str, block_size: int) -> dict[str, Any]:
    dim, num_layers, num_heads = SIZES[size].values()
    return {"dim": dim, "n_layer": num_layers, "n_head": num_heads, "block_size": block_size, "vocab_size": 16384}


def _captions(block_size: int) -> dict[str, Any]:
    return _llamagen("XL", block_size) | {"model_type": "t2i", "cls_token_num": 120, "caption_dim": 2048}


def _dar(size: str) -> dict[str, Any]:
    return _llamagen(size, 256) | {"positions": "rope1d"}


def _gigatok(size: str) -> dict[str, Any]:
    return {"model": "gpt_1d", "args": _llamagen(size, 256)}


CHECKPOINTS = (
    OfficialCheckpoint("FoundationVision/LlamaGen", "c2i_B_256.pt", _llamagen("B", 256)),
    OfficialCheckpoint("FoundationVision/LlamaGen", "c2i_B_384.pt", _llamagen("B", 576)),
    OfficialCheckpoint("FoundationVision/LlamaGen", "c2i_L_256.pt", _llamagen("L", 256)),
    OfficialCheckpoint("FoundationVision/LlamaGen", "c2i_L_384.pt", _llamagen("L", 576)),
    OfficialCheckpoint("FoundationVision/LlamaGen", "c2i_XL_384.pt", _llamagen("XL", 576)),
    OfficialCheckpoint("FoundationVision/LlamaGen", "c2i_XXL_384.pt", _llamagen("XXL", 576)),
    OfficialCheckpoint("FoundationVision/LlamaGen", "c2i_3B_384.pt", _llamagen("3B", 576)),
    OfficialCheckpoint("peizesun/llamagen_t2i", "t2i_XL_stage1_256.pt", _captions(256)),
    OfficialCheckpoint("peizesun/llamagen_t2i", "t2i_XL_stage2_512.pt", _captions(1024)),
    OfficialCheckpoint("showlab/D-AR", "D-AR-L-360K.pt", _dar("L")),
    OfficialCheckpoint("showlab/D-AR", "D-AR-XL-360K.pt", _dar("XL")),
    # On Google Drive, linked from the repository's README.
    OfficialCheckpoint("", "GPT_B256_e300_VQ_SS.pt", _gigatok("B")),
    OfficialCheckpoint("", "GPT_B256_e300_VQ_SB.pt", _gigatok("B")),
    OfficialCheckpoint("", "GPT_B256_e300_VQ_BL.pt", _gigatok("B")),
    OfficialCheckpoint("", "GPT_B256_e300_VQ_BL_dino_disc.pt", _gigatok("B")),
    OfficialCheckpoint("", "GPT_B256_e300_VQ_XLXXL.pt", _gigatok("B")),
    OfficialCheckpoint("", "GPT_XL256_e300_VQ_BL.pt", _gigatok("XL")),
    OfficialCheckpoint("", "GPT_XXL256_e300_VQ_BL.pt", _gigatok("XXL")),
    OfficialCheckpoint("", "GPT_XXL256_e300_VQ_XLXXL.pt", _gigatok("XXL")),
)

NO_EFFECT = {
    "initializer_range": "the deviation of weights before training",
    "max_batch_size": "the size of a cache, which is made to measure",
    "max_seq_len": "the size of a cache, which is made to measure",
    "use_flash_attn": "another kernel for the same attention",
    "no_adaLN_before": "where adaptive norms begin, of models that have them",
}
"""Arguments of the references that change no result, each with the reason."""

POSITIONS_OF = {"gpt_1d": "learned", "gpt_2d": "rope2d"}
_MUST_BE = {
    "ffn_dim_multiplier": (None,),
    "drop_path_rate": (0.0,),
    "rope": (False,),
    "use_adaLN": (False,),
    "use_simple_adaLN": (False,),
}


def model_arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of ``Llama`` for those of LlamaGen, with ``positions``; or for GigaTok's ``model`` and ``args``.

    Raises:
        CheckpointError: an argument that is unknown, or whose value is not supported; the message names it.
    """
    given = dict(config)
    if "args" in given:
        given = _unnested(given)
    for name, allowed in _MUST_BE.items():
        value = given.pop(name, allowed[0])
        if value not in allowed:
            raise CheckpointError(f"{name} {value!r} is not supported; every released model has {allowed[0]!r}")
    for name in NO_EFFECT:
        given.pop(name, None)
    captions = _one_of("model_type", given.pop("model_type", "c2i"), ("c2i", "t2i")) == "t2i"
    length, positions = given.pop("block_size", 256), given.pop("positions", "rope2d")
    condition_length = given.pop("cls_token_num", 120 if captions else 1)
    if not captions:
        _one_of("cls_token_num", condition_length, (1,))
    side = math.isqrt(length)
    # The released tokenizers have codes of 8 channels; the transformer itself does not depend on them.
    grid = (side, side) if positions == "rope2d" else None
    caption_dim, num_classes = given.pop("caption_dim", 2048), given.pop("num_classes", 1000)
    arguments = {
        "spec": TokenSpec(length, given.pop("vocab_size", 16384), dim=8, grid=grid),
        "num_classes": num_classes,
        "dim": given.pop("dim"),
        "num_layers": given.pop("n_layer"),
        "num_heads": given.pop("n_head"),
        "num_kv_heads": given.pop("n_kv_head", None),
        "multiple_of": given.pop("multiple_of", 256),
        "caption_dim": caption_dim if captions else None,
        "caption_length": condition_length if captions else 120,
        "condition_dropout": given.pop("class_dropout_prob", 0.1),
        "token_drop": given.pop("token_dropout_p", 0.1),
        "attn_drop": given.pop("attn_dropout_p", 0.0),
        "proj_drop": given.pop("resid_dropout_p", 0.1),
        "ffn_drop": given.pop("ffn_dropout_p", 0.1),
        "positions": positions,
        "rope_base": given.pop("rope_base", 10000),
        "norm_eps": given.pop("norm_eps", 1e-5),
        "qk_norm": given.pop("use_qk_norm", False),
    }
    if positions == "learned":
        arguments["position_std"] = arguments["dim"] ** -0.5
    _refuse(given)
    return arguments


def _unnested(config: dict[str, Any]) -> dict[str, Any]:
    """GigaTok's arguments, with the positions of its two kinds of model."""
    args, kind = dict(config.pop("args")), config.pop("model", "gpt_1d")
    _refuse(config)
    return args | {"positions": POSITIONS_OF[_one_of("model", kind, POSITIONS_OF)]}


def _one_of(name: str, value: Any, allowed: Iterable[Any]) -> Any:
    if value not in allowed:
        raise CheckpointError(f"{name} {value!r} is not supported; allowed: {', '.join(map(repr, allowed))}")
    return value


def _refuse(names: Iterable[str]) -> None:
    if names:
        raise CheckpointError(f"unknown arguments of the reference: {', '.join(sorted(names))}")


def clean_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Drop the rotary table and the sampling cache that some released files hold; both are recomputed."""
    return {key: tensor for key, tensor in state.items() if key != "freqs_cis" and ".attention.kv_cache." not in key}


OFFICIAL_NAMES = [
    (r"positional_embedding", r"positions"),
    (r"layers\.(\d+)\.attention\.([qk]_norm)\.(\w+)", r"blocks.\1.attn.\2.\3"),
    (r"cls_embedding\.embedding_table\.weight", r"class_embedding.weight"),
    (r"cls_embedding\.cap_proj\.fc1\.weight", r"caption_projection.0.weight"),
    (r"cls_embedding\.cap_proj\.fc2\.weight", r"caption_projection.2.weight"),
    (r"cls_embedding\.uncond_embedding", r"null_caption"),
    (r"tok_embeddings\.weight", r"token_embedding.weight"),
    (r"layers\.(\d+)\.attention_norm\.weight", r"blocks.\1.norm1.weight"),
    (r"layers\.(\d+)\.attention\.wqkv\.weight", r"blocks.\1.attn.qkv.weight"),
    (r"layers\.(\d+)\.attention\.wo\.weight", r"blocks.\1.attn.out.weight"),
    (r"layers\.(\d+)\.ffn_norm\.weight", r"blocks.\1.norm2.weight"),
    (r"layers\.(\d+)\.feed_forward\.w1\.weight", r"blocks.\1.ffn.gate.weight"),
    (r"layers\.(\d+)\.feed_forward\.w3\.weight", r"blocks.\1.ffn.up.weight"),
    (r"layers\.(\d+)\.feed_forward\.w2\.weight", r"blocks.\1.ffn.down.weight"),
]

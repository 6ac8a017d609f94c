"""The reference's config and state-dict names of VAR's transformer."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vistok.checkpoints import CheckpointError, rename
from vistok.checkpoints.official_config import OfficialConfig
from vistok.types import TokenSpec

SCALES_256 = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
SCALES_512 = (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)
WITHOUT_EFFECT: Mapping[str, str] = {}
"""Arguments of the reference that do not change what the model computes, each with the reason."""

REBUILT = r"lvl_1L|attn_bias_for_masking|blocks\.\d+\.attn\.zero_k_bias"
"""Buffers that follow from the sizes: the scale of each token, the mask, and the bias that keys do not have."""


def spec_of(scales: tuple[int, ...], codebook_size: int = 4096, dim: int = 32) -> TokenSpec:
    """The tokens of square grids with these sides."""
    grids = tuple((side, side) for side in scales)
    return TokenSpec(sum(side * side for side in scales), codebook_size, dim, scales=grids)


def size(depth: int) -> dict[str, Any]:
    """Our arguments of a published depth. Only the deepest model is for 512 px and has a shared modulation."""
    deep = depth == 36
    return {
        "spec": spec_of(SCALES_512 if deep else SCALES_256),
        "dim": 64 * depth,
        "num_layers": depth,
        "num_heads": depth,
        "drop_path": 0.1 * depth / 24,
        "shared_modulation": deep,
    }


def config(depth: int) -> dict[str, Any]:
    """The reference's config of a published depth."""
    return {
        "num_classes": 1000,
        "depth": depth,
        "embed_dim": 64 * depth,
        "num_heads": depth,
        "mlp_ratio": 4.0,
        "drop_rate": 0.0,
        "attn_drop_rate": 0.0,
        "drop_path_rate": 0.1 * depth / 24,
        "norm_eps": 1e-6,
        "shared_aln": depth == 36,
        "cond_drop_rate": 0.1,
        "attn_l2_norm": True,
        "patch_nums": list(SCALES_512 if depth == 36 else SCALES_256),
    }


def arguments(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Our constructor's arguments. The size and dimension of the codebook come from the weights.

    Raises:
        CheckpointError: a key that is missing, unknown, or of a value that is not supported.
    """
    for key in ("word_embed.weight", "head.weight"):
        if key not in state or state[key].ndim != 2:
            raise CheckpointError(f"the official state dict has no matrix {key}")
    given = OfficialConfig(config, WITHOUT_EFFECT)
    scales = tuple(given.take("patch_nums", SCALES_256))
    taken = {
        "spec": spec_of(scales, state["head.weight"].shape[0], state["word_embed.weight"].shape[1]),
        "num_classes": given.take("num_classes", 1000),
        "dim": given.take("embed_dim", 1024),
        "num_layers": given.take("depth", 16),
        "num_heads": given.take("num_heads", 16),
        "mlp_ratio": given.take("mlp_ratio", 4.0),
        "shared_modulation": given.take("shared_aln", False),
        "l2_norm": given.take("attn_l2_norm", any(key.endswith(".scale_mul_1H11") for key in state)),
        "condition_dropout": given.take("cond_drop_rate", 0.1),
        "attn_drop": given.take("attn_drop_rate", 0.0),
        "proj_drop": given.take("drop_rate", 0.0),
        "drop_path": given.take("drop_path_rate", 0.0),
        "norm_eps": given.take("norm_eps", 1e-6),
    }
    given.finish()
    return taken


OFFICIAL_NAMES = [
    (r"pos_start", r"start_positions"),
    (r"pos_1LC", r"positions"),
    (r"lvl_embed\.weight", r"scale_embedding.weight"),
    (r"word_embed\.(\w+)", r"input.\1"),
    (r"class_emb\.weight", r"class_embedding.weight"),
    (r"shared_ada_lin\.1\.(\w+)", r"shared_modulation.1.\1"),
    (r"head_nm\.ada_lin\.1\.(\w+)", r"norm.modulation.1.\1"),
    (r"head\.(\w+)", r"output.\1"),
    (r"blocks\.(\d+)\.attn\.scale_mul_1H11", r"blocks.\1.attn.q_norm.log_scale"),
    (r"blocks\.(\d+)\.attn\.mat_qkv\.weight", r"blocks.\1.attn.qkv.weight"),
    (r"blocks\.(\d+)\.attn\.proj\.(\w+)", r"blocks.\1.attn.out.\2"),
    (r"blocks\.(\d+)\.ffn\.fc1\.(\w+)", r"blocks.\1.mlp.up.\2"),
    (r"blocks\.(\d+)\.ffn\.fc2\.(\w+)", r"blocks.\1.mlp.down.\2"),
    (r"blocks\.(\d+)\.ada_lin\.1\.(\w+)", r"blocks.\1.modulation.modulation.1.\2"),
    (r"blocks\.(\d+)\.ada_gss", r"blocks.\1.modulation.offsets"),
]


def our_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The reference's state dict under our names, without the buffers that follow from the sizes.

    Raises:
        CheckpointError: keys that have a bias, which the released models do not.
    """
    for key, tensor in state.items():
        if key.endswith(".zero_k_bias") and not tensor.is_meta and bool((tensor != 0).any()):
            raise CheckpointError(f"{key} is not zero; keys without a bias are all that is supported")
    kept = {key: tensor for key, tensor in state.items() if not re.fullmatch(REBUILT, key)}
    return rename(kept, OFFICIAL_NAMES)

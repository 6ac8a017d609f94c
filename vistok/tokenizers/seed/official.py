"""Translates sizes and state dict of the reference of SEED into ours."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vistok.checkpoints import CheckpointError, rename
from vistok.checkpoints.official_config import OfficialConfig

RELEASED = {
    "hidden": 768,
    "heads": 12,
    "ffn": 3072,
    "layers": 12,
    "vision_width": 1408,
    "codes": 8192,
    "code_dim": 32,
    "block_heads": 12,
    "depth": 4,
    "target": 1024,
}
"""The sizes of the second tokenizer, which the reference hard-codes."""

CAUSAL_QUERIES = 32
"""The reference masks self-attention only for this number of queries."""

TOWER, TOWER_HEADS = "eva_giant_patch14_224", 16

_TEXT = re.compile(
    r"(Qformer|Reverse_Qformer)\.(cls\..*|bert\.embeddings\.(position_ids|(word|position|token_type)_embeddings\..*)"
    r"|bert\.encoder\.layer\.\d+\.(intermediate|output)\..*|bert\.pooler\..*)|(vision_proj|text_proj|itm_head)\..*|temp"
)
"""Keys of layers that read text in the first stage of training, and of buffers."""

_QFORMERS = {"Qformer": "qformer", "Reverse_Qformer": "reverse"}
_NAMES = tuple(
    rule
    for theirs, ours in _QFORMERS.items()
    for layer in [rf"{theirs}\.bert\.encoder\.layer\.(\d+)\."]
    for rule in (
        (rf"{theirs}\.bert\.embeddings\.LayerNorm\.(.*)", rf"{ours}.norm.\1"),
        (rf"{layer}attention\.self\.(.*)", rf"{ours}.layers.\1.attention.\2"),
        (rf"{layer}attention\.output\.dense\.(.*)", rf"{ours}.layers.\1.attention.out.\2"),
        (rf"{layer}attention\.output\.LayerNorm\.(.*)", rf"{ours}.layers.\1.attention.norm.\2"),
        (rf"{layer}crossattention\.self\.(.*)", rf"{ours}.layers.\1.cross_attention.\2"),
        (rf"{layer}crossattention\.output\.dense\.(.*)", rf"{ours}.layers.\1.cross_attention.out.\2"),
        (rf"{layer}crossattention\.output\.LayerNorm\.(.*)", rf"{ours}.layers.\1.cross_attention.norm.\2"),
        (rf"{layer}intermediate_query\.dense\.(.*)", rf"{ours}.layers.\1.mlp.up.\2"),
        (rf"{layer}output_query\.dense\.(.*)", rf"{ours}.layers.\1.mlp.down.\2"),
        (rf"{layer}output_query\.LayerNorm\.(.*)", rf"{ours}.layers.\1.norm.\2"),
    )
) + tuple(
    rule
    for theirs, ours in (("blocks", "query_blocks"), ("blocks_image", "image_blocks"))
    for rule in (
        (rf"{theirs}\.(\d+)\.attn\.proj\.(.*)", rf"{ours}.blocks.\1.attn.out.\2"),
        (rf"{theirs}\.(\d+)\.mlp\.fc1\.(.*)", rf"{ours}.blocks.\1.mlp.up.\2"),
        (rf"{theirs}\.(\d+)\.mlp\.fc2\.(.*)", rf"{ours}.blocks.\1.mlp.down.\2"),
        (rf"{theirs}\.(\d+)\.(.*)", rf"{ours}.blocks.\1.\2"),
    )
)
OFFICIAL_NAMES = (
    *_NAMES,
    (r"query_tokens", "qformer.queries"),
    (r"reverse_tokens", "reverse.queries"),
    (r"pos_embed", "query_blocks.positions"),
    (r"pos_embed_image", "image_blocks.positions"),
    (r"ln_vision\.(.*)", r"vision_norm.\1"),
    (r"visual_encoder\.(.*)", r"tower.model.\1"),
    (r"encode_task_layer\.(.*)", r"to_latents.\1"),
    (r"decode_task_layer\.(.*)", r"from_latents.\1"),
    (r"quantize\.(.*)", r"quantizer.\1"),
    (r"distill_image_proj\.(.*)", r"image_proj.\1"),
)


def own_keys(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict without layers that read text, and without buffers."""
    return {key: tensor for key, tensor in state.items() if not _TEXT.fullmatch(key)}


def our_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return rename(own_keys(state), OFFICIAL_NAMES)


def has_reverse(state: Mapping[str, Tensor]) -> bool:
    """Whether a reverse Q-Former makes the embedding.

    Raises:
        CheckpointError: the keys are of neither form of the decoder, or of both.
    """
    reverse, down = "reverse_tokens" in state, "image_down.0.weight" in state
    if reverse == down:
        found = "both" if reverse else "neither"
        raise CheckpointError(
            f"the official state dict has {found} of reverse_tokens and image_down.0.weight; one of them tells how the "
            "embedding is made"
        )
    return reverse


def without_effect(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Keys of the config that do not change what the model of this ``state`` computes, each with the reason."""
    return {} if has_reverse(state) else {"reverse_layers": "there is no reverse Q-Former"}


def arguments(given: OfficialConfig, state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Our constructor arguments for the reference\'s config.

    Raises:
        CheckpointError: weights that are missing, or a config of another form of the decoder.
    """
    if "query_tokens" not in state:
        raise CheckpointError("the official state dict lacks query_tokens")
    reverse, queries = has_reverse(state), state["query_tokens"].shape[1]
    given.require("reverse", reverse, why="the weights are of that form")
    found = {
        "dim": given.take("hidden"),
        "num_heads": given.take("heads"),
        "mlp_dim": given.take("ffn"),
        "num_layers": given.take("layers"),
        "context_dim": given.take("vision_width"),
        "codebook_size": given.take("codes"),
        "code_dim": given.take("code_dim"),
        "block_heads": given.take("block_heads"),
        "num_blocks": given.take("depth"),
        "target_dim": given.take("target"),
        "num_queries": queries,
        "cross_attention_every": _cross_attention_every(state),
        "causal": queries == CAUSAL_QUERIES,
    }
    if reverse:
        found["reverse_layers"] = given.take("reverse_layers", 4)
    else:
        downs = sorted(key for key in state if re.fullmatch(r"image_down\.\d+\.weight", key))
        found["image_down"] = tuple(state[key].shape[0] for key in downs)
    return found | _tower(state)


def _cross_attention_every(state: Mapping[str, Tensor]) -> int:
    """The distance between layers with cross-attention; 2 if there is only one such layer."""
    pattern = re.compile(r"Qformer\.bert\.encoder\.layer\.(\d+)\.crossattention\.self\.query\.weight")
    layers = sorted(int(match[1]) for key in state if (match := pattern.fullmatch(key)))
    return layers[1] - layers[0] if len(layers) > 1 else 2


def _tower(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The vision transformer, if the weights hold one."""
    prefix = "visual_encoder."
    if not any(key.startswith(prefix) for key in state):
        return {}
    try:
        kernel, positions = state[f"{prefix}patch_embed.proj.weight"], state[f"{prefix}pos_embed"]
    except KeyError as error:
        raise CheckpointError(f"the official state dict lacks {error}") from error
    blocks = {key.split(".")[2] for key in state if key.startswith(f"{prefix}blocks.")}
    dim, patch_size = kernel.shape[0], kernel.shape[-1]
    tower = {
        "name": TOWER,
        "dim": dim,
        "num_layers": len(blocks),
        "num_heads": TOWER_HEADS,
        "patch_size": patch_size,
    }
    return {"tower": tower, "image_size": patch_size * math.isqrt(positions.shape[1] - 1)}

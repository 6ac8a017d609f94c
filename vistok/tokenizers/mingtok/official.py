"""Translates config and state dict of the reference of MingTok into ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vistok.checkpoints import CheckpointError, rename
from vistok.checkpoints.official_config import OfficialConfig
from vistok.nn.vit import FeedForward
from vistok.tokenizers.mingtok.networks import StageConfig

HEAD_DIM = 64

RELEASED = {
    "low_level_encoder": {
        "img_size": 512,
        "patch_size": 32,
        "depth": 12,
        "embed_dim": 768,
        "ffn_layer": "swiglufused",
        "out_dim": 32,
    },
    "semantic_decoder": {
        "in_dim": 32,
        "patch_size": 32,
        "embed_dim": 1024,
        "decoder_depth": 24,
        "ffn_layer": "swiglufused",
    },
    "pixel_decoder": {
        "patch_size": 16,
        "decoder_depth": 24,
        "norm_pix_loss": True,
        "embed_dim": 1024,
        "loss_type": "L1-plain",
    },
    "scaling_factor": 8.09449291,
    "mean": 1.46817409,
}
"""The reference's config of MingTok-Vision."""

WITHOUT_EFFECT = {
    "*.drop_path_rate": "the reference accepts and ignores it",
    "*.initialization_method": "the reference accepts and ignores it",
    "*.fa_enable": "the kernel that computes attention; attention is causal with either",
    "pixel_decoder.norm_pix_loss": "of the loss, in which L1-plain ignores it",
    "pixel_decoder.loss_type": "the loss, which the run's config names",
    "model_dtype": "the type of numbers, which callers choose",
    "frozen": "whether the reference trains the encoder",
    "pretrained_checkpoint": "where the reference finds its weights",
    "_name_or_path": "where the reference was saved",
    "architectures": "the class of the reference",
    "auto_map": "the class of the reference",
    "model_type": "the class of the reference",
    "torch_dtype": "the type of numbers, which callers choose",
    "transformers_version": "of the reference's libraries",
}
"""Keys of the reference's config that do not change what the model computes, each with the reason."""

FEED_FORWARDS: dict[str, FeedForward] = {"swiglu": "swiglu", "swiglufused": "swiglu", "mlp": "gelu"}


def arguments(given: OfficialConfig) -> dict[str, Any]:
    """Our constructor arguments for the reference\'s config."""
    encoder = _stage(given, "low_level_encoder", "depth")
    semantic = _stage(given, "semantic_decoder", "decoder_depth")
    pixel = _stage(given, "pixel_decoder", "decoder_depth", has_choice=False)
    for part in ("low_level_encoder", "semantic_decoder", "pixel_decoder"):
        given.require(f"{part}.init_values", None, why="the blocks have no layer scale")
    patch_size = given.take("low_level_encoder.patch_size")
    latent_dim = given.take("low_level_encoder.out_dim")
    given.require("semantic_decoder.patch_size", patch_size, why="both stages have the same tokens")
    given.require("semantic_decoder.in_dim", latent_dim, why="both stages have the same tokens")
    return {
        "image_size": given.take("low_level_encoder.img_size"),
        "in_channels": given.take("low_level_encoder.in_chans", 3),
        "patch_size": patch_size,
        "pixel_patch_size": given.take("pixel_decoder.patch_size"),
        "encoder": encoder,
        "semantic_decoder": semantic,
        "pixel_decoder": pixel,
        "latent_dim": latent_dim,
        "latent_mean": given.take("mean", 0.0),
        "latent_scale": 1 / given.take("scaling_factor", 1.0),
    }


def _stage(given: OfficialConfig, part: str, depth: str, *, has_choice: bool = True) -> StageConfig:
    dim = given.take(f"{part}.embed_dim")
    if dim % HEAD_DIM:
        raise CheckpointError(f"{part}.embed_dim is {dim}; the reference has heads of {HEAD_DIM} channels")
    name = given.take(f"{part}.ffn_layer", "mlp") if has_choice else "mlp"
    if name not in FEED_FORWARDS:
        raise CheckpointError(f"{part}.ffn_layer is {name!r}; known: {', '.join(FEED_FORWARDS)}")
    return StageConfig(dim, given.take(f"{part}.{depth}"), dim // HEAD_DIM, FEED_FORWARDS[name])


SURPLUS = ("target_backbone",)
"""Prefix of the teacher's keys in training files, which are no part of the tokenizer."""
JOINT_PREFIX = "vision."
"""Prefix of the tokenizer's keys in files of Ming-UniVision, which hold a further trained tokenizer."""

OFFICIAL_NAMES = [
    (r"low_level_encoder\.cls_token", r"encoder.class_token"),
    (r"low_level_encoder\.pos_embed", r"encoder.positions"),
    (r"low_level_encoder\.patch_embed\.proj\.(\w+)", r"encoder.patches.\1"),
    (r"low_level_encoder\.out_norm\.(\w+)", r"encoder.norm.\1"),
    (r"low_level_encoder\.out_proj\.(\w+)", r"encoder.output.\1"),
    (r"low_level_encoder\.blocks\.0\.(.+)", r"encoder.blocks.\1"),
    (r"semantic_decoder\.in_proj\.(\w+)", r"semantic_decoder.input.\1"),
    (r"(semantic_decoder|pixel_decoder)\.blocks\.0\.(.+)", r"\1.blocks.\2"),
    (r"sem_to_pix\.(\w+)", r"pixel_decoder.spread_out.\1"),
]
BLOCK_NAMES = [
    (r"(.+)\.attn\.proj\.(\w+)", r"\1.attn.out.\2"),
    (r"(.+)\.mlp\.fc1\.(\w+)", r"\1.mlp.up.\2"),
    (r"(.+)\.mlp\.fc2\.(\w+)", r"\1.mlp.down.\2"),
    (r"(.+)\.mlp\.w3\.(\w+)", r"\1.mlp.down.\2"),
]


def own_keys(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tokenizer's part of a file: of Ming-UniVision the keys with ``JOINT_PREFIX``, of training files all but the
    teacher."""
    if any(key.startswith(JOINT_PREFIX) for key in state):
        state = {key.removeprefix(JOINT_PREFIX): state[key] for key in state if key.startswith(JOINT_PREFIX)}
    return {key: tensor for key, tensor in state.items() if not key.startswith(SURPLUS)}


def our_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The reference's state dict under our names; fused gated layers become two layers."""
    renamed = {}
    for key, tensor in rename(rename(state, OFFICIAL_NAMES), BLOCK_NAMES).items():
        stem, found, kind = key.partition(".mlp.w12.")
        if found and isinstance(tensor, Tensor) and len(tensor) % 2 == 0:
            renamed[f"{stem}.mlp.gate.{kind}"], renamed[f"{stem}.mlp.up.{kind}"] = tensor.chunk(2)
        else:
            renamed[key] = tensor
    return renamed

"""D-AR's official arguments and weight names, translated; see ``dar.DAR.from_official``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from vistok.checkpoints import fuse, rename
from vistok.checkpoints.official_config import OfficialConfig
from vistok.tokenizers.dar.networks import ROPE_BASE

WITHOUT_EFFECT: dict[str, str] = {}
"""Arguments of the reference that do not change what the model computes, each with the reason."""

V1 = {
    "encoder_patch_size": 16,
    "num_encoder_layers": 8,
    "num_decoder_layers": 8,
    "query_low_rank": True,
    "encoder_dim": 768,
    "decoder_dim": 768,
    "vq_dim": 8,
    "vq_codebook_size": 16384,
    "num_denoising_steps": 8,
    "num_query_groups": 8,
    "num_all_queries": 256,
    "queries_per_step": 32,
    "vq_enable": True,
    "diff_decoder": {
        "in_dim": 3,
        "out_dim": 3,
        "dim": 768,
        "cond_dim": 768,
        "patch_size": 8,
        "depth": 12,
        "data_std": 0.6,
        "time_shift": 2,
    },
}


class ConfigStandIn(Mapping):
    """Replaces the config object that the trainer pickles: a mapping around the dictionary ``_data``."""

    def __init__(self, data: Mapping[str, Any] | None = None):
        self._data = dict(data or {})

    def __getitem__(self, key: str) -> Any:
        return self._data[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._data)

    def __len__(self) -> int:
        return len(self._data)


STAND_INS = ((ConfigStandIn, "config_util.Config"),)


def embedded_config(file: Path, content: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The arguments that a training file holds beside its weights."""
    config = content.get("config")
    return config.get("model") if isinstance(config, Mapping) else None


def model_arguments(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Arguments of ``DAR`` for those of the reference.

    Raises:
        CheckpointError: a model without a quantizer, an argument that is unknown, or a value that is not supported.
    """
    given = OfficialConfig(config, WITHOUT_EFFECT)
    given.require("vq_enable", True, why="without a quantizer there are no ids")
    given.require("output_resolution", 0, why="images come out at the size at which they are made")
    decoder_dim, channels = given.take("decoder_dim"), given.take("diff_decoder.in_dim", 3)
    given.require("diff_decoder.cond_dim", decoder_dim, why="it is decoder_dim")
    given.require("diff_decoder.out_dim", channels, why="velocities have the channels of pixels, in_dim")
    aligned = _aligned_layer(config["diff_decoder"])
    given.take("diff_decoder.repa_layer", None)  # read above
    arguments = {
        "image_size": given.take("sampling_resolution", 256),
        "in_channels": channels,
        "encoder_patch_size": given.take("encoder_patch_size"),
        "encoder_dim": given.take("encoder_dim"),
        "num_encoder_layers": given.take("num_encoder_layers"),
        "decoder_dim": decoder_dim,
        "num_decoder_layers": given.take("num_decoder_layers"),
        "codebook_size": given.take("vq_codebook_size"),
        "codebook_embed_dim": given.take("vq_dim"),
        "num_tokens": given.take("num_all_queries"),
        "num_groups": given.take("num_query_groups"),
        "group_size": given.take("queries_per_step"),
        "query_rank": QUERY_RANK if given.take("query_low_rank", True) else None,
        "rope_base": float(given.take("rope_base_len", ROPE_BASE)),
        "velocity": {
            "dim": given.take("diff_decoder.dim"),
            "num_layers": given.take("diff_decoder.depth"),
            "patch_size": given.take("diff_decoder.patch_size"),
            "share_time_embedding": given.take("diff_decoder.share_time_encoding", False),
            "modulated_output": given.take("diff_decoder.mlp_head", False),
            "rope_base": float(given.take("diff_decoder.rope_base_len", ROPE_BASE)),
        },
        "data_std": float(given.take("diff_decoder.data_std")),
        "time_shift": float(given.take("diff_decoder.time_shift")),
        "num_steps": given.take("num_denoising_steps"),
        "alignment": {"layer": aligned} if _is_aligned(config["diff_decoder"], state) else None,
    }
    given.finish()
    return arguments


def our_names(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of the reference under our names."""
    flow = config["diff_decoder"]
    state = {key: tensor for key, tensor in state.items() if key != USAGE_COUNTER}
    if not _is_aligned(flow, state):
        state = {key: tensor for key, tensor in state.items() if ".net.repa_out." not in key}
    if flow.get("mlp_head", False):
        state = {key: tensor for key, tensor in state.items() if ".net.conv_out." not in key}
    state = fuse(state, ("attention.q", "attention.k", "attention.v"), "attention.qkv")
    state = rename(fuse(state, ("cross_attn.k", "cross_attn.v"), "cross_attn.kv"), OFFICIAL_NAMES)
    return {key: _as_linear(key, tensor) for key, tensor in state.items()}


def _aligned_layer(flow: Mapping[str, Any]) -> int:
    return flow.get("repa_layer", 8)


def _is_aligned(flow: Mapping[str, Any], state: Mapping[str, Tensor]) -> bool:
    """Whether there is an alignment head that was trained: one on a layer that does not exist never ran."""
    return _aligned_layer(flow) < flow["depth"] and "diff_decoder.net.repa_out.0.weight" in state


def _as_linear(key: str, tensor: Tensor) -> Tensor:
    """The reference stores some linear layers as 1x1 convolutions."""
    pointwise = key.startswith(("pre_quant", "post_quant", "velocity.patches_")) and tensor.ndim == 4
    return tensor.flatten(1) if pointwise and tensor.shape[2:] == (1, 1) else tensor


QUERY_RANK = 8
USAGE_COUNTER = "quantize.codebook_used"  # which codes the last training batches chose; no part of the model
_NET = r"diff_decoder\.net\."
_BLOCK = _NET + r"blocks\.(\d+)\."
OFFICIAL_NAMES = [
    (r"patchify\.(\w+)", r"to_patches.\1"),
    (r"query_embedding\.weight", r"queries.weight"),
    (r"query_linear\.(\w+)", r"query_proj.\1"),
    (r"quant_in_conv\.weight", r"pre_quant.weight"),
    (r"quant_out_conv\.weight", r"post_quant.weight"),
    (r"quantize\.embedding\.weight", r"quantizer.embedding.weight"),
    (r"decoder_embedding\.weight", r"token_positions.weight"),
    (r"(\w+)_layers\.(\d+)\.attention\.proj\.(\w+)", r"\1.\2.attn.out.\3"),
    (r"(\w+)_layers\.(\d+)\.attention\.(\w+)\.(\w+)", r"\1.\2.attn.\3.\4"),
    (r"(\w+)_layers\.(\d+)\.mlp\.fc1\.(\w+)", r"\1.\2.mlp.up.\3"),
    (r"(\w+)_layers\.(\d+)\.mlp\.fc2\.(\w+)", r"\1.\2.mlp.down.\3"),
    (r"(\w+)_layers\.(\d+)\.(.+)", r"\1.\2.\3"),
    (_BLOCK + r"attention\.proj\.(\w+)", r"velocity.blocks.\1.attn.out.\2"),
    (_BLOCK + r"attention\.(\w+)\.(\w+)", r"velocity.blocks.\1.attn.\2.\3"),
    (_BLOCK + r"cross_attn\.proj\.(\w+)", r"velocity.blocks.\1.cross_attn.out.\2"),
    (_BLOCK + r"cross_attn\.(\w+)\.(\w+)", r"velocity.blocks.\1.cross_attn.\2.\3"),
    (_BLOCK + r"mlp\.fc1\.(\w+)", r"velocity.blocks.\1.mlp.up.\2"),
    (_BLOCK + r"mlp\.fc2\.(\w+)", r"velocity.blocks.\1.mlp.down.\2"),
    (_BLOCK + r"adaLN_modulation\.1\.(\w+)", r"velocity.blocks.\1.modulation.\2"),
    (_BLOCK + r"time_embed\.mlp\.(\d)\.(\w+)", r"velocity.blocks.\1.time_embedding.mlp.\2.\3"),
    (_BLOCK + r"cond_embed\.(\d)\.(\w+)", r"velocity.blocks.\1.cond_embed.\2.\3"),
    (_NET + r"time_embed\.mlp\.(\d)\.(\w+)", r"velocity.time_embedding.mlp.\1.\2"),
    (_NET + r"cond_mlp\.(\w+)", r"velocity.cond_proj.\1"),
    (_NET + r"conv_in\.(\w+)", r"velocity.patches_in.\1"),
    (_NET + r"(?:conv_out|linear_out\.linear)\.(\w+)", r"velocity.patches_out.\1"),
    (_NET + r"linear_out\.adaLN_modulation\.1\.(\w+)", r"velocity.modulation.\1"),
    (_NET + r"repa_out\.(\d)\.(\w+)", r"velocity.alignment_head.\1.\2"),
]

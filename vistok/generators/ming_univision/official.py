"""The reference's config and state-dict names of Ming-UniVision.

Released files also hold a further trained tokenizer, with the prefix "vision."; it is loaded as a tokenizer.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vistok.checkpoints import CheckpointError, rename
from vistok.checkpoints.official_config import OfficialConfig
from vistok.generators.ming_univision.networks import BackboneConfig, FlowHeadConfig
from vistok.types import TokenSpec

OF_THE_TOKENIZER = (
    "low_level_encoder.img_size",
    "low_level_encoder.patch_size",
    "low_level_encoder.depth",
    "low_level_encoder.embed_dim",
    "low_level_encoder.ffn_layer",
    "low_level_encoder.in_chans",
    "low_level_encoder.drop_path_rate",
    "low_level_encoder.initialization_method",
    "low_level_encoder.fa_enable",
    "semantic_decoder.patch_size",
    "semantic_decoder.in_dim",
    "semantic_decoder.decoder_depth",
    "semantic_decoder.ffn_layer",
    "semantic_decoder.drop_path_rate",
    "semantic_decoder.initialization_method",
    "semantic_decoder.fa_enable",
    "pixel_decoder.patch_size",
    "pixel_decoder.decoder_depth",
    "pixel_decoder.embed_dim",
    "pixel_decoder.norm_pix_loss",
    "pixel_decoder.loss_type",
    "pixel_decoder.drop_path_rate",
    "pixel_decoder.initialization_method",
    "pixel_decoder.fa_enable",
    "model_dtype",
    "scaling_factor",
    "mean",
    "frozen",
    "pretrained_checkpoint",
)

WITHOUT_EFFECT = {
    **{f"mingtok.{key}": "of the tokenizer, which is read by itself" for key in OF_THE_TOKENIZER},
    "llm_config.embedding_dropout": "of the reference's training",
    "llm_config.attention_dropout": "of the reference's training",
    "llm_config.output_dropout": "of the reference's training",
    "llm_config.initializer_range": "of the reference's training",
    "llm_config.router_aux_loss_coef": "of the reference's training",
    "llm_config.output_router_logits": "of the reference's training",
    "llm_config.pad_token_id": "padding is hidden, whatever it is",
    "llm_config.use_cache": "the reference's choice of computing",
    "llm_config.torch_dtype": "the type of numbers, which callers choose",
    "llm_config._attn_implementation": "the kernel that computes attention",
    "llm_config.architectures": "the class of the reference",
    "llm_config.auto_map.*": "the class of the reference",
    "llm_config.model_type": "the class of the reference",
    "llm_config.transformers_version": "of the reference's libraries",
    "vishead_diffloss_config.num_sampling_steps": "a sampling option",
}
"""Keys of the reference's config that do not change what the model computes, each with the reason."""

GEN_METHOD = re.compile(r"flow_matching_swiglu-(\d+(?:\.\d+)?)")


def arguments(given: OfficialConfig) -> dict[str, Any]:
    """Our constructor's arguments."""
    given.require("llm_config.hidden_act", "silu", why="the feed-forwards have SiLU")
    given.require("llm_config.norm_head", False, None, why="the head of words is not normalised")
    given.require("llm_config.tie_word_embeddings", False, None, why="the head of words has weights of its own")
    given.require("llm_config.rope_scaling", None, why="positions are rotated as they are")
    take = {name: f"llm_config.{name}" for name in ("vocab_size", "image_start_token", "eos_token_id")}
    vocabulary_size, image_start = given.take(take["vocab_size"]), given.take(take["image_start_token"])
    return {
        "spec": _spec(given),
        "feature_dim": given.take("mingtok.semantic_decoder.embed_dim"),
        "text_vocabulary_size": vocabulary_size,
        "text_length": 512,
        "given_length": 1024,
        "vocabulary_size": vocabulary_size,
        "image_start": image_start,
        "image_patch": given.take("llm_config.image_patch_token"),
        "image_end": given.take("llm_config.image_end_token", image_start + 1),
        "end": given.take(take["eos_token_id"], 0),
        "backbone": _backbone(given),
        "head": _head(given),
        "num_projection_layers": given.take("mlp_depth", 1),
    }


def _spec(given: OfficialConfig) -> TokenSpec:
    encoder = "mingtok.low_level_encoder"
    count = given.take("llm_config.num_image_tokens_for_gen", None)
    if count is None:  # if given, it overrides the size of the encoder
        count = (given.take(f"{encoder}.img_size") // given.take(f"{encoder}.patch_size")) ** 2
    if math.isqrt(count) ** 2 != count:
        raise CheckpointError(f"llm_config.num_image_tokens_for_gen is {count}; the images that are drawn are square")
    side = math.isqrt(count)
    return TokenSpec(count, None, given.take(f"{encoder}.out_dim"), grid=(side, side))


def _backbone(given: OfficialConfig) -> BackboneConfig:
    def take(name: str, *default: Any) -> Any:
        return given.take(f"llm_config.{name}", *default)

    num_experts = take("num_experts", None) or 0
    experts = {
        "num_experts": num_experts,
        "experts_per_token": take("num_experts_per_tok", 1),
        "expert_dim": take("moe_intermediate_size", 1),
        "num_shared_experts": take("num_shared_experts", None) or 0,
        "renormalise_experts": take("norm_topk_prob", True),
        "has_image_router": take("multi_gate", False),
        "num_dense_layers": take("first_k_dense_replace", 0),
    }
    num_heads = take("num_attention_heads")
    return BackboneConfig(
        dim=take("hidden_size"),
        num_layers=take("num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=take("num_key_value_heads", None) or num_heads,
        head_dim=take("head_dim", None),
        mlp_dim=take("intermediate_size", 1),
        **experts,
        qkv_bias=take("use_qkv_bias", False),
        out_bias=take("use_bias", False),
        norm_eps=take("rms_norm_eps", 1e-6),
        rope_base=take("rope_theta", 10000.0),
        max_length=take("max_position_embeddings", 2048),
    )


def _head(given: OfficialConfig) -> FlowHeadConfig:
    section = "vishead_diffloss_config"
    method = given.take(f"{section}.gen_method", "flow_matching_swiglu-4")
    found = GEN_METHOD.fullmatch(str(method))
    if not found:
        raise CheckpointError(f"{section}.gen_method is {method!r}; known: 'flow_matching_swiglu-' and a number")
    ratio = float(found[1])
    return FlowHeadConfig(given.take(f"{section}.diffloss_w", 3072), given.take(f"{section}.diffloss_d", 12), ratio)


FLOW_NAMES = [
    (r"net\.time_embed\.mlp\.(.+)", r"network.time_embedding.mlp.\1"),
    (r"net\.cond_embed\.(\w+)", r"network.condition.\1"),
    (r"net\.input_proj\.(\w+)", r"network.input.\1"),
    (r"net\.res_blocks\.(\d+)\.in_ln\.(\w+)", r"network.blocks.\1.norm.\2"),
    (r"net\.res_blocks\.(\d+)\.mlp\.w3\.(\w+)", r"network.blocks.\1.mlp.down.\2"),
    (r"net\.res_blocks\.(\d+)\.mlp\.w12\.(\w+)", r"network.blocks.\1.mlp.w12.\2"),
    (r"net\.res_blocks\.(\d+)\.adaLN_modulation\.1\.(\w+)", r"network.blocks.\1.modulation.1.\2"),
    (r"net\.final_layer\.linear\.(\w+)", r"network.output.\1"),
    (r"net\.final_layer\.adaLN_modulation\.1\.(\w+)", r"network.modulation.1.\1"),
]
_LAYER = r"model\.model\.layers\.(\d+)\."
OFFICIAL_NAMES = [
    (r"model\.model\.word_embeddings\.weight", r"embedding.weight"),
    (r"model\.model\.norm\.weight", r"backbone.norm.weight"),
    (r"model\.lm_head\.weight", r"output.weight"),
    (r"linear_proj\.(.+)", r"projection.\1"),
    (r"model\.vis_head\.(.+)", r"to_condition.\1"),
    (_LAYER + r"input_layernorm\.weight", r"backbone.blocks.\1.norm1.weight"),
    (_LAYER + r"post_attention_layernorm\.weight", r"backbone.blocks.\1.norm2.weight"),
    (_LAYER + r"attention\.query_key_value\.(\w+)", r"backbone.blocks.\1.attn.qkv.\2"),
    (_LAYER + r"attention\.dense\.(\w+)", r"backbone.blocks.\1.attn.out.\2"),
    (_LAYER + r"mlp\.gate\.weight", r"backbone.blocks.\1.mlp.routers.0.weight"),
    (_LAYER + r"mlp\.image_gate\.weight", r"backbone.blocks.\1.mlp.routers.1.weight"),
    (_LAYER + r"mlp\.shared_experts\.(gate|up|down)_proj\.weight", r"backbone.blocks.\1.mlp.shared.\2.weight"),
    (_LAYER + r"mlp\.(gate|up|down)_proj\.weight", r"backbone.blocks.\1.mlp.\2.weight"),
]
EXPERT = re.compile(_LAYER + r"mlp\.experts\.(\d+)\.(gate|up|down)_proj\.weight")
SURPLUS = re.compile(r"vision\..+|.+\.rotary_emb\.inv_freq|.+\.mlp\.audio_gate\.weight")
"""Keys that are not loaded: the tokenizer, the rotary tables, which are recomputed, and the audio router."""


def own_keys(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The generator's part of a file."""
    return {key: tensor for key, tensor in state.items() if not SURPLUS.fullmatch(key)}


def our_flow_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of a flow head under our names, with the two halves of its gated layers separated."""
    renamed = {}
    for key, tensor in rename(state, FLOW_NAMES).items():
        stem, found, kind = key.partition(".mlp.w12.")
        if found and len(tensor) % 2 == 0:
            renamed[f"{stem}.mlp.gate.{kind}"], renamed[f"{stem}.mlp.up.{kind}"] = tensor.chunk(2)
        else:
            renamed[key] = tensor
    return renamed


def our_names(state: Mapping[str, Tensor], config: BackboneConfig) -> dict[str, Tensor]:
    """The reference's state dict under our names, with stacked experts, and rotated channels as adjacent pairs."""
    prefix = "model.diffloss."
    flow = {key.removeprefix(prefix): state[key] for key in state if key.startswith(prefix)}
    rest = {key: tensor for key, tensor in state.items() if not key.startswith(prefix)}
    renamed = rename(_with_stacked_experts(rest, config.num_experts), OFFICIAL_NAMES)
    named = {f"flow_head.{key}": tensor for key, tensor in our_flow_names(flow).items()}
    for key, tensor in renamed.items():
        named[key] = _in_pairs(tensor, config) if ".attn.qkv." in key else tensor
    return named


def _with_stacked_experts(state: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
    """The experts of each layer stacked. If some are missing or differ in shape, they stay, and loading names them."""
    found: dict[tuple[str, str], dict[int, str]] = {}
    for key in state:
        if match := EXPERT.fullmatch(key):
            found.setdefault((match[1], match[3]), {})[int(match[2])] = key
    stacked = dict(state)
    for (layer, kind), keys in found.items():
        tensors = [state[key] for _, key in sorted(keys.items())]
        if sorted(keys) == list(range(count)) and len({tensor.shape for tensor in tensors}) == 1:
            for key in keys.values():
                del stacked[key]
            stacked[f"backbone.blocks.{layer}.mlp.{kind}"] = torch.stack(tensors)
    return stacked


def _in_pairs(qkv: Tensor, config: BackboneConfig) -> Tensor:
    """Reorder the query and key rows: the reference rotates channels (i, i + h / 2), ours (2i, 2i + 1)."""
    head_dim = config.head_dim or config.dim // config.num_heads
    rotated = (config.num_heads + (config.num_kv_heads or config.num_heads)) * head_dim
    if len(qkv) < rotated or head_dim % 2:
        return qkv  # an unexpected shape: loading names it
    order = torch.arange(head_dim).view(2, -1).T.flatten()
    pairs = qkv[:rotated].unflatten(0, (-1, head_dim))[:, order.to(qkv.device)].flatten(0, 1)
    return torch.cat([pairs, qkv[rotated:]])

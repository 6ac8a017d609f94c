"""The reference's config and state-dict names of TiTok's generators."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vistok.checkpoints import CheckpointError, fuse, rename
from vistok.checkpoints.official_config import OfficialConfig
from vistok.types import TokenSpec

NETWORK_OF = {"ViT": "bert", "UViT": "uvit"}  # by the reference's model_type
MODEL_TYPE_OF = {network: name for name, network in NETWORK_OF.items()}

_SAMPLING, _TOKENIZER, _RUN = "a setting of sampling", "of the tokenizer", "of the reference's training run"
WITHOUT_EFFECT = {
    "model.generator.num_steps": _SAMPLING,
    "model.generator.randomize_temperature": _SAMPLING,
    "model.generator.guidance_scale": _SAMPLING,
    "model.generator.guidance_scale_pow": _SAMPLING,
    "model.generator.guidance_decay": _SAMPLING,
    "model.vq_model.use_l2_norm": _TOKENIZER,
    "model.vq_model.commitment_cost": _TOKENIZER,
    "model.vq_model.vit_enc_model_size": _TOKENIZER,
    "model.vq_model.vit_dec_model_size": _TOKENIZER,
    "model.vq_model.vit_enc_patch_size": _TOKENIZER,
    "model.vq_model.vit_dec_patch_size": _TOKENIZER,
    "model.vq_model.num_latent_tokens": _TOKENIZER,
    "model.vq_model.finetune_decoder": _TOKENIZER,
    "model.vq_model.is_legacy": _TOKENIZER,
    "model.vq_model.pretrained_tokenizer_weight": _TOKENIZER,
    "dataset.*": "where the reference finds its data",
    "losses.*": _RUN,
    "experiment.*": _RUN,
    "training.*": _RUN,
    "optimizer.*": _RUN,
    "lr_scheduler.*": _RUN,
}
"""Keys of the reference's config that do not change what the model computes, each with the reason."""


def config(size: Mapping[str, Any], length: int) -> dict[str, Any]:
    """The reference's config of one of our sizes, for the tokens of the two-stage tokenizers."""
    generator = {
        "model_type": MODEL_TYPE_OF[size["network"]],
        "hidden_size": size["dim"],
        "num_hidden_layers": size["num_layers"],
        "num_attention_heads": size["num_heads"],
        "intermediate_size": size["mlp_dim"],
        "image_seq_len": length,
    }
    return {"model": {"vq_model": {"codebook_size": 4096, "token_size": 12}, "generator": generator}}


def arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """Our constructor's arguments.

    Raises:
        CheckpointError: a key that is missing, unknown, or of a value that is not supported.
    """
    given = OfficialConfig(config, WITHOUT_EFFECT)
    kind = given.take("model.generator.model_type", "ViT")
    if kind not in NETWORK_OF:
        raise CheckpointError(f"model.generator.model_type is {kind!r}; known: {', '.join(map(repr, NETWORK_OF))}")
    length = given.take("model.generator.image_seq_len")
    taken = {
        "spec": TokenSpec(
            length, given.take("model.vq_model.codebook_size"), given.take("model.vq_model.token_size", 12)
        ),
        "num_classes": given.take("model.generator.condition_num_classes", 1000),
        "network": NETWORK_OF[kind],
        "dim": given.take("model.generator.hidden_size"),
        "num_layers": given.take("model.generator.num_hidden_layers"),
        "num_heads": given.take("model.generator.num_attention_heads"),
        "mlp_dim": given.take("model.generator.intermediate_size"),
        "condition_dropout": given.take("model.generator.class_label_dropout", 0.1),
        "attn_drop": given.take("model.generator.attn_drop", 0.1),
        "proj_drop": given.take("model.generator.dropout", 0.1),
    }
    given.finish()
    return taken


OFFICIAL_NAMES = [
    # BERT
    (r"model\.embeddings\.word_embeddings\.weight", r"network.embedding.weight"),
    (r"model\.embeddings\.position_embeddings\.weight", r"network.positions.weight"),
    (r"model\.embeddings\.token_type_embeddings\.weight", r"network.kinds.weight"),
    (r"model\.embeddings\.LayerNorm\.(\w+)", r"network.norm.\1"),
    (r"model\.encoder\.layer\.(\d+)\.attention\.self\.qkv\.(\w+)", r"network.blocks.\1.attn.qkv.\2"),
    (r"model\.encoder\.layer\.(\d+)\.attention\.output\.dense\.(\w+)", r"network.blocks.\1.attn.out.\2"),
    (r"model\.encoder\.layer\.(\d+)\.attention\.output\.LayerNorm\.(\w+)", r"network.blocks.\1.norm1.\2"),
    (r"model\.encoder\.layer\.(\d+)\.intermediate\.dense\.(\w+)", r"network.blocks.\1.mlp.up.\2"),
    (r"model\.encoder\.layer\.(\d+)\.output\.dense\.(\w+)", r"network.blocks.\1.mlp.down.\2"),
    (r"model\.encoder\.layer\.(\d+)\.output\.LayerNorm\.(\w+)", r"network.blocks.\1.norm2.\2"),
    (r"model\.lm_head\.(\w+)", r"output.\1"),
    # U-ViT
    (r"embeddings\.weight", r"network.embedding.weight"),
    (r"pos_embed", r"network.positions"),
    (r"out_blocks\.(\d+)\.skip_linear\.(\w+)", r"network.skips.\1.\2"),
    (r"((?:in_blocks\.\d+|mid_block|out_blocks\.\d+)\.attn)\.proj\.(\w+)", r"network.\1.out.\2"),
    (r"((?:in_blocks\.\d+|mid_block|out_blocks\.\d+)\.mlp)\.fc1\.(\w+)", r"network.\1.up.\2"),
    (r"((?:in_blocks\.\d+|mid_block|out_blocks\.\d+)\.mlp)\.fc2\.(\w+)", r"network.\1.down.\2"),
    (r"((?:in_blocks\.\d+|mid_block|out_blocks\.\d+)\..+)", r"network.\1"),
    (r"norm\.(\w+)", r"network.norm.\1"),
    (r"lm_head\.(\w+)", r"output.\1"),
]


def our_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The reference's state dict under our names."""
    return rename(fuse(state, ("query", "key", "value"), "qkv"), OFFICIAL_NAMES)

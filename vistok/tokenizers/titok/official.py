"""Translates config and state dict of the reference of TiTok and TA-TiTok into ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vistok.checkpoints import CheckpointError, rename
from vistok.checkpoints.official_config import OfficialConfig
from vistok.tokenizers.maskgit_vqgan import official_names
from vistok.tokenizers.titok.networks import BASE, LARGE, SMALL, CodecConfig, TransformerSize

WIDTHS = {"small": SMALL, "base": BASE, "large": LARGE}
NAMES = {config: name for name, config in WIDTHS.items()}

WITHOUT_EFFECT = {
    "model.vq_model.commitment_cost": "a weight of the loss, which the run's config names",
    "model.vq_model.pretrained_tokenizer_weight": "where the reference finds the codec's file",
    "model.vq_model.codebook_size": "of a codebook, which a VAE does not have",
    "model.vq_model.use_l2_norm": "of a codebook, which a VAE does not have",
    "model.vq_model.clustering_vq": "of a codebook, which a VAE does not have",
    "overrides.proxy_codes": "of the codec, which single-stage models do not have",
    "overrides.pixel.*": "of the codec, which single-stage models do not have",
    "model.generator.*": "of the generator",
    "model.maskgen.*": "of the generator",
    "losses.*": "weights of losses, which the run's config names",
    "experiment.*": "of the reference's training run",
    "training.*": "of the reference's training run",
    "optimizer.*": "of the reference's training run",
    "lr_scheduler.*": "of the reference's training run",
    "dataset.params.*": "where the reference finds its data",
    "dataset.preprocessing.resize_shorter_edge": "of the data section",
    "dataset.preprocessing.random_crop": "of the data section",
    "dataset.preprocessing.random_flip": "of the data section",
}
"""Keys of the reference's config that do not change what the model computes, each with the reason."""


def config(size: Mapping[str, Any]) -> dict[str, Any]:
    """The reference's config for one of our sizes."""
    encoder, decoder = (NAMES[TransformerSize(**size[part])] for part in ("encoder", "decoder"))
    model = {
        "token_size": size["token_dim"],
        "vit_enc_model_size": encoder,
        "vit_dec_model_size": decoder,
        "num_latent_tokens": size["num_tokens"],
        "finetune_decoder": size.get("output") == "codec",
        "is_legacy": size.get("output") == "codec",
    }
    if size.get("bottleneck") == "vae":
        model["quantize_mode"] = "vae"
    else:
        model |= {"codebook_size": size["codebook_size"], "use_l2_norm": size["codebook_l2_norm"]}
    if size.get("codebook_clustering"):
        model["clustering_vq"] = True
    return {"model": {"vq_model": model}}


def arguments(given: OfficialConfig) -> dict[str, Any]:
    """Our constructor arguments, as far as TiTok and TA-TiTok share them."""
    widths = _widths(given)

    def transformer(key: str) -> TransformerSize:
        name = given.take(f"model.vq_model.{key}")
        if name not in widths:
            raise CheckpointError(f"model.vq_model.{key} is {name!r}; known sizes: {', '.join(widths)}")
        return widths[name]

    bottleneck = given.take("model.vq_model.quantize_mode", "vq")
    if bottleneck not in ("vq", "vae"):
        raise CheckpointError(f"model.vq_model.quantize_mode is {bottleneck!r}; known: 'vq', 'vae'")
    taken = {
        "image_size": given.take("dataset.preprocessing.crop_size", 256),
        "encoder_patch_size": given.take("model.vq_model.vit_enc_patch_size", 16),
        "decoder_patch_size": given.take("model.vq_model.vit_dec_patch_size", 16),
        "encoder": transformer("vit_enc_model_size"),
        "decoder": transformer("vit_dec_model_size"),
        "num_tokens": given.take("model.vq_model.num_latent_tokens"),
        "token_dim": given.take("model.vq_model.token_size"),
        "bottleneck": bottleneck,
    }
    if bottleneck == "vae":
        return taken
    return taken | {
        "codebook_size": given.take("model.vq_model.codebook_size", 4096),
        "codebook_l2_norm": given.take("model.vq_model.use_l2_norm", False),
        "codebook_clustering": given.take("model.vq_model.clustering_vq", False),
    }


def _widths(given: OfficialConfig) -> dict[str, TransformerSize]:
    """The transformer sizes by name; ``overrides.widths`` replaces them in reduced models."""
    overrides = given.take("overrides.widths", {})
    for name, sizes in overrides.items():
        if name not in WIDTHS or not isinstance(sizes, list | tuple) or len(sizes) != 3:
            raise CheckpointError(
                f"overrides.widths.{name} is {sizes!r}; expected width, layers and heads of one of {', '.join(WIDTHS)}"
            )
    return {name: TransformerSize(*sizes) for name, sizes in overrides.items()} or WIDTHS


def codec(given: OfficialConfig) -> CodecConfig:
    """The codec whose codes two-stage models predict."""
    sizes = given.take("overrides.pixel", {})
    names = {"hidden_channels": "channels", "z_channels": "codebook_embed_dim", "channel_mult": "channel_mult"}
    if unknown := sizes.keys() - names.keys():
        raise CheckpointError(f"overrides.pixel has unknown keys {', '.join(sorted(unknown))}")
    values: dict[str, Any] = {
        names[key]: tuple(value) if isinstance(value, list) else value for key, value in sizes.items()
    }
    return CodecConfig(codebook_size=given.take("overrides.proxy_codes", 1024), **values)


CLUSTERING_STATE = "quantize.embed_prob"

OFFICIAL_NAMES = [
    (r"(encoder|decoder)\.class_embedding", r"\1.class_token"),
    (r"(encoder|decoder)\.positional_embedding", r"\1.positions"),
    (r"(encoder|decoder)\.latent_token_positional_embedding", r"\1.latent_positions"),
    (r"(encoder|decoder)\.ln_(pre|post)\.(\w+)", r"\1.transformer.norm_\2.\3"),
    (r"(encoder|decoder)\.transformer\.(\d+)\.ln_([12])\.(\w+)", r"\1.transformer.blocks.\2.norm\3.\4"),
    (r"(encoder|decoder)\.transformer\.(\d+)\.attn\.in_proj_(\w+)", r"\1.transformer.blocks.\2.attn.qkv.\3"),
    (r"(encoder|decoder)\.transformer\.(\d+)\.attn\.out_proj\.(\w+)", r"\1.transformer.blocks.\2.attn.out.\3"),
    (r"(encoder|decoder)\.transformer\.(\d+)\.mlp\.c_fc\.(\w+)", r"\1.transformer.blocks.\2.mlp.up.\3"),
    (r"(encoder|decoder)\.transformer\.(\d+)\.mlp\.c_proj\.(\w+)", r"\1.transformer.blocks.\2.mlp.down.\3"),
    (r"encoder\.conv_out\.(\w+)", r"encoder.output.\1"),
    (r"decoder\.decoder_embed\.(\w+)", r"decoder.input.\1"),
    (r"decoder\.conv_out\.(\w+)", r"head.conv_out.\1"),
    (r"decoder\.text_guidance_proj\.(\w+)", r"text.projection.\1"),
    (r"decoder\.text_guidance_positional_embedding", r"text.positions"),
    (r"quantize\.embed_prob", r"quantizer.clustering.usage"),
    (r"pixel_quantize\.embedding\.weight", r"renderer.embedding.weight"),
    (r"pixel_decoder\.(.+)", r"renderer.decoder.\1"),
]


def with_clustering(state: Mapping[str, Tensor], arguments: Mapping[str, Any]) -> dict[str, Tensor]:
    """The state dict with the usage average of the clustering if the model has one, and without it if not.

    Released files do not agree with the repository's configs: some hold the average although clustering is off, others
    lack it although clustering is on.
    """
    kept = {key: tensor for key, tensor in state.items() if key != CLUSTERING_STATE}
    if arguments.get("codebook_clustering"):
        kept[CLUSTERING_STATE] = state.get(CLUSTERING_STATE, torch.zeros(arguments["codebook_size"]))
    return kept


def our_names(state: Mapping[str, Tensor], codec_levels: int) -> dict[str, Tensor]:
    """The reference's state dict under our names, with its 1x1 convolutions as linear layers."""
    if "decoder.ffn.2.weight" in state:
        head = (r"decoder\.ffn\.(\d)\.(\w+)", r"head.\1.\2")
    else:
        head = (r"decoder\.ffn\.0\.(\w+)", r"head.to_patches.\1")
    renamed = rename(official_names(state, codec_levels, decoder="pixel_decoder"), [head, *OFFICIAL_NAMES])
    return {key: tensor.flatten(1) if _is_linear(key, tensor) else tensor for key, tensor in renamed.items()}


def _is_linear(key: str, tensor: Tensor) -> bool:
    point = tensor.ndim == 4 and tensor.shape[2:] == (1, 1)
    return point and key.startswith(("encoder.output.", "head."))

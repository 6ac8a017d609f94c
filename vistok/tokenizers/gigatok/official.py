"""GigaTok's official arguments and weight names, translated; see ``GigaTok.from_official``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vistok.checkpoints import CheckpointError, OfficialCheckpoint, rename
from vistok.checkpoints.official_config import OfficialConfig

SIZES = {  # width, layers, heads
    "tiny": (256, 4, 4),
    "small": (512, 6, 8),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
    "xl": (1280, 36, 20),
    "xxl": (1536, 48, 24),
    "xxxl": (2560, 48, 40),
}
ENTROPY_TEMPERATURE = 0.01


def _released(encoder: str, decoder: str, **arguments: Any) -> dict[str, Any]:
    init = {
        "codebook_size": 16384,
        "codebook_embed_dim": 8,
        "z_channels": 256,
        "num_latent_tokens": 256,
        "encoder_size": encoder,
        "decoder_size": decoder,
        "rot": True,
        "distill_depth": 3,
        "out_inner_dim": 768,
    }
    return {"model_cls": MODEL_1D, "init_args": init | {"multi_level_query_init": True} | arguments}


def _released_2d(encoder: str, decoder: str, **arguments: Any) -> dict[str, Any]:
    config = _released(encoder, decoder, **arguments)
    init = {key: value for key, value in config["init_args"].items() if key != "multi_level_query_init"}
    return {"model_cls": MODEL_2D, "init_args": init}


MODEL_1D, MODEL_2D = "VQVitModelPlus", "VQVitModel2DPlus"
LAYOUTS = {MODEL_1D: "1d", MODEL_2D: "2d"}
LAYER_KINDS = {"TransformerLayer": "self_attention", "TransformerDecoderLayer": "cross_attention"}
CHECKPOINTS = tuple(
    # On Google Drive: linked from the repository's README, the 2d files from its issue 8.
    OfficialCheckpoint("", filename, config)
    for filename, config in {
        "VQ_SS256_e100.pt": _released("small", "small"),
        "VQ_SB256_e200.pt": _released("small", "base"),
        "VQ_BL256_e200.pt": _released("base", "large"),
        "VQ_BL256_dino_disc.pt": _released("base", "large"),
        "VQ_XLXXL256_e300.pt": _released("xl", "xxl", entropy_loss_ratio=0.005),
        # Its config does not name the kind of layers.
        "VQ_SS256_2d_e100.pt": _released_2d("small", "small"),
        "VQ_SB256_2d_e200.pt": _released_2d("small", "base", transformer_layer_type="TransformerLayer"),
        "VQ_BL256_2d_e200.pt": _released_2d(
            "base", "large", transformer_layer_type="TransformerLayer", entropy_loss_ratio=0.005
        ),
    }.items()
)

WITHOUT_EFFECT = {
    "init_args.codebook_show_usage": "counts which codes were used",
    "init_args.commit_loss_beta": "the weight of a loss, which the training config has",
    "init_args.fea_rec_loss_weight": "the weight of a loss, which the training config has",
    "loss.*": "losses of the training, and its discriminator",
}
"""Arguments of the reference that do not change what the model computes, each with the reason."""

_UNSUPPORTED = {  # the values that released models have
    "fea_rec_loss_type": "mse",
    "last_level_2d_query_init": False,
    "multi_level_2d_query_init": False,
    "learnable_1d_query_init": False,
    "use_qk_norm": False,
    "causal_type": None,
}


def model_arguments(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Arguments of ``GigaTok`` for those of the reference: ``model_cls``, ``init_args`` and, for models of other shapes
    than the released ones, ``structure`` (``ch``, ``num_res_blocks``, ``image_size``, sizes of transformers by name).

    Raises:
        CheckpointError: an argument that is unknown, or whose value is not supported; the message names it.
    """
    given = OfficialConfig(config, WITHOUT_EFFECT)
    kind = given.take("model_cls", MODEL_1D)
    if kind not in LAYOUTS:
        raise CheckpointError(f"model_cls {kind!r} is not supported; there are {', '.join(LAYOUTS)}")
    layout = LAYOUTS[kind]
    for name, released in _UNSUPPORTED.items():
        given.require(f"init_args.{name}", released, why="no released model has another")
    encoder_size, decoder_size = _sizes(given)
    arguments = {
        "image_size": given.take("structure.image_size", 256),
        "layout": layout,
        "num_tokens": given.take("init_args.num_latent_tokens", 256),
        "encoder_size": encoder_size,
        "decoder_size": decoder_size,
        "layer_kind": _layer_kind(given.take("init_args.transformer_layer_type", None), layout, state),
        "query_init": "pooled" if given.take("init_args.multi_level_query_init", False) else "mean",
        "channels": given.take("structure.ch", 128),
        "encoder_channel_mult": tuple(given.take("init_args.encoder_ch_mult", (1, 1, 2, 2, 4))),
        "decoder_channel_mult": tuple(given.take("init_args.decoder_ch_mult", (1, 1, 2, 2, 4))),
        "res_blocks": given.take("structure.num_res_blocks", 2),
        "z_channels": given.take("init_args.z_channels", 256),
        "conv_attention": given.take("init_args.use_attn", False),
        "adaptive_norm": given.take("init_args.adaptive_gn", True),
        "upsample": "depth_to_space" if given.take("init_args.d2s_up", True) else "nearest",
        "codebook_size": given.take("init_args.codebook_size", 16384),
        "codebook_embed_dim": given.take("init_args.codebook_embed_dim", 8),
        "codebook_l2_norm": given.take("init_args.codebook_l2_norm", True),
        "quantizer_gradient": "rotation" if given.take("init_args.rot", False) else "normalised",
        "entropy_temperature": ENTROPY_TEMPERATURE if given.take("init_args.entropy_loss_ratio", 0.0) > 0 else None,
        "alignment": _alignment(given),
        "dropout": given.take("init_args.dropout_p", 0.0),
    }
    given.finish()
    return arguments


def _sizes(given: OfficialConfig) -> tuple[dict[str, int], dict[str, int]]:
    """The sizes of both transformers; ``model_size`` sets both."""
    shared, sizes = given.take("init_args.model_size", None), []
    for part in ("encoder_size", "decoder_size"):
        name, own = given.take(f"init_args.{part}", None), given.take(f"structure.{part}", {})
        if shared is not None and name not in (None, shared):
            raise CheckpointError(f"model_size {shared!r} contradicts {part} {name!r}")
        name = shared if name is None else name
        table = SIZES | own
        if name not in table:
            raise CheckpointError(f"{part} {name!r} is unknown; there are {', '.join(table)}")
        if unused := own.keys() - {name}:
            raise CheckpointError(f"structure.{part} has sizes that nothing uses: {', '.join(sorted(unused))}")
        sizes.append(dict(zip(("dim", "num_layers", "num_heads"), table[name])))
    return sizes[0], sizes[1]


def _layer_kind(name: str | None, layout: str, state: Mapping[str, Tensor]) -> str:
    """The kind of layers that the argument names, or else that of the weights."""
    if name is None:
        crosses = any(".multihead_attn." in key for key in state)
        return "cross_attention" if crosses or layout == "1d" else "self_attention"
    if name not in LAYER_KINDS:
        raise CheckpointError(f"transformer_layer_type {name!r} is not supported; there are {', '.join(LAYER_KINDS)}")
    return LAYER_KINDS[name]


def _alignment(given: OfficialConfig) -> dict[str, int] | None:
    layer, dim = given.take("init_args.distill_depth", None), given.take("init_args.out_inner_dim", 768)
    return None if layer is None else {"dim": dim, "layer": layer}


def our_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of the reference under our names, in the layouts of our layers."""
    ours: dict[str, Tensor] = {}
    for key, tensor in state.items():
        if key == USAGE_COUNTER:
            continue
        if key.endswith("positional_embedding") and tensor.ndim == 3 and tensor.shape[1] == 1:
            tensor = tensor.squeeze(1)  # the reference puts the sequence before the batch
        elif key in POINTWISE and tensor.shape[2:] == (1, 1):
            tensor = tensor.flatten(1)
        if "in_proj_" in key and tensor.shape[0] % 3 == 0:
            stem, _, kind = key.rpartition("in_proj_")
            ours |= {f"{stem}{part}.{kind}": piece for part, piece in zip("qkv", tensor.chunk(3))}
        else:
            ours[key] = tensor
    return rename(ours, OFFICIAL_NAMES)


USAGE_COUNTER = "quantize.codebook_used"  # which codes the last training batches chose; no part of the model
POINTWISE = (
    "quant_conv.weight",
    "post_quant_conv.weight",
    "s2to1encoder.conv_out.weight",
    "s2dencoder.conv_out.weight",
)
_ENCODER, _DECODER = r"(?:s2to1|s2d)encoder\.", r"(?:s1to2|s2d)decoder\."
_LAYER = r"(?:s2to1|s1to2|s2d)(en|de)coder\.transformer\.(\d+)\."
OFFICIAL_NAMES = [
    (r"(\w+)\.conv_blocks\.(\d+)\.res\.(\d+)\.nin_shortcut\.(\w+)", r"\1.levels.\2.blocks.\3.shortcut.\4"),
    (r"(\w+)\.conv_blocks\.(\d+)\.res\.(\d+)\.(\w+)\.(\w+)", r"\1.levels.\2.blocks.\3.\4.\5"),
    (r"(\w+)\.conv_blocks\.(\d+)\.attn\.(\d+)\.proj_out\.(\w+)", r"\1.levels.\2.attentions.\3.out.\4"),
    (r"(\w+)\.conv_blocks\.(\d+)\.attn\.(\d+)\.(\w+)\.(\w+)", r"\1.levels.\2.attentions.\3.\4.\5"),
    (r"(\w+)\.conv_blocks\.(\d+)\.(?:down|up)sample\.conv1?\.(\w+)", r"\1.levels.\2.resample.conv.\3"),
    (r"(encoder|decoder)\.mid\.(\d)\.proj_out\.(\w+)", r"\1.middle.\2.out.\3"),
    (r"(encoder|decoder)\.mid\.(\d)\.(\w+)\.(\w+)", r"\1.middle.\2.\3.\4"),
    (r"decoder\.adaptive\.(\d)\.(\w+)\.(\w+)", r"decoder.styles.\1.\2.\3"),
    (_LAYER + r"self_attn\.out_proj\.(\w+)", r"token_\1coder.transformer.layers.\2.self_attn.out.\3"),
    (_LAYER + r"self_attn\.(\w)\.(\w+)", r"token_\1coder.transformer.layers.\2.self_attn.\3.\4"),
    (_LAYER + r"multihead_attn\.out_proj\.(\w+)", r"token_\1coder.transformer.layers.\2.cross_attn.out.\3"),
    (_LAYER + r"multihead_attn\.(\w)\.(\w+)", r"token_\1coder.transformer.layers.\2.cross_attn.\3.\4"),
    (_LAYER + r"linear1\.(\w+)", r"token_\1coder.transformer.layers.\2.mlp.up.\3"),
    (_LAYER + r"linear2\.(\w+)", r"token_\1coder.transformer.layers.\2.mlp.down.\3"),
    (_LAYER + r"(norm\d)\.(\w+)", r"token_\1coder.transformer.layers.\2.\3.\4"),
    (_ENCODER + r"positional_embedding", r"token_encoder.positions"),
    (_ENCODER + r"latent_token_positional_embedding", r"token_encoder.token_positions"),
    (_ENCODER + r"encoder_embed\.(\w+)", r"token_encoder.embed.\1"),
    (_ENCODER + r"ln_pre\.(\w+)", r"token_encoder.norm_in.\1"),
    (_ENCODER + r"ln_post\.(\w+)", r"token_encoder.norm_out.\1"),
    (_ENCODER + r"global_proj\.(\w+)", r"token_encoder.query_proj.\1"),
    (_ENCODER + r"conv_out\.(\w+)", r"token_encoder.out.\1"),
    (_DECODER + r"positional_embedding", r"token_decoder.positions"),
    (_DECODER + r"latent_token_positional_embedding", r"token_decoder.token_positions"),
    (_DECODER + r"decoder_embed\.(\w+)", r"token_decoder.embed.\1"),
    (_DECODER + r"ln_pre\.(\w+)", r"token_decoder.norm_in.\1"),
    (_DECODER + r"ln_post\.(\w+)", r"token_decoder.norm_out.\1"),
    (_DECODER + r"conv_out\.(\w+)", r"token_decoder.out.\1"),
    (_DECODER + r"distill_mlp\.(\d)\.(\w+)", r"token_decoder.alignment_head.\1.\2"),
    (r"quant_conv\.(\w+)", r"pre_quant.\1"),
    (r"post_quant_conv\.(\w+)", r"post_quant.\1"),
    (r"quantize\.embedding\.weight", r"quantizer.embedding.weight"),
]

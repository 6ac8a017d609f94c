"""LARP's released tokenizer, prior and discriminator: arguments, names and files (github.com/hywang66/LARP, MIT)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from torch import Tensor, nn

from vistok.checkpoints import CheckpointError, Model, OfficialCheckpoint, fuse, load_strictly, rename
from vistok.checkpoints.official_config import OfficialConfig
from vistok.losses import ARPrior, ViTDiscriminator

T = TypeVar("T", bound=Model)

LATENT_NORMS = {
    "none": "none",
    "ln_d": "layer_channels",
    "ln_nd": "layer_tokens",
    "bn_bn": "batch_channels",
    "bn_b": "batch_tokens",
    "ln_d_na": "none",  # the reference builds this norm and never applies it
}

# Keys of the reference's config that do not change what the tokenizer computes, each with the reason.
WITHOUT_EFFECT = {
    "bottleneck.args.regularizer.args.commitment_loss_weight": "a weight of training, losses.commitment",
    "bottleneck.args.regularizer.args.codebook_loss_weight": "a weight of training, losses.codebook",
    "bottleneck.args.regularizer.args.entropy_loss_temperature": "of the entropy term, which is off",
    "prior_model": "no prior",
    "prior_model.*": "the prior is a loss of training, build_prior makes it",
}


def build_tokenizer(model_class: type[T], config: Mapping[str, Any], state_dict: Mapping[str, Tensor]) -> T:
    """Build the tokenizer from the reference's constructor arguments and weights. Those of the prior are left out.

    Raises:
        CheckpointError: arguments that are unknown or not supported, or weights that do not fit.
    """
    arguments = tokenizer_arguments(config)
    model = model_class(**arguments)
    state = {key: tensor for key, tensor in state_dict.items() if not key.startswith("prior_model.")}
    if config["bottleneck"]["args"].get("norm") == "ln_d_na":
        state = {key: tensor for key, tensor in state.items() if not key.startswith("bottleneck.norm_layer.")}
    return model.with_official_weights(reshape(rename(state, OFFICIAL_NAMES), model))


def tokenizer_arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """Our constructor arguments for those of the reference.

    Raises:
        CheckpointError: arguments that are unknown or not supported.
    """
    given = OfficialConfig(config, WITHOUT_EFFECT)
    given.require("transformer_name", "transformer_encoder_parallel", why="the paper's encoder and decoder")
    for part in ("encoder", "decoder"):
        given.require(f"{part}_name", "none", why="sizes are given one by one")
    patch, frames = given.take("patch_size"), given.take("temporal_patch_size")
    for name, value in (("decoder_patch_size", patch), ("decoder_temporal_patch_size", frames)):
        given.require(name, value, why="the reference, too, cuts its output into the encoder's patches")
    arguments = {
        "num_frames": given.take("frame_num"),
        "image_size": given.take("input_size"),
        "temporal_patch_size": frames,
        "patch_size": patch,
        "num_tokens": given.take("bottleneck_token_num"),
        "in_channels": given.take("in_channels", 3),
        "encoder": _transformer(given, "encoder"),
        "decoder": _transformer(given, "decoder"),
        "patch_positions": _table(given, "learned_encoder_patch_pe"),
        "latent_positions": _table(given, "learned_decoder_latent_pe"),
        "patch_query_positions": _table(given, "learned_decoder_patch_query_embed"),
        "latent_position_base": float(given.take("latent_pe_scale_factor", 10000)),
        "learned_queries": given.take("learned_encoder_latent_query_embed", True),
        "query_init": "normal" if given.take("encoder_query_gaussian_init", True) else "sincos",
        "query_std": given.take("query_init_std", 0.02),
        "types": tuple(kind for kind, name, default in TYPE_KEYS if given.take(name, default)),
        "norm_eps": given.take("block_norm_eps", 1e-5),
        **_quantizer(given),
    }
    given.finish()
    return arguments


TYPE_KEYS = (
    ("patches", "use_encoder_patch_token_type_embed", False),
    ("queries", "use_encoder_latent_query_token_type_embed", False),
    ("latents", "use_decoder_latent_token_type_embed", False),
    ("patch_queries", "use_decoder_patch_query_token_type_embed", True),
)


def _transformer(given: OfficialConfig, part: str) -> dict[str, int]:
    names = {"dim": f"{part}_hidden_size", "num_layers": f"{part}_depth", "num_heads": f"{part}_num_heads"}
    return {ours: given.take(theirs) for ours, theirs in names.items()}


def _table(given: OfficialConfig, name: str) -> str:
    return "learned" if given.take(name, False) else "fixed"


def _quantizer(given: OfficialConfig) -> dict[str, Any]:
    given.require("bottleneck.name", "bottleneck", why="the paper's quantizer")
    norm = given.take("bottleneck.args.norm", "none")
    if norm not in LATENT_NORMS:
        raise CheckpointError(f"bottleneck.args.norm is {norm!r}; known: {', '.join(LATENT_NORMS)}")
    section = "bottleneck.args.regularizer"
    given.require(f"{section}.name", "vq", why="the paper's quantizer")
    stochastic = given.take(f"{section}.args.stochastic", True)
    temperature = given.take(f"{section}.args.stochastic_temperature", 0.03)
    entropy_weight = given.take(f"{section}.args.entropy_loss_weight", 0.0)
    if entropy_weight and stochastic:
        raise CheckpointError(
            f"{section}.args.entropy_loss_weight is {entropy_weight}; the reference has this term for nearest codes "
            "only (stochastic false)"
        )
    return {
        "latent_norm": LATENT_NORMS[norm],
        "codebook_size": given.take(f"{section}.args.codebook_size"),
        "codebook_dim": given.take("bottleneck.args.bottleneck_dim"),
        "codebook_l2_norm": given.take(f"{section}.args.l2_normalized", True),
        "assignment": "stochastic" if stochastic else "nearest",
        # The reference writes a learned temperature as a negative one.
        "temperature": "learned" if temperature < 0 else temperature,
        "entropy_temperature": (
            given.take(f"{section}.args.entropy_loss_temperature", 0.01) if entropy_weight else None
        ),
    }


# "encode_w_embed" is the reference's own spelling.
OFFICIAL_NAMES = [
    (r"x_embedder\.proj\.(\w+)", r"encoder.to_patches.\1"),
    (r"encoder_latent_query_embed", r"encoder.queries"),
    (r"encoder_patch_pe", r"encoder.positions.table"),
    (r"encoder_t_embed", r"encoder.positions.time"),
    (r"encoder_h_embed", r"encoder.positions.rows"),
    (r"encoder?_w_embed", r"encoder.positions.columns"),
    (r"encoder_patch_token_type_embed", r"encoder.patch_type"),
    (r"encoder_latent_query_token_type_embed", r"encoder.query_type"),
    (r"decoder_latent_pe", r"decoder.latent_positions"),
    (r"decoder_patch_query_embed", r"decoder.positions.table"),
    (r"decoder_t_embed", r"decoder.positions.time"),
    (r"decoder_h_embed", r"decoder.positions.rows"),
    (r"decoder_w_embed", r"decoder.positions.columns"),
    (r"decoder_latent_token_type_embed", r"decoder.latent_type"),
    (r"decoder_patch_query_token_type_embed", r"decoder.patch_type"),
    (r"(encoder|decoder)\.blocks\.(\d+)\.attn\.proj\.(\w+)", r"\1.blocks.\2.attn.out.\3"),
    (r"(encoder|decoder)\.blocks\.(\d+)\.mlp\.fc1\.(\w+)", r"\1.blocks.\2.mlp.up.\3"),
    (r"(encoder|decoder)\.blocks\.(\d+)\.mlp\.fc2\.(\w+)", r"\1.blocks.\2.mlp.down.\3"),
    (r"bottleneck\.in_linear\.(\w+)", r"pre_quant.\1"),
    (r"bottleneck\.out_linear\.(\w+)", r"post_quant.\1"),
    (r"bottleneck\.norm_layer\.(.+)", r"latent_norm.norm.\1"),
    (r"bottleneck\.regularizer\.embedding\.weight", r"quantizer.embedding.weight"),
    (r"bottleneck\.regularizer\.stochastic_temperature_inv", r"quantizer.inverse_temperature"),
    (r"final_layer\.norm_final\.(\w+)", r"decoder.norm.\1"),
    (r"final_layer\.linear\.(\w+)", r"decoder.to_pixels.\1"),
]


def reshape(state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Add or remove axes of length 1 as in the model's tensors: the reference has tables as (1, N, D), and patches of
    single frames as a 2D convolution."""

    def without_ones(shape: Sequence[int]) -> list[int]:
        return [n for n in shape if n != 1]

    wanted = {key: tensor.shape for key, tensor in model.state_dict().items()}
    return {
        key: tensor.reshape(wanted[key])
        if key in wanted and without_ones(tensor.shape) == without_ones(wanted[key])
        else tensor
        for key, tensor in state.items()
    }


def _released(prior: bool) -> dict[str, Any]:
    prior_model = {"name": "gptc-S", "use_mix_ss": True, "mix_ss_max_ratio": 0.5, "args": {"l2_normalized": True}}
    return {
        "bottleneck": {
            "name": "bottleneck",
            "args": {
                "bottleneck_dim": 16,
                "norm": "none",
                "regularizer": {
                    "name": "vq",
                    "args": {
                        "codebook_size": 8192,
                        "l2_normalized": True,
                        "stochastic": True,
                        "stochastic_temperature": 0.03,
                    },
                },
            },
        },
        "prior_model": prior_model if prior else {"name": "none"},
        "bottleneck_token_num": 1024,
        "input_size": 128,
        "frame_num": 16,
        "temporal_patch_size": 4,
        "patch_size": 8,
        "decoder_temporal_patch_size": 4,
        "decoder_patch_size": 8,
        "encoder_hidden_size": 768,
        "decoder_hidden_size": 768,
        "encoder_num_heads": 12,
        "decoder_num_heads": 12,
        "encoder_depth": 12,
        "decoder_depth": 12,
    }


CHECKPOINTS = (OfficialCheckpoint("hywang66/LARP-L-long-tokenizer", "model.safetensors", _released(prior=True)),)


# ---------------------------------------------------------------------------------------------------------------------
# The prior

PRIOR_SIZES = {
    "gptc-XXS": {"num_layers": 6, "num_heads": 4, "dim": 256},
    "gptc-XS": {"num_layers": 6, "num_heads": 6, "dim": 384},
    "gptc-S": {"num_layers": 12, "num_heads": 6, "dim": 384},
    "gptc-M": {"num_layers": 12, "num_heads": 8, "dim": 512},
    "gptc-B": {"num_layers": 12, "num_heads": 12, "dim": 768},
    "gptc-L": {"num_layers": 24, "num_heads": 16, "dim": 1024},
}


def build_prior(config: Mapping[str, Any], state_dict: Mapping[str, Tensor]) -> ARPrior:
    """Build the prior from the tokenizer's arguments and the weights ``prior_model.*`` of its state dict.

    Raises:
        CheckpointError: no prior, unknown arguments, or weights that do not fit.
    """
    model = ARPrior(**prior_arguments(config))
    state = {key.removeprefix("prior_model."): t for key, t in state_dict.items() if key.startswith("prior_model.")}
    state = rename(fuse(state, ("query", "key", "value"), "qkv"), PRIOR_NAMES)
    load_strictly(model, reshape(state, model), source="the official state dict")
    return model


def prior_arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """Our prior's constructor arguments for the reference's arguments of the tokenizer."""
    given = OfficialConfig(config["prior_model"], {})
    name = given.take("name")
    if name == "none":
        raise CheckpointError("prior_model.name is 'none': these arguments describe a tokenizer without a prior")
    scheduled = given.take("use_mix_ss", True)
    ratio, until = given.take("mix_ss_max_ratio", 0.5), given.take("mix_ss_peak_steps_ratio", 0.3)
    arguments = {
        "code_dim": config["bottleneck"]["args"]["bottleneck_dim"],
        "max_length": given.take("args.max_seq_len", 1024),
        "drop": 0.0 if given.take("no_dropout", False) else 0.1,
        "normalize": given.take("args.l2_normalized", True),
        "temperature": given.take("latent_ce_temperature", 1.0),
        "num_rounds": given.take("n_rounds", 2),
        # Without the schedule, later rounds read sequences in which every token is replaced.
        "mix_ratio": ratio if scheduled else 1.0,
        "mix_until": until if scheduled else 0.0,
        "average_rounds": given.take("avg_loss_over_rounds", True),
        "detach_early_rounds": given.take("no_grad_before_last_round", False),
    }
    for ours, theirs in (("num_layers", "n_layer"), ("num_heads", "n_head"), ("dim", "n_embd")):
        arguments[ours] = given.take(f"args.{theirs}", PRIOR_SIZES.get(name, {}).get(ours))
        if arguments[ours] is None:
            raise CheckpointError(f"prior_model.name {name!r} is none of {', '.join(PRIOR_SIZES)}; give args.{theirs}")
    given.finish()
    return arguments


PRIOR_NAMES = [
    (r"input_proj\.(\w+)", r"input.\1"),
    (r"pos_emb", r"positions"),
    (r"blocks\.(\d+)\.ln([12])\.(\w+)", r"blocks.\1.norm\2.\3"),
    (r"blocks\.(\d+)\.attn\.proj\.(\w+)", r"blocks.\1.attn.out.\2"),
    (r"blocks\.(\d+)\.mlp\.0\.(\w+)", r"blocks.\1.mlp.up.\2"),
    (r"blocks\.(\d+)\.mlp\.2\.(\w+)", r"blocks.\1.mlp.down.\2"),
    (r"ln_f\.(\w+)", r"norm.\1"),
    (r"head\.(\w+)", r"output.\1"),
]


# ---------------------------------------------------------------------------------------------------------------------
# The discriminator

# Keys of the reference's loss module that do not change what the discriminator computes, each with the reason.
DISCRIMINATOR_WITHOUT_EFFECT = {
    "disc_start": "when training begins with it, losses.gan.start_step",
    "disc_self_start": "when its own training begins",
    "pixel_loss": "a term of training, losses.l1 or losses.l2",
    "pixelloss_weight": "a weight of training, losses.l1",
    "perceptual_loss": "a term of training, losses.lpips",
    "perceptual_weight": "a weight of training, losses.lpips",
    "lecam_weight": "a weight of training, losses.gan.lecam_weight: its square",
    "disc_loss": "the loss on its logits, losses.gan.loss and losses.gan.smoothing",
    "disc_weight": "a weight of training, losses.gan.weight",
    "r1_gp_weight": "a weight of training, losses.gan.r1_weight",
    "d_update_freq": "how often it is trained, losses.gan.every",
}


def build_discriminator(config: Mapping[str, Any], state_dict: Mapping[str, Tensor]) -> ViTDiscriminator:
    """Build the discriminator from the arguments of the reference's loss module and its weights.

    Raises:
        CheckpointError: arguments that are unknown or not supported, or weights that do not fit.
    """
    given = OfficialConfig(config, DISCRIMINATOR_WITHOUT_EFFECT)
    given.require("disc_type", "transformer", why="the paper's discriminator")
    model = ViTDiscriminator(
        num_frames=given.take("frame_num"),
        image_size=given.take("input_spatial_size"),
        temporal_patch_size=given.take("disc_tran_temporal_patch_size", 4),
        patch_size=given.take("disc_tran_patch_size", 8),
        dim=given.take("disc_tran_hidden_size", 384),
        num_layers=given.take("disc_tran_n_layers", 12),
        num_heads=given.take("disc_tran_n_heads", 8),
        spectral_norm=given.take("spectral_norm", False),
        norm_eps=given.take("block_norm_eps", 1e-5),
    )
    given.finish()
    prefix = "discriminator."
    state = {key.removeprefix(prefix): tensor for key, tensor in state_dict.items() if key.startswith(prefix)}
    state = rename(rename(state, DISCRIMINATOR_NAMES), SPECTRAL_NORM_NAMES)
    load_strictly(model, reshape(state, model), source="the official state dict")
    return model


# Torch's older spectral norm has these names.
SPECTRAL_NORM_NAMES = [
    (r"(.+)\.weight_orig", r"\1.parametrizations.weight.original"),
    (r"(.+)\.weight_([uv])", r"\1.parametrizations.weight.0._\2"),
]

DISCRIMINATOR_NAMES = [
    (r"x_embedder\.proj\.(.+)", r"to_patches.\1"),
    (r"cls_token", r"class_token"),
    (r"encoder_pos_embed", r"positions.table"),
    (r"transformer_encoder\.blocks\.(\d+)\.attn\.proj\.(.+)", r"blocks.\1.attn.out.\2"),
    (r"transformer_encoder\.blocks\.(\d+)\.mlp\.fc1\.(.+)", r"blocks.\1.mlp.up.\2"),
    (r"transformer_encoder\.blocks\.(\d+)\.mlp\.fc2\.(.+)", r"blocks.\1.mlp.down.\2"),
    (r"transformer_encoder\.blocks\.(.+)", r"blocks.\1"),
    (r"norm_final\.(\w+)", r"norm.\1"),
    (r"fc\.(.+)", r"output.\1"),
]

"""FlexTok's official configs and weight names, translated; see ``flextok.FlexTok.from_official``.

An official config is a tree of class paths and arguments; ``official_keys`` lists every key. Class paths are compared
by their last part and never imported.
"""

from __future__ import annotations

import ast
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from vistok.checkpoints import CheckpointError, fuse, rename
from vistok.tokenizers.flextok.official_keys import check_keys
from vistok.tokenizers.kl_vae import OLD_DIFFUSERS_NAMES
from vistok.utils.tensors import opened

log = logging.getLogger(__name__)

SECTIONS = ("vae", "encoder", "decoder", "regularizer", "flow_matching_noise_module", "pipeline")
VAE_DEFAULTS = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "encoder_attention": ()}


def embedded_config(file: Path, content: Mapping[str, Any]) -> dict[str, Any] | None:
    """The config in the header of a released safetensors file, where every value is a Python literal; None if absent.

    Raises:
        CheckpointError: it cannot be parsed.
    """
    if file.suffix != ".safetensors":
        return None
    with opened(file) as weights:
        header = weights.metadata() or {}
    texts = {name: header[name] for name in SECTIONS if name in header}
    if not {"encoder", "decoder"} <= texts.keys():
        return None
    try:
        return {name: ast.literal_eval(text) for name, text in texts.items()}
    except (ValueError, SyntaxError) as error:
        raise CheckpointError(f"the config in the header of {file} cannot be read: {error}") from error


def released(encoder_depth: int, decoder_depth: int) -> dict[str, Any]:
    """The config of a released model; the header of its file takes precedence."""
    wide = {"channels_in": 16, "patch_sizes": [2, 2]}
    table = {"posemb_type": "sincos", "posemb_scaling": "absolute", "max_sizes": [16, 16]}
    return {
        "vae": {"latent_channels": 16, "scaling_factor": 1.0, "sample_posterior": False},
        "encoder": {
            "module_dict": {
                "enc_patch_emb": wide,
                "enc_posemb_module": table,
                "enc_register_module": {"n_min": 256, "n_max": 256},
                "enc_transformer": {"dim": 64 * encoder_depth, "depth": encoder_depth},
                "enc_to_latents": {"dim_out": 6},
            }
        },
        "decoder": {
            "module_dict": {
                "dec_from_latents": {"dim_in": 6},
                "dec_registers_posemb_module": {"posemb_type": "learnable_sum", "max_sizes": [256]},
                "dec_nested_dropout": {"size_sampling_mode": "pow2"},
                "dec_latent_dropout": {"dropout_prob": 0.2},
                "dec_noise_patch_emb": wide,
                "dec_patches_posemb_module": table,
                "dec_time_embedder": {"max_timestep": 1000},
                "dec_transformer": {"dim": 64 * decoder_depth, "depth": decoder_depth, "adaLN_expansion": 2},
            }
        },
        "regularizer": {"levels": [8, 8, 8, 5, 5, 5]},
        "flow_matching_noise_module": {"mode_scale": 0.25},
    }


def model_arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of ``FlexTok``; decoding settings are those of the reference's README.

    Raises:
        CheckpointError: encoder and decoder disagree, or an option of no released model.
    """
    encoder, decoder, (vae, scale) = encoder_arguments(config), decoder_arguments(config), vae_arguments(config)
    for name in ("channels", "patch", "grid", "num_tokens", "code_dim"):
        if encoder[name] != decoder[name]:
            raise CheckpointError(f"encoder and decoder disagree on {name}: {encoder[name]} and {decoder[name]}")
    check_keys(config)
    stride = 2 ** (len(vae["block_out_channels"]) - 1)
    (rows, columns), (height, width) = encoder["grid"], encoder["patch"]
    return {
        "image_size": (rows * height * stride, columns * width * stride),
        "vae": vae | {"latent_scale": scale},
        "patch_size": encoder["patch"],
        "encoder": encoder["config"],
        "decoder": decoder["config"],
        "num_tokens": encoder["num_tokens"],
        "adaln_streams": decoder["streams"],
        "max_timestep": decoder["max_timestep"],
        "time_frequencies": decoder["frequency_dim"],
        "alignment": decoder["alignment"],
        **training_arguments(config),
        "num_steps": 20,
        "guidance_scale": 7.5,
        "guidance": "apg",
    }


def decoder_arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of our ``FlowDecoder``."""
    modules = _modules(config, "decoder")
    trunk, times = modules["dec_transformer"], modules["dec_time_embedder"]
    return {
        **_patch_arguments(modules["dec_noise_patch_emb"], modules["dec_patches_posemb_module"]),
        "config": _trunk(trunk),
        "num_tokens": _register_count(modules["dec_registers_posemb_module"]),
        "code_dim": modules["dec_from_latents"]["dim_in"],
        "streams": trunk.get("adaLN_expansion", 1),
        "max_timestep": times.get("max_timestep", 1000.0),
        "frequency_dim": times.get("frequency_embedding_size", 256),
        "alignment": _alignment(modules, trunk),
    }


def encoder_arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of our ``Encoder``."""
    modules = _modules(config, "encoder")
    return {
        **_patch_arguments(modules["enc_patch_emb"], modules["enc_posemb_module"]),
        "config": _trunk(modules["enc_transformer"]),
        "num_tokens": modules["enc_register_module"]["n_max"],
        "code_dim": modules["enc_to_latents"]["dim_out"],
    }


def training_arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of training: quantizer, dropout of tokens and condition, times, posterior."""
    modules, noise = _modules(config, "decoder"), config.get("flow_matching_noise_module", {})
    if noise.get("ln", False):
        times = {"name": "logit_normal", "stratified": noise.get("stratisfied", False)}
    else:
        times = {"name": "mode", "mode_scale": float(noise.get("mode_scale", 0.0))}
    sampled = config.get("vae", {}).get("sample_posterior", True)
    return {
        "levels": tuple(config["regularizer"]["levels"]),
        "quantizer_dropout": float(config["regularizer"].get("drop_quant_p", 0.0)),
        "nested_dropout": modules["dec_nested_dropout"].get("size_sampling_mode", "uniform"),
        "null_dropout": float(modules["dec_latent_dropout"].get("dropout_prob", 0.0)),
        "time_sampling": times,
        "posterior": "sample" if sampled else "mode",
    }


def vae_arguments(config: Mapping[str, Any]) -> tuple[dict[str, Any], float]:
    """The autoencoder's arguments, and the factor on its latents.

    Raises:
        CheckpointError: the config gives no scaling factor, without which the reference fails too.
    """
    section = config["vae"]
    if section.get("scaling_factor") is None:
        raise CheckpointError("vae.scaling_factor is missing or null in the config; give the factor on the latents")
    widths = tuple(section.get("block_out_channels", VAE_DEFAULTS["block_out_channels"]))
    known = VAE_DEFAULTS | {"block_out_channels": widths, "latent_channels": section["latent_channels"]}
    return known, float(section["scaling_factor"])


def our_names(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Official weights under our names. Unknown entries of the decoder's modules are dropped with a warning."""
    heads = [rule for name in _heads(_modules(config, "decoder")) for rule in _alignment_names(name)]
    fused = fuse(state, ("attn.wq", "attn.wk", "attn.wv"), "attn.qkv")
    renamed = {key: _as_table(key, tensor) for key, tensor in rename(fused, [*NAMES, *heads]).items()}
    unknown = sorted(key for key in renamed if key.startswith("decoder.module_dict."))
    if unknown:
        log.warning("%d unknown entries of the decoder were ignored: %s", len(unknown), ", ".join(unknown[:5]))
    return {key: tensor for key, tensor in renamed.items() if key not in unknown}


def _modules(config: Mapping[str, Any], section: str) -> Mapping[str, Any]:
    modules = (config.get(section) or {}).get("module_dict")
    if not isinstance(modules, Mapping):
        raise CheckpointError(f"the config has no {section}.module_dict; it is not one of a FlexTok model")
    wrong = [name for name, module in modules.items() if not isinstance(module, Mapping)]
    if wrong:
        raise CheckpointError(f"{section}.module_dict.{wrong[0]} is no module, but {modules[wrong[0]]!r}")
    return modules


def _trunk(section: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "dim": section["dim"],
        "num_layers": section["depth"],
        "head_dim": section.get("head_dim", 64),
        "mlp_ratio": float(section.get("mlp_ratio", 4.0)),
    }


def _patch_arguments(patches: Mapping[str, Any], positions: Mapping[str, Any]) -> dict[str, Any]:
    if positions.get("posemb_type", "sincos") != "sincos" or positions.get("posemb_scaling") != "absolute":
        raise CheckpointError(
            f"patch positions of type {positions.get('posemb_type')!r} with scaling "
            f"{positions.get('posemb_scaling')!r} are not built; every released model has 'sincos', 'absolute'"
        )
    return {
        "channels": patches["channels_in"],
        "patch": tuple(patches["patch_sizes"]),
        "grid": tuple(positions["max_sizes"]),
    }


def _register_count(positions: Mapping[str, Any]) -> int:
    absolute = positions.get("posemb_scaling", "absolute") == "absolute"
    if positions.get("posemb_type") != "learnable_sum" or len(positions["max_sizes"]) != 1 or not absolute:
        raise CheckpointError("register positions must be one learned table ('learnable_sum', 'absolute', one axis)")
    return positions["max_sizes"][0]


def _heads(modules: Mapping[str, Any]) -> list[str]:
    return [name for name, module in modules.items() if module.get("_target_", "").endswith(".MLPHead")]


def _alignment(modules: Mapping[str, Any], trunk: Mapping[str, Any]) -> dict[str, Any] | None:
    heads, tapped = _heads(modules), trunk.get("intermediate_layers", [])
    if not heads or not tapped:
        return None
    if len(heads) > 1 or len(tapped) > 1:
        raise CheckpointError(f"one alignment head of one layer is built; got heads {heads} and layers {tapped}")
    head = modules[heads[0]]
    return {"dim": head["dim_out"], "layer": tapped[0], "num_layers": head.get("num_layers", 3)}


def _alignment_names(name: str) -> list[tuple[str, str]]:
    prefix = rf"decoder\.module_dict\.{name}"
    return [
        (rf"{prefix}\.mlp\.(\d+)\.(\w+)", r"decoder.alignment_head.mlp.\1.\2"),
        (rf"{prefix}\.out_proj\.(\w+)", r"decoder.alignment_head.out.\1"),
    ]


def _as_table(key: str, tensor: Tensor) -> Tensor:
    """Position tables in our layout: of patches (1, D, H, W) to (H, W, D), of registers (1, 1, D, N) to (N, D)."""
    if key.endswith("patches.positions") and tensor.ndim == 4:
        return tensor[0].permute(1, 2, 0)
    if key == "decoder.register_positions" and tensor.ndim == 4:
        return tensor[0, 0].T
    return tensor


NAMES = [
    (r"encoder\.module_dict\.enc_patch_emb\.patch_proj\.(\w+)", r"encoder.patches.proj.\1"),
    (r"encoder\.module_dict\.enc_posemb_module\.posembs", r"encoder.patches.positions"),
    (r"encoder\.module_dict\.enc_register_module\.registers", r"encoder.registers"),
    (r"encoder\.module_dict\.enc_to_latents\.proj\.(\w+)", r"encoder.to_codes.\1"),
    (r"decoder\.module_dict\.dec_from_latents\.proj\.(\w+)", r"decoder.from_codes.\1"),
    (r"decoder\.module_dict\.dec_registers_posemb_module\.posembs", r"decoder.register_positions"),
    (r"decoder\.module_dict\.dec_nested_dropout\.dropout_mask_token", r"decoder.dropped_token"),
    (r"decoder\.module_dict\.dec_latent_dropout\.nullcond", r"decoder.null_token"),
    (r"decoder\.module_dict\.dec_noise_patch_emb\.patch_proj\.(\w+)", r"decoder.patches.proj.\1"),
    (r"decoder\.module_dict\.dec_patches_posemb_module\.posembs", r"decoder.patches.positions"),
    (r"decoder\.module_dict\.dec_time_embedder\.mlp\.(\d)\.(\w+)", r"decoder.time_embedding.mlp.\1.\2"),
    (r"decoder\.module_dict\.dec_to_patches\.adaLN_modulation\.1\.(\w+)", r"decoder.modulation.\1"),
    (r"decoder\.module_dict\.dec_to_patches\.proj\.(\w+)", r"decoder.to_patches.\1"),
    *(
        (rf"{part}\.module_dict\.{short}_transformer\.{theirs}", rf"{part}.{ours}")
        for part, short in (("encoder", "enc"), ("decoder", "dec"))
        for theirs, ours in (
            (r"blocks\.(\d+)\.attn\.qkv\.(\w+)", r"blocks.\1.attn.qkv.\2"),
            (r"blocks\.(\d+)\.attn\.proj\.(\w+)", r"blocks.\1.attn.out.\2"),
            (r"blocks\.(\d+)\.mlp\.fc1\.(\w+)", r"blocks.\1.mlp.gate.\2"),
            (r"blocks\.(\d+)\.mlp\.fc3\.(\w+)", r"blocks.\1.mlp.up.\2"),
            (r"blocks\.(\d+)\.mlp\.fc2\.(\w+)", r"blocks.\1.mlp.down.\2"),
            (r"blocks\.(\d+)\.adaLN_modulation\.1\.(\w+)", r"blocks.\1.modulation.\2"),
        )
    ),
    *OLD_DIFFUSERS_NAMES,
]

"""Every key of a FlexTok config: read by ``official``, fixed to the one supported value, or without effect."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from vistok.checkpoints import CheckpointError
from vistok.checkpoints.official_config import OfficialConfig

WITHOUT_EFFECT = {
    "*_key": "the name of an entry in the reference's data dictionary",
    "*_keys": "names of entries in the reference's data dictionary",
    "*._partial_": "how the reference makes an object of its config",
    "*.pad_to_multiple": "padding, which the mask hides",
    "*.use_act_checkpoint": "saves memory in training",
    "*.weight_init_style": "weights before training",
    "*.enc_register_module.size_sampling_mode": "draws the number of registers, of which there is one choice",
    "*.intermediate_layers": "layers whose features nothing reads",
    "vae.frozen": "whether the reference trains the autoencoder further; its weights are in the file",
    "flow_matching_noise_module.stratisfied": "of logit-normal times, which these are not",
    "flow_matching_noise_module.mode_scale": "of times that are not logit-normal",
}
"""Keys that do not change what the model computes, each with the reason."""


@dataclass(frozen=True)
class Module:
    """One module of the reference: its class, the keys that ``official`` reads, and those with one value.

    Attributes:
        kind: the last part of its class path.
        read: keys that become arguments of our model.
        fixed: keys that may only have this value, which is also the default.
        sized: whether its ``dim`` is the width of the transformer.
    """

    kind: str
    read: tuple[str, ...] = ()
    fixed: Mapping[str, Any] = field(default_factory=dict)
    sized: bool = True


POSITIONS = Module("PositionalEmbeddingAdder", ("max_sizes", "posemb_type", "posemb_scaling"))
PATCHES = Module("PatchEmbedder", ("channels_in", "patch_sizes"), {"flatten_patches": False})
TRUNK = ("dim", "depth", "head_dim", "mlp_ratio")
TO_LAST = Module("PerSampleOp", fixed={"per_sample_op._target_": "channels_first_to_last"}, sized=False)
UNPACKER = Module("SequenceUnpacker", sized=False)
HEAD_OPTIONS = {"use_mup_readout": False, "dtype_override": None}

MODULES = {
    "encoder": {
        "enc_channels_to_last": TO_LAST,
        "enc_patch_emb": PATCHES,
        "enc_posemb_module": POSITIONS,
        "enc_register_module": Module("Registers1D", ("n_max",), {"ordering_mode": "nested"}),
        "enc_seq_packer": Module(
            "BlockWiseSequencePacker", fixed={"mask_mode": "causal_last", "per_subseq_embs": False}, sized=False
        ),
        "enc_transformer": Module("FlexTransformer", TRUNK, sized=False),
        "enc_unpacker": UNPACKER,
        "enc_to_latents": Module("LinearHead", ("dim_out",), HEAD_OPTIONS),
    },
    "decoder": {
        "dec_from_latents": Module("LinearLayer", ("dim_in",)),
        "dec_registers_posemb_module": POSITIONS,
        "dec_nested_dropout": Module("MaskedNestedDropout", ("size_sampling_mode",)),
        "dec_latent_dropout": Module("LearnedNullCond", ("dropout_prob",)),
        "dec_noise_channels_to_last": TO_LAST,
        "dec_noise_patch_emb": PATCHES,
        "dec_patches_posemb_module": POSITIONS,
        "dec_seq_packer": Module(
            "BlockWiseSequencePacker", fixed={"mask_mode": "full", "per_subseq_embs": True}, sized=False
        ),
        "dec_time_embedder": Module("TimestepEmbedder", ("frequency_embedding_size", "max_timestep")),
        "dec_transformer": Module("FlexTransformer", (*TRUNK, "adaLN_expansion"), sized=False),
        "dec_unpacker": UNPACKER,
        "dec_to_patches": Module("ToPatchesLinearHead", fixed=HEAD_OPTIONS),
        "dec_channels_to_first": Module(
            "PerSampleOp", fixed={"per_sample_op._target_": "channels_last_to_first"}, sized=False
        ),
    },
}
HEAD = Module("MLPHead", ("dim_out", "num_layers"), HEAD_OPTIONS)
"""The alignment head. Configs may give it, and its unpacker, any name."""

SECTIONS = {
    "vae": Module(
        "StableDiffusionVAE", ("latent_channels", "scaling_factor", "sample_posterior", "block_out_channels")
    ),
    "regularizer": Module("FSQ", ("levels", "drop_quant_p")),
    "flow_matching_noise_module": Module("MinRFNoiseModule", ("ln",)),
    "pipeline": Module("MinRFPipeline"),
}


def check_keys(config: Mapping[str, Any]) -> None:
    """Refuse a config with an unknown key, or with a value that is not supported.

    Raises:
        CheckpointError: names the key.
    """
    given = OfficialConfig(config, WITHOUT_EFFECT)
    for section, known in MODULES.items():
        if section in config:
            _check_modules(given, section, known, config[section]["module_dict"])
    for section, module in SECTIONS.items():
        _check(given, section, module)
    noise = config.get("flow_matching_noise_module", {})
    given.take("flow_matching_noise_module." + ("stratisfied" if noise.get("ln", False) else "mode_scale"), None)
    patches = config["decoder"]["module_dict"]["dec_noise_patch_emb"]
    channels, sizes = patches["channels_in"], patches["patch_sizes"]
    given.require("pipeline.out_channels", channels, why="the decoder makes what it reads")
    given.require("decoder.module_dict.dec_to_patches.channels_out", channels, why="the decoder makes what it reads")
    given.require("decoder.module_dict.dec_to_patches.patch_sizes", sizes, why="the decoder makes what it reads")
    if "encoder" in config:
        count = config["encoder"]["module_dict"]["enc_register_module"]["n_max"]
        given.require("encoder.module_dict.enc_register_module.n_min", count, why="every image has all registers")
    precisions = (None, "fp32", "float32", "torch.float32")
    given.require("vae.dtype_override", *precisions, why="the autoencoder runs in its own precision")
    given.finish()


def _check_modules(
    given: OfficialConfig, section: str, known: Mapping[str, Module], modules: Mapping[str, Mapping[str, Any]]
) -> None:
    _check_class(given, section, "SequentialModuleDictWrapper")
    width = modules[f"{section[:3]}_transformer"]["dim"]
    for name, keys in modules.items():
        if not isinstance(keys, Mapping):
            raise CheckpointError(f"{section}.module_dict.{name} is no module, but {keys!r}")
        module = known.get(name) or (HEAD if _class(keys) == HEAD.kind else UNPACKER)
        _check(given, f"{section}.module_dict.{name}", module)
        if module is HEAD:
            given.take(f"{section}.module_dict.{section[:3]}_transformer.intermediate_layers", None)
        if module.sized:
            given.require(f"{section}.module_dict.{name}.dim", width, why="it is the width of the transformer")


def _check(given: OfficialConfig, path: str, module: Module) -> None:
    _check_class(given, path, module.kind)
    for key in module.read:
        given.take(f"{path}.{key}", None)
    for key, value in module.fixed.items():
        if key.endswith("_target_"):
            _check_class(given, f"{path}.{key.removesuffix('._target_')}", value)
        else:
            given.require(f"{path}.{key}", value, why="every released model has it")


def _check_class(given: OfficialConfig, path: str, kind: str) -> None:
    """A class path may be absent; if it is given, its last part must be ``kind``."""
    target = given.take(f"{path}._target_", kind)
    if str(target).rsplit(".", 1)[-1] != kind:
        raise CheckpointError(f"{path} is of the class {target}; every released model has {kind} there")


def _class(keys: Mapping[str, Any]) -> str:
    return str(keys.get("_target_", "")).rsplit(".", 1)[-1]

"""Translates the reference's arguments and state dict (github.com/TencentARC/SEED-Voken) into ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vistok.checkpoints import rename
from vistok.checkpoints.official_config import OfficialConfig

F16, F8 = (1, 1, 2, 2, 4), (1, 2, 2, 4)
GRID = 16
"""Side of the code map of all released models."""

WITHOUT_EFFECT = {
    "ddconfig.resolution": "the network is convolutional, and the reference does not read it",
    "ddconfig.double_z": "the reference does not read it",
    "token_factorization": "how a generator splits the ids",
    "factorized_bits": "how a generator splits the ids",
}
"""Arguments of the reference that do not change what the model computes, each with the reason."""


def config(channel_mult: tuple[int, ...], bits: int) -> dict[str, Any]:
    """The reference's arguments for a released tokenizer."""
    sizes = {"ch": 128, "ch_mult": list(channel_mult), "num_res_blocks": 4}
    return {
        "ddconfig": {"z_channels": bits, "in_channels": 3, "out_ch": 3, **sizes},
        "n_embed": 2**bits,
        "embed_dim": bits,
        "sample_minimization_weight": 1.0,
        "batch_maximization_weight": 1.0,
    }


def arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """Our constructor arguments for those of the reference.

    Raises:
        CheckpointError: keys that are unknown or not supported.
    """
    given = OfficialConfig(config, WITHOUT_EFFECT)
    bits, channels = given.take("embed_dim"), given.take("ddconfig.in_channels", 3)
    given.require("ddconfig.z_channels", bits, why="the encoder's channels are the code's")
    given.require("ddconfig.out_ch", channels, why="images come back with their own channels")
    given.require("n_embed", 2**bits, why=f"{bits} signs are so many codes")
    channel_mult = tuple(given.take("ddconfig.ch_mult"))
    found = {
        "image_size": GRID * 2 ** (len(channel_mult) - 1),
        "in_channels": channels,
        "channels": given.take("ddconfig.ch"),
        "channel_mult": channel_mult,
        "res_blocks": given.take("ddconfig.num_res_blocks"),
        "bits": bits,
        "position_weight": given.take("sample_minimization_weight", 1.0),
        "usage_weight": given.take("batch_maximization_weight", 1.0),
    }
    given.require("ddconfig.dropout", 0.0, why="the reference's blocks have none")
    given.finish()
    return found


def our_names(state: Mapping[str, Tensor], num_levels: int) -> dict[str, Tensor]:
    """The reference's keys under our names. It counts the decoder's levels from the finest, we from the deepest."""
    turned = [
        (rf"decoder\.(up|adaptive)\.{i}\.(.+)", rf"decoder.\1.{num_levels - 1 - i}.\2") for i in range(num_levels)
    ]
    return rename(rename(state, turned), OFFICIAL_NAMES)


def without_wrappers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Keys of the reference's video tokenizer as keys of its image tokenizer: a wrapper around every causal convolution
    is removed."""
    return rename(state, [(r"(.+)\.conv_1\.(\w+)", r"\1.\2")])


OFFICIAL_NAMES = [
    (r"(\w+)\.(?:down|up)\.(\d+)\.block\.(\d+)\.nin_shortcut\.(\w+)", r"\1.levels.\2.blocks.\3.shortcut.\4"),
    (r"(\w+)\.(?:down|up)\.(\d+)\.block\.(\d+)\.(\w+)\.(\w+)", r"\1.levels.\2.blocks.\3.\4.\5"),
    (r"encoder\.down\.(\d+)\.downsample\.(\w+)", r"encoder.levels.\1.resample.conv.\2"),
    (r"decoder\.up\.(\d+)\.upsample\.conv1\.(\w+)", r"decoder.levels.\1.resample.conv.\2"),
    (r"decoder\.adaptive\.(\d+)\.(gamma|beta)\.(\w+)", r"decoder.styles.\1.\2.\3"),
    (r"(\w+)\.mid_block\.(\d+)\.(\w+)\.(\w+)", r"\1.middle.\2.\3.\4"),
]

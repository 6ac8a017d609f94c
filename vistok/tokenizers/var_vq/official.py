"""Translates config and state dict of the reference of VAR's tokenizer into ours."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vistok.checkpoints import rename
from vistok.checkpoints.official_config import OfficialConfig

CHANNEL_MULT = (1, 1, 2, 2, 4)
"""Widths of the levels. The reference hard-codes them, like the three channels and two residual blocks."""
STRIDE = 2 ** (len(CHANNEL_MULT) - 1)
SCALES_256 = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
SCALES_512 = (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)

WITHOUT_EFFECT = {
    "beta": "the weight of the commitment loss, which the training config has",
    "default_qresi_counts": "counts only where share_quant_resi is 0",
}
"""Arguments of the reference that do not change what the model computes, each with the reason."""

USAGE = "quantize.ema_vocab_hit_SV"
"""How often training chose each code; no part of the model."""


def config(scales: tuple[int, ...] = SCALES_256) -> dict[str, Any]:
    """The reference's config of the released tokenizer."""
    return {
        "vocab_size": 4096,
        "z_channels": 32,
        "ch": 160,
        "dropout": 0.0,
        "beta": 0.25,
        "using_znorm": False,
        "quant_conv_ks": 3,
        "quant_resi": 0.5,
        "share_quant_resi": 4,
        "default_qresi_counts": 0,
        "v_patch_nums": list(scales),
    }


def number_of_refiners(share: int, num_scales: int, default: int = 0) -> int:
    """The number of convolutions: ``share``, or if it is 0 ``default_qresi_counts``, or if that is 0 one per scale."""
    return share or default or num_scales


def arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """Our constructor arguments for the reference\'s config.

    Raises:
        CheckpointError: a key that is missing, unknown, or of a value that is not supported.
    """
    given = OfficialConfig(config, WITHOUT_EFFECT)
    scales = tuple(given.take("v_patch_nums", SCALES_256))
    share = given.take("share_quant_resi", 4)
    default = 0 if share else given.take("default_qresi_counts", 0)
    taken = {
        "image_size": scales[-1] * STRIDE,
        "channels": given.take("ch", 128),
        "channel_mult": CHANNEL_MULT,
        "z_channels": given.take("z_channels", 32),
        "codebook_size": given.take("vocab_size", 4096),
        "scales": scales,
        "num_refiners": number_of_refiners(share, len(scales), default),
        "refiner_share": abs(given.take("quant_resi", 0.5)),
        "quant_conv_kernel": given.take("quant_conv_ks", 3),
        "cosine_codes": given.take("using_znorm", False),
        "dropout": given.take("dropout", 0.0),
    }
    given.finish()
    return taken


DEEPEST = len(CHANNEL_MULT) - 1
OFFICIAL_NAMES = [
    (r"(encoder|decoder)\.mid\.block_1\.(.+)", r"\1.middle.0.\2"),
    (r"(encoder|decoder)\.mid\.attn_1\.(.+)", r"\1.middle.1.\2"),
    (r"(encoder|decoder)\.mid\.block_2\.(.+)", r"\1.middle.2.\2"),
    (r"encoder\.down\.(\d+)\.(.+)", r"encoder.levels.\1.\2"),
    # The reference counts the decoder's levels from the finest.
    *((rf"decoder\.up\.{DEEPEST - i}\.(.+)", rf"decoder.levels.{i}.\1") for i in range(len(CHANNEL_MULT))),
    (r"quant_conv\.(\w+)", r"pre_quant.\1"),
    (r"post_quant_conv\.(\w+)", r"post_quant.\1"),
    (r"quantize\.embedding\.weight", r"quantizer.codebook.embedding.weight"),
    (r"quantize\.quant_resi\.qresi_ls\.(\d+)\.(\w+)", r"quantizer.refiners.\1.\2"),
    (r"quantize\.quant_resi\.qresi\.(\w+)", r"quantizer.refiners.0.\1"),
    (r"quantize\.quant_resi\.(\d+)\.(\w+)", r"quantizer.refiners.\1.\2"),
]
PARTS = [
    (r"(.+)\.block\.(\d+)\.(.+)", r"\1.blocks.\2.\3"),
    (r"(.+)\.attn\.(\d+)\.(.+)", r"\1.attentions.\2.\3"),
    (r"(.+)\.(?:down|up)sample\.conv\.(\w+)", r"\1.resample.conv.\2"),
]
LAYERS = [
    (r"(.+)\.nin_shortcut\.(\w+)", r"\1.shortcut.\2"),
    (r"(.+)\.proj_out\.(\w+)", r"\1.out.\2"),
]


def our_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The reference's state dict under our names; its fused attention projections become three."""
    kept = {key: tensor for key, tensor in state.items() if key != USAGE}
    for rules in (OFFICIAL_NAMES, PARTS, LAYERS):
        kept = rename(kept, rules)
    named: dict[str, Tensor] = {}
    for key, tensor in kept.items():
        fused = re.fullmatch(r"(.+)\.qkv\.(\w+)", key)
        if fused and tensor.shape[0] % 3 == 0:
            named |= {f"{fused[1]}.{part}.{fused[2]}": rows for part, rows in zip("qkv", tensor.chunk(3))}
        else:
            named[key] = tensor
    return named

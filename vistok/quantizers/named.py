"""Quantizers by name, which tokenizers of a raster or a sequence take in place of their own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from vistok.config import build, suggestion
from vistok.quantizers.fsq import FSQ
from vistok.quantizers.index import IndexQuantizer
from vistok.quantizers.lfq import LFQ
from vistok.quantizers.spherical import BSQ
from vistok.quantizers.vq import VectorQuantizer

QUANTIZERS: dict[str, type[nn.Module]] = {
    "vq": VectorQuantizer,
    "lfq": LFQ,
    "bsq": BSQ,
    "fsq": FSQ,
    "index": IndexQuantizer,
}


def build_quantizer(config: Mapping[str, Any], dim: int) -> Any:
    """The quantizer of one id per position that a config describes: ``name``, and the arguments of the class.

    Args:
        dim: channels of the latents; the class's ``dim``, which the config leaves out.

    Raises:
        ValueError: an unknown name, arguments that the class does not take, or another number of channels.
    """
    arguments = dict(config)
    name = arguments.pop("name", None)
    if not isinstance(name, str) or name not in QUANTIZERS:
        hint = suggestion(str(name), tuple(QUANTIZERS))
        raise ValueError(f"quantizer.name: unknown {name!r}{hint} Known: {', '.join(QUANTIZERS)}.")
    kind = QUANTIZERS[name]
    given = {"dim": arguments.pop("dim", dim)} if kind is not FSQ else {}
    quantizer = build(kind, arguments | given, "quantizer")
    if quantizer.dim != dim:
        raise ValueError(f"the quantizer {name!r} has codes of {quantizer.dim} channels, the latents have {dim}")
    return quantizer

"""Quantizers by name, which tokenizers of a raster or a sequence take in place of their own.

Single-scale quantizers give one id per latent, multi-scale ones the ids of all scales (``ScaledQuantizer``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from vistok.quantizers.fsq import FSQ
from vistok.quantizers.index import IndexQuantizer
from vistok.quantizers.lfq import LFQ
from vistok.quantizers.multiscale import MultiScaleQuantizer
from vistok.quantizers.scaled import PackedBSQ, ScaledQuantizer
from vistok.quantizers.spherical import BSQ
from vistok.quantizers.stochastic import StochasticQuantizer
from vistok.quantizers.vq import VectorQuantizer
from vistok.signatures import build
from vistok.utils.spelling import suggestion

QUANTIZERS: dict[str, type[nn.Module]] = {
    "vq": VectorQuantizer,
    "stochastic": StochasticQuantizer,
    "lfq": LFQ,
    "bsq": BSQ,
    "fsq": FSQ,
    "index": IndexQuantizer,
    "multi_scale": MultiScaleQuantizer,
    "multi_scale_bsq": PackedBSQ,
}


def chosen_quantizer(config: Mapping[str, Any] | None, dim: int | None, own: Callable[[], nn.Module]) -> Any:
    """The quantizer of a config (``build_quantizer``), or the tokenizer's ``own()`` if the config is None."""
    return own() if config is None else build_quantizer(config, dim)


def build_quantizer(config: Mapping[str, Any], dim: int | None) -> Any:
    """Build the quantizer of a config: ``name``, a key of ``QUANTIZERS``, and the arguments of its class.

    Args:
        dim: channels of the latents, which become the class's ``dim``. None takes ``dim`` from the config.

    Raises:
        ValueError: an unknown name, arguments that the class does not take, or another number of channels.
    """
    if not isinstance(config, Mapping):
        raise ValueError(f"quantizer must be a name and arguments, such as {{'name': 'lfq'}}; got {config!r}")
    arguments = dict(config)
    name = arguments.pop("name", None)
    if not isinstance(name, str) or name not in QUANTIZERS:
        hint = suggestion(str(name), tuple(QUANTIZERS)) or "."
        raise ValueError(f"quantizer.name: unknown {name!r}{hint} Known: {', '.join(QUANTIZERS)}.")
    kind = QUANTIZERS[name]
    given = {"dim": arguments.pop("dim", dim)} if kind is not FSQ and dim is not None else {}
    quantizer = build(kind, arguments | given, "quantizer")
    if dim is not None and quantizer.dim != dim:
        raise ValueError(f"the quantizer {name!r} has codes of {quantizer.dim} channels, the latents have {dim}")
    return ScaledQuantizer(quantizer) if isinstance(quantizer, MultiScaleQuantizer | PackedBSQ) else quantizer

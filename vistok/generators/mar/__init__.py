"""MAR: masked autoregression over continuous tokens with a diffusion head."""

from vistok.generators.mar.model import MAR

__all__ = ["MAR"]

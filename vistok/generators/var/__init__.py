"""VAR: a transformer that predicts one scale after another."""

from vistok.generators.var.model import VAR, VAROptions

__all__ = ["VAR", "VAROptions"]

"""MingTok: compact continuous latents, expanded to semantic features token by token."""

from vistok.tokenizers.mingtok.model import MingTok
from vistok.tokenizers.mingtok.networks import StageConfig

__all__ = ["MingTok", "StageConfig"]

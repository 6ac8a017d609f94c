"""D-AR: diffusion steps as groups of tokens."""

from vistok.tokenizers.dar.model import DAR

__all__ = ["DAR"]

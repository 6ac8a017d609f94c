"""Open-MAGVIT2's tokenizers of images and of clips (arXiv 2409.04410)."""

from vistok.tokenizers.open_magvit2.model import OpenMAGVIT2
from vistok.tokenizers.open_magvit2.video import OpenMAGVIT2Video

__all__ = ["OpenMAGVIT2", "OpenMAGVIT2Video"]

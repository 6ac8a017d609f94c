"""RobusTok: a vision-transformer tokenizer whose decoder is trained on perturbed latents."""

from vistok.tokenizers.robustok.model import RobusTok, from_backbone

__all__ = ["RobusTok", "from_backbone"]

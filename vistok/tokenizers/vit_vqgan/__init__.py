"""ViT-VQGAN's tokenizer (arXiv 2110.04627)."""

from vistok.tokenizers.vit_vqgan.model import OFFICIAL_NAMES, RESIDUAL_CODEBOOK, ViTConfig, ViTVQGAN

__all__ = ["OFFICIAL_NAMES", "RESIDUAL_CODEBOOK", "ViTConfig", "ViTVQGAN"]

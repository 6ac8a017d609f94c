"""TA-TiTok: a single-stage TiTok whose decoder reads a text beside the tokens.

Paper: Democratizing Text-to-Image Masked Generative Models with Compact Text-Aware One-Dimensional Tokens (arXiv
2501.07730). Official weights and conventions: github.com/bytedance/1d-tokenizer (Apache-2.0).

Texts are given as features. The released models read the 77 outputs of the text tower of CLIP ViT-L/14-336 (open_clip's
"openai" weights) after its last norm, neither projected nor pooled.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, Self

from torch import Tensor, nn

from vistok.checkpoints import OfficialCheckpoint
from vistok.checkpoints.official_config import OfficialConfig
from vistok.tokenizers.titok import official
from vistok.tokenizers.titok.model import Bottleneck, TiTok
from vistok.tokenizers.titok.networks import BASE, LARGE, SMALL, TransformerSize, learned
from vistok.types import Condition, ConditionSpec, FeatureSpec

VQ = {"bottleneck": "vq", "token_dim": 64, "codebook_size": 8192, "codebook_l2_norm": False}
RELEASED_VQ = VQ | {"codebook_clustering": True}
VAE = {"bottleneck": "vae", "token_dim": 16}


def _size(encoder: TransformerSize, num_tokens: int, kind: Mapping[str, Any]) -> dict[str, Any]:
    return {"encoder": asdict(encoder), "decoder": asdict(LARGE), "num_tokens": num_tokens, **kind}


class TextGuidance(nn.Module):
    """Text features (B, T, text_dim) to tokens of the decoder, (B, T, D).

    Args:
        text_dim: channels of the features.
        dim: width D of the decoder.
        length: number of features T of a text.
    """

    def __init__(self, text_dim: int, dim: int, length: int):
        super().__init__()
        self.projection = nn.Linear(text_dim, dim)
        self.positions = learned(length, dim)

    def forward(self, features: Tensor) -> Tensor:
        return self.projection(features.to(self.projection.weight.dtype)) + self.positions


class TATiTok(TiTok):
    """A single-stage TiTok whose decoder reads text features.

    Without a condition, and in its dropped rows, the decoder reads no text. Arguments that are not listed here are
    those of ``TiTok``; ``init_std`` applies only to the encoder.

    Args:
        text_dim: channels of the text features.
        text_length: number of features of a text; shorter texts are padded, with a mask.
    """

    registry_name = "ta_titok"
    tiny = {
        "image_size": 16,
        "encoder_patch_size": 4,
        "decoder_patch_size": 4,
        "encoder": {"dim": 32, "num_layers": 1, "num_heads": 2},
        "decoder": {"dim": 32, "num_layers": 1, "num_heads": 2},
        "num_tokens": 8,
        "token_dim": 4,
        "codebook_size": 32,
        "text_dim": 6,
        "text_length": 5,
    }
    truncated_normal = ("encoder",)
    sizes = {
        "bl32_vq": _size(BASE, 32, RELEASED_VQ),
        "bl64_vq": _size(BASE, 64, RELEASED_VQ),
        "bl128_vq": _size(BASE, 128, RELEASED_VQ),
        "bl32_vae": _size(BASE, 32, VAE),
        "bl64_vae": _size(BASE, 64, VAE),
        "sl128_vae": _size(SMALL, 128, VAE),
    }
    checkpoints = tuple(
        OfficialCheckpoint(f"turkeyju/tokenizer_tatitok_{name}", "model.safetensors", official.config(size))
        for name, size in sizes.items()
    )

    def __init__(
        self,
        image_size: int | tuple[int, int] = 256,
        in_channels: int = 3,
        encoder_patch_size: int = 16,
        decoder_patch_size: int = 16,
        encoder: TransformerSize = BASE,
        decoder: TransformerSize = LARGE,
        num_tokens: int = 32,
        token_dim: int = 64,
        bottleneck: Bottleneck = "vq",
        codebook_size: int = 8192,
        codebook_l2_norm: bool = False,
        codebook_clustering: bool = True,
        init_std: float = 0.02,
        latent_mean: float | tuple[float, ...] = 0.0,
        latent_scale: float | tuple[float, ...] = 1.0,
        text_dim: int = 768,
        text_length: int = 77,
        quantizer: dict[str, Any] | None = None,
    ):
        super().__init__(
            image_size=image_size,
            in_channels=in_channels,
            encoder_patch_size=encoder_patch_size,
            decoder_patch_size=decoder_patch_size,
            encoder=encoder,
            decoder=decoder,
            num_tokens=num_tokens,
            token_dim=token_dim,
            bottleneck=bottleneck,
            codebook_size=codebook_size,
            codebook_l2_norm=codebook_l2_norm,
            codebook_clustering=codebook_clustering and bottleneck == "vq",
            output="pixels",
            init_std=init_std,
            latent_mean=latent_mean,
            latent_scale=latent_scale,
            quantizer=quantizer,
        )
        self.text_dim, self.text_length = text_dim, text_length
        self.text = TextGuidance(text_dim, self.decoder.input.out_features, text_length)

    @property
    def condition_spec(self) -> ConditionSpec:
        """The text features that the decoder reads."""
        return ConditionSpec(features=FeatureSpec(self.text_dim, self.text_length))

    def decode_latents(self, latents: Tensor, condition: Condition | None = None) -> Tensor:
        """Codes or latents (B, N, D) to features of the decoder's patches, (B, P, W)."""
        self.check_condition(condition)
        text = None if condition is None else condition.part("features")
        if text is None:
            return self.decoder(latents)
        text = text.map(lambda tensor: tensor.to(latents.device))
        seen = ~text.dropped[:, None].expand(text.values.shape[:2])  # (B, T)
        if text.mask is not None:
            seen = seen & text.mask
        return self.decoder(latents, self.text(text.values), seen)

    @classmethod
    def from_official(cls, config: Mapping[str, Any], state_dict: Mapping[str, Tensor]) -> Self:
        given = OfficialConfig(config, official.WITHOUT_EFFECT)
        arguments = official.arguments(given)
        given.require("model.vq_model.is_legacy", False, why="TA-TiTok is single-stage")
        given.require("model.vq_model.finetune_decoder", False, why="TA-TiTok is single-stage")
        model = cls(
            **arguments,
            text_dim=given.take("model.vq_model.text_embed_dim", 768),
            text_length=given.take("model.vq_model.text_context_length", 77),
        )
        given.finish()
        state = official.with_clustering(state_dict, arguments)
        return model.with_official_weights(official.our_names(state, 1))

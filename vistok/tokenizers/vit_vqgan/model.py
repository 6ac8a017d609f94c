"""ViT-VQGAN: a vision-transformer autoencoder with a factorised, l2-normalised codebook.

Paper: Vector-quantized Image Modeling with Improved VQGAN (arXiv 2110.04627, ICLR 2022). Official weights and
conventions: the reimplementation github.com/thuanz123/enhancing-transformers (MIT), which differs from the paper in a
few places (tanh in every feed-forward, heads always 64 wide).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
from einops import rearrange
from torch import Tensor, nn

from vistok.checkpoints import OfficialCheckpoint, rename
from vistok.checkpoints.official_config import OfficialConfig
from vistok.checkpoints.weights import without_losses
from vistok.draws import Draws
from vistok.losses.pixel import LogitLaplace
from vistok.nn.attention import Attention
from vistok.nn.mlp import MLP
from vistok.nn.positions import sincos_2d
from vistok.quantizers import ResidualQuantizer, VectorQuantizer
from vistok.quantizers.named import chosen_quantizer
from vistok.quantizers.scaled import spec_of
from vistok.quantizers.vq import Gradient
from vistok.tokenizers.base import Tokenizer
from vistok.types import Clock, Condition, TokenizerOutput, TokenSpec, as_dataclass
from vistok.utils.sides import image_sides

HEAD_DIM = 64


@dataclass(frozen=True)
class ViTConfig:
    """Width, number of blocks, heads (64 wide each) and feed-forward width of one transformer."""

    dim: int
    num_layers: int
    num_heads: int
    mlp_dim: int


SMALL = {"dim": 512, "num_layers": 8, "num_heads": 8, "mlp_dim": 2048}
BASE = {"dim": 768, "num_layers": 12, "num_heads": 12, "mlp_dim": 3072}
LARGE = {"dim": 1280, "num_layers": 32, "num_heads": 16, "mlp_dim": 5120}


def _official(size: dict[str, int]) -> dict[str, Any]:
    section = {
        "dim": size["dim"],
        "depth": size["num_layers"],
        "heads": size["num_heads"],
        "mlp_dim": size["mlp_dim"],
    }
    return {
        "image_size": 256,
        "patch_size": 8,
        "encoder": section,
        "decoder": section,
        "quantizer": {"embed_dim": 32, "n_embed": 8192},
    }


class ViTVQGANBlock(nn.Module):
    """Pre-norm transformer block with a tanh feed-forward: (B, N, D) -> (B, N, D)."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        # The reference leaves the output projection out for a single head of the model's width.
        project = not (config.num_heads == 1 and config.dim == HEAD_DIM)
        self.norm1 = nn.LayerNorm(config.dim)
        self.attn = Attention(config.dim, config.num_heads, head_dim=HEAD_DIM, qkv_bias=False, project=project)
        self.norm2 = nn.LayerNorm(config.dim)
        self.mlp = MLP(config.dim, config.mlp_dim, torch.tanh)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Transformer(nn.Module):
    """Fixed sine-cosine positions, blocks, final norm: (B, h * w, D) -> (B, h * w, D)."""

    def __init__(self, config: ViTConfig, grid: tuple[int, int]):
        super().__init__()
        self.positions = nn.Parameter(sincos_2d(grid, config.dim)[None], requires_grad=False)
        self.blocks = nn.Sequential(*(ViTVQGANBlock(config) for _ in range(config.num_layers)))
        self.norm = nn.LayerNorm(config.dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.blocks(x + self.positions))


class ViTVQGAN(Tokenizer):
    """A raster of ids from a vision transformer. The networks work on pixels in [0, 1]; public pixels are in [-1, 1].

    Args:
        image_size: side of the images, or (height, width).
        patch_size: side of a patch, or (height, width); the image sides must be multiples of it.
        encoder, decoder: the two transformers.
        codebook_size: number of codes.
        codebook_embed_dim: channels of a code.
        codebook_l2_norm: compare and decode l2-normalised codes.
        residual_depth: codes per token; more than 1 is the residual variant, with one shared codebook.
        entropy_temperature: softmax temperature of the "entropy" loss term; None leaves the term out.
        codebook_restart_after: training steps after which an unused code is moved onto a latent; 0 turns this off.
        quantizer_gradient: how the gradient passes the quantizer ("raw" in ViT-VQGAN); see ``VectorQuantizer``.
        quantizer: config of another quantizer, {name, …its arguments}, see ``build_quantizer``. Its codes have
            ``codebook_embed_dim`` channels; other arguments of the codebook then have no effect.
        in_channels: 3, or 1 for grey images.
        pixel_distribution: "point" predicts pixels; "logit_laplace" predicts mean and scale of a Laplace distribution
            in logit space (the paper's loss, after DALL-E, arXiv 2102.12092, appendix A.3).

    Raises:
        ValueError: a size that patches do not divide, a width that is not divisible by 4, a ``residual_depth`` below 1,
            or one above 1 together with ``quantizer``.
    """

    registry_name = "vit_vqgan"
    encoding_parts = ("to_patches.*", *Tokenizer.encoding_parts)
    tiny = {
        "image_size": 16,
        "patch_size": 4,
        "encoder": {"dim": 32, "num_layers": 1, "num_heads": 1, "mlp_dim": 32},
        "decoder": {"dim": 32, "num_layers": 1, "num_heads": 1, "mlp_dim": 32},
        "codebook_size": 32,
        "codebook_embed_dim": 4,
    }
    native_range = (0.0, 1.0)
    sizes = {
        "small": {"encoder": SMALL, "decoder": SMALL},
        "base": {"encoder": BASE, "decoder": BASE},
        "large": {"encoder": SMALL, "decoder": LARGE},
    }
    checkpoints = (
        OfficialCheckpoint("thuanz123/vitvqgan-imagenet-small", "imagenet_vitvq_small.ckpt", _official(SMALL)),
        OfficialCheckpoint("thuanz123/vitvqgan-imagenet-base", "imagenet_vitvq_base.ckpt", _official(BASE)),
    )

    def __init__(
        self,
        image_size: int | tuple[int, int] = 256,
        patch_size: int | tuple[int, int] = 8,
        encoder: ViTConfig = ViTConfig(**SMALL),
        decoder: ViTConfig = ViTConfig(**SMALL),
        codebook_size: int = 8192,
        codebook_embed_dim: int = 32,
        codebook_l2_norm: bool = True,
        residual_depth: int = 1,
        entropy_temperature: float | None = None,
        codebook_restart_after: int = 0,
        in_channels: int = 3,
        pixel_distribution: Literal["point", "logit_laplace"] = "point",
        quantizer_gradient: Gradient = "raw",
        quantizer: dict[str, Any] | None = None,
    ):
        super().__init__()
        encoder, decoder = as_dataclass(ViTConfig, encoder), as_dataclass(ViTConfig, decoder)
        height, width = image_sides(image_size)
        self.patch = image_sides(patch_size)
        self.grid = (height // self.patch[0], width // self.patch[1])
        if (height % self.patch[0], width % self.patch[1]) != (0, 0):
            raise ValueError(f"image_size {height}x{width} is not a multiple of patch_size {self.patch}")
        if residual_depth < 1:
            raise ValueError(f"residual_depth must be at least 1, got {residual_depth}")
        self._input_shape = (in_channels, height, width)
        self.distribution = LogitLaplace() if pixel_distribution == "logit_laplace" else None
        out_channels = in_channels * (2 if self.distribution else 1)

        self.to_patches = nn.Conv2d(in_channels, encoder.dim, self.patch, self.patch)
        self.encoder = Transformer(encoder, self.grid)
        self.decoder = Transformer(decoder, self.grid)
        self.to_pixels = nn.ConvTranspose2d(decoder.dim, out_channels, self.patch, self.patch)
        for module in (self.to_patches, self.encoder, self.decoder, self.to_pixels):
            module.apply(_initialise)
        # These two keep torch's default initialisation, as in the reference.
        self.pre_quant = nn.Linear(encoder.dim, codebook_embed_dim)
        self.post_quant = nn.Linear(codebook_embed_dim, decoder.dim)
        if quantizer is not None and residual_depth > 1:
            raise ValueError(f"only ViT-VQGAN's own quantizer is residual; leave residual_depth {residual_depth} out")
        one = chosen_quantizer(
            quantizer,
            codebook_embed_dim,
            lambda: VectorQuantizer(
                codebook_size,
                codebook_embed_dim,
                normalize=codebook_l2_norm,
                gradient=quantizer_gradient,
                entropy_temperature=entropy_temperature,
                restart_after=codebook_restart_after,
            ),
        )
        self.quantizer = one if residual_depth == 1 else ResidualQuantizer(one, residual_depth)
        self.depth = residual_depth
        h, w = self.grid
        self._spec = spec_of(one, TokenSpec(h * w, one.codebook_size, one.dim, depth=residual_depth, grid=(h, w)))

    @property
    def loss_terms(self) -> tuple[str, ...]:
        return (*self.quantizer.loss_terms, *(("logit_laplace",) if self.distribution else ()))

    @property
    def raster_features(self) -> Mapping[str, int]:
        return {"latents": self.spec.dim, "decoded": self.to_pixels.in_channels}

    @property
    def last_layer(self) -> Tensor:
        return self.to_pixels.weight

    def latents(self, pixels: Tensor) -> Tensor:
        """Pixels (B, C, H, W) in [-1, 1] to latents (B, L, code dim), before quantization."""
        self.check_pixels(pixels)
        native = self.to_native(pixels)
        patches = rearrange(
            self.to_patches(self.distribution.squash(native) if self.distribution else native), "b d h w -> b (h w) d"
        )
        return self.pre_quant(self.encoder(patches))

    def encode(self, pixels: Tensor, *, condition: Condition | None = None, draws: Draws | None = None) -> Tensor:
        self.check_condition(condition)
        return self.quantize(self.latents(pixels))

    def decode(self, tokens: Tensor, *, condition: Condition | None = None) -> Tensor:
        """Ids (B, L[, depth]), or multi-scale ids (see ``dequantize``), to pixels (B, C, H, W).

        Raises:
            ValueError: ids out of range, or not L of them.
        """
        self.check_condition(condition)
        return self._point(self.decode_latents(self.dequantize(tokens)))

    def decode_latents(self, quantized: Tensor) -> Tensor:
        """Codes (B, L, code dim) to the decoder's raw output (B, C or 2C, H, W), in the native range."""
        return self._unpatched(self.decoder(self.post_quant(quantized)))

    def _unpatched(self, x: Tensor) -> Tensor:
        """The decoder's features (B, L, D) to its raw output (B, C or 2C, H, W)."""
        return self.to_pixels(rearrange(x, "b (h w) d -> b d h w", h=self.grid[0]))

    def _point(self, output: Tensor) -> Tensor:
        """The decoder's raw output to pixels in [-1, 1]: the mean in logit space, if it predicts a distribution."""
        return self.from_native(
            self.distribution.unsquash(output.chunk(2, 1)[0].sigmoid()) if self.distribution else output
        )

    def forward(
        self,
        pixels: Tensor,
        *,
        condition: Condition | None = None,
        target: Tensor | None = None,
        clock: Clock | None = None,
        draws: Draws | None = None,
    ) -> TokenizerOutput:
        self.check_condition(condition)
        latents = self.latents(pixels)
        quantized = self.quantizer(latents, draws=draws)
        decoded = self.decoder(self.post_quant(quantized.quantized))
        output = self._unpatched(decoded)
        features = {"latents": latents, "quantized": quantized.quantized, "decoded": decoded}
        losses = quantized.losses
        if self.distribution:
            mean, log_scale = output.chunk(2, 1)
            truth = self.to_native(pixels if target is None else target)
            losses = losses | {"logit_laplace": self.distribution(mean, log_scale, truth)}
        return TokenizerOutput(self._point(output), quantized.ids, losses, features)

    @classmethod
    def from_official(cls, config: Mapping[str, Any], state_dict: Mapping[str, Tensor]) -> Self:
        given = OfficialConfig(config, WITHOUT_EFFECT)
        residual, channels = given.take("quantizer.use_residual", False), given.take("encoder.channels", 3)
        given.require("decoder.channels", channels, why="it is that of the encoder")
        model = cls(
            image_size=given.take("image_size"),
            patch_size=given.take("patch_size"),
            encoder=_vit_config(given, "encoder"),
            decoder=_vit_config(given, "decoder"),
            codebook_size=given.take("quantizer.n_embed"),
            codebook_embed_dim=given.take("quantizer.embed_dim"),
            codebook_l2_norm=given.take("quantizer.use_norm", True),
            # Without use_residual the reference ignores this number.
            residual_depth=given.take("quantizer.num_quantizers", 1) if residual else 1,
            in_channels=channels,
        )
        given.finish()
        rules = OFFICIAL_NAMES if model.spec.depth == 1 else [RESIDUAL_CODEBOOK, *OFFICIAL_NAMES]
        return model.with_official_weights(rename(state_dict, rules))

    @staticmethod
    def clean_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return without_losses(state)


WITHOUT_EFFECT = {
    "quantizer.beta": "the weight of a loss, which the training config has",
    "quantizer.num_quantizers": "the levels of a residual quantizer, and this one is not residual",
    "image_key": "where the reference's data hold the image",
    "loss": "losses of the training, and its discriminator",
    "loss.*": "losses of the training, and its discriminator",
    "path": "where training starts from",
    "ignore_keys": "what training does not start from",
    "scheduler": "of the training",
    "scheduler.*": "of the training",
}
"""Arguments of the reference that do not change what the model computes, each with the reason."""


def _vit_config(given: OfficialConfig, part: str) -> ViTConfig:
    given.require(f"{part}.dim_head", HEAD_DIM, why="heads are always that wide")
    return ViTConfig(*(given.take(f"{part}.{key}") for key in ("dim", "depth", "heads", "mlp_dim")))


RESIDUAL_CODEBOOK = (r"quantizer\.embedding\.weight", r"quantizer.quantizer.embedding.weight")
OFFICIAL_NAMES = [
    (r"encoder\.en_pos_embedding", r"encoder.positions"),
    (r"decoder\.de_pos_embedding", r"decoder.positions"),
    (r"encoder\.to_patch_embedding\.0\.(\w+)", r"to_patches.\1"),
    (r"decoder\.to_pixel\.1\.(\w+)", r"to_pixels.\1"),
    (r"(\w+)\.transformer\.layers\.(\d+)\.0\.norm\.(\w+)", r"\1.blocks.\2.norm1.\3"),
    (r"(\w+)\.transformer\.layers\.(\d+)\.0\.fn\.to_qkv\.(\w+)", r"\1.blocks.\2.attn.qkv.\3"),
    (r"(\w+)\.transformer\.layers\.(\d+)\.0\.fn\.to_out\.(\w+)", r"\1.blocks.\2.attn.out.\3"),
    (r"(\w+)\.transformer\.layers\.(\d+)\.1\.norm\.(\w+)", r"\1.blocks.\2.norm2.\3"),
    (r"(\w+)\.transformer\.layers\.(\d+)\.1\.fn\.net\.0\.(\w+)", r"\1.blocks.\2.mlp.up.\3"),
    (r"(\w+)\.transformer\.layers\.(\d+)\.1\.fn\.net\.2\.(\w+)", r"\1.blocks.\2.mlp.down.\3"),
    (r"(\w+)\.transformer\.norm\.(\w+)", r"\1.norm.\2"),
]


def _initialise(module: nn.Module) -> None:
    """Xavier-uniform weights (convolutions flattened to two dimensions), as in the reference."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
        nn.init.xavier_uniform_(module.weight.view(module.weight.shape[0], -1))

"""Base class of convolutional tokenizers that quantize a raster of latents."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from vistok.draws import Draws
from vistok.quantizers.scaled import spec_of
from vistok.tokenizers.base import Tokenizer
from vistok.types import Clock, Condition, TokenizerOutput, TokenSpec
from vistok.utils.sides import check_grid, grid_of, image_sides


class ConvTokenizer(Tokenizer):
    """A raster of ids from a convolutional encoder; any image whose sides are multiples of the stride encodes.

    A subclass builds its networks and passes them to ``build``.
    """

    encoder: Any
    decoder: Any

    def __init__(self, image_size: int | tuple[int, int], in_channels: int, num_levels: int):
        super().__init__()
        self.stride = 2 ** (num_levels - 1)
        height, width = image_sides(image_size)
        self._input_shape = (in_channels, height, width)

    def build(
        self,
        encoder: nn.Module,
        pre_quant: nn.Module,
        quantizer: nn.Module,
        post_quant: nn.Module,
        decoder: nn.Module,
    ) -> None:
        """Set the networks, given in order of computation, and the spec.

        Args:
            pre_quant, post_quant: layers from the encoder's channels to the code's, and from these to the decoder's.

        Raises:
            ValueError: image sides that are not multiples of the stride.
        """
        self.encoder, self.pre_quant, self.quantizer = encoder, pre_quant, quantizer
        self.post_quant, self.decoder = post_quant, decoder
        self._spec = self.spec_for(self._input_shape)

    @property
    def raster_features(self) -> Mapping[str, int]:
        return {"latents": self.spec.dim, "decoded": self.decoder.conv_in.out_channels}

    @property
    def last_layer(self) -> Tensor:
        return self.decoder.conv_out.weight

    def _spec_for_sides(self, sides: tuple[int, ...]) -> TokenSpec:
        grid = grid_of(sides, self.stride)
        plain = TokenSpec(grid[0] * grid[1], self.quantizer.codebook_size, self.quantizer.dim, grid=grid)
        return spec_of(self.quantizer, plain)

    def latents(self, pixels: Tensor) -> Tensor:
        """Pixels (B, C, H, W) in [-1, 1] to latents (B, L, code dim) in raster order, before quantization."""
        self.check_pixels(pixels)
        return self.pre_quant(self.encoder(self.to_native(pixels))).flatten(2).transpose(1, 2)

    def encode(self, pixels: Tensor, *, condition: Condition | None = None, draws: Draws | None = None) -> Tensor:
        self.check_condition(condition)
        return self.quantize(self.latents(pixels))

    def decode(
        self, tokens: Tensor, *, condition: Condition | None = None, grid: tuple[int, ...] | None = None
    ) -> Tensor:
        """Ids (B, h * w), or multi-scale ids (see ``dequantize``), to pixels (B, C, h * stride, w * stride).

        Args:
            grid: (h, w) of the ids; None for the grid of ``spec``.

        Raises:
            ValueError: ids out of range, or not h * w of them.
        """
        self.check_condition(condition)
        if self.spec.scales:
            return self.decode_latents(self.dequantize(tokens), self.spec.scales[-1])
        grid = grid or self.spec.raster
        codes = self.dequantize(tokens, self.spec.check_ids(tokens).shape[1])
        check_grid(tokens, grid)
        return self.decode_latents(codes, grid)

    def decode_latents(self, quantized: Tensor, grid: tuple[int, ...]) -> Tensor:
        """Codes (B, h * w, code dim) on a grid (h, w) to pixels."""
        quantized = quantized.to(self.dtype)  # codes without weights, such as bits, are float32
        return self.from_native(self.decoder(self.post_quant(quantized.transpose(1, 2).unflatten(2, grid))))

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
        spec = self.spec_for(pixels.shape[1:])
        grid = spec.scales[-1] if spec.scales else spec.raster
        mapped = self.post_quant(quantized.quantized.transpose(1, 2).unflatten(2, grid))
        decoded = self.decoder.begin(mapped)
        features = {
            "latents": latents,
            "quantized": quantized.quantized,
            "decoded": decoded.flatten(2).transpose(1, 2),
        }
        reconstruction = self.from_native(self.decoder.finish(decoded, mapped))
        return TokenizerOutput(reconstruction, quantized.ids, quantized.losses, features)

"""A tokenizer of 14 tokens: codes of the mean colours of the image, of its 4 quarters and of its 9 ninths."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vistok.draws import Draws
from vistok.quantizers import VectorQuantizer
from vistok.tokenizers.base import Tokenizer
from vistok.types import Clock, Condition, TokenizerOutput, TokenSpec
from vistok.utils.sides import image_sides

SIDES = (1, 2, 3)
LENGTH = sum(side * side for side in SIDES)


class Pyramid(Tokenizer):
    registry_name = "pyramid"
    tiny = {"image_size": 12, "codebook_size": 11}
    sizes = {"usual": {"image_size": 12}}

    def __init__(self, image_size: int | tuple[int, int] = 12, in_channels: int = 3, codebook_size: int = 11):
        super().__init__()
        self._input_shape = (in_channels, *image_sides(image_size))
        self.encoder = nn.Linear(in_channels, 4)
        self.quantizer = VectorQuantizer(codebook_size, 4)
        self.decoder = nn.Linear(LENGTH * 4, in_channels * self._input_shape[1] * self._input_shape[2])

    @property
    def spec(self) -> TokenSpec:
        return TokenSpec(LENGTH, self.quantizer.codebook_size, dim=4)

    @property
    def input_shape(self) -> tuple[int, int, int]:
        return self._input_shape

    @property
    def loss_terms(self) -> tuple[str, ...]:
        return self.quantizer.loss_terms

    def latents(self, pixels: Tensor) -> Tensor:
        self.check_pixels(pixels)
        return self.encoder(torch.cat([F.adaptive_avg_pool2d(pixels, side).flatten(2) for side in SIDES], 2).mT)

    def encode(self, pixels: Tensor, *, condition: Condition | None = None, draws: Draws | None = None) -> Tensor:
        self.check_condition(condition)
        return self.quantizer.encode(self.latents(pixels))

    def decode(self, tokens: Tensor, *, condition: Condition | None = None) -> Tensor:
        self.check_condition(condition)
        return self._decode(self.quantizer.ids_to_latents(self.spec.check_ids(tokens)))

    def _decode(self, quantized: Tensor) -> Tensor:
        return self.decoder(quantized.flatten(1)).view(-1, *self._input_shape)

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
        quantized = self.quantizer(self.latents(pixels))
        features: dict[str, Any] = {"quantized": quantized.quantized}
        return TokenizerOutput(self._decode(quantized.quantized), quantized.ids, quantized.losses, features)

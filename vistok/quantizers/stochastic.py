"""Stochastic vector quantization: in training, codes are drawn with probabilities that rise with their similarity.

LARP (arXiv 2410.21264, section 3.2), github.com/hywang66/LARP.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vistok.draws import Draws, Keys, inverse_cdf
from vistok.types import DrawsInTraining, QuantizerOutput
from vistok.utils.devices import without_autocast


class StochasticQuantizer(nn.Module, DrawsInTraining):
    """Replace each latent vector z by a code e drawn from softmax(z . e / temperature), or by the most likely one.

    Computes in float32 even under autocast. Straight-through gradients go to the normalised latents.

    Args:
        codebook_size: number of codes K.
        dim: channels D of a code.
        normalize: compare and emit l2-normalised vectors, so that z . e is a cosine.
        temperature: softmax temperature, positive; "learned" trains its inverse, which starts at 10.

    Raises:
        ValueError: sizes below 1, or a temperature that is not positive.
    """

    loss_terms: tuple[str, ...] = ("codebook", "commitment")

    def __init__(
        self,
        codebook_size: int,
        dim: int,
        *,
        normalize: bool = True,
        temperature: float | Literal["learned"] = 0.03,
    ):
        super().__init__()
        if min(codebook_size, dim) < 1:
            raise ValueError(f"codebook_size and dim must be at least 1, got {codebook_size} and {dim}")
        if temperature != "learned" and not temperature > 0:
            raise ValueError(f"temperature must be positive or 'learned', got {temperature}")
        self.codebook_size, self.dim, self.normalize = codebook_size, dim, normalize
        self.embedding = nn.Embedding(codebook_size, dim)
        nn.init.kaiming_uniform_(self.embedding.weight)
        self.inverse_temperature: nn.Parameter | float
        if temperature == "learned":
            self.inverse_temperature = nn.Parameter(torch.full((1,), 10.0))
        else:
            self.inverse_temperature = 1 / temperature

    def codes(self) -> Tensor:
        """All codes (K, D), normalised if the quantizer normalises."""
        return self._norm(self.embedding.weight)

    def similarities(self, latents: Tensor) -> Tensor:
        """Dot products (..., K) of latents (..., D) with every code: cosines if the quantizer normalises."""
        with without_autocast(latents.device):
            return self._norm(latents) @ self.codes().T

    def assignment_probabilities(self, latents: Tensor) -> Tensor:
        """The probability (..., K) with which latents (..., D) become each code, in float32."""
        return (self.similarities(latents) * self.inverse_temperature).softmax(-1)

    def encode(self, latents: Tensor, *, draws: Draws | None = None) -> Tensor:
        """Ids (B, L) of latents (B, L, D): the most likely codes, or drawn ones if ``draws`` has "codes" (B, L)."""
        if draws is None or "codes" not in draws:
            return self.similarities(latents).argmax(-1)
        probabilities = self.assignment_probabilities(latents)
        uniforms = draws["codes"].to(probabilities.device)
        return inverse_cdf(probabilities.flatten(0, -2), uniforms.flatten()).view(uniforms.shape)

    def training_draws(self, keys: Keys, length: int) -> Draws:
        """ "codes", (B, ``length``) uniform."""
        return {"codes": keys.uniform("codes", length)}

    def neighbours(self, latents: Tensor, k: int) -> Tensor:
        """Ids (..., k) of the k most likely codes, the most likely first."""
        return self.similarities(latents).topk(k, dim=-1).indices

    def ids_to_latents(self, ids: Tensor) -> Tensor:
        """Codes (..., D) of ids (...)."""
        return self._norm(self.embedding(ids))

    def forward(self, latents: Tensor, *, draws: Draws | None = None) -> QuantizerOutput:
        """Quantize latents (B, L, D).

        Args:
            draws: "codes", uniform numbers (B, L) that draw the codes; without them the most likely ones are taken.
        """
        with torch.no_grad():
            ids = self.encode(latents, draws=draws)
        return self.assign(latents, ids)

    def assign(self, latents: Tensor, ids: Tensor) -> QuantizerOutput:
        """Quantize latents (B, L, D) to the codes of given ids (B, L)."""
        with without_autocast(latents.device):
            normalised, codes = self._norm(latents), self.ids_to_latents(ids)
            losses = {
                "codebook": (codes - normalised.detach()).square().mean(-1),
                "commitment": (codes.detach() - normalised).square().mean(-1),
            }
            quantized = normalised + (codes - normalised).detach()
        return QuantizerOutput(quantized, ids, losses, self.codebook_size)

    def _norm(self, vectors: Tensor) -> Tensor:
        vectors = vectors.float()
        return F.normalize(vectors, dim=-1) if self.normalize else vectors

"""Binary spherical quantization of single vectors: a code is the vector of its latent's signs, on the unit sphere.

Paper: Image and Video Tokenization with Binary Spherical Quantization (Zhao et al., arXiv 2406.07548), sections 4.1
and 4.2. ``MultiScaleBSQ`` is the version on growing grids, with bits as ids.
"""

from __future__ import annotations

import math

from torch import Tensor
from torch.nn import functional as F

from vistok.draws import Draws
from vistok.quantizers.lfq import LFQ
from vistok.types import QuantizerOutput


class BSQ(LFQ):
    """Normalise latents (..., D) and replace each channel by its sign over sqrt(D): 2^D codes of length one.

    Ids are as in ``LFQ``. The gradient is straight-through for the signs, and exact for the normalisation. The term
    "commitment" is below 2 / D, since latent and code have length one and an angle of less than 90 degrees.

    Args:
        dim: channels D, the bits of an id.
        entropy_temperature: temperature of the "entropy" term over the normalised latents and the codes; None leaves
            the term out.
        position_weight, usage_weight: weights of its two entropies, see ``EntropyLoss``.
    """

    def ids_to_latents(self, ids: Tensor) -> Tensor:
        """Codes (..., D) of length one, in float32, of ids (...)."""
        return super().ids_to_latents(ids) / math.sqrt(self.dim)

    def forward(self, latents: Tensor, *, draws: Draws | None = None) -> QuantizerOutput:
        """Quantize latents (B, L, D); ``draws`` is unused."""
        unit, ids = F.normalize(latents.float(), dim=-1), self.encode(latents)
        codes = self.ids_to_latents(ids)
        losses = {"commitment": (unit - codes).square().mean(-1)}
        if self.entropy is not None:
            # A bit's logit is 4 u_i / sqrt(D) for codes of +-1 / sqrt(D): that of codes of +-1 for u / sqrt(D).
            losses["entropy"] = self.entropy(unit / math.sqrt(self.dim))
        quantized = (unit + (codes - unit).detach()).to(latents.dtype)
        return QuantizerOutput(quantized, ids, losses, self.codebook_size)

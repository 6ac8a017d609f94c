"""Index backpropagation quantization: the gradient passes through the index, and so reaches every code.

Paper: Scalable Image Tokenization with Index Backpropagation Quantization (Shi et al., arXiv 2412.02692), section 3.
"""

from __future__ import annotations

from torch import Tensor, nn

from vistok.draws import Draws
from vistok.losses.entropy import EntropyLoss
from vistok.types import QuantizerOutput
from vistok.utils.devices import without_autocast


class IndexQuantizer(nn.Module):
    """Replace each latent z by the code e of the largest dot product z.e.

    The backward pass treats the choice as softmax(z.e), so latents and all codes get gradients. There is no
    straight-through gradient to the latents.

    Loss terms: "quantization" is the squared distance of latents and quantized latents, and trains both through the
    index; "commitment" and "codebook" are as in ``VectorQuantizer``.

    Args:
        codebook_size: number of codes K.
        dim: channels D of a code.
        entropy_temperature: softmax temperature of the "entropy" term; None leaves the term out.
        position_weight, usage_weight: weights of its two entropies, see ``EntropyLoss``.

    Raises:
        ValueError: sizes below 1.
    """

    def __init__(
        self,
        codebook_size: int,
        dim: int,
        *,
        entropy_temperature: float | None = 0.01,
        position_weight: float = 1.0,
        usage_weight: float = 1.0,
    ):
        super().__init__()
        if min(codebook_size, dim) < 1:
            raise ValueError(f"codebook_size and dim must be at least 1, got {codebook_size} and {dim}")
        self.codebook_size, self.dim = codebook_size, dim
        self.embedding = nn.Embedding(codebook_size, dim)
        weights = {"position_weight": position_weight, "usage_weight": usage_weight}
        self.entropy = None if entropy_temperature is None else EntropyLoss(entropy_temperature, **weights)

    @property
    def loss_terms(self) -> tuple[str, ...]:
        return ("quantization", "codebook", "commitment", *(("entropy",) if self.entropy else ()))

    def scores(self, latents: Tensor) -> Tensor:
        """Dot products (..., K) of latents (..., D) with every code, in float32 even under autocast."""
        with without_autocast(latents.device):
            return latents.float() @ self.embedding.weight.float().T

    def encode(self, latents: Tensor) -> Tensor:
        """Ids (...) of the codes with the largest dot products with latents (..., D); the first of equals wins."""
        return self.scores(latents).argmax(-1)

    def neighbours(self, latents: Tensor, k: int) -> Tensor:
        """Ids (..., k) of the codes with the k largest dot products, the largest first."""
        return self.scores(latents).topk(k, dim=-1).indices

    def ids_to_latents(self, ids: Tensor) -> Tensor:
        """Codes (..., D) of ids (...)."""
        return self.embedding(ids)

    def forward(self, latents: Tensor, *, draws: Draws | None = None) -> QuantizerOutput:
        """Quantize latents (B, L, D); ``draws`` is unused."""
        scores = self.scores(latents)
        ids = scores.argmax(-1)
        codes = self.embedding(ids)
        with without_autocast(latents.device):
            # Paper: (onehot(argmax) + soft - sg(soft)) @ codebook. Written as a sum, the value is exactly the code; the
            # first part trains the chosen code, the second trains latents and all codes through the softmax.
            blend = scores.softmax(-1) @ self.embedding.weight.detach().float()
            quantized = codes + (blend - blend.detach())
            z = latents.float()
            losses = {
                "quantization": (quantized - z).square().mean(-1),
                "codebook": (codes - z.detach()).square().mean(-1),
                "commitment": (codes.detach() - z).square().mean(-1),
            }
            if self.entropy is not None:
                losses["entropy"] = self.entropy(-scores)
        return QuantizerOutput(quantized, ids, losses, self.codebook_size)

"""Vector quantization with a learned codebook, plain and residual.

VQ-VAE: van den Oord et al., arXiv 1711.00937. Factorised, l2-normalised codes: ViT-VQGAN, arXiv 2110.04627, section
3.2. Residual: Lee et al., arXiv 2203.01941. Gradients by rotation: Fifty et al., arXiv 2410.06424.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vistok.draws import Draws
from vistok.losses.entropy import EntropyLoss
from vistok.quantizers.clustering import CodeClustering
from vistok.quantizers.perturbation import EXCHANGE, Perturbation, perturb
from vistok.quantizers.restart import CodeRestart
from vistok.types import AfterBackward, QuantizerOutput
from vistok.utils.devices import without_autocast

Gradient = Literal["raw", "normalised", "rotation"]
Init = Literal["normal", "uniform"]


class VectorQuantizer(nn.Module, AfterBackward):
    """Replace each latent vector by the nearest of ``codebook_size`` learned codes.

    Args:
        codebook_size: number of codes K.
        dim: channels D of a code.
        normalize: compare and emit l2-normalised vectors (the cosine codebook of ViT-VQGAN and LlamaGen).
        gradient: how the gradient passes the quantizer. "raw" and "normalised" are straight-through estimators: "raw"
            (ViT-VQGAN) bypasses the normalisation of the latents, "normalised" (LlamaGen) passes through it.
            "rotation" is the rotation trick (``rotate_to``); its output is the code up to rounding, in evaluation too.
        init: "normal" is N(0, 1); "uniform" is U(-1/K, 1/K), with rows l2-normalised if ``normalize``.
        entropy_temperature: softmax temperature of the "entropy" term; None leaves the term out.
        restart_after: training steps after which an unused code is moved onto a latent (``CodeRestart``); 0 is off.
            A training loop calls ``after_backward`` between the backward pass and the step of its optimizer.
        clustering: in training, move rarely chosen codes towards the latents nearest to them (``CodeClustering``).
            Needs the same call.

    Raises:
        ValueError: an unknown ``gradient``, sizes below 1, or ``restart_after`` together with ``clustering``.

    Attributes:
        perturbation: if set, training exchanges tokens of some images for near codes, after the loss terms were
            computed on the clean ones. ``forward`` then needs ``draws``. It is not saved with the model.
    """

    perturbation: Perturbation | None = None

    def __init__(
        self,
        codebook_size: int,
        dim: int,
        *,
        normalize: bool = True,
        gradient: Gradient = "raw",
        init: Init = "normal",
        entropy_temperature: float | None = None,
        restart_after: int = 0,
        clustering: bool = False,
    ):
        super().__init__()
        if gradient not in get_args(Gradient):
            raise ValueError(f"gradient must be one of {', '.join(map(repr, get_args(Gradient)))}, got {gradient!r}")
        if min(codebook_size, dim) < 1:
            raise ValueError(f"codebook_size and dim must be at least 1, got {codebook_size} and {dim}")
        if restart_after and clustering:
            raise ValueError(f"restart_after {restart_after} and clustering both move unused codes; choose one of them")
        self.codebook_size, self.dim = codebook_size, dim
        self.normalize, self.gradient = normalize, gradient
        self.embedding = nn.Embedding(codebook_size, dim)
        self.entropy = None if entropy_temperature is None else EntropyLoss(entropy_temperature)
        self.restart = CodeRestart(codebook_size, dim, restart_after) if restart_after else None
        self.clustering = CodeClustering(codebook_size, dim) if clustering else None
        self._initialise(init)

    def _initialise(self, init: Init) -> None:
        if init == "normal":
            nn.init.normal_(self.embedding.weight)
            return
        nn.init.uniform_(self.embedding.weight, -1 / self.codebook_size, 1 / self.codebook_size)
        if self.normalize:
            with torch.no_grad():
                self.embedding.weight.copy_(F.normalize(self.embedding.weight, dim=-1))

    @property
    def loss_terms(self) -> tuple[str, ...]:
        return ("codebook", "commitment", *(("entropy",) if self.entropy else ()))

    def codes(self) -> Tensor:
        """All codes (K, D), normalised if the quantizer normalises."""
        return self._norm(self.embedding.weight)

    def distances(self, latents: Tensor) -> Tensor:
        """Squared distances (..., K) of latents (..., D) to every code, in float32 even under autocast: in bfloat16
        several percent of the latents would get another code."""
        with without_autocast(latents.device):
            z, codes = self._norm(latents.float()), self._norm(self.embedding.weight.float())
            squares = z.pow(2).sum(-1, keepdim=True) + codes.pow(2).sum(-1)
            return squares - 2 * z @ codes.T

    def encode(self, latents: Tensor) -> Tensor:
        """Ids (...) of the nearest codes of latents (..., D); the first of equals wins."""
        return self.distances(latents).argmin(-1)

    def neighbours(self, latents: Tensor, k: int) -> Tensor:
        """Ids (..., k) of the k nearest codes, nearest first."""
        return self.distances(latents).topk(k, dim=-1, largest=False).indices

    def ids_to_latents(self, ids: Tensor) -> Tensor:
        """Codes (..., D) of ids (...)."""
        return self._norm(self.embedding(ids))

    def forward(self, latents: Tensor, *, draws: Draws | None = None) -> QuantizerOutput:
        """Quantize latents (B, L, D). ``draws`` come from ``perturbation_draws``, needed if ``perturbation`` is set."""
        distances = self.distances(latents)
        output = self.assign(latents, distances, draws=draws)
        if self.training and self.restart is not None:
            self.restart(latents, output.ids)
        if self.training and self.clustering is not None:
            self.clustering(latents, distances, output.ids)
        return output

    def assign(self, latents: Tensor, distances: Tensor, *, draws: Draws | None = None) -> QuantizerOutput:
        """As ``forward``, from latents (B, L, D) and their ``distances`` (B, L, K), without a step of ``restart`` or
        ``clustering``."""
        ids = distances.argmin(-1)
        codes, normalised = self.ids_to_latents(ids), self._norm(latents)
        losses = {
            "codebook": (codes - normalised.detach()).pow(2).mean(-1),
            "commitment": (codes.detach() - normalised).pow(2).mean(-1),
        }
        if self.entropy is not None:
            losses["entropy"] = self.entropy(distances)
        if self.training and self.perturbation is not None:
            codes = self._perturbed(self.perturbation, codes, distances, draws)
        if self.gradient == "rotation":
            quantized = rotate_to(normalised, codes)
        else:
            carrier = latents if self.gradient == "raw" else normalised
            quantized = carrier + (codes - carrier).detach()
        return QuantizerOutput(quantized, ids, losses, self.codebook_size)

    @torch.no_grad()
    def _perturbed(self, perturbation: Perturbation, codes: Tensor, distances: Tensor, draws: Draws | None) -> Tensor:
        """Codes (B, L, D), in which some codes of the first images of the batch are exchanged for near ones."""
        if draws is None or EXCHANGE not in draws:
            raise ValueError("a perturbation of latents is random: pass perturbation_draws(keys, length)")
        count = perturbation.rows(len(codes))
        strength = min(perturbation.strength, self.codebook_size)
        neighbours = distances[:count].topk(strength, dim=-1, largest=False).indices
        ids = perturb(neighbours, perturbation.rate, strength, {name: d[:count] for name, d in draws.items()})
        return torch.cat([self.ids_to_latents(ids), codes[count:]])

    def after_backward(self) -> None:
        """Move codes that are dead (``restart_after``) or rare (``clustering``) to latents, if one of these is on."""
        for mover in (self.restart, self.clustering):
            if mover is not None:
                mover.move(self.embedding.weight)

    def _norm(self, vectors: Tensor) -> Tensor:
        return F.normalize(vectors, dim=-1) if self.normalize else vectors


def rotate_to(latents: Tensor, codes: Tensor) -> Tensor:
    """The rotation trick: map latents (..., D) to their codes (..., D) by a rotation and a scaling that are constants
    in the backward pass.

    With u and q the directions of latent and code, and w the direction of u + q, a latent z becomes
    (z - 2 (z.w) w + 2 (z.u) q) |code| / |z|, which is the code up to rounding. The gradient passes through this linear
    map, so latents on different sides of a code move apart or together (arXiv 2410.06424, section 4). Codes get no
    gradient.
    """
    eps = 1e-6
    with torch.no_grad():
        length, target = (torch.linalg.vector_norm(x, dim=-1, keepdim=True) for x in (latents, codes))
        u, q = latents / (length + eps), codes / (target + eps)
        w, scale = F.normalize(u + q, dim=-1), target / (length + eps)
    along_w, along_u = ((latents * axis).sum(-1, keepdim=True) for axis in (w, u))
    return scale * (latents - 2 * along_w * w + 2 * along_u * q)


class ResidualQuantizer(nn.Module):
    """Quantize a latent in ``depth`` levels with one shared codebook; each level codes the residual of earlier ones.

    The residual starts at the detached latents: the encoder gets the straight-through gradient only, while the loss
    terms of later levels train the codes of earlier ones (the variant of enhancing-transformers).

    Raises:
        ValueError: a ``quantizer`` with clustering.
    """

    def __init__(self, quantizer: VectorQuantizer, depth: int):
        super().__init__()
        if quantizer.clustering is not None:
            raise ValueError("a residual quantizer cannot cluster its codes; restart_after moves those that are unused")
        self.quantizer, self.depth = quantizer, depth

    @property
    def codebook_size(self) -> int:
        return self.quantizer.codebook_size

    @property
    def loss_terms(self) -> tuple[str, ...]:
        return self.quantizer.loss_terms

    def _levels(self, latents: Tensor) -> Iterator[tuple[Tensor, QuantizerOutput]]:
        """Yield the residual (B, L, D) that each level codes, and what the quantizer makes of it."""
        residual = latents.detach()
        for _ in range(self.depth):
            level = self.quantizer.assign(residual, self.quantizer.distances(residual))
            yield residual, level
            residual = residual - self.quantizer.ids_to_latents(level.ids)

    def encode(self, latents: Tensor) -> Tensor:
        """Ids (..., depth) of latents (..., D)."""
        return torch.stack([level.ids for _, level in self._levels(latents)], -1)

    def ids_to_latents(self, ids: Tensor) -> Tensor:
        """Sums (..., D) of the codes of ids (..., n), n <= depth: fewer levels give a coarser latent."""
        return self.quantizer.ids_to_latents(ids).sum(-2)

    def _pass_gradient(self, latents: Tensor, codes: Tensor) -> Tensor:
        """Codes (..., D) with a gradient to the raw latents: sums of codes are not normalised either."""
        if self.quantizer.gradient == "rotation":
            return rotate_to(latents, codes)
        return latents + (codes - latents).detach()

    def forward(self, latents: Tensor, *, draws: Draws | None = None) -> QuantizerOutput:
        """Quantize latents (B, L, D); ids are (B, L, depth), losses the mean over levels."""
        residuals, levels = zip(*self._levels(latents))
        ids = torch.stack([level.ids for level in levels], -1)
        if self.training and self.quantizer.restart is not None:
            self.quantizer.restart(torch.stack(residuals, -2), ids)  # all levels at once: they share the codes
        losses = {name: torch.stack([level.losses[name] for level in levels]).mean(0) for name in levels[0].losses}
        quantized = self._pass_gradient(latents, self.ids_to_latents(ids))
        return QuantizerOutput(quantized, ids, losses, self.codebook_size)

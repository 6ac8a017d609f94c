"""An autoregressive prior for the training of a discrete tokenizer, so that its tokens become easy to predict.

LARP (arXiv 2410.21264, section 3.3), github.com/hywang66/LARP (MIT). The prior is a small GPT on continuous code
vectors. It is trained with the tokenizer, and not needed afterwards.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vistok.draws import Draws, Keys, inverse_cdf
from vistok.nn.attention import Attention
from vistok.nn.initialisation import xavier_uniform
from vistok.nn.mlp import MLP


class _Block(nn.Module):
    """Pre-norm GPT block with causal attention: (B, N, D) -> (B, N, D)."""

    def __init__(self, dim: int, num_heads: int, drop: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, num_heads, attn_drop=drop)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = MLP(dim, 4 * dim, F.gelu)
        self.dropout = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x), causal=True)
        return x + self.dropout(self.mlp(self.norm2(x)))


@dataclass
class Round:
    """One pass of the prior.

    Attributes:
        fed: (B, n, d), the input code vectors.
        predicted: (B, n, d), the predicted code vectors.
        logits: (B, n - 1, K), of the ids from position 1 on.
    """

    fed: Tensor
    predicted: Tensor
    logits: Tensor


@dataclass
class PriorOutput:
    """The prior's loss in nats per token, its accuracies in percent, and its rounds."""

    loss: Tensor
    top1: Tensor
    top5: Tensor
    rounds: list[Round]


class ARPrior(nn.Module):
    """Predicts each code vector from those before it, in rounds of scheduled sampling, and scores the ids.

    The input of round 1 is the true code vectors. In every later round, ids drawn from the logits of the round before
    replace those at the chosen positions; position 0 always keeps its true vector. The logits of position i >= 1 are
    the inner products of the prediction and all codes, divided by ``temperature``.

    Args:
        code_dim: channels d of a code vector.
        max_length: the longest sequence of tokens.
        num_layers, num_heads, dim: of the GPT.
        drop: dropout of its input, attention weights and feed-forward outputs.
        normalize: l2-normalises predictions, for codes that are normalised.
        temperature: of the logits.
        num_rounds: passes per step.
        mix_ratio: the largest share of positions that are replaced in later rounds.
        mix_until: progress of training, in [0, 1], until which that share grows linearly from 0.
        average_rounds: whether the loss is the mean over all rounds, or that of the last round.
        detach_early_rounds: whether only the last round gives gradients to the code vectors.

    Raises:
        ValueError: no rounds, or a share out of range.
    """

    def __init__(
        self,
        code_dim: int,
        max_length: int = 1024,
        num_layers: int = 12,
        num_heads: int = 6,
        dim: int = 384,
        drop: float = 0.1,
        normalize: bool = True,
        temperature: float = 1.0,
        num_rounds: int = 2,
        mix_ratio: float = 0.5,
        mix_until: float = 0.3,
        average_rounds: bool = True,
        detach_early_rounds: bool = False,
    ):
        super().__init__()
        if num_rounds < 1:
            raise ValueError(f"num_rounds must be at least 1, got {num_rounds}")
        for name, share in (("mix_ratio", mix_ratio), ("mix_until", mix_until)):
            if not 0 <= share <= 1:
                raise ValueError(f"{name} must lie in [0, 1], got {share}")
        self.code_dim, self.max_length = code_dim, max_length
        self.normalize, self.temperature = normalize, temperature
        self.num_rounds, self.mix_ratio, self.mix_until = num_rounds, mix_ratio, mix_until
        self.average_rounds, self.detach_early_rounds = average_rounds, detach_early_rounds
        self.input = nn.Linear(code_dim, dim)
        self.positions = nn.Parameter(torch.randn(max_length, dim) * 0.02)
        self.dropout = nn.Dropout(drop)
        self.blocks = nn.Sequential(*(_Block(dim, num_heads, drop) for _ in range(num_layers)))
        self.norm = nn.LayerNorm(dim)
        self.output = nn.Linear(dim, code_dim)
        self.apply(xavier_uniform)

    def replaced_share(self, progress: float) -> float:
        """The share of positions that are replaced in later rounds, at ``progress`` in [0, 1] of training."""
        return self.mix_ratio * min(progress / self.mix_until, 1.0) if self.mix_until else self.mix_ratio

    def training_draws(self, keys: Keys, length: int) -> Draws:
        """The random numbers that ``forward`` consumes for sequences of ``length`` tokens: they choose the positions
        to replace, and the new ids."""
        return {
            "prior mix": keys.uniform("prior mix", length - 1),
            "prior ids": keys.uniform("prior ids", self.num_rounds - 1, length - 1),
        }

    def predict(self, fed: Tensor) -> Tensor:
        """Predict each code vector of ``fed`` (B, n, d) from those before it; returns (B, n, d).

        The first one has none before it, and is returned unchanged. With ``normalize`` all are l2-normalised.

        Raises:
            ValueError: more tokens than ``max_length``.
        """
        if fed.shape[1] > self.max_length:
            raise ValueError(f"the prior knows {self.max_length} positions, got {fed.shape[1]} tokens")
        x = self.input(fed[:, :-1])  # (B, n - 1, D)
        x = self.blocks(self.dropout(x + self.positions[: x.shape[1]]))
        predicted = torch.cat([fed[:, :1], self.output(self.norm(x)).to(fed.dtype)], 1)
        return F.normalize(predicted, dim=-1) if self.normalize else predicted

    def forward(self, quantized: Tensor, ids: Tensor, codes: Tensor, *, progress: float, draws: Draws) -> PriorOutput:
        """Score a batch of tokens.

        Args:
            quantized: (B, n, d) straight-through code vectors, which carry gradients to the tokenizer.
            ids: (B, n) their ids.
            codes: (K, d) all code vectors, which get no gradient.
            progress: of training, in [0, 1].
            draws: from ``training_draws``.
        """
        uniforms = draws["prior ids"].to(quantized.device)

        def draw(index: int, logits: Tensor) -> Tensor:
            probabilities = logits.detach().float().softmax(-1)
            chosen = inverse_cdf(probabilities.flatten(0, 1), uniforms[:, index].flatten())
            return chosen.view(logits.shape[:2])

        replaced = draws["prior mix"].to(quantized.device) < self.replaced_share(progress)
        return self.score(ids, self.rounds(quantized, codes, replaced=replaced, draw=draw))

    def rounds(
        self, quantized: Tensor, codes: Tensor, *, replaced: Tensor, draw: Callable[[int, Tensor], Tensor]
    ) -> list[Round]:
        """All passes over ``quantized`` (B, n, d).

        Args:
            replaced: (B, n - 1) bool, the positions from 1 on that are replaced in later rounds.
            draw: from the number of the round before, counted from 0, and its logits (B, n - 1, K) to new ids
                (B, n - 1).
        """
        codes = codes.detach().to(quantized.dtype)
        fed, rounds = quantized, list[Round]()
        for index in range(self.num_rounds):
            if rounds:
                drawn = codes[draw(index - 1, rounds[-1].logits)]  # (B, n - 1, d)
                mixed = torch.where(replaced[..., None], drawn, quantized[:, 1:])
                fed = torch.cat([quantized[:, :1], mixed], 1)
            early = index < self.num_rounds - 1
            predicted = self.predict(fed.detach() if early and self.detach_early_rounds else fed)
            logits = predicted[:, 1:] @ codes.T / self.temperature
            rounds.append(Round(fed, predicted, logits))
        return rounds

    def score(self, ids: Tensor, rounds: list[Round]) -> PriorOutput:
        """The cross entropy of ids (B, n) from position 1 on, over all rounds or the last one (``average_rounds``), and
        the accuracies of the first of these rounds."""
        counted = rounds if self.average_rounds else rounds[-1:]
        target = ids[:, 1:]
        losses = [F.cross_entropy(one.logits.float().transpose(1, 2), target) for one in counted]
        best = counted[0].logits.detach().topk(min(5, counted[0].logits.shape[-1]), dim=-1).indices
        hits = best == target[..., None]  # (B, n - 1, 5), likeliest first
        top1, top5 = (100 * hits[..., :k].any(-1).float().mean() for k in (1, 5))
        return PriorOutput(torch.stack(losses).mean(), top1, top5, rounds)

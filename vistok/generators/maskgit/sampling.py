"""Sampling of masked generators: draw all masked tokens, keep the most confident ones, and repeat."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from vistok.draws import Draws
from vistok.generators.engine.sampling import inverse_cdf_ids
from vistok.guidance import GuidanceOptions, ScheduleName
from vistok.types import Condition, TokenChunk, TokenSpec
from vistok.utils.finite import FirstFailure
from vistok.utils.steps import check_steps


class MaskGITLike(Protocol):
    """What a session needs of MaskGIT; see there."""

    spec: TokenSpec
    output: nn.Linear
    mask_id: int

    def class_rows(self, condition: Condition) -> Tensor: ...

    def predict(self, ids: Tensor, classes: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class MaskGITOptions(GuidanceOptions):
    """How images are sampled.

    Attributes:
        num_steps: forward passes of an image.
        temperature: T of ids and of their confidence. Step k of S (from 0) draws an id from softmax(logits / t); the
            confidence is its logit plus t times Gumbel noise. t = T (1 - (k + 1) / S), so the last step takes the
            likeliest ids.

    The others are those of ``GuidanceOptions``: guidance combines logits, and its step is a forward pass.

    Raises:
        ValueError: a value out of its range or not finite.
    """

    num_steps: int = 8
    temperature: float = 9.5
    guidance_schedule: ScheduleName = "linear-done"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_steps("num_steps", self.num_steps)
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature must be finite and not negative, got {self.temperature}")

    def temperature_at(self, step: int) -> float:
        """The temperature of a step."""
        return self.temperature * (1 - (step + 1) / self.num_steps)


def masked_share(progress: float) -> float:
    """The share of the tokens that is still masked at ``progress`` in [0, 1]: MaskGIT's arccos schedule, 1 to 0."""
    return math.acos(progress) / (math.pi / 2)


class MaskGITSession:
    """One sampling run. The model's batch holds all rows of guidance.

    ``append`` may set known tokens anywhere; the drawn tokens see all of them.
    """

    @torch.no_grad()
    def __init__(self, model: MaskGITLike, condition: Condition, options: MaskGITOptions, draws: Draws | None):
        device = model.output.weight.device
        condition = condition.to(device)
        self.model, self.options, self._guidance = model, options, options.guidance
        rows = self._guidance.conditions(condition)
        self._classes = model.class_rows(rows)
        self._failure = FirstFailure("logits", model.output.weight.dtype)
        self._draws = {name: value.to(device) for name, value in (draws or {}).items()}
        shape = (len(condition), model.spec.length)
        self._ids = torch.full(shape, model.mask_id, dtype=torch.int64, device=device)
        self._places = torch.arange(shape[1], device=device).expand(shape)

    @property
    def _masked(self) -> Tensor:
        return self._ids == self.model.mask_id

    @property
    def tokens(self) -> Tensor:
        """(B, L) ids, 0 where none is set yet."""
        return self._ids.masked_fill(self._masked, 0)

    def append(self, tokens: Tensor, positions: Tensor | None = None) -> None:
        """Set known tokens.

        Args:
            tokens: (B, n) ids.
            positions: (n,) or (B, n), their places; None puts them at the first unknown ones of each row.

        Raises:
            ValueError: ids of another tokenizer, or positions that are out of range, set already, or listed twice.
        """
        ids = self.model.spec.check_ids(tokens).to(self._ids.device)
        if len(ids) != len(self._ids):
            raise ValueError(f"the session has {len(self._ids)} rows, the tokens {len(ids)}")
        masked, count, length = self._masked, ids.shape[1], self._ids.shape[1]
        if positions is None:
            if count > int(masked.sum(1).min()):
                raise ValueError(f"{count} tokens are more than the {int(masked.sum(1).min())} that are left")
            positions = masked.int().sort(dim=1, descending=True, stable=True).indices[:, :count]
        positions = positions.to(self._ids.device).expand(ids.shape)
        if positions.numel() and not 0 <= int(positions.min()) <= int(positions.max()) < length:
            low, high = int(positions.min()), int(positions.max())
            raise ValueError(f"positions must lie in 0..{length - 1}, got {low}..{high}")
        times = torch.zeros_like(self._ids).scatter_add(1, positions, torch.ones_like(positions))
        if bool((times > 1).any()) or bool(((times > 0) & ~masked).any()):
            raise ValueError("some of these positions are listed twice or set already; set ones stay as they are")
        self._ids = self._ids.scatter(1, positions, ids)

    def keep(self, tokens: Tensor, where: Tensor) -> None:
        """Set the tokens (B, L) as known where ``where`` (B, L) is True; rows may differ."""
        tokens, where = tokens.to(self._ids.device), where.to(self._ids.device)
        self._ids = torch.where(where, tokens, self._ids)

    @torch.no_grad()
    def generate(self, num_tokens: int | None = None) -> Iterator[TokenChunk]:
        """Draw the next ``num_tokens`` tokens of each row (all if None) in ``num_steps`` steps, one chunk per step.

        Raises:
            ValueError: a row has fewer unknown tokens.
        """
        left = self._masked.sum(1)  # (B,)
        if num_tokens is not None and num_tokens > int(left.min()):
            raise ValueError(f"num_tokens {num_tokens} exceeds the {int(left.min())} positions left")
        count = left if num_tokens is None else torch.full_like(left, num_tokens)
        end, steps = left - count, self.options.num_steps
        for step in range(steps):
            planned = (count * masked_share((step + 1) / steps)).floor().long()
            # As in MaskGIT, every step settles at least one token, unless only one is left for the last step.
            remaining = torch.minimum(left - 1 - end, planned).clamp_min(1) if step < steps - 1 else left * 0
            left = end + remaining
            yield self._step(step, left)
        self._failure.check()

    def _step(self, step: int, left: Tensor) -> TokenChunk:
        """Draw all masked tokens and settle the most confident ones, so that ``left`` (B,) remain."""
        masked, temperature = self._masked, self.options.temperature_at(step)
        logits = self._logits(step)
        ids = inverse_cdf_ids(logits / temperature, self._draws["ids"][:, step]) if temperature else logits.argmax(-1)
        confidence = logits.gather(-1, ids[..., None]).squeeze(-1)
        if temperature:
            tiny = torch.finfo(torch.float32).tiny
            confidence = confidence - temperature * (-self._draws["confidence"][:, step].clamp_min(tiny).log()).log()
        order = confidence.masked_fill(~masked, torch.inf).argsort(1)  # least confident first, known ones last
        rank = torch.zeros_like(order).scatter(1, order, self._places)
        settled = masked & (rank >= left[:, None])
        self._ids = torch.where(settled, ids, self._ids)
        return TokenChunk(self._places, self._ids.masked_fill(~settled, 0), settled)

    def _logits(self, step: int) -> Tensor:
        """Guided logits (B, L, V), float32."""
        logits = self.model.predict(self._guidance.repeat(self._ids), self._classes)
        logits = self._guidance.combine(logits, self._guidance.weights(step, self.options.num_steps))
        self._failure.note(logits)
        return logits

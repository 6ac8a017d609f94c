"""Sampling of MAR: the tokens of each iteration, and how they are drawn."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from vistok.draws import Draws
from vistok.flow.diffusion import GaussianDiffusion, even_timesteps, strided_timesteps
from vistok.generators.engine.plan import check_orders
from vistok.guidance import GuidanceOptions, ScheduleName
from vistok.nn.diffusion_head import DiffusionHead
from vistok.types import Condition, TokenChunk, TokenSpec
from vistok.utils.finite import FirstFailure
from vistok.utils.steps import check_steps

NUM_TIMESTEPS = 1000
"""Noise levels of the diffusion that the head is trained with."""


class MARLike(Protocol):
    """What a session needs of MAR; see there."""

    spec: TokenSpec
    diffusion: GaussianDiffusion
    head: DiffusionHead
    input: nn.Linear
    members: Tensor
    length: int
    token_dim: int

    def group(self, tokens: Tensor) -> Tensor: ...

    def ungroup(self, tokens: Tensor) -> Tensor: ...

    def embed_classes(self, condition: Condition) -> Tensor: ...

    def encode(self, tokens: Tensor, visible: Tensor, classes: Tensor) -> Tensor: ...

    def decode(self, encoded: Tensor, visible: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class MAROptions(GuidanceOptions):
    """How images are sampled.

    Attributes:
        num_iter: iterations in which the tokens of an image are drawn, few at first and ever more (MaskGIT's cosine
            schedule, arXiv 2202.04200).
        num_steps: denoising steps of a token.
        step_spacing: ``even`` spreads the steps over all timesteps, both ends included, as the released models are
            sampled; ``stride`` takes every k-th, from the first on. At the last timestep almost nothing is left of the
            data, so with ``even`` the first step magnifies an error of the predicted noise about 32,000 / num_steps
            times (1,300 times with 25 steps), and nothing is clipped. Only long training makes the error small enough.
            Before that, only ``stride`` gives images: its first step magnifies an error 1.5 times.
        temperature: factor of the noise that denoising steps add.
        guidance_schedule: ``linear`` rises with the share of the image that is known.

    The others are those of ``GuidanceOptions``: guidance combines the predicted noise, and its step is a token. The
    tokens of one iteration share the scale of its last token.

    Raises:
        ValueError: a value out of its range, or fewer steps than denoising needs.
    """

    num_iter: int = 64
    num_steps: int = 100
    step_spacing: Literal["even", "stride"] = "even"
    temperature: float = 1.0
    guidance_schedule: ScheduleName = "linear"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_steps("num_iter", self.num_iter)
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature must be finite and not negative, got {self.temperature}")
        if self.step_spacing not in ("even", "stride"):
            raise ValueError(f"step_spacing must be 'even' or 'stride', got {self.step_spacing!r}")
        self.respace(NUM_TIMESTEPS)

    def respace(self, num_timesteps: int) -> list[int]:
        """The timesteps that denoising visits."""
        spread = even_timesteps if self.step_spacing == "even" else strided_timesteps
        return spread(num_timesteps, self.num_steps)


def masks_left(count: int, num_iter: int) -> list[int]:
    """How many of ``count`` tokens are left to be drawn after each iteration.

    An iteration draws at least one token, but none if only one is left for the last iteration.
    """
    left, remaining = [], count
    for iteration in range(1, num_iter):
        planned = math.floor(count * math.cos(math.pi / 2 * iteration / num_iter))
        remaining = max(1, min(remaining - 1, planned))
        left.append(remaining)
    return [*left, 0]


class MARSession:
    """One sampling run. The model's batch holds all rows of guidance.

    Each sample is drawn in its own random order. ``append`` may set known tokens anywhere; the drawn tokens see all of
    them.
    """

    @torch.no_grad()
    def __init__(self, model: MARLike, condition: Condition, options: MAROptions, draws: Draws):
        weight = model.input.weight
        self.model, self.options, self._guidance = model, options, options.guidance
        rows = self._guidance.conditions(condition)
        self._diffusion = model.diffusion.respaced(options.respace(len(model.diffusion)))
        self._classes = model.embed_classes(rows.to(weight.device))
        self._noise = draws["noise"].to(weight)
        # The positions, drawn from the end of this order to its start; those from `_left` on are known.
        if "order" not in draws:
            raise ValueError("there are no draws 'order': pass sampling_draws(Keys.range(seed, B), options)")
        self._order = check_orders(draws["order"], model.length, len(condition)).to(weight.device)
        self._left = model.length
        self._grouped = weight.new_zeros(len(condition), model.length, model.token_dim)

    @property
    def tokens(self) -> Tensor:
        """(B, L, D) latents in raster order, zero where none is set yet."""
        latents = self.model.ungroup(self._grouped)
        return latents[:, self.model.members.flatten().argsort()]

    def append(self, tokens: Tensor, positions: Tensor | None = None) -> None:
        """Set known tokens.

        Args:
            tokens: (B, n, D) latents.
            positions: (n,) or (B, n), their raster positions; None puts them at the first unknown ones, which must be
                the same in all rows.

        Raises:
            ValueError: latents of another tokenizer, positions that are out of range, known, or listed twice, or that
                are not all latents of a patch of the model.
        """
        model = self.model
        model.spec.check_latents(tokens)
        if len(tokens) != len(self._grouped):
            raise ValueError(f"the session has {len(self._grouped)} rows, the tokens {len(tokens)}")
        positions = self._first_unknown(tokens.shape[1]) if positions is None else positions.to(self._order.device)
        if positions.shape[-1] != tokens.shape[1]:
            raise ValueError(f"there are {tokens.shape[1]} tokens for {positions.shape[-1]} positions")
        positions = positions.expand(len(tokens), -1)
        given = self._patches_at(positions)
        latents = self.tokens.scatter(1, positions[..., None].expand_as(tokens), tokens.to(self._grouped))
        self._grouped = model.group(latents)
        # A stable sort moves the known tokens to the end and keeps the random order of the unknown ones.
        settled = (given | self._known()).gather(1, self._order)
        self._order = self._order.gather(1, settled.int().sort(dim=1, stable=True).indices)
        self._left -= int(given[0].sum())

    def _known(self) -> Tensor:
        """(B, L) bool, of the model's tokens."""
        known = torch.zeros_like(self._order, dtype=torch.bool)
        return known.scatter(1, self._order[:, self._left :], True)

    def _patches_at(self, positions: Tensor) -> Tensor:
        """(B, L) bool, the model's tokens at raster positions (B, n); ValueError if these cannot be set."""
        members, length = self.model.members, self.model.spec.length
        if positions.numel() and not 0 <= int(positions.min()) <= int(positions.max()) < length:
            low, high = int(positions.min()), int(positions.max())
            raise ValueError(f"positions must lie in 0..{length - 1}, got {low}..{high}")
        times = torch.zeros(len(positions), length, dtype=torch.int64, device=positions.device)
        times = times.scatter_add(1, positions, torch.ones_like(positions))[:, members]  # (B, L, p^2)
        given = (times == 1).all(-1)
        if bool(((times > 0).any(-1) & ~given).any()):
            raise ValueError(
                f"every position must be given once, and all {members.shape[1]} of one of the model's patches together"
            )
        if bool((given & self._known()).any()):
            raise ValueError("some of these positions are set already; they stay as they are")
        return given

    def _first_unknown(self, count: int) -> Tensor:
        unknown = self._order[:, : self._left].sort(1).values
        if count % self.model.members.shape[1] or count > self._left * self.model.members.shape[1]:
            raise ValueError(
                f"{count} tokens are not a number of whole patches of {self.model.members.shape[1]}, or more than the "
                f"{self._left * self.model.members.shape[1]} that are left"
            )
        if bool((unknown != unknown[:1]).any()):
            raise ValueError("the rows know different positions; say where the tokens belong with positions=…")
        return self.model.members[unknown[0, : count // self.model.members.shape[1]]].flatten()

    @torch.no_grad()
    def generate(self, num_tokens: int | None = None) -> Iterator[TokenChunk]:
        """Draw the next ``num_tokens`` latents in ``num_iter`` iterations, one chunk per iteration.

        Raises:
            ValueError: num_tokens exceeds what is left, or is not a number of whole patches; latents that are not
                finite.
        """
        size = self.model.members.shape[1]
        count = self._left if num_tokens is None else num_tokens // size
        if count > self._left or (num_tokens is not None and num_tokens % size):
            raise ValueError(f"num_tokens must be a multiple of {size} up to {self._left * size}, got {num_tokens}")
        end, failure = self._left - count, FirstFailure("latents", self.model.input.weight.dtype)
        for left in masks_left(count, self.options.num_iter) if count else ():
            chosen = self._order[:, end + left : self._left]
            if not chosen.shape[1]:
                continue
            # The last iteration is guided as if one token were left, as in the reference. The number of known tokens
            # takes count + 1 values.
            drawn = self._draw(chosen, self._guidance.weights(count - max(left, 1), count + 1))
            self._grouped = self._grouped.scatter(1, chosen[..., None].expand_as(drawn), drawn)
            self._left = end + left
            positions = self.model.members[chosen].flatten(1)
            latents = self.model.ungroup(drawn)
            failure.note(latents, positions)
            yield TokenChunk(positions, latents, torch.ones_like(positions, dtype=torch.bool))
        failure.check()

    def _draw(self, chosen: Tensor, weights: Sequence[float]) -> Tensor:
        """New tokens (B, n, d) at positions (B, n)."""
        model, guidance = self.model, self._guidance
        visible = guidance.repeat(self._order[:, self._left :].sort(1).values)
        z = model.decode(model.encode(guidance.repeat(self._grouped), visible, self._classes), visible)
        rows = guidance.repeat(chosen)
        condition = model.head.condition(z.gather(1, rows[..., None].expand(-1, -1, z.shape[2]))).flatten(0, 1)

        combine = guidance.start()

        def network(x: Tensor, t: int) -> Tensor:
            output = model.head(guidance.repeat(x), torch.full((1,), t, device=x.device), condition)
            eps, variance = output.chunk(2, -1)
            return torch.cat([combine(eps, weights), guidance.conditional(variance)], -1)

        noise = self._noise.gather(2, chosen[:, None, :, None].expand(-1, self._noise.shape[1], -1, model.token_dim))
        first, *others = (step.flatten(0, 1) for step in noise.unbind(1))
        for state in self._diffusion.ancestral(network, first, others, temperature=self.options.temperature):
            x = state.x
        return x.view(*chosen.shape, -1)

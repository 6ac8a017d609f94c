"""Sampling of xAR: a solver for one entity after another, with a cache of the finished ones."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from vistok.draws import Draws
from vistok.flow import FlowState, LinearPath, euler, euler_maruyama, guided, stochastic_times
from vistok.flow.solvers import VelocityField
from vistok.generators.engine.cache import KVCache
from vistok.generators.xar.layouts import EntityLayout
from vistok.guidance import GuidanceOptions, ScheduleName
from vistok.types import Condition, TokenChunk, TokenSpec
from vistok.utils.finite import FirstFailure

PATH = LinearPath(noise_at=1)


class EntityModel(Protocol):
    """What a session needs of XAR; see there."""

    spec: TokenSpec
    layout: EntityLayout
    class_embedding: nn.Embedding
    output: nn.Linear

    def class_rows(self, condition: Condition) -> Tensor: ...

    def new_cache(self, rows: int) -> KVCache: ...

    def transform(
        self, noisy: Tensor, times: Tensor, classes: Tensor, entities: range, cache: KVCache | None
    ) -> Tensor: ...


@dataclass(frozen=True)
class XAROptions(GuidanceOptions):
    """How entities are sampled.

    Attributes:
        num_steps: network calls per entity.
        solver: ``euler_maruyama`` solves the reverse SDE and ends without noise; ``euler`` the ODE.
        guidance_schedule: ``linear`` leaves the first entity unguided and gives the last one the whole scale. An image
            that is one entity has the whole scale.
        context_noise: the noise level, in [0, 1), of finished entities as the context of later ones.

    The others are those of ``GuidanceOptions``: guidance combines velocities, and its step is an entity.

    Raises:
        ValueError: a value out of its range, or fewer steps than the solver needs.
    """

    num_steps: int = 50
    solver: Literal["euler_maruyama", "euler"] = "euler_maruyama"
    context_noise: float = 0.0
    guidance_schedule: ScheduleName = "linear"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.solver not in ("euler_maruyama", "euler"):
            raise ValueError(f"solver must be 'euler_maruyama' or 'euler', got {self.solver!r}")
        if not 0 <= self.context_noise < 1:
            raise ValueError(f"context_noise must lie in [0, 1), got {self.context_noise}")
        self.times()

    def times(self) -> list[float]:
        """The times that the solver visits, from 1 to 0."""
        return stochastic_times(self.num_steps) if self.solver == "euler_maruyama" else PATH.times(self.num_steps)

    def solve(self, velocity: VelocityField, x: Tensor, noise: Tensor | None) -> Iterator[FlowState]:
        """Solve from noise x (B, n, D) to data; ``noise`` (B, num_steps - 1, n, D) is for the stochastic solver."""
        if self.solver == "euler":
            return euler(velocity, x, self.times())
        if noise is None:
            raise ValueError("the stochastic solver needs noise")
        return euler_maruyama(velocity, x, self.times(), noise.unbind(1))


class XARSession:
    """Cached sampling: finished entities are computed once, and only the noisy one at every step.

    The model's batch holds all rows of guidance, except for a first entity that is not guided.

    Attributes:
        entity: the number of finished entities.
    """

    @torch.no_grad()
    def __init__(self, model: EntityModel, condition: Condition, options: XAROptions, draws: Draws):
        weight = model.output.weight
        condition = condition.to(weight.device)
        self.model, self.layout, self.options = model, model.layout, options
        self.draws = {name: value.to(weight.device) for name, value in draws.items()}
        self._guidance = options.guidance
        rows = self._guidance.conditions(condition)
        self._classes = model.class_embedding(model.class_rows(rows))  # (R, D')
        self._cache = model.new_cache(len(rows))
        self._cached = 0  # how many finished entities are in the cache
        self._sequence = weight.new_zeros(len(condition), self.layout.length, model.spec.dim)
        self.entity = 0

    @property
    def tokens(self) -> Tensor:
        """(B, L, D) latents in raster order, zero where they are not generated yet."""
        return self.layout.to_raster(self._sequence)

    def append(self, tokens: Tensor) -> None:
        """Force the next entities: latents (B, n, D) in the layout's order.

        Raises:
            ValueError: latents of another tokenizer, another batch size, or not whole entities.
        """
        self.model.spec.check_latents(tokens)
        if len(tokens) != len(self._sequence):
            raise ValueError(f"the session has {len(self._sequence)} rows, the tokens {len(tokens)}")
        stop = self._stop(tokens.shape[1])
        self._sequence[:, self.layout.bounds[self.entity] : self.layout.bounds[stop]] = tokens.to(self._sequence)
        self.entity = stop

    @torch.no_grad()
    def generate(self, num_tokens: int | None = None) -> Iterator[TokenChunk]:
        """Generate the next ``num_tokens`` positions of the sequence, one chunk per entity.

        The coarse scales of a pyramid are no tokens and yield nothing.

        Raises:
            ValueError: num_tokens does not end with an entity; latents that are not finite.
        """
        entities = range(self.entity, self._stop(num_tokens))
        # All copied before the first step: a copy to a device synchronises with it.
        raster = [self.layout.raster_positions(entity).to(self._sequence.device) for entity in entities]
        failure = FirstFailure("latents", self._sequence.dtype)
        for entity, positions in zip(entities, raster):
            here = slice(self.layout.bounds[entity], self.layout.bounds[entity + 1])
            self._sequence[:, here] = self._solve(entity, here).to(self._sequence)
            places = positions.expand(len(self._sequence), -1) if len(positions) else None  # coarse scales have none
            failure.note(self._sequence[:, here], places)
            self.entity = entity + 1
            if len(positions):
                shape = (len(self._sequence), len(positions))
                valid = torch.ones(shape, dtype=torch.bool, device=positions.device)
                yield TokenChunk(positions.expand(shape), self._sequence[:, here], valid)
        failure.check()

    def _stop(self, num_tokens: int | None) -> int:
        """The entity before which the next ``num_tokens`` positions end."""
        if num_tokens is None:
            return self.layout.num_entities
        bounds = self.layout.bounds
        if bounds[self.entity] + num_tokens not in bounds[self.entity :]:
            sizes = self.layout.sizes[self.entity :]
            raise ValueError(f"{num_tokens} tokens are not a number of whole entities; the next ones have {sizes}")
        return bounds.index(bounds[self.entity] + num_tokens)

    def _solve(self, entity: int, here: slice) -> Tensor:
        """The entity's latents (B, n, D) in the solver's precision."""
        guidance = self._guidance.at(entity, self.layout.num_entities)
        field = self._velocity_field(entity)
        # An unguided first entity skips the other rows: their weight is 0, and nothing of them is cached.
        if entity or any(guidance.weights(0, 1)[1:]):
            field = guided(field, guidance)
        # The state is float64, because it is the sum of many small steps.
        precise = torch.float32 if self._sequence.device.type == "mps" else torch.float64
        noise = self.draws["noise"][:, here].to(precise)
        steps = self.draws["steps"][:, :, here].to(precise) if self.options.solver == "euler_maruyama" else None
        for state in self.options.solve(field, noise, steps):
            x = state.x
        return x

    def _velocity_field(self, entity: int) -> VelocityField:
        """The field of the noisy entity in the context of the finished ones, x (R, n, D) -> (R, n, D).

        The first call feeds the finished entities that the cache lacks along with the noisy one.
        """

        def velocity(x: Tensor, t: float) -> Tensor:
            noisy = x.to(self._sequence)
            if entity == 0:  # no cache: there is no context yet, and an unguided entity has fewer rows than the cache
                return self._transform(noisy, t, range(1), None).to(x)
            if self._cached < entity:
                context = self._context(range(self._cached, entity))
                noisy = torch.cat([context.repeat(len(noisy) // len(context), 1, 1), noisy], 1)
            out = self._transform(noisy, t, range(self._cached, entity + 1), self._cache)
            self._cache.truncate(self.layout.bounds[entity])
            self._cached = entity
            return out[:, -x.shape[1] :].to(x)

        return velocity

    def _transform(self, noisy: Tensor, t: float, entities: range, cache: KVCache | None) -> Tensor:
        """The velocities of consecutive entities: the last at time t, the finished others at ``context_noise``."""
        levels = torch.full((len(noisy), len(entities)), self.options.context_noise, device=noisy.device)
        levels[:, -1].fill_(t)
        return self.model.transform(noisy, levels, self._classes[: len(noisy)], entities, cache)

    def _context(self, entities: range) -> Tensor:
        """Finished entities (B, n, D) at the noise level ``context_noise``."""
        here = slice(self.layout.bounds[entities.start], self.layout.bounds[entities.stop])
        level, finished = self.options.context_noise, self._sequence[:, here]
        return PATH.interpolate(finished, self.draws["context"][:, here].to(finished), level) if level else finished

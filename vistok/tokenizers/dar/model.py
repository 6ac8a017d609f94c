"""D-AR's tokenizer: groups of ordered ids, each of which drives one step of a flow model in pixel space.

Paper: D-AR: Diffusion via Autoregressive Models (Gao & Shou, arXiv 2505.23660, ICLR 2026). Official weights and
conventions: github.com/showlab/D-AR. As ids are generated in order, each complete group allows further flow steps; the
straight line from there to the data end of the path is a preview.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, Literal, Self

import torch
from einops import rearrange
from torch import Tensor, nn

from vistok.checkpoints import OfficialCheckpoint
from vistok.draws import Draws, Keys
from vistok.flow import SOLVERS, LinearPath, shift_time
from vistok.nn.alignment import AlignmentConfig
from vistok.nn.containers import ModuleList
from vistok.nn.masks import prefix_causal_mask
from vistok.quantizers import VectorQuantizer
from vistok.quantizers.named import chosen_quantizer
from vistok.quantizers.scaled import spec_of
from vistok.tokenizers.base import Tokenizer
from vistok.tokenizers.dar import official
from vistok.tokenizers.dar.networks import (
    ROPE_BASE,
    DARBlock,
    GridPositions,
    GridRotation,
    VelocityConfig,
    VelocityNetwork,
    plain_norm,
)
from vistok.types import Clock, Condition, TokenizerOutput, TokenSpec, as_dataclass
from vistok.utils.processes import share_of_group
from vistok.utils.sides import image_sides, times

PATH = LinearPath(noise_at=0)
VELOCITY = VelocityConfig()
Solver = Literal["adams_bashforth2", "euler"]


class DAR(Tokenizer):
    """Images to ordered ids; any prefix of whole groups decodes.

    Args:
        image_size: side of the images, or (height, width); other multiples of the patch sizes work too.
        in_channels: 3, or 1 for grey images.
        encoder_patch_size: side of the encoder's patches.
        encoder_dim, num_encoder_layers: width and blocks of the query encoder; widths are multiples of 64.
        decoder_dim, num_decoder_layers: width and blocks of the causal layers between codes and velocity network.
        codebook_size, codebook_embed_dim: number and channels of the l2-normalised codes.
        codebook_restart_after: see ``VectorQuantizer``.
        entropy_temperature: softmax temperature of the "entropy" loss term; None leaves the term out.
        num_tokens: ids N of an image.
        num_groups, group_size: the G groups of Q ids; group i conditions times around i / G. It begins at token
            i N / G, but not later than N - Q. Neighbouring groups share tokens if Q is more than N / G.
        query_rank: rank of the factorised table of queries; None learns the queries at full width.
        max_tokens: rows of the tables of queries and of token embeddings; the first N are used.
        rope_base: of the encoder's rotary positions.
        gate_init: initial gates of the blocks of encoder and causal layers. With 0, as in the paper, tokens do not
            depend on the image at first; 1 suits short runs.
        position_std: standard deviation of the initial positions of tokens. With 0.02, as in the paper, tokens hardly
            differ for the causal layers at first; 0.5 suits short runs.
        absolute_positions: add learned positions to the patches of encoder and velocity network. Released models have
            none: in the velocity network a patch's position only rotates its queries over the tokens of a group. A
            single token looks the same from every position, so groups of one token need this option. With it, the
            encoder also learns sooner what lies where.
        velocity: the velocity network.
        data_std: factor on the pixels, which brings them to the scale of the noise.
        time_shift: sampling and training times t become t / (t + time_shift (1 - t)).
        num_steps, solver: defaults of ``decode``.
        alignment: head for the "repa" loss, on the input of block ``layer`` (counted from 0) of the velocity network.
            Defaults: layer 8, 768 channels as in DINOv2-B, 2,048 hidden channels. None has no head.
        quantizer: config of another quantizer, {name, …its arguments}, see ``build_quantizer``. Its codes have
            ``codebook_embed_dim`` channels; other arguments of the codebook then have no effect.
            Multi-scale quantizers are refused: their ids form no groups.

    Raises:
        ValueError: sizes that do not divide, or a multi-scale quantizer.
    """

    registry_name = "dar"
    encoding_parts = ("to_patches.*", "queries.*", "query_proj.*", *Tokenizer.encoding_parts)
    tiny = {
        "image_size": 16,
        "encoder_patch_size": 8,
        "encoder_dim": 64,
        "num_encoder_layers": 1,
        "decoder_dim": 64,
        "num_decoder_layers": 1,
        "codebook_size": 32,
        "codebook_embed_dim": 4,
        "num_tokens": 8,
        "num_groups": 4,
        "group_size": 2,
        "max_tokens": 8,
        "velocity": {"dim": 64, "num_layers": 1, "patch_size": 8},
        "num_steps": 4,
    }
    sizes = {"v1": {}}
    checkpoints = (OfficialCheckpoint("showlab/D-AR", "D-AR-tokenizer_v1.pt", official.V1),)

    def __init__(
        self,
        image_size: int | tuple[int, int] = 256,
        in_channels: int = 3,
        encoder_patch_size: int = 16,
        encoder_dim: int = 768,
        num_encoder_layers: int = 8,
        decoder_dim: int = 768,
        num_decoder_layers: int = 8,
        codebook_size: int = 16384,
        codebook_embed_dim: int = 8,
        codebook_restart_after: int = 0,
        entropy_temperature: float | None = None,
        num_tokens: int = 256,
        num_groups: int = 8,
        group_size: int = 32,
        query_rank: int | None = 8,
        max_tokens: int = 1024,
        rope_base: float = ROPE_BASE,
        gate_init: float = 0.0,
        position_std: float = 0.02,
        absolute_positions: bool = False,
        velocity: VelocityConfig = VELOCITY,
        data_std: float = 0.6,
        time_shift: float = 2.0,
        num_steps: int = 8,
        solver: Solver = "adams_bashforth2",
        alignment: AlignmentConfig | None = None,
        quantizer: dict[str, Any] | None = None,
    ):
        super().__init__()
        velocity = as_dataclass(VelocityConfig, velocity)
        height, width = image_sides(image_size)
        self._input_shape = (in_channels, height, width)
        if not 1 <= group_size <= num_tokens <= max_tokens:
            raise ValueError(
                f"group_size {group_size} must be at least 1, at most num_tokens {num_tokens}, and that at most "
                f"max_tokens {max_tokens}"
            )
        # The smallest step of at least one group of which the whole sequence is a multiple.
        step = next(size for size in range(group_size, num_tokens + 1) if num_tokens % size == 0)
        self._spec = TokenSpec(num_tokens, codebook_size, codebook_embed_dim, prefix_step=step)
        self.encoder_patch, self.velocity_patch = encoder_patch_size, velocity.patch_size
        self.spec_for(self._input_shape)  # refuses sides that do not divide
        self.num_groups, self.group_size = num_groups, group_size
        self.data_std, self.time_shift = data_std, time_shift
        self.num_steps, self.solver = num_steps, solver

        self.to_patches = nn.Conv2d(in_channels, encoder_dim, encoder_patch_size, encoder_patch_size)
        self.queries = nn.Embedding(max_tokens, query_rank or encoder_dim)
        self.query_proj = nn.Linear(query_rank, encoder_dim) if query_rank else nn.Identity()
        nn.init.trunc_normal_(self.queries.weight, std=1.0 if query_rank else 0.02)
        self.encoder_rotation = GridRotation(
            self._grid((height, width), encoder_patch_size), num_tokens, base=rope_base
        )
        self.encoder_positions = (
            GridPositions(self._grid((height, width), encoder_patch_size), encoder_dim) if absolute_positions else None
        )
        self.encoder_norm, self.decoder_norm = plain_norm(encoder_dim), plain_norm(decoder_dim)
        self.encoder = ModuleList(DARBlock(encoder_dim, gate_init) for _ in range(num_encoder_layers))
        self.pre_quant = nn.Linear(encoder_dim, codebook_embed_dim, bias=False)
        self.quantizer = chosen_quantizer(
            quantizer,
            codebook_embed_dim,
            lambda: VectorQuantizer(
                codebook_size,
                codebook_embed_dim,
                gradient="normalised",
                init="uniform",
                entropy_temperature=entropy_temperature,
                restart_after=codebook_restart_after,
            ),
        )
        self._spec = spec_of(self.quantizer, replace(self._spec, codebook_size=self.quantizer.codebook_size))
        self.post_quant = nn.Linear(codebook_embed_dim, decoder_dim, bias=False)
        self.token_positions = nn.Embedding(max_tokens, decoder_dim)
        nn.init.trunc_normal_(self.token_positions.weight, std=position_std)
        self.decoder = ModuleList(DARBlock(decoder_dim, gate_init) for _ in range(num_decoder_layers))
        self.velocity = VelocityNetwork(
            velocity,
            in_channels,
            decoder_dim,
            self._grid((height, width), velocity.patch_size),
            AlignmentConfig.filled(alignment, dim=768, layer=8, hidden_dim=2048),
            absolute_positions=absolute_positions,
        )

    @staticmethod
    def _grid(size: tuple[int, int], patch: int) -> tuple[int, int]:
        return size[0] // patch, size[1] // patch

    @property
    def loss_terms(self) -> tuple[str, ...]:
        return (*self.quantizer.loss_terms, "flow")

    @property
    def alignment_dim(self) -> int | None:
        return None if self.velocity.alignment is None else self.velocity.alignment.dim

    @property
    def last_layer(self) -> Tensor:
        return self.velocity.patches_out.weight

    def _spec_for_sides(self, sides: tuple[int, ...]) -> TokenSpec:
        unit = math.lcm(self.encoder_patch, self.velocity_patch)
        if min(sides) < 1 or any(side % unit for side in sides):
            raise ValueError(f"image sides must be multiples of {unit}, got {times(sides)}; resize or crop the images")
        return self._spec

    def latents(self, pixels: Tensor) -> Tensor:
        """Pixels (B, C, H, W) in [-1, 1] to latents (B, N, d), before quantization.

        Patches attend to patches; query i attends to all patches and to the queries up to itself.
        """
        self.check_pixels(pixels)
        grid = self._grid((pixels.shape[2], pixels.shape[3]), self.encoder_patch)
        patches = self.encoder_norm(rearrange(self.to_patches(pixels), "b d h w -> b (h w) d"))
        if self.encoder_positions is not None:
            patches = patches + self.encoder_positions(grid)
        queries = self.query_proj(self.queries.weight[: self._spec.length])
        x = torch.cat([patches, queries.expand(len(pixels), -1, -1)], 1)
        mask = prefix_causal_mask(patches.shape[1], x.shape[1], x.device)
        rotation = self.encoder_rotation(grid)
        for block in self.encoder:
            x = block(x, mask=mask, rotation=rotation)
        return self.pre_quant(self.encoder_norm(x[:, patches.shape[1] :]))

    def encode(self, pixels: Tensor, *, condition: Condition | None = None, draws: Draws | None = None) -> Tensor:
        self.check_condition(condition)
        return self.quantize(self.latents(pixels))

    def embed_codes(self, codes: Tensor) -> Tensor:
        """Embed the first k codes (B, k, d) for the velocity network, (B, k, Dc); no token depends on later ones."""
        x = self.post_quant(codes) + self.token_positions.weight[: codes.shape[1]]
        for block in self.decoder:
            x = block(x, causal=True)
        return self.decoder_norm(x)

    def group_start(self, t: Tensor) -> Tensor:
        """The first token of the group that conditions time t in [0, 1] (before the shift): i / G is nearest to t."""
        length = self._spec.length
        start = torch.floor(t * self.num_groups + 0.5).long() * length // self.num_groups
        return start.clamp_max(length - self.group_size)

    def schedule(self, num_steps: int) -> tuple[list[float], list[int]]:
        """The num_steps + 1 shifted times of a trajectory, and the number of tokens that each step needs."""
        times = PATH.times(num_steps)
        starts = self.group_start(torch.tensor(times[:-1], dtype=torch.float64)).tolist()
        return [shift_time(t, self.time_shift) for t in times], [start + self.group_size for start in starts]

    @torch.no_grad()
    def decode(
        self,
        tokens: Tensor,
        *,
        condition: Condition | None = None,
        lengths: Tensor | None = None,
        num_steps: int | None = None,
        solver: Solver | None = None,
        draws: Draws | None = None,
    ) -> Tensor:
        """The first ids (B, k) of images to pixels; k is a multiple of ``spec.prefix_step``.

        A prefix takes the steps whose groups are complete, and then follows the straight line to the data.

        Args:
            lengths: (B,) how many of its k ids each image uses; None takes all.
            num_steps: steps of a whole image; None takes the model's ``num_steps``.
            solver: "adams_bashforth2" or "euler"; None takes the model's ``solver``.
            draws: from ``decoding_draws``; None takes those of seed 0. "noise" (B, C, H, W) sets the size of the
                images.

        Raises:
            ValueError: a wrong number of ids or steps, or ids out of range.
        """
        (image,) = deque(
            self.decode_stream(
                tokens, condition=condition, lengths=lengths, num_steps=num_steps, solver=solver, draws=draws
            ),
            maxlen=1,
        )
        return image

    @torch.no_grad()
    def decode_stream(
        self,
        tokens: Tensor,
        *,
        condition: Condition | None = None,
        lengths: Tensor | None = None,
        num_steps: int | None = None,
        solver: Solver | None = None,
        draws: Draws | None = None,
    ) -> Iterator[Tensor]:
        """As ``decode``, but yields the preview after every step; the last one is the result of ``decode``."""
        self.check_condition(condition)
        lengths = self._spec.prefix_lengths(tokens, lengths)[:, None, None, None]
        trajectory = Trajectory(self, len(tokens), num_steps=num_steps, solver=solver, draws=draws)
        image = None
        for needed, preview in trajectory.advance(tokens[:, : int(lengths.max())]):
            # A step beyond an image's own tokens leaves that image as it is.
            image = preview if image is None else torch.where(needed <= lengths, preview, image)
            yield image

    def prefix_decoder(
        self, draws: Draws | None = None, *, condition: Condition | None = None
    ) -> Callable[[Tensor], Tensor]:
        """See ``Tokenizer.prefix_decoder``. Each call continues where the last one stopped, so that all previews of an
        image together cost as many network evaluations as the image alone."""
        self.check_condition(condition)
        trajectory: Trajectory | None = None
        image: Tensor | None = None

        @torch.no_grad()
        def decode(tokens: Tensor) -> Tensor:
            nonlocal trajectory, image
            self._spec.prefix_lengths(tokens, None)
            if trajectory is None:
                trajectory = Trajectory(self, len(tokens), draws=draws)
            for _, preview in trajectory.advance(tokens):
                image = preview
            if image is None:
                raise ValueError("a prefix of no tokens has no image")
            return image

        return decode

    def decoding_draws(self, keys: Keys) -> Draws:
        return {"noise": keys.normal("decoding noise", *self._input_shape)}

    def training_draws(self, keys: Keys) -> Draws:
        own = {"time": keys.uniform("time"), "noise": keys.normal("noise", *self._input_shape)}
        return super().training_draws(keys) | own

    def forward(
        self,
        pixels: Tensor,
        *,
        condition: Condition | None = None,
        target: Tensor | None = None,
        clock: Clock | None = None,
        draws: Draws | None = None,
    ) -> TokenizerOutput:
        """Train at one random time per image. The term "flow" (B,) is the mean squared error of the velocity, divided
        by the variance of the data; the reconstruction follows the straight line from that time to the data.

        The quantizer's terms are means over the tokens up to the end of the group that the time uses.

        Raises:
            ValueError: no draws: a flow model cannot be trained without noise.
        """
        self.check_condition(condition)
        if draws is None:
            raise ValueError("D-AR trains on random times and noise: pass draws=model.training_draws(keys)")
        latents = self.latents(pixels)
        quantized = self.quantizer(latents, draws=draws)
        start = self.group_start(draws["time"])
        positions = torch.arange(self.group_size, device=pixels.device) + start[:, None]  # (B, Q)
        embedded = self.embed_codes(quantized.quantized)
        tokens = embedded.gather(1, positions[..., None].expand(-1, -1, embedded.shape[2]))
        t = shift_time(draws["time"], self.time_shift)
        data, noise = self.data_std * (pixels if target is None else target), draws["noise"]
        noisy = PATH.interpolate(data, noise, t)
        predicted = self.velocity(noisy, t, tokens, align=self.alignment_dim is not None)
        error = (predicted.velocity - PATH.velocity(data, noise)).square().flatten(1).mean(1)
        used = torch.arange(self._spec.length, device=pixels.device) < start[:, None] + self.group_size
        losses = {name: _masked_mean(value, used) for name, value in quantized.losses.items()}
        features = {"latents": latents, "quantized": quantized.quantized, "time": t}
        if predicted.features is not None:
            features["alignment"] = predicted.features
        return TokenizerOutput(
            PATH.data_estimate(noisy, predicted.velocity, t) / self.data_std,
            quantized.ids,
            losses | {"flow": error / self.data_std**2},
            features,
        )

    @classmethod
    def from_official(cls, config: Mapping[str, Any], state_dict: Mapping[str, Tensor]) -> Self:
        model = cls(**official.model_arguments(config, state_dict))
        return model.with_official_weights(official.our_names(config, state_dict))

    pickled_stand_ins = official.STAND_INS
    embedded_config = staticmethod(official.embedded_config)


class Trajectory:
    """Images on their way from noise to data. A step is taken once the tokens that it needs are known.

    Args:
        model: the tokenizer.
        batch_size: number of images.
        num_steps, solver, draws: as in ``DAR.decode``.
    """

    def __init__(
        self,
        model: DAR,
        batch_size: int,
        *,
        num_steps: int | None = None,
        solver: Solver | None = None,
        draws: Draws | None = None,
    ):
        self.model, self.taken = model, 0
        times, self.needed = model.schedule(model.num_steps if num_steps is None else num_steps)
        # Two times of one schedule differ, so a step is known by the time at which it begins.
        self._stops = dict(zip(times, self.needed))
        noise = (draws or model.decoding_draws(Keys.range(0, batch_size)))["noise"]
        noise = noise.to(model.last_layer.device, torch.float32)
        self._states = SOLVERS[solver or model.solver](self._velocity, noise, times)
        self._embedded = noise.new_empty(0)  # of the tokens so far

    def advance(self, tokens: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Take all steps that the ids (B, k) allow. The ids must begin with those of earlier calls.

        Yields:
            after each step, the number of ids that it needs, and its preview, pixels (B, C, H, W).
        """
        codes = self.model.quantizer.ids_to_latents(tokens).to(self.model.dtype)
        self._embedded = self.model.embed_codes(codes)
        while self.taken < len(self.needed) and self.needed[self.taken] <= tokens.shape[1]:
            state = next(self._states)
            self.taken += 1
            image = PATH.data_estimate(state.x, state.velocity, state.t) / self.model.data_std
            yield self.needed[self.taken - 1], image

    def _velocity(self, x: Tensor, t: float) -> Tensor:
        stop = self._stops[t]
        tokens = self._embedded[:, stop - self.model.group_size : stop]
        return self.model.velocity(x.to(tokens.dtype), torch.full((1,), t, device=x.device), tokens).velocity.float()


def _masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of per-token values (B, N) where the mask is True; a scalar is returned unchanged."""
    return values if values.ndim == 0 else (values * mask).sum() / share_of_group(mask.sum().to(values))

"""The networks of FlexTok (arXiv 2502.13967): register encoder and flow decoder; see ``flextok``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Self

import torch
from einops import rearrange
from torch import Tensor, nn

from vistok.checkpoints import load_strictly
from vistok.flow import FlowState, LinearPath, euler, guided
from vistok.flow.paths import Velocity
from vistok.flow.solvers import VelocityField
from vistok.guidance import APG, PLAIN, Combination, Guidance, Scale, at_time, classifier_free
from vistok.nn.alignment import AlignmentConfig, AlignmentHead
from vistok.nn.attention import Attention
from vistok.nn.containers import ModuleList
from vistok.nn.masks import prefix_causal_mask
from vistok.nn.mlp import SwiGLU
from vistok.nn.modulation import modulate
from vistok.nn.positions import sincos_1d
from vistok.nn.rotary import grid_positions
from vistok.nn.timesteps import TimestepEmbedding
from vistok.tokenizers.flextok import official
from vistok.tokenizers.flextok.official_keys import check_keys

PATH = LinearPath(noise_at=1)
GuidanceName = Literal["cfg", "apg"]

# Without weights, both in the trunk and on queries and keys.
layer_norm = partial(nn.LayerNorm, eps=1e-5, elementwise_affine=False)


@dataclass(frozen=True)
class TrunkConfig:
    """Width, number of blocks and channels of a head of a transformer, and the hidden width of its ungated feed-forward
    in units of the width.

    The released models are named by their depths; their width is 64 times the depth.
    """

    dim: int = 768
    num_layers: int = 12
    head_dim: int = 64
    mlp_ratio: float = 4.0

    def __post_init__(self) -> None:
        if self.dim % self.head_dim or self.dim % 4:
            raise ValueError(f"dim {self.dim} must be divisible by 4 and by head_dim {self.head_dim}")

    @property
    def hidden_dim(self) -> int:
        """Two thirds of the ungated width, so that gating adds no weights; rounded down twice, as in the reference."""
        return int(2 * int(self.mlp_ratio * self.dim) / 3)


class FlexTokBlock(nn.Module):
    """Pre-norm transformer block: (B, N, D) -> (B, N, D)."""

    def __init__(self, config: TrunkConfig):
        super().__init__()
        dim, head_dim = config.dim, config.head_dim
        self.norm1, self.norm2 = layer_norm(dim), layer_norm(dim)
        # The scale of muP, which equals head_dim ** -0.5 only at the released 64 channels.
        self.attn = Attention(
            dim, dim // head_dim, qkv_bias=False, out_bias=False, qk_norm=layer_norm, scale=8 / head_dim
        )
        self.mlp = SwiGLU(dim, config.hidden_dim)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x), mask=mask)
        return x + self.mlp(self.norm2(x))


class ModulatedBlock(FlexTokBlock):
    """adaLN-zero block with separate shifts, scales and gates for each of the ``streams``, which are consecutive parts
    of the sequence."""

    def __init__(self, config: TrunkConfig, streams: int):
        super().__init__(config)
        self.streams = streams
        self.modulation = nn.Linear(config.dim, streams * 6 * config.dim)

    def forward(self, x: Tensor, embedding: Tensor, sizes: list[int]) -> Tensor:  # type: ignore[override]  # shares parts
        """Transform x (B, N, D).

        Args:
            embedding: (B or 1, D), after its SiLU.
            sizes: number of positions of each stream; they add up to N.
        """
        gates_shifts_scales = self.modulation(embedding).unflatten(-1, (self.streams, 6, -1))  # (B, streams, 6, D)
        gate1, gate2, shift1, scale1, shift2, scale2 = gates_shifts_scales.unbind(2)
        x = x + _scaled(self.attn(_modulated(self.norm1(x), shift1, scale1, sizes)), gate1, sizes)
        return x + _scaled(self.mlp(_modulated(self.norm2(x), shift2, scale2, sizes)), gate2, sizes)


def _modulated(x: Tensor, shift: Tensor, scale: Tensor, sizes: list[int]) -> Tensor:
    parts = x.split(sizes, 1)
    return torch.cat([modulate(part, shift[:, i, None], scale[:, i, None]) for i, part in enumerate(parts)], 1)


def _scaled(x: Tensor, gate: Tensor, sizes: list[int]) -> Tensor:
    return torch.cat([part * gate[:, i, None] for i, part in enumerate(x.split(sizes, 1))], 1)


class PatchEmbedding(nn.Module):
    """Maps (B, C, h, w) to (B, P, D): a linear layer on patches, plus a fixed sine-cosine table of the largest grid.

    Smaller maps use the upper left part of the table.
    """

    def __init__(self, channels: int, patch: tuple[int, int], grid: tuple[int, int], dim: int):
        super().__init__()
        self.patch = patch
        self.proj = nn.Linear(channels * patch[0] * patch[1], dim)
        row, column = grid_positions(grid).unbind(-1)
        table = torch.cat([sincos_1d(row, dim // 2), sincos_1d(column, dim // 2)], -1).float()
        self.positions = nn.Parameter(table.view(*grid, dim), requires_grad=False)  # (H, W, D)

    def forward(self, maps: Tensor) -> Tensor:
        patches = rearrange(maps, "b c (h p) (w q) -> b h w (p q c)", p=self.patch[0], q=self.patch[1])
        h, w = patches.shape[1:3]
        return (self.proj(patches) + self.positions[:h, :w]).flatten(1, 2)


class Encoder(nn.Module):
    """Latent maps (B, C, h, w) to registers (B, N, d), before quantization.

    Patches attend to all patches and to no register; register i attends to all patches and to the registers up to
    itself. So no register depends on later ones, and the first k registers encode the image in k tokens.

    Args:
        config: the transformer.
        channels, patch, grid: channels of the latent maps, sides of a patch, and numbers of patches (rows, columns).
        num_tokens, code_dim: number of registers, and channels of their codes.
        code_std: standard deviation of the initial weights of the last layer.
    """

    def __init__(
        self,
        config: TrunkConfig,
        channels: int,
        patch: tuple[int, int],
        grid: tuple[int, int],
        num_tokens: int,
        code_dim: int,
        code_std: float = 0.0,
    ):
        super().__init__()
        self.patches = PatchEmbedding(channels, patch, grid, config.dim)
        self.registers = nn.Parameter(torch.empty(num_tokens, config.dim))
        self.blocks = ModuleList(FlexTokBlock(config) for _ in range(config.num_layers))
        self.norm = layer_norm(config.dim)
        self.to_codes = nn.Linear(config.dim, code_dim)
        _initialise(self, zero=[], normal=[self.registers])
        nn.init.normal_(self.to_codes.weight, std=code_std)

    def forward(self, maps: Tensor) -> Tensor:
        patches = self.patches(maps)
        batch, count = patches.shape[:2]
        x = torch.cat([patches, self.registers.expand(batch, -1, -1)], 1)
        mask = prefix_causal_mask(count, x.shape[1], x.device)
        for block in self.blocks:
            x = block(x, mask)
        return self.to_codes(self.norm(x[:, count:]))


class FlowDecoder(nn.Module):
    """The velocity of noisy latents, given registers, with full attention among patches and registers.

    Args:
        config: the transformer.
        channels, patch, grid, num_tokens, code_dim: as in ``Encoder``.
        streams: 2 modulates patches and registers separately, 1 together.
        max_timestep: time 1 is embedded as 1000 / max_timestep.
        frequency_dim: features of the time embedding.
        alignment: the training-only head, on patches after block ``layer``, counted from 0; None has no head.
    """

    def __init__(
        self,
        config: TrunkConfig,
        channels: int,
        patch: tuple[int, int],
        grid: tuple[int, int],
        num_tokens: int,
        code_dim: int,
        *,
        streams: Literal[1, 2] = 2,
        max_timestep: float = 1000.0,
        frequency_dim: int = 256,
        alignment: AlignmentConfig | Mapping[str, Any] | None = None,
    ):
        super().__init__()
        dim = config.dim
        self.from_codes = nn.Linear(code_dim, dim)
        self.register_positions = nn.Parameter(torch.empty(num_tokens, dim))
        self.dropped_token, self.null_token = nn.Parameter(torch.empty(dim)), nn.Parameter(torch.empty(dim))
        self.patches = PatchEmbedding(channels, patch, grid, dim)
        self.time_embedding = TimestepEmbedding(dim, frequency_dim, scale=1000 / max_timestep, base=256)
        self.blocks = ModuleList(ModulatedBlock(config, streams) for _ in range(config.num_layers))
        self.norm = layer_norm(dim)
        self.modulation = nn.Linear(dim, 2 * dim)
        self.to_patches = nn.Linear(dim, channels * patch[0] * patch[1])
        _initialise(
            self,
            zero=[self.modulation, self.to_patches, *(block.modulation for block in self.blocks)],
            normal=[self.register_positions, self.dropped_token, self.null_token],
        )
        alignment = AlignmentConfig.filled(alignment, dim=1024, layer=1, hidden_dim=4 * dim)
        self.alignment_layer = None if alignment is None else alignment.tap(range(config.num_layers))
        self.alignment_head = None if alignment is None else NormedAlignmentHead(dim, alignment)

    def embed_codes(self, codes: Tensor, lengths: Tensor, null: Tensor) -> Tensor:
        """Embed codes (B, N, d) as registers (B, N, D).

        Args:
            lengths: (B,) number of registers that are kept; a learned vector, without position, replaces the others.
            null: (B,) bool, True where another learned vector replaces all registers.
        """
        registers = self.from_codes(codes.to(self.from_codes.weight.dtype)) + self.register_positions
        kept = torch.arange(codes.shape[1], device=codes.device) < lengths[:, None]
        registers = torch.where(kept[..., None], registers, self.dropped_token)
        return torch.where(null[:, None, None], self.null_token, registers)

    def embed(self, noisy: Tensor, registers: Tensor) -> Tensor:
        """The sequence (B, P + N, D) of noisy latents and embedded registers."""
        return torch.cat([self.patches(noisy), registers], 1)

    def forward(self, noisy: Tensor, t: Tensor, registers: Tensor) -> Velocity:
        """The velocity, noise - data, at noisy latents (B, C, h, w) and times (B,), or (1,) for all.

        Args:
            registers: (B, N, D) from ``embed_codes``.
        """
        x, count = self.embed(noisy, registers), registers.shape[1]
        embedding = nn.functional.silu(self.time_embedding(t))
        sizes = [x.shape[1] - count, count] if self.blocks[0].streams == 2 else [x.shape[1]]
        features = None
        for index, block in enumerate(self.blocks):
            x = block(x, embedding, sizes)
            if index == self.alignment_layer:
                features = x[:, :-count]
        shift, scale = self.modulation(embedding)[:, None].chunk(2, -1)
        patches = self.to_patches(modulate(self.norm(x[:, :-count]), shift, scale))
        p, q = self.patches.patch
        shape = {"h": noisy.shape[2] // p, "p": p, "q": q}
        return Velocity(rearrange(patches, "b (h w) (p q c) -> b c (h p) (w q)", **shape), features)

    @classmethod
    def from_official(cls, config: Mapping[str, Any], state_dict: Mapping[str, Tensor]) -> Self:
        """Build the decoder alone, from a whole model's config and the ``decoder.*`` entries of its state dict."""
        arguments = official.decoder_arguments(config)
        check_keys(config)
        trunk, alignment = TrunkConfig(**arguments.pop("config")), arguments.pop("alignment")
        model = cls(trunk, **arguments, alignment=alignment)
        state = official.our_names(config, state_dict)
        load_strictly(model, {key.removeprefix("decoder."): tensor for key, tensor in state.items()})
        return model


class NormedAlignmentHead(nn.Module):
    """A norm and the alignment head: (..., D) -> (..., channels of the frozen encoder). The parts are named as in the
    released files."""

    out: Any  # a linear layer

    def __init__(self, dim: int, config: AlignmentConfig):
        super().__init__()
        *hidden, self.out = AlignmentHead.of(dim, config)
        self.mlp = nn.Sequential(layer_norm(dim), *hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.mlp(x))


def denoise(
    decoder: FlowDecoder,
    codes: Tensor,
    lengths: Tensor,
    noise: Tensor,
    *,
    num_steps: int,
    guidance_scale: Scale = 1.0,
    guidance: GuidanceName | APG = "cfg",
) -> Iterator[FlowState]:
    """Euler steps of a decoder from noise (B, C, h, w) at time 1 to data at time 0; deterministic given the noise.

    Args:
        codes, lengths: codes (B, N, d), and the number of them that is used, (B,).
        guidance_scale, guidance: see ``FlexTok.decode``. With guidance, both rows of a sample run in one batch.
    """
    named: dict[str, Combination] = {"cfg": PLAIN, "apg": APG()}
    combination = named[guidance] if isinstance(guidance, str) else guidance
    scale = at_time(guidance_scale) if callable(guidance_scale) else guidance_scale
    rows = classifier_free(scale, combination=combination)
    null = torch.cat([torch.full_like(lengths, bool(parts), dtype=torch.bool) for parts in rows.rows])
    registers = decoder.embed_codes(rows.repeat(codes), rows.repeat(lengths), null)
    return euler(velocity_field(decoder, registers, rows), noise.float(), PATH.times(num_steps))


def velocity_field(decoder: FlowDecoder, registers: Tensor, guidance: Guidance) -> VelocityField:
    """The guided velocity field of one trajectory.

    Args:
        registers: (R * B, N, D) from ``FlowDecoder.embed_codes``, ordered by the rows of the guidance.
    """

    def velocity(x: Tensor, t: float) -> Tensor:
        time = torch.full((1,), t, device=x.device)
        return decoder(x.to(registers.dtype), time, registers).velocity.float()

    return guided(velocity, guidance)


def _initialise(model: nn.Module, *, zero: list[nn.Linear], normal: list[nn.Parameter]) -> None:
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for module in model.modules():
        if isinstance(module, Attention):  # three fused layers, each with its own bound
            for part in module.qkv.weight.detach().chunk(3):
                nn.init.xavier_uniform_(part)
    for module in zero:
        nn.init.zeros_(module.weight)
    for parameter in normal:
        nn.init.trunc_normal_(parameter, std=0.02)

"""MAR: masked autoregressive generation in random order, with a small diffusion model for every token.

Paper: Autoregressive Image Generation without Vector Quantization (arXiv 2406.11838). Official weights and conventions:
github.com/LTH14/mar (MIT).

An encoder sees the known tokens, a decoder fills in the places of the others, and each output of the decoder conditions
a diffusion head that denoises one continuous token.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any, Self, cast

import torch
from einops import rearrange
from torch import Tensor, nn

from vistok.checkpoints import OfficialCheckpoint, rename
from vistok.draws import Draws, Keys
from vistok.flow import last
from vistok.flow.diffusion import GaussianDiffusion, strided_timesteps
from vistok.generators.base import weighted_mean
from vistok.generators.engine.continuous import ContinuousGenerator
from vistok.generators.mar import official
from vistok.generators.mar.sampling import NUM_TIMESTEPS, MAROptions, MARSession
from vistok.nn.diffusion_head import DiffusionHead
from vistok.nn.vit import ViTBlock
from vistok.nn.windows import window_members
from vistok.types import Clock, Condition, Expands, GeneratorOutput, TokenSpec, as_dataclass

OWN_STEPS = 10
"""Denoising steps of the head for tokens that the model draws itself in training: far fewer than in sampling."""


class MAR(ContinuousGenerator):
    """Encoder, decoder and diffusion head.

    Args:
        spec: the tokens to model: continuous latents.
        num_classes: number of classes; 0 for unconditional generation.
        dim, num_encoder_layers, num_heads: of the encoder.
        num_decoder_layers, decoder_dim, num_decoder_heads: of the decoder; None takes the encoder's.
        num_head_layers, head_dim: residual blocks and width of the diffusion head.
        patch_size: patch_size x patch_size latents are one token of the model.
        mlp_ratio: hidden width of the feed-forward, in units of dim.
        buffer_size: number of copies of the class embedding before the tokens.
        mask_rate_min: least share of tokens that is masked in training; the most likely share is 1.
        diffusion_batch_mul: noise levels per token and training step.
        condition_dropout: share of training samples whose class is dropped, for guidance; with 0 guidance is refused.
        attn_drop, proj_drop: of the attention weights, and of the outputs of attention and feed-forward.
        norm_eps: eps of the transformers' layer norms.

    Raises:
        ValueError: discrete tokens, or a patch that does not divide their grid.
    """

    members: Tensor

    registry_name = "mar"
    only_next = "it predicts masked latents from all others as it is"
    tiny = {
        "spec": TokenSpec(16, None, dim=4, grid=(4, 4)),
        "num_classes": 5,
        "dim": 16,
        "num_encoder_layers": 1,
        "num_decoder_layers": 1,
        "num_heads": 2,
        "num_head_layers": 1,
        "head_dim": 16,
        "buffer_size": 2,
    }
    options_type = MAROptions
    session_type = MARSession
    """``MARSession.append`` also takes known tokens at any positions, for inpainting and editing."""
    sizes = official.SIZES
    checkpoints = tuple(
        OfficialCheckpoint(f"mar_{size}", "checkpoint-last.pth", official.config(size), tokenizer="kl16.ckpt")
        for size in official.SIZES
    )

    def __init__(
        self,
        spec: TokenSpec,
        num_classes: int = 1000,
        dim: int = 768,
        num_encoder_layers: int = 12,
        num_decoder_layers: int = 12,
        num_heads: int = 12,
        decoder_dim: int | None = None,
        num_decoder_heads: int | None = None,
        num_head_layers: int = 6,
        head_dim: int = 1024,
        patch_size: int = 1,
        mlp_ratio: float = 4.0,
        buffer_size: int = 64,
        mask_rate_min: float = 0.7,
        diffusion_batch_mul: int = 4,
        condition_dropout: float = 0.1,
        attn_drop: float = 0.1,
        proj_drop: float = 0.1,
        norm_eps: float = 1e-6,
    ):
        super().__init__()
        self.spec = self.check_spec(as_dataclass(TokenSpec, spec), type(self).__name__)
        if not 0 <= mask_rate_min < 1:
            raise ValueError(f"mask_rate_min must lie in [0, 1), got {mask_rate_min}")
        self.num_classes, self.condition_dropout = num_classes or None, condition_dropout
        self.mask_rate_min, self.batch_mul, self.buffer_size = mask_rate_min, diffusion_batch_mul, buffer_size
        self.register_buffer("members", patch_members(self.spec, patch_size), persistent=False)
        self.length, self.token_dim = len(self.members), self.spec.dim * patch_size**2
        self.diffusion = GaussianDiffusion.cosine(NUM_TIMESTEPS)
        decoder_dim = decoder_dim or dim
        make = partial(ViTBlock, mlp_ratio=mlp_ratio, eps=norm_eps, attn_drop=attn_drop, proj_drop=proj_drop)

        self.class_embedding = nn.Embedding(num_classes, dim) if num_classes else None
        self.null_class = nn.Parameter(torch.empty(1, dim))
        self.input = nn.Linear(self.token_dim, dim)
        self.input_norm = nn.LayerNorm(dim, 1e-6)
        self.encoder_positions = nn.Parameter(torch.empty(1, buffer_size + self.length, dim))
        self.encoder_blocks = nn.Sequential(*(make(dim, num_heads) for _ in range(num_encoder_layers)))
        self.encoder_norm = nn.LayerNorm(dim, norm_eps)
        self.bridge = nn.Linear(dim, decoder_dim)
        self.mask_token = nn.Parameter(torch.empty(1, 1, decoder_dim))
        self.decoder_positions = nn.Parameter(torch.empty(1, buffer_size + self.length, decoder_dim))
        self.decoder_blocks = nn.Sequential(
            *(make(decoder_dim, num_decoder_heads or num_heads) for _ in range(num_decoder_layers))
        )
        self.decoder_norm = nn.LayerNorm(decoder_dim, norm_eps)
        self.head_positions = nn.Parameter(torch.empty(1, self.length, decoder_dim))
        self.head = DiffusionHead(self.token_dim, decoder_dim, head_dim, num_head_layers)
        self._initialise()

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        tables = (self.encoder_positions, self.decoder_positions, self.head_positions)
        for table in (*tables, self.null_class, self.mask_token):
            nn.init.normal_(table, std=0.02)
        self.head.initialise()

    def group(self, tokens: Tensor) -> Tensor:
        """Latents (B, L, D) to the model's tokens (B, L / p^2, D p^2), channel-major."""
        return tokens[:, self.members].transpose(2, 3).flatten(2)

    def ungroup(self, tokens: Tensor) -> Tensor:
        """The model's tokens (B, n, D p^2) to the latents (B, n p^2, D) that they consist of, token by token."""
        return rearrange(tokens, "b n (d k) -> b (n k) d", d=self.spec.dim)

    def embed_classes(self, condition: Condition) -> Tensor:
        """(R, D) class embeddings; dropped rows get the null embedding."""
        null = self.null_class.expand(len(condition), -1)
        if self.class_embedding is None or condition.labels is None:
            return null
        known = self.class_embedding(condition.labels.clamp_min(0))
        return torch.where(condition.dropped[:, None], null, known)

    def encode(self, tokens: Tensor, visible: Tensor, classes: Tensor) -> Tensor:
        """Encode the known tokens.

        Args:
            tokens: (R, L, d), grouped.
            visible: (R, V) positions of the known tokens.
            classes: (R, D).

        Returns:
            (R, buffer_size + V, D): the class tokens, then the known ones.
        """
        x = torch.cat([classes[:, None].expand(-1, self.buffer_size, -1), self.input(take(tokens, visible))], 1)
        positions = self.encoder_positions[0, self._slots(visible)]
        return self.encoder_norm(self.encoder_blocks(self.input_norm(x + positions)))

    def decode(self, encoded: Tensor, visible: Tensor) -> Tensor:
        """The head's conditions at all positions, (R, L, D'), from the encoder's output."""
        x = self.bridge(encoded)
        slots = self._slots(visible)[..., None].expand_as(x)
        filled = self.mask_token.to(x).expand(len(x), self.buffer_size + self.length, -1)
        x = self.decoder_blocks(filled.scatter(1, slots, x) + self.decoder_positions)
        return self.decoder_norm(x)[:, self.buffer_size :] + self.head_positions

    def _slots(self, visible: Tensor) -> Tensor:
        """(R, buffer_size + V): the positions of class tokens and known tokens in the whole sequence."""
        buffer = torch.arange(self.buffer_size, device=visible.device).expand(len(visible), -1)
        return torch.cat([buffer, visible + self.buffer_size], 1)

    def forward(
        self,
        tokens: Tensor,
        condition: Condition,
        *,
        draws: Draws | None = None,
        weights: Tensor | None = None,
        clock: Clock | None = None,
        tokenizer: Expands | None = None,
        context: Tensor | None = None,
    ) -> GeneratorOutput:
        """Diffusion loss over masked tokens; metrics "mse" of the noise and "vb", the variational bound in bits.

        The prediction is the head's output (B, m, n, 2d) for m noise levels of each of the n masked tokens.

        Raises:
            ValueError: no draws, or latents of another tokenizer.
        """
        self.check_tokenizer(tokenizer)
        if draws is None:
            raise ValueError("masks and noise are random: pass training_draws(keys)")
        self.spec.check_latents(tokens)
        condition = self.drop_condition(condition, draws)
        tokens, masked, visible = self.group(tokens), draws["masked"], draws["visible"]
        fed = tokens if context is None else context
        z = self.decode(self.encode(fed, visible, self.embed_classes(condition)), visible)

        levels = draws["time"].shape[1]
        rows = [draws["time"].gather(2, masked[:, None].expand(-1, levels, -1))]  # (B, m, n)
        rows += [torch.stack([take(level, masked) for level in draws["noise"].unbind(1)], 1)]  # (B, m, n, d)
        rows += [take(values, masked)[:, None].expand(-1, levels, -1, -1) for values in (tokens, z)]
        t, noise, data, z = (values.flatten(0, 2) for values in rows)
        output = self.head(self.diffusion.add_noise(data, noise, t), t, self.head.condition(z))
        mse, bound = self.diffusion.loss_terms(output, data, noise, t)
        per_sample = (mse + bound).view(len(tokens), -1).mean(1)
        loss = weighted_mean(per_sample, weights)
        prediction = output.view(len(tokens), levels, masked.shape[1], -1)
        return GeneratorOutput(loss, prediction, {"mse": mse.detach().mean(), "vb": bound.detach().mean()})

    @property
    def context_shape(self) -> tuple[int, ...]:
        """(L / p^2, D p^2), of the model's tokens."""
        return (self.length, self.token_dim)

    def context_of(self, tokens: Tensor) -> Tensor:
        return self.group(tokens)

    def replaced(self, uniforms: Tensor, share: float, draws: Draws) -> Tensor:
        """``share`` of the visible tokens, rounded up: equally many in every row, since the encoder's rows have one
        length."""
        visible = draws["visible"]
        count = math.ceil(share * visible.shape[1])
        chosen = visible.gather(1, uniforms.gather(1, visible).argsort(1)[:, :count])
        return torch.zeros_like(uniforms, dtype=torch.bool).scatter(1, chosen, True)

    def own_draws(self, keys: Keys) -> Draws:
        """ "own" (B, 1 + m, L, d) normal: the initial noise of tokens, and that of the m denoising steps."""
        return {"own": keys.normal("objective own", 1 + OWN_STEPS, *self.context_shape)}

    def own_tokens(
        self,
        tokens: Tensor,
        replaced: Tensor,
        condition: Condition,
        draws: Draws,
        tokenizer: Expands | None = None,
    ) -> Tensor:
        """The replaced tokens are masked like the others and drawn from the remaining ones, as in sampling, in a few
        steps of the head."""
        visible, tokens = draws["visible"], self.group(tokens)
        kept = visible[~replaced.gather(1, visible)].view(len(visible), -1)
        chosen = visible[replaced.gather(1, visible)].view(len(visible), -1)
        classes = self.embed_classes(self.drop_condition(condition, draws))
        z = self.head.condition(take(self.decode(self.encode(tokens, kept, classes), kept), chosen)).flatten(0, 1)

        def network(x: Tensor, t: int) -> Tensor:
            return self.head(x, torch.full((1,), t, device=x.device), z)

        first, *others = (take(noise, chosen).flatten(0, 1) for noise in draws["own"].unbind(1))
        diffusion = self.diffusion.respaced(strided_timesteps(NUM_TIMESTEPS, OWN_STEPS))
        drawn = last(diffusion.ancestral(network, first, others)).x.view(*chosen.shape, self.token_dim)
        return tokens.scatter(1, chosen[..., None].expand_as(drawn), drawn.to(tokens))

    def num_masked(self, mask_rate: float) -> int:
        """The number of tokens that a mask rate hides, rounded up."""
        return math.ceil(self.length * mask_rate)

    def training_draws(self, keys: Keys) -> Draws:
        """ "drop" (B,) uniform; "masked" (B, n) and "visible" (B, L - n), the positions that are predicted and seen;
        "time" (B, m, L) timesteps; "noise" (B, m, L, d) normal."""
        # One rate per batch, keyed by the step alone, so that all rows have equally many visible tokens.
        uniform = Keys(keys.seed, (0,), keys.step).uniform("mask_rate")
        count = self.num_masked(float(truncated_normal(uniform.double(), self.mask_rate_min)))
        order = keys.permutation("order", self.length)
        noise = keys.normal("noise", self.batch_mul, self.length, self.token_dim)
        return {
            "drop": keys.uniform("drop"),
            "masked": order[:, :count],
            "visible": order[:, count:].sort(1).values,
            "time": (keys.uniform("time", self.batch_mul, self.length).double() * NUM_TIMESTEPS).long(),
            "noise": noise,
        }

    def sampling_draws(self, keys: Keys, options: MAROptions | None = None) -> Draws:
        """ "order" (B, L), a permutation; "noise" (B, 1 + num_steps, L, d) normal: the initial noise of tokens, and
        that of the denoising steps."""
        options = options or MAROptions()
        noise = keys.normal("noise", 1 + options.num_steps, self.length, self.token_dim)
        return {"order": keys.permutation("order", self.length), "noise": noise}

    def edit(
        self,
        tokens: Tensor,
        regenerate: Tensor,
        condition: Condition,
        options: MAROptions | None = None,
        *,
        draws: Draws | None = None,
        tokenizer: Expands | None = None,
    ) -> Tensor:
        """Regenerate some positions and keep the others: inpainting, or editing with another class.

        Args:
            tokens: (B, L, D) latents of the images.
            regenerate: (L,) or (B, L) bool, True where tokens are generated; a patch of the model is generated whole.
            condition: the class of the edited images.

        Returns:
            (B, L, D) latents.

        Raises:
            ValueError: latents of another tokenizer, or another shape of ``regenerate``.
        """
        regenerate = self.edited_positions(tokens, regenerate)
        device = self.members.device
        tokens, regenerate, condition = tokens.to(device), regenerate.to(device), condition.to(device)
        regenerate = regenerate[:, self.members].any(-1)  # (B, n), of the model's tokens
        counts, edited = regenerate.sum(1), torch.empty_like(tokens)
        for count in counts.unique():  # all rows of a session draw equally many tokens
            rows = (counts == count).nonzero()[:, 0]
            kept = (~regenerate[rows]).nonzero()[:, 1].view(len(rows), -1)
            positions = self.members[kept].flatten(1)
            chosen = None if draws is None else {name: value[rows.to(value.device)] for name, value in draws.items()}
            session = cast(MARSession, self.start(condition[rows], options, draws=chosen, tokenizer=tokenizer))
            session.append(take(tokens[rows], positions), positions)
            for _ in session.generate():
                pass
            edited[rows] = session.tokens.to(tokens)
        return edited

    @classmethod
    def from_official(cls, config: Mapping[str, Any], state_dict: Mapping[str, Tensor]) -> Self:
        return cls(**official.arguments(config)).with_official_weights(rename(state_dict, official.OFFICIAL_NAMES))


def take(values: Tensor, positions: Tensor) -> Tensor:
    """Values (B, L, d) at positions (B, n): (B, n, d)."""
    return values.gather(1, positions[..., None].expand(-1, -1, values.shape[2]))


def patch_members(spec: TokenSpec, patch_size: int) -> Tensor:
    """The raster indices (L / p^2, p^2) of the latents of every patch, patches and latents in raster order.

    Raises:
        ValueError: the patch does not divide the grid, or there is no grid.
    """
    return window_members(spec.length, spec.grid, patch_size, "patch_size")


def truncated_normal(uniforms: Tensor, low: float) -> Tensor:
    """Mask rates from uniforms: normal with mean 1 and standard deviation 0.25, truncated to [low, 1]."""
    below = torch.special.ndtr(torch.tensor((low - 1) / 0.25, dtype=torch.float64))
    return (1 + 0.25 * torch.special.ndtri(below + uniforms * (0.5 - below))).clamp(low, 1)

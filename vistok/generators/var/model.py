"""VAR: a transformer that predicts all tokens of a scale at once, from the feature map of the smaller scales.

Paper: Visual Autoregressive Modeling: Scalable Image Generation via Next-Scale Prediction (arXiv 2404.02905), section
3. Official weights and conventions: github.com/FoundationVision/VAR (MIT).
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vistok.checkpoints import OfficialCheckpoint
from vistok.draws import Draws, Keys
from vistok.generators.base import weighted_mean
from vistok.generators.engine.autoregressive import AutoregressiveGenerator
from vistok.generators.engine.cache import CachedLayers, of_layers
from vistok.generators.engine.plan import Plan
from vistok.generators.engine.sampling import DecodingOptions
from vistok.generators.engine.session import AutoregressiveSession
from vistok.generators.var import official
from vistok.generators.var.networks import SharedModulation, VARBlock
from vistok.generators.var.smooth import GUMBEL, SmoothSession
from vistok.nn.attention import Mask
from vistok.nn.containers import ModuleList
from vistok.nn.modulation import FinalModulation, modulation
from vistok.nn.rotary import Positions
from vistok.quantizers.bsq import correction_draws
from vistok.types import Clock, Condition, Expands, GeneratorOutput, TokenSpec, as_dataclass
from vistok.utils.devices import without_autocast

DEPTHS = (16, 20, 24, 30, 36)
GATE_INITS = {16: 1e-3, 20: 1e-3, 24: 1e-4, 30: 1e-5, 36: 5e-6}


@dataclass(frozen=True)
class VAROptions(DecodingOptions):
    """How scales are drawn; a step of guidance is a scale.

    The paper's guidance ramp with factor t is ``guidance_scale`` 1 + t with ``guidance_schedule`` "linear".

    Attributes:
        more_smooth: instead of drawing a code for each place, mix all codes by their probabilities, with noise whose
            share falls from scale to scale. Images get smoother, and the tokens are code vectors (B, L, D).

    The others are those of ``DecodingOptions``.
    """

    more_smooth: bool = False


class VAR(AutoregressiveGenerator):
    """A transformer over the tokens of growing grids, modulated by the class; a scale sees the smaller ones and itself.

    The input of a scale is the feature map that the tokenizer decodes from the smaller scales, so training and sampling
    need the tokenizer.

    Args:
        spec: the tokens to model: ids of several scales.
        num_classes: number of classes; 0 for unconditional generation.
        dim, num_layers, num_heads: width, blocks, heads; heads divide dim.
        mlp_ratio: hidden width of the feed-forward, in units of dim.
        shared_modulation: one modulation layer for all blocks; each block adds learned offsets.
        l2_norm: L2-normalise queries and keys (cosine attention).
        condition_dropout: share of training samples whose class is dropped, for guidance; with 0 there is no null
            class.
        attn_drop: dropout of the attention weights, in training.
        proj_drop: dropout of the outputs of attention and feed-forward, and of the feed-forward's hidden layer.
        drop_path: rate of stochastic depth of the last block; it rises linearly from 0 at the first.
        norm_eps: of all norms.
        gate_init: factor on the initial weights of the residual gates (alng of the official code); small for deep
            models.
        label_smoothing: of the cross entropy.
        progressive_share: share of the run in which scales join one after another; 0 trains all from the beginning.
        progressive_from: the last scale, counted from 0, in use at the beginning.
        progressive_after: steps before others join: those of the learning rate's warm-up.
        stage_warmup: steps in which the loss weight of a newly joined scale rises.
        self_correction: maximal probability of flipping input bits, so that later scales learn to correct errors
            (Infinity, arXiv 2412.04431, section 3.3; 0.3 there). The probability is drawn for each batch and scale, in
            hundredths from 0 to this. It needs a tokenizer with the quantizer multi_scale_bsq, and a cache of its
            latents.

    Raises:
        ValueError: a spec without ids or scales, progressive_from that is no scale, negative steps, or a share outside
            [0, 1].
    """

    norm: FinalModulation
    output: nn.Linear
    scales: Tensor

    only_next = "it predicts a scale of tokens at once, from the map of the smaller ones"
    registry_name = "var"
    options_type = VAROptions
    needs_tokenizer = True
    tiny = {
        "spec": official.spec_of((1, 2, 3, 4), 32, 4),
        "num_classes": 5,
        "dim": 16,
        "num_layers": 2,
        "num_heads": 2,
        "gate_init": 0.5,
    }
    sizes = {
        f"d{depth}": {k: v for k, v in official.size(depth).items() if k != "spec"} | {"gate_init": GATE_INITS[depth]}
        for depth in DEPTHS
    }
    checkpoints = tuple(
        OfficialCheckpoint(
            "FoundationVision/var",
            f"var_d{depth}.pth",
            official.config(depth),
            # The 512 px model uses the same tokenizer file, but the tokenizer's arguments must state that size.
            tokenizer="FoundationVision/var/vae_ch160v4096z32.pth" if depth < 36 else None,
        )
        for depth in DEPTHS
    )

    def __init__(
        self,
        spec: TokenSpec,
        num_classes: int = 1000,
        dim: int = 1024,
        num_layers: int = 16,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        shared_modulation: bool = False,
        l2_norm: bool = True,
        condition_dropout: float = 0.1,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        drop_path: float = 0.0,
        norm_eps: float = 1e-6,
        gate_init: float = 1e-3,
        label_smoothing: float = 0.0,
        progressive_share: float = 0.0,
        progressive_from: int = 4,
        progressive_after: int = 0,
        stage_warmup: int = 0,
        self_correction: float = 0.0,
    ):
        super().__init__()
        self.spec = self.check_spec(as_dataclass(TokenSpec, spec), type(self).__name__)
        if not self.spec.scales:
            raise ValueError(
                "VAR predicts one scale after another; these tokens have no scales: take a multi-scale tokenizer"
            )
        for name, value in (("progressive_after", progressive_after), ("stage_warmup", stage_warmup)):
            if value < 0:
                raise ValueError(f"{name} counts steps and must not be negative, got {value}")
        if not 0 <= label_smoothing <= 1:
            raise ValueError(f"label_smoothing must lie in [0, 1], got {label_smoothing}")
        if not 0 <= progressive_share <= 1:
            raise ValueError(f"progressive_share must lie in [0, 1], got {progressive_share}")
        if progressive_share and not 0 <= progressive_from < len(self.spec.scales):
            raise ValueError(
                f"progressive_from {progressive_from} is no scale: these tokens have scales 0..{len(spec.scales) - 1}"
            )
        if not 0 <= self_correction <= 1:
            raise ValueError(f"self_correction is a probability in [0, 1], got {self_correction}")
        self.self_correction, self.reads_latents = self_correction, self_correction > 0
        self.num_classes, self.condition_dropout = num_classes or None, condition_dropout
        self.label_smoothing = label_smoothing
        self.progressive_share, self.progressive_from = progressive_share, progressive_from
        self.progressive_after, self.stage_warmup = progressive_after, stage_warmup
        self.scale_sizes = tuple(math.prod(scale) for scale in self.spec.scales)
        self.condition_length = self.scale_sizes[0]
        self.input = nn.Linear(self.spec.dim, dim)
        self.class_embedding = nn.Embedding(num_classes + 1, dim)
        self.start_positions = nn.Parameter(torch.zeros(1, self.scale_sizes[0], dim))
        self.positions = nn.Parameter(torch.zeros(1, self.spec.length, dim))
        self.scale_embedding = nn.Embedding(len(self.scale_sizes), dim)
        self.shared_modulation = modulation(dim, 6) if shared_modulation else None
        self.blocks = ModuleList(
            VARBlock(
                dim,
                num_heads,
                mlp_ratio=mlp_ratio,
                shared_modulation=shared_modulation,
                l2_norm=l2_norm,
                attn_drop=attn_drop,
                proj_drop=proj_drop,
                drop_path=drop_path * i / max(num_layers - 1, 1),
                eps=norm_eps,
            )
            for i in range(num_layers)
        )
        self.norm = FinalModulation(dim, norm_eps)
        self.output = nn.Linear(dim, self.spec.num_ids)
        scales = [k for k, size in enumerate(self.scale_sizes) for _ in range(size)]
        self.register_buffer("scales", torch.tensor(scales), persistent=False)  # (L,), the scale of each token
        self._initialise(dim, gate_init)

    @torch.no_grad()
    def _initialise(self, dim: int, gate_init: float) -> None:
        std = math.sqrt(1 / (3 * dim))
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.trunc_normal_(module.weight, std=std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        for table in (self.start_positions, self.positions):
            nn.init.trunc_normal_(table, std=std)
        self.output.weight.mul_(0.02)
        self.norm.modulation[1].weight.mul_(0.5)
        for block in self.blocks:
            for layer in (block.attn.out, block.mlp.down):
                layer.weight.div_(math.sqrt(2 * len(self.blocks)))
            if isinstance(block.modulation, SharedModulation):
                offsets = block.modulation.offsets
                nn.init.normal_(offsets, std=1 / math.sqrt(dim))
                parts = offsets.flatten(0, -2)  # (6, D)
                parts[:2].mul_(gate_init)
                parts[2:].mul_(0.5)
            else:
                weight = block.modulation.modulation[1].weight
                weight[: 2 * dim].mul_(gate_init)
                weight[2 * dim :].mul_(0.5)

    def check_tokenizer(self, tokenizer: Expands | None) -> None:
        """As for every generator; also raises ValueError if the tokenizer's spec is not the model's."""
        super().check_tokenizer(tokenizer)
        spec = getattr(tokenizer, "spec", self.spec)
        if spec != self.spec:
            raise ValueError(f"this model is of other tokens than its tokenizer's: {self.spec}, not {spec}")

    # -----------------------------------------------------------------------------------------------------------------
    # The interface of the engine

    @property
    def num_entries(self) -> int:
        """One per token: the class at the places of the first scale, then the feature map so far on each next grid."""
        return self.spec.length

    def plan(self, draws: Draws) -> Plan:
        return Plan(torch.arange(self.spec.length)[None], self.scale_sizes, is_raster=True)

    def class_vector(self, condition: Condition) -> Tensor:
        """(R, D) embeddings of the condition, which modulate every position of a row."""
        return self.class_embedding(self.class_rows(condition))

    def condition_state(self, condition: Condition) -> tuple[Tensor, ...]:
        return (self.class_vector(condition),)

    def embed_condition(self, condition: Condition, upcoming: Tensor) -> Tensor:
        """(R, n, D): the class at every place of the first scale."""
        return self.class_vector(condition)[:, None] + self.start_positions + self._places(upcoming)

    def embed_tokens(self, ids: Tensor, places: Tensor, upcoming: Tensor) -> Tensor:
        """(R, m, D) of the feature map so far on the next grid, ``ids`` (R, m, E), with scale and place embeddings."""
        return self.input(ids.to(self.input.weight.dtype)) + self._places(upcoming)

    def _places(self, places: Tensor) -> Tensor:
        return self.scale_embedding(self.scales[places]) + self.positions[0, places]

    def attention_mask(self, condition: Condition, start: int, stop: int) -> Tensor | None:
        """A scale sees itself and the smaller ones."""
        return (self.scales[start:stop, None] >= self.scales[None, :stop])[None, None]

    def transform(
        self, x: Tensor, positions: Positions, mask: Mask | None, kv_cache: CachedLayers | None, *state: Tensor
    ) -> Tensor:
        (class_vector,), shared = state, self.shared_modulation
        condition = class_vector if shared is None else shared(class_vector)
        if kv_cache is not None:  # a step is a scale: it sees all that is cached
            mask = None
        for block, memory in zip(self.blocks, of_layers(kv_cache, len(self.blocks))):
            x = block(x, condition, mask, memory)
        return self.norm(x, class_vector[:, None])

    def head(self, hidden: Tensor) -> Tensor:
        return self.output(hidden).float()

    def compile_decoding(self, backend: str = "inductor") -> None:
        raise ValueError("VAR has no compiled decoding: its few steps are large, and each has a size of its own")

    # -----------------------------------------------------------------------------------------------------------------
    # Training

    def training_draws(self, keys: Keys) -> Draws:
        """ "drop" (B,) uniform; with self-correction also those of ``correction_draws``."""
        draws = super().training_draws(keys)
        if self.self_correction:
            draws |= correction_draws(keys, self.spec.length, self.spec.dim, len(self.scale_sizes))
        return draws

    def logits(self, ids: Tensor, condition: Condition, tokenizer: Expands | None = None) -> Tensor:
        """Teacher-forced logits (B, L, V) of ids (B, L), each scale from all smaller ones; needs the tokenizer."""
        return self.logits_of(self._inputs(ids, tokenizer), condition)

    def _inputs(self, ids: Tensor, tokenizer: Expands | None) -> Tensor:
        """The inputs (B, L - n, E) of ``logits_of`` for ids (B, L)."""
        expander = self.needed_tokenizer(tokenizer).expander()
        if ids.shape[1:] != (self.spec.length,):
            raise ValueError(f"tokens must be (B, {self.spec.length}), of all scales; got {tuple(ids.shape)}")
        with without_autocast(ids.device):
            return expander.expand(ids).to(ids.device)

    def _corrected(self, latents: Tensor, draws: Draws | None, tokenizer: Expands | None) -> tuple[Tensor, Tensor]:
        """The inputs of ``logits_of`` for latents (B, h * w, D), with some bits flipped in training, and the ids (B, L)
        to predict."""
        turned = draws if self.training and self.self_correction else None
        expander = self.needed_tokenizer(tokenizer).expander()
        with without_autocast(latents.device):
            return expander.correct(latents, turned, self.self_correction)

    def training_logits(self, tokens: Tensor, condition: Condition, draws: Draws, tokenizer: Expands | None) -> Tensor:
        return self.logits(tokens, condition, tokenizer)

    def logits_of(self, inputs: Tensor, condition: Condition, num_scales: int | None = None) -> Tensor:
        """Logits (B, l, V) of the first ``num_scales`` scales (None: of all), from the inputs (B, L - n, E) of all
        scales but the first, which has n tokens."""
        length = sum(self.scale_sizes[:num_scales])
        first, places = self.condition_length, torch.arange(length, device=inputs.device)[None]
        inputs = inputs[:, : length - first].to(self.input.weight.dtype)
        x = self.embed_condition(condition, places[:, :first])
        x = torch.cat([x, self.embed_tokens(inputs, places[:, :first], places[:, first:])], 1)
        mask = self.attention_mask(condition, 0, length)
        return self.head(self.transform(x, slice(0, length), mask, None, self.class_vector(condition)))

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
        """Cross entropy in nats per token of ids (B, L), or of the ids of latents (B, h * w, D), some of whose bits are
        flipped in training. Metrics: "accuracy", and "last_loss" and "last_accuracy" of the largest scale in use.

        In progressive training, scales beyond the current stage are left out; the weights of the others do not grow.
        """
        condition = self.drop_condition(condition, draws)
        if tokens.is_floating_point():
            inputs, tokens = self._corrected(tokens, draws, tokenizer)
        else:
            inputs = self._inputs(tokens if context is None else context, tokenizer)
        stage, warmth = self._stage(clock)
        logits = self.logits_of(inputs, condition, stage + 1)
        tokens = tokens[:, : logits.shape[1]]
        per_token = self.cross_entropy(logits, tokens)
        per_sample = per_token @ self.token_weights(stage, warmth)
        loss = weighted_mean(per_sample, weights)
        right, last = (logits.detach().argmax(-1) == tokens).float(), self.scale_sizes[stage]
        metrics = {
            "accuracy": right.mean(),
            "last_loss": per_token.detach()[:, -last:].mean(),
            "last_accuracy": right[:, -last:].mean(),
        }
        return GeneratorOutput(loss, logits, metrics)

    def cross_entropy(self, logits: Tensor, tokens: Tensor) -> Tensor:
        """Cross entropy (B, l) in nats of logits (B, l, V)."""
        smoothing = self.label_smoothing if self.training else 0.0
        return F.cross_entropy(logits.transpose(1, 2), tokens, reduction="none", label_smoothing=smoothing)

    def token_weights(self, stage: int, warmth: float = 1.0) -> Tensor:
        """(l,) loss weights of the tokens up to scale ``stage``: 1 / L, times ``warmth`` for those of that scale."""
        scales = self.scales[: sum(self.scale_sizes[: stage + 1])]
        return torch.where(scales == stage, warmth, 1.0) / self.spec.length

    def stage_at(self, step: int, max_steps: int) -> int:
        """The last scale in use at an optimisation step."""
        last, first = len(self.scale_sizes) - 1, self.progressive_from
        end = self.progressive_share * max_steps
        if self.progressive_share and step <= self.progressive_after:  # even if the progressive share is shorter
            return first
        if step >= end:
            return last
        return first + round((step - self.progressive_after) / (end - self.progressive_after) * (last - first))

    def _stage(self, clock: Clock | None) -> tuple[int, float]:
        """The last scale in use, and the relative loss weight of its tokens."""
        if clock is None or not self.training or not self.progressive_share:
            return len(self.scale_sizes) - 1, 1.0
        stage = self.stage_at(clock.step, clock.max_steps)
        if stage == self.progressive_from or not self.stage_warmup:
            return stage, 1.0
        begun = bisect_left(range(clock.step), stage, key=lambda step: self.stage_at(step, clock.max_steps))
        return stage, stage_warmth(clock.step - begun, self.stage_warmup)

    # -----------------------------------------------------------------------------------------------------------------
    # Sampling

    def sampling_draws(self, keys: Keys, options: DecodingOptions | None = None) -> Draws:
        """ "ids" (B, L) uniform, in order; for smooth sampling also "gumbel" (B, L, V), Gumbel noise."""
        options = options or VAROptions()
        draws = super().sampling_draws(keys, options)
        if isinstance(options, VAROptions) and options.more_smooth:
            uniforms = keys.uniform("gumbel", self.spec.length, self.spec.num_ids)
            draws[GUMBEL] = -(-uniforms.clamp_min(torch.finfo(torch.float32).tiny).log()).log()
        return draws

    def session_type(self, options: DecodingOptions) -> type[AutoregressiveSession]:
        smooth = isinstance(options, VAROptions) and options.more_smooth
        return SmoothSession if smooth else super().session_type(options)

    @classmethod
    def from_official(cls, config: Mapping[str, Any], state_dict: Mapping[str, Tensor]) -> Self:
        return cls(**official.arguments(config, state_dict)).with_official_weights(official.our_names(state_dict))


def stage_warmth(steps: int, warmup: int) -> float:
    """The relative loss weight of a scale's tokens ``steps`` steps after it joined."""
    return min(max(steps / warmup, 0.01), 1.0)

"""xAR: next-X prediction. One transformer generates an image entity by entity, each by flow matching.

Paper: Beyond Next-Token: Next-X Prediction for Autoregressive Visual Generation (arXiv 2502.20388). The released
weights (github.com/OliverRensu/xAR) predict cells of 8x8 tokens; this implementation takes any ``LayoutConfig``.

Time runs from data at 0 to noise at 1. Every entity of a training sequence has its own noise level, and sees the noisy
entities before it (noisy context learning). So the context is imperfect in training, as it is in sampling.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Self
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vistok.checkpoints import CheckpointError, OfficialCheckpoint, rename
from vistok.checkpoints.official_config import OfficialConfig
from vistok.draws import Draws, Keys
from vistok.flow import TimeSampling
from vistok.generators.base import weighted_mean
from vistok.generators.engine.cache import KVCache
from vistok.generators.engine.continuous import ContinuousGenerator
from vistok.generators.xar.layouts import EntityLayout, LayoutConfig, block_causal_mask
from vistok.generators.xar.sampling import PATH, XAROptions, XARSession
from vistok.nn.attention import Attention, LayerCache
from vistok.nn.containers import ModuleList
from vistok.nn.flex import FEWEST_CHANNELS, FlexMask, block_causal
from vistok.nn.mlp import GatedMLP
from vistok.nn.modulation import modulate
from vistok.nn.norms import RMSNorm
from vistok.nn.rotary import FixedRotation, Rotation, rotation_table
from vistok.nn.timesteps import TimestepEmbedding
from vistok.types import Clock, Condition, Expands, GeneratorOutput, TokenSpec, as_dataclass

SIZES = {
    "B": {"dim": 768, "num_encoder_layers": 8, "num_decoder_layers": 8, "num_heads": 12},
    "L": {"dim": 1024, "num_encoder_layers": 16, "num_decoder_layers": 16, "num_heads": 16},
    "H": {"dim": 1280, "num_encoder_layers": 20, "num_decoder_layers": 20, "num_heads": 16},
}
NORM_EPS = 1e-6
CELLS = LayoutConfig("cell", 8)
TRAINING_TIMES = TimeSampling("logit_normal")


def _official(size: str) -> dict[str, Any]:
    dim, num_encoder_layers, num_decoder_layers, num_heads = SIZES[size].values()
    return {
        "encoder_embed_dim": dim,
        "encoder_depth": num_encoder_layers,
        "encoder_num_heads": num_heads,
        "decoder_embed_dim": dim,
        "decoder_depth": num_decoder_layers,
        "decoder_num_heads": num_heads,
        "attn_dropout": 0.1,
        "proj_dropout": 0.1,
    }


class XARBlock(nn.Module):
    """Transformer block modulated by a condition per entity: (B, n, D) -> (B, n, D)."""

    def __init__(self, dim: int, num_heads: int, hidden_dim: int, attn_drop: float, proj_drop: float):
        super().__init__()
        self.attn = Attention(dim, num_heads, attn_drop=attn_drop, proj_drop=proj_drop)
        self.mlp = GatedMLP(dim, hidden_dim, F.gelu, hidden_drop=proj_drop, drop=proj_drop)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(
        self,
        x: Tensor,
        condition: Tensor,
        spread: Tensor | None,
        rotation: Rotation,
        mask: Tensor | FlexMask | None,
        cache: LayerCache | None,
    ) -> Tensor:
        """``condition`` is (B, e, D), one per entity; ``spread`` (n,) is the entity of each position, None if all
        entities have the same size."""
        parts = self.modulation(condition)  # (B, e, 6 D)
        parts = parts if spread is None else parts[:, spread]
        gate1, gate2, scale1, scale2, shift1, shift2 = parts.unsqueeze(2).chunk(6, -1)
        x = x.unflatten(1, (parts.shape[1], -1))  # (B, e, n / e, D)
        y = self.attn(modulate(_norm(x), shift1, scale1).flatten(1, 2), rotation=rotation, mask=mask, cache=cache)
        x = x + gate1 * y.view_as(x)
        x = x + gate2 * self.mlp(modulate(_norm(x), shift2, scale2))
        return x.flatten(1, 2)


def _norm(x: Tensor) -> Tensor:
    """RMS norm without weight, in float32."""
    return F.rms_norm(x.float(), x.shape[-1:], eps=NORM_EPS).type_as(x)


class XAR(ContinuousGenerator):
    """The transformer of xAR.

    Args:
        spec: the tokens to model: continuous latents.
        num_classes: number of classes; 0 for unconditional generation.
        dim, num_heads: width and heads; the width of a head must be divisible by 4.
        num_encoder_layers, num_decoder_layers: blocks before and after the second position embedding.
        mlp_ratio: hidden width of the feed-forward, in units of two thirds of dim.
        layout: the entity that is predicted next, and its size.
        condition_dropout: share of training samples whose class is dropped, for guidance; with 0 guidance is refused.
        attn_drop, proj_drop: of the attention weights, and of the outputs of attention and feed-forward.
        rope_base: base of the rotary frequencies.

    Raises:
        ValueError: discrete tokens, or a layout that does not fit their grid.
    """

    entity_of: Tensor

    registry_name = "xar"
    only_next = "it predicts velocities of latents, and these have no cross entropy"
    tiny = {
        "spec": TokenSpec(16, None, dim=4, grid=(4, 4)),
        "num_classes": 5,
        "dim": 16,
        "num_encoder_layers": 1,
        "num_decoder_layers": 1,
        "num_heads": 2,
        "layout": {"entity": "cell", "size": 2},
    }
    options_type = XAROptions
    session_type = XARSession
    sizes = SIZES
    checkpoints = tuple(
        OfficialCheckpoint("OliverRen/xAR", f"xAR-{size}.pth", _official(size), tokenizer="kl16.ckpt")
        for size in ("B", "L", "H")
    )

    def __init__(
        self,
        spec: TokenSpec,
        num_classes: int = 1000,
        dim: int = 768,
        num_encoder_layers: int = 8,
        num_decoder_layers: int = 8,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        layout: LayoutConfig = CELLS,
        condition_dropout: float = 0.1,
        attn_drop: float = 0.1,
        proj_drop: float = 0.1,
        rope_base: float = 10000.0,
    ):
        super().__init__()
        self.spec = self.check_spec(as_dataclass(TokenSpec, spec), type(self).__name__)
        self.layout = as_dataclass(LayoutConfig, layout).build(self.spec)
        self.register_buffer("entity_of", self.layout.entity_of, persistent=False)  # (N,), the entity of each position
        self.num_classes, self.condition_dropout = num_classes or None, condition_dropout
        self.attn_drop = attn_drop
        self.class_embedding = nn.Embedding(num_classes + 1, dim)  # the last is the null class
        self.time_embedding = TimestepEmbedding(dim, 256)
        self.input = nn.Linear(self.spec.dim, dim)
        self.input_norm = RMSNorm(dim, NORM_EPS)
        self.encoder_positions = nn.Parameter(torch.empty(1, self.layout.length, dim))
        self.decoder_positions = nn.Parameter(torch.empty(1, self.layout.length, dim))

        def blocks(count: int) -> ModuleList:
            hidden_dim = int(dim * mlp_ratio * 2 / 3)
            return ModuleList(XARBlock(dim, num_heads, hidden_dim, attn_drop, proj_drop) for _ in range(count))

        self.encoder_blocks, self.decoder_blocks = blocks(num_encoder_layers), blocks(num_decoder_layers)
        self.encoder_norm, self.decoder_norm = RMSNorm(dim, NORM_EPS), RMSNorm(dim, NORM_EPS)
        self.bridge = nn.Linear(dim, dim)
        self.output = nn.Linear(dim, self.spec.dim)
        table = rotation_table(self.layout.coordinates, dim // num_heads, base=rope_base)
        self.rotation = FixedRotation(table)
        self.apply(_initialise)
        for positions in (self.encoder_positions, self.decoder_positions):
            nn.init.normal_(positions, std=0.02)

    def velocity(self, noisy: Tensor, times: Tensor, condition: Condition) -> Tensor:
        """The velocities (R, n, D) of noisy entities, each seeing itself and those before it.

        Args:
            noisy: (R, n, D), the first entities of the sequence, in the layout's order.
            times: (R, e) in [0, 1], the noise level of each entity.
        """
        entities = range(times.shape[1])
        if noisy.shape[1] != self.layout.bounds[len(entities)]:
            expected = self.layout.bounds[len(entities)]
            raise ValueError(f"{len(entities)} entities have {expected} positions, got {noisy.shape[1]}")
        return self.transform(noisy, times, self.class_embedding(self.class_rows(condition)), entities)

    def transform(
        self, noisy: Tensor, times: Tensor, classes: Tensor, entities: range, cache: KVCache | None = None
    ) -> Tensor:
        """The velocities (R, n, D) of consecutive entities.

        Args:
            noisy: (R, n, D) latents, in the layout's order.
            times: (R, e) in [0, 1], the noise level of each entity.
            classes: (R, D') class embeddings.
            entities: the entities of ``noisy``.
            cache: keys and values of all earlier entities; those of ``noisy`` are appended.
        """
        bounds = self.layout.bounds
        start, stop = bounds[entities.start], bounds[entities.stop]
        sizes = self.layout.sizes[entities.start : entities.stop]
        even = len(set(sizes)) == 1
        spread = None if even else self.entity_of[start:stop] - entities.start
        condition = classes[:, None] + self.embed_times(times)
        shared = (condition, spread, self.rotation(slice(start, stop)), self._mask(entities, noisy.device))
        memories = iter(cache.layers if cache else [None] * (len(self.encoder_blocks) + len(self.decoder_blocks)))

        x = self.input_norm(self.input(noisy) + self.encoder_positions[:, start:stop])
        for block in self.encoder_blocks:
            x = block(x, *shared, next(memories))
        x = self.bridge(self.encoder_norm(x)) + self.decoder_positions[:, start:stop]
        for block in self.decoder_blocks:
            x = block(x, *shared, next(memories))
        return self.output(self.decoder_norm(x))

    def embed_times(self, times: Tensor) -> Tensor:
        """Times (R, e) in [0, 1] to (R, e, D), in steps of 1 / 1000."""
        # Truncated in float32, as in the training of the released models.
        index = (times.float() * 1000).long()
        return self.time_embedding(index.flatten()).unflatten(0, times.shape)

    def _mask(self, entities: range, device: torch.device) -> Tensor | FlexMask | None:
        """The block-causal mask of these entities over all entities up to them; None for one entity, which sees all."""
        if len(entities) == 1:
            return None
        dropout = self.training and self.attn_drop
        wide = self.encoder_blocks[0].attn.head_dim >= FEWEST_CHANNELS
        if device.type == "cuda" and wide and entities.start == 0 and not dropout:
            return _flex_mask(self.layout, len(entities), device)
        start, stop = self.layout.bounds[entities.start], self.layout.bounds[entities.stop]
        return block_causal_mask(self.entity_of[:stop], start)

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
        """Mean squared error of the velocities noise - data, with each entity at its own noise level.

        Entities that a context replaces are left out of the loss: they are no data, so their velocities are undefined.

        Raises:
            ValueError: no draws, or latents of another tokenizer.
        """
        self.check_tokenizer(tokenizer)
        if draws is None:
            raise ValueError("flow matching trains on noise: pass training_draws(keys)")
        self.spec.check_latents(tokens)
        condition = self.drop_condition(condition, draws)
        sequence, noise, times = self.layout.to_sequence(tokens), draws["noise"], draws["time"]
        noisy = self.noisy(sequence if context is None else context, noise, times)
        prediction = self.velocity(noisy, times, condition)
        errors = (prediction - PATH.velocity(sequence, noise)).square()
        if context is None:
            per_sample = errors.flatten(1).mean(1)
        else:
            kept = self._all_of_entity((context == sequence).all(2))
            per_sample = (errors.mean(2) * kept).sum(1) / kept.sum(1).clamp_min(1)
        loss = weighted_mean(per_sample, weights)
        return GeneratorOutput(loss, prediction)

    def _all_of_entity(self, values: Tensor) -> Tensor:
        """(B, N) bool, True at the positions of entities whose values (B, N) are all True."""
        wrong = torch.zeros(len(values), self.layout.num_entities, device=values.device)
        return wrong.index_add(1, self.entity_of, (~values).float())[:, self.entity_of] == 0

    @property
    def context_shape(self) -> tuple[int, ...]:
        """(N, D), in the layout's order."""
        return (self.layout.length, self.spec.dim)

    def context_of(self, tokens: Tensor) -> Tensor:
        return self.layout.to_sequence(tokens)

    def replaced(self, uniforms: Tensor, share: float, draws: Draws) -> Tensor:
        """Whole entities are replaced, but never the last, which is no entity's context."""
        return (uniforms[:, self.entity_of] < share) & (self.entity_of < self.layout.num_entities - 1)

    def own_tokens(
        self,
        tokens: Tensor,
        replaced: Tensor,
        condition: Condition,
        draws: Draws,
        tokenizer: Expands | None = None,
    ) -> Tensor:
        """The data estimates of the training pass, each entity from its own noise level."""
        noise, times = draws["noise"], draws["time"]
        noisy = self.noisy(self.context_of(tokens), noise, times)
        velocity = self.velocity(noisy, times, self.drop_condition(condition, draws))
        levels = times[:, self.entity_of]
        return PATH.data_estimate(noisy.flatten(0, 1), velocity.flatten(0, 1), levels.flatten()).view_as(noisy)

    def noisy(self, sequence: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """A sequence (B, N, D) with noise at the level times (B, E) of each entity."""
        levels = times[:, self.entity_of]  # (B, N)
        return PATH.interpolate(sequence.flatten(0, 1), noise.flatten(0, 1), levels.flatten()).view_as(sequence)

    def training_draws(self, keys: Keys) -> Draws:
        """ "drop" (B,) uniform, "time" (B, E) in [0, 1], "noise" (B, N, D) normal."""
        return {
            "drop": keys.uniform("drop"),
            "time": TRAINING_TIMES.from_normals(keys.normal("time", self.layout.num_entities)),
            "noise": keys.normal("noise", self.layout.length, self.spec.dim),
        }

    def sampling_draws(self, keys: Keys, options: XAROptions | None = None) -> Draws:
        """Normal: "noise" (B, N, D), the start of entities; "steps" (B, num_steps - 1, N, D) for the stochastic solver;
        "context" (B, N, D) for noisy contexts."""
        options = options or XAROptions()
        shape = (self.layout.length, self.spec.dim)
        draws = {"noise": keys.normal("noise", *shape)}
        if options.solver == "euler_maruyama":
            draws["steps"] = keys.normal("steps", options.num_steps - 1, *shape)
        if options.context_noise:
            draws["context"] = keys.normal("context", *shape)
        return draws

    def new_cache(self, rows: int) -> KVCache:
        """An empty cache of the whole sequence."""
        attention, weight = self.encoder_blocks[0].attn, self.output.weight
        layers = len(self.encoder_blocks) + len(self.decoder_blocks)
        sizes = (layers, rows, attention.num_heads, self.layout.length, attention.head_dim)
        return KVCache(*sizes, dtype=weight.dtype, device=weight.device)

    @classmethod
    def from_official(cls, config: Mapping[str, Any], state_dict: Mapping[str, Tensor]) -> Self:
        given = OfficialConfig(config, WITHOUT_EFFECT)
        side = given.take("img_size", 256) // given.take("vae_stride", 16) // given.take("patch_size", 1)
        cell = _cell_side(side, given.take("clusters", 4))
        dim, num_heads = given.take("encoder_embed_dim"), given.take("encoder_num_heads")
        for name, value in (("embed_dim", dim), ("num_heads", num_heads)):
            given.require(f"decoder_{name}", value, why="it is that of the encoder, as in every released model")
        model = cls(
            TokenSpec(side * side, None, given.take("vae_embed_dim", 16), grid=(side, side)),
            # The reference always builds 1000 classes and the null class, whatever its arguments say.
            num_classes=state_dict["class_emb.weight"].shape[0] - 1 if "class_emb.weight" in state_dict else 1000,
            dim=dim,
            num_encoder_layers=given.take("encoder_depth"),
            num_decoder_layers=given.take("decoder_depth"),
            num_heads=num_heads,
            mlp_ratio=given.take("mlp_ratio", 4.0),
            layout=LayoutConfig("cell", cell),
            condition_dropout=given.take("label_drop_prob", 0.1),
            attn_drop=given.take("attn_dropout", 0.1),
            proj_drop=given.take("proj_dropout", 0.1),
        )
        given.finish()
        # The released files hold the mask and rotary tables, which follow from the layout.
        state = {key: t for key, t in state_dict.items() if key != "mask" and ".attn.rope.freqs" not in key}
        return model.with_official_weights(rename(state, OFFICIAL_NAMES))


WITHOUT_EFFECT = {
    "class_num": "the reference always builds 1000 classes and the null class",
    "norm_layer": "the reference builds its norms whatever this says",
    "qk_norm": "the reference never norms queries and keys",
    "init_values": "the reference scales no layer",
    "grad_checkpointing": "saves memory in training",
}
"""Arguments of the reference that do not change what the model computes, each with the reason."""

OFFICIAL_NAMES = [
    (r"class_emb\.weight", r"class_embedding.weight"),
    (r"time_embed\.mlp\.(\d)\.(\w+)", r"time_embedding.mlp.\1.\2"),
    (r"z_proj\.(\w+)", r"input.\1"),
    (r"z_proj_ln\.weight", r"input_norm.weight"),
    (r"(encoder|decoder)_pos_embed_learned", r"\1_positions"),
    (r"decoder_embed\.(\w+)", r"bridge.\1"),
    (r"pred\.(\w+)", r"output.\1"),
    (r"(\w+_blocks\.\d+)\.attn\.proj\.(\w+)", r"\1.attn.out.\2"),
    (r"(\w+_blocks\.\d+)\.mlp\.fc1_g\.(\w+)", r"\1.mlp.gate.\2"),
    (r"(\w+_blocks\.\d+)\.mlp\.fc1_x\.(\w+)", r"\1.mlp.up.\2"),
    (r"(\w+_blocks\.\d+)\.mlp\.fc2\.(\w+)", r"\1.mlp.down.\2"),
    (r"(\w+_blocks\.\d+)\.ada_lin\.1\.(\w+)", r"\1.modulation.1.\2"),
]


def _cell_side(side: int, clusters: int) -> int:
    """Side of a cell if ``clusters`` of them tile a square of ``side`` tokens."""
    rows = math.isqrt(clusters)
    if rows * rows != clusters or side % rows:
        raise CheckpointError(f"clusters {clusters} is not the number of square cells of a {side}x{side} token grid")
    return side // rows


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)


_flex_masks: WeakKeyDictionary[EntityLayout, dict[tuple[int, torch.device], FlexMask]] = WeakKeyDictionary()


def _flex_mask(layout: EntityLayout, entities: int, device: torch.device) -> FlexMask:
    """The mask of the first entities. It takes several operations, so it is kept for as long as its layout. It is no
    attribute of the model, whose copies and pickles must do without it."""
    masks = _flex_masks.setdefault(layout, {})
    if (entities, device) not in masks:
        masks[entities, device] = block_causal(layout.entity_of[: layout.bounds[entities]].to(device))
    return masks[entities, device]

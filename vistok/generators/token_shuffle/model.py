"""Token-Shuffle: a Llama that reads and writes a window of s x s image tokens at every position, after a text.

Paper: Token-Shuffle: Towards High-Resolution Image Generation with Autoregressive Models (arXiv 2504.17789). There is
no released code; choices that the paper leaves open are arguments of :class:`TokenShuffle`.

The order of tokens is not shuffled: the tokens of a window are compressed one by one and concatenated along the
channels. The sequence is [begin, text, begin of image, windows]; the ids of a window are predicted together,
independently of each other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vistok.conditions import ConditionPart
from vistok.data.streams import Streams
from vistok.draws import Draws
from vistok.generators.base import Conversation, weighted_mean
from vistok.generators.engine.autoregressive import AutoregressiveGenerator
from vistok.generators.engine.cache import CachedLayers, of_layers
from vistok.generators.engine.plan import Plan
from vistok.generators.engine.sampling import DecodingOptions
from vistok.generators.llama import LlamaBlock
from vistok.generators.token_shuffle.joint import stream_losses, write
from vistok.guidance.schedules import ScheduleName
from vistok.nn.attention import Mask
from vistok.nn.containers import ModuleList
from vistok.nn.masks import prolonged, visible_causal_mask
from vistok.nn.mlp import MLP, rounded_hidden_dim
from vistok.nn.norms import RMSNorm
from vistok.nn.rotary import FixedRotation, Positions, rotation_table
from vistok.nn.windows import window_members
from vistok.types import (
    Clock,
    Condition,
    ConditionSpec,
    Expands,
    GeneratorOutput,
    IdSpec,
    JointVocabulary,
    TokenSpec,
    as_dataclass,
)

SIZES = {"2.7B": {"dim": 3072, "num_layers": 20, "num_heads": 24}}
MARKS = ("begin", "begin_image", "end_image")


@dataclass(frozen=True)
class TokenShuffleOptions(DecodingOptions):
    """How ids are drawn; by default the guidance scale rises over the first half of the windows."""

    guidance_schedule: ScheduleName = "half-linear"


class ResidualMLP(nn.Module):
    """x + W2 gelu(W1 norm(x)), without biases: (..., D) -> (..., D). W2 starts at zero, the layer as the identity."""

    def __init__(self, dim: int, ratio: float, eps: float):
        super().__init__()
        self.norm = RMSNorm(dim, eps)
        self.mlp = MLP(dim, int(dim * ratio), F.gelu, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.norm(x))


class Fold(nn.Module):
    """Folds the tokens of a window into one: compresses each, concatenates all, and mixes them by residual layers.

    Args:
        dim: width D, a multiple of size^2.
        size: s, the side of a window.
        num_blocks: number of residual layers.
        ratio: hidden width of the residual layers, in units of dim.
        eps: of the RMS norms.
    """

    def __init__(self, dim: int, size: int, num_blocks: int, ratio: float, eps: float):
        super().__init__()
        self.compress = nn.Linear(dim, dim // size**2)
        self.blocks = nn.Sequential(*(ResidualMLP(dim, ratio, eps) for _ in range(num_blocks)))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(F.gelu(self.compress(x)).flatten(-2))  # (B, M, s^2, D) -> (B, M, s^2, D / s^2) -> (B, M, D)


class Unfold(nn.Module):
    """Unfolds a window into its tokens, the mirror image of :class:`Fold`: (B, M, D) -> (B, M, s^2, D)."""

    def __init__(self, dim: int, size: int, num_blocks: int, ratio: float, eps: float):
        super().__init__()
        self.size = size
        self.blocks = nn.Sequential(*(ResidualMLP(dim, ratio, eps) for _ in range(num_blocks)))
        self.expand = nn.Linear(dim // size**2, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.expand(self.blocks(x).unflatten(-1, (self.size**2, -1)))


class TokenShuffle(AutoregressiveGenerator):
    """A causal transformer over [begin, text, begin of image, windows of image tokens, end of image].

    The text is a class, text ids, or both. Text ids, image ids and special tokens share one vocabulary, one embedding
    and one head. Text is padded on the left, so the image always begins at the same position. Without a text the
    sequence is [begin, begin of image, windows ...], which is the null row of guidance.

    Args:
        spec: the tokens to model, one id per position; windows larger than 1 need a (h, w) grid.
        num_classes: number of classes, each a token of the text; 0 for none.
        text_vocabulary: vocabulary size of text ids; 0 for none.
        text_length: the most text ids of a text; 0 for none.
        window: s: every position of the transformer holds s x s tokens; 1 is a plain next-token model.
        dim, num_layers, num_heads: width, blocks, heads; s^2 divides dim.
        multiple_of: the feed-forward width, 8/3 of dim, is rounded up to a multiple of this.
        num_fusion_blocks, fusion_ratio: residual layers at either end, and their hidden width in units of dim.
        condition_dropout: share of training samples whose text is dropped, for guidance; with 0 guidance is refused.
        text_weight: weight of the cross entropy of text and special tokens; 0 trains on images alone.
        writes: a joint model that trains on streams of texts and images, and also writes texts. Its vocabulary has the
            special tokens of streams, its windows hold one token, and its texts are ids.
        z_loss: weight of the mean squared log-partition function, which keeps logits small.
        token_drop, attn_drop, proj_drop, ffn_drop: as in ``Llama``.
        rope_base: base of the rotary frequencies, over the positions of the transformer.
        norm_eps: eps of the RMS norms.

    Raises:
        ValueError: tokens without ids, a grid that windows do not divide, a width that s^2 does not divide, or a joint
            model with larger windows, with classes, or without texts.
    """

    members: Tensor

    takes_streams = True  # of instances: only if writes
    only_next = "each of its positions predicts a window of tokens at once"
    registry_name = "token_shuffle"
    options_type = TokenShuffleOptions
    sizes = SIZES
    tiny = {
        "spec": TokenSpec(16, 32, dim=4, grid=(4, 4)),
        "num_classes": 5,
        "dim": 16,
        "num_layers": 2,
        "num_heads": 2,
        "multiple_of": 16,
        "num_fusion_blocks": 1,
    }

    def __init__(
        self,
        spec: TokenSpec,
        num_classes: int = 0,
        text_vocabulary: int = 0,
        text_length: int = 0,
        window: int = 2,
        dim: int = 768,
        num_layers: int = 12,
        num_heads: int = 12,
        multiple_of: int = 256,
        num_fusion_blocks: int = 2,
        fusion_ratio: float = 2.0,
        condition_dropout: float = 0.1,
        text_weight: float = 1.0,
        z_loss: float = 0.0,
        token_drop: float = 0.0,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        ffn_drop: float = 0.0,
        rope_base: float = 10000.0,
        norm_eps: float = 1e-5,
        writes: bool = False,
    ):
        super().__init__()
        self.spec = self.check_spec(as_dataclass(TokenSpec, spec), type(self).__name__)
        members = window_members(self.spec.length, self.spec.grid, window, "window")
        if dim % window**2:
            raise ValueError(f"dim {dim} must be divisible by the {window**2} tokens of a window of {window}")
        if bool(text_vocabulary) != bool(text_length):
            raise ValueError(f"text_vocabulary {text_vocabulary} and text_length {text_length} go together")
        if writes and (window > 1 or num_classes or not text_length):
            raise ValueError(
                f"writes takes windows of 1 and texts as ids alone, got window {window}, {num_classes} classes and "
                f"texts of {text_length} ids; for a cache with classes name condition=[ids]"
            )
        self.num_classes, self.condition_dropout = num_classes or None, condition_dropout
        self.text_weight, self.z_loss, self.window = text_weight, z_loss, window
        self.text = IdSpec(text_vocabulary, text_length) if text_length else None
        text_size = num_classes + text_vocabulary
        self.vocabulary = JointVocabulary(text_size, self.spec.num_ids, *(() if writes else (MARKS,)))
        self.takes_streams, self.end = writes, self.vocabulary.special("end") if writes else None
        self.register_buffer("members", members, persistent=False)
        self.num_windows = len(self.members)
        self.condition_length = 2 + writes + (num_classes > 0) + text_length  # with the special tokens
        # A stream may have an image, a question and a reply.
        self.max_entries = self.condition_length + self.num_windows + writes * (text_length + len(MARKS))
        self.embedding = nn.Embedding(self.vocabulary.size, dim)
        self.dropout = nn.Dropout(token_drop)
        fusion = (dim, window, num_fusion_blocks, fusion_ratio, norm_eps)
        self.fold = Fold(*fusion) if window > 1 else None
        self.unfold = Unfold(*fusion) if window > 1 else None
        self.blocks = ModuleList(
            LlamaBlock(
                dim,
                num_heads,
                rounded_hidden_dim(dim, multiple_of),
                eps=norm_eps,
                attn_drop=attn_drop,
                proj_drop=proj_drop,
                ffn_drop=ffn_drop,
            )
            for _ in range(num_layers)
        )
        self.norm = RMSNorm(dim, norm_eps)
        self.output = nn.Linear(dim, self.vocabulary.size, bias=False)
        positions = torch.arange(self.max_entries)[:, None]
        self.rotation = FixedRotation(rotation_table(positions, dim // num_heads, base=rope_base))
        self._initialise()

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, ResidualMLP):
                nn.init.zeros_(module.mlp.down.weight)

    # -----------------------------------------------------------------------------------------------------------------
    # The text

    @property
    def condition_spec(self) -> ConditionSpec:
        """A class label, text ids, or both; for a joint model text ids and, for captions, the ids of an image."""
        given = IdSpec(self.spec.num_ids, self.spec.length) if self.takes_streams else None
        return ConditionSpec(num_classes=self.num_classes or 0, ids=self.text, given=given)

    def check_condition(self, condition: Condition) -> None:
        super().check_condition(condition)
        if "given" in condition.parts:
            raise ValueError(
                "this model draws images from texts; an image that comes before is described, not continued"
            )

    @classmethod
    def condition_arguments(cls, spec: ConditionSpec) -> dict[str, Any]:
        """Arguments for class labels and text ids; features of a text encoder do not fit into the vocabulary."""
        cls.refuse_parts(spec, "labels", "ids")
        vocabulary, length = (spec.ids.vocabulary_size, spec.ids.length) if spec.ids else (0, 0)
        return {"num_classes": spec.num_classes, "text_vocabulary": vocabulary, "text_length": length}

    def prefix(self, condition: Condition) -> tuple[Tensor, Tensor]:
        """Joint ids (R, T) of the entries before the windows, padded on the left, and their mask (R, T), False in
        padding."""
        rows, device = len(condition), self.members.device
        there = torch.ones(rows, 1, dtype=torch.bool, device=device)
        names = ("begin", *(("answer",) if self.takes_streams else ()), "begin_image")
        begin, *after = (torch.full_like(there, self.vocabulary.special(n), dtype=torch.int64) for n in names)
        ids, valid = [begin], [there]
        for name, length, first in self._text_parts:
            part = condition.part(name)
            if part is None:
                part = ConditionPart(there.new_zeros(rows, length, dtype=torch.int64), there[:, 0])
            values = part.values.view(rows, length)
            mask = part.mask if part.mask is not None else torch.ones_like(values, dtype=torch.bool)
            ids.append(values.clamp_min(0) + first)
            valid.append(mask & ~part.dropped[:, None])
        whole, mask = torch.cat(ids, 1), torch.cat(valid, 1)
        order = mask.int().sort(dim=1, stable=True).indices  # valid entries move to the right and keep their order
        masks = [mask.gather(1, order), *[there] * len(after)]
        return torch.cat([whole.gather(1, order), *after], 1), torch.cat(masks, 1)

    @property
    def _text_parts(self) -> list[tuple[str, int, int]]:
        """The parts of the text: name, number of tokens, and first joint id of each."""
        parts = [("labels", 1, 0)] if self.num_classes else []
        return parts + ([("ids", self.text.length, self.num_classes or 0)] if self.text else [])

    def attention_mask(self, condition: Condition, start: int, stop: int) -> Tensor:
        """Causal mask without the text's padding."""
        _, valid = self.prefix(condition)
        return visible_causal_mask(prolonged(valid, stop), start)

    # -----------------------------------------------------------------------------------------------------------------
    # Windows

    def embed_joint(self, ids: Tensor) -> Tensor:
        """Ids of the joint vocabulary (R, n) to (R, n, D)."""
        return self.embedding(ids)

    def embed_windows(self, ids: Tensor) -> Tensor:
        """Image ids (R, m, s^2) of windows to (R, m, D)."""
        x = self.embedding(self.vocabulary.joint(ids, "image"))
        return x.squeeze(2) if self.fold is None else self.fold(x)

    def window_logits(self, hidden: Tensor) -> Tensor:
        """Float32 logits (R, m, s^2, V), over the joint vocabulary, of the windows that follow states (R, m, D)."""
        return self.head(hidden[:, :, None] if self.unfold is None else self.unfold(hidden))

    def _states(self, windows: Tensor, condition: Condition) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden states (B, T + m, D) of the text and of windows (B, m, s^2), and the prefix with its mask."""
        ids, valid = self.prefix(condition)
        x = torch.cat([self.embedding(ids), self.embed_windows(windows)], 1)
        length = x.shape[1]
        return self.transform(x, slice(0, length), self.attention_mask(condition, 0, length), None), ids, valid

    def logits(self, ids: Tensor, condition: Condition) -> Tensor:
        """Teacher-forced logits (B, L, V) over the joint vocabulary: those of a window see the text and the windows
        before it."""
        hidden, _, _ = self._states(ids[:, self.members[:-1]], condition)
        return self._to_raster(self.window_logits(hidden[:, self.condition_length - 1 :]))

    def _to_raster(self, values: Tensor) -> Tensor:
        """Values (B, M, s^2, ...) of windows to (B, L, ...)."""
        return values.flatten(1, 2)[:, self.members.flatten().argsort()]

    def forward(
        self,
        tokens: Tensor | Streams,
        condition: Condition,
        *,
        draws: Draws | None = None,
        weights: Tensor | None = None,
        tokenizer: Expands | None = None,
        clock: Clock | None = None,
        context: Tensor | None = None,
    ) -> GeneratorOutput:
        """Cross entropy in nats, mean over the ids of an image, plus ``text_weight`` times that of text and special
        tokens, plus ``z_loss`` times the mean square of the log-partition function. Metrics: "image_loss", "text_loss",
        "z_loss" (unweighted) and "accuracy", the share of correct image ids. For streams see ``stream_losses``."""
        self.check_tokenizer(tokenizer)
        if isinstance(tokens, Streams):
            self.check_writes()
            return stream_losses(self, tokens, (draws or {}).get("drop"), weights)
        condition = self.drop_condition(condition, draws)
        hidden, prefix, valid = self._states((tokens if context is None else context)[:, self.members], condition)
        begin = self.condition_length - 1  # the begin-of-image token
        logits = self._to_raster(self.window_logits(hidden[:, begin:-1]))  # (B, L, V)
        targets = self.vocabulary.joint(tokens, "image")
        image = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none").mean(1)
        metrics = {"image_loss": image.detach().mean(), "accuracy": self._accuracy(logits, tokens)}
        per_sample = image
        if self.text_weight:
            text = self._text_loss(hidden, prefix, valid)
            metrics["text_loss"], per_sample = text.detach().mean(), per_sample + self.text_weight * text
        if self.z_loss:
            partition = logits.logsumexp(-1).square().mean(1)
            metrics["z_loss"], per_sample = partition.detach().mean(), per_sample + self.z_loss * partition
        loss = weighted_mean(per_sample, weights)
        return GeneratorOutput(loss, logits, metrics)

    def training_logits(self, tokens: Tensor, condition: Condition, draws: Draws, tokenizer: Expands | None) -> Tensor:
        return self._image_part(self.logits(tokens, condition))

    def describe(self, condition: Condition, max_tokens: int, *, tokenizer: Expands | None = None) -> Tensor:
        self.check_writes()
        self.check_tokenizer(tokenizer)
        return write(self, self.condition_spec.check(condition).to(self.members.device), max_tokens)

    def converse(self, rows: int = 1, options: Any = None, *, tokenizer: Expands | None = None) -> Conversation:
        """Raises ValueError: the model answers single requests only."""
        raise ValueError(f"{type(self).__name__} draws an image of a text or describes one; it holds no conversations")

    def _text_loss(self, hidden: Tensor, prefix: Tensor, valid: Tensor) -> Tensor:
        """(B,) mean cross entropy over the text and both special tokens of the image."""
        end = prefix.new_full((len(prefix), 1), self.vocabulary.special("end_image"))
        targets = torch.cat([prefix[:, 1:], end], 1)
        states = torch.cat([hidden[:, : self.condition_length - 1], hidden[:, -1:]], 1)
        kept = torch.cat([valid[:, :-1], torch.ones_like(end, dtype=torch.bool)], 1)  # targets of valid positions
        losses = F.cross_entropy(self.head(states).transpose(1, 2), targets, reduction="none")
        return (losses * kept).sum(1) / kept.sum(1)

    def _accuracy(self, logits: Tensor, tokens: Tensor) -> Tensor:
        return (self._image_part(logits.detach()).argmax(-1) == tokens).float().mean()

    def _image_part(self, logits: Tensor) -> Tensor:
        """The logits (..., K) of image ids."""
        first, stop = self.vocabulary.span("image")
        return logits[..., first:stop]

    # -----------------------------------------------------------------------------------------------------------------
    # Steps of one window

    @property
    def num_entries(self) -> int:
        """The text, special tokens and windows."""
        return self.condition_length + self.num_windows

    def plan(self, draws: Draws) -> Plan:
        """One window per step."""
        return Plan(self.members.flatten()[None], (self.window**2,) * self.num_windows, is_raster=self.window == 1)

    def embed_condition(self, condition: Condition, upcoming: Tensor) -> Tensor:
        return self.embedding(self.prefix(condition)[0])

    def embed_tokens(self, ids: Tensor, places: Tensor, upcoming: Tensor) -> Tensor:
        """(R, m, D) of the ids (R, m s^2) of whole windows."""
        return self.embed_windows(ids.unflatten(1, (-1, self.window**2)))

    def step_logits(self, hidden: Tensor, count: int) -> Tensor:
        """Logits (R, s^2, K) of the ids of the window that follows the last of hidden states (R, n, D)."""
        return self._image_part(self.window_logits(hidden[:, -1:]))[:, 0]

    def entry_logits(self, hidden: Tensor) -> Tensor:
        """Logits (R, n, K) of the id after each entry, for windows of one token."""
        return self._image_part(self.window_logits(hidden))[:, :, 0]

    def transform(
        self, x: Tensor, positions: Positions, mask: Mask | None, kv_cache: CachedLayers | None, *state: Tensor
    ) -> Tensor:
        x, rotation = self.dropout(x), self.rotation(positions)
        for block, memory in zip(self.blocks, of_layers(kv_cache, len(self.blocks))):
            x = block(x, rotation, mask, memory)
        return x

    def compile_decoding(self, backend: str = "inductor") -> None:
        """Raises ValueError for windows of several tokens, which have no compiled steps."""
        if self.window > 1:
            raise ValueError(f"windows of {self.window} x {self.window} tokens have no compiled steps")
        super().compile_decoding(backend)

"""Ming-UniVision: one autoregressive model over text and continuous image tokens.

Paper: Ming-UniVision: Joint Image Understanding and Generation with a Unified Continuous Tokenizer (arXiv 2510.06590,
section 3). Official weights and conventions: github.com/inclusionAI/Ming-UniVision (MIT).

The model reads the semantic features that its tokenizer makes from latents, and generates latents with a flow head, one
per token. A generated latent is expanded to features and read at once, so generation and understanding share one input
space.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vistok.checkpoints.official_config import OfficialConfig
from vistok.data.streams import Streams
from vistok.draws import Draws, Keys
from vistok.generators.base import weighted_mean
from vistok.generators.ming_univision import official
from vistok.generators.ming_univision.context import Context
from vistok.generators.ming_univision.language_model import LanguageModel
from vistok.generators.ming_univision.networks import (
    EPS,
    Backbone,
    BackboneConfig,
    FlowHead,
    FlowHeadConfig,
    end_losses,
    projection,
)
from vistok.generators.ming_univision.reading import StreamReader
from vistok.generators.ming_univision.sampling import MingOptions, MingSession, noise_of, write_text
from vistok.generators.ming_univision.understanding import Understanding
from vistok.guidance import OFF
from vistok.types import (
    Clock,
    Condition,
    ConditionSpec,
    Expands,
    FeatureSpec,
    GeneratorOutput,
    IdSpec,
    TokenSpec,
    as_dataclass,
)

OWN_STEPS = 8
"""Denoising steps of the head for latents that the model draws itself in training."""


class MingUniVision(Understanding):
    """Generates images from text, or from an image and text, and text from images.

    A context is: the user role, a given image, the user's text, the assistant role, and the generated image. Guidance
    and condition dropout hide the text, or text and image; roles and special tokens are always visible.

    Args:
        spec: the tokens to model: continuous latents.
        feature_dim: channels of the feature that the tokenizer makes from a token.
        num_classes: number of classes; a class is one entry in place of a text. 0 for none.
        text_vocabulary_size: ids of texts are below this.
        text_length: the most ids of a text.
        given_length: the most latents of a given image; 0 for none.
        vocabulary_size: ids of the language model; None is those of texts and four special ids.
        image_start, image_patch, image_end, end: special ids; None takes the four after the ids of texts.
        human, assistant: ids of the roles, before and after the user's turn.
        backbone: the language model.
        language_model: instead of ``backbone``, a causal language model of Hugging Face: a folder or a name on the hub,
            whose weights it starts from. In a saved model, its config.
        head: the network that generates latents.
        num_projection_layers: linear layers between features and the language model.
        condition_dropout: share of the samples that are trained without their text, half of them without an image too,
            for guidance; with 0 guidance is refused.
        end_weight: weight of the loss of the special id after an image.
        text_weight: weight of the loss of text and special ids, for training on streams.
        latent_mean, latent_scale: the statistics with which its tokenizer standardises latents; a tokenizer with others
            is refused. None if they are not known.

    Raises:
        ValueError: discrete tokens, a special or role id outside the vocabulary, two special ids that are equal, or a
            value out of range.
    """

    to_condition: nn.Module

    registry_name = "ming_univision"
    only_next = "it predicts velocities of latents, and these have no cross entropy"
    options_type = MingOptions
    needs_tokenizer = True
    takes_streams = True
    tiny = {
        "spec": TokenSpec(16, None, dim=4, grid=(4, 4)),
        "feature_dim": 24,
        "num_classes": 5,
        "text_vocabulary_size": 20,
        "text_length": 5,
        "given_length": 16,
        "human": (1,),
        "assistant": (2, 3),
        "backbone": {
            "dim": 32,
            "num_layers": 2,
            "num_heads": 4,
            "num_kv_heads": 2,
            "mlp_dim": 48,
            "num_experts": 0,
            "max_length": 128,
        },
        "head": {"dim": 32, "num_layers": 2},
    }
    sizes = {
        "16b_a3b": {
            "text_vocabulary_size": 126464,
            "text_length": 512,
            "vocabulary_size": 126464,
            "image_start": 126347,
            "image_patch": 126346,
            "image_end": 126348,
            "end": 126081,
            "backbone": asdict(BackboneConfig()),
            "head": asdict(FlowHeadConfig()),
        }
    }

    def __init__(
        self,
        spec: TokenSpec,
        feature_dim: int = 1024,
        num_classes: int = 0,
        text_vocabulary_size: int = 0,
        text_length: int = 0,
        given_length: int = 0,
        vocabulary_size: int | None = None,
        image_start: int | None = None,
        image_patch: int | None = None,
        image_end: int | None = None,
        end: int | None = None,
        human: tuple[int, ...] = (),
        assistant: tuple[int, ...] = (),
        backbone: BackboneConfig = BackboneConfig(),  # noqa: B008 (immutable)
        language_model: str | dict[str, Any] | None = None,
        head: FlowHeadConfig = FlowHeadConfig(),  # noqa: B008
        num_projection_layers: int = 2,
        condition_dropout: float = 0.1,
        end_weight: float = 0.1,
        text_weight: float = 1.0,
        latent_mean: float | None = None,
        latent_scale: float | None = None,
    ):
        super().__init__()
        self.spec = self.check_spec(as_dataclass(TokenSpec, spec), "MingUniVision")
        config, head = as_dataclass(BackboneConfig, backbone), as_dataclass(FlowHeadConfig, head)
        size = text_vocabulary_size + 4 if vocabulary_size is None else vocabulary_size
        model = None if language_model is None else LanguageModel(language_model, size)
        if model is not None:
            self._arguments["language_model"] = model.config  # its weights belong to this model from now on
        marks = {"image_start": image_start, "image_patch": image_patch, "image_end": image_end, "end": end}
        ids = [text_vocabulary_size + number if mark is None else mark for number, mark in enumerate(marks.values())]
        for name, mark in [*zip(marks, ids), *(("human", i) for i in human), *(("assistant", i) for i in assistant)]:
            if not 0 <= mark < size:
                raise ValueError(f"{name} {mark} is no id of a vocabulary of {size}")
        if len(set(ids)) < len(ids):
            raise ValueError(
                f"the marks need ids of their own, got {', '.join(f'{n} {i}' for n, i in zip(marks, ids))}"
            )
        for name, value, least in (
            ("end_weight", end_weight, 0),
            ("text_weight", text_weight, 0),
            ("num_projection_layers", num_projection_layers, 1),
        ):
            if not least <= value < math.inf:
                raise ValueError(f"{name} must be finite and at least {least}, got {value}")
        self.image_start, self.image_patch, self.image_end, self.end = ids
        self.num_classes = num_classes or None
        self.text = IdSpec(text_vocabulary_size, text_length) if text_length else None
        self.given = FeatureSpec(self.spec.dim, given_length) if given_length else None
        self.feature_dim = feature_dim
        self.latent_statistics = {"latent_mean": latent_mean, "latent_scale": latent_scale}
        self.register_buffer("human", torch.tensor(tuple(human), dtype=torch.int64), persistent=False)
        self.register_buffer("assistant", torch.tensor(tuple(assistant), dtype=torch.int64), persistent=False)
        self.condition_dropout, self.end_weight, self.text_weight = condition_dropout, end_weight, text_weight
        roles = {"begin": human, "answer": assistant}
        ends = {"end": self.end, "begin_image": self.image_start, "end_image": self.image_end}
        own = {**roles, **{name: (mark,) for name, mark in ends.items()}}
        self.reader = StreamReader(text_vocabulary_size, self.image_patch, own)
        if model is None:
            self.embedding, self.output = nn.Embedding(size, config.dim), nn.Linear(config.dim, size, bias=False)
            nn.init.normal_(self.embedding.weight, std=0.02)
        else:
            self.embedding, self.output = model.release()
        self.backbone = Backbone(config) if model is None else model
        dim = self.backbone.dim
        self.classes = nn.Embedding(num_classes, dim) if num_classes else None
        self.projection = projection(feature_dim, dim, num_projection_layers)
        self.to_condition = nn.Sequential(nn.Linear(dim, head.dim), nn.LayerNorm(head.dim, EPS))
        self.flow_head = FlowHead(self.spec.dim, head.dim, head)

    @property
    def condition_spec(self) -> ConditionSpec:
        return ConditionSpec(num_classes=self.num_classes or 0, ids=self.text, given=self.given)

    @classmethod
    def condition_arguments(cls, spec: ConditionSpec) -> dict[str, Any]:
        cls.refuse_parts(spec, "labels", "ids", "given")
        given = spec.given
        if isinstance(given, IdSpec):
            raise ValueError(f"{cls.registry_name} takes latents of an image that came before; these data have ids")
        return {
            "num_classes": spec.num_classes,
            "text_vocabulary_size": spec.ids.vocabulary_size if spec.ids else 0,
            "text_length": spec.ids.length if spec.ids else 0,
            "given_length": given.length if given else 0,
        }

    @classmethod
    def tokenizer_arguments(cls, tokenizer: Expands) -> dict[str, Any]:
        return dict(tokenizer.latent_statistics or {})

    # -----------------------------------------------------------------------------------------------------------------
    # Training

    def forward(
        self,
        tokens: Tensor | Streams,
        condition: Condition,
        *,
        draws: Draws | None = None,
        weights: Tensor | None = None,
        clock: Clock | None = None,
        tokenizer: Expands | None = None,
        context: Tensor | None = None,
    ) -> GeneratorOutput:
        """The training pass over all places at once; the tokenizer is not trained. Without "drop" among the draws, no
        condition is hidden.

        For latents: mean squared error of the velocity, plus ``end_weight`` times the cross entropy of the special id
        after the image; metrics "flow" and "image_end". For streams, which contain their conditions: the same error,
        plus ``text_weight`` times the mean cross entropy of the text and special ids in the loss; metrics "flow" and
        "text".

        Raises:
            ValueError: latents of another tokenizer, a missing tokenizer, missing draws, or streams that this model
                does not read.
        """
        tokenizer = self.needed_tokenizer(tokenizer)
        if not draws or not {"time", "noise"} <= draws.keys():
            raise ValueError("training needs the draws 'time' and 'noise'; see training_draws")
        if isinstance(tokens, Streams):
            return self._stream_losses(tokens, draws, weights, tokenizer)
        self.spec.check_latents(tokens)
        hidden = self._hidden(tokens if context is None else context, condition, draws, tokenizer)
        z = self.to_condition(hidden[:, :-1]).flatten(0, 1)
        flow = self.flow_head.losses(
            tokens.flatten(0, 1), z, draws["time"].flatten(), draws["noise"].flatten(0, 1)
        ).unflatten(0, tokens.shape[:2])
        end = end_losses(self.output(hidden[:, -1]), self.image_end)
        per_sample = {"flow": flow.mean(1), "image_end": end}
        terms = {name: weighted_mean(values, weights) for name, values in per_sample.items()}
        loss = terms["flow"] + self.end_weight * terms["image_end"]
        return GeneratorOutput(loss, flow, {name: term.detach() for name, term in terms.items()})

    def own_draws(self, keys: Keys) -> Draws:
        """ "own" (B, L, C) normal."""
        return {"own": keys.normal("objective own", *self.context_shape)}

    def own_tokens(
        self,
        tokens: Tensor,
        replaced: Tensor,
        condition: Condition,
        draws: Draws,
        tokenizer: Expands | None = None,
    ) -> Tensor:
        """The model's own latents, sampled with few steps of the head."""
        hidden = self._hidden(tokens, condition, draws, self.needed_tokenizer(tokenizer))
        z, noise = self.to_condition(hidden[:, :-1]).flatten(0, 1), draws["own"].flatten(0, 1)
        return self.flow_head.sample(z, noise, OFF, num_steps=OWN_STEPS).view_as(tokens)

    def _stream_losses(
        self, streams: Streams, draws: Draws, weights: Tensor | None, tokenizer: Expands
    ) -> GeneratorOutput:
        reading, latents, hidden = self.read_streams(streams, tokenizer, draws.get("drop"))
        drawn = reading.learned & reading.images
        rows, places = drawn.nonzero(as_tuple=True)
        slots = (drawn.cumsum(1) - 1)[rows, places] % self.spec.length  # images of one stream share their draws
        z, targets = self.to_condition(hidden[rows, places - 1]), latents[reading.learned[reading.images]]
        flow = self.flow_head.losses(targets, z, draws["time"][rows, slots], draws["noise"][rows, slots])
        word_rows, word_places = (reading.learned & ~reading.images).nonzero(as_tuple=True)
        logits = self.output(hidden[word_rows, word_places - 1]).float()
        words = F.cross_entropy(logits, reading.ids[word_rows, word_places], reduction="none")
        terms = {"flow": _mean_of(flow, rows, weights), "text": _mean_of(words, word_rows, weights)}
        loss = terms["flow"] + self.text_weight * terms["text"]
        return GeneratorOutput(loss, flow, {name: term.detach() for name, term in terms.items()})

    def training_draws(self, keys: Keys) -> Draws:
        """ "drop" (B,) and "time" (B, L) uniform, "noise" (B, L, C) normal."""
        return {
            "drop": keys.uniform("drop"),
            "time": keys.uniform("time", self.spec.length),
            "noise": keys.normal("noise", self.spec.length, self.spec.dim),
        }

    # -----------------------------------------------------------------------------------------------------------------
    # Sampling

    def sampling_draws(self, keys: Keys, options: MingOptions | None = None) -> Draws:
        """ "noise" (B, L, C) normal."""
        return {"noise": keys.normal("noise", self.spec.length, self.spec.dim)}

    def start(
        self,
        condition: Condition,
        options: MingOptions | None = None,
        *,
        draws: Draws | None = None,
        tokenizer: Expands | None = None,
    ) -> MingSession:
        session = self.converse(len(condition), options, tokenizer=tokenizer)
        noise = noise_of(draws)
        session.ask(condition)
        session.begin_image(session.options.guidance(has_image=condition.part("given") is not None), noise)
        return session

    def converse(self, rows: int = 1, options: MingOptions | None = None, *, tokenizer: Expands | None) -> MingSession:
        self.check_tokenizer(tokenizer)
        tokenizer = self.needed_tokenizer(tokenizer)
        if rows < 1:
            raise ValueError(f"a conversation has at least one row, got {rows}")
        text, given = self.text.length if self.text else 1, self.given.length + 2 if self.given else 0
        length = len(self.human) + given + text + len(self.assistant) + self.spec.length + 2
        return MingSession(self, rows, options or MingOptions(), tokenizer, length=length)

    @torch.no_grad()
    def describe(self, condition: Condition, max_tokens: int, *, tokenizer: Expands | None) -> Tensor:
        """Answer in text by greedy decoding: ids (B, n), n <= max_tokens, padded with ``end``.

        Args:
            condition: an image (``given``), a question (``ids``), or both.
        """
        self.check_condition(condition)
        if not condition.parts:
            raise ValueError("there is nothing to describe: the condition has neither an image nor a text")
        prompt = self.prompt(condition.to(self.output.weight.device), tokenizer).trimmed()
        count = prompt.embeddings.shape[1]
        context = Context(self, len(condition), count + max_tokens)
        hidden = context.read(prompt.embeddings, prompt.valid, prompt.kinds, prompt.images)
        return write_text(self, context, hidden[:, -1], max_tokens)[0]

    @staticmethod
    def clean_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return official.own_keys(state)

    @classmethod
    def from_official(cls, config: Mapping[str, Any], state_dict: Mapping[str, Tensor]) -> Self:
        given = OfficialConfig(config, official.WITHOUT_EFFECT)
        arguments = official.arguments(given)
        given.finish()
        return cls(**arguments).with_official_weights(official.our_names(state_dict, arguments["backbone"]))


def _mean_of(losses: Tensor, rows: Tensor, weights: Tensor | None) -> Tensor:
    """The mean of losses (M,) of entries in ``rows`` (M,), weighted by their samples; 0 if there are none."""
    return weighted_mean(losses, torch.ones_like(losses) if weights is None else weights[rows])

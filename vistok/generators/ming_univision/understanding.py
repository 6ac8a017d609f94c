"""The understanding half of Ming-UniVision: from features, ids, conditions and streams to hidden states."""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor, nn

from vistok.data.streams import IMAGE_KIND, Streams
from vistok.draws import Draws
from vistok.generators.engine.continuous import ContinuousGenerator
from vistok.generators.ming_univision.context import ALWAYS, IMAGE, TEXT, Prompt
from vistok.generators.ming_univision.language_model import LanguageModel
from vistok.generators.ming_univision.networks import Backbone
from vistok.generators.ming_univision.reading import Reading, StreamReader, expanded
from vistok.nn.masks import visible_causal_mask
from vistok.types import Condition, Expands


class Understanding(ContinuousGenerator):
    """The base of ``MingUniVision`` that embeds and reads inputs; ``MingUniVision`` has the constructor.

    Attributes:
        feature_dim: channels E of the feature that the tokenizer makes from a token.
        latent_statistics: mean and scale with which the latents of training were standardised; None if not known.
        image_start, image_patch, image_end: special ids.
        human, assistant: ids of the roles.
        reader: turns streams into entries.
        embedding, backbone, output: the language model of dim D.
        classes: class embeddings; None without classes.
        projection: from features to the language model.
    """

    feature_dim: int
    latent_statistics: dict[str, float | None]
    image_start: int
    image_patch: int
    image_end: int
    human: Tensor
    assistant: Tensor
    reader: StreamReader
    embedding: nn.Embedding
    backbone: Backbone | LanguageModel
    output: nn.Linear
    classes: nn.Embedding | None
    projection: nn.Module

    def check_tokenizer(self, tokenizer: Expands | None) -> None:
        super().check_tokenizer(tokenizer)
        others = (tokenizer.latent_statistics if tokenizer is not None else None) or {}
        for name, own in self.latent_statistics.items():
            if own is not None and name in others and not math.isclose(own, others[name], rel_tol=1e-4, abs_tol=1e-6):
                raise ValueError(
                    f"the latents of this tokenizer are standardised with {name} {others[name]:.6g}, and this model "
                    f"learned latents with {own:.6g}: it was trained with another tokenizer, which you may load instead"
                )

    def needed_tokenizer(self, tokenizer: Expands | None) -> Expands:
        # Called for every batch in training, so without the check of statistics, which synchronises with the device.
        super().check_tokenizer(tokenizer)
        return cast(Expands, tokenizer)

    # -----------------------------------------------------------------------------------------------------------------
    # Embeddings

    def embed_features(self, features: Tensor) -> Tensor:
        """Semantic features (B, N, E) projected to the language model's inputs (B, N, D).

        Raises:
            ValueError: features of another width.
        """
        if features.shape[-1] != self.feature_dim:
            raise ValueError(
                f"this model reads features of {self.feature_dim} channels, the tokenizer makes {features.shape[-1]}; "
                "build it with feature_dim of the tokenizer that it is to have"
            )
        return self.projection(features)

    def embed_ids(self, ids: Tensor, features: Tensor | None = None) -> Prompt:
        """Ids (B, n) of the language model as a prompt that is visible to all rows.

        Args:
            features: (B, N, E) or None; they replace the patch marks, in order.

        Raises:
            ValueError: ids that the model does not have, or other numbers of patch marks and features.
        """
        self.check_ids(ids)
        embeddings, images = self.embedding(ids), ids == self.image_patch
        count = 0 if features is None else features.shape[0] * features.shape[1]
        if int(images.sum()) != count:
            raise ValueError(f"the ids have {int(images.sum())} patch marks for {count} features of images")
        if features is not None:
            embedded = self.embed_features(features)
            embeddings = embeddings.masked_scatter(images[..., None], embedded.to(embeddings))
        everywhere = torch.ones_like(images)
        return Prompt(embeddings, everywhere, torch.zeros_like(ids), images)

    def check_ids(self, ids: Tensor) -> None:
        """Raise ValueError unless these are ids (B, n) of the language model."""
        if ids.ndim != 2 or ids.is_floating_point():
            raise ValueError(f"ids must be (B, n) integers, got shape {tuple(ids.shape)} of {ids.dtype}")
        size = self.embedding.num_embeddings
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < size:
            wrong = ids[(ids < 0) | (ids >= size)][0]
            raise ValueError(f"id {int(wrong)} is not in the vocabulary of {size} of this model")

    def prompt(self, condition: Condition, tokenizer: Expands | None) -> Prompt:
        """The prompt of a condition; padding and dropped parts are not ``valid``."""
        rows, device = len(condition), self.output.weight.device
        parts = [self._fixed(self.human, rows, device)]
        if (given := condition.part("given")) is not None:
            expander, latents = self.needed_tokenizer(tokenizer).expander(), given.values.to(self.output.weight.dtype)
            features = self.embed_features(expanded(expander, latents, given.mask))
            valid = given.valid() & ~given.dropped[:, None]
            ends = valid.any(1, keepdim=True)
            for x, where, is_image in (
                (self.embed_special(self.image_start, rows), ends, False),
                (features, valid, True),
                (self.embed_special(self.image_end, rows), ends, False),
            ):
                kinds = torch.full(where.shape, IMAGE, device=device)
                parts.append(Prompt(x, where, kinds, torch.full_like(where, is_image)))
        if self.classes is not None and (label := condition.part("labels")) is not None:
            valid = ~label.dropped[:, None]
            embeddings = self.classes(label.values.where(valid[:, 0], 0))[:, None]
            parts.append(
                Prompt(embeddings, valid, torch.full(valid.shape, TEXT, device=device), torch.zeros_like(valid))
            )
        if (text := condition.part("ids")) is not None:
            valid = text.valid() & ~text.dropped[:, None]
            embeddings = self.embedding(text.values.where(valid, 0))
            parts.append(
                Prompt(embeddings, valid, torch.full(valid.shape, TEXT, device=device), torch.zeros_like(valid))
            )
        return Prompt.cat([*parts, self._fixed(self.assistant, rows, device)])

    def embed_special(self, token: int, rows: int) -> Tensor:
        """(rows, 1, D), the embedding of a special id."""
        return self.embedding.weight[token].expand(rows, 1, -1)

    def _fixed(self, ids: Tensor, rows: int, device: torch.device) -> Prompt:
        """The prompt of ids (n,) that all rows have and always see."""
        embeddings = self.embedding(ids).expand(rows, -1, -1)
        shape = (rows, len(ids))
        valid = torch.ones(shape, dtype=torch.bool, device=device)
        return Prompt(embeddings, valid, torch.full(shape, ALWAYS, device=device), torch.zeros_like(valid))

    def logits(self, prompt: Prompt) -> Tensor:
        """Logits (B, n, V) of the id after each entry of a prompt, in one pass."""
        positions = (prompt.valid.cumsum(1) - 1).clamp_min(0)
        hidden = self.backbone(prompt.embeddings, positions, visible_causal_mask(prompt.valid), images=prompt.images)
        return self.output(hidden).float()

    # -----------------------------------------------------------------------------------------------------------------
    # Hidden states

    def _hidden(self, tokens: Tensor, condition: Condition, draws: Draws, tokenizer: Expands) -> Tensor:
        """``_image_states`` of latents (B, N, C)."""
        with torch.no_grad():
            features = tokenizer.expander().expand(tokens)
        prompt = self.prompt(condition, tokenizer)
        return self._image_states(prompt, self.embed_features(features), draws.get("drop"))

    def _image_states(self, prompt: Prompt, image: Tensor, drop: Tensor | None) -> Tensor:
        """Hidden states (B, N + 1, D) of the start mark and of the embedded image (B, N, D) after a prompt.

        Args:
            drop: (B,) uniform; rows below ``condition_dropout`` hide their text, those below half of it also the image.
        """
        rows, start = prompt.valid.shape
        own = torch.cat([self.embed_special(self.image_start, rows), image], 1)
        new = prompt.valid.new_ones(own.shape[:2])
        x, valid = torch.cat([prompt.embeddings, own], 1), torch.cat([prompt.valid, new], 1)
        kinds = torch.cat([prompt.kinds, torch.full_like(new, ALWAYS, dtype=torch.int64)], 1)
        response = torch.cat([torch.zeros_like(prompt.valid), new], 1)
        images = torch.cat([prompt.images, torch.zeros_like(new)], 1)
        return self._states(x, valid, kinds, response, images, drop)[:, start:]

    def _states(
        self, x: Tensor, valid: Tensor, kinds: Tensor, response: Tensor, images: Tensor, drop: Tensor | None
    ) -> Tensor:
        """Hidden states (B, n, D) of entries; what ``drop`` hides is hidden from the ``response`` only."""
        left = valid
        if drop is not None:
            for kind, share in ((TEXT, 1.0), (IMAGE, 0.5)):
                dropped = (drop < share * self.condition_dropout)[:, None]
                left = left & ~(dropped & (kinds == kind))
        # As in sampling, entries before the response see everything. The response does not see the hidden entries, and
        # its positions continue as if they were absent.
        mask = visible_causal_mask(valid).where(~response[:, None, :, None], visible_causal_mask(left))
        positions = torch.where(response, left.cumsum(1), valid.cumsum(1)) - 1
        return self.backbone(x, positions.clamp_min(0), mask, images=images)

    def read_streams(self, streams: Streams, tokenizer: Expands, drop: Tensor | None) -> tuple[Reading, Tensor, Tensor]:
        """The entries of streams, the latents (M, C) of all their images, and the hidden states (B, n, D).

        Args:
            drop: as in ``_image_states``.

        Raises:
            ValueError: images with another number of latents, or latents of another tokenizer.
        """
        reading, length = self.reader(streams), self.spec.length
        if streams.latents is None:
            raise ValueError("these streams have images as ids; this model reads latents")
        latents = streams.latents[(streams.kinds == IMAGE_KIND) & streams.mask]
        if len(latents) % length:
            raise ValueError(f"the images of streams have {length} latents each for this model; these have others")
        with torch.no_grad():
            features = tokenizer.expander().expand(self.spec.check_latents(latents.unflatten(0, (-1, length))))
        x, embedded = self.embedding(reading.ids), self.embed_features(features).flatten(0, 1)
        x = x.masked_scatter(reading.images[..., None], embedded.to(x))
        return (
            reading,
            latents,
            self._states(x, reading.valid, reading.kinds, reading.response, reading.inputs, drop),
        )

"""Scores of generators whose ids decode to image embeddings: by retrieval with drawn ids, and by texts about ids.

SEED (arXiv 2307.08041) has a language model read and write such ids; there are no pixels to compare.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from vistok.data.batches import ImageBatch
from vistok.data.captions import captions_of
from vistok.data.config import DataConfig
from vistok.data.loader import evaluation_loader
from vistok.data.opening import open_source
from vistok.draws import Keys
from vistok.eval.record import library_versions
from vistok.eval.retrieval import Embeddings, class_scores
from vistok.pipelines.chat import decode_texts
from vistok.pipelines.generation import Pipeline
from vistok.types import Condition
from vistok.utils.progress import track


@torch.no_grad()
def score_ids(pipe: Pipeline, data: DataConfig, *, seed: int = 0) -> dict[str, Any]:
    """Draw ids for the text or class of every image of ``data``, and compare their decoded embeddings with the image's.

    The scores are:

    - ``cosine``: cosine similarity of drawn ids to the embedding of the image that the text or class belongs to;
    - ``cosine_of_images``: the same for the image's own ids;
    - ``class_recall`` and ``class_recall_by_chance``, with classes: how often the nearest of all images' embeddings is
      of the class asked for;
    - ``codes_used``: share of all codes that were drawn;
    - ``texts_right``, for a generator that writes texts: how often its text about an image's own ids is one of the
      image's texts.

    Raises:
        ValueError: the tokenizer does not decode to embeddings or has no network for their targets, or the generator
            takes neither texts nor classes.
    """
    tokenizer, generator, source = pipe.tokenizer, pipe.generator, open_source(data)
    if not tokenizer.embeds:
        raise ValueError(
            f"{type(tokenizer).__name__} decodes to images, not to embeddings; vistok benchmark scores what it makes"
        )
    spec, options = generator.condition_spec, pipe.options()
    by_text = bool(set(pipe.text.parts) & set(spec.parts))
    if not by_text and "labels" not in spec.parts:
        raise ValueError(
            f"{type(generator).__name__} is asked by {spec.describe()}; ids are scored by texts or by classes"
        )
    parts: list[tuple[Tensor, ...]] = []
    right: list[bool] = []

    def asked(batch: ImageBatch, captions: Sequence[Sequence[str]]) -> Condition:
        if by_text:
            return pipe.text.condition([several[0] if several else None for several in captions])
        return Condition.from_labels(batch.labels)

    loader = evaluation_loader(source, data)
    for batch in track(loader, "ids", len(loader)):
        pixels = pipe.to_tokenizer(batch.pixels)
        pairs = zip(batch.indices.tolist(), batch.labels.tolist(), strict=True)
        captions = [captions_of(source, data.captions, index, label) for index, label in pairs]
        draws = generator.sampling_draws(Keys.of(seed, batch.indices), options)
        condition = asked(batch, captions).to(pipe.device)
        drawn = generator.sample(condition, options, draws=draws, tokenizer=pipe.in_loop)
        own = tokenizer.encode(pixels)
        made = [tokenizer.decode_features(pipe.to_tokenizer(ids)) for ids in (drawn, own)]
        columns = (*made, tokenizer.target_features(pixels))
        parts.append((*(column.float().cpu() for column in columns), batch.labels, drawn.cpu()))
        if generator.end is not None and spec.ids is not None and "given" in spec.parts:
            given = Condition.from_given(own.to(pipe.device))
            said = decode_texts(pipe, generator.describe(given, spec.ids.length, tokenizer=pipe.in_loop))
            right += [text.strip() in several for text, several in zip(said, captions, strict=True)]
    decoded, own, targets, labels, ids = (torch.cat(column) for column in zip(*parts))
    scores = {
        "cosine": float(F.cosine_similarity(decoded, targets).mean()),
        "cosine_of_images": float(F.cosine_similarity(own, targets).mean()),
        **class_scores(Embeddings(decoded, targets, labels, ids), without_own=False),
        "codes_used": len(ids.unique()) / tokenizer.spec.num_ids,
    }
    if right:
        scores["texts_right"] = sum(right) / len(right)
    return {
        "protocol": "retrieval",
        "scores": scores,
        "images": {
            "source": f"ids drawn for the {'texts' if by_text else 'classes'} of {data.title}",
            "count": len(ids),
        },
        "reference": {"source": f"embeddings of {data.title}"},
        "settings": {"seed": seed, "sampling": dataclasses.asdict(options), "data": dataclasses.asdict(data)},
        "tokenizer": {"model": tokenizer.registry_name, "fingerprint": tokenizer.fingerprint()},
        "generator": {"model": generator.registry_name, "fingerprint": generator.fingerprint()},
        "versions": library_versions(),
        "warnings": [],
    }

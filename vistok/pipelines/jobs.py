"""A request of a user, ready for a generator, and its images, batch after batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vistok.data.movies import shown
from vistok.draws import Draws, Keys
from vistok.pipelines.keywords import check_keywords, check_whole
from vistok.pipelines.output import PipelineOutput
from vistok.pipelines.requests import Conditions, Request
from vistok.types import Condition, to_json

if TYPE_CHECKING:
    from vistok.pipelines.generation import Pipeline


@dataclass(frozen=True)
class Job:
    """What is to be generated.

    Attributes:
        condition: of every image, as the generator takes it.
        options: of the generator's ``options_type``.
        seed, index_start: image i has the draws of ``(seed, index_start + i)``.
        prompts: the text of each image, if there are texts.
    """

    condition: Condition
    options: Any
    seed: int
    index_start: int = 0
    prompts: list[str | None] | None = None

    def __len__(self) -> int:
        return len(self.condition)

    def keys(self, rows: slice = slice(None)) -> Keys:
        """The keys of some images."""
        start, stop, _ = rows.indices(len(self))
        return Keys.range(self.seed, stop - start, self.index_start + start)


def accept(
    pipe: Pipeline, conditions: Conditions, call: Callable[..., Any], request: Request, images: int | None = None
) -> Job:
    """What a call of a pipeline asks for, checked.

    Args:
        call: the method that was called; its keywords are named in errors.
        images: how many there are already (an edit), each with one condition; None if the request says how many.

    Raises:
        ConfigError: an unknown option, or one of the wrong type.
        ValueError: as in ``Conditions``, a condition that the generator does not take, or a negative prompt without
            guidance.
    """
    check_keywords(call, pipe.generator.options_type, request.sampling)
    options = pipe.options(**request.sampling)
    condition = conditions.of(request) if images is None else conditions.of_images(request, images)
    pipe.generator.check_condition(condition)
    if request.negative_prompt is not None:
        scale = to_json(options).get("guidance_scale", 1)
        if scale in (1, [1, 1]):
            raise ValueError(f"negative_prompt has no effect without guidance: guidance_scale is {scale}")
    prompts = request.prompts(len(condition))
    return Job(condition, options, request.draw_seed(), request.index_start, prompts)


@torch.no_grad()
def generate(
    pipe: Pipeline, job: Job, tokens_of: Callable[[slice, Condition, Draws], Tensor], batch_size: int
) -> PipelineOutput:
    """The images of a job.

    Args:
        tokens_of: generates the tokens of some rows, from their condition and draws.
        batch_size: rows at a time.

    Raises:
        ValueError: ``batch_size`` below 1, or a tokenizer that makes no images.
    """
    check_whole("batch_size", batch_size, least=1)
    check_images(pipe)
    tokens, pixels = [], []
    for start in range(0, len(job), batch_size):
        rows = slice(start, start + batch_size)
        condition, keys = job.condition[rows], job.keys(rows)
        batch = tokens_of(rows, condition.to(pipe.device), pipe.generator.sampling_draws(keys, job.options))
        tokens.append(batch.cpu())
        pixels.append(pipe.decode(batch, keys, condition))
    whole = torch.cat(pixels)
    labels = None if job.condition.labels is None else job.condition.labels.tolist()
    names = [pipe.class_names[label] for label in labels] if labels and pipe.class_names else None
    return PipelineOutput(shown(whole), torch.cat(tokens), whole, labels, job.prompts, names)


def check_images(pipe: Pipeline) -> None:
    """Raise ValueError if nothing makes images of the pipeline's tokens."""
    if not pipe.tokenizer.embeds:
        pipe.tokenizer.check_renders("making images")
    elif pipe.renderer is None:
        raise ValueError(
            f"{type(pipe.tokenizer).__name__} decodes to embeddings, not to images: set pipe.renderer, to "
            "vistok.pipelines.renderers.UnCLIP(weights), or to vistok.eval.retrieval.Gallery(tokenizer, data), "
            "which shows the nearest image of a data set"
        )

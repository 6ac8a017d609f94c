"""Jobs: checked requests, and the loop that generates their images batch by batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vistok.data.movies import shown
from vistok.draws import Draws, Keys
from vistok.pipelines.keywords import check_keywords
from vistok.pipelines.output import PipelineOutput
from vistok.pipelines.requests import Conditions, Request
from vistok.types import Condition, to_json
from vistok.utils.numbers import check_whole

if TYPE_CHECKING:
    from vistok.pipelines.generation import Pipeline


@dataclass(frozen=True)
class Job:
    """A checked request: what a generator is to generate.

    Attributes:
        condition: a row per image, as the generator takes it.
        options: of the generator's ``options_type``.
        seed, index_start: image i has the draws of ``(seed, index_start + i)``.
        prompts: the text of each image; None if there are no texts.
    """

    condition: Condition
    options: Any
    seed: int
    index_start: int = 0
    prompts: list[str | None] | None = None

    def __len__(self) -> int:
        return len(self.condition)

    def keys(self, rows: slice = slice(None)) -> Keys:
        """The keys of the images in ``rows``."""
        start, stop, _ = rows.indices(len(self))
        return Keys.range(self.seed, stop - start, self.index_start + start)


def accept(
    pipe: Pipeline, conditions: Conditions, call: Callable[..., Any], request: Request, images: int | None = None
) -> Job:
    """Check a request and turn it into a job.

    Args:
        call: the method that was called; errors name its keywords.
        images: number of given images, for an edit; each gets one condition. None if the request gives the number.

    Raises:
        ConfigError: an option is unknown or has the wrong type.
        ValueError: as in ``Conditions``; or the generator does not take the condition, or a negative prompt comes
            without guidance.
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
    """Generate the images of a job.

    Args:
        tokens_of: function from rows, their condition and their draws to their tokens.
        batch_size: rows per call of ``tokens_of``.

    Raises:
        ValueError: ``batch_size`` is below 1, or the tokenizer renders no images.
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
    names: list[str | None] | None = None
    if labels is not None and pipe.class_names:
        names = [pipe.class_names[label] if label >= 0 else None for label in labels]  # -1 is unconditional
    return PipelineOutput(shown(whole), torch.cat(tokens), whole, labels, job.prompts, names)


def check_images(pipe: Pipeline) -> None:
    """Raise ValueError if the pipeline's tokens cannot be rendered as images."""
    if not pipe.tokenizer.embeds:
        pipe.tokenizer.check_renders("making images")
    elif pipe.renderer is None:
        raise ValueError(
            f"{type(pipe.tokenizer).__name__} decodes to embeddings, not to images: set pipe.renderer, to "
            "vistok.pipelines.renderers.UnCLIP(weights), or to vistok.eval.retrieval.Gallery(tokenizer, data), "
            "which shows the nearest image of a data set"
        )

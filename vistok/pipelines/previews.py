"""Previews of unfinished images while a pipeline generates."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from vistok.data.movies import shown
from vistok.data.pictures import to_pil
from vistok.draws import Keys
from vistok.pipelines.display import Shown
from vistok.pipelines.jobs import Job
from vistok.types import Condition
from vistok.utils.numbers import check_whole

if TYPE_CHECKING:
    from vistok.pipelines.generation import Pipeline


@dataclass(frozen=True, repr=False)
class Preview(Shown):
    """A state of unfinished images; notebooks show it.

    Attributes:
        step: number of positions that every image has so far.
        total: number of positions of a finished image.
        tokens: (N, L[, depth]) ids or (N, L, D) latents, zero where not generated yet, on the CPU.
        known: (N, L) bool, True where tokens are generated.
        images: N images, or None if the tokenizer cannot show this many tokens. If its prefixes decode, images show the
            decoded prefix. Of tokens on a raster, images show the generated positions, and mid-grey elsewhere. These
            are an estimate: for missing tokens the decoder reads known ones, repeated. The images of the last preview
            are final.
    """

    step: int
    total: int
    tokens: Tensor
    known: Tensor
    images: list[Image.Image] | None

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.step} of {self.total} positions)"


def previews(pipe: Pipeline, job: Job, every: int | None = None) -> Iterator[Preview]:
    """Generate the images of a job in one batch, and yield a preview after every ``every`` positions.

    Args:
        every: None takes ``preview_step``.

    Raises:
        ValueError: ``every`` is below 1, or the tokenizer renders no images.
    """
    pipe.tokenizer.check_renders("previews")
    check_whole("preview_every", every, least=1, optional=True)
    return _previews(pipe, job, preview_step(pipe) if every is None else every)


@torch.no_grad()
def _previews(pipe: Pipeline, job: Job, every: int) -> Iterator[Preview]:
    condition, options, keys = job.condition, job.options, job.keys()
    total, seen = pipe.generator.spec.length, 0
    tokens, known = None, torch.zeros(len(condition), total, dtype=torch.bool)
    show = _previewer(pipe, keys, condition)
    draws = pipe.generator.sampling_draws(keys, options)
    stream = pipe.generator.stream(condition.to(pipe.device), options, draws=draws, tokenizer=pipe.in_loop)
    for chunk in stream:
        if tokens is None:
            tokens = torch.zeros(len(condition), total, *chunk.tokens.shape[2:], dtype=chunk.tokens.dtype)
        rows, columns = chunk.valid.cpu().nonzero(as_tuple=True)
        positions = chunk.positions.cpu()[rows, columns]
        tokens[rows, positions] = chunk.tokens.cpu()[rows, columns]
        known[rows, positions] = True
        step = int(known.sum(1).min())
        if step - seen >= every or (step == total and seen < total):
            seen = step
            yield Preview(step, total, tokens.clone(), known.clone(), show(tokens, known))


def preview_step(pipe: Pipeline) -> int:
    """Positions between two previews: ``prefix_step`` of ordered tokens, a row of a grid, else an eighth of all."""
    spec = pipe.tokenizer.spec
    if spec.scales:
        return 1  # every scale shows
    return spec.prefix_step or (pipe.grid[-1] if pipe.grid else max(1, spec.length // 8))


def _previewer(
    pipe: Pipeline, keys: Keys, condition: Condition
) -> Callable[[Tensor, Tensor], list[Image.Image] | None]:
    """A function that renders the tokens of one batch; it is called again as more of them are known."""
    spec, decode_prefix = pipe.tokenizer.spec, None
    if spec.prefixes_decode:
        draws, own = pipe.tokenizer.decoding_draws(keys), pipe.own_condition(condition)
        decode_prefix = pipe.tokenizer.prefix_decoder(draws, condition=own)

    def show(tokens: Tensor, known: Tensor) -> list[Image.Image] | None:
        if decode_prefix is not None:
            prefix = spec.decodable(int(known.int().cumprod(1).sum(1).min()))  # the longest prefix that all images have
            return shown(decode_prefix(pipe.to_tokenizer(tokens[:, :prefix])).float()) if prefix else None
        if bool(known.all()):
            return shown(pipe.decode(tokens, keys, condition))
        if pipe.grid is None or not bool(known.any(1).all()):
            return None
        pixels = pipe.decode(_fill(tokens, known), keys, condition)
        mask = known.view(len(known), 1, *pipe.grid).float()
        return to_pil(pixels * F.interpolate(mask, pixels.shape[2:], mode="nearest"))

    return show


def _fill(tokens: Tensor, known: Tensor) -> Tensor:
    """Fill unknown positions with the known tokens in turn, so that the decoder sees familiar statistics."""
    positions = [row.nonzero()[:, 0] for row in known]
    source = torch.stack([row[torch.arange(known.shape[1]) % len(row)] for row in positions])  # (N, L)
    shape = (*known.shape, *[1] * (tokens.ndim - 2))
    return torch.where(known.view(shape), tokens, tokens.gather(1, source.view(shape).expand_as(tokens)))

"""A run as the demo uses it: what it can do, and the work itself."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from vistok.data.pictures import to_pil
from vistok.demo.pictures import entropy_of
from vistok.draws import Keys, draws_on
from vistok.eval.reconstruction import psnr
from vistok.generators.engine.session import AutoregressiveSession
from vistok.pipelines import Pipeline, PipelineOutput, pipeline
from vistok.pipelines.display import overview
from vistok.pipelines.folders import load_tokenizer
from vistok.pipelines.runs import holds_tokenizer_only
from vistok.tokenizers.base import Tokenizer
from vistok.types import Condition, TokenSpec
from vistok.utils.devices import choose_device

MOST_IMAGES = 16
ENLARGED = 160
"""Generated images are enlarged to at least this many pixels."""
KNOBS = {"guidance_scale": (1.0, 10.0, 0.1), "temperature": (0.0, 2.0, 0.05), "top_p": (0.0, 1.0, 0.01)}
"""Sampling options that the demo offers if a generator has them: lowest, highest, step."""


@dataclass(frozen=True)
class Reconstruction:
    """An image with its tokens and its reconstruction.

    Attributes:
        pixels: (1, C, H, W) in [-1, 1], the tokenizer's input.
        tokens: (1, L[, depth]) ids or (1, L, D) latents.
        decoded: (1, C, H, W) in [-1, 1], the reconstruction.
        psnr: of the reconstruction, in dB.
    """

    pixels: Tensor
    tokens: Tensor
    decoded: Tensor
    psnr: float

    @property
    def original(self) -> Image.Image:
        return to_pil(self.pixels)[0]

    @property
    def reconstruction(self) -> Image.Image:
        return to_pil(self.decoded)[0]


class Run:
    """A tokenizer or a pipeline, with a name.

    Args:
        path: a run folder, a saved tokenizer or pipeline, or a hub id.
        device: where it runs; None chooses.

    Raises:
        CheckpointError: there is nothing at ``path``, or the weights are damaged.
    """

    def __init__(self, path: str, device: str | None = None):
        self.name = Path(path).name or path
        if self.name in ("tokenizer", "generator") and Path(path).absolute().parent.name:
            self.name = f"{Path(path).absolute().parent.name}/{self.name}"
        self.pipe: Pipeline | None = None
        self.tokenizer: Tokenizer
        if holds_tokenizer_only(path):
            self.tokenizer = load_tokenizer(path).to(choose_device(device)).eval()
        else:
            self.pipe = pipeline(path, device=device)
            self.tokenizer = self.pipe.tokenizer

    @property
    def spec(self) -> TokenSpec:
        return self.tokenizer.spec

    @property
    def is_video(self) -> bool:
        return len(self.tokenizer.input_shape) == 4

    @property
    def reads_pictures(self) -> bool:
        """Whether the tokenizer can reconstruct a visitor's picture."""
        shape = self.tokenizer.input_shape
        return not self.is_video and shape[1] == shape[2] and self.tokenizer.renders

    @property
    def classes(self) -> list[str]:
        """The names of all classes; empty without classes."""
        if self.pipe is None or not self.pipe.generator.condition_spec.num_classes:
            return []
        names = self.pipe.class_names
        return list(names) if names else [str(i) for i in range(self.pipe.generator.condition_spec.num_classes)]

    @property
    def takes_prompts(self) -> bool:
        return self.pipe is not None and bool(self.pipe.text.parts)

    @property
    def knobs(self) -> dict[str, tuple[float, float, float, float]]:
        """The sampling options that the demo offers: lowest, highest, step, and the default."""
        if self.pipe is None:
            return {}
        options = self.pipe.options()
        names = {field.name for field in fields(options)}
        found = {name: (*KNOBS[name], getattr(options, name)) for name in KNOBS if name in names}
        return {
            name: (low, max(high, value), step, value)
            for name, (low, high, step, value) in found.items()
            if isinstance(value, int | float) and not (name == "guidance_scale" and not self.pipe.generator.has_null)
        }

    def generate(
        self, what: str | int | None, prompt: str, count: int, seed: int, **sampling: Any
    ) -> Iterator[tuple[Image.Image | None, str, PipelineOutput | None]]:
        """Generate ``count`` images or clips, and yield the progress.

        Args:
            what: the name or the id of a class.
            prompt: a text, for a generator that takes prompts.

        Yields:
            (preview, text, output): for images a grid, the progress and None after each step; for clips None, an empty
            text and the output, once.

        Raises:
            ValueError: the run has no generator; or as the pipeline.
        """
        pipe = self._pipeline()
        request = self._request(pipe, what, prompt, count)
        if self.is_video:  # previews would show frames in a row
            yield None, "", pipe(**request, seed=seed, **sampling)
            return
        for shown in pipe.stream(**request, seed=seed, **sampling):
            images = None if shown.images is None else overview(shown.images, least=ENLARGED)
            yield images, f"{shown.step} of {shown.total} tokens", None

    def _request(self, pipe: Pipeline, what: str | int | None, prompt: str, count: int) -> dict[str, Any]:
        if self.takes_prompts:
            return {"prompt": prompt, "num_images_per_prompt": count}
        if self.classes and what is not None:
            return {"class_labels": what, "num_images_per_label": count}
        return {"num_images": count}

    def _pipeline(self) -> Pipeline:
        """The run's pipeline; ValueError if it has none."""
        if self.pipe is None:
            raise ValueError(f"{self.name} is a tokenizer: it generates nothing")
        return self.pipe

    @torch.no_grad()
    def reconstruct(self, image: Image.Image) -> Reconstruction:
        """Encode and decode an image of any size."""
        pixels = self.tokenizer.preprocess(image)
        tokens = self.tokenizer.encode(pixels)
        decoded = self.decode(tokens)
        truth, made = ((part.float().cpu() + 1) / 2 for part in (pixels, decoded))
        return Reconstruction(pixels.float().cpu(), tokens.cpu(), decoded, float(psnr(truth, made)[0]))

    @torch.no_grad()
    def decode(self, tokens: Tensor) -> Tensor:
        """Decode tokens (1, k[, …]) to pixels (1, C, H, W) in [-1, 1], always with the same noise."""
        tokenizer = self.tokenizer
        draws = draws_on(tokenizer.decoding_draws(Keys.range(0, len(tokens))), tokenizer.device)
        tokens = tokens.to(tokenizer.device, tokenizer.dtype if tokens.is_floating_point() else tokens.dtype)
        options: dict[str, Any] = {"draws": draws} if draws else {}
        return tokenizer.decode(tokens, **options).float().clamp(-1, 1).cpu()

    def prefixes(self) -> list[int]:
        """The numbers of first tokens that can be decoded, ascending; empty if decoding needs all tokens."""
        if not self.spec.prefixes_decode:
            return []
        return sorted({self.spec.decodable(count) for count in range(1, self.spec.length + 1)} - {0})

    def swapped(self, tokens: Tensor, position: int, index: int) -> Tensor:
        """Tokens with another id at one position.

        Raises:
            ValueError: the position or the id is out of range.
        """
        if not 0 <= position < tokens.shape[1]:
            raise ValueError(f"position {position} is none of 0..{tokens.shape[1] - 1}")
        if not 0 <= index < self.spec.num_ids:
            raise ValueError(f"id {index} is none of 0..{self.spec.num_ids - 1}")
        changed = tokens.clone()
        changed[0, position] = index
        return changed

    @torch.no_grad()
    def entropy(self, tokens: Tensor, what: str | int | None) -> Tensor | None:
        """The entropy (L,), in bits, of the generator's prediction of each token, given the tokens before it.

        None without a generator that predicts single ids autoregressively, or if it takes prompts.

        Args:
            tokens: (1, L) ids.
            what: the name or the id of a class, the condition; ignored without classes.
        """
        if self.pipe is None or not self.spec.discrete or self.spec.depth != 1 or self.takes_prompts:
            return None
        generator = self.pipe.generator
        label = what if self.classes else None
        condition = (
            Condition.none(1) if label is None else Condition.from_labels(torch.tensor(self.pipe.class_ids(label)))
        )
        unguided = {"guidance_scale": 1.0} if hasattr(self.pipe.options(), "guidance_scale") else {}
        options = self.pipe.options(**unguided)
        draws = generator.sampling_draws(Keys.range(0, 1), options)
        in_loop = self.tokenizer if generator.needs_tokenizer else None
        session = generator.start(condition.to(self.pipe.device), options, draws=draws, tokenizer=in_loop)
        if not isinstance(session, AutoregressiveSession):
            return None
        order = session.plan.order[0]
        ids, found = tokens[0].to(order.device), torch.zeros(tokens.shape[1], dtype=torch.float64)
        for step in range(len(session.plan)):
            here = slice(session.plan.bounds[step], session.plan.bounds[step + 1])
            found[order[here].cpu()] = entropy_of(session.next_logits()[0]).cpu()
            session.append(ids[order[here]][None])
        return found

"""Generation for people: a tokenizer, a generator, class names and default sampling options, as one object.

A pipeline is a folder with ``tokenizer/``, ``generator/`` and ``pipeline.json``; the run folder of a trained generator
is one.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from vistok.config import check
from vistok.data.clips import repeat_last
from vistok.data.masks import pixel_masks, scale_masks, token_masks
from vistok.data.movies import Movie, frames_to_pixels, shown, to_frames
from vistok.data.pictures import from_pil, to_pil
from vistok.draws import Draws, Keys
from vistok.generators.base import Generator
from vistok.pipelines.classes import ClassLabel, ClassNames
from vistok.pipelines.folders import (
    GENERATOR,
    PIPELINE,
    TOKENIZER,
    load_part,
    pipeline_folder,
    read_settings,
    write_settings,
)
from vistok.pipelines.requests import Conditions, Prompt, Request
from vistok.text import TEXT, PromptEncoder
from vistok.tokenizers.base import Tokenizer
from vistok.types import Condition, TokenSpec, to_json
from vistok.utils.devices import choose_device, choose_dtype
from vistok.utils.files import atomic_folder

NO_TEXT = PromptEncoder()


Frames = np.ndarray | Tensor | Sequence[Image.Image]
"""The first frames of clips; see ``Pipeline.given``."""


@dataclass(frozen=True)
class PipelineOutput:
    """What a pipeline generated.

    Attributes:
        images: N images, mode RGB or L; of clips each shows its frames in a row.
        tokens: (N, L[, depth]) ids or (N, L, D) latents, on the CPU.
        pixels: (N, C, H, W), or (N, C, T, H, W) of clips, float32 in [-1, 1], on the CPU; ``images`` are these in 8
            bit.
        labels: the class id of each image, or None where the condition is not a class.
        prompts: the text of each image, or None where there are no prompts.
    """

    images: list[Image.Image]
    tokens: Tensor
    pixels: Tensor
    labels: list[int] | None
    prompts: list[str | None] | None = None

    @property
    def videos(self) -> np.ndarray:
        """The clips, (N, T, H, W, C) uint8.

        Raises:
            ValueError: these are images.
        """
        if self.pixels.ndim != 5:
            raise ValueError("this pipeline generates images, which have no frames; they are in .images")
        return to_frames(self.pixels)

    @property
    def movies(self) -> list[Movie]:
        """The clips as movies, which play in a notebook and can be saved."""
        return [Movie(frames) for frames in self.videos]


@dataclass(frozen=True)
class Preview:
    """Unfinished images.

    Attributes:
        step: positions that every image has by now.
        total: positions of a finished image.
        tokens: (N, L[, depth]) ids or (N, L, D) latents, zero where they are not generated yet, on the CPU.
        known: (N, L) bool, True where they are.
        images: N images, or None where this tokenizer shows nothing of this many tokens. Tokenizers whose prefixes
            decode show what the tokens so far mean. Of raster tokenizers the finished positions are shown and the rest
            is mid-grey; they are an estimate, because the decoder reads stand-ins (known tokens, repeated) for what is
            still missing. Images of the last preview are the final ones.
    """

    step: int
    total: int
    tokens: Tensor
    known: Tensor
    images: list[Image.Image] | None


class Pipeline:
    """Generates images in one call; see :meth:`__call__`, :meth:`stream` and :meth:`reconstruct`.

    Args:
        tokenizer, generator: they must agree on the tokens.
        class_names: in the order of the ids; empty if classes have no names.
        sampling: default options, by the names of ``generator.options_type``.
        text: what turns prompts into conditions of the generator; without encoders there are no prompts.

    Raises:
        ValueError: the generator models other tokens than the tokenizer's, has another number of classes, or takes
            other texts than ``text`` makes.
        ConfigError: ``sampling`` does not fit the generator's options.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        generator: Generator,
        *,
        class_names: Sequence[str] = (),
        sampling: Mapping[str, Any] | None = None,
        text: PromptEncoder = NO_TEXT,
    ):
        self.tokenizer, self.generator = tokenizer.eval(), generator.eval()
        self._decode_options = _decode_options(tokenizer, generator.spec)
        spec = generator.condition_spec
        self.text, self._classes = text, ClassNames(spec.num_classes, class_names)
        self._conditions = Conditions(spec, self._classes, text)
        self.sampling = dict(sampling or {})
        generator.options_type(**check(generator.options_type, self.sampling, "sampling"))

    @property
    def class_names(self) -> tuple[str, ...]:
        """In the order of the ids; empty if classes have no names."""
        return self._classes.names

    def class_ids(self, labels: ClassLabel | Iterable[ClassLabel]) -> list[int]:
        """Ids of classes given by id or by name.

        Raises:
            ValueError: an unknown or ambiguous name, an id out of range, or a pipeline without classes.
        """
        return self._conditions.class_ids(labels)

    @property
    def device(self) -> torch.device:
        """Where the generator is; the tokenizer may be elsewhere."""
        return next(self.generator.parameters()).device

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Self:
        """Move the models; returns the pipeline itself. Text encoders keep their dtype."""
        self.tokenizer.to(device=device, dtype=dtype)
        self.generator.to(device=device, dtype=dtype)
        if device is not None:
            self.text.to(device)
        return self

    def compile(self) -> Self:
        """Sample with compiled steps from now on, on a CUDA device as one graph launch per token; returns the pipeline
        itself. The first images of a batch size take longer, and on a CPU the others do, too.

        Raises:
            ValueError: a generator without compiled decoding.
        """
        self.generator.compile_decoding()
        return self

    @classmethod
    def from_pretrained(
        cls, path: str | Path, *, device: torch.device | str | None = None, dtype: torch.dtype | str | None = None
    ) -> Self:
        """Load a pipeline from a folder or a hub id.

        Args:
            device: None takes a GPU if there is one.
            dtype: of all weights and computation, as torch has it or "fp32", "bf16" or "fp16"; None keeps that of the
                saved weights.

        Raises:
            CheckpointError: nothing there, no whole pipeline, or damaged weights.
            ValueError: an unknown dtype, or a device that is not there.
        """
        folder = pipeline_folder(path)
        settings = read_settings(folder)
        tokenizer, generator = load_part(folder, TOKENIZER, Tokenizer), load_part(folder, GENERATOR, Generator)
        pipe = cls(tokenizer, generator, **settings, text=PromptEncoder.load(folder / TEXT))
        return pipe.to(choose_device(device), choose_dtype(dtype))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the pipeline folder as a whole, or not at all; an older pipeline there is replaced.

        Raises:
            FileExistsError: the folder holds something else, such as a training run.
        """
        folder = Path(folder)
        present = {entry.name for entry in folder.iterdir()} if folder.exists() else set()
        others = present - {PIPELINE, TOKENIZER, GENERATOR, TEXT}
        if others:
            raise FileExistsError(f"{folder} holds other files ({', '.join(sorted(others)[:5])}); choose a new folder")
        with atomic_folder(folder, replace=True) as partial:
            self.tokenizer.save_pretrained(partial / TOKENIZER)
            self.generator.save_pretrained(partial / GENERATOR)
            if self.text.parts:
                self.text.save(partial / TEXT)
            write_settings(partial, class_names=self.class_names, sampling=self.sampling)

    def options(self, **sampling: Any) -> Any:
        """The options that a call with these would use: an ``options_type``, with ``self.sampling`` for the others."""
        options_type = self.generator.options_type
        return options_type(**check(options_type, {**self.sampling, **sampling}, ""))

    @torch.no_grad()
    def __call__(
        self,
        class_labels: ClassLabel | Iterable[ClassLabel] | None = None,
        num_images_per_label: int = 1,
        *,
        prompt: Prompt | None = None,
        negative_prompt: Prompt | None = None,
        num_images_per_prompt: int = 1,
        num_images: int | None = None,
        frames: Frames | None = None,
        condition: Condition | None = None,
        seed: int | None = None,
        generator: torch.Generator | None = None,
        index_start: int = 0,
        batch_size: int = 64,
        **sampling: Any,
    ) -> PipelineOutput:
        """Generate images, or clips.

        Image i depends on the seed, on ``index_start + i``, its condition and the options alone, not on how many are
        made together.

        Args:
            class_labels: classes by id or by name, one or several.
            num_images_per_label: images of each class (or row of ``condition``), one after another.
            prompt: instead of classes, or beside them where the generator takes both: texts, one or several; None
                among them is unconditional.
            negative_prompt: what guidance leads away from, in place of the unconditional: one text, or one for each.
            num_images_per_prompt: images of each prompt, one after another.
            num_images: instead of classes: this many unconditional images.
            frames: instead of classes: the first frames of each clip, as of ``given``.
            condition: instead of classes: any condition that the generator takes.
            seed: None takes 0, or a seed drawn from ``generator``.
            generator: the source of the seed, as in diffusers.
            index_start: the number of the first image among those of its seed.
            batch_size: images generated at a time.
            **sampling: options of ``self.generator.options_type``, such as ``temperature`` or ``guidance_scale``;
                they override ``self.sampling``.

        Raises:
            ValueError: an unknown class, an option out of range, none or several of class_labels, prompt, num_images,
                frames and condition, or a prompt without a text encoder.
            ConfigError: an unknown option, or one of the wrong type.
        """
        if frames is not None:
            if condition is not None:
                raise ValueError("give frames or condition, not both: frames are a condition")
            condition = self.given(frames)
        options = self.options(**sampling)
        copies = _copies(num_images_per_label, num_images_per_prompt)
        request = Request(class_labels, prompt, negative_prompt, num_images, condition, copies)
        condition = self._condition(request, options)

        def sample(rows: slice, draws: Draws) -> Tensor:
            return self.generator.sample(condition[rows].to(self.device), options, draws=draws, tokenizer=self.in_loop)

        made = self._run(sample, condition, options, _seed(seed, generator), index_start, batch_size)
        return replace(made, prompts=_prompts(request, len(condition)))

    @torch.no_grad()
    def edit(
        self,
        images: Image.Image | Sequence[Image.Image] | Tensor,
        masks: Image.Image | Sequence[Image.Image] | Tensor,
        class_labels: ClassLabel | Iterable[ClassLabel] | None = None,
        *,
        prompt: Prompt | None = None,
        negative_prompt: Prompt | None = None,
        seed: int | None = None,
        generator: torch.Generator | None = None,
        index_start: int = 0,
        batch_size: int = 64,
        **sampling: Any,
    ) -> PipelineOutput:
        """Generate a part of each image anew: inpainting, or class-conditional editing if the class is another one.

        A token that the mask touches is generated, the others are kept; what is kept looks as ``reconstruct`` has it.
        Of tokens in scales, those of the last are, and of smaller ones that lie mostly in the mask (``scale_masks``).

        Args:
            images: as of :meth:`reconstruct`.
            masks: what is generated. PIL images of the sizes of ``images``, light where it is; or a bool tensor, (H, W)
                or (B, H, W), of the size that the images have after cropping. One mask serves all images.
            class_labels: what to generate: one class for all images, or one for each; None leaves it to the model.
            prompt, negative_prompt: the same by texts.

        The others are as of :meth:`__call__`.

        Raises:
            ValueError: a generator that cannot fill in any positions (``mar`` and ``var`` can), masks or classes that
                do not fit the images, tokens without a place in the image, and as of :meth:`__call__`.
        """
        options, pixels = self.options(**sampling), self._pixels(images)
        scales = self.tokenizer.spec.scales
        grid = scales[-1] if scales else self._grid
        if grid is None:
            raise ValueError("the tokens of this tokenizer have no place in the image, so a part of it has none either")
        masks = pixel_masks(masks, len(pixels), (pixels.shape[2], pixels.shape[3]))
        regenerate = token_masks(masks, grid).to(self.device)
        if scales:
            regenerate = scale_masks(regenerate.unflatten(1, grid), scales)
        in_loop = {"tokenizer": self.tokenizer} if self.generator.needs_tokenizer else {}
        request = Request(class_labels, prompt, negative_prompt)
        condition = self._checked(self._conditions.of_images(request, len(pixels)), request, options)

        def edit(rows: slice, draws: Draws) -> Tensor:
            tokens = self.tokenizer.encode(self._to_tokenizer(pixels[rows])).to(self.device)
            given = condition[rows].to(self.device)
            return self.generator.edit(tokens, regenerate[rows], given, options, draws=draws, **in_loop)

        made = self._run(edit, condition, options, _seed(seed, generator), index_start, batch_size)
        return replace(made, prompts=_prompts(request, len(condition)))

    def _run(
        self,
        make: Callable[[slice, Draws], Tensor],
        condition: Condition,
        options: Any,
        seed: int,
        index_start: int,
        batch_size: int,
    ) -> PipelineOutput:
        """The images of all rows of ``condition``, whose tokens ``make`` returns for some rows and their draws."""
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.tokenizer.check_renders("making images")
        tokens, pixels = [], []
        for start in range(0, len(condition), batch_size):
            rows = slice(start, start + batch_size)
            keys = Keys.range(seed, len(condition[rows]), index_start + start)
            batch = make(rows, self.generator.sampling_draws(keys, options))
            tokens.append(batch.cpu())
            pixels.append(self.decode(batch, self.tokenizer.decoding_draws(keys), condition[rows]))
        pixels = torch.cat(pixels)
        labels = None if condition.labels is None else condition.labels.tolist()
        return PipelineOutput(shown(pixels), torch.cat(tokens), pixels, labels)

    def stream(
        self,
        class_labels: ClassLabel | Iterable[ClassLabel] | None = None,
        num_images_per_label: int = 1,
        *,
        prompt: Prompt | None = None,
        negative_prompt: Prompt | None = None,
        num_images_per_prompt: int = 1,
        num_images: int | None = None,
        condition: Condition | None = None,
        seed: int | None = None,
        generator: torch.Generator | None = None,
        index_start: int = 0,
        preview_every: int | None = None,
        **sampling: Any,
    ) -> Iterator[Preview]:
        """Generate images, all in one batch, and yield previews on the way; arguments as of :meth:`__call__`.

        Args:
            preview_every: positions between two previews; None takes a row of the grid, or what the tokenizer's
                prefixes are multiples of.
        """
        options = self.options(**sampling)
        copies = _copies(num_images_per_label, num_images_per_prompt)
        request = Request(class_labels, prompt, negative_prompt, num_images, condition, copies)
        condition = self._condition(request, options)
        self.tokenizer.check_renders("previews")
        every = self._preview_step() if preview_every is None else preview_every
        if every < 1:
            raise ValueError(f"preview_every must be at least 1, got {every}")
        return self._previews(
            condition, options, Keys.range(_seed(seed, generator), len(condition), index_start), every
        )

    @torch.no_grad()
    def reconstruct(self, images: Image.Image | Sequence[Image.Image] | Tensor) -> list[Image.Image]:
        """Encode and decode images.

        Args:
            images: PIL images, cropped to the tokenizer's size (ADM's centre crop); or pixels (B, C, H, W) in [-1, 1]
                of exactly that size.
        """
        return shown(self.tokenizer.reconstruct(self._to_tokenizer(self._pixels(images))))

    @torch.no_grad()
    def given(self, frames: Frames) -> Condition:
        """The condition of clips that begin with these frames: their tokens, the last frame repeated to a whole clip.

        Args:
            frames: of one clip uint8 (t, H, W, C), as ``videos[0][:t]``, or a list of images; of several clips uint8
                (B, t, H, W, C), or float (B, C, t, H, W) in [-1, 1].

        Raises:
            ValueError: a tokenizer of images, other shapes, or more frames than a clip has.
        """
        shape = self.tokenizer.input_shape
        if len(shape) != 4:
            raise ValueError(f"{type(self.tokenizer).__name__} reads images: there are no clips to begin with frames")
        channels, length, height, width = shape
        if height != width:
            raise ValueError(
                f"frames are cropped to squares, but this tokenizer reads {height}x{width}; pass condition="
            )
        clips = repeat_last(frames_to_pixels(frames, height, channels), length)
        return Condition.from_given(self.tokenizer.encode(self._to_tokenizer(clips)).cpu())

    def _pixels(self, images: Image.Image | Sequence[Image.Image] | Tensor) -> Tensor:
        """Pixels (B, C, H, W) as they are, or of PIL images."""
        if isinstance(images, Tensor):
            return images
        channels, *size = self.tokenizer.image_shape("reading PIL images")
        return from_pil([images] if isinstance(images, Image.Image) else images, tuple(size), channels)

    def _to_tokenizer(self, values: Tensor) -> Tensor:
        """Pixels, latents or ids on the tokenizer's device, which need not be the generator's; floats in its
        precision."""
        parameter = next(self.tokenizer.parameters())
        return values.to(parameter.device, parameter.dtype if values.is_floating_point() else values.dtype)

    def _condition(self, request: Request, options: Any) -> Condition:
        """The condition of every image of a request."""
        return self._checked(self._conditions.of(request), request, options)

    def _checked(self, condition: Condition, request: Request, options: Any) -> Condition:
        """A condition that this generator takes with these options."""
        self.generator.check_condition(condition)
        if request.negative_prompt is not None:
            scale = to_json(options).get("guidance_scale", 1)
            if scale in (1, [1, 1]):
                raise ValueError(f"negative_prompt has no effect without guidance: guidance_scale is {scale}")
        return condition

    def decode(self, tokens: Tensor, draws: Draws, condition: Condition) -> Tensor:
        """Whole sequences to pixels (B, C, H, W) in [-1, 1], float32 on the CPU, with ``decoding_draws``.

        Args:
            condition: that the tokens were generated with; the tokenizer takes its part of it.
        """
        options = self._decode_options | ({"draws": draws} if draws else {})
        own = self._own_condition(condition)
        return self.tokenizer.decode(self._to_tokenizer(tokens), condition=own, **options).float().clamp(-1, 1).cpu()

    @property
    def in_loop(self) -> Tokenizer | None:
        """The tokenizer, for a generator that has it in its loop."""
        return self.tokenizer if self.generator.needs_tokenizer else None

    def _own_condition(self, condition: Condition) -> Condition | None:
        """What the tokenizer takes of the generator's condition, on its device."""
        own = self.tokenizer.own_condition(condition)
        return None if own is None else own.to(next(self.tokenizer.parameters()).device)

    @torch.no_grad()
    def _previews(self, condition: Condition, options: Any, keys: Keys, every: int) -> Iterator[Preview]:
        total, shown = self.generator.spec.length, 0
        tokens, known = None, torch.zeros(len(condition), total, dtype=torch.bool)
        show = self._previewer(self.tokenizer.decoding_draws(keys), condition)
        draws = self.generator.sampling_draws(keys, options)
        stream = self.generator.stream(condition.to(self.device), options, draws=draws, tokenizer=self.in_loop)
        for chunk in stream:
            if tokens is None:
                tokens = torch.zeros(len(condition), total, *chunk.tokens.shape[2:], dtype=chunk.tokens.dtype)
            rows, columns = chunk.valid.cpu().nonzero(as_tuple=True)
            positions = chunk.positions.cpu()[rows, columns]
            tokens[rows, positions] = chunk.tokens.cpu()[rows, columns]
            known[rows, positions] = True
            step = int(known.sum(1).min())
            if step - shown >= every or (step == total and shown < total):
                shown = step
                yield Preview(step, total, tokens.clone(), known.clone(), show(tokens, known))

    def _previewer(self, draws: Draws, condition: Condition) -> Callable[[Tensor, Tensor], list[Image.Image] | None]:
        """What shows the tokens of one batch, again and again, as more of them are known."""
        spec = self.tokenizer.spec
        own = self._own_condition(condition)
        decode_prefix = self.tokenizer.prefix_decoder(draws, condition=own) if spec.prefixes_decode else None

        def show(tokens: Tensor, known: Tensor) -> list[Image.Image] | None:
            if decode_prefix is not None:
                prefix = spec.decodable(int(known.int().cumprod(1).sum(1).min()))  # the longest that all images have
                return shown(decode_prefix(self._to_tokenizer(tokens[:, :prefix])).float()) if prefix else None
            if bool(known.all()):
                return shown(self.decode(tokens, draws, condition))
            if self._grid is None or not bool(known.any(1).all()):
                return None
            pixels = self.decode(_fill(tokens, known), draws, condition)
            mask = known.view(len(known), 1, *self._grid).float()
            return to_pil(pixels * F.interpolate(mask, pixels.shape[2:], mode="nearest"))

        return show

    @property
    def _grid(self) -> tuple[int, int] | None:
        grid = self._decode_options.get("grid", self.tokenizer.spec.grid)
        return grid if grid is not None and len(grid) == 2 else None

    def _preview_step(self) -> int:
        spec = self.tokenizer.spec
        if spec.scales:
            return 1  # every scale shows
        return spec.prefix_step or (self._grid[-1] if self._grid else max(1, spec.length // 8))


pipeline = Pipeline.from_pretrained
"""``vistok.pipeline(path, *, device=None, dtype=None)``: load a pipeline from a folder or a hub id."""


def _decode_options(tokenizer: Tokenizer, spec: TokenSpec) -> dict[str, Any]:
    """What ``decode`` has to be told of tokens with a generator's ``spec``; ValueError if they do not fit."""
    own = tokenizer.spec
    names = ("codebook_size", "depth") if own.discrete else ("codebook_size", "dim")
    differing = [name for name in names if getattr(own, name) != getattr(spec, name)]
    if not differing and own.length == spec.length:
        return {}
    if not differing and spec.grid is not None and "grid" in inspect.signature(tokenizer.decode).parameters:
        return {"grid": spec.grid}  # a convolutional tokenizer at another image size
    differing = differing or ["length"]
    raise ValueError(
        "the generator models other tokens than this tokenizer makes: "
        + "; ".join(f"{name} {getattr(spec, name)} instead of {getattr(own, name)}" for name in differing)
    )


def _copies(per_label: int, per_prompt: int) -> int:
    """How many images each class or prompt gets; both words say the same."""
    if per_label != 1 and per_prompt != 1:
        raise ValueError("give num_images_per_label or num_images_per_prompt, not both")
    return per_label if per_prompt == 1 else per_prompt


def _prompts(request: Request, count: int) -> list[str | None] | None:
    """The prompt of each of ``count`` images."""
    if request.prompt is None:
        return None
    texts = [request.prompt] if isinstance(request.prompt, str) else list(request.prompt)
    each = max(count // len(texts), 1)
    return [texts[index // each] for index in range(count)]


def _seed(seed: int | None, generator: torch.Generator | None) -> int:
    if generator is None:
        return 0 if seed is None else seed
    if seed is not None:
        raise ValueError("give either seed or generator, not both")
    return int(torch.randint(1 << 62, (), generator=generator, device=generator.device))


def _fill(tokens: Tensor, known: Tensor) -> Tensor:
    """Unknown positions repeat the known tokens in turn, so that a decoder sees statistics that it is used to."""
    positions = [row.nonzero()[:, 0] for row in known]
    source = torch.stack([row[torch.arange(known.shape[1]) % len(row)] for row in positions])  # (N, L)
    shape = (*known.shape, *[1] * (tokens.ndim - 2))
    return torch.where(known.view(shape), tokens, tokens.gather(1, source.view(shape).expand_as(tokens)))

"""Generation for people: a tokenizer, a generator, class names and default sampling options, as one object.

A pipeline is a folder with ``tokenizer/``, ``generator/`` and ``pipeline.json``; the run folder of a trained generator
is one.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from vistok.config import check
from vistok.data.masks import pixel_masks, token_masks
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
from vistok.tokenizers.base import Tokenizer
from vistok.types import Condition, TokenSpec
from vistok.utils.devices import choose_device, choose_dtype
from vistok.utils.files import atomic_folder


@dataclass(frozen=True)
class PipelineOutput:
    """What a pipeline generated.

    Attributes:
        images: N images, mode RGB or L.
        tokens: (N, L[, depth]) ids or (N, L, D) latents, on the CPU.
        pixels: (N, C, H, W) float32 in [-1, 1], on the CPU; ``images`` are these in 8 bit.
        labels: the class id of each image, or None where the condition is not a class.
    """

    images: list[Image.Image]
    tokens: Tensor
    pixels: Tensor
    labels: list[int] | None


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

    Raises:
        ValueError: the generator models other tokens than the tokenizer's, or has another number of classes.
        ConfigError: ``sampling`` does not fit the generator's options.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        generator: Generator,
        *,
        class_names: Sequence[str] = (),
        sampling: Mapping[str, Any] | None = None,
    ):
        self.tokenizer, self.generator = tokenizer.eval(), generator.eval()
        self._decode_options = _decode_options(tokenizer, generator.spec)
        self._classes = ClassNames(generator.num_classes or 0, class_names)
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
        if not self._classes.count:
            raise ValueError("this pipeline has no classes; generate with num_images=…, without class labels")
        return self._classes.resolve(labels)

    @property
    def device(self) -> torch.device:
        """Where the generator is; the tokenizer may be elsewhere."""
        return next(self.generator.parameters()).device

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Self:
        """Move both models; returns the pipeline itself."""
        self.tokenizer.to(device=device, dtype=dtype)
        self.generator.to(device=device, dtype=dtype)
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
        pipe = cls(tokenizer, generator, **settings)
        return pipe.to(choose_device(device), choose_dtype(dtype))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the pipeline folder as a whole, or not at all; an older pipeline there is replaced.

        Raises:
            FileExistsError: the folder holds something else, such as a training run.
        """
        folder = Path(folder)
        present = {entry.name for entry in folder.iterdir()} if folder.exists() else set()
        others = present - {PIPELINE, TOKENIZER, GENERATOR}
        if others:
            raise FileExistsError(f"{folder} holds other files ({', '.join(sorted(others)[:5])}); choose a new folder")
        with atomic_folder(folder, replace=True) as partial:
            self.tokenizer.save_pretrained(partial / TOKENIZER)
            self.generator.save_pretrained(partial / GENERATOR)
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
        num_images: int | None = None,
        condition: Condition | None = None,
        seed: int | None = None,
        generator: torch.Generator | None = None,
        index_start: int = 0,
        batch_size: int = 64,
        **sampling: Any,
    ) -> PipelineOutput:
        """Generate images.

        Image i depends on the seed, on ``index_start + i``, its condition and the options alone, not on how many are
        made together.

        Args:
            class_labels: classes by id or by name, one or several.
            num_images_per_label: images of each class (or row of ``condition``), one after another.
            num_images: instead of classes: this many unconditional images.
            condition: instead of classes: any condition that the generator takes.
            seed: None takes 0, or a seed drawn from ``generator``.
            generator: the source of the seed, as in diffusers.
            index_start: the number of the first image among those of its seed.
            batch_size: images generated at a time.
            **sampling: options of ``self.generator.options_type``, such as ``temperature`` or ``guidance_scale``;
                they override ``self.sampling``.

        Raises:
            ValueError: an unknown class, an option out of range, or none or several of class_labels, num_images and
                condition.
            ConfigError: an unknown option, or one of the wrong type.
        """
        options = self.options(**sampling)
        condition = self._condition(class_labels, num_images, condition, num_images_per_label)

        def sample(rows: slice, draws: Draws) -> Tensor:
            return self.generator.sample(condition[rows].to(self.device), options, draws=draws)

        return self._run(sample, condition, options, _seed(seed, generator), index_start, batch_size)

    @torch.no_grad()
    def edit(
        self,
        images: Image.Image | Sequence[Image.Image] | Tensor,
        masks: Image.Image | Sequence[Image.Image] | Tensor,
        class_labels: ClassLabel | Iterable[ClassLabel] | None = None,
        *,
        seed: int | None = None,
        generator: torch.Generator | None = None,
        index_start: int = 0,
        batch_size: int = 64,
        **sampling: Any,
    ) -> PipelineOutput:
        """Generate a part of each image anew: inpainting, or class-conditional editing if the class is another one.

        A token that the mask touches is generated, the others are kept; what is kept looks as ``reconstruct`` has it.

        Args:
            images: as of :meth:`reconstruct`.
            masks: what is generated. PIL images of the sizes of ``images``, light where it is; or a bool tensor, (H, W)
                or (B, H, W), of the size that the images have after cropping. One mask serves all images.
            class_labels: what to generate: one class for all images, or one for each; None leaves it to the model.

        The others are as of :meth:`__call__`.

        Raises:
            ValueError: a generator that cannot fill in any positions (``mar`` can), masks or classes that do not fit
                the images, tokens without a place in the image, and as of :meth:`__call__`.
        """
        options, pixels = self.options(**sampling), self._pixels(images)
        if self._grid is None:
            raise ValueError("the tokens of this tokenizer have no place in the image, so a part of it has none either")
        masks = pixel_masks(masks, len(pixels), (pixels.shape[2], pixels.shape[3]))
        regenerate = token_masks(masks, self._grid).to(self.device)
        condition = self._condition_of_images(class_labels, len(pixels))

        def edit(rows: slice, draws: Draws) -> Tensor:
            tokens = self.tokenizer.encode(self._to_tokenizer(pixels[rows])).to(self.device)
            return self.generator.edit(tokens, regenerate[rows], condition[rows].to(self.device), options, draws=draws)

        return self._run(edit, condition, options, _seed(seed, generator), index_start, batch_size)

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
        tokens, pixels = [], []
        for start in range(0, len(condition), batch_size):
            rows = slice(start, start + batch_size)
            keys = Keys.range(seed, len(condition[rows]), index_start + start)
            batch = make(rows, self.generator.sampling_draws(keys, options))
            tokens.append(batch.cpu())
            pixels.append(self._decode(batch, self.tokenizer.decoding_draws(keys)))
        pixels = torch.cat(pixels)
        labels = None if condition.labels is None else condition.labels.tolist()
        return PipelineOutput(to_pil(pixels), torch.cat(tokens), pixels, labels)

    def stream(
        self,
        class_labels: ClassLabel | Iterable[ClassLabel] | None = None,
        num_images_per_label: int = 1,
        *,
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
        condition = self._condition(class_labels, num_images, condition, num_images_per_label)
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
        return to_pil(self.tokenizer.reconstruct(self._to_tokenizer(self._pixels(images))))

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

    def _condition_of_images(self, class_labels: ClassLabel | Iterable[ClassLabel] | None, count: int) -> Condition:
        """One class for all of ``count`` images, one for each, or none."""
        if class_labels is None:
            return Condition.none(count)
        ids = self.class_ids(class_labels)
        if len(ids) not in (1, count):
            raise ValueError(f"give one class, or one for each of the {count} images; got {len(ids)}")
        return Condition.from_labels(torch.tensor(ids, dtype=torch.int64).expand(count))

    def _condition(
        self,
        class_labels: ClassLabel | Iterable[ClassLabel] | None,
        num_images: int | None,
        condition: Condition | None,
        copies: int,
    ) -> Condition:
        """The condition of every image, from the one way in which it was given."""
        given = [value is not None for value in (class_labels, num_images, condition)]
        if sum(given) != 1:
            what = "class_labels=[…]" if self._classes.count else "num_images=…"
            raise ValueError(
                f"say what to generate by one of class_labels, num_images and condition ({sum(given)} were given); "
                f"for this pipeline, {what} is the usual one"
            )
        for name, value in (("num_images_per_label", copies), ("num_images", num_images)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if num_images is not None:
            return Condition.none(num_images)
        if class_labels is not None:
            condition = Condition.from_labels(torch.tensor(self.class_ids(class_labels), dtype=torch.int64))
        if not len(condition):
            raise ValueError("there is nothing to generate: the list of classes is empty")
        return condition[torch.arange(len(condition)).repeat_interleave(copies)]

    def _decode(self, tokens: Tensor, draws: Draws) -> Tensor:
        """Whole sequences to pixels (B, C, H, W) in [-1, 1], float32 on the CPU, with ``decoding_draws``."""
        options = self._decode_options | ({"draws": draws} if draws else {})
        return self.tokenizer.decode(self._to_tokenizer(tokens), **options).float().clamp(-1, 1).cpu()

    @torch.no_grad()
    def _previews(self, condition: Condition, options: Any, keys: Keys, every: int) -> Iterator[Preview]:
        total, shown = self.generator.spec.length, 0
        tokens, known = None, torch.zeros(len(condition), total, dtype=torch.bool)
        show = self._previewer(self.tokenizer.decoding_draws(keys))
        draws = self.generator.sampling_draws(keys, options)
        for chunk in self.generator.stream(condition.to(self.device), options, draws=draws):
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

    def _previewer(self, draws: Draws) -> Callable[[Tensor, Tensor], list[Image.Image] | None]:
        """What shows the tokens of one batch, again and again, as more of them are known."""
        step = self.tokenizer.spec.prefix_step
        decode_prefix = None if step is None else self.tokenizer.prefix_decoder(draws)

        def show(tokens: Tensor, known: Tensor) -> list[Image.Image] | None:
            if decode_prefix is not None:
                prefix = int(known.int().cumprod(1).sum(1).min())  # the longest that all images have
                prefix -= prefix % step
                return to_pil(decode_prefix(self._to_tokenizer(tokens[:, :prefix])).float()) if prefix else None
            if bool(known.all()):
                return to_pil(self._decode(tokens, draws))
            if self._grid is None or not bool(known.any(1).all()):
                return None
            pixels = self._decode(_fill(tokens, known), draws)
            mask = known.view(len(known), 1, *self._grid).float()
            return to_pil(pixels * F.interpolate(mask, pixels.shape[2:], mode="nearest"))

        return show

    @property
    def _grid(self) -> tuple[int, int] | None:
        grid = self._decode_options.get("grid", self.tokenizer.spec.grid)
        return grid if grid is not None and len(grid) == 2 else None

    def _preview_step(self) -> int:
        spec = self.tokenizer.spec
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

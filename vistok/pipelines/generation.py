"""Generation for people: a tokenizer, a generator, class names and default sampling options, as one object.

A pipeline is a folder with ``tokenizer/``, ``generator/`` and ``pipeline.json``; the run folder of a trained generator
is one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from PIL import Image
from torch import Tensor

from vistok.config import check
from vistok.data.movies import shown
from vistok.draws import Draws, Keys
from vistok.generators.base import Generator
from vistok.generators.engine.sampling import DecodingOptions, refuse_without_effect
from vistok.pipelines.card import model_card, push_to_hub
from vistok.pipelines.chat import MAX_TOKENS, Chat, Message, captions
from vistok.pipelines.classes import ClassLabel, ClassNames
from vistok.pipelines.display import describe
from vistok.pipelines.folders import (
    GENERATOR,
    TOKENIZER,
    load_part,
    pipeline_folder,
    read_settings,
    write_pipeline,
)
from vistok.pipelines.inputs import Frames, Images, first_frames, masked_tokens
from vistok.pipelines.jobs import accept, generate
from vistok.pipelines.output import PipelineOutput
from vistok.pipelines.previews import Preview, previews
from vistok.pipelines.renderers import Renderer
from vistok.pipelines.requests import Conditions, Prompt, Request
from vistok.pipelines.runs import RUN_CONFIG
from vistok.pipelines.steps import StepCallback, every_step
from vistok.text import TEXT, PromptEncoder
from vistok.tokenizers.base import Tokenizer
from vistok.types import Condition
from vistok.utils.devices import choose_device, choose_dtype

NO_TEXT = PromptEncoder()


class Pipeline:
    """Generates images in one call; see :meth:`__call__`, :meth:`stream` and :meth:`reconstruct`.

    Args:
        tokenizer, generator: they must agree on the tokens.
        class_names: in the order of the ids; by default those that the generator has itself, if any.
        sampling: default options, by the names of ``generator.options_type``.
        text: what turns prompts into conditions of the generator; without encoders there are no prompts.

    Attributes:
        renderer: makes the images where the tokenizer decodes to embeddings; to be set before images are made.

    Raises:
        ValueError: the generator models other tokens than the tokenizer's, has another number of classes, or takes
            other texts than ``text`` makes.
        ConfigError: ``sampling`` does not fit the generator's options.
    """

    source: Path | None = None
    """The folder that it was loaded from."""
    renderer: Renderer | None = None

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
        self._decode_options = tokenizer.decode_options(generator.spec)
        generator.check_tokenizer(self.in_loop)
        spec = generator.condition_spec
        names = class_names or (generator.class_names if spec.num_classes else ())
        self.text, self._classes = text, ClassNames(spec.num_classes, names)
        self._conditions = Conditions(spec, self._classes, text)
        self.sampling = dict(sampling or {})
        generator.options_type(**check(generator.options_type, self.sampling, "sampling"))

    def __repr__(self) -> str:
        return describe(self)

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
        return self.generator.device

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
        tokenizer: Tokenizer = load_part(folder, TOKENIZER, Tokenizer)
        generator: Generator = load_part(folder, GENERATOR, Generator)
        pipe = cls(tokenizer, generator, **settings, text=PromptEncoder.load(folder / TEXT))
        pipe.source = folder
        return pipe.to(choose_device(device), choose_dtype(dtype))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the pipeline folder as a whole, or not at all; an older pipeline there is replaced.

        Raises:
            FileExistsError: the folder holds something else, such as a training run.
        """
        parts = {TOKENIZER: self.tokenizer, GENERATOR: self.generator}
        write_pipeline(folder, parts, self.text, class_names=self.class_names, sampling=self.sampling)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        license: str | None = None,
        scores: Mapping[str, float] | str | Path | None = None,
        run: str | Path | None = None,
        private: bool = False,
        token: str | None = None,
    ) -> str:
        """Upload the pipeline with a model card; ``vistok.pipeline(repo_id)`` loads it. Returns its address.

        Args:
            license, scores, run: for the card; see ``vistok.pipelines.card.model_card``. ``run`` is by default the run
                that the pipeline was loaded from.
            private: whether a new repository is.
            token: of the hub; by default the one that is logged in.

        Raises:
            FileNotFoundError, ValueError: as ``model_card``.
        """
        own = self.source if self.source is not None and (self.source / RUN_CONFIG).is_file() else None
        card = model_card(self, repo_id, licence=license, scores=scores, run=own if run is None else run)
        return push_to_hub(self, repo_id, card, private=private, token=token)

    def options(self, **sampling: Any) -> Any:
        """The options that a call with these would use: an ``options_type``, with ``self.sampling`` for the others.

        Raises:
            ValueError: an unknown option, a value out of range, or one that has no effect with the chosen decoding.
        """
        options_type = self.generator.options_type
        options = options_type(**check(options_type, {**self.sampling, **sampling}, ""))
        if isinstance(options, DecodingOptions):
            refuse_without_effect(options, sampling)
        return options

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
        callback_on_step_end: StepCallback | None = None,
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
            frames: instead of classes: the first frames of each clip, as in ``given``.
            condition: instead of classes: any condition that the generator takes.
            seed: None takes 0, or a seed drawn from ``generator``.
            generator: the source of the seed, as in diffusers.
            index_start: the number of the first image among those of its seed.
            batch_size: images generated at a time.
            callback_on_step_end: called after each step of a batch; see ``vistok.pipelines.steps.every_step``.
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
        request = Request(
            class_labels,
            prompt,
            negative_prompt,
            num_images,
            condition,
            num_images_per_label,
            num_images_per_prompt,
            seed,
            generator,
            index_start,
            sampling,
        )
        job = accept(self, self._conditions, self.__call__, request)

        def sample(rows: slice, condition: Condition, draws: Draws) -> Tensor:
            on_step = every_step(self, callback_on_step_end)
            return self.generator.sample(condition, job.options, draws=draws, tokenizer=self.in_loop, on_step=on_step)

        return generate(self, job, sample, batch_size)

    @torch.no_grad()
    def edit(
        self,
        images: Images,
        masks: Images,
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

        Generators that fill in any positions look at all that is kept. Those of one token after another look at what
        comes before: in a raster above and to the left. They **do not look at what is kept to the right and below**,
        which the generated part need not meet well; masks that reach the lower right corner lose nothing.

        Args:
            images: as in :meth:`reconstruct`.
            masks: what is generated. PIL images of the sizes of ``images``, light where it is; or a bool tensor, (H, W)
                or (B, H, W), of the size that the images have after cropping. One mask serves all images.
            class_labels: what to generate: one class for all images, or one for each; None leaves it to the model.
            prompt, negative_prompt: the same by texts.

        The others are those of :meth:`__call__`.

        Raises:
            ValueError: a generator that cannot keep tokens (see its ``edit``), masks or classes that do not fit the
                images, tokens without a place in the image, and as in :meth:`__call__`.
        """
        self.generator.check_edits()
        pixels = self._pixels(images)
        regenerate = masked_tokens(masks, pixels, self.grid, self.tokenizer.spec.scales).to(self.device)
        request = Request(
            class_labels,
            prompt,
            negative_prompt,
            seed=seed,
            generator=generator,
            index_start=index_start,
            sampling=sampling,
        )
        job = accept(self, self._conditions, self.edit, request, len(pixels))

        def fill_in(rows: slice, condition: Condition, draws: Draws) -> Tensor:
            tokens = self.tokens_of(pixels[rows])
            where, options = regenerate[rows], job.options
            return self.generator.edit(tokens, where, condition, options, draws=draws, tokenizer=self.in_loop)

        return generate(self, job, fill_in, batch_size)

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
        """Generate images, all in one batch, and yield previews on the way; arguments as in :meth:`__call__`.

        Args:
            preview_every: positions between two previews; None takes a row of the grid, or what the tokenizer's
                prefixes are multiples of.
        """
        request = Request(
            class_labels,
            prompt,
            negative_prompt,
            num_images,
            condition,
            num_images_per_label,
            num_images_per_prompt,
            seed,
            generator,
            index_start,
            sampling,
        )
        return previews(self, accept(self, self._conditions, self.stream, request), preview_every)

    def chat(self, history: Iterable[Message | Mapping[str, Any]] = (), *, seed: int = 0) -> Chat:
        """A conversation: ``chat("draw a seven")``, ``chat("now a three")``, ``chat("what is it?", image)``.

        Args:
            history: what was said before, as messages or as mappings with role, text and image.
            seed: of the images.

        Raises:
            ValueError: a generator that writes no texts, or as ``Chat``.
        """
        return Chat(self, history, seed=seed)

    def caption(
        self,
        images: Images,
        *,
        question: str | None = None,
        max_tokens: int = MAX_TOKENS,
        batch_size: int = 64,
    ) -> str | list[str]:
        """What the model says of images, in words: a text for one image, a list for several.

        Args:
            images: as in :meth:`reconstruct`.
            question: what it is asked about them.
            max_tokens: of each text.

        Raises:
            ValueError: a generator that writes no texts or reads no images, a question without a text tokenizer, or
                texts that do not fit its context.
        """
        several = [images] if isinstance(images, Image.Image) else images
        said = captions(self, several, question, max_tokens, batch_size)
        return said[0] if isinstance(images, Image.Image) else said

    @torch.no_grad()
    def reconstruct(self, images: Images) -> list[Image.Image]:
        """Encode and decode images.

        Args:
            images: PIL images, cropped to the tokenizer's size (ADM's centre crop); or pixels (B, C, H, W) in [-1, 1]
                of exactly that size.
        """
        return shown(self.tokenizer.reconstruct(self.to_tokenizer(self._pixels(images))))

    @torch.no_grad()
    def given(self, frames: Frames) -> Condition:
        """The condition of clips that begin with these frames: their tokens, the last frame repeated to a whole clip.

        Args:
            frames: of one clip uint8 (t, H, W, C), as ``videos[0][:t]``, or a list of images; of several clips uint8
                (B, t, H, W, C), or float (B, C, t, H, W) in [-1, 1].

        Raises:
            ValueError: a tokenizer of images, other shapes, or more frames than a clip has.
        """
        clips = first_frames(self.tokenizer, frames)
        return Condition.from_given(self.tokenizer.encode(self.to_tokenizer(clips)).cpu())

    def _pixels(self, images: Images) -> Tensor:
        """Pixels (B, C, H, W) as they are, or of PIL images."""
        return images if isinstance(images, Tensor) else self.tokenizer.preprocess(images).float().cpu()

    def to_tokenizer(self, values: Tensor) -> Tensor:
        """Pixels, latents or ids on the tokenizer's device, which need not be the generator's; floats in its
        precision."""
        tokenizer = self.tokenizer
        return values.to(tokenizer.device, tokenizer.dtype if values.is_floating_point() else values.dtype)

    def tokens_of(self, images: Sequence[Image.Image] | Tensor) -> Tensor:
        """Tokens of images, as in :meth:`reconstruct`, on the generator's device."""
        return self.tokenizer.encode(self.to_tokenizer(self._pixels(images))).to(self.device)

    def decode(self, tokens: Tensor, keys: Keys, condition: Condition | None = None) -> Tensor:
        """Whole sequences to pixels (B, C, H, W) in [-1, 1], float32 on the CPU.

        Args:
            keys: of the noise of decoders that draw some.
            condition: that the tokens were generated with; the tokenizer takes its part of it.
        """
        if self.renderer is not None and self.tokenizer.embeds:
            return self.renderer(self.tokenizer.decode_features(self.to_tokenizer(tokens))).float().clamp(-1, 1).cpu()
        draws = self.tokenizer.decoding_draws(keys)
        options = self._decode_options | ({"draws": draws} if draws else {})
        own = None if condition is None else self.own_condition(condition)
        return self.tokenizer.decode(self.to_tokenizer(tokens), condition=own, **options).float().clamp(-1, 1).cpu()

    @property
    def in_loop(self) -> Tokenizer | None:
        """The tokenizer, for a generator that has it in its loop."""
        return self.tokenizer if self.generator.needs_tokenizer else None

    def own_condition(self, condition: Condition) -> Condition | None:
        """What the tokenizer takes of the generator's condition, on its device."""
        own = self.tokenizer.own_condition(condition)
        return None if own is None else own.to(self.tokenizer.device)

    @property
    def grid(self) -> tuple[int, int] | None:
        """(h, w) of the tokens' places in an image; None if they have none."""
        grid = self._decode_options.get("grid", self.tokenizer.spec.grid)
        return grid if grid is not None and len(grid) == 2 else None

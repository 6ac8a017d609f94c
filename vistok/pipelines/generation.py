"""``Pipeline``: a tokenizer, a generator, class names and default sampling options as one object.

On disk a pipeline is a folder with ``tokenizer/``, ``generator/`` and ``pipeline.json``. The run folder of a trained
generator is such a folder.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from PIL import Image
from torch import Tensor

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
from vistok.signatures import check
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
        text: turns prompts into conditions of the generator; without encoders the pipeline takes no prompts.

    Attributes:
        renderer: renders images if the tokenizer decodes to embeddings; set it before the first call.

    Raises:
        ValueError: the generator models other tokens than the tokenizer's, has another number of classes, or takes
            other texts than ``text`` makes.
        ConfigError: ``sampling`` does not fit the generator's options.
    """

    source: Path | None = None
    """The folder that the pipeline was loaded from."""
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
        """Sample with compiled steps from now on; returns the pipeline itself.

        On a CUDA device each token is then one graph launch. The first images of each batch size take longer; on a CPU
        all images take longer.

        Raises:
            ValueError: the generator has no compiled decoding.
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
            dtype: of all weights and computation: a ``torch.dtype``, "fp32", "bf16" or "fp16"; None keeps that of the
                saved weights.

        Raises:
            CheckpointError: nothing is found, the pipeline is incomplete, or weights are damaged.
            ValueError: the dtype is unknown, or the device is not available.
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
            FileExistsError: the folder holds other files, such as those of a training run.
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
            private: whether a repository that does not exist yet is made private.
            token: access token of the hub; by default that of the logged-in user.

        Raises:
            FileNotFoundError, ValueError: as ``model_card``.
        """
        own = self.source if self.source is not None and (self.source / RUN_CONFIG).is_file() else None
        card = model_card(self, repo_id, licence=license, scores=scores, run=own if run is None else run)
        return push_to_hub(self, repo_id, card, private=private, token=token)

    def options(self, **sampling: Any) -> Any:
        """The options of a call, as a ``generator.options_type``: ``sampling``, and ``self.sampling`` for the others.

        Raises:
            ValueError: an option is unknown, out of range, or without effect under the chosen decoding.
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

        Image i depends only on the seed, on ``index_start + i``, its condition and the options, not on the batch size.

        Args:
            class_labels: classes by id or by name, one or several.
            num_images_per_label: images of each class (or row of ``condition``), one after another.
            prompt: instead of classes, or with them if the generator takes both: one text or several; None among them
                is unconditional.
            negative_prompt: what guidance leads away from, instead of the unconditional prediction: one text, or one
                per prompt.
            num_images_per_prompt: images of each prompt, one after another.
            num_images: instead of classes: number of unconditional images.
            frames: instead of classes: the first frames of each clip, as in ``given``.
            condition: instead of classes: any condition that the generator takes.
            seed: None takes 0, or a seed drawn from ``generator``.
            generator: the source of the seed, as in diffusers.
            index_start: the index of the first image; it selects the random draws, together with the seed.
            batch_size: images generated at a time.
            callback_on_step_end: called after each step of a batch; see ``vistok.pipelines.steps.every_step``.
            **sampling: options of ``self.generator.options_type``, such as ``temperature`` or ``guidance_scale``;
                they override ``self.sampling``.

        Raises:
            ValueError: a class is unknown, an option is out of range, none or several of class_labels, prompt,
                num_images, frames and condition are given, or the pipeline has no text encoder for a prompt.
            ConfigError: an option is unknown or has the wrong type.
        """
        if frames is not None:
            if condition is not None:
                raise ValueError("give frames or condition, not both: frames are a condition")
            condition = self.given(frames)
        request = Request(
            class_labels=class_labels,
            prompt=prompt,
            negative_prompt=negative_prompt,
            num_images=num_images,
            condition=condition,
            num_images_per_label=num_images_per_label,
            num_images_per_prompt=num_images_per_prompt,
            seed=seed,
            generator=generator,
            index_start=index_start,
            sampling=sampling,
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

        Tokens that the mask touches are generated; the others are kept and look as in ``reconstruct``. If tokens lie in
        scales, this holds for the last scale; in smaller scales tokens mostly inside the mask are generated (see
        ``scale_masks``).

        Generators that fill in any positions see all kept tokens. Generators of one token after another see only
        earlier tokens: in a raster those above and to the left. They **do not see kept tokens to the right and
        below**, so the generated part may not match these. Masks that reach the lower right corner lose nothing.

        Args:
            images: as in :meth:`reconstruct`.
            masks: the part to generate: PIL images of the sizes of ``images``, light in that part; or a bool tensor,
                (H, W) or (B, H, W), of the size of the images after cropping. A single mask applies to all images.
            class_labels: what to generate: one class for all images, or one for each; None leaves it to the model.
            prompt, negative_prompt: what to generate, by texts.

        The others are those of :meth:`__call__`.

        Raises:
            ValueError: the generator cannot keep tokens (see its ``edit``), masks or classes do not fit the images,
                tokens have no place in the image, or as in :meth:`__call__`.
        """
        self.generator.check_edits()
        pixels = self._pixels(images)
        regenerate = masked_tokens(masks, pixels, self.grid, self.tokenizer.spec.scales).to(self.device)
        request = Request(
            class_labels=class_labels,
            prompt=prompt,
            negative_prompt=negative_prompt,
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
            preview_every: positions between two previews; None takes a row of the grid, or the ``prefix_step`` of
                ordered tokens.
        """
        request = Request(
            class_labels=class_labels,
            prompt=prompt,
            negative_prompt=negative_prompt,
            num_images=num_images,
            condition=condition,
            num_images_per_label=num_images_per_label,
            num_images_per_prompt=num_images_per_prompt,
            seed=seed,
            generator=generator,
            index_start=index_start,
            sampling=sampling,
        )
        return previews(self, accept(self, self._conditions, self.stream, request), preview_every)

    def chat(self, history: Iterable[Message | Mapping[str, Any]] = (), *, seed: int = 0) -> Chat:
        """A conversation: ``chat("draw a seven")``, ``chat("now a three")``, ``chat("what is it?", image)``.

        Args:
            history: earlier messages, also as mappings with role, text and image.
            seed: of the images.

        Raises:
            ValueError: the generator writes no texts, or as ``Chat``.
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
        """Describe images in words: a text for one image, a list for several.

        Args:
            images: as in :meth:`reconstruct`.
            question: what the model is asked about each image.
            max_tokens: the most tokens of each text.

        Raises:
            ValueError: the generator writes no texts or reads no images, the pipeline has no text tokenizer for a
                question, or the texts do not fit the context.
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
        """The condition of clips that begin with these frames: tokens of a whole clip, in which the last frame repeats.

        Args:
            frames: of one clip uint8 (t, H, W, C), as ``videos[0][:t]``, or a list of images; of several clips uint8
                (B, t, H, W, C), or float (B, C, t, H, W) in [-1, 1].

        Raises:
            ValueError: the tokenizer reads images, the shape is another, or a clip has fewer frames.
        """
        clips = first_frames(self.tokenizer, frames)
        return Condition.from_given(self.tokenizer.encode(self.to_tokenizer(clips)).cpu())

    def _pixels(self, images: Images) -> Tensor:
        """Pixels (B, C, H, W) of PIL images; a tensor is returned as it is. Raises ValueError if there are none."""
        if not isinstance(images, Tensor):
            return self.tokenizer.preprocess(images).float().cpu()
        if images.ndim != len(self.tokenizer.input_shape) + 1 or not len(images):
            shape = ", ".join(map(str, self.tokenizer.input_shape))
            raise ValueError(f"images must be pixels (B, {shape}) with B > 0, or PIL images; got {tuple(images.shape)}")
        return images

    def to_tokenizer(self, values: Tensor) -> Tensor:
        """Move pixels, latents or ids to the tokenizer's device, which may differ from the generator's; floats also to
        its dtype."""
        tokenizer = self.tokenizer
        return values.to(tokenizer.device, tokenizer.dtype if values.is_floating_point() else values.dtype)

    def tokens_of(self, images: Sequence[Image.Image] | Tensor) -> Tensor:
        """Tokens of images, as in :meth:`reconstruct`, on the generator's device."""
        return self.tokenizer.encode(self.to_tokenizer(self._pixels(images))).to(self.device)

    def decode(self, tokens: Tensor, keys: Keys, condition: Condition | None = None) -> Tensor:
        """Decode whole sequences to pixels (B, C, H, W) in [-1, 1], float32 on the CPU.

        Args:
            keys: for decoders that draw noise.
            condition: the condition that the tokens were generated with; the tokenizer uses the parts that it takes.
        """
        if self.renderer is not None and self.tokenizer.embeds:
            return self.renderer(self.tokenizer.decode_features(self.to_tokenizer(tokens))).float().clamp(-1, 1).cpu()
        draws = self.tokenizer.decoding_draws(keys)
        options = self._decode_options | ({"draws": draws} if draws else {})
        own = None if condition is None else self.own_condition(condition)
        return self.tokenizer.decode(self.to_tokenizer(tokens), condition=own, **options).float().clamp(-1, 1).cpu()

    @property
    def in_loop(self) -> Tokenizer | None:
        """The tokenizer if the generator needs it while sampling, else None."""
        return self.tokenizer if self.generator.needs_tokenizer else None

    def own_condition(self, condition: Condition) -> Condition | None:
        """The parts of the generator's condition that the tokenizer takes, on the tokenizer's device."""
        own = self.tokenizer.own_condition(condition)
        return None if own is None else own.to(self.tokenizer.device)

    @property
    def grid(self) -> tuple[int, int] | None:
        """(h, w) of the tokens' raster in an image; None if tokens have no place in it."""
        grid = self._decode_options.get("grid", self.tokenizer.spec.grid)
        return grid if grid is not None and len(grid) == 2 else None

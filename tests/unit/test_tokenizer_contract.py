"""The tokenizer contract beyond images: clips, several reconstructions, conditions, no pixels."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
import torch
from einops import rearrange
from support.tiny_models import CAPTIONS, captions, labels, names, pixels, tiny
from torch import Tensor, nn

from vistok.data.config import DataConfig
from vistok.draws import Draws, Keys
from vistok.generators.base import Generator
from vistok.generators.engine.sampling import DecodingOptions
from vistok.pipelines import Pipeline
from vistok.signatures import ConfigError
from vistok.tokenizers.base import Tokenizer
from vistok.types import AfterBackward, Condition, Expander, GeneratorOutput, TokenChunk, TokenizerOutput, TokenSpec

GREEDY = DecodingOptions(temperature=0)


class Cells(Tokenizer):
    """A throw-away tokenizer: a token per frame, or per image, that says whether it is bright."""

    registry_name = "cells"
    data_arguments: ClassVar = Tokenizer.data_arguments | {"num_frames": "num_frames"}

    def __init__(self, image_size: int = 4, in_channels: int = 3, num_frames: int = 8):
        super().__init__()
        self._input_shape = (in_channels, num_frames, image_size, image_size)
        self.level = nn.Parameter(torch.ones(()))

    @property
    def spec(self) -> TokenSpec:
        frames = self._input_shape[1]
        return TokenSpec(frames, 2, dim=1, grid=(frames, 1, 1))

    @property
    def input_shape(self) -> tuple[int, ...]:
        return self._input_shape

    @property
    def loss_terms(self) -> tuple[str, ...]:
        return ()

    def encode(self, pixels: Tensor, *, condition: Condition | None = None, draws: Draws | None = None) -> Tensor:
        self.check_condition(condition)
        self.check_pixels(pixels)
        return (pixels.mean((1, 3, 4)) > 0).long()

    def decode(self, tokens: Tensor, *, condition: Condition | None = None) -> Tensor:
        channels, _, height, width = self._input_shape
        frames = self.level * (2.0 * self.spec.check_ids(tokens) - 1)  # (B, T)
        return frames[:, None, :, None, None].expand(-1, channels, -1, height, width)

    def forward(self, pixels: Tensor, **options: Any) -> TokenizerOutput:
        tokens = self.encode(pixels)
        return TokenizerOutput(self.decode(tokens), tokens)

    def expander(self) -> Expander:
        return Sums()


class Sums(Expander):
    """The sum of a token and all before it."""

    def __init__(self) -> None:
        self.total = 0

    def expand(self, tokens: Tensor) -> Tensor:
        return tokens.cumsum(1)[..., None].float()

    def step(self, tokens: Tensor) -> Tensor:
        sums = self.total + tokens.cumsum(1)
        self.total = sums[:, -1:]
        return sums[..., None].float()


class Silent(Cells):
    """A throw-away tokenizer that does not decode to pixels."""

    registry_name = "silent"
    renders = reconstructs = False
    decode = Tokenizer.decode


def clips(frames: int = 8) -> Tensor:
    return torch.rand(2, 3, frames, 4, 4) * 2 - 1


# ---------------------------------------------------------------------------------------------------------------------
# Media shape


def test_a_tokenizer_of_clips_takes_whole_clips_only():
    model = Cells()
    assert model.check_pixels(clips()) == model.spec_for((3, 8, 4, 4)) == model.spec
    assert model.reconstruct(clips()).shape == (2, 3, 8, 4, 4)
    with pytest.raises(ValueError, match=r"8x4x4 only, got 5x4x4; take 8 frames"):
        model.encode(clips(5))
    with pytest.raises(ValueError, match=r"8x4x4 only, got 8x4x3; resize"):
        model.encode(clips()[..., :3])
    with pytest.raises(ValueError, match=r"\(B, 3, 8, 4, 4\), got shape \(2, 3, 4, 4\)"):
        model.encode(clips()[:, :, 0])
    with pytest.raises(ValueError, match=r"\(C, T, H, W\)"):
        model.spec_for((3, 4, 4))


@pytest.mark.parametrize("name", names("tokenizer"))
def test_spec_for_the_usual_shape_is_the_spec(name):
    model = tiny(name)
    assert model.spec_for(model.input_shape) == model.spec
    with pytest.raises(ValueError, match=r"reads \d channels"):
        model.spec_for((model.input_shape[0] + 1, *model.input_shape[1:]))


def test_the_data_say_how_many_frames():
    data = DataConfig(image_size=4, channels=1, num_frames=6)
    assert data.input_shape == (1, 6, 4, 4)
    assert Cells(**Cells.arguments_from(data)).input_shape == data.input_shape
    with pytest.raises(ConfigError, match=r"set data\.num_frames"):
        Cells.arguments_from(DataConfig(image_size=4))
    with pytest.raises(ConfigError, match=r"leave data\.num_frames out"):
        type(tiny("llamagen_vq")).arguments_from(data)


@pytest.mark.parametrize("wrong", [{"num_frames": 0}, {"num_frames": 4, "frame_stride": 0}, {"frame_stride": 2}])
def test_frames_that_make_no_clip_are_refused(wrong):
    with pytest.raises(ValueError, match="frame"):
        DataConfig(image_size=4, **wrong)


def test_what_is_made_for_images_refuses_clips():
    assert tiny("llamagen_vq").image_shape("editing") == (3, 16, 16)
    with pytest.raises(ValueError, match="editing works on images, but Cells reads clips of 8 frames"):
        Cells().image_shape("editing")


# ---------------------------------------------------------------------------------------------------------------------
# Outputs, conditions, rendering


def test_reconstructions_have_names():
    image, direct, ids = torch.zeros(1, 3, 2, 2), torch.ones(1, 3, 2, 2), torch.zeros(1, 4)
    output = TokenizerOutput({"main": image, "direct": direct}, ids, weight_maps={"direct": torch.ones(1, 1, 2, 2)})
    assert output.reconstruction is image
    assert list(TokenizerOutput(image, ids).reconstructions) == ["main"]
    assert TokenizerOutput(None, ids).reconstruction is None
    with pytest.raises(ValueError, match="first reconstruction must be called 'main', got direct"):
        TokenizerOutput({"direct": direct, "main": image}, ids)
    with pytest.raises(ValueError, match="weight map of 'other'"):
        TokenizerOutput(image, ids, weight_maps={"other": ids})


@pytest.mark.parametrize("name", names("tokenizer"))
def test_a_condition_is_refused_where_none_is_taken(name):
    model = tiny(name)
    assert model.own_condition(labels(0, 1, 2)) is None
    tokens = model.encode(pixels(model))
    refusal = "not class labels" if model.condition_spec.parts else "takes no condition"
    for call in (model.encode, model.forward):
        with pytest.raises(ValueError, match=refusal):
            call(pixels(model), condition=labels(0, 1, 2))
    with pytest.raises(ValueError, match=refusal):
        model.decode(tokens, condition=labels(0, 1, 2))


@pytest.mark.parametrize("name", names("tokenizer"))
def test_tokens_that_are_no_tensor_are_told(name):
    model = tiny(name)
    decode = model.decode if model.renders else model.decode_features
    with pytest.raises(ValueError, match="must be a tensor, got list"):
        decode([[0, 1]])


@torch.no_grad()
@pytest.mark.parametrize("name", names("tokenizer"))
def test_latents_that_are_not_finite_have_no_ids(name):
    """With NaN latents, a comparison with codes would silently give the id 0."""
    model = tiny(name)
    for parameter in model.parameters():
        parameter.fill_(torch.nan)
    with pytest.raises(ValueError, match="the latents of these images are not finite in float32: the weights hold NaN"):
        model.encode(pixels(model))


def test_a_tokenizer_that_renders_nothing_says_so():
    model = Silent()
    tokens = model.encode(clips())
    for call in (lambda: model.decode(tokens), lambda: model.reconstruct(clips())):
        with pytest.raises(ValueError, match="Silent renders no pixels: decode needs a tokenizer that does"):
            call()
    with pytest.raises(ValueError, match="previews needs"):
        model.check_renders("previews")


def test_a_pipeline_hands_the_text_on_to_a_tokenizer_that_takes_it():
    tokenizer = tiny("ta_titok")
    generator = tiny("llama", spec=tokenizer.spec, positions="rope1d", **CAPTIONS)
    pipe, given = Pipeline(tokenizer, generator), captions(2)
    output = pipe(condition=given, guidance_scale=1.0)
    expected = tokenizer.decode(output.tokens, condition=given).clamp(-1, 1)
    torch.testing.assert_close(output.pixels, expected)
    assert not torch.allclose(expected, tokenizer.decode(output.tokens).clamp(-1, 1))
    *_, last = pipe.stream(condition=given, guidance_scale=1.0)
    assert last.images is not None


def test_a_pipeline_without_pixels_says_so_before_it_samples():
    tokenizer = Silent()
    pipe = Pipeline(tokenizer, tiny("llama", spec=tokenizer.spec, positions="rope1d"))
    for call in (lambda: pipe([0]), lambda: next(pipe.stream([0]))):
        with pytest.raises(ValueError, match="Silent renders no pixels"):
            call()
    assert pipe.generator.sample(labels(0), GREEDY).shape == (1, 8)


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "arguments"),
    [*((name, {}) for name in names("tokenizer")), ("titok", {"bottleneck": "vae"}), ("titok", {"output": "pixels"})],
)
def test_the_feature_latents_is_what_tokens_are_made_of(name, arguments):
    """Of ids what is quantized, and not the codes; of continuous tokens what is standardised."""
    model = tiny(name, **arguments)
    if not model.spec.discrete:
        model = tiny(name, **arguments, latent_mean=2.0, latent_scale=3.0)
    output = model(pixels(model), draws=model.training_draws(Keys.range(0, 3)))
    latents = output.features["latents"]
    if not model.spec.discrete:
        torch.testing.assert_close((latents - 2) * 3, output.tokens)
        return
    assert not torch.allclose(latents, output.features["quantized"])
    if name == "var_vq":  # whose quantizer reads maps
        latents = rearrange(latents, "b (h w) d -> b d h w", h=model.spec.scales[-1][0])
    if hasattr(model, "latents"):
        assert torch.equal(model.latents(pixels(model)), latents)
    quantizer = getattr(model, "tokenizer", model).quantizer
    assert torch.equal(quantizer.encode(latents), model.encode(pixels(model)))


# ---------------------------------------------------------------------------------------------------------------------
# In the loop of a generator


def test_an_expander_gives_in_steps_what_it_gives_at_once():
    model = Cells()
    tokens = model.encode(clips())
    stepwise = model.expander()
    parts = [stepwise.step(part) for part in tokens.split([1, 3, 4], 1)]
    assert torch.equal(torch.cat(parts, 1), model.expander().expand(tokens))


class Continuing(Generator):
    """A throw-away generator: the next token is the parity of the tokenizer's expansion of the earlier ones."""

    registry_name = "continuing"
    options_type = DecodingOptions
    needs_tokenizer = True

    def __init__(self, spec: TokenSpec):
        super().__init__()
        self.spec, self.bias = spec, nn.Parameter(torch.zeros(1))

    def forward(
        self, tokens: Tensor, condition: Condition, *, tokenizer: Any = None, **options: Any
    ) -> GeneratorOutput:
        self.check_tokenizer(tokenizer)
        expected = tokenizer.expander().expand(tokens)[:, :-1, 0] % 2
        return GeneratorOutput((expected + self.bias - tokens[:, 1:]).square().mean(), expected)

    def training_draws(self, keys: Keys) -> Draws:
        return {}

    def sampling_draws(self, keys: Keys, options: Any = None) -> Draws:
        return {}

    def start(self, condition: Condition, options: Any = None, *, draws: Any = None, tokenizer: Any = None) -> Any:
        self.check_tokenizer(tokenizer)
        return ContinuingSession(self.spec.length, len(condition), tokenizer.expander())


class ContinuingSession:
    def __init__(self, length: int, rows: int, expander: Expander):
        self.length, self.expander, self.tokens = length, expander, torch.ones(rows, 0, dtype=torch.long)

    def generate(self) -> Iterator[TokenChunk]:
        new = torch.ones(len(self.tokens), 1, dtype=torch.long)
        for place in range(self.length):
            self.tokens = torch.cat([self.tokens, new], 1)
            yield TokenChunk(torch.full_like(new, place), new, torch.ones_like(new, dtype=torch.bool))
            new = (self.expander.step(new)[..., 0] % 2).long()


def test_a_generator_with_the_tokenizer_in_its_loop_samples_in_a_pipeline_what_it_was_trained_on():
    tokenizer = Cells()
    generator = Continuing(tokenizer.spec)
    with pytest.raises(ValueError, match="pass tokenizer="):
        generator.start(Condition.none(2))
    made = Pipeline(tokenizer, generator)(num_images=2)
    assert made.tokens.tolist() == [[1, 1, 0, 0, 0, 0, 0, 0]] * 2
    assert generator(made.tokens, Condition.none(2), tokenizer=tokenizer).loss == 0
    *_, last = Pipeline(tokenizer, generator).stream(num_images=2)
    assert torch.equal(last.tokens, made.tokens)


EXPANDING = ["mingtok", "var_vq"]
"""Tokenizers that expand their tokens for generators."""


@pytest.mark.parametrize("name", [name for name in names("tokenizer") if name not in EXPANDING])
def test_tokenizers_whose_tokens_are_read_as_they_are_have_no_expander(name):
    with pytest.raises(ValueError, match="has no expander"):
        tiny(name).expander()


@pytest.mark.parametrize("name", names("generator"))
def test_a_tokenizer_is_refused_where_none_is_needed_and_missed_where_one_is(name):
    model = tiny(name)
    if model.needs_tokenizer:
        with pytest.raises(ValueError, match="pass tokenizer="):
            model.start(labels(0))
        return
    spec = model.spec
    tokens = torch.zeros(1, spec.length, dtype=torch.long) if spec.discrete else torch.zeros(1, spec.length, spec.dim)
    wrong = {} if model.needs_tokenizer else {"tokenizer": Cells()}
    refusal = "pass tokenizer=" if model.needs_tokenizer else "leave tokenizer= out"
    with pytest.raises(ValueError, match=refusal):
        model(tokens, labels(0), draws={}, **wrong)
    with pytest.raises(ValueError, match=refusal):
        model.start(labels(0), **wrong)


def test_a_codebook_that_moves_is_known_by_its_method():
    restarting = tiny("llamagen_vq", codebook_restart_after=3)
    assert [type(module).__name__ for module in restarting.modules() if isinstance(module, AfterBackward)] == [
        "VectorQuantizer"
    ]

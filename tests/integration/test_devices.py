"""Models, pipelines, training and scores off the CPU: on a GPU where there is one, else on a stand-in that raises where
a GPU would, when one operation gets tensors of both devices."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from support.eval_data import as_tensor, colour_statistics, smooth_images
from support.other_device import other_device, recorded_waits
from support.tiny_models import CAPTIONS, captions, in_loop, labels, names, pixels, tiny, token_ids
from support.tiny_runs import GAN, generator_config, tokenizer_config, write_tokens
from torch import Tensor, nn

import vistok
from vistok.data import DataConfig
from vistok.data.tokens import TokenCache
from vistok.draws import Draws, Keys, draws_on
from vistok.eval import metrics
from vistok.eval.features import FeaturePass
from vistok.eval.networks import CallableNetwork, full_precision
from vistok.eval.perturbation import Grid, evaluate_perturbation
from vistok.eval.reconstruction import SSIM_VARIANTS, psnr
from vistok.eval.resize import resize
from vistok.eval.tokenizers import evaluate_tokenizer
from vistok.generators.base import Generator
from vistok.losses import L1, LPIPS, EntropyLoss, LogitLaplace, StyleGANDiscriminator
from vistok.pipelines import Pipeline
from vistok.pipelines.samples import reconstruct_files, reconstruct_prefixes, write_samples
from vistok.quantizers import FSQ, ResidualQuantizer, VectorQuantizer
from vistok.quickstart import scores
from vistok.tokenizers.base import Tokenizer
from vistok.train import train
from vistok.train.config import RunConfig
from vistok.train.monitor import read_metrics
from vistok.train.tasks import Task
from vistok.train.tasks.adversary import Adversary, GanConfig
from vistok.train.tasks.generator import GeneratorTask
from vistok.train.tasks.tokenizer import TokenizerTask
from vistok.train.tokenize import tokenize
from vistok.types import Condition, TokenSpec

pytestmark = pytest.mark.device

GPU = torch.cuda.is_available()
ROUNDING = 1e-3 if GPU else 1e-4
"""Kernels differ; even on the stand-in, PyTorch decomposes some operations differently than on the CPU."""

TOKENIZERS = [(name, {}) for name in names("tokenizer")] + [
    ("vit_vqgan", {"codebook_restart_after": 1, "entropy_temperature": 0.1}),
    ("flextok", {"quantizer_dropout": 0.5, "token_corruption": 1.0, "nested_dropout": "uniform_pow2"}),
]
GENERATORS = [(name, {}) for name in names("generator")] + [
    ("mar", {"patch_size": 2}),
    ("xar", {"layout": {"entity": "scale", "scales": (1, 2, 4)}}),
]
SAMPLING = {
    "llama": {"guidance_scale": 2.0, "top_k": 8, "top_p": 0.9},
    "vit_vqgan_gpt": {"guidance_scale": 2.0},
    "mar": {"guidance_scale": 2.0, "num_iter": 4, "num_steps": 4, "step_spacing": "stride"},
    "xar": {"guidance_scale": 2.0, "num_steps": 3, "context_noise": 0.1},
    "maskgit": {"guidance_scale": 2.0, "num_steps": 4},
    "ming_univision": {"num_steps": 3},
    "rar": {"guidance_scale": 2.0, "guidance_schedule": "power-cosine"},
    "var": {"guidance_scale": 2.0, "guidance_schedule": "linear", "top_k": 8},
    "open_magvit2_gpt": {"guidance_scale": 2.0, "later_guidance_scale": 3.0, "later_top_k": 4},
    "ibq_gpt": {"guidance_scale": 2.0},
    "token_shuffle": {"guidance_scale": 2.0},
    "randar": {"guidance_scale": 2.0, "num_steps": 6},
    "lpd": {"guidance_scale": 2.0, "guidance_schedule": "linear-done"},
}
PIPELINES = [("vit_vqgan", "vit_vqgan_gpt"), ("kl_vae", "xar"), ("flextok", "llama")]


@pytest.fixture
def device() -> Iterator[torch.device]:
    if GPU:
        with full_precision():
            yield torch.device("cuda")
    else:
        with other_device() as device:
            yield device


def moved(model: nn.Module, device: torch.device) -> nn.Module:
    """A copy on the device."""
    return copy.deepcopy(model).to(device)


def check_same(there: Tensor, here: Tensor) -> None:
    """What the device gave, on the device, is what the CPU gave: ids exactly, floats up to rounding.

    Ids are drawn, or nearest, with fixed seeds: a tie within rounding is practically impossible.
    """
    assert there.device.type != "cpu"
    torch.testing.assert_close(there.detach().cpu(), here.detach(), rtol=ROUNDING, atol=ROUNDING)


def check_gradients(there: nn.Module, here: nn.Module) -> None:
    pairs = list(zip(there.parameters(), here.parameters(), strict=True))
    assert any(parameter.grad is not None for parameter, _ in pairs)
    for ours, theirs in pairs:
        assert (ours.grad is None) == (theirs.grad is None)
        if ours.grad is not None:
            check_same(ours.grad, theirs.grad)


# ---------------------------------------------------------------------------------------------------------------------
# The stand-in


@pytest.mark.skipif(GPU, reason="a GPU stands for itself")
def test_the_stand_in_raises_where_a_gpu_would():
    with other_device() as device:
        there, here, index = torch.ones(3, 4, device=device), torch.ones(3, 4), torch.tensor([2, 0])
        mistakes = [
            lambda: there + here,
            lambda: here @ there.T,
            lambda: torch.cat([there, here]),
            lambda: torch.stack([there.sum(), here.sum()]),
            lambda: torch.where(here > 0, there, 0.0),
            lambda: there.gather(1, index[:, None]),
            lambda: nn.functional.embedding(index, there),
            lambda: here[index.to(device)],
            lambda: there.index_put((index,), here[:2]),
            lambda: here.add_(there.sum()),
            lambda: nn.Linear(4, 2)(there),
        ]
        for mistake in mistakes:
            with pytest.raises(RuntimeError, match="same device"):
                mistake()
        with pytest.raises(TypeError, match="to numpy"):
            np.asarray(there)
        with pytest.raises(RuntimeError, match="generator"):
            torch.rand(2, device=device, generator=torch.Generator())


@pytest.mark.skipif(GPU, reason="a GPU stands for itself")
def test_the_stand_in_computes_where_a_gpu_would():
    with other_device() as device:
        values, index = torch.arange(12.0).view(3, 4), torch.tensor([2, 0])
        there = values.to(device)
        check_same(there[index], values[index])
        check_same(there * torch.tensor(2.0), values * 2)
        check_same(torch.tensor([1, 2], device=device), torch.tensor([1, 2]))
        changed = there.clone()
        changed[:, 1:3].copy_(torch.ones(3, 2))
        changed[index, 0] = torch.tensor(-1.0)
        check_same(changed, torch.tensor([[-1.0, 1, 1, 3], [4, 1, 1, 7], [-1, 1, 1, 11]]))
        assert float(there.sum()) == 66
        layer = nn.Linear(4, 2)
        other = moved(layer, device)
        other(there).square().sum().backward()
        layer(values).square().sum().backward()
        check_gradients(other, layer)


@pytest.mark.skipif(GPU, reason="a GPU stands for itself")
def test_the_stand_in_records_where_the_host_would_wait():
    with other_device() as device:
        there, mask = torch.ones(4, device=device), torch.tensor([True, False, True, True])
        waiting = [
            lambda: there.sum().item(),
            lambda: bool((there > 0).all()),
            lambda: there.cpu(),
            lambda: mask.to(device),
            lambda: torch.tensor([1, 2], device=device),
            lambda: there[there > 0],
            lambda: there.nonzero(),
            lambda: torch.equal(there, there),
        ]
        for work in waiting:
            with recorded_waits() as waits:
                work()
            assert len(waits) == 1
        with recorded_waits() as waits:
            other = mask.to(device, non_blocking=True)
            torch.where(other, there, torch.full((4,), 2.0, device=device))[1:].fill_(1).sum()
            torch.ones(4).sum().item()
        assert not waits


@contextmanager
def no_waiting() -> Iterator[None]:
    """Fails if the host waits for the device in this block."""
    if GPU:
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")
    else:
        with recorded_waits() as waits:
            yield
        assert not waits


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizers


def tokenizer_loss(model: Tokenizer, images: Tensor, draws: Draws) -> Tensor:
    output = model(images, draws=draws)
    loss = sum(term.mean() for term in output.losses.values())
    return loss if output.reconstruction is None else loss + output.reconstruction.square().mean()


@pytest.mark.parametrize(("name", "arguments"), TOKENIZERS)
def test_a_tokenizer_trains_alike_and_never_waits(name, arguments, device):
    here = tiny(name, **arguments)
    there, images, draws = moved(here, device), pixels(here), here.training_draws(Keys.range(0, 3))
    loss = tokenizer_loss(here, images, draws)
    loss.backward()
    images, draws = images.to(device), draws_on(draws, device)
    other = tokenizer_loss(there, images, draws)
    other.backward()
    check_same(other, loss)
    check_gradients(there, here)
    with no_waiting():
        loss = tokenizer_loss(there.train(), images, draws)
        loss.backward()
    assert loss.isfinite()


@torch.no_grad()
@pytest.mark.parametrize(("name", "arguments"), [(name, {}) for name in names("tokenizer")])
def test_a_tokenizer_encodes_and_decodes_alike(name, arguments, device):
    here = tiny(name, **arguments)
    there, images = moved(here, device), pixels(here)
    tokens = here.encode(images)
    check_same(there.encode(images.to(device)), tokens)
    if not here.renders:
        return
    check_same(there.reconstruct(images.to(device)), here.reconstruct(images))
    draws, ids = here.decoding_draws(Keys.range(0, 3)), tokens.to(device)
    options = {"draws": draws} if draws else {}  # draws may be anywhere
    check_same(there.decode(ids, **options), here.decode(tokens, **options))
    if here.has_posterior:
        check_same(there.encode_moments(images.to(device)), here.encode_moments(images))
    if step := here.spec.prefix_step:
        lengths = torch.tensor([step, 2 * step, step])  # and so may lengths
        check_same(there.decode(ids, lengths=lengths, **options), here.decode(tokens, lengths=lengths, **options))
        decode, other = here.prefix_decoder(draws), there.prefix_decoder(draws)
        for length in (step, 2 * step, here.spec.length):
            check_same(other(ids[:, :length]), decode(tokens[:, :length]))


@torch.no_grad()
@pytest.mark.parametrize("here", [FSQ((4, 4, 2)), ResidualQuantizer(VectorQuantizer(16, 3), 2)])
def test_codes_are_alike(here, device):
    there, latents = moved(here, device), Keys.range(0, 2).normal("latents", 5, 3)
    ours, theirs = there(latents.to(device)), here(latents)
    check_same(ours.ids, theirs.ids)
    check_same(ours.usage(), theirs.usage())
    check_same(there.ids_to_latents(ours.ids), here.ids_to_latents(theirs.ids))
    if isinstance(here, FSQ):
        check_same(there.neighbours(latents.to(device), 4), here.neighbours(latents, 4))


def test_latents_are_standardised_alike(device):
    here = tiny("kl_vae")
    there, images = moved(here, device), pixels(here)
    here.standardise(images)
    there.standardise(images.to(device))
    check_same(there.encode(images.to(device)), here.encode(images))


# ---------------------------------------------------------------------------------------------------------------------
# Generators


def some_tokens(model: Generator) -> Tensor:
    if model.spec.discrete:
        return token_ids(model)
    return Keys.range(0, 3).normal("latents", model.spec.length, model.spec.dim)


def tokenizer_in_loop(model: Generator, device: torch.device | str = "cpu") -> dict[str, Tokenizer]:
    """The argument ``tokenizer``, on the device, of a generator that has one in its loop."""
    return {name: tokenizer.to(device) for name, tokenizer in in_loop(model).items()}


def generator_loss(
    model: Generator, tokens: Tensor, condition: Condition, draws: Draws, loop: dict[str, Tokenizer]
) -> Tensor:
    weights = torch.arange(3.0, device=tokens.device)
    return model(tokens, condition, draws=draws, weights=weights, **loop).loss


@pytest.mark.parametrize(("name", "arguments"), [*GENERATORS, ("llama", CAPTIONS)])
def test_a_generator_trains_alike_and_never_waits(name, arguments, device):
    here = tiny(name, **arguments)
    there, condition = moved(here, device), captions() if arguments is CAPTIONS else labels(0, 4, -1)
    tokens, draws = some_tokens(here), here.training_draws(Keys.range(0, 3))
    loss = generator_loss(here, tokens, condition, draws, tokenizer_in_loop(here))
    loss.backward()
    batch = tokens.to(device), condition.to(device), draws_on(draws, device), tokenizer_in_loop(here, device)
    other = generator_loss(there, *batch)
    other.backward()
    check_same(other, loss)
    check_gradients(there, here)
    weights, loop = torch.arange(3.0, device=device), in_loop(there)
    with no_waiting():
        loss = there.train()(*batch[:2], draws=batch[2], weights=weights, **loop).loss
        loss.backward()
    assert loss.isfinite()


@pytest.mark.parametrize(("name", "arguments"), [*GENERATORS, ("llama", CAPTIONS)])
def test_a_generator_samples_alike(name, arguments, device):
    here = tiny(name, **arguments)
    there, condition = moved(here, device), captions() if arguments is CAPTIONS else labels(0, 4, -1)
    options = here.options_type(**SAMPLING[name])
    draws = here.sampling_draws(Keys.range(0, 3), options)
    tokens = here.sample(condition, options, draws=draws, **tokenizer_in_loop(here))
    loop = tokenizer_in_loop(here, device)
    check_same(there.sample(condition.to(device), options, draws=draws, **loop), tokens)
    streamed = torch.zeros_like(tokens, device=device)
    for chunk in there.stream(condition.to(device), options, draws=draws_on(draws, device), **loop):
        positions = chunk.positions.view(*chunk.positions.shape, *[1] * (tokens.ndim - 2)).expand_as(chunk.tokens)
        valid = chunk.valid.view(*chunk.valid.shape, *[1] * (tokens.ndim - 2))
        settled = torch.where(valid, chunk.tokens, streamed.gather(1, positions))
        streamed.scatter_(1, positions, settled)
    check_same(streamed, tokens)


@torch.no_grad()
@pytest.mark.parametrize(("name", "arguments"), GENERATORS)
def test_sampling_does_not_wait_between_its_steps(name, arguments, device):
    model = tiny(name, **arguments).to(device)
    options = model.options_type(**SAMPLING[name])
    draws = model.sampling_draws(Keys.range(0, 2), options)
    loop = tokenizer_in_loop(model, device)
    steps = len(list(model.stream(labels(1, 2), options, draws=draws, **loop)))  # makes what is kept
    chunks = model.stream(labels(1, 2).to(device), options, draws=draws, **loop)
    next(chunks)
    with no_waiting():
        for _ in range(steps - 1):
            next(chunks)
    list(chunks)  # at the end it is read whether all went well


@pytest.mark.skipif(not GPU, reason="the stand-in knows no graphs; test_generators.py compiles steps without a GPU")
@pytest.mark.parametrize(
    ("name", "arguments"),
    [("llama", {"dim": 128, "num_heads": 8}), ("llama", CAPTIONS | {"num_heads": 1}), ("vit_vqgan_gpt", {})],
)
def test_compiled_steps_sample_alike(name, arguments, device):
    here = tiny(name, spec=TokenSpec(100, 32, dim=4, grid=(10, 10)), **arguments)
    there, condition = moved(here, device), captions() if "caption_dim" in arguments else labels(0, 4, -1)
    options = here.options_type(**SAMPLING[name])
    draws = here.sampling_draws(Keys.range(0, 3), options)
    expected = here.sample(condition, options, draws=draws)
    there.compile_decoding()
    for _ in range(2):
        check_same(there.sample(condition, options, draws=draws), expected)
    session = there.start(condition, options, draws=draws)
    for start in (0, 50):  # tokens that are forced in between are fed uncompiled
        for _ in session.generate(45):
            pass
        session.append(expected[:, start + 45 : start + 50])
    check_same(session.tokens, expected)


@pytest.mark.parametrize("patch_size", [1, 2])
def test_latents_are_edited_alike(patch_size, device):
    here = tiny("mar", patch_size=patch_size)
    there, tokens, condition = moved(here, device), some_tokens(here), labels(0, 4, 2)
    regenerate = torch.zeros(3, 16, dtype=torch.bool)
    regenerate[:, :6] = regenerate[0, 12:] = True
    options = here.options_type(**SAMPLING["mar"])
    draws = here.sampling_draws(Keys.range(0, 3), options)
    edited = here.edit(tokens, regenerate, condition, options, draws=draws)
    check_same(there.edit(tokens.to(device), regenerate.to(device), condition, options, draws=draws), edited)
    check_same(there.edit(tokens, regenerate, condition, options, draws=draws), edited)


# ---------------------------------------------------------------------------------------------------------------------
# Pipelines


def tiny_pipeline(tokenizer: str, generator: str) -> Pipeline:
    codes = tiny(tokenizer)
    arguments = {"positions": "rope1d"} if codes.spec.grid is None else {}
    return Pipeline(codes, tiny(generator, spec=codes.spec, **arguments), sampling=SAMPLING[generator])


def placed(pipe: Pipeline, tokenizer: torch.device | str, generator: torch.device | str) -> Pipeline:
    """A copy, each model on a device."""
    return Pipeline(moved(pipe.tokenizer, tokenizer), moved(pipe.generator, generator), sampling=pipe.sampling)


def check_same_pictures(there: list[Image.Image], here: list[Image.Image]) -> None:
    for ours, theirs in zip(there, here, strict=True):
        assert np.abs(np.asarray(ours).astype(int) - np.asarray(theirs)).max() <= 1  # of 255 grey levels


@pytest.mark.parametrize(("tokenizer", "generator"), PIPELINES)
def test_a_pipeline_generates_alike_wherever_its_models_are(tokenizer, generator, device):
    pipe = tiny_pipeline(tokenizer, generator)
    output, previews = pipe([0, 4], seed=1), list(pipe.stream([0, 4], seed=1))
    reconstructions = pipe.reconstruct(output.images)
    for places in [(device, "cpu"), ("cpu", device)]:
        other = placed(pipe, *places)
        same = other([0, 4], seed=1)
        torch.testing.assert_close(same.tokens, output.tokens, rtol=ROUNDING, atol=ROUNDING)
        check_same_pictures(same.images, output.images)
        for ours, theirs in zip(other.stream([0, 4], seed=1), previews, strict=True):
            assert torch.equal(ours.known, theirs.known)
            check_same_pictures(ours.images or [], theirs.images or [])
        check_same_pictures(other.reconstruct(output.images), reconstructions)


@pytest.mark.parametrize("where", ["generator", "tokenizer"])
def test_a_pipeline_edits_alike_wherever_its_models_are(where, device):
    pipe = tiny_pipeline("kl_vae", "mar")
    other = placed(pipe, *((device, "cpu") if where == "tokenizer" else ("cpu", device)))
    photos, mask = pixels(pipe.tokenizer, 2), torch.zeros(16, 16, dtype=torch.bool)
    mask[:8, :8] = True
    edited = pipe.edit(photos, mask, 3).images
    check_same_pictures(other.edit(photos, mask, 3).images, edited)
    check_same_pictures(other.edit(photos.to(device), mask.to(device), 3).images, edited)


def test_files_of_samples_and_reconstructions(device, tmp_path):
    pipe = tiny_pipeline("flextok", "llama")
    other = placed(pipe, device, device)
    for name, each in (("here", pipe), ("there", other)):
        write_samples(each, tmp_path / name, 3, seed=1, batch_size=2)
    names_of_files = [f"{index:06d}.png" for index in range(3)]
    pictures = [[Image.open(tmp_path / where / name) for name in names_of_files] for where in ("there", "here")]
    check_same_pictures(*pictures)
    files = [tmp_path / "here" / name for name in names_of_files]
    decibels = reconstruct_files(other.tokenizer, files, tmp_path / "there.png")
    assert decibels == pytest.approx(reconstruct_files(pipe.tokenizer, files, tmp_path / "here.png"), abs=0.1)
    decibels = reconstruct_prefixes(other.tokenizer, files, [1, 4], tmp_path / "there.png")
    assert np.allclose(decibels, reconstruct_prefixes(pipe.tokenizer, files, [1, 4], tmp_path / "here.png"), atol=0.1)


# ---------------------------------------------------------------------------------------------------------------------
# Losses and scores


@pytest.mark.parametrize("loss", [L1(), LPIPS()])
def test_a_distance_of_images_is_alike(loss, device):
    a, b = Keys.range(0, 4).uniform("images", 3, 16, 16).mul(2).sub(1).chunk(2)
    check_same(moved(loss, device)(a.to(device), b.to(device)), loss(a, b))


def test_losses_of_codes_and_pixels_are_alike(device):
    x = Keys.range(0, 3).uniform("x", 8)
    check_same(EntropyLoss()(x.to(device)), EntropyLoss()(x))
    loss = LogitLaplace()
    check_same(loss(x.to(device), x.to(device), x.to(device)), loss(x, x, x))


def test_a_game_is_played_alike(device):
    if device.type == "lazy" and torch.__version__ < (2, 10):
        pytest.skip("lazy tensors of torch 2.9 give second derivatives of group norms a wrong shape")
    torch.manual_seed(0)
    here = Adversary(GanConfig(**GAN | {"discriminator": {"width": 4, "num_layers": 1, "norm": "group"}}), (3, 16, 16))
    there, (real, fake) = moved(here, device), Keys.range(0, 4).uniform("images", 3, 16, 16).chunk(2)
    keys = Keys.range(0, 2)
    check_same(there.generator_loss(fake.to(device), keys), here.generator_loss(fake, keys))
    terms, others = here(real, fake, keys), there(real.to(device), fake.to(device), keys)
    assert "d_r1" in terms
    for name, term in terms.items():
        check_same(others[name], term)
    terms["d_loss"].backward()
    others["d_loss"].backward()
    check_gradients(there, here)


@torch.no_grad()
def test_stylegans_discriminator_is_alike(device):
    torch.manual_seed(0)
    here, images = StyleGANDiscriminator(8), torch.rand(2, 3, 8, 8)
    check_same(moved(here, device)(images.to(device)), here(images))


def test_metrics_are_alike(device):
    real, generated = (1 + Keys.range(seed, 40).normal("features", 6) for seed in (0, 1))
    there = [features.to(device) for features in (generated, real)]
    moments = [metrics.Moments(6, device) for _ in there]
    for running, features in zip(moments, there):
        running.update(features)
    merged = moments[0].merge(moments[1]).gaussian
    whole = metrics.Moments.of(torch.cat([generated, real])).gaussian
    for ours, theirs in zip(merged, whole):
        check_same(ours, theirs)
    for score in (
        lambda a, b: metrics.frechet_distance(metrics.Moments.of(a).gaussian, metrics.Moments.of(b).gaussian),
        lambda a, b: metrics.kernel_distance(a, b, subsets=3, subset_size=20),
        lambda a, b: metrics.inception_score(metrics.shuffled(a), metrics.split_evenly(len(a), 4)),
        lambda a, b: metrics.precision_recall(a, b, block=16),
        lambda a, b: metrics.precision_recall(a, b, distance="euclidean", boundary="excluded"),
        lambda a, b: metrics.precision_recall(a, b, distance="squared_euclidean"),
    ):
        assert score(*there) == pytest.approx(score(generated, real), rel=1e-4)
    # Moments that were summed up on the device
    distance = metrics.frechet_distance(*(running.gaussian for running in moments))
    gaussians = (metrics.Moments.of(features).gaussian for features in (generated, real))
    assert distance == pytest.approx(metrics.frechet_distance(*gaussians), rel=1e-4)


def test_scores_of_pairs_are_alike(device):
    a, b = (as_tensor(smooth_images(2, seed=seed)) for seed in (0, 1))
    x, y = (images.to(device).double() / 255 for images in (a, b))
    check_same(psnr(x, y), psnr(a.double() / 255, b.double() / 255))
    for variant in SSIM_VARIANTS.values():
        check_same(variant(x, y), variant(a.double() / 255, b.double() / 255))
    for rule in ("tf1-bilinear", "pil-bicubic-float", "pil-bicubic-8bit"):
        check_same(resize(a.to(device), 20, rule), resize(a, 20, rule))


def test_features_of_a_network_on_the_device(device):
    images = as_tensor(smooth_images(70, seed=0))
    network = CallableNetwork(lambda part: colour_statistics(part.to(device)), "colours")
    plain = CallableNetwork(colour_statistics, "colours")
    there, here = (FeaturePass(each, "blobs", keep=["pool"], moments=["pool"]) for each in (network, plain))
    for features in (there, here):
        features.add(images)
    there, here = there.result(), here.result()
    torch.testing.assert_close(there.features, here.features, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(there.moments["pool"].outer, here.moments["pool"].outer, rtol=1e-5, atol=1e-5)


def test_a_tokenizer_scores_alike(device):
    data = DataConfig(16, source="digits", split="test", channels=3, limit=20, batch_size=16)
    here = tiny("vit_vqgan")
    there, lpips = moved(here, device), LPIPS()
    network = CallableNetwork(lambda part: colour_statistics(part.to(device)), "colours")
    plain = CallableNetwork(colour_statistics, "colours")
    ours = evaluate_tokenizer(there, data, network=network, lpips=moved(lpips, device))["scores"]
    assert ours == pytest.approx(evaluate_tokenizer(here, data, network=plain, lpips=lpips)["scores"], rel=1e-2)
    grid = Grid((0.5,), (1, 4))
    ours = evaluate_perturbation(there, data, network, grid=grid)["scores"]
    assert ours == pytest.approx(evaluate_perturbation(here, data, plain, grid=grid)["scores"], rel=1e-2)


def test_the_quickstarts_scores_are_alike(device):
    here, digits = tiny("vit_vqgan", image_size=32, in_channels=1), scores.load_digits("test").pixels[:8]
    there = moved(here, device)
    assert torch.equal(scores.encode(there, digits), scores.encode(here, digits))
    assert scores.reconstruction_psnr(there, digits) == pytest.approx(scores.reconstruction_psnr(here, digits), abs=0.1)


# ---------------------------------------------------------------------------------------------------------------------
# Training


def test_tokens_are_cached_alike(device, tmp_path):
    data = DataConfig(16, source="digits", channels=3, limit=20, batch_size=16)
    here = tiny("vit_vqgan")
    for name, each in (("here", here), ("there", moved(here, device))):
        tokenize(each, data, tmp_path / name, augmentation="flip")
    there, here = (TokenCache(tmp_path / name).batch(range(20), [1] * 20)[0] for name in ("there", "here"))
    assert torch.equal(there, here)


@pytest.fixture(scope="module")
def tokens(tmp_path_factory) -> Path:
    return write_tokens(tmp_path_factory.mktemp("tokens") / "tokens")


def test_pictures_of_a_run_are_drawn_on_the_device(device, tokens, tmp_path):
    config = RunConfig.parse(generator_config(tmp_path / "run", tokens))
    task = GeneratorTask(config, rank=0, world_size=1)
    here, there = task.model.eval(), moved(task.model, device)
    decoded_on = []
    task.tokenizer.decoder.register_forward_hook(lambda module, inputs, output: decoded_on.append(output.device.type))
    check_same_pictures(task.pictures(there), task.pictures(here))
    assert decoded_on == [device.type, "cpu"]
    assert {parameter.device.type for parameter in task.tokenizer.parameters()} == {"cpu"}
    task = TokenizerTask(RunConfig.parse(tokenizer_config(tmp_path / "run")), rank=0, world_size=1)
    here, there = task.model.eval(), moved(task.model, device)
    check_same_pictures(task.pictures(there), task.pictures(here))


@pytest.fixture
def accelerated(device, monkeypatch) -> torch.device:
    """accelerate finds a GPU by itself, but has to be told of the stand-in."""
    if not GPU:
        monkeypatch.setattr(Accelerator, "device", property(lambda self: device))
    return device


def check_run(config: dict, kind: type[Task], device: torch.device, monkeypatch) -> None:
    """Train to the end and two steps further; every batch is on the device."""
    seen, count = set(), kind.count
    monkeypatch.setattr(kind, "count", lambda task, batch: seen.add(batch[0].device.type) or count(task, batch))
    folder = train(config)
    config["training"] |= {"max_steps": config["training"]["max_steps"] + 2}
    train(config, resume=True)
    assert [row["step"] for row in read_metrics(folder / "metrics.jsonl")] == list(range(1, 9))
    assert seen == {device.type}


def test_a_tokenizer_run_goes_to_its_end_and_resumes(accelerated, tmp_path, monkeypatch):
    losses = {"l1": 1.0, "codebook": 1.0, "commitment": 0.25, "entropy": 0.1, "gan": GAN}
    model = {"entropy_temperature": 0.1, "codebook_restart_after": 2}
    config = tokenizer_config(tmp_path / "run", losses=losses, model=model)
    check_run(config, TokenizerTask, accelerated, monkeypatch)
    assert vistok.load(tmp_path / "run" / "tokenizer").spec.length == 4


def test_a_generator_run_goes_to_its_end_and_resumes(accelerated, tokens, tmp_path, monkeypatch):
    config = generator_config(tmp_path / "run", tokens, training={"max_grad_norm": 1.0, "image_every": 3})
    check_run(config, GeneratorTask, accelerated, monkeypatch)
    assert len(vistok.pipeline(tmp_path / "run", device="cpu")([0, 1]).images) == 2

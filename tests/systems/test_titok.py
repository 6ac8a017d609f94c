"""TiTok and TA-TiTok: two stages, continuous latents, text; the MaskGIT-VQGAN codec; clustering of codebooks."""

from __future__ import annotations

import pytest
import torch
from support.tiny_models import ARGUMENTS, pixels, tiny
from torch.nn import functional as F

from vistok.checkpoints import CheckpointError, rename
from vistok.draws import Keys
from vistok.losses import ClassifierDistance, PooledDiscriminator
from vistok.quantizers import VectorQuantizer
from vistok.quantizers.clustering import CodeClustering
from vistok.tokenizers.titok import TiTok
from vistok.types import Condition

# ---------------------------------------------------------------------------------------------------------------------
# Two stages


def test_first_stage_predicts_codes_and_renders_nothing():
    model = tiny("titok", output="codes")
    output = model(pixels(model))
    assert output.reconstruction is None
    assert output.features["code_logits"].shape == (3, 16, 16)
    assert not model.reconstructs
    with pytest.raises(ValueError, match="renders no pixels"):
        model.decode(output.tokens)


def test_second_stage_takes_the_first_ones_weights_and_the_codecs():
    first, codec, second = (tiny("titok", output="codes"), tiny("maskgit_vqgan", codebook_size=16), tiny("titok"))
    wanted = {key: value.shape for key, value in second.state_dict().items()}
    rules = [(r"decoder\.(.+)", r"renderer.decoder.\1"), (r"quantizer\.(embedding\.weight)", r"renderer.\1")]
    parts = {key: value for key, value in codec.state_dict().items() if not key.startswith("encoder.")}
    given = first.state_dict() | rename(parts, rules)
    assert {key: value.shape for key, value in given.items()} == wanted


def test_pixels_are_the_expected_codes_decoded():
    model = tiny("titok")
    logits = torch.zeros(1, 16, 16)
    logits[..., 5] = 1e4  # all the weight on one code
    codes = model.renderer.embedding.weight[5].expand(1, 16, -1).mT.unflatten(2, (4, 4))
    torch.testing.assert_close(model.renderer(logits), model.renderer.decoder(codes))


def test_a_decoder_patch_must_be_the_codecs_stride():
    with pytest.raises(ValueError, match="decoder_patch_size 8 must be the codec's stride 4"):
        tiny("titok", decoder_patch_size=8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"output": "pixel"}, "output must be one of 'pixels', 'codes', 'codec', got 'pixel'"),
        ({"bottleneck": "kl"}, "bottleneck must be one of"),
        ({"image_size": 18}, "18x18 is not a multiple of the patch size 4"),
        ({"init_std": 0.0}, r"init_std must be positive, got 0\.0"),
        ({"encoder": {"dim": 32, "num_layers": 1, "num_heads": 5}}, "a width of 32 cannot be split into 5 heads"),
    ],
)
def test_what_it_cannot_be_built_of_is_said(arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny("titok", **arguments)


def test_encoder_and_decoder_may_have_other_patches_and_sizes():
    wide = {"dim": 16, "num_layers": 2, "num_heads": 4}
    model = tiny(
        "titok", output="pixels", encoder_patch_size=8, decoder_patch_size=2, decoder=wide, image_size=(16, 24)
    )
    assert model.decode(model.encode(pixels(model))).shape == (3, 3, 16, 24)


def test_wider_weights_tell_images_apart_from_the_start():
    def spread(init_std: float) -> float:
        torch.manual_seed(0)
        model = TiTok(**ARGUMENTS["titok"] | {"output": "pixels", "init_std": init_std})
        return F.normalize(model.latents(torch.rand(16, 3, 16, 16) * 2 - 1), dim=-1).std(0).mean().item()

    assert spread(32**-0.5) > 10 * spread(0.02)


def test_another_number_of_tokens_is_refused():
    model = tiny("titok")
    with pytest.raises(ValueError, match="decodes 8 tokens at once, got 5"):
        model.decode(torch.zeros(1, 5, dtype=torch.int64))


# ---------------------------------------------------------------------------------------------------------------------
# Continuous latents

VAE = {"bottleneck": "vae", "output": "pixels"}


def test_latents_are_drawn_from_their_moments():
    model = tiny("titok", **VAE)
    images, draws = pixels(model), model.training_draws(Keys.range(0, 3))
    mean, log_variance = model.encode_moments(images).chunk(2, -1)
    assert torch.equal(model.encode(images), mean)
    torch.testing.assert_close(model.encode(images, draws=draws), mean + (log_variance / 2).exp() * draws["posterior"])
    output = model(images, draws=draws)
    torch.testing.assert_close(output.reconstruction, model.decode(output.tokens))


def test_kl_is_that_of_normal_distributions():
    model = tiny("titok", **VAE)
    mean, log_variance = model.encode_moments(pixels(model)).chunk(2, -1)
    posterior = torch.distributions.Normal(mean, (log_variance / 2).exp())
    expected = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0.0, 1.0)).sum((1, 2))
    torch.testing.assert_close(model(pixels(model)).losses["kl"], expected)


def test_standardised_latents_have_unit_scale_and_decode_alike(tmp_path):
    model = tiny("titok", **VAE)
    images = pixels(model, batch=16)
    before = model.decode(model.encode(images))
    model.standardise(images)
    draws = {"posterior": Keys.range(0, 16).normal("z", 8, 4)}
    latents = model.encode(images, draws=draws)
    assert latents.mean((0, 1)).abs().max() < 0.3
    assert (latents.std((0, 1)) - 1).abs().max() < 0.3
    torch.testing.assert_close(model.decode(model.encode(images)), before)
    model.save_pretrained(tmp_path / "model")
    torch.testing.assert_close(type(model).from_pretrained(tmp_path / "model").encode(images), model.encode(images))


# ---------------------------------------------------------------------------------------------------------------------
# Text


def text(batch: int = 3, seed: int = 1) -> Condition:
    return Condition.from_features(Keys.range(seed, batch).normal("text", 5, 6))


def test_the_decoder_reads_the_text_and_the_encoder_does_not():
    model = tiny("ta_titok")
    ids = model.encode(pixels(model), condition=text())
    assert torch.equal(ids, model.encode(pixels(model)))
    with_text, other = model.decode(ids, condition=text()), model.decode(ids, condition=text(seed=2))
    assert not torch.allclose(with_text, other)
    torch.testing.assert_close(model(pixels(model), condition=text()).reconstruction, with_text)


def test_dropped_rows_and_masked_features_are_not_seen():
    model = tiny("ta_titok")
    ids = model.encode(pixels(model))
    dropped = text().drop(torch.tensor([True, False, True]))
    mixed, none, whole = (model.decode(ids, condition=c) for c in (dropped, None, text()))
    torch.testing.assert_close(mixed, torch.where(torch.tensor([True, False, True])[:, None, None, None], none, whole))
    mask = torch.arange(5) < torch.tensor([[2], [0], [5]])
    masked = Condition.from_features(text().features, mask)
    other = Condition.from_features(torch.where(mask[..., None], text().features, 7.0), mask)
    torch.testing.assert_close(model.decode(ids, condition=masked), model.decode(ids, condition=other))
    torch.testing.assert_close(model.decode(ids, condition=masked)[1:], torch.stack([none[1], whole[2]]))


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        (Condition.from_labels([0, 1, 2]), r"takes text features \(B, 5, 6\), not class labels"),
        (Condition.from_features(torch.zeros(3, 5, 4)), r"must be \(B, 5, 6\), .*got \(3, 5, 4\)"),
        (Condition.from_features(torch.zeros(3, 6, 6)), r"got \(3, 6, 6\)"),
    ],
)
def test_a_condition_that_is_no_such_text_is_refused(condition, message):
    model = tiny("ta_titok")
    with pytest.raises(ValueError, match=message):
        model.decode(model.encode(pixels(model)), condition=condition)


# ---------------------------------------------------------------------------------------------------------------------
# Clustering


def test_unused_codes_move_onto_their_nearest_latents_and_used_ones_stay():
    quantizer = VectorQuantizer(4, 2, normalize=False, clustering=True).train()
    codes = torch.tensor([[0.0, 0.0], [1.0, 0.0], [50.0, 50.0], [-70.0, 0.0]])
    with torch.no_grad():
        quantizer.embedding.weight.copy_(codes)
    latents = torch.tensor([[[0.1, 0.0], [0.9, 0.1], [0.0, -0.1], [1.1, 0.0]]])
    for _ in range(30):  # the usage average has to rise first
        quantizer(latents)
    quantizer.after_backward()
    moved = quantizer.embedding.weight.detach()
    torch.testing.assert_close(moved[:2], codes[:2], atol=1e-6, rtol=0)
    torch.testing.assert_close(moved[2], latents[0, 3], atol=0.1, rtol=0)
    torch.testing.assert_close(moved[3], latents[0, 2], atol=0.1, rtol=0)


def test_evaluation_leaves_the_codebook_alone():
    quantizer = VectorQuantizer(8, 4, clustering=True).eval()
    quantizer(torch.randn(2, 5, 4))
    assert not quantizer.clustering.usage.any()


def test_codes_are_moved_in_one_way_only():
    with pytest.raises(ValueError, match="choose one"):
        VectorQuantizer(8, 4, restart_after=3, clustering=True)
    with pytest.raises(ValueError, match=r"decay must lie in \[0, 1\), got 1"):
        CodeClustering(8, 4, decay=1.0)


# ---------------------------------------------------------------------------------------------------------------------
# The codec


def test_the_codec_encodes_images_of_other_sizes():
    model = tiny("maskgit_vqgan")
    images = torch.rand(2, 3, 8, 24) * 2 - 1
    ids = model.encode(images)
    assert ids.shape == (2, 12)
    assert model.decode(ids, grid=(2, 6)).shape == images.shape
    with pytest.raises(ValueError, match="multiples of 4, got 10x24"):
        model.encode(torch.zeros(1, 3, 10, 24))


def test_where_channels_change_the_input_is_dropped():
    model = tiny("maskgit_vqgan")
    block = model.encoder.levels[2].blocks[0]  # 8 to 16 channels
    with torch.no_grad():
        block.conv2.weight.zero_()
    assert not block(torch.randn(1, 8, 4, 4)).any()


# ---------------------------------------------------------------------------------------------------------------------
# Losses


def test_classifier_distance_is_that_of_logits_and_reaches_the_images():
    classifier = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(2), torch.nn.Flatten(), torch.nn.Linear(12, 5))
    distance = ClassifierDistance(classifier).train()
    images, target = (Keys.range(seed, 2).uniform("images", 3, 20, 30) * 2 - 1 for seed in (0, 1))
    assert not distance(target, target).any()
    images.requires_grad_()
    value = distance(images, target)
    torch.testing.assert_close(value, (distance.logits(images) - distance.logits(target)).square().mean(1))
    value.sum().backward()
    assert images.grad.abs().sum() > 0
    assert classifier[2].weight.grad is None
    assert distance(images[:, :1], target[:, :1]).shape == (2,)
    with pytest.raises(ValueError, match="differ in shape"):
        distance(images, target[:1])


def test_classifier_weights_that_are_not_there_are_said(tmp_path):
    with pytest.raises(CheckpointError, match=r"no weights file .*none\.pt"):
        ClassifierDistance.from_pretrained(tmp_path / "none.pt")


def test_pooled_discriminator_has_one_raster_of_logits_for_all_sizes():
    model = PooledDiscriminator(width=8, grid=4, norm_groups=4)
    assert model(torch.rand(2, 3, 32, 32)).shape == model(torch.rand(2, 3, 40, 64)).shape == (2, 1, 4, 4)
    with pytest.raises(ValueError, match=r"must be \(batch, 3, H, W\)"):
        model(torch.rand(2, 1, 32, 32))
    with pytest.raises(ValueError, match="norm_groups 3 does not divide width 8"):
        PooledDiscriminator(width=8, norm_groups=3)

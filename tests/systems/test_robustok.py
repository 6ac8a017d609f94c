"""RobusTok: the tokenizer, perturbation of latents, and its losses."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.tiny_models import pixels, tiny

from vistok.draws import Keys
from vistok.losses import SemanticGuide, contrastive_loss
from vistok.quantizers import VectorQuantizer
from vistok.quantizers.perturbation import EXCHANGE, RANK, Annealing, Perturbation, perturbation_draws, ranks
from vistok.tokenizers.robustok import from_backbone

# ---------------------------------------------------------------------------------------------------------------------
# Tokenizer


def backbone(**arguments):
    from timm.models.vision_transformer import VisionTransformer

    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2, "init_values": 0.5}
    return VisionTransformer(**sizes | arguments, num_classes=0).eval()


def test_both_transformers_begin_as_the_given_one():
    vit = backbone()
    model = from_backbone(vit, num_tokens=16, codebook_size=32, codebook_embed_dim=4).eval()
    images = pixels(model)
    for part in (model.encoder, model.decoder):
        embedded = vit.patch_embed(images)
        torch.testing.assert_close(part.backbone(part.backbone.place(embedded)), vit.forward_features(images))
    torch.testing.assert_close(model.encoder.patch_embed(images).flatten(2).mT, vit.patch_embed(images))


@pytest.mark.parametrize("num_tokens", [4, 25])
def test_tokens_may_be_fewer_or_more_than_patches(num_tokens):
    model = tiny("robustok", num_tokens=num_tokens)
    ids = model.encode(pixels(model))
    assert ids.shape == (3, num_tokens)
    assert model.decode(ids).shape == (3, 3, 16, 16)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"num_tokens": 12}, "square number"), ({"image_size": 18}, "18x18 is not a multiple of patch_size 4")],
)
def test_sizes_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny("robustok", **arguments)


# ---------------------------------------------------------------------------------------------------------------------
# Perturbation


def quantizer(perturbation: Perturbation | None, **options) -> VectorQuantizer:
    made = VectorQuantizer(64, 4, gradient="normalised", **options).train()
    made.perturbation = perturbation
    with torch.no_grad():
        made.embedding.weight.copy_(Keys.range(7, 64).normal("codes", 4))
    return made


LATENTS = Keys.range(0, 8).normal("latents", 50, 4)
DRAWS = perturbation_draws(Keys.range(0, 8), 50)


def test_only_the_first_images_are_perturbed_and_losses_see_clean_codes():
    clean, changed = quantizer(None)(LATENTS), quantizer(Perturbation(1.0, 0.5, 20))(LATENTS, draws=DRAWS)
    same = (clean.quantized == changed.quantized).all(-1)
    assert same[4:].all()
    assert same[:4].float().mean().item() == pytest.approx(1 / 20, abs=0.05)
    assert torch.equal(clean.ids, changed.ids)
    assert all(torch.equal(clean.losses[name], changed.losses[name]) for name in clean.losses)


@given(st.floats(0, 1), st.integers(1, 100))
def test_perturbed_tokens_are_among_the_nearest_codes(rate, strength):
    made = quantizer(Perturbation(rate, 1.0, strength))
    output = made(LATENTS, draws=DRAWS).quantized
    near = made.ids_to_latents(made.neighbours(LATENTS, min(strength, 64)))  # (B, L, k, D)
    assert (near - output[:, :, None]).abs().amax(-1).amin(-1).max() < 1e-6


def test_gradients_pass_straight_through_the_exchange():
    latents = LATENTS.clone().requires_grad_()
    made = quantizer(Perturbation(1.0, 1.0, 20))
    made(latents, draws=DRAWS).quantized.sum().backward()
    straight = LATENTS.clone().requires_grad_()
    torch.nn.functional.normalize(straight, dim=-1).sum().backward()
    torch.testing.assert_close(latents.grad, straight.grad)
    assert made.embedding.weight.grad is None


def test_a_rate_of_0_exchanges_nothing():
    lowest = {EXCHANGE: torch.zeros(1, 4), RANK: torch.full((1, 4), 0.9)}
    assert ranks(0.0, 10, lowest).tolist() == [[0, 0, 0, 0]]
    assert ranks(1.0, 10, lowest | {EXCHANGE: torch.tensor([[0, 0.3, 0.6, 1 - 2**-24]])}).tolist() == [[9, 9, 9, 9]]


def test_a_perturbation_needs_draws_and_is_off_in_evaluation():
    made = quantizer(Perturbation())
    with pytest.raises(ValueError, match="pass perturbation_draws"):
        made(LATENTS)
    torch.testing.assert_close(made.eval()(LATENTS).quantized, quantizer(None)(LATENTS).quantized)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"rate": 1.5}, "rate"), ({"share": -0.1}, "share"), ({"strength": 0}, "strength must be at least 1")],
)
def test_perturbations_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Perturbation(**arguments)


def test_annealing_jumps_where_its_end_ratio_is_not_a_half():
    annealing = Annealing(40, 120, 0.25)
    assert [annealing.ratio(time) for time in (0, 40, 80, 120, 121)] == [1, 1, 0.875, 0.75, 0.25]
    assert Perturbation(0.8, 0.1, 100).scaled(0.5) == Perturbation(0.4, 0.1, 50)
    with pytest.raises(ValueError, match="must start before it ends"):
        Annealing(3, 2)


# ---------------------------------------------------------------------------------------------------------------------
# Losses


def test_contrastive_loss_is_least_for_matched_pairs():
    features = torch.eye(4)
    assert contrastive_loss(features, features, scale=50) < 1e-6
    assert contrastive_loss(features, features.roll(1, 0), scale=50) > 40
    torch.testing.assert_close(
        contrastive_loss(3 * features, features, normalise=True), contrastive_loss(features, features)
    )
    with pytest.raises(ValueError, match="differ in shape"):
        contrastive_loss(features, features[:2])


def test_the_guide_is_frozen_and_reads_images_of_any_size():
    guide = SemanticGuide(backbone()).train()
    assert not guide.encoder.training
    assert not any(parameter.requires_grad for parameter in guide.parameters())
    assert guide(torch.rand(2, 3, 16, 16)).shape == guide(torch.rand(2, 3, 20, 24)).shape == (2, guide.dim)

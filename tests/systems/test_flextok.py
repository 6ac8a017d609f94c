"""FlexTok: ordered registers, prefixes of any length, the flow decoder, its training and its autoencoder."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file
from support.three_rows import combined, three_rows
from support.tiny_models import ARGUMENTS, pixels, tiny

import vistok
from vistok.checkpoints import CheckpointError, convert
from vistok.cli import main
from vistok.data.pictures import GAP, from_pil, to_pil
from vistok.data.sheets import LINE
from vistok.draws import Keys
from vistok.flow import euler, last
from vistok.guidance import APG
from vistok.nn.alignment import AlignmentConfig
from vistok.pipelines.samples import reconstruct_prefixes
from vistok.tokenizers.flextok.model import FlexTok, kept_tokens
from vistok.tokenizers.flextok.networks import PATH, velocity_field
from vistok.tokenizers.kl_vae import KLVAE

TOKENS = 8
VAE = {
    "block_out_channels": (8, 8),
    "layers_per_block": 1,
    "latent_channels": 4,
    "encoder_attention": (),
    "norm_groups": 4,
}


@pytest.fixture(scope="module")
def model() -> FlexTok:
    return tiny("flextok")


@pytest.fixture(scope="module")
def ids(model) -> torch.Tensor:
    return model.encode(pixels(model))


def draws(model: FlexTok, batch: int = 3, **changes: torch.Tensor) -> dict[str, torch.Tensor]:
    return model.training_draws(Keys.range(0, batch)) | changes


@given(first=st.integers(1, TOKENS - 1), seed=st.integers(0, 100))
@settings(max_examples=10, deadline=None)
def test_a_register_depends_on_no_later_one(model, first, seed):
    images = pixels(model)
    expected = model.encoder(model.to_maps(images))
    registers = model.encoder.registers.data.clone()
    generator = torch.Generator().manual_seed(seed)
    try:
        model.encoder.registers.data[first:] = torch.randn(TOKENS - first, registers.shape[1], generator=generator)
        changed = model.encoder(model.to_maps(images))
    finally:
        model.encoder.registers.data.copy_(registers)
    torch.testing.assert_close(changed[:, :first], expected[:, :first])
    assert not torch.allclose(changed[:, first:], expected[:, first:])


@given(lengths=st.lists(st.integers(1, TOKENS), min_size=3, max_size=3))
@settings(max_examples=10, deadline=None)
def test_lengths_in_one_batch_are_prefixes_decoded_alone(model, ids, lengths):
    noise = model.decoding_draws(Keys.range(1, 3))["noise"]
    together = model.decode(ids, lengths=torch.tensor(lengths), draws={"noise": noise})
    for row, length in enumerate(lengths):
        alone = model.decode(ids[row : row + 1, :length], draws={"noise": noise[row : row + 1]})
        torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-4, atol=1e-4)


def test_more_tokens_change_the_image(model, ids):
    images = [model.decode(ids[:, :length]) for length in range(1, TOKENS + 1)]
    assert all(not torch.allclose(a, b) for a, b in pairwise(images))


def test_null_condition_hides_all_tokens(model, ids):
    codes, none = model.quantizer.ids_to_latents(ids), torch.zeros(3, dtype=torch.bool)
    lengths = torch.tensor([1, 4, 8])
    registers = model.decoder.embed_codes(codes, lengths, ~none)
    assert torch.equal(registers, model.decoder.null_token.expand_as(registers))
    kept = model.decoder.embed_codes(codes, lengths, none)
    assert torch.equal(kept[0, 1], model.decoder.dropped_token)
    assert not torch.equal(kept[2, 1], model.decoder.dropped_token)


@pytest.mark.parametrize("guidance", ["cfg", "apg"])
def test_stream_ends_with_the_decoded_image(model, ids, guidance):
    options = {"num_steps": 3, "guidance_scale": 2.0, "guidance": guidance}
    images = list(model.decode_stream(ids, **options))
    assert len(images) == 3
    assert torch.equal(images[-1], model.decode(ids, **options))
    assert not torch.allclose(images[0], images[-1])


@pytest.mark.parametrize("guidance", ["cfg", "apg", APG(norm_threshold=1.0)])
def test_scale_1_equals_no_guidance(model, ids, guidance):
    free = model.decode(ids, guidance_scale=1.0)
    torch.testing.assert_close(
        model.decode(ids, guidance_scale=lambda t: 1.0, guidance=guidance), free, rtol=1e-4, atol=1e-4
    )
    assert not torch.allclose(model.decode(ids, guidance_scale=3.0, guidance=guidance), free)


@torch.no_grad()
def test_three_rows_equal_three_passes(model, ids):
    decoder, codes = model.decoder, model.quantizer.ids_to_latents(ids)
    whole, none = torch.full((3,), TOKENS), torch.zeros(3, dtype=torch.bool)
    rows = [
        decoder.embed_codes(codes, whole, none),
        decoder.embed_codes(codes.roll(1, 0), torch.tensor([1, 4, 8]), none),
    ]
    rows.append(decoder.embed_codes(codes, whole, ~none))
    x = noise = model.decoding_draws(Keys.range(0, 3))["noise"]
    for t, t_next in pairwise(PATH.times(3)):
        x = x + (t_next - t) * combined([decoder(x, torch.tensor([t]), row).velocity for row in rows])
    guided = velocity_field(decoder, torch.cat(rows), three_rows())
    torch.testing.assert_close(last(euler(guided, noise, PATH.times(3))).x, x, rtol=1e-4, atol=1e-4)


def test_what_the_model_was_built_with_is_the_default(ids):
    model = tiny("flextok", num_steps=3, guidance_scale=2.0, guidance="cfg")
    told = tiny("flextok").decode(ids, num_steps=3, guidance_scale=2.0, guidance="cfg")
    assert torch.equal(model.decode(ids), told)


def test_seed_and_sample_number_decide_the_image(model, ids):
    decoded = model.decode(ids, draws=model.decoding_draws(Keys.range(5, 3)))
    alone = model.decode(ids[2:], draws=model.decoding_draws(Keys.of(5, [2])))
    torch.testing.assert_close(alone, decoded[2:], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(model.decode(ids), decoded)
    assert torch.equal(model.reconstruct(pixels(model)), model.decode(ids).clamp(-1, 1))


def test_smaller_images_work_too(model):
    images = pixels(model)[..., :8, :12]
    ids = model.encode(images)
    assert ids.shape == (3, TOKENS)
    assert model.decode(ids, draws={"noise": torch.randn(3, 3, 8, 12)}).shape == (3, 3, 8, 12)


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (lambda ids: ids[:, :0], {}, "cannot decode 0 tokens"),
        (lambda ids: torch.cat([ids, ids], 1), {}, "cannot decode 16 tokens: a prefix has from 1 to 8"),
        (lambda ids: torch.cat([ids, ids], 1), {"lengths": torch.tensor([2, 4, 8])}, "cannot decode 16 tokens: "),
        (lambda ids: ids[:, :4], {"lengths": torch.tensor([1, 2, 5])}, "cannot decode 5 tokens of 4"),
        (lambda ids: ids, {"lengths": torch.tensor([0, 2, 5])}, "cannot decode 0 tokens"),
        (lambda ids: ids, {"lengths": torch.tensor([2, 5])}, r"lengths must be \(3,\) integers"),
        (lambda ids: ids + 32, {}, r"out of range: this codebook has ids 0\.\.31"),
        (lambda ids: ids, {"num_steps": 0}, "num_steps must be an integer of at least 1, got 0"),
    ],
)
def test_wrong_tokens_and_options_are_refused(model, ids, change, options, message):
    with pytest.raises(ValueError, match=message):
        model.decode(change(ids), **options)


@pytest.mark.parametrize("size", [(18, 16), (32, 16)])
def test_images_that_do_not_divide_or_are_too_large_are_refused(model, size):
    with pytest.raises(ValueError, match="multiples of 4x4, at most 16x16"):
        model.encode(torch.zeros(1, 3, *size))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image_size": 18}, "multiples of 4x4"),
        ({"encoder": {"dim": 30, "head_dim": 16}}, "dim 30 must be divisible"),
        ({"alignment": {"layer": 1}}, r"alignment\.layer must lie in 0\.\.0, got 1"),
    ],
)
def test_models_that_cannot_be_built_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny("flextok", **arguments)


def photos(folder: Path, count: int) -> list[Path]:
    images = to_pil(Keys.range(0, count).uniform("photos", 3, 16, 16) * 2 - 1)
    paths = [folder / f"{index}.png" for index in range(count)]
    for image, path in zip(images, paths):
        image.save(path)
    return paths


def test_reconstruct_shows_a_strip_of_prefixes(model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    files = photos(tmp_path, 2)
    command = ["reconstruct", str(tmp_path / "model"), *map(str, files), "--tokens", "1,4,8", "--out"]
    with pytest.raises(SystemExit) as done:
        main([*command, str(tmp_path / "strip.png")])
    assert done.value.code == 0
    strip = np.asarray(Image.open(tmp_path / "strip.png"))
    row, column = 8 * 16 + LINE + GAP, 8 * 16 + GAP  # of images eight times as large, with labels
    assert strip.shape == (LINE + 2 * row - GAP, 4 * column - GAP, 3)  # the image and three reconstructions, per file
    assert np.array_equal(strip[LINE : LINE + 8 * 16 : 8, : 8 * 16 : 8], np.asarray(Image.open(files[0])))
    original = from_pil([Image.open(files[1])], (16, 16), 3)
    [four] = to_pil(model.decode(model.encode(original)[:, :4]))
    place = strip[LINE + row : LINE + row + 8 * 16 : 8, 2 * column : 2 * column + 8 * 16 : 8]
    assert np.array_equal(place, np.asarray(four))


@pytest.mark.parametrize(
    ("name", "lengths", "message"),
    [
        ("flextok", [0], "cannot decode 0 tokens"),
        ("flextok", [9], "cannot decode 9 tokens"),
        ("dar", [3], "a multiple of 2"),
        ("vit_vqgan", [1], "ViTVQGAN decodes all of its 16 tokens at once only"),
    ],
)
def test_strips_that_cannot_be_made_are_refused(name, lengths, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        reconstruct_prefixes(tiny(name), photos(tmp_path, 1), lengths, tmp_path / "strip.png")
    assert not (tmp_path / "strip.png").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Training


@pytest.mark.parametrize("mode", ["uniform", "pow2", "uniform_pow2", "none"])
@given(num_tokens=st.integers(1, 40))
@settings(max_examples=20)
def test_nested_dropout_keeps_what_its_mode_says(mode, num_tokens):
    kept = kept_tokens(torch.linspace(0, 1 - 1e-6, 1000), num_tokens, mode)
    powers = {1 << i for i in range(6) if 1 << i < num_tokens} | {num_tokens}
    expected = {"uniform": set(range(1, num_tokens + 1)), "none": {num_tokens}}.get(mode, powers)
    assert set(kept.tolist()) == expected


def test_all_parameters_learn_and_the_loss_is_the_velocity_error(model):
    output = model(pixels(model), draws=draws(model, null=torch.tensor([0.0, 1.0, 1.0])))
    assert output.reconstruction is None
    assert torch.equal(output.tokens, model.encode(pixels(model)))
    assert output.losses.keys() == set(model.loss_terms)
    assert output.losses["flow"].shape == (3,)
    model.zero_grad()
    output.losses["flow"].sum().backward()
    still = [name for name, p in model.named_parameters() if p.requires_grad and not p.grad.abs().sum() > 0]
    assert still == []


@pytest.mark.parametrize(("code_std", "differ"), [(0.0, False), (1.0, True)])
def test_images_begin_with_codes_of_their_own_where_asked_for(code_std, differ):
    model = FlexTok(**ARGUMENTS["flextok"], code_std=code_std)
    ids = model.encode(pixels(model))
    assert torch.equal(ids, ids[:1].expand_as(ids)) != differ


def test_queries_keys_and_values_begin_as_layers_of_their_own():
    untrained = FlexTok(**ARGUMENTS["flextok"])
    bound = (6 / (32 + 32)) ** 0.5  # of Xavier's uniform distribution
    for block in [*untrained.encoder.blocks, *untrained.decoder.blocks]:
        for part in block.attn.qkv.weight.chunk(3):
            assert 0.95 * bound < part.abs().max() <= bound


def test_samples_train_alike_in_any_batch(model):
    whole = model(pixels(model), draws=draws(model)).losses["flow"]
    alone = [
        model(pixels(model)[i : i + 1], draws=model.training_draws(Keys.of(0, [i]))).losses["flow"] for i in range(3)
    ]
    torch.testing.assert_close(torch.cat(alone), whole, rtol=1e-4, atol=1e-4)


def test_perturbed_codes_are_other_codes():
    model = tiny("flextok", quantizer_dropout=0.5, token_corruption=1.0)
    values = draws(model, unrounded=torch.tensor([0.0, 1.0, 1.0]), corrupt=torch.tensor([[1.0, 1], [1, 1], [0, 1]]))
    registers = model.encoder(pixels(model))
    codes = model.quantizer(registers).quantized
    perturbed = model._perturb(codes, registers, values)
    assert torch.equal(perturbed[0], model.quantizer.continuous(registers)[0])
    assert torch.equal(perturbed[1], codes[1])
    assert (perturbed[2] != codes[2]).any(-1).float().mean() > 0.5
    again = model.quantizer.ids_to_latents(model.quantizer.latents_to_ids(perturbed[2]))
    torch.testing.assert_close(again, perturbed[2])  # they are codes of the codebook


def test_training_without_draws_is_refused(model):
    with pytest.raises(ValueError, match="random times and noise"):
        model(pixels(model))


def test_alignment_features_cover_the_patches():
    model = tiny("flextok", alignment=AlignmentConfig(dim=12, layer=0, hidden_dim=8))
    assert model.alignment_dim == 12
    assert model(pixels(model), draws=draws(model)).features["alignment"].shape == (3, 16, 12)
    assert tiny("flextok").alignment_dim is None


# ---------------------------------------------------------------------------------------------------------------------
# The autoencoder, and official files


@pytest.fixture
def diffusers_folder(tmp_path):
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    vae = AutoencoderKL(
        block_out_channels=(8, 8), latent_channels=4, norm_num_groups=4, scaling_factor=0.5, **blocks
    ).eval()
    vae.save_pretrained(tmp_path / "vae")
    return tmp_path / "vae", vae


def test_latents_come_from_the_frozen_autoencoder(diffusers_folder, tmp_path):
    folder, vae = diffusers_folder
    model = tiny("flextok", vae_weights=str(folder), patch_size=2)
    images = pixels(model)
    maps = model.to_maps(images)
    torch.testing.assert_close(maps, vae.encode(images).latent_dist.mean * 0.5, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model.to_pixels(maps), vae.decode(maps / 0.5).sample, rtol=1e-4, atol=1e-4)
    assert not any(parameter.requires_grad for parameter in model.vae.parameters())
    # The posterior is sampled in training only.
    assert not torch.allclose(model.to_maps(images, draws=draws(model)), maps)
    # A saved model no longer needs the folder.
    model.save_pretrained(tmp_path / "model")
    for file in folder.iterdir():
        file.unlink()
    assert str(folder) not in (tmp_path / "model" / "config.json").read_text()
    loaded = vistok.load(tmp_path / "model")
    assert torch.equal(loaded.reconstruct(images), model.reconstruct(images))


def test_what_is_said_of_the_autoencoder_overrides_its_own_config(diffusers_folder):
    model = tiny("flextok", vae_weights=str(diffusers_folder[0]), vae={"latent_scale": 2.0}, patch_size=2)
    assert model.vae.gaussian.scale.tolist() == [2.0] * 4


def test_an_autoencoder_without_weights_is_refused_when_it_is_used():
    model = tiny("flextok", vae=VAE, patch_size=2)
    for use in (lambda: model.encode(pixels(model)), lambda: model.decode(torch.zeros(1, 2, dtype=torch.int64))):
        with pytest.raises(CheckpointError, match=r"no weights: give .* model\.vae_weights"):
            use()
    model.load_state_dict(model.state_dict())
    assert model.reconstruct(pixels(model)).shape == (3, 3, 16, 16)


def test_an_absent_autoencoder_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="nowhere"):
        tiny("flextok", vae_weights=str(tmp_path / "nowhere"))


def test_a_misspelt_argument_of_the_autoencoder_gets_a_hint():
    with pytest.raises(ValueError, match=r"vae\.latent_chanels.*latent_channels"):
        tiny("flextok", vae={"latent_chanels": 4})
    assert isinstance(tiny("flextok", vae=VAE, patch_size=2).vae, KLVAE)


@pytest.fixture(scope="module")
def case():
    from golden.harness import Case

    return Case(Path(__file__).parents[1] / "golden" / "cases" / "flextok_tokenizer")


def official_file(case, folder, header: dict) -> object:
    save_file(case.state, folder / "model.safetensors", metadata={"format": "pt"} | header)
    return folder / "model.safetensors"


def test_config_is_read_from_the_header_of_a_released_file(case, tmp_path):
    config = case.config | {"vae": case.config["vae"] | {"block_out_channels": [32, 32, 64, 64]}}
    file = official_file(case, tmp_path, {name: repr(section) for name, section in config.items()})
    model = convert("flextok/tokenizer", file)
    assert model.fingerprint() == vistok.from_official("flextok/tokenizer", config, case.state).fingerprint()


def test_a_damaged_header_is_refused(case, tmp_path):
    header = {name: repr(section) for name, section in case.config.items()} | {"encoder": "__import__('os').getcwd()"}
    with pytest.raises(CheckpointError, match="header"):
        convert("flextok/tokenizer", official_file(case, tmp_path, header))


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("decoder", "module_dict", "dec_to_patches", "_target_"), "os.system", "os.system"),
        (("decoder", "module_dict", "dec_to_patches", "use_mup_readout"), True, "use_mup_readout"),
        (("encoder", "module_dict", "enc_posemb_module", "posemb_scaling"), "interpolate", "scaling 'interpolate'"),
        (("encoder", "module_dict", "enc_register_module", "n_max"), 15, "disagree on num_tokens: 15 and 16"),
        (("vae", "scaling_factor"), None, "scaling_factor"),
        (("encoder", "module_dict"), None, r"no encoder\.module_dict|not one of a FlexTok"),
    ],
)
def test_options_of_no_released_model_are_refused(case, path, value, message):
    config = json.loads(json.dumps(case.config))
    section = config
    for name in path[:-1]:
        section = section[name]
    section[path[-1]] = value
    with pytest.raises(CheckpointError, match=message):
        vistok.from_official("flextok/tokenizer", config, case.state)


def test_unknown_entries_of_the_decoder_are_ignored_with_a_warning(case, caplog):
    config = case.config | {"vae": case.config["vae"] | {"block_out_channels": [32, 32, 64, 64]}}
    state = case.state | {"decoder.module_dict.dec_repa_mlp.out_proj.bias": torch.zeros(3)}
    vistok.from_official("flextok/tokenizer", config, state)
    assert "1 unknown entries" in caplog.text

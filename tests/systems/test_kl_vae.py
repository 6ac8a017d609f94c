"""The KL autoencoder, its moments in a token cache, and generators trained on them."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import Tensor

import vistok
from vistok.checkpoints import CheckpointError, convert, rename
from vistok.data import TokenBatches, TokenCache, TokenCacheError, open_source
from vistok.data.config import DataConfig
from vistok.data.tokens import sample_moments
from vistok.draws import Keys
from vistok.quantizers.gaussian import gaussian_kl
from vistok.tokenizers.kl_vae import KLVAE
from vistok.train import train
from vistok.train.monitor import read_metrics
from vistok.train.tokenize import tokenize

SIZES = {
    "image_size": 16,
    "block_out_channels": (8, 8, 16),
    "layers_per_block": 1,
    "latent_channels": 4,
    "encoder_attention": (2,),
    "norm_groups": 4,
}


pytestmark = pytest.mark.usefixtures("one_thread")


def tiny(**arguments) -> KLVAE:
    torch.manual_seed(0)
    return KLVAE(**SIZES | arguments).eval()


def pixels(count: int = 3, channels: int = 3, size: tuple[int, int] = (16, 16)) -> Tensor:
    return Keys.range(0, count).uniform("pixels", channels, *size) * 2 - 1


# ---------------------------------------------------------------------------------------------------------------------
# The model


@torch.no_grad()
def test_encoding_is_the_mode_or_a_sample_of_the_posterior():
    model = tiny(latent_mean=(0.1, 0.2, 0.3, 0.4), latent_scale=(2.0, 3.0, 4.0, 5.0))
    mean, log_variance = model.moments(pixels())
    scale, shift = torch.tensor([2.0, 3.0, 4.0, 5.0]), torch.tensor([0.1, 0.2, 0.3, 0.4])
    assert model.spec.grid == (4, 4)
    torch.testing.assert_close(model.encode(pixels()), (mean - shift) * scale)
    draws = model.training_draws(Keys.range(0, 3))
    expected = (mean + (log_variance / 2).exp() * draws["posterior"] - shift) * scale
    sample = model.encode(pixels(), draws=draws)
    torch.testing.assert_close(sample, expected)
    torch.testing.assert_close(sample_moments(model.encode_moments(pixels()), draws["posterior"]), sample)
    torch.testing.assert_close(model.decode(model.encode(pixels())), model.decode_latents(mean, (4, 4)))


@torch.no_grad()
def test_standardised_latents_have_mean_0_and_deviation_1():
    model = tiny()
    model.vae.quant_conv.weight[:4] *= 20
    images = pixels(64)
    before = model.reconstruct(images)
    model.standardise(images)
    latents = model.encode(images, draws=model.training_draws(Keys.range(1, 64))).flatten(0, 1)
    torch.testing.assert_close(latents.mean(0), torch.zeros(4), atol=0.1, rtol=0)
    torch.testing.assert_close(latents.std(0), torch.ones(4), atol=0.1, rtol=0)
    torch.testing.assert_close(model.reconstruct(images), before, atol=1e-4, rtol=1e-4)


def test_statistics_are_saved_in_the_config(tmp_path):
    model = tiny()
    model.standardise(pixels())
    model.save_pretrained(tmp_path / "model")
    loaded = vistok.load(tmp_path / "model")
    assert loaded.fingerprint() == model.fingerprint()
    assert torch.equal(loaded.encode(pixels()), model.encode(pixels()))
    other = tiny()
    assert other.fingerprint() != model.fingerprint()


def test_kl_is_that_of_torch():
    mean, log_variance = torch.randn(2, 50, generator=torch.Generator().manual_seed(0))
    expected = torch.distributions.kl_divergence(
        torch.distributions.Normal(mean, (log_variance / 2).exp()), torch.distributions.Normal(0.0, 1.0)
    )
    torch.testing.assert_close(gaussian_kl(mean, log_variance), expected)


def test_losses_are_those_announced_and_all_parameters_learn():
    model = tiny()
    output = model(pixels(), draws=model.training_draws(Keys.range(0, 3)))
    assert set(output.losses) == set(model.loss_terms) == {"kl"}
    assert output.losses["kl"].shape == (3,)
    (output.reconstruction.square().mean() + output.losses["kl"].mean()).backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert model.last_layer.grad.abs().sum() > 0


def test_other_image_sizes_and_grey():
    model = tiny(in_channels=1)
    tokens = model.encode(pixels(channels=1, size=(8, 24)))
    assert tokens.shape == (3, 12, 4)
    assert model.decode(tokens, grid=(2, 6)).shape == (3, 1, 8, 24)
    with pytest.raises(ValueError, match=r"grid of 4x4 has 16 tokens, got 12; pass grid=\(h, w\)"):
        model.decode(tokens)


def official(model: KLVAE) -> dict[str, Tensor]:
    """The weights of a tiny model under latent diffusion's names."""
    blocks = []
    for level in range(3):
        for ours, theirs in (
            (rf"vae\.encoder\.down_blocks\.{level}", f"encoder.down.{level}"),
            (rf"vae\.decoder\.up_blocks\.{2 - level}", f"decoder.up.{level}"),
        ):
            blocks += [
                (rf"{ours}\.resnets\.(\d)\.conv_shortcut\.(\w+)", rf"{theirs}.block.\1.nin_shortcut.\2"),
                (rf"{ours}\.resnets\.(\d)\.(\w+)\.(\w+)", rf"{theirs}.block.\1.\2.\3"),
                (rf"{ours}\.attentions\.(\d)\.group_norm\.(\w+)", rf"{theirs}.attn.\1.norm.\2"),
                (rf"{ours}\.attentions\.(\d)\.to_([qkv])\.(\w+)", rf"{theirs}.attn.\1.\2.\3"),
                (rf"{ours}\.attentions\.(\d)\.to_out\.0\.(\w+)", rf"{theirs}.attn.\1.proj_out.\2"),
                (rf"{ours}\.(down|up)samplers\.0\.conv\.(\w+)", rf"{theirs}.\1sample.conv.\2"),
            ]
    middle = r"vae\.(encoder|decoder)\.mid_block"
    rules = [
        *blocks,
        (rf"{middle}\.resnets\.0\.(.*)", r"\1.mid.block_1.\2"),
        (rf"{middle}\.resnets\.1\.(.*)", r"\1.mid.block_2.\2"),
        (rf"{middle}\.attentions\.0\.group_norm\.(\w+)", r"\1.mid.attn_1.norm.\2"),
        (rf"{middle}\.attentions\.0\.to_([qkv])\.(\w+)", r"\1.mid.attn_1.\2.\3"),
        (rf"{middle}\.attentions\.0\.to_out\.0\.(\w+)", r"\1.mid.attn_1.proj_out.\2"),
        (r"vae\.(encoder|decoder)\.conv_norm_out\.(\w+)", r"\1.norm_out.\2"),
        (r"vae\.(.*)", r"\1"),
    ]
    state = rename(model.state_dict(), rules)
    pointwise = (".q.weight", ".k.weight", ".v.weight", ".proj_out.weight")
    return {key: t[:, :, None, None] if key.endswith(pointwise) else t for key, t in state.items()}


def test_latent_diffusion_names_with_attention_anywhere():
    sizes = {"block_out_channels": (32, 32, 64), "norm_groups": 32, "image_size": 256}
    model = tiny(**sizes, encoder_attention=(1, 2), decoder_attention=(0,), latent_scale=0.2325)
    config = {"embed_dim": 4, "ch_mult": [1, 1, 2], "ch": 32, "num_res_blocks": 1}
    assert KLVAE.from_official(config, official(model)).fingerprint() == model.fingerprint()


def save_diffusers(model: KLVAE, folder, **changes) -> None:
    model.vae.register_to_config(**changes)
    model.vae.save_pretrained(folder)


@pytest.mark.parametrize("arguments", [{}, {"decoder_attention": (0,), "use_quant_conv": False}])
def test_a_folder_of_diffusers(tmp_path, arguments):
    model = tiny(**arguments)
    save_diffusers(model, tmp_path / "vae", scaling_factor=0.5, shift_factor=0.25)
    loaded = KLVAE.from_diffusers(tmp_path / "vae", image_size=16)
    with torch.no_grad():
        torch.testing.assert_close(loaded.encode(pixels()), (model.encode(pixels()) - 0.25) * 0.5)
        torch.testing.assert_close(loaded.reconstruct(pixels()), model.reconstruct(pixels()))
    converted = convert("kl_vae/tokenizer", tmp_path / "vae" / "diffusion_pytorch_model.safetensors")
    assert {**converted.config, "image_size": 16} == loaded.config


def test_statistics_per_channel_and_old_attention_names_of_diffusers(tmp_path):
    model = tiny()
    save_diffusers(model, tmp_path / "vae", latents_mean=[1, 2, 3, 4], latents_std=[2, 2, 4, 4], scaling_factor=1.0)
    loaded = KLVAE.from_diffusers(tmp_path / "vae", image_size=16)
    assert loaded.gaussian.mean.tolist() == [1, 2, 3, 4]
    assert loaded.gaussian.scale.tolist() == [0.5, 0.5, 0.25, 0.25]
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = {key.removeprefix("vae."): t for key, t in model.state_dict().items()}
    for new, name in old.items():
        state = {key.replace(f".{new}.", f".{name}."): t for key, t in state.items()}
    config = json.loads((tmp_path / "vae" / "config.json").read_text())
    assert KLVAE.from_official(config, state).config["latent_channels"] == 4


def test_other_folders_are_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    with pytest.raises(CheckpointError, match="holds a UNet2DModel, not a diffusers AutoencoderKL"):
        KLVAE.from_diffusers(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(CheckpointError, match="expected a folder saved by diffusers"):
        KLVAE.from_diffusers(tmp_path)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: tiny(image_size=18), "multiples of 4, got 18x18"),
        (lambda: tiny(block_out_channels=(6, 8)), "6 channels cannot be split into 4 groups"),
        (lambda: tiny(encoder_attention=(3,)), r"levels \(3,\), but there are levels 0..2"),
        (lambda: tiny(latent_scale=(1.0, 2.0)), "latent_scale must be one number or 4"),
        (lambda: tiny().encode(torch.zeros(1, 1, 16, 16)), "reads 3 channels, got 1"),
        (lambda: tiny().decode(torch.zeros(1, 16, 3)), r"\(B, n, 4\).*another tokenizer"),
        (lambda: tiny().decode(torch.zeros(1, 16, dtype=torch.int64)), "latents must be float"),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# ---------------------------------------------------------------------------------------------------------------------
# From images to samples

DATA = {"source": "digits", "image_size": 16, "channels": 1, "batch_size": 16}
TRAINING = {"log_every": 1, "image_every": 2, "save_every": 2}


@pytest.fixture(scope="module")
def vae_run(tmp_path_factory):
    """Two steps of a GAN-trained KL autoencoder on digits."""
    model = {key: list(v) if isinstance(v, tuple) else v for key, v in SIZES.items() if key != "image_size"}
    config = {
        "task": "tokenizer",
        "output_dir": str(tmp_path_factory.mktemp("runs") / "vae"),
        "model": {"name": "kl_vae", **model},
        "losses": {
            "l1": 1.0,
            "kl": 1e-6,
            "gan": {
                "weight": 0.5,
                "balance": "adaptive",
                "discriminator": {"name": "patchgan", "width": 4, "num_layers": 1},
                "start_step": 1,
            },
        },
        "data": DATA,
        "training": {"max_steps": 2, "ema_decay": 0.5, **TRAINING},
    }
    return train(config)


@pytest.fixture(scope="module")
def cache(vae_run, tmp_path_factory) -> TokenCache:
    tokenizer = vistok.load(vae_run / "tokenizer")
    data = DataConfig(**DATA | {"limit": 40})
    return tokenize(tokenizer, data, tmp_path_factory.mktemp("tokens") / "digits", augmentation="flip")


def test_the_trained_autoencoder_is_standardised(vae_run):
    row = read_metrics(vae_run / "metrics.jsonl")[-1]
    assert {"l1", "kl", "g_loss", "psnr"} <= set(row)
    tokenizer = vistok.load(vae_run / "tokenizer")
    assert len(tokenizer.config["latent_scale"]) == 4


def test_moments_are_cached_with_the_mirror_image_and_sampled_at_load(vae_run, cache):
    from vistok.train.tasks.images import example_batch

    tokenizer = vistok.load(vae_run / "tokenizer")
    assert cache.content == "moments"
    assert cache.views == 2
    data = DataConfig(**DATA | {"limit": 40})
    images = example_batch(open_source(data), data, 40).pixels
    with torch.no_grad():
        for view, seen in enumerate((images, images.flip(-1))):
            moments, _ = cache.batch(np.arange(40), np.full(40, view))
            torch.testing.assert_close(moments, tokenizer.encode_moments(seen), atol=1e-4, rtol=1e-4)
    batches = TokenBatches(cache, seed=3)
    first, again, later = (batches.load(np.arange(40), epoch)[0].tokens for epoch in (0, 0, 1))
    assert first.shape == (40, 16, 4)
    assert torch.equal(first, again)
    assert not (first == later).any()
    few = batches.load(np.array([5, 2]), 0)[0].tokens
    assert torch.equal(few, first[[5, 2]])
    # Over many epochs, the samples of a latent scatter as its posterior does.
    samples = torch.stack([batches.load(np.array([0]), epoch)[0].tokens[0] for epoch in range(400)])
    moments = torch.stack([cache.batch([0], [view])[0][0] for view in range(2)])
    mean, variance = moments[..., :4], moments[..., 4:].exp()
    spread = (variance.mean(0) + mean.var(0, unbiased=False)).sqrt()
    torch.testing.assert_close(samples.mean(0), mean.mean(0), atol=0.3, rtol=0)
    torch.testing.assert_close(samples.std(0), spread, atol=0.25, rtol=0)


GENERATORS = {
    "xar": {"num_encoder_layers": 1, "num_decoder_layers": 1, "layout": {"entity": "cell", "size": 2}},
    "mar": {"num_encoder_layers": 1, "num_decoder_layers": 1, "num_head_layers": 1, "head_dim": 16, "buffer_size": 2},
}
SAMPLING = {"xar": {"num_steps": 3, "guidance_scale": 2.0}, "mar": {"num_iter": 2, "num_steps": 4}}


def generator_config(name: str, cache: TokenCache, folder, **training) -> dict:
    return {
        "task": "generator",
        "output_dir": str(folder),
        "tokens": str(cache.folder),
        "model": {"name": name, "dim": 16, "num_heads": 2, **GENERATORS[name]},
        "training": {"max_steps": 2, "batch_size": 8, **TRAINING, **training},
        "sampling": SAMPLING[name],
    }


@pytest.mark.parametrize("name", GENERATORS)
def test_generators_train_on_the_cache_and_sample(name, cache, tmp_path):
    folder = train(generator_config(name, cache, tmp_path / "run"))
    assert [row["step"] for row in read_metrics(folder / "metrics.jsonl")] == [1, 2]
    assert (folder / "images" / "step-0000002.png").is_file()
    pipe = vistok.pipeline(folder)
    out = pipe([3, 7], num_images_per_label=2, seed=1)
    assert out.labels == [3, 3, 7, 7]
    assert out.tokens.shape == (4, 16, 4)
    alone = pipe([3, 7], num_images_per_label=2, seed=1, batch_size=1)
    torch.testing.assert_close(alone.pixels, out.pixels, atol=1e-3, rtol=1e-3)
    *_, last = pipe.stream([3, 3], seed=1)
    torch.testing.assert_close(last.tokens, out.tokens[:2], atol=1e-4, rtol=1e-4)


def test_a_cache_of_another_autoencoder_is_refused(cache, tmp_path):
    with pytest.raises(TokenCacheError, match="made by another tokenizer"):
        cache.check_tokenizer(tiny(in_channels=1).fingerprint())

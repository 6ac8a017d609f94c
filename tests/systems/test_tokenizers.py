"""Tokenizers: the contract that all share, and the options of each."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tiny_models import VIT, names, official_vit_config, pixels, tiny

from vistok.checkpoints import rename
from vistok.nn.attention import Attention
from vistok.nn.positions import sincos_2d
from vistok.quantizers import ResidualQuantizer, VectorQuantizer
from vistok.tokenizers.llamagen_vq import LlamaGenVQ
from vistok.tokenizers.vit_vqgan import ViTVQGAN

TOKENIZERS = names("tokenizer")
VQGANS = ["vit_vqgan", "llamagen_vq"]
"""Tokenizers of one kind: a raster of ids of a learned codebook, decoded in one pass."""

# ---------------------------------------------------------------------------------------------------------------------
# Contracts


@pytest.mark.parametrize("name", TOKENIZERS)
def test_encode_gives_the_tokens_that_spec_promises(name):
    model = tiny(name)
    tokens = model.encode(pixels(model, seed=1))
    if model.spec.discrete:
        assert tokens.shape == (3, model.spec.length)
        assert model.spec.check_ids(tokens) is tokens
    else:
        assert tokens.shape == (3, model.spec.length, model.spec.dim)
    assert len(tokens.unique()) > 1
    assert torch.equal(model.encode(pixels(model, seed=1)), tokens)


@pytest.mark.parametrize("name", VQGANS)
def test_reconstruction_is_the_decoded_encoding(name):
    model = tiny(name)
    images = pixels(model)
    output = model(images)
    assert torch.equal(output.tokens, model.encode(images))
    torch.testing.assert_close(output.reconstruction, model.decode(output.tokens))
    torch.testing.assert_close(model.reconstruct(images), output.reconstruction.clamp(-1, 1))


@pytest.mark.parametrize("name", TOKENIZERS)
def test_an_image_encodes_alike_in_any_batch(name):
    model = tiny(name)
    images = pixels(model, batch=4)
    alone = torch.cat([model.encode(image[None]) for image in images])
    torch.testing.assert_close(model.encode(images), alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", VQGANS)
@pytest.mark.parametrize("arguments", [{}, {"entropy_temperature": 0.01}])
def test_losses_are_those_announced_and_all_parameters_learn(name, arguments):
    model = tiny(name, **arguments)
    output = model(pixels(model))
    assert set(output.losses) == set(model.loss_terms)
    assert all(output.losses[term].shape == (3, model.spec.length) for term in ("codebook", "commitment"))
    loss = output.reconstruction.square().mean() + sum(term.mean() for term in output.losses.values())
    loss.backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert not [name for name, p in trained.items() if p.grad is None or not p.grad.isfinite().all()]
    assert model.last_layer.grad.abs().sum() > 0
    assert any(p is model.last_layer for p in trained.values())


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x[:, :1], "reads 3 channels, got 1; repeat the grey channel"),
        (lambda x: x[0], "pixels must be"),
        (lambda x: ((x + 1) * 127.5).to(torch.uint8), "divide uint8 by 127.5"),
        (lambda x: x[..., :-1], "resize"),
    ],
)
def test_wrong_pixels_are_refused_with_the_remedy(name, change, message):
    model = tiny(name)
    with pytest.raises(ValueError, match=message):
        model.encode(change(pixels(model)))


@pytest.mark.parametrize("name", VQGANS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda ids: ids + 32, "out of range: this codebook has ids 0..31"),
        (lambda ids: ids - 32, "out of range"),
        (lambda ids: ids.float(), "must be integers"),
        (lambda ids: ids[:, 1:], "got 15"),
        (lambda ids: ids[..., None], "must have shape"),
    ],
)
def test_wrong_tokens_are_refused(name, change, message):
    model = tiny(name)
    ids = model.encode(pixels(model))
    with pytest.raises(ValueError, match=message):
        model.decode(change(ids))


@pytest.mark.parametrize("name", VQGANS)
def test_grey_images(name):
    model = tiny(name, in_channels=1)
    assert model.reconstruct(pixels(model)).shape == (3, 1, 16, 16)
    with pytest.raises(ValueError, match="convert the images to grey"):
        model.encode(torch.zeros(1, 3, 16, 16))


# ---------------------------------------------------------------------------------------------------------------------
# ViT-VQGAN


def test_non_square_images_and_patches():
    model = tiny("vit_vqgan", image_size=(8, 24), patch_size=(4, 8))
    assert model.spec.grid == (2, 3)
    assert model.reconstruct(pixels(model)).shape == (3, 3, 8, 24)
    with pytest.raises(ValueError, match="8x24 only, got 24x8"):
        model.encode(torch.zeros(1, 3, 24, 8))


def test_positions_encode_the_column_then_the_row():
    table = sincos_2d((2, 3), 16).view(2, 3, 16)
    assert torch.equal(table[0, :, :8], table[1, :, :8])  # first half: the column
    assert torch.equal(table[:, 0, 8:], table[:, 2, 8:])  # second half: the row
    assert len(table.view(6, 16).unique(dim=0)) == 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image_size": 18}, "18x18 is not a multiple of patch_size"),
        ({"residual_depth": 0}, "at least 1, got 0"),
        ({"encoder": {"dim": 30, "num_layers": 1, "num_heads": 1, "mlp_dim": 8}}, "divisible by 4, got 30"),
    ],
)
def test_vit_that_cannot_be_built_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny("vit_vqgan", **arguments)


def official_vit(model: ViTVQGAN) -> dict[str, torch.Tensor]:
    """The model's weights under their official names."""
    back = [
        (r"(\w+)\.blocks\.(\d+)\.norm1\.(\w+)", r"\1.transformer.layers.\2.0.norm.\3"),
        (r"(\w+)\.blocks\.(\d+)\.attn\.qkv\.(\w+)", r"\1.transformer.layers.\2.0.fn.to_qkv.\3"),
        (r"(\w+)\.blocks\.(\d+)\.attn\.out\.(\w+)", r"\1.transformer.layers.\2.0.fn.to_out.\3"),
        (r"(\w+)\.blocks\.(\d+)\.norm2\.(\w+)", r"\1.transformer.layers.\2.1.norm.\3"),
        (r"(\w+)\.blocks\.(\d+)\.mlp\.up\.(\w+)", r"\1.transformer.layers.\2.1.fn.net.0.\3"),
        (r"(\w+)\.blocks\.(\d+)\.mlp\.down\.(\w+)", r"\1.transformer.layers.\2.1.fn.net.2.\3"),
        (r"(\w+)\.norm\.(\w+)", r"\1.transformer.norm.\2"),
        (r"to_patches\.(\w+)", r"encoder.to_patch_embedding.0.\1"),
        (r"to_pixels\.(\w+)", r"decoder.to_pixel.1.\1"),
        (r"encoder\.positions", "encoder.en_pos_embedding"),
        (r"decoder\.positions", "decoder.de_pos_embedding"),
    ]
    return rename(model.state_dict(), back)


def official_config(size: dict, **quantizer) -> dict:
    quantizer = {"embed_dim": 4, "n_embed": 32} | quantizer
    vit = official_vit_config(size)
    return {"image_size": 16, "patch_size": 4, "encoder": vit, "decoder": vit, "quantizer": quantizer}


def test_one_head_as_wide_as_the_model_has_no_output_projection():
    size = {"dim": 64, "num_layers": 2, "num_heads": 1, "mlp_dim": 16}
    model = tiny("vit_vqgan", encoder=size, decoder=size)
    state = official_vit(model)
    assert not [key for key in state if "to_out" in key]
    assert ViTVQGAN.from_official(official_config(size), state).fingerprint() == model.fingerprint()


def test_attention_without_projection_is_attention_with_the_identity():
    with_projection = Attention(64, 1, head_dim=64, qkv_bias=False)
    without = Attention(64, 1, head_dim=64, qkv_bias=False, project=False)
    without.qkv.load_state_dict(with_projection.qkv.state_dict())
    torch.nn.init.eye_(with_projection.out.weight)
    torch.nn.init.zeros_(with_projection.out.bias)
    x = torch.randn(2, 5, 64)
    torch.testing.assert_close(without(x), with_projection(x))


def test_official_quantizer_without_norm():
    model = ViTVQGAN.from_official(official_config(VIT, use_norm=False), official_vit(tiny("vit_vqgan")))
    latents = model.latents(pixels(model))
    nearest = torch.cdist(latents, model.quantizer.embedding.weight).argmin(-1)
    assert torch.equal(model.encode(pixels(model)), nearest)


def test_official_quantizer_is_residual_only_if_asked():
    state = official_vit(tiny("vit_vqgan"))
    assert ViTVQGAN.from_official(official_config(VIT, num_quantizers=3), state).spec.depth == 1
    model = ViTVQGAN.from_official(official_config(VIT, num_quantizers=3, use_residual=True), state)
    ids = model.encode(pixels(model))
    assert ids.shape == (3, 16, 3)
    torch.testing.assert_close(model.decode(ids), model(pixels(model)).reconstruction)
    with pytest.raises(ValueError, match=r"\(B, n, 3\)"):
        model.decode(ids[..., :2])


# ---------------------------------------------------------------------------------------------------------------------
# LlamaGen's tokenizer

OFFICIAL_LLAMAGEN = [
    (r"(\w+)\.levels\.(\d+)\.blocks\.(\d+)\.shortcut\.(\w+)", r"\1.conv_blocks.\2.res.\3.nin_shortcut.\4"),
    (r"(\w+)\.levels\.(\d+)\.blocks\.(\d+)\.(\w+)\.(\w+)", r"\1.conv_blocks.\2.res.\3.\4.\5"),
    (r"(\w+)\.levels\.(\d+)\.attentions\.(\d+)\.out\.(\w+)", r"\1.conv_blocks.\2.attn.\3.proj_out.\4"),
    (r"(\w+)\.levels\.(\d+)\.attentions\.(\d+)\.(\w+)\.(\w+)", r"\1.conv_blocks.\2.attn.\3.\4.\5"),
    (r"encoder\.levels\.(\d+)\.resample\.conv\.(\w+)", r"encoder.conv_blocks.\1.downsample.conv.\2"),
    (r"decoder\.levels\.(\d+)\.resample\.conv\.(\w+)", r"decoder.conv_blocks.\1.upsample.conv.\2"),
    (r"(\w+)\.middle\.1\.out\.(\w+)", r"\1.mid.1.proj_out.\2"),
    (r"(\w+)\.middle\.(\d)\.(\w+)\.(\w+)", r"\1.mid.\2.\3.\4"),
    (r"pre_quant\.(\w+)", r"quant_conv.\1"),
    (r"post_quant\.(\w+)", r"post_quant_conv.\1"),
    (r"quantizer\.embedding\.weight", r"quantize.embedding.weight"),
]


@pytest.mark.parametrize(("mult", "stride"), [((1, 1, 2, 2, 4), 16), ((1, 2, 2, 4), 8), ((1,), 1)])
def test_stride_follows_from_the_levels(mult, stride):
    model = tiny("llamagen_vq", image_size=32, encoder_channel_mult=mult, decoder_channel_mult=mult)
    assert model.stride == stride
    assert model.spec.grid == (32 // stride, 32 // stride)
    assert model.reconstruct(pixels(model, batch=1)).shape == (1, 3, 32, 32)


@settings(max_examples=10)
@given(st.integers(1, 6), st.integers(1, 6))
def test_any_multiple_of_the_stride_encodes(h, w):
    model = tiny("llamagen_vq")
    images = torch.rand(1, 3, 4 * h, 4 * w) * 2 - 1
    assert model.spec_for((3, 4 * h, 4 * w)).grid == (h, w)
    output = model(images)
    assert output.tokens.shape == (1, h * w)
    torch.testing.assert_close(model.decode(output.tokens, grid=(h, w)), output.reconstruction)
    assert output.reconstruction.shape == images.shape


def test_tokens_of_another_image_size_need_their_grid():
    model = tiny("llamagen_vq")
    ids = model.encode(torch.zeros(1, 3, 8, 24))
    with pytest.raises(ValueError, match=r"grid of 4x4 has 16 tokens, got 12; pass grid=\(h, w\)"):
        model.decode(ids)
    assert model.decode(ids, grid=(2, 6)).shape == (1, 3, 8, 24)
    with pytest.raises(ValueError, match="grid of 2x5 has 10"):
        model.decode(ids, grid=(2, 5))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image_size": 18}, "multiples of 4, got 18x18"),
        ({"decoder_channel_mult": (1, 2)}, "3 levels and the decoder 2"),
        ({"channels": 6}, "6 channels cannot be split into 4 groups"),
        ({"norm_groups": 32}, "8 channels cannot be split into 32 groups"),
        ({"entropy_temperature": 0.0}, "must be positive"),
    ],
)
def test_vqgan_that_cannot_be_built_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny("llamagen_vq", **arguments)


def test_official_options_of_the_quantizer():
    config = {"ch": 32, "z_channels": 8, "codebook_size": 16, "encoder_ch_mult": [1, 1], "decoder_ch_mult": [1, 1]}
    own = LlamaGenVQ(
        channels=32, z_channels=8, codebook_size=16, encoder_channel_mult=(1, 1), decoder_channel_mult=(1, 1)
    )
    official = rename(own.state_dict(), OFFICIAL_LLAMAGEN)
    raw = LlamaGenVQ.from_official(
        config | {"codebook_l2_norm": False, "entropy_loss_ratio": 0.1, "dropout_p": 0.2}, official
    )
    assert not raw.quantizer.normalize
    assert raw.loss_terms == ("codebook", "commitment", "entropy")
    assert raw.config["dropout"] == 0.2
    plain = LlamaGenVQ.from_official(config, official)
    assert plain.quantizer.normalize
    assert plain.loss_terms == ("codebook", "commitment")


# ---------------------------------------------------------------------------------------------------------------------
# Quantizers


@pytest.mark.parametrize("normalize", [True, False])
def test_the_nearest_code_is_chosen(normalize):
    torch.manual_seed(0)
    quantizer, latents = VectorQuantizer(20, 4, normalize=normalize), torch.randn(2, 7, 4) * 2
    norm = (lambda x: x / x.norm(dim=-1, keepdim=True)) if normalize else (lambda x: x)
    codes = norm(quantizer.embedding.weight)
    expected = torch.cdist(norm(latents), codes).argmin(-1)
    output = quantizer(latents)
    assert torch.equal(output.ids, expected)
    torch.testing.assert_close(output.quantized, codes[expected])
    torch.testing.assert_close(quantizer.ids_to_latents(expected), codes[expected])
    assert torch.equal(quantizer.neighbours(latents, 3)[..., 0], expected)
    assert output.usage().sum() == 14


def test_first_of_equal_codes_wins():
    quantizer = VectorQuantizer(3, 2)
    with torch.no_grad():
        quantizer.embedding.weight.copy_(torch.tensor([[0.0, 1.0], [1.0, 0.0], [2.0, 0.0]]))
    assert quantizer.encode(torch.tensor([[[3.0, 0.0]]])).item() == 1


def test_what_carries_the_straight_through_gradient():
    latents, weights = torch.randn(1, 5, 4, requires_grad=True), torch.randn(1, 5, 4)

    def gradient(kind):
        output = VectorQuantizer(8, 4, gradient=kind)(latents)
        return torch.autograd.grad((output.quantized * weights).sum(), latents)[0]

    torch.testing.assert_close(gradient("raw"), weights)
    # Through the normalisation, the part along the latent vanishes and the rest shrinks with its length.
    unit = torch.nn.functional.normalize(latents.detach(), dim=-1)
    across = weights - (weights * unit).sum(-1, keepdim=True) * unit
    torch.testing.assert_close(gradient("normalised"), across / latents.detach().norm(dim=-1, keepdim=True))


def test_codebook_and_commitment_pull_one_side_each():
    quantizer, latents = VectorQuantizer(8, 4), torch.randn(1, 5, 4, requires_grad=True)
    losses = quantizer(latents).losses
    torch.testing.assert_close(losses["codebook"], losses["commitment"])
    sides = (latents, quantizer.embedding.weight)
    codebook = torch.autograd.grad(losses["codebook"].sum(), sides, retain_graph=True, allow_unused=True)
    commitment = torch.autograd.grad(losses["commitment"].sum(), sides, allow_unused=True)
    assert codebook[0] is None
    assert codebook[1].abs().sum() > 0
    assert commitment[0].abs().sum() > 0
    assert commitment[1] is None


def test_entropy_term_by_its_definition():
    torch.manual_seed(0)
    quantizer, latents = VectorQuantizer(6, 4, entropy_temperature=0.5), torch.randn(2, 3, 4, requires_grad=True)
    probabilities = (-quantizer.distances(latents).view(6, 6) / 0.5).softmax(-1)
    each = torch.distributions.Categorical(probabilities).entropy().mean()
    together = torch.distributions.Categorical(probabilities.mean(0)).entropy()
    entropy = quantizer(latents).losses["entropy"]
    assert entropy.item() == pytest.approx((each - together).item(), abs=1e-4)
    entropy.backward()
    assert latents.grad.abs().sum() > 0


def test_uniform_codebook_starts_on_the_sphere_only_if_normalised():
    assert VectorQuantizer(50, 4, init="uniform").embedding.weight.norm(dim=-1).allclose(torch.ones(50))
    assert VectorQuantizer(50, 4, init="uniform", normalize=False).embedding.weight.abs().max() <= 1 / 50


@settings(max_examples=20)
@given(st.integers(1, 4), st.integers(0, 100))
def test_fewer_residual_levels_are_a_prefix(depth, seed):
    generator = torch.Generator().manual_seed(seed)
    shared = VectorQuantizer(16, 3)
    latents = torch.randn(2, 5, 3, generator=generator) * 3
    ids = ResidualQuantizer(shared, 4).encode(latents)
    shallow = ResidualQuantizer(shared, depth)
    assert torch.equal(shallow.encode(latents), ids[..., :depth])
    coarse = sum(shared.ids_to_latents(ids[..., level]) for level in range(depth))
    torch.testing.assert_close(shallow.ids_to_latents(ids[..., :depth]), coarse)
    torch.testing.assert_close(shallow(latents).quantized, coarse)


def test_residual_commitment_does_not_reach_the_latents():
    quantizer, latents = ResidualQuantizer(VectorQuantizer(16, 3), 3), torch.randn(1, 4, 3, requires_grad=True)
    output = quantizer(latents)
    assert torch.autograd.grad(output.quantized.sum(), latents, retain_graph=True)[0].eq(1).all()
    loss = output.losses["codebook"].mean() + output.losses["commitment"].mean()
    assert torch.autograd.grad(loss, latents, allow_unused=True)[0] is None

"""Quantizers: nearest codes, gradients, residual levels, restart of dead codes."""

from __future__ import annotations

from inspect import signature

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tiny_models import names, pixels, tiny
from torch.utils._python_dispatch import TorchDispatchMode

import vistok
from vistok.checkpoints import registry
from vistok.draws import Keys
from vistok.losses import BitEntropyLoss, EntropyLoss
from vistok.quantizers import BSQ, LFQ, IndexQuantizer, ResidualQuantizer, VectorQuantizer
from vistok.quantizers.bsq import MultiScaleBSQ
from vistok.quantizers.perturbation import Perturbation, perturbation_draws
from vistok.quantizers.vq import rotate_to


def latents(seed=0, n=64, dim=4):
    return torch.randn(2, n, dim, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), normalize=st.booleans(), dim=st.integers(1, 6))
def test_codes_come_back_as_themselves(seed, normalize, dim):
    torch.manual_seed(seed)
    quantizer = VectorQuantizer(16, dim, normalize=normalize)
    if normalize and dim == 1:
        return  # all one-dimensional unit vectors are +-1: ids are not unique
    ids = torch.arange(16)[None]
    codes = quantizer.ids_to_latents(ids).detach()
    others = torch.cdist(codes, codes) + torch.eye(16) * 9
    apart = others.amin(-1) > 1e-2  # distances are rounded: of two codes that nearly coincide either may be chosen
    assert torch.equal(quantizer.encode(codes)[apart], ids[apart])
    assert torch.equal(quantizer.neighbours(codes, 3)[..., 0][apart], ids[apart])
    quantized = quantizer(codes).quantized
    assert torch.allclose(quantized[apart], codes[apart], atol=1e-6)
    assert torch.allclose(quantized, codes, atol=1e-2)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("depth", [1, 3])
def test_ids_under_autocast_are_those_of_float32(normalize, depth):
    torch.manual_seed(0)
    quantizer = VectorQuantizer(512, 8, normalize=normalize)
    quantizer = quantizer if depth == 1 else ResidualQuantizer(quantizer, depth)
    z = latents(n=500, dim=8)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = quantizer(z)
    assert torch.equal(mixed.ids, quantizer(z).ids)
    assert all(term.dtype == torch.float32 for term in mixed.losses.values())


@pytest.mark.parametrize("gradient", ["raw", "normalised"])
def test_straight_through_gradient(gradient):
    torch.manual_seed(0)
    quantizer = VectorQuantizer(16, 4, gradient=gradient)
    z = latents().requires_grad_()
    weight = latents(seed=1)
    (quantizer(z).quantized * weight).sum().backward()
    carrier = latents().requires_grad_()
    through = carrier if gradient == "raw" else torch.nn.functional.normalize(carrier, dim=-1)
    (through * weight).sum().backward()
    assert torch.allclose(z.grad, carrier.grad, atol=1e-6)
    assert quantizer.embedding.weight.grad is None


def test_rotated_latents_are_the_codes_and_gradients_turn_with_them():
    """arXiv 2410.06424, section 4: what arrives at an angle to the code leaves at that angle to the latent."""
    torch.manual_seed(0)
    z, codes, arriving = latents(n=16).requires_grad_(), latents(seed=1, n=16), latents(seed=2, n=16)
    quantized = rotate_to(z, codes)
    (quantized * arriving).sum().backward()
    torch.testing.assert_close(quantized.detach(), codes, atol=1e-4, rtol=1e-4)
    scale = codes.norm(dim=-1) / z.detach().norm(dim=-1)
    torch.testing.assert_close(z.grad.norm(dim=-1), scale * arriving.norm(dim=-1), atol=1e-4, rtol=1e-4)
    cosine = torch.nn.functional.cosine_similarity
    torch.testing.assert_close(
        cosine(z.grad, z.detach(), dim=-1), cosine(arriving, codes, dim=-1), atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("normalize", [True, False])
def test_rotation_gives_codes_no_gradient_and_works_in_evaluation(normalize):
    torch.manual_seed(0)
    quantizer = VectorQuantizer(16, 4, normalize=normalize, gradient="rotation").eval()
    residual = ResidualQuantizer(VectorQuantizer(16, 4, normalize=normalize, gradient="rotation"), 3)
    for module in (quantizer, residual):
        z = latents().requires_grad_()
        output = module(z)
        codes = module.ids_to_latents(output.ids)
        torch.testing.assert_close(output.quantized, codes, atol=1e-3, rtol=1e-3)
        straight = z + (codes - z).detach()
        weight = latents(seed=1)
        (rotated,) = torch.autograd.grad((output.quantized * weight).sum(), z, retain_graph=True)
        (plain,) = torch.autograd.grad((straight * weight).sum(), z)
        assert not torch.allclose(rotated, plain)
    assert quantizer.embedding.weight.grad is None


def test_opposite_latents_turn_without_nan():
    z = torch.tensor([[1.0, 0.0], [0.0, 2.0]], requires_grad=True)
    quantized = rotate_to(z, -z.detach())
    quantized.sum().backward()
    torch.testing.assert_close(quantized.detach(), -z.detach())
    assert z.grad.isfinite().all()


def test_an_unknown_gradient_is_named():
    with pytest.raises(ValueError, match="'straight'"):
        VectorQuantizer(16, 4, gradient="straight")


def test_more_residual_levels_come_closer():
    torch.manual_seed(0)
    quantizer = ResidualQuantizer(VectorQuantizer(64, 4, normalize=False), 4)
    with torch.no_grad():
        quantizer.quantizer.embedding.weight.mul_(0.5)
        quantizer.quantizer.embedding.weight[0] = 0  # a level that cannot help may do nothing
    z = latents()
    ids = quantizer.encode(z)
    errors = [(quantizer.ids_to_latents(ids[..., :n]) - z).square().mean() for n in range(1, 5)]
    assert errors == sorted(errors, reverse=True)
    assert torch.equal(quantizer(z).ids, ids)


def test_restart_revives_the_codebook():
    torch.manual_seed(0)
    # All latents lie in one corner, where almost no code of the initial codebook is nearest.
    z = latents() * 0.05 + torch.tensor([3.0, 1.0, 0.0, 0.0])
    collapsed, revived = (VectorQuantizer(64, 4, restart_after=n).train() for n in (0, 5))
    for _ in range(20):
        for quantizer in (collapsed, revived):
            quantizer(z)
            quantizer.after_backward()
    assert (collapsed(z).usage() > 0).sum() < 10
    assert (revived(z).usage() > 0).sum() > 30


def test_restart_leaves_codes_in_use_alone():
    torch.manual_seed(0)
    quantizer = VectorQuantizer(8, 4, normalize=False, restart_after=2).train()
    used = quantizer.encode(latents()).unique()
    before = quantizer.embedding.weight.detach().clone()
    for _ in range(5):
        quantizer(latents())
        quantizer.after_backward()
    assert torch.equal(quantizer.embedding.weight[used], before[used])


def test_dead_codes_move_onto_latents_once_gradients_are_there():
    torch.manual_seed(1)
    quantizer = VectorQuantizer(64, 4, restart_after=1).train()
    before = quantizer.embedding.weight.detach().clone()
    used = quantizer(latents()).ids.unique()
    assert torch.equal(quantizer.embedding.weight, before)  # which the backward pass still needs
    quantizer.after_backward()
    moved = (quantizer.embedding.weight != before).any(-1)
    assert not moved[used].any()
    assert moved.sum() == 64 - len(used)
    assert (quantizer.embedding.weight[moved, None] == latents().flatten(0, 1)).all(-1).any(1).all()
    after = quantizer.embedding.weight.detach().clone()
    quantizer.after_backward()
    assert torch.equal(quantizer.embedding.weight, after)


def test_restart_of_a_residual_quantizer_counts_steps_and_the_codes_of_all_levels():
    torch.manual_seed(0)
    shared = VectorQuantizer(64, 4, restart_after=2)
    residual, z = ResidualQuantizer(shared, 3).train(), latents(n=4)
    before, idle = shared.embedding.weight.detach().clone(), shared.restart.idle.clone()
    residual.encode(z)
    assert torch.equal(shared.restart.idle, idle)  # only a training step counts
    used = residual(z).ids.unique()
    assert (shared.restart.idle[used] == 0).all()
    assert shared.restart.idle.max() == 3
    residuals = torch.stack([rest for rest, _ in residual._levels(z)], -2).flatten(0, -2)
    shared.after_backward()
    moved = (shared.embedding.weight != before).any(-1)
    assert not moved[used].any()
    assert moved.sum() == 64 - len(used)
    chosen = (shared.embedding.weight[moved, None] == residuals).all(-1)
    assert chosen.any(1).all()
    assert len((chosen.int().argmax(1) % 3).unique()) == 3  # of all levels
    with pytest.raises(ValueError, match="cannot cluster"):
        ResidualQuantizer(VectorQuantizer(8, 4, clustering=True), 2)


def test_no_restart_in_evaluation():
    torch.manual_seed(0)
    quantizer = VectorQuantizer(64, 4, restart_after=1).eval()
    before = quantizer.embedding.weight.detach().clone()
    quantizer(latents())
    quantizer.after_backward()
    assert torch.equal(quantizer.embedding.weight, before)


def test_entropy_is_offered_only_if_asked_for():
    assert VectorQuantizer(8, 4).loss_terms == ("codebook", "commitment")
    quantizer = VectorQuantizer(8, 4, entropy_temperature=0.1)
    assert set(quantizer(latents()).losses) == set(quantizer.loss_terms) == {"codebook", "commitment", "entropy"}


# ---------------------------------------------------------------------------------------------------------------------
# Signs as codes


@settings(max_examples=25, deadline=None)
@given(bits=st.integers(1, 20), seed=st.integers(0, 1000))
def test_ids_of_signs_come_back_as_themselves(bits, seed):
    quantizer = LFQ(bits)
    ids = torch.randint(2**bits, (2, 5), generator=torch.Generator().manual_seed(seed))
    codes = quantizer.ids_to_latents(ids)
    assert codes.abs().eq(1).all()
    assert torch.equal(quantizer.encode(codes), ids)
    assert torch.equal(quantizer(0.3 * codes).ids, ids)
    assert torch.equal(codes[..., 0] > 0, ids % 2 == 1)  # the first channel is the lowest bit


def test_spherical_codes_are_those_of_a_single_grid():
    """The gradient is that of the normalisation."""
    z = latents(n=6, dim=4)[0].requires_grad_()
    output = BSQ(4)(z[None])
    grid = MultiScaleBSQ(4, [(1, 6)])
    other = grid(z.T[None, :, None])
    torch.testing.assert_close(output.quantized[0], other.quantized[0, :, 0].T)
    assert torch.equal(output.ids[0], (other.ids[0] * 2 ** torch.arange(4)).sum(-1))
    ours, theirs = (torch.autograd.grad(q.pow(3).sum(), z)[0] for q in (output.quantized, other.quantized))
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(output.quantized.norm(dim=-1), torch.ones(1, 6))


def test_the_entropy_of_spherical_codes_is_that_of_their_softmax():
    quantizer = BSQ(5, entropy_temperature=0.3)
    z = latents(n=50, dim=5)[0]
    codes = quantizer.ids_to_latents(torch.arange(32))
    p = (2 * torch.nn.functional.normalize(z, dim=-1) @ codes.T / 0.3).softmax(-1)
    position, shares = -(p * p.log()).sum(-1).mean(), p.mean(0)
    usage = -(shares * (shares + 1e-5).log()).sum()  # shifted as every entropy loss is
    torch.testing.assert_close(quantizer(z[None]).losses["entropy"], position - usage, atol=1e-5, rtol=1e-5)


def test_entropy_over_many_codes_makes_no_large_tensor():
    """At 2^18 codes and 8 images of 256 positions a table of all probabilities would be 2 GiB."""
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            nonlocal largest
            made = function(*arguments, **(options or {}))
            for tensor in made if isinstance(made, tuple | list) else (made,):
                if isinstance(tensor, torch.Tensor):
                    largest = max(largest, tensor.numel() * tensor.element_size())
            return made

    z = torch.randn(8, 256, 18, requires_grad=True)
    with Watch():
        LFQ(18)(z).losses["entropy"].backward()
    assert z.grad.isfinite().all()
    assert largest < 64 * 2**20


def test_a_latent_of_zero_is_negative():
    assert LFQ(3).encode(torch.tensor([0.0, -0.0, 1e-30])) == 4


def sign_distances(z):
    """Minus twice the products (..., K) of latents (..., d) and all sign vectors, in the order of their ids."""
    return -2 * z @ LFQ(z.shape[-1]).ids_to_latents(torch.arange(2 ** z.shape[-1])).to(z).T


@settings(max_examples=25, deadline=None)
@given(
    bits=st.integers(1, 10), scale=st.sampled_from([1e-3, 0.01, 0.1, 1.0]), weights=st.tuples(*[st.floats(0, 2)] * 2)
)
def test_the_entropy_of_bits_is_that_of_all_codes(bits, scale, weights):
    z = scale * latents(dim=bits)
    options = dict(zip(("position_weight", "usage_weight"), weights))
    found = []
    for loss, of in ((BitEntropyLoss, lambda x: x), (EntropyLoss, lambda x: sign_distances(x.double()))):
        x = z.clone().requires_grad_()
        value = loss(0.01, **options)(of(x))
        found.append((value.detach().float(), *torch.autograd.grad(value, x)))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)


def test_the_entropy_of_many_codes_takes_little_memory():
    z = latents(n=1024, dim=18).requires_grad_()  # as of 8 images of 256 tokens
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: sizes.append(t.untyped_storage().nbytes()) or t, lambda t: t
    ):
        BitEntropyLoss(0.01)(0.01 * z).backward()
    assert sum(sizes) < 64 * 2**20


@settings(max_examples=25, deadline=None)
@given(bits=st.integers(1, 7), k=st.integers(1, 9), seed=st.integers(0, 100))
def test_neighbours_of_signs_are_the_nearest_of_all_codes(bits, k, seed):
    z, k = latents(seed, n=4, dim=bits), min(k, 2**bits)
    nearest = LFQ(bits).neighbours(z, k)
    expected = sign_distances(z).topk(k, dim=-1, largest=False)
    torch.testing.assert_close(sign_distances(z).gather(-1, nearest), expected.values, rtol=1e-5, atol=1e-5)
    assert torch.equal(nearest[..., 0], LFQ(bits).encode(z))


@pytest.mark.parametrize("dim", [0, 63])
def test_bits_that_no_id_can_hold_are_refused(dim):
    with pytest.raises(ValueError, match=rf"1 to 62 bits, got dim {dim}"):
        LFQ(dim)


# ---------------------------------------------------------------------------------------------------------------------
# Gradients through the index


def test_the_index_hands_gradients_to_all_codes():
    torch.manual_seed(0)
    quantizer, z, weight = IndexQuantizer(16, 4), latents().requires_grad_(), latents(seed=1)
    output = quantizer(z)
    (output.quantized * weight).sum().backward()
    codes = quantizer.embedding.weight.detach().clone().requires_grad_()
    x = latents().requires_grad_()
    scores = x @ codes.T
    soft, hard = scores.softmax(-1), torch.nn.functional.one_hot(scores.argmax(-1), 16).float()
    (((hard - soft.detach() + soft) @ codes) * weight).sum().backward()
    torch.testing.assert_close(z.grad, x.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(quantizer.embedding.weight.grad, codes.grad, rtol=1e-4, atol=1e-5)
    assert quantizer.embedding.weight.grad.abs().amin(-1).gt(0).all()
    assert torch.equal(output.quantized, quantizer.ids_to_latents(output.ids))  # to the last bit


def test_ids_by_products_under_autocast_are_those_of_float32():
    torch.manual_seed(0)
    quantizer, z = IndexQuantizer(512, 8), latents(n=500, dim=8)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = quantizer(z)
    assert torch.equal(mixed.ids, quantizer(z).ids)
    assert all(term.dtype == torch.float32 for term in mixed.losses.values())


# ---------------------------------------------------------------------------------------------------------------------
# Quantizers by name

BY_NAME = {
    "lfq": ({}, 16),
    "bsq": ({}, 16),
    "index": ({"codebook_size": 10}, 10),
    "fsq": ({"levels": [3, 3, 2, 2]}, 36),
    "vq": ({"codebook_size": 12, "normalize": False}, 12),
    "stochastic": ({"codebook_size": 12, "temperature": "learned"}, 12),
}
DIMS = {
    "open_magvit2": "bits",
    "open_magvit2_video": "bits",
    "titok": "token_dim",
    "ta_titok": "token_dim",
    "larp": "codebook_dim",
    "seed": "code_dim",
}
"""Names of the argument for a code's channels, if it is not ``codebook_embed_dim``."""
TAKING = [name for name in names("tokenizer") if "quantizer" in signature(registry.entry(name).load()).parameters]
NOT_TAKING = {"kl_vae", "mingtok"} | {"var_vq"} | {"framewise"}
"""Reasons: continuous latents; own growing grids, which others take by name; another tokenizer's quantizer."""


def with_quantizer(tokenizer, name, **options):
    """The tiny tokenizer with the quantizer of that name, for codes of 4 channels."""
    if tokenizer == "flextok":
        return tiny(tokenizer, quantizer={"name": name, **({} if name == "fsq" else {"dim": 4}), **options})
    return tiny(tokenizer, **{DIMS.get(tokenizer, "codebook_embed_dim"): 4}, quantizer={"name": name, **options})


def test_all_tokenizers_with_one_quantizer_take_another_by_name():
    assert set(names("tokenizer")) - set(TAKING) == NOT_TAKING


@pytest.mark.parametrize("tokenizer", TAKING)
@pytest.mark.parametrize("name", BY_NAME)
def test_tokenizers_take_quantizers_by_name(name, tokenizer, tmp_path):
    options, size = BY_NAME[name]
    model = with_quantizer(tokenizer, name, **options)
    assert (model.spec.codebook_size, model.spec.dim) == (size, 4)
    assert model.loss_terms[: len(model.quantizer.loss_terms)] == model.quantizer.loss_terms
    images = pixels(model)
    optimizer = torch.optim.AdamW([p for p in model.train().parameters() if p.requires_grad], 1e-3)
    for step in range(2):
        draws = model.training_draws(Keys.of(0, range(len(images)), step))
        output = model(images, draws=draws)
        assert set(output.losses) == set(model.loss_terms)
        terms = [term.mean() for term in output.losses.values()]
        sum(terms if output.reconstruction is None else [*terms, output.reconstruction.square().mean()]).backward()
        assert all(parameter.grad.isfinite().all() for parameter in model.parameters() if parameter.grad is not None)
        optimizer.step()
        optimizer.zero_grad()
    ids = model.eval().encode(images)
    assert ids.shape == (len(images), model.spec.length)
    assert ids.max() < size
    decode = model.decode if model.renders else model.decode_features
    decoded = decode(ids)
    assert decoded.isfinite().all()
    if model.renders:
        assert decoded.shape == images.shape
    if model.spec.prefix_step:
        assert model.decode(ids[:, : model.spec.prefix_step]).shape == images.shape
    model.save_pretrained(tmp_path / "saved")
    again = vistok.load(tmp_path / "saved")
    assert torch.equal(again.encode(images), ids)
    assert torch.equal((again.decode if model.renders else again.decode_features)(ids), decoded)


@pytest.mark.parametrize("tokenizer", TAKING)
def test_a_stochastic_quantizer_draws_in_training_alone(tokenizer):
    """The tokenizer gets the draws from its quantizer."""
    model = with_quantizer(tokenizer, "stochastic", codebook_size=12, temperature=1e3)
    images = pixels(model)
    first, other = (model.training_draws(Keys.range(seed, len(images))) for seed in (0, 1))
    assert first["codes"].shape == (len(images), model.spec.length)
    tokens = model(images, draws=first | {"codes": other["codes"]}).tokens
    assert torch.equal(model(images, draws=first | {"codes": other["codes"]}).tokens, tokens)
    assert not torch.equal(model(images, draws=first).tokens, tokens)
    without = {key: value for key, value in first.items() if key != "codes"}
    assert torch.equal(model(images, draws=without).tokens, model.encode(images))


@torch.no_grad()
@pytest.mark.parametrize("tokenizer", names("tokenizer"))
def test_tokenizers_decode_in_half_precision_whatever_their_quantizer_computes_in(tokenizer):
    by_name = BY_NAME if tokenizer in TAKING else {}
    others = [with_quantizer(tokenizer, name, **options) for name, (options, _) in by_name.items()]
    for model in (tiny(tokenizer), *others):
        images = pixels(model)
        tokens = model.encode(images)
        whole = (model.decode if model.renders else model.decode_features)(tokens)
        half = model.to(torch.bfloat16)
        assert half.encode(images.bfloat16()).shape == tokens.shape
        given = tokens if half.spec.discrete else tokens.bfloat16()
        decoded = (half.decode if half.renders else half.decode_features)(given)
        assert (decoded.float() - whole).abs().mean() < 0.1 * whole.abs().mean() + 0.02


def test_quantizers_that_do_not_fit_are_refused():
    for quantizer, problem in (
        ({"name": "lfg"}, r"unknown 'lfg'; did you mean 'lfq'"),
        ({}, "unknown None"),
        ({"name": "lfq", "dim": 5}, "codes of 5 channels, the latents have 4"),
        ({"name": "fsq", "levels": [3, 3]}, "codes of 2 channels, the latents have 4"),
        ({"name": "index", "size": 3}, r"quantizer\.size"),
    ):
        with pytest.raises(ValueError, match=problem):
            tiny("llamagen_vq", codebook_embed_dim=4, quantizer=quantizer)
    with pytest.raises(ValueError, match="residual_depth 2"):
        tiny("vit_vqgan", residual_depth=2, quantizer={"name": "lfq"})
    with pytest.raises(ValueError, match=r"quantizer_dropout 0\.1 leaves codes unrounded, and the quantizer 'lfq'"):
        tiny("flextok", quantizer_dropout=0.1, quantizer={"name": "lfq", "dim": 4})
    with pytest.raises(ValueError, match=r"quantizer\.dim: missing"):
        tiny("flextok", quantizer={"name": "lfq"})
    for tokenizer in ("dar", "flextok"):
        with pytest.raises(ValueError, match="prefixes of ordered tokens decode, and a scale is spread over all"):
            with_quantizer(tokenizer, "multi_scale", codebook_size=8, scales=((1, 1), (1, 8)))
    with pytest.raises(ValueError, match="of images, not of clips"):
        with_quantizer("open_magvit2_video", "multi_scale_bsq", scales=(1, 4))


def test_flextok_begins_with_latents_that_have_a_direction():
    """Except for FSQ, which works with the initial zeros of released models."""
    kind, options = registry.entry("flextok").load(), registry.entry("flextok").load().tiny
    assert not kind(**options).encoder.to_codes.weight.any()
    model = kind(**options, quantizer={"name": "vq", "codebook_size": 12, "dim": 4})
    assert model.encoder.to_codes.weight.std() > 0.01


@pytest.mark.parametrize("tokenizer", ["vit_vqgan", "dar", "flextok", "seed", "larp"])
def test_codes_by_name_are_perturbed_in_training(tokenizer):
    model = with_quantizer(tokenizer, "vq", codebook_size=12).train()
    images = pixels(model)
    draws = model.training_draws(Keys.range(0, len(images))) | perturbation_draws(
        Keys.range(0, len(images)), model.spec.length
    )
    plain = model(images, draws=draws).features["quantized"]
    model.quantizer.perturbation = Perturbation(share=1.0)
    assert not torch.equal(model(images, draws=draws).features["quantized"], plain)

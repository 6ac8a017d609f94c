"""MAR: masks, the diffusion head, sampling, inpainting; and the diffusion process beneath."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.three_rows import WEIGHTS, with_three_rows
from torch import Tensor

import vistok
from vistok.draws import Draws, Keys
from vistok.flow.diffusion import (
    GaussianDiffusion,
    discretised_log_likelihood,
    even_timesteps,
    normal_kl,
    strided_timesteps,
)
from vistok.generators.mar.model import MAR, truncated_normal
from vistok.generators.mar.sampling import MAROptions, MARSession, masks_left
from vistok.types import Condition, TokenSpec

SPEC = TokenSpec(16, None, dim=3, grid=(4, 4))
LABELS = Condition.from_labels([0, 3, 1])


pytestmark = pytest.mark.usefixtures("one_thread")


def tiny(spec: TokenSpec = SPEC, **arguments) -> MAR:
    torch.manual_seed(0)
    sizes = {
        "dim": 16,
        "num_encoder_layers": 1,
        "num_decoder_layers": 1,
        "num_heads": 2,
        "num_head_layers": 1,
        "head_dim": 16,
    }
    model = MAR(spec, **{"num_classes": 5, "buffer_size": 2, **sizes, **arguments}).eval()
    # The head starts at zero: give it random outputs, with variances within the learned range.
    for module in (model.head.blocks[0].modulation[1], model.head.modulation[1], model.head.output):
        torch.nn.init.normal_(module.weight, std=0.1)
    return model


def options(**changes) -> MAROptions:
    return MAROptions(**{"num_iter": 4, "num_steps": 5, "step_spacing": "stride", "guidance_scale": 2.0, **changes})


def latents(count: int = 3) -> Tensor:
    return Keys.range(7, count).normal("latents", SPEC.length, SPEC.dim)


def draw(model: MAR, count: int = 3, seed: int = 0, chosen: MAROptions | None = None) -> Draws:
    return model.sampling_draws(Keys.range(seed, count), chosen or options())


# ---------------------------------------------------------------------------------------------------------------------
# Generation


@pytest.mark.parametrize("patch_size", [1, 2])
def test_chunks_fill_the_raster_once(patch_size):
    model = tiny(patch_size=patch_size)
    session = model.start(LABELS, options(), draws=draw(model))
    seen, filled = [], torch.full((3, 16, 3), torch.nan)
    for chunk in session.generate():
        seen.append(chunk.positions)
        filled.scatter_(1, chunk.positions[..., None].expand_as(chunk.tokens), chunk.tokens)
    assert len(seen) == 4
    assert torch.equal(torch.cat(seen, 1).sort(1).values, torch.arange(16).expand(3, -1))
    assert torch.equal(filled, session.tokens)
    assert session.tokens.isfinite().all()


@torch.no_grad()
@pytest.mark.parametrize("rows", [2, 3])
def test_guided_rows_equal_separate_passes(rows):
    model, draws, other = tiny(), draw(tiny()), Condition.from_labels([4, 0, 2])
    chosen_options = options() if rows == 2 else with_three_rows(MAROptions, other)(**vars(options()))
    conditions = [LABELS, *[other] * (rows - 2), LABELS.null()]
    order, noise = draws["order"], draws["noise"]
    tokens, before = torch.zeros(3, 16, 3), 16
    diffusion = model.diffusion.respaced(strided_timesteps(1000, 5))
    for left in masks_left(16, 4):
        scale = 1 + (2.0 - 1) * (16 - max(left, 1)) / 16
        weights = (scale, 1 - scale) if rows == 2 else WEIGHTS
        visible, chosen = order[:, before:].sort(1).values, order[:, left:before]
        z = [model.decode(model.encode(tokens, visible, model.embed_classes(one)), visible) for one in conditions]
        for row in range(3):
            for position in chosen[row].tolist():
                inputs = [model.head.condition(one[row, position][None]) for one in z]

                def network(x, t, inputs=inputs, weights=weights):
                    outputs = [model.head(x, torch.tensor([t]), one) for one in inputs]
                    noise = sum(weight * output[:, :3] for weight, output in zip(weights, outputs))
                    return torch.cat([noise, outputs[0][:, 3:]], 1)

                start, *steps = noise[row, :, position, None]
                *_, state = diffusion.ancestral(network, start, steps)
                tokens[row, position] = state.x[0]
        before = left
    torch.testing.assert_close(model.sample(LABELS, chosen_options, draws=draws), tokens, atol=1e-4, rtol=1e-3)


def test_a_sample_does_not_depend_on_its_batch():
    model = tiny()
    whole = model.sample(LABELS, options(), draws=draw(model))
    for row in range(3):
        alone = model.sample(LABELS[row : row + 1], options(), draws=model.sampling_draws(Keys.of(0, [row]), options()))
        torch.testing.assert_close(alone[0], whole[row], atol=1e-4, rtol=1e-4)
    assert (whole - model.sample(LABELS, options(), draws=draw(model, seed=1))).abs().max() > 0.1


def test_temperature_zero_adds_no_noise_after_the_start():
    model, draws = tiny(), draw(tiny())
    other = draws | {"noise": torch.cat([draws["noise"][:, :1], -draws["noise"][:, 1:]], 1)}
    cold = options(temperature=0.0)
    assert torch.equal(model.sample(LABELS, cold, draws=draws), model.sample(LABELS, cold, draws=other))
    assert not torch.equal(model.sample(LABELS, options(), draws=draws), model.sample(LABELS, options(), draws=other))


def test_more_iterations_than_tokens():
    model = tiny()
    chunks = list(model.stream(LABELS, options(num_iter=40), draws=draw(model)))
    assert sum(chunk.positions.shape[1] for chunk in chunks) == 16
    assert all(chunk.positions.shape[1] for chunk in chunks)


@given(st.integers(1, 300), st.integers(1, 300))
def test_every_token_is_drawn_once(count, num_iter):
    left = masks_left(count, num_iter)
    assert len(left) == num_iter
    assert left[-1] == 0
    assert all(before >= after for before, after in zip([count, *left], left))
    if num_iter < count:
        assert all(before > after for before, after in zip([count, *left], left))


# ---------------------------------------------------------------------------------------------------------------------
# Known tokens


def test_inpainting_keeps_what_is_known():
    model, images = tiny(), latents()
    regenerate = torch.zeros(16, dtype=torch.bool)
    regenerate[5:9] = True
    edited = model.edit(images, regenerate, LABELS, options(), draws=draw(model))
    assert torch.equal(edited[:, ~regenerate], images[:, ~regenerate])
    assert (edited - images)[:, regenerate].abs().min() > 0
    # What is drawn depends on what is known, and on the class.
    moved = model.edit(images + 1, regenerate, LABELS, options(), draws=draw(model))
    assert (moved - edited)[:, regenerate].abs().max() > 1e-4
    other = model.edit(images, regenerate, Condition.from_labels([4, 4, 4]), options(), draws=draw(model))
    assert (other - edited)[:, regenerate].abs().max() > 1e-4


def test_each_row_has_its_own_region():
    model, images = tiny(), latents()
    regenerate = torch.zeros(3, 16, dtype=torch.bool)
    for row in range(3):
        regenerate[row, row : row + 4] = True
    edited = model.edit(images, regenerate, LABELS, options(), draws=draw(model))
    assert torch.equal(edited[~regenerate], images[~regenerate])
    more = regenerate | (torch.arange(3) == 1)[:, None] & (torch.arange(16) == 9)
    again = model.edit(images, more, LABELS, options(), draws=draw(model))
    assert torch.equal(again[~more], images[~more])
    torch.testing.assert_close(again[[0, 2]], edited[[0, 2]], atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match=r"regenerate \(16,\) or \(B, 16\), got \(3, 16, 3\) and \(4,\)"):
        model.edit(images, regenerate[0, :4], LABELS)


def test_nothing_to_regenerate():
    model, images = tiny(), latents()
    assert torch.equal(model.edit(images, torch.zeros(16, dtype=torch.bool), LABELS, draws=draw(model)), images)


def test_a_prefix_and_a_region_of_patches():
    model, images = tiny(patch_size=2), latents()
    session = model.start(LABELS, options(), draws=draw(model))
    session.append(images[:, [0, 1, 4, 5]])  # the first patch
    positions = torch.tensor([15, 10, 11, 14])
    session.append(images[:, positions], positions)
    chunks = list(session.generate(4))
    assert sum(chunk.positions.shape[1] for chunk in chunks) == 4
    list(session.generate())
    known = torch.tensor([0, 1, 4, 5, 10, 11, 14, 15])
    assert torch.equal(session.tokens[:, known], images[:, known])
    assert session.tokens.abs().amin(-1).min() > 0


def test_generating_in_two_turns_keeps_the_order():
    model, draws = tiny(), draw(tiny())
    session = model.start(LABELS, options(), draws=draws)
    first = torch.cat([chunk.positions for chunk in session.generate(6)], 1)
    assert torch.equal(first.sort(1).values, draws["order"][:, 10:].sort(1).values)
    rest = torch.cat([chunk.positions for chunk in session.generate()], 1)
    assert torch.equal(rest.sort(1).values, draws["order"][:, :10].sort(1).values)
    assert session.tokens.abs().amin(-1).min() > 0


# ---------------------------------------------------------------------------------------------------------------------
# Training


def test_the_training_loss_by_its_definition():
    model = tiny()
    draws, images = model.training_draws(Keys.range(0, 3)), latents()
    visible, count = draws["visible"], draws["masked"].shape[1]
    kept, terms = LABELS.drop(draws["drop"] < 0.1), torch.zeros(3, count, 4)
    z = model.decode(model.encode(images, visible, model.embed_classes(kept)), visible)
    for row in range(3):
        for i, position in enumerate(draws["masked"][row].tolist()):
            for level in range(4):
                t, noise = draws["time"][row, level, position, None], draws["noise"][row, level, position, None]
                data = images[row, position, None]
                x = model.diffusion.add_noise(data, noise, t)
                output = model.head(x, t, model.head.condition(z[row, position, None]))
                terms[row, i, level] = sum(model.diffusion.loss_terms(output, data, noise, t))
    output = model(images, LABELS, draws=draws)
    torch.testing.assert_close(output.loss, terms.mean())
    torch.testing.assert_close(output.metrics["mse"] + output.metrics["vb"], output.loss.detach())
    weighted = model(images, LABELS, draws=draws, weights=torch.tensor([0.0, 1.0, 0.0]))
    torch.testing.assert_close(weighted.loss, terms[1].mean())


def test_masked_tokens_are_not_seen():
    model, draws = tiny(), tiny().training_draws(Keys.range(0, 3))
    visible, hidden = draws["visible"], torch.zeros(3, 16, dtype=torch.bool).scatter(1, draws["masked"], True)
    assert 0.7 * 16 <= hidden.sum(1).min() == 16 - visible.shape[1]

    def condition(images):
        return model.decode(model.encode(images, visible, model.embed_classes(LABELS)), visible)

    images = latents()
    torch.testing.assert_close(condition(images), condition(torch.where(hidden[..., None], 99.0, images)))


def test_every_parameter_learns():
    model = tiny().train()
    model(latents(), LABELS, draws=model.training_draws(Keys.range(3, 3))).loss.backward()
    idle = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    # The null class gets a gradient only if a label is dropped.
    assert set(idle) <= {"null_class"}


def test_the_head_starts_at_zero():
    model = MAR(
        SPEC,
        num_classes=5,
        dim=16,
        num_encoder_layers=1,
        num_decoder_layers=1,
        num_heads=2,
        num_head_layers=2,
        head_dim=16,
    )
    output = model.eval()(latents(), LABELS, draws=model.training_draws(Keys.range(0, 3)))
    assert not output.prediction.any()


def test_mask_rates_follow_the_truncated_normal():
    rates = truncated_normal(torch.linspace(0, 1, 10001, dtype=torch.float64), 0.7)
    assert rates.min() == 0.7
    assert rates.max() == 1
    # The density at the upper end, over that at the lower end, is exp(1.2^2 / 2).
    top, bottom = (1 - rates[-101]), (rates[100] - 0.7)
    assert (bottom / top).item() == pytest.approx(math.exp(0.72), rel=0.02)


def test_patches_are_channels_then_rows_then_columns():
    model = tiny(patch_size=2)
    image = torch.arange(48.0).view(1, 16, 3)
    grouped = model.group(image)
    assert grouped.shape == (1, 4, 12)
    assert grouped[0, 1].view(3, 2, 2)[2].tolist() == [[2 * 3 + 2, 3 * 3 + 2], [6 * 3 + 2, 7 * 3 + 2]]
    assert torch.equal(model.ungroup(grouped)[:, model.members.flatten().argsort()], image)


def test_saved_and_loaded_it_samples_the_same(tmp_path):
    model, draws = tiny(patch_size=2), draw(tiny(patch_size=2))
    model.save_pretrained(tmp_path / "model")
    loaded = vistok.load(tmp_path / "model")
    assert torch.equal(loaded.sample(LABELS, options(), draws=draws), model.sample(LABELS, options(), draws=draws))


def test_unconditional():
    model = tiny(num_classes=0)
    assert model.num_classes is None
    assert model.sample(Condition.none(2), options(guidance_scale=1.0), draws=draw(model, 2)).shape == (2, 16, 3)


# ---------------------------------------------------------------------------------------------------------------------
# Diffusion


def test_posterior_of_the_forward_process():
    diffusion = GaussianDiffusion.cosine(20)
    # q(x_{t-1} | x_t, x_0) from its two factors: N(x_{t-1}; a x_0, s) and N(x_t; b x_{t-1}, beta).
    t = 7
    s, beta, b = 1 - diffusion.alphas_cumprod[t - 1], diffusion.betas[t], (1 - diffusion.betas[t]).sqrt()
    variance = 1 / (1 / s + b**2 / beta)
    torch.testing.assert_close(diffusion.posterior_variance[t], variance)
    torch.testing.assert_close(diffusion.posterior_mean_coef1[t], variance * diffusion.alphas_cumprod[t - 1].sqrt() / s)
    torch.testing.assert_close(diffusion.posterior_mean_coef2[t], variance * b / beta)


@settings(deadline=None)
@given(st.integers(2, 1000))
def test_respacing_keeps_the_marginals(count):
    whole, timesteps = GaussianDiffusion.cosine(), even_timesteps(1000, count)
    assert len(set(timesteps)) == count
    assert (timesteps[0], timesteps[-1]) == (0, 999)
    respaced = whole.respaced(timesteps)
    torch.testing.assert_close(respaced.alphas_cumprod, whole.alphas_cumprod[timesteps])


@pytest.mark.parametrize("count", [25, 100])
def test_only_even_spacing_magnifies_an_error_of_the_first_noise(count):
    def magnified(timesteps):
        diffusion, error = GaussianDiffusion.cosine().respaced(timesteps), torch.tensor([[1.0]])
        x, noise = torch.ones(1, 1), [torch.zeros(1, 1)] * count
        outputs = (torch.cat([x + share * error, x], 1) for share in (0.0, 1.0))
        exact, wrong = (next(diffusion.ancestral(lambda *_, o=output: o, x, noise)).x for output in outputs)
        return abs((wrong - exact).item())

    assert magnified(even_timesteps(1000, count)) == pytest.approx(31620 / count, rel=0.06)
    assert magnified(strided_timesteps(1000, count)) < 2


def test_a_perfect_network_recovers_the_data():
    diffusion = GaussianDiffusion.cosine().respaced(strided_timesteps(1000, 20))
    data = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def network(x, t):
        kept = GaussianDiffusion.cosine().alphas_cumprod[t]
        return torch.cat([(x - kept.sqrt() * data) / (1 - kept).sqrt(), -torch.ones_like(x)], 1)

    noise = torch.randn(21, 4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    *_, state = diffusion.ancestral(network, noise[0], noise[1:])
    assert state.timestep == 0
    torch.testing.assert_close(state.x, data, atol=1e-6, rtol=1e-6)


def test_the_bound_teaches_the_variance_alone():
    diffusion, data, noise = GaussianDiffusion.cosine(), torch.randn(5, 3), torch.randn(5, 3)
    output = torch.randn(5, 6, requires_grad=True)
    mse, bound = diffusion.loss_terms(output, data, noise, torch.tensor([0, 1, 10, 500, 999]))
    (gradient,) = torch.autograd.grad(bound.sum(), output, retain_graph=True)
    assert not gradient[:, :3].any()
    assert gradient[:, 3:].abs().sum() > 0
    (gradient,) = torch.autograd.grad(mse.sum(), output)
    assert not gradient[:, 3:].any()


def test_normal_kl_is_torchs():
    m1, v1, m2, v2 = torch.randn(4, 10, generator=torch.Generator().manual_seed(0))
    first, second = (torch.distributions.Normal(m, (v / 2).exp()) for m, v in ((m1, v1), (m2, v2)))
    torch.testing.assert_close(normal_kl(m1, v1, m2, v2), torch.distributions.kl_divergence(first, second))


def test_the_bins_of_8_bit_data_have_probability_one():
    values = torch.linspace(-1, 1, 256, dtype=torch.float64)
    mean, log_variance = torch.tensor(0.3, dtype=torch.float64), torch.tensor(-4.0, dtype=torch.float64)
    probabilities = discretised_log_likelihood(values, mean, log_variance).exp()
    assert probabilities.sum().item() == pytest.approx(1, abs=1e-3)
    peak = values[probabilities.argmax()]
    assert peak.item() == pytest.approx(0.3, abs=1 / 255)


def session() -> MARSession:
    return tiny().start(LABELS, options(), draws=draw(tiny()))


def twice(positions) -> None:
    started = session()
    for _ in range(2):
        started.append(latents()[:, positions], torch.tensor(positions))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: tiny(patch_size=3), "patch_size 3 does not divide the token grid"),
        (lambda: tiny(spec=TokenSpec(16, 32, 3, grid=(4, 4))), "MAR generates continuous latents"),
        (lambda: tiny(mask_rate_min=1.0), "mask_rate_min must lie in"),
        (lambda: options(guidance_scale=-0.5), "not negative"),
        (lambda: options(num_steps=1), r"num_steps 1 of them \(at least 2\)"),
        (lambda: MAROptions(num_steps=1), "num_steps must lie between 2 and the 1000"),
        (lambda: options(num_steps=400), "no stride through 1000 timesteps visits num_steps 400"),
        (lambda: options(num_iter=0), "num_iter must be an integer of at least 1, got 0"),
        (lambda: options(temperature=-1.0), "temperature must be finite and not negative"),
        (lambda: options(step_spacing="odd"), "step_spacing must be"),
        (lambda: tiny().start(Condition.from_labels([5]), draws=draw(tiny())), "class label 5"),
        (lambda: tiny().start(LABELS, options()), "pass sampling_draws"),
        (lambda: tiny()(latents(), LABELS), "pass training_draws"),
        (lambda: tiny()(torch.zeros(3, 16, 4), LABELS, draws={}), r"must be \(B, n, 3\).*another tokenizer"),
        (lambda: session().append(torch.zeros(3, 2, 3), torch.tensor([3, 16])), r"must lie in 0\.\.15, got 3\.\.16"),
        (lambda: session().append(torch.zeros(3, 2, 3), torch.tensor([3])), "2 tokens for 1 positions"),
        (lambda: session().append(torch.zeros(3, 2, 3), torch.tensor([3, 3])), "given once"),
        (lambda: session().append(torch.zeros(3, 17, 3)), "more than the 16 that are left"),
        (lambda: twice([2, 5]), "set already"),
        (lambda: list(session().generate(17)), "up to 16, got 17"),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(ValueError, match=message):
        make()

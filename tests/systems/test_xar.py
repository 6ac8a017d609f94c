"""xAR: entities, caches, noisy contexts, solvers, guidance."""

from __future__ import annotations

import gc
import math
import weakref

import pytest
import torch
from support.three_rows import with_three_rows
from torch import Tensor

import vistok
from vistok.config import load_config
from vistok.data import DataConfig
from vistok.draws import Draws, Keys
from vistok.flow import euler_maruyama, guided, stochastic_times
from vistok.generators.xar.layouts import LayoutConfig
from vistok.generators.xar.model import XAR
from vistok.generators.xar.sampling import PATH, XAROptions
from vistok.nn.flex import block_causal
from vistok.pipelines import pipeline
from vistok.tokenizers.kl_vae import KLVAE
from vistok.train import train
from vistok.train.tokenize import tokenize
from vistok.types import Condition, TokenSpec
from vistok.utils.recipes import FOLDER

CONFIG = FOLDER / "cifar10" / "xar.yaml"
SPEC = TokenSpec(16, None, dim=3, grid=(4, 4))
LAYOUTS = {
    "token": LayoutConfig("token"),
    "cell": LayoutConfig("cell", 2),
    "subsample": LayoutConfig("subsample", 2),
    "scale": LayoutConfig("scale", scales=(1, 2, 4)),
    "image": LayoutConfig("image"),
}
LABELS = Condition.from_labels([0, 3, 1])


pytestmark = pytest.mark.usefixtures("one_thread")


def tiny(layout: LayoutConfig = LAYOUTS["cell"], spec: TokenSpec = SPEC, **arguments) -> XAR:
    torch.manual_seed(0)
    sizes = {"num_classes": 5, "dim": 16, "num_encoder_layers": 1, "num_decoder_layers": 1, "num_heads": 2}
    return XAR(spec, layout=layout, **{**sizes, **arguments}).eval()


def options(**changes) -> XAROptions:
    return XAROptions(**{"num_steps": 4, "guidance_scale": 2.0, **changes})


def latents(count: int = 3) -> Tensor:
    return Keys.range(7, count).normal("latents", SPEC.length, SPEC.dim)


def draw(model: XAR, chosen: XAROptions, count: int = 3, seed: int = 0) -> Draws:
    return model.sampling_draws(Keys.range(seed, count), chosen)


@torch.no_grad()
def sample_uncached(model: XAR, condition: Condition, chosen: XAROptions, draws: Draws) -> Tensor:
    """The whole sequence without a cache: each network call is over everything so far, one call per guidance row."""
    layout, count = model.layout, len(condition)
    sequence = torch.zeros(count, 0, model.spec.dim)
    for entity in range(layout.num_entities):
        here = slice(layout.bounds[entity], layout.bounds[entity + 1])
        guidance = chosen.guidance.at(entity, layout.num_entities)

        conditions = guidance.conditions(condition)

        def field(x, t, entity=entity, context=sequence, conditions=conditions):
            times = torch.tensor([0.0] * entity + [t]).expand(count, -1)
            rows = [
                model.velocity(torch.cat([context, part.float()], 1), times, conditions[i * count : (i + 1) * count])
                for i, part in enumerate(x.split(count))
            ]
            return torch.cat(rows)[:, context.shape[1] :].to(x)

        steps = draws["steps"][:, :, here].double() if "steps" in draws else None
        start = draws["noise"][:, here].double()
        *_, state = chosen.solve(guided(field, guidance), start, steps)
        sequence = torch.cat([sequence, state.x.float()], 1)
    return layout.to_raster(sequence)


@pytest.mark.parametrize("solver", ["euler_maruyama", "euler"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_cached_sampling_equals_uncached_with_separate_guidance_passes(name, solver):
    model, chosen = tiny(LAYOUTS[name]), options(solver=solver)
    draws = draw(model, chosen)
    cached = model.sample(LABELS, chosen, draws=draws)
    assert cached.std() > 0.1
    torch.testing.assert_close(cached, sample_uncached(model, LABELS, chosen, draws), atol=1e-4, rtol=1e-4)


def test_three_rows_equal_three_passes():
    model, chosen = tiny(), with_three_rows(XAROptions, Condition.from_labels([4, 0, 1]))(num_steps=4)
    draws = draw(model, chosen)
    expected = sample_uncached(model, LABELS, chosen, draws)
    torch.testing.assert_close(model.sample(LABELS, chosen, draws=draws), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("start", "stop"), [(0, 2), (1, 3), (3, 4)])
def test_guidance_may_be_left_out_for_some_entities(start, stop):
    model, chosen = tiny(), options(guidance_schedule="constant", guidance_interval=(start, stop))
    draws = draw(model, chosen)
    expected = sample_uncached(model, LABELS, chosen, draws)
    torch.testing.assert_close(model.sample(LABELS, chosen, draws=draws), expected, atol=1e-4, rtol=1e-4)


def test_contexts_with_noise_may_be_half_precision():
    model, chosen = tiny().to(torch.bfloat16), options(context_noise=0.2)
    assert model.sample(LABELS, chosen, draws=draw(model, chosen)).isfinite().all()


@pytest.mark.parametrize("name", LAYOUTS)
def test_chunks_fill_the_raster_once(name):
    model, chosen = tiny(LAYOUTS[name]), options()
    session = model.start(LABELS, chosen, draws=draw(model, chosen))
    seen, filled = [], torch.full((3, 16, 3), torch.nan)
    for chunk in session.generate():
        assert chunk.valid.all()
        seen.append(chunk.positions)
        filled.scatter_(1, chunk.positions[..., None].expand_as(chunk.tokens), chunk.tokens)
    assert torch.equal(torch.cat(seen, 1).sort(1).values, torch.arange(16).expand(3, -1))
    assert torch.equal(filled, session.tokens)


@pytest.mark.parametrize("name", LAYOUTS)
def test_an_entity_depends_on_itself_and_earlier_ones_only(name):
    model = tiny(LAYOUTS[name])
    layout = model.layout
    sequence = Keys.range(0, 1).normal("x", layout.length, 3)
    times = torch.full((1, layout.num_entities), 0.5)
    with torch.no_grad():
        before = model.velocity(sequence, times, Condition.none(1))
        for entity in range(layout.num_entities):
            changed, level = sequence.clone(), times.clone()
            changed[:, layout.bounds[entity] :] += 1
            level[:, entity:] = 0.9
            after = model.velocity(changed, level, Condition.none(1))
            assert torch.allclose(after[:, : layout.bounds[entity]], before[:, : layout.bounds[entity]], atol=1e-6)
            here = slice(layout.bounds[entity], layout.bounds[entity + 1])
            assert (after[:, here] - before[:, here]).abs().amax(-1).min() > 1e-4


def test_context_noise_of_zero_is_a_clean_context():
    model = tiny()
    sequence, noise = model.layout.to_sequence(latents()), Keys.range(1, 3).normal("noise", 16, 3)
    times = torch.tensor([[0.0, 0.0, 0.0, 0.7]]).expand(3, -1)
    noisy = model.noisy(sequence, noise, times)
    assert torch.equal(noisy[:, :12], sequence[:, :12])
    other = model.noisy(sequence, torch.cat([-noise[:, :12], noise[:, 12:]], 1), times)
    with torch.no_grad():
        assert torch.equal(model.velocity(noisy, times, LABELS), model.velocity(other, times, LABELS))


def test_context_noise_changes_later_entities_only():
    model, noisy = tiny(), options(context_noise=0.3)
    draws = draw(model, noisy)
    clean = model.sample(LABELS, options(), draws=draws)
    changed = model.sample(LABELS, noisy, draws=draws)
    first = model.layout.raster_positions(0)
    assert torch.equal(clean[:, first], changed[:, first])
    assert (clean - changed)[:, model.layout.raster_positions(1)].abs().min() > 0
    less = model.sample(LABELS, options(context_noise=1e-6), draws=draws)
    torch.testing.assert_close(less, clean, atol=1e-4, rtol=1e-4)


def test_the_training_loss_by_its_definition():
    model = tiny()
    draws = model.training_draws(Keys.range(0, 3))
    assert 0 < draws["time"].min() < draws["time"].max() < 1
    sequence, entity_of = latents()[:, model.layout.permutation], model.layout.entity_of
    level = draws["time"][:, entity_of, None]
    noisy = (1 - level) * sequence + level * draws["noise"]
    kept = LABELS.drop(draws["drop"] < 0.1)
    error = model.velocity(noisy, draws["time"], kept) - (draws["noise"] - sequence)
    torch.testing.assert_close(model(latents(), LABELS, draws=draws).loss, error.square().mean())
    weighted = model(latents(), LABELS, draws=draws, weights=torch.tensor([0.0, 1.0, 0.0]))
    torch.testing.assert_close(weighted.loss, error[1].square().mean())


def test_dropped_labels_are_the_null_class():
    model = tiny(condition_dropout=1.0)
    draws = model.training_draws(Keys.range(0, 3))
    null = model(latents(), LABELS.null(), draws=draws).loss
    assert torch.equal(model(latents(), LABELS, draws=draws).loss, null)
    assert not torch.equal(tiny(condition_dropout=0.0)(latents(), LABELS, draws=draws).loss, null)


def test_every_parameter_learns():
    model = tiny().train()
    model(latents(), LABELS, draws=model.training_draws(Keys.range(0, 3))).loss.backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]


def test_a_sample_does_not_depend_on_its_batch():
    model, chosen = tiny(), options()
    whole = model.sample(LABELS, chosen, draws=draw(model, chosen))
    for row in range(3):
        draws = model.sampling_draws(Keys.of(0, [row]), chosen)
        alone = model.sample(LABELS[row : row + 1], chosen, draws=draws)
        torch.testing.assert_close(alone[0], whole[row], atol=1e-5, rtol=1e-5)
    assert (whole - model.sample(LABELS, chosen, draws=draw(model, chosen, seed=1))).abs().max() > 0.1


def test_forced_entities_are_the_context_of_the_rest():
    model, chosen = tiny(), options()
    draws = draw(model, chosen)
    whole = model.sample(LABELS, chosen, draws=draws)
    session = model.start(LABELS, chosen, draws=draws)
    session.append(model.layout.to_sequence(whole)[:, :8])
    assert session.entity == 2
    list(session.generate(4))
    list(session.generate())
    torch.testing.assert_close(session.tokens, whole, atol=1e-5, rtol=1e-5)
    other = model.start(LABELS, chosen, draws=draws)
    other.append(torch.zeros(3, 8, 3))
    list(other.generate())
    assert (other.tokens - whole)[:, model.layout.raster_positions(3)].abs().max() > 1e-3


def test_linear_guidance_leaves_the_first_entity_alone():
    model = tiny()
    draws = draw(model, options())
    plain = model.sample(LABELS, options(guidance_scale=1.0), draws=draws)
    ramp, constant = (
        model.sample(LABELS, options(guidance_schedule=name, guidance_scale=3.0), draws=draws)
        for name in ("linear", "constant")
    )
    first, second = model.layout.raster_positions(0), model.layout.raster_positions(1)
    torch.testing.assert_close(ramp[:, first], plain[:, first])
    assert (ramp - plain)[:, second].abs().max() > 1e-3
    assert (constant - plain)[:, first].abs().max() > 1e-3
    guidance = options(guidance_scale=4.0).guidance
    assert [round(guidance.weights(i, 4)[0], 6) for i in range(4)] == [1, 2, 3, 4]


def test_network_calls_and_tokens_per_call():
    model, sizes = tiny(), []
    hook = model.input.register_forward_hook(lambda module, args, output: sizes.append(tuple(args[0].shape[:2])))
    chosen = options(num_steps=3)
    model.sample(LABELS, chosen, draws=draw(model, chosen))
    hook.remove()
    # An unguided first cell has no null rows; the first call of a later cell also feeds the finished one.
    later = [(6, 8), (6, 4), (6, 4)]
    assert sizes == [(3, 4)] * 3 + later * 3


def test_the_stochastic_solver_keeps_the_marginals():
    # One-dimensional normal data N(m, s^2): the velocity is known in closed form.
    m, s = 0.7, 0.5

    def velocity(x, t):
        variance = (1 - t) ** 2 * s**2 + t**2
        return (t - (1 - t) * s**2) / variance * (x - (1 - t) * m) - m

    noise = torch.randn(201, 20000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    *_, state = euler_maruyama(velocity, noise[200], stochastic_times(200), noise[:199])
    assert state.t == 0
    assert state.x.mean().item() == pytest.approx(m, abs=0.02)
    assert state.x.std().item() == pytest.approx(s, abs=0.03)


def test_times_end_at_the_data():
    times = stochastic_times(3)
    assert times == pytest.approx([1, 0.52, 0.04, 0])
    assert len(options(solver="euler", num_steps=1).times()) == 2


def test_flex_attention_agrees_with_the_dense_mask():
    layout = LAYOUTS["scale"].build(SPEC)
    q, k, v = (Keys.range(0, 2).normal(name, 2, layout.length, 16) for name in "qkv")
    flexible = block_causal(layout.entity_of).attend(q, k, v)
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=layout.mask())
    torch.testing.assert_close(flexible, dense, atol=1e-5, rtol=1e-5)


def test_nothing_keeps_the_layout_of_a_model_that_is_gone():
    model = tiny()
    model.own_tokens(latents(), None, LABELS, model.training_draws(Keys.range(0, 3)))
    layout = weakref.ref(model.layout)
    del model
    gc.collect()
    assert layout() is None


def test_plain_sequences_of_latents_are_modelled_too():
    model = tiny(LayoutConfig("cell", 4), spec=TokenSpec(8, None, dim=3))
    draws = model.sampling_draws(Keys.range(0, 2), options())
    assert model.sample(Condition.none(2), options(), draws=draws).shape == (2, 8, 3)


def test_saved_and_loaded_it_samples_the_same(tmp_path):
    model, chosen = tiny(LAYOUTS["scale"]), options()
    model.save_pretrained(tmp_path / "model")
    loaded, draws = vistok.load(tmp_path / "model"), draw(model, chosen)
    assert torch.equal(loaded.sample(LABELS, chosen, draws=draws), model.sample(LABELS, chosen, draws=draws))


def test_unconditional():
    model, chosen = tiny(num_classes=0), options(guidance_scale=1.0)
    draws = draw(model, chosen)
    assert model.num_classes is None
    assert model.sample(Condition.none(3), chosen, draws=draws).shape == (3, 16, 3)
    with pytest.raises(ValueError, match="takes no class labels"):
        model.start(LABELS, chosen, draws=draws)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: tiny(LayoutConfig("cell", 3)), "cell of 3x3 does not divide the token grid 4x4"),
        (lambda: tiny(spec=TokenSpec(16, 32, 3, grid=(4, 4))), "XAR generates continuous latents"),
        (lambda: options(guidance_scale=-1.0), "not negative"),
        (lambda: options(num_steps=1), "at least 2 for the stochastic solver"),
        (lambda: options(num_steps=0, solver="euler"), "at least 1"),
        (lambda: options(context_noise=1.0), r"must lie in \[0, 1\)"),
        (lambda: options(solver="heun"), "solver must be"),
        (lambda: options(guidance_schedule="quadratic"), "guidance_schedule must be"),
        (lambda: tiny().start(Condition.from_labels([5]), draws=draw(tiny(), options())), "class label 5"),
        (lambda: tiny().start(LABELS, options()), "pass sampling_draws"),
        (lambda: tiny()(latents(), LABELS), "pass training_draws"),
        (lambda: tiny()(torch.zeros(3, 16, 4), LABELS, draws={}), r"must be \(B, n, 3\).*another tokenizer"),
        (lambda: tiny()(torch.zeros(3, 16, dtype=torch.int64), LABELS, draws={}), "latents must be float"),
        (lambda: session().append(torch.zeros(3, 5, 3)), "5 tokens are not a number of whole entities"),
        (lambda: session().append(torch.zeros(2, 4, 3)), "session has 3 rows, the tokens 2"),
        (lambda: list(session().generate(6)), "6 tokens are not a number"),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def session():
    model = tiny()
    return model.start(LABELS, options(), draws=draw(model, options()))


def test_rotary_positions_are_those_of_the_raster():
    model = tiny()
    angle = torch.atan2(model.rotation.sin, model.rotation.cos)
    # A head of 8 channels has two frequencies per axis, 1 and 0.01: rows first.
    wrapped = torch.remainder(model.layout.coordinates + math.pi, 2 * math.pi) - math.pi
    torch.testing.assert_close(angle[:, [0, 2]].double(), wrapped, atol=1e-6, rtol=1e-6)
    assert PATH.noise_at == 1


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """A token cache of some digits, by an untrained autoencoder."""
    torch.manual_seed(0)
    widths = {"block_out_channels": (4, 4, 8), "layers_per_block": 1, "encoder_attention": (), "norm_groups": 4}
    tokenizer = KLVAE(16, 1, latent_channels=2, **widths)
    folder = tmp_path_factory.mktemp("tokens") / "digits"
    tokenize(tokenizer, DataConfig(16, source="digits", channels=1, limit=64), folder)
    return folder


@pytest.mark.parametrize(
    ("layout", "entities"),
    [
        ("{entity: token}", 16),
        ("{entity: cell, size: 2}", 4),
        ("{entity: subsample, size: [2, 1]}", 2),
        ("{entity: image}", 1),
        ("{entity: scale, scales: [1, 2, 4]}", 3),
    ],
)
def test_every_entity_trains_and_samples_from_a_config(layout, entities, digits, tmp_path):
    changes = [f"output_dir={tmp_path / 'run'}", f"tokens={digits}", f"model.layout={layout}", "model.dim=16"]
    changes += ["training.max_steps=2", "training.batch_size=8", "training.image_every=0", "sampling.num_steps=2"]
    run = train(load_config(CONFIG, changes))
    pipe = pipeline(run)
    assert pipe.generator.layout.num_entities == entities
    made = pipe([3, 5], batch_size=2)
    assert made.tokens.shape == (2, 16, 2)
    assert made.tokens.isfinite().all()

"""D-AR: groups of tokens that drive flow steps, previews, training, and the generator's forced prefixes."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from golden.harness import Case
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tiny_models import ARGUMENTS, pixels, tiny

import vistok
from vistok.checkpoints import CheckpointError, convert, official_name
from vistok.data.pictures import to_pil
from vistok.draws import Keys
from vistok.generators.engine.sampling import DecodingOptions
from vistok.generators.llama import Llama
from vistok.nn.alignment import AlignmentConfig
from vistok.pipelines import Pipeline
from vistok.tokenizers.dar.model import DAR
from vistok.types import Condition

TOKENS, GROUP, STEPS = 8, 2, 4
SOLVERS = ["euler", "adams_bashforth2"]
CASES = Path(__file__).parents[1] / "golden" / "cases"


@pytest.fixture(scope="module")
def model() -> DAR:
    return tiny("dar")


@pytest.fixture(scope="module")
def ids(model) -> torch.Tensor:
    return model.encode(pixels(model))


@given(first=st.integers(1, TOKENS - 1), seed=st.integers(0, 100))
@settings(max_examples=10, deadline=None)
def test_a_query_depends_on_no_later_one(model, first, seed):
    expected = model.latents(pixels(model))
    queries = model.queries.weight.data.clone()
    generator = torch.Generator().manual_seed(seed)
    try:
        model.queries.weight.data[first:] = torch.randn(TOKENS - first, queries.shape[1], generator=generator)
        changed = model.latents(pixels(model))
    finally:
        model.queries.weight.data.copy_(queries)
    torch.testing.assert_close(changed[:, :first], expected[:, :first])
    assert not torch.allclose(changed[:, first:], expected[:, first:])


@given(
    groups=st.lists(st.integers(1, TOKENS // GROUP), min_size=3, max_size=3), solver=st.sampled_from(["euler", None])
)
@settings(max_examples=10, deadline=None)
def test_lengths_in_one_batch_are_prefixes_decoded_alone(model, ids, groups, solver):
    noise = model.decoding_draws(Keys.range(1, 3))["noise"]
    lengths = torch.tensor(groups) * GROUP
    together = model.decode(ids, lengths=lengths, solver=solver, draws={"noise": noise})
    for row, length in enumerate(lengths):
        draws = {"noise": noise[row : row + 1]}
        alone = model.decode(ids[row : row + 1, :length], solver=solver, draws=draws)
        torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-4, atol=1e-4)


@given(groups=st.integers(1, TOKENS // GROUP), seed=st.integers(0, 100))
@settings(max_examples=10, deadline=None)
def test_a_preview_depends_on_no_later_token(model, ids, groups, seed):
    lengths = torch.full((3,), groups * GROUP)
    other = torch.randint(0, 32, ids.shape, generator=torch.Generator().manual_seed(seed))
    mixed = torch.where(torch.arange(TOKENS) < lengths[0], ids, other)
    torch.testing.assert_close(model.decode(mixed, lengths=lengths), model.decode(ids[:, : lengths[0]]))


@pytest.mark.parametrize("num_steps", [1, 3, STEPS, 8])
def test_stream_ends_with_the_decoded_image(model, ids, num_steps):
    images = list(model.decode_stream(ids, num_steps=num_steps))
    assert len(images) == num_steps
    assert torch.equal(images[-1], model.decode(ids, num_steps=num_steps))


def test_previews_on_the_way_cost_one_evaluation_a_step_and_equal_decoding(model, ids):
    draws, calls = model.decoding_draws(Keys.range(3, 3)), []
    handle = model.velocity.register_forward_hook(lambda *_: calls.append(1))
    try:
        decode = model.prefix_decoder(draws)
        previews = [decode(ids[:, :stop]) for stop in range(GROUP, TOKENS + 1, GROUP)]
    finally:
        handle.remove()
    assert len(calls) == STEPS
    for stop, preview in zip(range(GROUP, TOKENS + 1, GROUP), previews):
        torch.testing.assert_close(preview, model.decode(ids[:, :stop], draws=draws), rtol=1e-4, atol=1e-4)


def test_each_step_of_as_many_as_groups_uses_its_own_group(model):
    times, needed = model.schedule(STEPS)
    assert needed == [2, 4, 6, 8]
    assert (times[0], times[-1]) == (0, 1)
    # Training rounds to the nearest group: the first and the last serve half and one and a half as long.
    starts = model.group_start(torch.tensor([0.0, 0.12, 0.13, 0.37, 0.38, 0.99]))
    assert starts.tolist() == [0, 0, 2, 2, 4, 6]


def test_seed_and_sample_number_decide_the_image(model, ids):
    decoded = model.decode(ids, draws=model.decoding_draws(Keys.range(5, 3)))
    alone = model.decode(ids[2:], draws=model.decoding_draws(Keys.of(5, [2])))
    torch.testing.assert_close(alone, decoded[2:], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(model.decode(ids), decoded)


def test_other_sizes_work_too(model):
    images = torch.rand(2, 3, 24, 8) * 2 - 1
    ids = model.encode(images)
    assert ids.shape == (2, TOKENS)
    assert model.decode(ids, draws={"noise": torch.randn(2, 3, 24, 8)}).shape == (2, 3, 24, 8)


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (lambda ids: ids[:, :0], {}, "cannot decode 0 tokens"),
        (lambda ids: ids[:, :3], {}, "cannot decode 3 tokens of 3 given: a prefix has a multiple of 2 from 2 to 8"),
        (lambda ids: torch.cat([ids, ids], 1), {}, "cannot decode 16 tokens"),
        (lambda ids: torch.cat([ids, ids], 1), {"lengths": torch.tensor([2, 4, 8])}, "cannot decode 16 tokens: "),
        (lambda ids: ids, {"lengths": torch.tensor([2, 4, 5])}, "cannot decode 5 tokens"),
        (lambda ids: ids + 32, {}, r"out of range: this codebook has ids 0\.\.31"),
        (lambda ids: ids, {"num_steps": 0}, "num_steps must be an integer of at least 1, got 0"),
    ],
)
def test_wrong_tokens_and_options_are_refused(model, ids, change, options, message):
    with pytest.raises(ValueError, match=message):
        model.decode(change(ids), **options)
    if not options:
        with pytest.raises(ValueError, match=message):
            model.prefix_decoder()(change(ids))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image_size": 20}, "multiples of 8, got 20x20"),
        ({"encoder_dim": 96}, "multiples of that, got 96"),
        ({"group_size": 9}, "group_size 9 must be at least 1, at most num_tokens 8"),
        ({"max_tokens": 4}, "num_tokens 8, and that at most max_tokens 4"),
        ({"velocity": {"dim": 64, "modulated_output": True}}, "needs share_time_embedding"),
        ({"alignment": {"layer": 1}}, r"alignment\.layer must lie in 0\.\.0, got 1"),
    ],
)
def test_models_that_cannot_be_built_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny("dar", **arguments)


# ---------------------------------------------------------------------------------------------------------------------
# Training


def forward(model: DAR, time: list[float]):
    draws = model.training_draws(Keys.range(0, 3)) | {"time": torch.tensor(time)}
    return model(pixels(model), draws=draws)


def test_all_parameters_learn():
    model = tiny("dar", alignment=AlignmentConfig(dim=12, layer=0, hidden_dim=8))
    output = forward(model, [0.1, 0.5, 0.9])
    assert torch.equal(output.tokens, model.encode(pixels(model)))
    assert output.losses.keys() == set(model.loss_terms)
    assert output.features["alignment"].shape == (3, 4, model.alignment_dim)
    (sum(term.mean() for term in output.losses.values()) + output.features["alignment"].sum()).backward()
    still = [name for name, p in model.named_parameters() if p.requires_grad and not p.grad.abs().sum() > 0]
    assert still == []
    assert model.last_layer.grad.abs().sum() > 0


def test_code_losses_count_the_tokens_that_the_time_has_reached(model):
    quantized = model.quantizer(model.latents(pixels(model)))
    used = torch.arange(TOKENS) < torch.tensor([[2], [4], [8]])
    for name in ("codebook", "commitment"):
        expected = quantized.losses[name][used].mean()
        torch.testing.assert_close(forward(model, [0.0, 0.25, 0.99]).losses[name], expected)


def test_the_reconstruction_is_exact_where_the_velocity_is(model):
    output = forward(model, [0.3, 0.6, 1.0])
    torch.testing.assert_close(output.reconstruction[2], pixels(model)[2])  # at time 1 the image is complete
    error = (output.reconstruction - pixels(model)).square().flatten(1).mean(1)
    # A velocity error e moves the estimate by e (1 - t) / data_std.
    torch.testing.assert_close(
        error, output.losses["flow"] * (1 - output.features["time"]).square(), rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize(
    "velocity", [{"share_time_embedding": True}, {"share_time_embedding": True, "modulated_output": True}]
)
def test_options_of_the_velocity_network(velocity):
    model = tiny("dar", velocity={"dim": 64, "num_layers": 2, "patch_size": 8} | velocity)
    forward(model, [0.1, 0.5, 0.9]).losses["flow"].sum().backward()
    assert model.velocity.time_embedding.mlp[0].weight.grad.abs().sum() > 0


@pytest.mark.parametrize(("group_size", "absolute", "alike"), [(1, False, True), (1, True, False), (2, False, False)])
def test_one_token_a_group_needs_absolute_positions_to_tell_patches_apart(group_size, absolute, alike):
    network = tiny("dar", group_size=group_size, absolute_positions=absolute).velocity
    grey, tokens = torch.zeros(1, 3, 16, 16), Keys.range(0, 1).normal("tokens", group_size, 64)
    patches = network(grey, torch.tensor([0.5]), tokens).velocity.unfold(2, 8, 8).unfold(3, 8, 8)
    assert torch.allclose(patches[:, :, 0, 0], patches[:, :, 1, 1], atol=1e-5) == alike


def test_absolute_positions_follow_the_size():
    model = tiny("dar", absolute_positions=True)
    ids = model.encode(torch.rand(2, 3, 24, 8) * 2 - 1)
    assert model.decode(ids, draws={"noise": torch.randn(2, 3, 24, 8)}).shape == (2, 3, 24, 8)


def test_tokens_see_the_image_from_the_first_step_where_gates_are_open(model):
    images = pixels(model)
    shut, opened = (DAR(**ARGUMENTS["dar"], gate_init=gate).latents(images) for gate in (0.0, 1.0))
    torch.testing.assert_close(shut[0], shut[1])
    assert not torch.allclose(opened[0], opened[1], atol=1e-3)


def test_training_without_draws_is_refused(model):
    with pytest.raises(ValueError, match="random times and noise"):
        model(pixels(model))


# ---------------------------------------------------------------------------------------------------------------------
# The generator: LlamaGen's transformer with one-dimensional positions


def test_a_prefix_of_a_reference_image_is_kept_and_the_rest_follows_each_label(model, ids):
    torch.manual_seed(0)
    generator = tiny("llama", spec=model.spec, positions="rope1d")
    condition, options = Condition.from_labels([0, 1, 2]), DecodingOptions(guidance_scale=(1.2, 8.0))
    draws = generator.sampling_draws(Keys.range(0, 3), options)
    session = generator.start(condition, options, draws=draws)
    session.append(ids[:1, :4].expand(3, -1))
    for _ in session.generate():
        pass
    assert torch.equal(session.tokens[:, :4], ids[:1, :4].expand(3, -1))
    # The next tokens are those that the model predicts from the prefix and the label.
    scale = options.guidance.weights(4, TOKENS)[0]
    conditional = generator.logits(session.tokens, condition)[:, 4]
    null = generator.logits(session.tokens, condition.null())[:, 4]
    probabilities = (null + scale * (conditional - null)).softmax(-1)
    drawn = (probabilities.cumsum(-1) <= draws["ids"][:, 4:5]).sum(-1)
    assert torch.equal(session.tokens[:, 4], drawn)


def test_pipeline_previews_are_the_decoded_prefixes_without_further_evaluations(model):
    pipe = Pipeline(model, tiny("llama", spec=model.spec, positions="rope1d"))
    images, calls = pipe([0, 1], seed=7).images, []
    handle = model.velocity.register_forward_hook(lambda *_: calls.append(1))
    try:
        previews = list(pipe.stream([0, 1], seed=7))
    finally:
        handle.remove()
    assert [preview.step for preview in previews] == [2, 4, 6, 8]
    assert len(calls) == STEPS
    draws = model.decoding_draws(Keys.range(7, 2))
    for preview in previews:
        prefix = to_pil(model.decode(preview.tokens[:, : preview.step], draws=draws))
        for shown, expected in zip(preview.images, prefix):
            difference = np.asarray(shown, int) - np.asarray(expected, int)
            assert np.abs(difference).max() <= 1
    assert np.abs(np.asarray(previews[-1].images[1], int) - np.asarray(images[1], int)).max() <= 1


def test_official_generator_has_one_dimensional_positions():
    case = Case(CASES / "dar_gpt")
    built = case.build_model()
    assert isinstance(built, Llama)
    assert built.config["positions"] == "rope1d"
    same_weights = vistok.from_official("llamagen/gpt", case.config | {"block_size": 36}, case.state)
    assert same_weights.config["positions"] == "rope2d"


def test_file_names_tell_the_parts_of_the_release():
    assert official_name("dar", "D-AR-L-360K.pt") == "dar/gpt"
    assert official_name("dar", "D-AR-tokenizer_v1.pt") == "dar/tokenizer"


# ---------------------------------------------------------------------------------------------------------------------
# Official files


def training_file(folder: Path, case: Case, **extra) -> Path:
    """A file as the reference's trainer writes it: weights beside a pickled config object of its own class."""
    module = types.ModuleType("config_util")
    exec("class Config:\n    def __init__(self, data):\n        self._data = data", module.__dict__)
    sys.modules["config_util"] = module
    try:
        config = module.Config({"model": case.config, "name": "v1"})
        torch.save({"model": {}, "ema": case.state, "config": config, "steps": 10} | extra, folder / "weights.pt")
    finally:
        del sys.modules["config_util"]
    return folder / "weights.pt"


def test_config_object_of_a_training_file_is_read_without_its_class(tmp_path):
    case = Case(CASES / "dar_tokenizer")
    model = convert("dar/tokenizer", training_file(tmp_path, case))
    assert model.fingerprint() == case.build_model().fingerprint()
    assert "config_util" not in sys.modules


def test_another_class_of_that_module_is_refused(tmp_path):
    case, module = Case(CASES / "dar_tokenizer"), types.ModuleType("config_util")
    exec("class Other:\n    pass", module.__dict__)
    sys.modules["config_util"] = module
    try:
        torch.save({"ema": case.state, "config": module.Other()}, tmp_path / "weights.pt")
    finally:
        del sys.modules["config_util"]
    with pytest.raises(CheckpointError, match=r"pickles a config_util\.Other beside them"):
        convert("dar/tokenizer", tmp_path / "weights.pt")


def test_a_model_without_codes_is_no_tokenizer():
    case = Case(CASES / "dar_tokenizer")
    with pytest.raises(CheckpointError, match="vq_enable"):
        vistok.from_official("dar/tokenizer", case.config | {"vq_enable": False}, case.state)


@pytest.mark.parametrize(
    ("group_size", "needed", "step"), [(4, [4, 6, 8, 8], 4), (3, [3, 5, 7, 8], 4), (8, [8] * 4, 8)]
)
def test_groups_of_more_tokens_than_their_share_overlap(group_size, needed, step):
    """Group i of G begins at i N / G, at most at N - Q."""
    model = tiny("dar", group_size=group_size)
    assert model.schedule(4)[1] == needed
    assert model.spec.prefix_step == step
    whole = model.encode(pixels(model))
    assert torch.equal(list(model.decode_stream(whole))[-1], model.decode(whole))
    for length in range(step, TOKENS + 1, step):
        steps = sum(stop <= length for stop in needed)
        assert torch.equal(model.decode(whole[:, :length]), list(model.decode_stream(whole))[steps - 1])
    output = model(pixels(model), draws=model.training_draws(Keys.range(0, 3)))
    assert torch.isfinite(output.losses["flow"]).all()


@pytest.mark.parametrize("section", [(), ("diff_decoder",)])
def test_the_base_of_rotary_positions_is_honoured(section):
    case = Case(CASES / "dar_tokenizer")
    config = {**case.config, "diff_decoder": dict(case.config["diff_decoder"])}
    (config if not section else config["diff_decoder"])["rope_base_len"] = 100
    changed, usual = vistok.from_official(case.model, config, case.state), case.build_model()
    images = pixels(usual)
    assert torch.equal(changed.latents(images), usual.latents(images)) == bool(section)
    noise, t, tokens = torch.randn(3, 3, 32, 32), torch.rand(3), torch.randn(3, 4, 128)
    assert torch.equal(changed.velocity(noise, t, tokens)[0], usual.velocity(noise, t, tokens)[0]) != bool(section)

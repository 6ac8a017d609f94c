"""Next-token generators: cached sampling against teacher forcing, guidance, seeds, conditions, options."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from golden.harness import Case
from hypothesis import given, settings
from hypothesis import strategies as st
from support.three_rows import combined, with_three_rows
from support.tiny_models import CAPTIONS, captions, labels, single_token_generators, tiny, token_ids
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import vistok
from vistok.draws import Keys
from vistok.generators.engine.cache import KVCache
from vistok.generators.engine.compiled import dense_mask
from vistok.generators.engine.sampling import DecodingOptions, draw_ids
from vistok.generators.engine.split import MOST_ROWS, JoinedMLP, SplitLinear, number_of_parts, split_layers
from vistok.nn.flex import LiveKeys
from vistok.nn.mlp import SwiGLU
from vistok.types import Condition, TokenSpec

GENERATORS = [name for name, windows in single_token_generators().items() if not windows]  # others have own tests
GREEDY = DecodingOptions(temperature=0)
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}

SETUPS = {
    "llama": lambda: (tiny("llama"), labels(0, 4, -1)),
    "llama-unconditional": lambda: (tiny("llama", num_classes=0), Condition.none(3)),
    "llama-rope1d": lambda: (tiny("llama", positions="rope1d"), labels(0, 4, 2)),
    "llama-not-square": lambda: (tiny("llama", spec=TokenSpec(10, 32, dim=4, grid=(2, 5))), labels(0, 4, 2)),
    "llama-captions": lambda: (tiny("llama", **CAPTIONS), captions()),
    "llama-captions-unmasked": lambda: (tiny("llama", **CAPTIONS), Condition.from_features(captions().features)),
    "llama-captions-null": lambda: (tiny("llama", **CAPTIONS), Condition.none(3)),
    "ibq_gpt": lambda: (tiny("ibq_gpt"), labels(0, 4, -1)),
    "ibq_gpt-unconditional": lambda: (tiny("ibq_gpt", num_classes=0), Condition.none(3)),
    "rar": lambda: (tiny("rar"), labels(0, 4, -1)),
    "rar-unconditional": lambda: (tiny("rar", num_classes=0), Condition.none(3)),
    "vit_vqgan_gpt": lambda: (tiny("vit_vqgan_gpt"), labels(0, 4, -1)),
    "vit_vqgan_gpt-3-condition-tokens": lambda: (
        tiny("vit_vqgan_gpt", condition_length=3),
        Condition.from_ids(torch.tensor([[0, 1, 2], [4, 4, 0], [3, 1, 2]])),
    ),
}


@pytest.fixture(params=SETUPS.values(), ids=SETUPS)
def setup(request):
    return request.param()


@contextmanager
def recorded_logits(model):
    """Collect the output of the model's head, call by call."""
    calls: list[Tensor] = []
    handle = model.output.register_forward_hook(lambda _, __, output: calls.append(output))
    try:
        yield calls
    finally:
        handle.remove()


def drain(session, num_tokens: int | None = None) -> None:
    for _ in session.generate(num_tokens):
        pass


# ---------------------------------------------------------------------------------------------------------------------
# The decoding engine


def test_every_generator_is_set_up():
    assert {name.split("-")[0] for name in SETUPS} == set(GENERATORS)


@torch.no_grad()
def test_cached_logits_equal_teacher_forced_ones(setup):
    model, condition = setup
    draws = model.sampling_draws(Keys.range(0, 3))
    with recorded_logits(model) as calls:
        ids = model.sample(condition, draws=draws)
    torch.testing.assert_close(torch.cat(calls, 1), model.logits(ids, condition), **TOLERANCE)


@torch.no_grad()
def test_guidance_rows_equal_two_passes(setup):
    model, condition = setup
    options = DecodingOptions(guidance_scale=2.5)
    draws = model.sampling_draws(Keys.range(0, 3))
    with recorded_logits(model) as calls:
        ids = model.sample(condition, options, draws=draws)
    conditional, null = torch.cat(calls, 1).chunk(2)
    torch.testing.assert_close(conditional, model.logits(ids, condition), **TOLERANCE)
    torch.testing.assert_close(null, model.logits(ids, condition.null()), **TOLERANCE)


@torch.no_grad()
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", GENERATORS)
def test_three_rows_equal_three_passes(name, compiled):
    model, condition, other = tiny(name), labels(0, 4, 1), labels(2, 0, 3)
    options = with_three_rows(DecodingOptions, other)(temperature=0.0)
    if compiled and "compile_decoding" in vars(type(model)):  # the message says why there are no compiled steps
        with pytest.raises(ValueError, match="no compiled decoding"):
            model.compile_decoding("eager")
        return
    if compiled:
        model.compile_decoding("eager")
    ids = model.sample(condition, options)
    passes = [model.logits(ids, one) for one in (condition, other, condition.null())]
    assert torch.equal(combined(passes).argmax(-1), ids)


@torch.no_grad()
def test_bfloat16_cached_logits_equal_teacher_forced_ones(setup):
    model, condition = setup
    model.to(torch.bfloat16)
    options = DecodingOptions(guidance_scale=2.5)
    with recorded_logits(model) as calls:
        ids = model.sample(condition, options, draws=model.sampling_draws(Keys.range(0, 3)))
    cached = torch.cat(calls, 1).float()
    whole = torch.cat([model.logits(ids, rows) for rows in (condition, condition.null())])
    precise = model.float().logits(ids, condition)
    # The tolerance is the distance of bfloat16 from float32: rounding depends on the number of positions in a call.
    error = (whole.chunk(2)[0] - precise).abs().max()
    torch.testing.assert_close(cached, whole, rtol=0, atol=max(2 * error.item(), 0.02))


@torch.no_grad()
def test_greedy_guided_ids_follow_from_the_guided_logits(setup):
    model, condition = setup
    ids = model.sample(condition, DecodingOptions(temperature=0, guidance_scale=3.0, guidance_interval=(2, 6)))
    conditional, null = model.logits(ids, condition), model.logits(ids, condition.null())
    inside = torch.zeros(model.spec.length, 1, dtype=torch.bool)
    inside[2:6] = True
    guided = torch.where(inside, null + 3 * (conditional - null), conditional)
    assert torch.equal(guided.argmax(-1), ids)


@torch.no_grad()
def test_forced_tokens_and_generated_ones_alternate(setup):
    model, condition = setup
    given_ids = token_ids(model)
    session = model.start(condition, DecodingOptions(temperature=0, guidance_scale=2.0))
    session.append(given_ids[:, :3])
    assert torch.equal(session.tokens, given_ids[:, :3])
    drain(session, 2)
    session.append(given_ids[:, 5:6])
    session.append(given_ids[:, 6:8])
    drain(session)
    ids = session.tokens
    assert ids.shape == given_ids.shape
    guided = 2 * model.logits(ids, condition) - model.logits(ids, condition.null())
    expected = guided.argmax(-1)
    forced = [0, 1, 2, 5, 6, 7]
    expected[:, forced] = given_ids[:, forced]
    assert torch.equal(ids, expected)


@torch.no_grad()
def test_continuing_a_sampled_prefix_gives_the_same_sample(setup):
    model, condition = setup
    draws = model.sampling_draws(Keys.range(0, 3))
    whole = model.sample(condition, draws=draws)
    session = model.start(condition, draws=draws)
    session.append(whole[:, :4])
    drain(session)
    assert torch.equal(session.tokens, whole)


@torch.no_grad()
def test_logits_do_not_see_the_future(setup):
    model, condition = setup
    ids = token_ids(model)
    before = model.logits(ids, condition)
    for position in (0, 3, model.spec.length - 1):
        changed = ids.clone()
        changed[:, position:] = (changed[:, position:] + 7) % 32
        after = model.logits(changed, condition)
        torch.testing.assert_close(after[:, : position + 1], before[:, : position + 1], **TOLERANCE)
        if position + 1 < model.spec.length:
            assert not torch.allclose(after[:, position + 1 :], before[:, position + 1 :], atol=1e-3)


@settings(max_examples=8)
@given(
    st.integers(0, 2**32), st.lists(st.integers(0, 40), min_size=1, max_size=5, unique=True), st.sampled_from([1, 3])
)
def test_a_seed_gives_the_same_sample_in_any_batch(seed, indices, scale):
    model = tiny("llama")
    options = DecodingOptions(top_k=20, top_p=0.95, guidance_scale=float(scale))

    def sample(chosen: list[int]) -> Tensor:
        condition = Condition.from_labels(torch.tensor(chosen) % 5)
        return model.sample(condition, options, draws=model.sampling_draws(Keys.of(seed, chosen)))

    together = sample(indices)
    assert torch.equal(torch.cat([sample([index]) for index in indices]), together)
    assert torch.equal(sample(indices[::-1]), together.flip(0))


@torch.no_grad()
def test_each_position_is_drawn_with_its_own_number(setup):
    model, condition = setup
    options = DecodingOptions(temperature=1.3, top_k=12, top_p=0.9)
    draws = model.sampling_draws(Keys.range(4, 3))
    ids = model.sample(condition, options, draws=draws)
    logits = model.logits(ids, condition)
    drawn = [draw_ids(logits[:, i], draws["ids"][:, i], options) for i in range(model.spec.length)]
    assert torch.equal(torch.stack(drawn, 1), ids)


def test_other_seeds_give_other_samples():
    model = tiny("llama")
    samples = [model.sample(labels(0), draws=model.sampling_draws(Keys.range(seed, 1))) for seed in range(4)]
    assert len(torch.cat(samples).unique(dim=0)) == 4


def test_samples_follow_the_models_distribution():
    model = tiny("llama", spec=TokenSpec(1, 4, dim=4, grid=(1, 1)))
    condition = labels(*[2] * 4000)
    ids = model.sample(condition, draws=model.sampling_draws(Keys.range(0, 4000)))
    expected = model.logits(ids[:1], condition[:1])[0, 0].softmax(-1)
    torch.testing.assert_close(torch.bincount(ids[:, 0], minlength=4) / 4000, expected, atol=0.03, rtol=0)


def test_stream_covers_every_position_once(setup):
    model, condition = setup
    draws = model.sampling_draws(Keys.range(0, 3))
    chunks = list(model.stream(condition, draws=draws))
    positions = torch.cat([chunk.positions for chunk in chunks], 1)
    assert positions.sort(1).values.tolist() == [list(range(model.spec.length))] * 3
    assert all(chunk.valid.all() for chunk in chunks)
    ids = torch.cat([chunk.tokens for chunk in chunks], 1)
    assert torch.equal(ids, model.sample(condition, draws=draws))
    assert model.spec.check_ids(ids) is ids


def test_sampling_one_candidate_is_greedy_and_stops_early(setup):
    model, condition = setup
    session = model.start(condition, DecodingOptions(top_k=1), draws=model.sampling_draws(Keys.range(9, 3)))
    drain(session, 5)
    assert session.tokens.shape == (3, 5)
    assert torch.equal(session.tokens, model.sample(condition, GREEDY)[:, :5])


@pytest.mark.parametrize("options", [{"top_k": 9, "guidance_interval": (3, 9)}, {"top_p": 0.9}, {"temperature": 0.0}])
@pytest.mark.parametrize("name", ["llama", "llama-captions", "vit_vqgan_gpt"])
@pytest.mark.parametrize("place", ["here", "as on a GPU"])
def test_compiled_steps_give_the_same_samples(name, options, place, monkeypatch):
    if place == "as on a GPU":
        monkeypatch.setattr("vistok.generators.engine.compiled.seen_keys_for", lambda device, head_dim: LiveKeys.up_to)
        monkeypatch.setattr("vistok.generators.engine.split.FEWEST_INPUTS", 4)
        monkeypatch.setattr(
            "vistok.generators.engine.compiled.blocks_for",
            lambda model, rows, device: [split_layers(block, rows, processors=4) for block in model.blocks],
        )
    model, condition = SETUPS[name]()
    options = DecodingOptions(guidance_scale=1.5, **options)
    draws = model.sampling_draws(Keys.range(0, 3), options)
    expected = model.sample(condition, options, draws=draws)
    model.compile_decoding("eager")  # traced into one graph, but not translated: that takes a compiler and time
    assert torch.equal(model.sample(condition, options, draws=draws), expected)
    with torch._dynamo.config.patch(error_on_recompile=True):  # another session fits the same graph
        session = model.start(condition, options, draws=draws)
        drain(session, 3)
        session.append(expected[:, 3:6])
        drain(session)
    assert torch.equal(session.tokens, expected)


def test_threads_sample_with_compiled_steps_of_one_model():
    model, condition = tiny("llama"), labels(0, 4, 2)
    model.compile_decoding("eager")
    expected = model.sample(condition, GREEDY)

    def sample(_: int) -> tuple[torch.Tensor, int]:
        return model.sample(condition, GREEDY), torch._dynamo.config.recompile_limit

    with ThreadPoolExecutor(4) as pool:
        for ids, limit in pool.map(sample, range(16)):
            assert torch.equal(ids, expected)
            assert limit >= 64  # each thread has its own
    assert not [module for module in model.modules() if "forward" in vars(module)]


@pytest.mark.parametrize(("last", "blocks"), [(0, 1), (63, 1), (64, 2), (149, 3)])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_keys_behind_the_last_are_not_read(last, blocks, padded):
    q, k, v = (Keys.range(0, 2).normal(name, 3, 150, 16) for name in "qkv")
    q, last = q[:, :, :1], torch.tensor([last])
    visible = torch.arange(150).view(1, 1, 1, -1) != torch.tensor([5, 7]).view(2, 1, 1, 1) if padded else None
    keys = LiveKeys.up_to(last, 150, visible)
    assert keys.num_blocks.item() == blocks
    expected = scaled_dot_product_attention(q, k, v, attn_mask=dense_mask(last, 150, visible))
    torch.testing.assert_close(keys.attend(q, k, v), expected, **TOLERANCE)


def test_layers_are_split_until_every_multiprocessor_has_something_to_do():
    # Of LlamaGen's GPT-XL on a GPU with 132: queries to values, attention's output, feed-forward up and down, logits
    sizes = [(1280, 3840), (1280, 1280), (1280, 2 * 3584), (3584, 1280), (1280, 16384)]
    assert [number_of_parts(*size, processors=132) for size in sizes] == [2, 5, 1, 7, 1]
    assert number_of_parts(100, 64, processors=132) == 1


@torch.no_grad()
def test_split_layers_compute_the_same_with_the_same_parameters():
    block, x = torch.nn.Sequential(torch.nn.Linear(128, 24), SwiGLU(24, 128)), torch.randn(2, 1, 128)
    split = split_layers(block, rows=2, processors=132)
    assert [type(layer) for layer in (split[0], split[1], split[1].down)] == [SplitLinear, JoinedMLP, SplitLinear]
    assert split[0].weight is block[0].weight
    torch.testing.assert_close(split(x), block(x), **TOLERANCE)
    assert split_layers(block, MOST_ROWS + 1, processors=132) is block


@torch.no_grad()
@pytest.mark.parametrize("hooked", ["0", "1", "1.gate", "1.down"])
def test_split_layers_keep_hooks(hooked):
    block, x = torch.nn.Sequential(torch.nn.Linear(128, 24), SwiGLU(24, 128)), torch.randn(2, 1, 128)
    block.get_submodule(hooked).register_forward_hook(lambda layer, inputs, output: 2 * output)
    torch.testing.assert_close(split_layers(block, rows=2, processors=132)(x), block(x), **TOLERANCE)


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_compiled_steps_see_weights_change():
    model, condition = tiny("llama", num_layers=1), labels(0, 1)
    draws = model.sampling_draws(Keys.range(0, 2))
    model.compile_decoding()
    step = model.compiled_step
    for _ in range(2):
        model.compiled_step = None
        expected = model.sample(condition, draws=draws)
        model.compiled_step = step
        assert torch.equal(model.sample(condition, draws=draws), expected)
        with torch.no_grad():
            model.blocks[0].ffn.down.weight.mul_(-3)


def test_compiling_is_refused_where_there_is_no_compiled_step():
    with pytest.raises(ValueError, match="MAR has no compiled decoding"):
        tiny("mar").compile_decoding()


def test_session_refuses_what_does_not_fit():
    model = tiny("llama")
    session = model.start(labels(0, 1), GREEDY)
    ids = token_ids(model, batch=2)
    with pytest.raises(ValueError, match="has 2 rows, the tokens 1"):
        session.append(ids[:1])
    with pytest.raises(ValueError, match="32 is out of range"):
        session.append(torch.full((2, 1), 32))
    session.append(ids[:, :10])
    with pytest.raises(ValueError, match="10 tokens are set and 7 more exceed the 16"):
        session.append(ids[:, :7])
    with pytest.raises(ValueError, match="num_tokens 7 exceeds the 6 positions left"):
        drain(session, 7)
    assert torch.equal(session.tokens, ids[:, :10])


@pytest.mark.parametrize("name", GENERATORS)
def test_random_sampling_asks_for_draws(name):
    with pytest.raises(ValueError, match="needs draws"):
        tiny(name).sample(labels(0))


def test_sampled_ids_can_be_trained_on(setup):
    model, condition = setup
    chunks = list(model.stream(condition, GREEDY))
    ids = torch.cat([chunk.tokens for chunk in chunks], 1)
    for tokens in (ids, model.sample(condition, GREEDY)):
        model(tokens, condition).loss.backward()
    embedded = model.embed_tokens(
        chunks[0].tokens, chunks[0].positions, chunks[1].positions
    )  # a chunk itself is saved for the backward pass
    embedded.sum().backward()


@pytest.mark.parametrize("guided", [False, True])
def test_cache_bytes_are_known_beforehand(setup, guided):
    model, condition = setup
    session = model.start(condition, DecodingOptions(temperature=0, guidance_scale=2.0 if guided else 1.0))
    assert session.kv_cache.nbytes == model.cache_bytes(3, guided=guided)


@pytest.mark.skipif(torch.__version__ < (2, 10), reason="the profiler of torch 2.9 misses some frees")
@pytest.mark.parametrize("options", [GREEDY, DecodingOptions(guidance_scale=2.0, top_k=5)])
def test_steps_keep_no_memory(setup, options):
    model, condition = setup
    draws = model.sampling_draws(Keys.range(0, 3), options)
    chunks = model.stream(condition, options, draws=draws)
    next(chunks)

    def kept(steps: int) -> int:
        """Bytes allocated and not freed meanwhile."""
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            for _ in range(steps):
                next(chunks)
        return sum(event.self_cpu_memory_usage for event in profile.key_averages())

    assert kept(2) > 0  # the last logits; the earlier ones that they replace were allocated before
    assert kept(6) == 0


def test_cache_counts_and_overflows():
    cache = KVCache(num_layers=2, rows=1, num_heads=1, length=4, head_dim=2)
    part = torch.arange(6.0).view(1, 1, 3, 2)
    for layer in cache.layers:
        key, value = layer.append(part, -part)
        assert torch.equal(key, part)
        assert torch.equal(value, -part)
    assert cache.length == 3
    assert cache.nbytes == 2 * 2 * 4 * 2 * 4
    grown = KVCache(num_layers=2, rows=1, num_heads=1, length=4, head_dim=2, shift_dim=3)
    grown.reserve(5)
    assert grown.nbytes == 2 * (2 * 5 * 2 + 3) * 4
    grown.choose(torch.tensor([0, 0, 0]))
    assert grown.nbytes == 3 * 2 * (2 * 5 * 2 + 3) * 4
    with pytest.raises(ValueError, match="holds 4 positions, 5 were asked for"):
        cache.layers[0].append(part[:, :, :2], part[:, :, :2])
    key, _ = cache.layers[0].append(part[:, :, :1] + 10, part[:, :, :1])
    assert key[0, 0, :, 0].tolist() == [0, 2, 4, 10]


def test_token_shift_remembers_across_calls():
    memory = KVCache(1, 2, 1, 4, 2, shift_dim=3).layers[0]
    x = torch.randn(2, 4, 3)
    expected = torch.cat([torch.zeros(2, 1, 3), x[:, :-1]], 1)
    steps = [memory.shift(x[:, :1]), memory.shift(x[:, 1:3]), memory.shift(x[:, 3:])]
    assert torch.equal(torch.cat(steps, 1), expected)


# ---------------------------------------------------------------------------------------------------------------------
# Training


def test_loss_is_the_mean_cross_entropy(setup):
    model, condition = setup
    ids = token_ids(model)
    output = model(ids, condition)
    chosen = output.prediction.log_softmax(-1).gather(-1, ids[..., None])
    torch.testing.assert_close(output.loss, -chosen.mean())
    output.loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", GENERATORS)
def test_condition_is_dropped_by_the_draws(name):
    model, condition = tiny(name), labels(0, 1, 2)
    drop = torch.tensor([0.05, 0.1, 0.95])  # condition_dropout is 0.1
    expected = model(token_ids(model), labels(-1, 1, 2)).loss
    assert torch.equal(model(token_ids(model), condition, draws={"drop": drop}).loss, expected)
    rates = model.training_draws(Keys.range(0, 2000))["drop"] < 0.1
    assert rates.float().mean().item() == pytest.approx(0.1, abs=0.02)


@pytest.mark.parametrize("name", GENERATORS)
def test_sample_weights(name):
    model, condition, ids = tiny(name), labels(0, 1, 2), token_ids(tiny(name))
    weighted = model(ids, condition, weights=torch.tensor([1.0, 0.0, 3.0])).loss
    first, last = (model(ids[i : i + 1], condition[i : i + 1]).loss for i in (0, 2))
    torch.testing.assert_close(weighted, (first + 3 * last) / 4)
    unusable = model(ids, condition, weights=torch.zeros(3)).loss
    unusable.backward()
    assert unusable.item() == 0
    assert all(p.grad.eq(0).all() for p in model.parameters())


def test_dropout_acts_in_training_only():
    model = tiny("llama", token_drop=0.5)
    ids, condition = token_ids(model), labels(0, 1, 2)
    assert torch.equal(model(ids, condition).loss, model(ids, condition).loss)
    model.train()
    assert not torch.equal(model(ids, condition).loss, model(ids, condition).loss)


# ---------------------------------------------------------------------------------------------------------------------
# Specs and conditions


@pytest.mark.parametrize("name", GENERATORS)
@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (TokenSpec(16, None, dim=4, grid=(4, 4)), "continuous latents of 4 channels"),
        (TokenSpec(16, 32, dim=4, depth=2, grid=(4, 4)), "has 2 .residual codes"),
    ],
)
def test_tokens_that_it_cannot_model_are_refused(name, spec, message):
    with pytest.raises(ValueError, match=message):
        tiny(name, spec=spec)


@pytest.mark.parametrize("name", GENERATORS)
@pytest.mark.parametrize(
    ("arguments", "condition", "message"),
    [
        ({}, labels(5), "class label 5 is out of range: this generator knows classes 0..4"),
        ({}, Condition.from_features(torch.zeros(1, 1, 16)), "not text features"),
        ({"num_classes": 0}, labels(0), "takes no class labels"),
        ({"condition_dropout": 0.0}, labels(0, -1), "without a null condition"),
        ({"condition_dropout": 0.0}, Condition.none(1), "without a null condition"),
    ],
)
def test_conditions_that_it_cannot_take_are_refused(name, arguments, condition, message):
    with pytest.raises(ValueError, match=message):
        tiny(name, **arguments).sample(condition, GREEDY)


@pytest.mark.parametrize("name", GENERATORS)
def test_guidance_needs_a_null_class(name):
    model = tiny(name, condition_dropout=0.0)
    assert model.sample(labels(0, 4), GREEDY).shape == (2, 16)
    with pytest.raises(ValueError, match="without a null condition"):
        model.sample(labels(0, 4), DecodingOptions(temperature=0, guidance_scale=2.0))


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        (labels(0), r"takes condition ids \(B, 3\) below 5, not class labels"),
        (Condition.from_ids(torch.zeros(1, 2, dtype=torch.long)), r"must be \(B, 3\)"),
        (Condition.from_ids(torch.tensor([[0, 5, 0]])), "condition id 5 is out of range"),
        (Condition.from_ids(torch.tensor([[0, -1, 0]])), "condition id -1 is out of range"),
    ],
)
def test_condition_tokens_are_checked(condition, message):
    with pytest.raises(ValueError, match=message):
        tiny("vit_vqgan_gpt", condition_length=3).sample(condition, GREEDY)


# ---------------------------------------------------------------------------------------------------------------------
# ViT-VQGAN's transformer


@torch.no_grad()
def test_condition_tokens_see_each_other():
    model = tiny("vit_vqgan_gpt", condition_length=3)
    mask = model.attention_mask(Condition.none(1), 0, 5)[0, 0]
    assert mask.int().tolist() == [[1, 1, 1, 0, 0]] * 3 + [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    assert model.attention_mask(Condition.none(1), 3, 5) is None  # image tokens alone are plainly causal


@pytest.mark.parametrize("bias", ["attn_bias", "mlp_bias"])
def test_layers_without_biases_are_read_from_the_reference(bias):
    case = Case(Path(__file__).parents[1] / "golden" / "cases" / "vit_vqgan_gpt")
    parts = {"attn_bias": ".attn.", "mlp_bias": ".mlp."}
    state = {key: t for key, t in case.state.items() if not (parts[bias] in key and key.endswith(".bias"))}
    model = vistok.from_official(case.model, case.config | {bias: False}, state)
    zeroed = {key: t if key in state else torch.zeros_like(t) for key, t in case.state.items()}
    expected = vistok.from_official(case.model, case.config, zeroed)
    ids, condition = token_ids(model), labels(0, 1, 2)
    torch.testing.assert_close(model.logits(ids, condition), expected.logits(ids, condition))
    with pytest.raises(vistok.checkpoints.CheckpointError, match="missing"):
        vistok.from_official(case.model, case.config, state)

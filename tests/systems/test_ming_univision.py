"""Ming-UniVision: batches, guidance, teacher forcing against sampling, turns in one context, text, experts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from golden.harness import Case
from support.tiny_models import randomise, tiny

import vistok
from vistok.checkpoints import CheckpointError
from vistok.draws import Keys
from vistok.generators.ming_univision import MingOptions, MingUniVision
from vistok.nn.moe import MixtureOfExperts
from vistok.types import Condition, TokenSpec

CASE = Path(__file__).parents[1] / "golden" / "cases" / "mingtok_univision_t2i"
CLOSE = {"rtol": 1e-4, "atol": 1e-4}
OPTIONS = MingOptions(num_steps=3)
EXPERTS = {
    "dim": 32,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "num_experts": 4,
    "experts_per_token": 2,
    "expert_dim": 16,
    "num_shared_experts": 1,
    "max_length": 128,
}


@pytest.fixture(scope="module")
def tokenizer():
    return tiny("mingtok")


@pytest.fixture(params=["plain", "experts"])
def model(request):
    return tiny("ming_univision", **({"backbone": EXPERTS} if request.param == "experts" else {}))


def texts(*rows: list[int]) -> Condition:
    """Texts, padded on the left."""
    length = 5
    ids = torch.tensor([[0] * (length - len(row)) + row for row in rows])
    mask = torch.tensor([[False] * (length - len(row)) + [True] * len(row) for row in rows])
    return Condition.from_ids(ids, mask)


def with_image(condition: Condition) -> Condition:
    image = Keys.range(5, len(condition)).normal("image", 16, 4)
    return Condition.together(condition, Condition.from_given(image))


PROMPTS = ([7, 8, 9], [4, 11], [5, 6, 4, 12, 13])


@torch.no_grad()
@pytest.mark.parametrize("edit", [False, True])
def test_a_batch_of_three_is_three_batches_of_one(model, tokenizer, edit):
    condition = texts(*PROMPTS)
    condition = with_image(condition) if edit else condition
    draws = model.sampling_draws(Keys.range(0, 3))
    together = model.sample(condition, OPTIONS, draws=draws, tokenizer=tokenizer)
    for row, prompt in enumerate(PROMPTS):
        one = Condition.together(texts(prompt), *([condition[row : row + 1].only(["given"])] if edit else []))
        own = {"noise": draws["noise"][row : row + 1]}
        alone = model.sample(one, OPTIONS, draws=own, tokenizer=tokenizer)
        torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-3, atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("drop", [None, 0.01, 0.07])
def test_sampling_reads_what_training_reads(model, tokenizer, drop):
    """In one pass over a whole image each place has the state that sampling draws from, in each row of guidance."""
    condition = with_image(texts(*PROMPTS))
    session = model.start(condition, OPTIONS, draws=model.sampling_draws(Keys.range(0, 3)), tokenizer=tokenizer)
    states = []
    for _ in range(16):
        session.advance()
        states.append(session.hidden)
        next(session.generate(1))
    session.advance()
    states = torch.stack([*states, session.hidden], 1)  # (R * B, N + 1, D)
    features = model.embed_features(tokenizer.semantic_features(session.tokens))
    draws = None if drop is None else torch.full((3,), drop)
    taught = model._image_states(model.prompt(condition, tokenizer), features, draws)
    row = {None: 0, 0.07: 1, 0.01: 2}[drop]  # everything, without the text, without text and image
    torch.testing.assert_close(states.chunk(3)[row], taught, **CLOSE)


@torch.no_grad()
def test_guidance_can_be_set(model, tokenizer):
    condition, draws = with_image(texts(*PROMPTS)), model.sampling_draws(Keys.range(0, 3))

    def sample(**options: float) -> torch.Tensor:
        options = MingOptions(num_steps=3, **options)
        return model.sample(condition, options, draws=draws, tokenizer=tokenizer)

    plain = sample(guidance_scale=1.0, image_guidance_scale=1.0)
    samples = [plain, sample(), sample(guidance_scale=5.0), sample(image_guidance_scale=2.0)]
    samples.append(sample(combination="channel_norm"))
    for i, one in enumerate(samples):
        assert all(not torch.allclose(one, other, atol=1e-4) for other in samples[i + 1 :])
    text_alone = MingOptions(guidance_scale=2.0, image_guidance_scale=2.0).guidance(has_image=True)
    assert text_alone.weights(0, 1) == pytest.approx((2, 0, -1))


@torch.no_grad()
def test_given_latents_take_the_place_of_drawn_ones(model, tokenizer):
    condition, draws = texts(*PROMPTS), model.sampling_draws(Keys.range(0, 3))
    whole = model.sample(condition, OPTIONS, draws=draws, tokenizer=tokenizer)
    session = model.start(condition, OPTIONS, draws=draws, tokenizer=tokenizer)
    session.append(whole[:, :5])
    list(session.generate())
    torch.testing.assert_close(session.tokens, whole, **CLOSE)
    with pytest.raises(ValueError, match="1 latents exceed the 0 places"):
        session.append(whole[:, :1])


@torch.no_grad()
def test_a_second_turn_equals_recomputing_the_whole_context(model, tokenizer):
    """The conditional state of an edit in one context is that of a pass over all that was read and written."""
    first, second = texts([7, 8, 9]), texts([4, 11])
    noises = [Keys.range(seed, 1).normal("noise", 16, 4) for seed in (0, 1)]
    session = model.start(first, OPTIONS, draws={"noise": noises[0]}, tokenizer=tokenizer)
    list(session.generate())
    drawn = session.tokens
    session.turn(second, noises[1])
    assert len(session.guidance.rows) == 3
    list(session.generate())
    session.advance()
    marks = [model.embedding.weight[mark].view(1, 1, -1) for mark in (model.image_start, model.image_end)]
    images = [model.embed_features(tokenizer.semantic_features(tokens)) for tokens in (drawn, session.tokens)]
    read = [model.prompt(condition, tokenizer) for condition in (first, second)]
    prompts = [prompt.embeddings[prompt.valid][None] for prompt in read]
    x = torch.cat([prompts[0], marks[0], images[0], marks[1], prompts[1], marks[0], images[1]], 1)
    count = x.shape[1]
    mask = torch.ones(count, count, dtype=torch.bool).tril()[None, None]
    whole = model.backbone(x, torch.arange(count)[None], mask)
    torch.testing.assert_close(session.hidden[:1], whole[:, -1], **CLOSE)
    logits = session.finish()
    torch.testing.assert_close(logits, model.output(whole[:, -1]), **CLOSE)


@torch.no_grad()
def test_text_goes_on_behind_an_image_and_answers_about_one(model, tokenizer):
    condition = texts(*PROMPTS)
    session = model.start(condition, OPTIONS, draws=model.sampling_draws(Keys.range(0, 3)), tokenizer=tokenizer)
    with pytest.raises(ValueError, match="lacks 16 of its 16 latents"):
        session.finish()
    list(session.generate())
    assert session.write(4).shape == (3, 4)
    asked = with_image(condition)
    answers = model.describe(asked, 6, tokenizer=tokenizer)
    for row, prompt in enumerate(PROMPTS):
        one = Condition.together(texts(prompt), asked[row : row + 1].only(["given"]))
        alone = model.describe(one, 6, tokenizer=tokenizer)  # which stops earlier
        assert torch.equal(alone, answers[row : row + 1, : alone.shape[1]])
        assert (answers[row, alone.shape[1] :] == model.end).all()
    first = model.logits(model.prompt(asked, tokenizer))[:, -1].argmax(-1)
    assert torch.equal(answers[:, 0], first)


def test_bad_input_is_refused_with_the_remedy(tokenizer):
    model = tiny("ming_univision", given_length=0)
    draws = model.sampling_draws(Keys.range(0, 3))
    with pytest.raises(ValueError, match="not given tokens"):
        model.start(with_image(texts(*PROMPTS)), draws=draws, tokenizer=tokenizer)
    with pytest.raises(ValueError, match=r"pass draws=sampling_draws"):
        model.start(texts(*PROMPTS), tokenizer=tokenizer)
    short = tiny(
        "ming_univision",
        backbone={"dim": 32, "num_layers": 1, "num_heads": 4, "num_kv_heads": 2}
        | {"num_experts": 0, "mlp_dim": 16, "max_length": 12},
    )
    with pytest.raises(ValueError, match="exceed the 12 that this model is built for"):
        short.sample(texts(*PROMPTS), OPTIONS, draws=draws, tokenizer=tokenizer)
    other = tiny("ming_univision", feature_dim=8)
    with pytest.raises(ValueError, match="reads features of 8 channels, the tokenizer makes 24"):
        other.start(with_image(texts(*PROMPTS)), draws=draws, tokenizer=tokenizer)
    with pytest.raises(ValueError, match="generates continuous latents"):
        tiny("ming_univision", spec=TokenSpec(16, 32, dim=4))
    with pytest.raises(ValueError, match="image_end 99 is no id of a vocabulary of 24"):
        tiny("ming_univision", image_end=99)
    with pytest.raises(ValueError, match="2 patch marks for 1 features"):
        model.embed_ids(torch.tensor([[model.image_patch] * 2]), torch.zeros(1, 1, 24))
    with pytest.raises(ValueError, match="time_shift must be finite and positive, got 0"):
        MingOptions(time_shift=0)


@torch.no_grad()
@pytest.mark.parametrize("renormalise", [False, True])
def test_experts_of_few_and_of_many_tokens_are_the_same(renormalise):
    moe = randomise(MixtureOfExperts(8, 6, 5, 3, num_shared_experts=2, renormalise=renormalise, num_routers=2))
    x, second = Keys.range(0, 1).normal("x", 40, 8), torch.arange(40)[None] % 3 == 0
    many = moe(x, second)
    few = torch.cat([moe(x[:, i : i + 1], second[:, i : i + 1]) for i in range(40)], 1)
    torch.testing.assert_close(many, few, **CLOSE)
    # By the definition, one expert after another.
    weights, chosen = moe.route(x, second)
    expected = moe.shared(x)
    for expert in range(5):
        share = (weights * (chosen == expert)).sum(-1, keepdim=True)
        hidden = torch.nn.functional.silu(x @ moe.gate[expert].T) * (x @ moe.up[expert].T)
        expected = expected + share * (hidden @ moe.down[expert].T)
    torch.testing.assert_close(many, expected, **CLOSE)
    assert not torch.allclose(moe(x), many, atol=1e-3)


def test_experts_learn():
    moe = randomise(MixtureOfExperts(8, 6, 4, 2, num_routers=2))
    x = Keys.range(0, 1).normal("x", 64, 8)
    moe(x, torch.arange(64)[None] % 2 == 0).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in moe.parameters())


def test_the_published_size_has_the_published_count():
    spec = TokenSpec(256, None, dim=32, grid=(16, 16))
    with torch.device("meta"):
        model = MingUniVision(spec, **MingUniVision.sizes["16b_a3b"])
    head = sum(p.numel() for p in (*model.to_condition.parameters(), *model.flow_head.parameters()))
    assert head / 1e9 == pytest.approx(1.285, abs=0.01)
    whole = sum(p.numel() for p in model.parameters())
    assert (whole - head) / 1e9 == pytest.approx(16.8, abs=0.05)


VARIANTS = {
    "one router": ({"multi_gate": False}, ".mlp.image_gate.", {}),
    "no shared experts": ({"num_shared_experts": 0}, ".shared_experts.", {}),
    "biases": ({"use_qkv_bias": True}, None, {"model.model.layers.{}.attention.query_key_value.bias": (128,)}),
    "plain layers": (
        {"num_experts": 0},
        ".mlp.",
        {
            "model.model.layers.{}.mlp.gate_proj.weight": (96, 64),
            "model.model.layers.{}.mlp.up_proj.weight": (96, 64),
            "model.model.layers.{}.mlp.down_proj.weight": (64, 96),
        },
    ),
}


@pytest.mark.parametrize(("change", "without", "added"), VARIANTS.values(), ids=VARIANTS)
def test_other_language_models_of_the_reference_load(change, without, added):
    case = Case(CASE)
    config = case.config | {"llm_config": case.config["llm_config"] | change}
    state = {
        key: tensor
        for key, tensor in MingUniVision.clean_official(case.state).items()
        if not (without and without in key and ".layers." in key)
    }
    state |= {key.format(layer): torch.randn(shape) for key, shape in added.items() for layer in range(2)}
    model = vistok.from_official(case.model, config, state)
    assert model.logits(model.embed_ids(torch.tensor([[1, 2, 3]]))).isfinite().all()
    with pytest.raises(CheckpointError, match="surplus"):
        vistok.from_official(case.model, config, state | {"model.model.layers.0.other.weight": torch.zeros(1)})

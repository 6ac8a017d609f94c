"""Ming-UniVision: batches, guidance, teacher forcing against sampling, turns in one context, text, experts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from golden.harness import Case
from safetensors.torch import save_file
from support.tiny_models import randomise, tiny

import vistok
from vistok.checkpoints import CheckpointError, convert
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
    """The conditional state of an edit in one context equals that of a pass over all that was read and written."""
    first, second = texts([7, 8, 9]), texts([4, 11])
    noises = [Keys.range(seed, 1).normal("noise", 16, 4) for seed in (0, 1)]
    session = model.start(first, OPTIONS, draws={"noise": noises[0]}, tokenizer=tokenizer)
    list(session.generate())
    drawn = session.tokens
    session.ask(second)
    session.begin_image(OPTIONS.guidance(has_image=True), noises[1])
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
def test_rounds_of_a_batch_are_those_of_each_row(model, tokenizer):
    """Texts of different lengths, answers that end at different words, an image shown in the middle."""
    asked = [texts(*PROMPTS), with_image(texts(*PROMPTS[::-1])), texts([6], [9, 8, 7], [10])]
    noises = [Keys.range(seed, 3).normal("noise", 16, 4) for seed in (0, 1)]

    def talk(rows: slice) -> list[torch.Tensor]:
        session = model.converse(len(PROMPTS[rows]), OPTIONS, tokenizer=tokenizer)
        drawn, said = [], None
        for condition, noise in zip(asked, (noises[0], None, noises[1])):
            session.ask(condition[torch.arange(3)[rows]])
            if noise is None:
                said = session.write(4)
            else:
                drawn.append(session.draw(OPTIONS, {"noise": noise[rows]}))
        return [*drawn, session.finish(), said]

    *together, said = talk(slice(3))
    for row in range(3):
        *alone, alone_said = talk(slice(row, row + 1))
        for own, of_batch in zip(alone, together):
            torch.testing.assert_close(own, of_batch[row : row + 1], rtol=2e-3, atol=2e-3)
        assert torch.equal(alone_said, said[row : row + 1, : alone_said.shape[1]])


@torch.no_grad()
def test_many_rounds_equal_recomputing_the_whole_context(model, tokenizer):
    """An image is shown and changed, something is said, and the image is changed again: in each row of guidance."""
    first, second, third = with_image(texts([7, 8, 9])), texts([4, 11]), texts([5, 6])
    session = model.converse(1, OPTIONS, tokenizer=tokenizer)
    session.ask(first)
    one = session.draw(OPTIONS, {"noise": Keys.range(0, 1).normal("noise", 16, 4)})
    session.ask(second)
    answer = torch.tensor([[7, 9, model.end]])
    session.append_text(answer)
    session.ask(third)
    session.begin_image(OPTIONS.guidance(has_image=session.has_image), Keys.range(1, 1).normal("noise", 16, 4))
    list(session.generate())
    session.advance()
    two = session.tokens

    def image(tokens):
        start, end = (model.embedding.weight[mark].view(1, 1, -1) for mark in (model.image_start, model.image_end))
        return start, model.embed_features(tokenizer.semantic_features(tokens)), end

    prompts = [model.prompt(condition, tokenizer) for condition in (first, second, third)]
    said = [prompt.embeddings[prompt.valid][None] for prompt in prompts]
    parts = [said[0], *image(one), said[1], model.embedding(answer), said[2], *image(two)[:2]]
    ends = torch.tensor([part.shape[1] for part in parts]).cumsum(0).tolist()
    x, count, start = torch.cat(parts, 1), ends[-1], ends[6]
    # Rows of the last image: all; without the last text; without it, earlier images, and all that was replied.
    wish, replies = torch.zeros(2, count, dtype=torch.bool)
    wish[ends[5] + 1 : ends[6] - 2] = True
    replies[1 : 1 + 18] = replies[ends[0] : ends[2]] = replies[ends[4] : ends[5]] = True
    shown = torch.zeros(1, count, dtype=torch.bool)
    shown[0, 2 : 2 + 16] = True
    for row, hidden in enumerate((wish & False, wish, wish | replies)):
        mask = torch.ones(count, count, dtype=torch.bool).tril()
        mask[start:] &= ~hidden
        positions = torch.arange(count)
        positions[start:] -= hidden.sum()
        whole = model.backbone(x, positions[None], mask[None, None], images=shown)
        torch.testing.assert_close(session.hidden[row : row + 1], whole[:, -1], **CLOSE)


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
        alone = model.describe(one, 6, tokenizer=tokenizer)  # alone, it stops earlier
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


WRONG = {
    "role": ({"human": (99,)}, "human 99 is no id of a vocabulary of 24"),
    "two marks": ({"image_start": 20, "image_end": 20}, "marks need ids of their own, got image_start 20"),
    "weight": ({"text_weight": -1.0}, "text_weight must be finite and at least 0, got -1"),
    "layers": ({"num_projection_layers": 0}, "num_projection_layers must be finite and at least 1, got 0"),
}


def test_a_start_reads_the_statistics_of_the_tokenizer_once(tokenizer, monkeypatch):
    model, reads = tiny("ming_univision"), []
    kind = type(tokenizer)
    monkeypatch.setattr(kind, "latent_statistics", property(lambda self: reads.append(self) or {}))  # else synchronises
    model.start(texts([7]), OPTIONS, draws=model.sampling_draws(Keys.range(0, 1)), tokenizer=tokenizer)
    assert len(reads) == 1


@pytest.mark.parametrize("what", WRONG)
def test_models_that_cannot_be_are_refused(what):
    arguments, message = WRONG[what]
    with pytest.raises(ValueError, match=message):
        tiny("ming_univision", **arguments)


REFUSED = {
    "rows": (lambda s, m: s.ask(texts([7])), "the session has 2 rows, the condition 1; take as many"),
    "rows of noise": (lambda s, m: s.draw(OPTIONS, {"noise": torch.zeros(3, 16, 4)}), "2 rows, the noise 3"),
    "length": (lambda s, m: s.draw(OPTIONS, {"noise": torch.zeros(2, 9, 4)}), r"noise must be \(B, 16, 4\), got"),
    "more noise": (lambda s, m: s.draw(OPTIONS, {"noise": torch.zeros(2, 17, 4)}), r"\(B, 16, 4\), got \(2, 17, 4\)"),
    "noise": (lambda s, m: s.draw(OPTIONS, {}), r"pass draws=sampling_draws"),
    "shown": (lambda s, m: s.append_image(torch.zeros(2, 9, 4)), "has 16 latents, got 9; resize it"),
    "shown ids": (
        lambda s, m: s.append_image(torch.zeros(2, 16, dtype=torch.int64)),
        "are these ids of another tokenizer",
    ),
    "word": (lambda s, m: s.append_text(torch.tensor([[1], [99]])), "id 99 is not in the vocabulary of 24"),
    "words": (lambda s, m: s.append_text(torch.zeros(2, 3)), r"ids must be \(B, n\) integers"),
    "rows of words": (lambda s, m: s.append_text(torch.tensor([[1]])), "2 rows, the ids 1"),
    "places": (lambda s, m: list(s.generate(1)), "the image has 0 places left"),
    "nothing": (lambda s, m: m.describe(Condition.none(2), 3, tokenizer=tiny("mingtok")), "nothing to describe"),
    "ids": (lambda s, m: m.embed_ids(torch.tensor([[-1]])), "id -1 is not in the vocabulary"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_bad_turns_are_refused_and_leave_the_session_as_it_was(tokenizer, what):
    call, message = REFUSED[what]
    model = tiny("ming_univision")
    sessions = [model.converse(2, OPTIONS, tokenizer=tokenizer) for _ in range(2)]
    for session in sessions:
        session.ask(texts([7, 8], [9]))
    with pytest.raises(ValueError, match=message):
        call(sessions[0], model)
    a, b = (session.draw(OPTIONS, model.sampling_draws(Keys.range(0, 2))) for session in sessions)
    assert torch.equal(a, b)
    with pytest.raises(ValueError, match="nothing was asked"):
        model.converse(1, OPTIONS, tokenizer=tokenizer).append_text(torch.tensor([[1]]))
    with pytest.raises(ValueError, match="at least one row, got 0"):
        model.converse(0, OPTIONS, tokenizer=tokenizer)


@torch.no_grad()
def test_smaller_images_are_padded_and_read_as_they_are(tokenizer):
    """Padding before an image does not change its features; rows of different image sizes can share a batch."""
    model = tiny("ming_univision", given_length=20)
    images = Keys.range(5, 2).normal("image", 16, 4)
    sizes, rows, masks = (16, 9), torch.zeros(2, 20, 4), torch.zeros(2, 20, dtype=torch.bool)
    for row, size in enumerate(sizes):
        rows[row, -size:], masks[row, -size:] = images[row, :size], True
    prompt = model.prompt(Condition.from_given(rows, masks), tokenizer)
    for row, size in enumerate(sizes):
        features = model.embed_features(tokenizer.semantic_features(images[row : row + 1, :size]))
        read = prompt.embeddings[row, prompt.images[row] & prompt.valid[row]]
        torch.testing.assert_close(read[None], features, **CLOSE)


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


def test_a_third_router_would_route_no_tokens():
    with pytest.raises(ValueError, match="num_routers must be 1 or 2, got 3"):
        MixtureOfExperts(8, 6, 4, 2, num_routers=3)


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


def test_shards_with_their_index_hold_the_model_and_its_tokenizer(tmp_path):
    case = Case(CASE)
    names = {key: f"model-{1 + number % 3:05d}-of-00003.safetensors" for number, key in enumerate(case.state)}
    for name in set(names.values()):
        save_file({key: tensor for key, tensor in case.state.items() if names[key] == name}, tmp_path / name)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": names}))
    model, tokenizer = (
        convert(case.model, index, case.config),
        convert("mingtok/tokenizer", index, case.config["mingtok"]),
    )
    own = MingUniVision.clean_official(case.state)
    assert model.fingerprint() == vistok.from_official(case.model, case.config, own).fingerprint()
    assert torch.equal(tokenizer.encoder.class_token, case.state["vision.low_level_encoder.cls_token"])
    prompt = Condition.from_given(torch.zeros(1, 1024, 8), torch.arange(1024)[None] >= 1024 - 9)
    assert model.describe(prompt, 2, tokenizer=tokenizer).shape[0] == 1

"""The masked generator: its networks, its schedule, and the tokens that sampling keeps."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tiny_models import labels, tiny, token_ids

from vistok.draws import Keys
from vistok.generators.maskgit.networks import Bert
from vistok.generators.maskgit.sampling import MaskGITOptions, masked_share

OPTIONS = MaskGITOptions(num_steps=4, temperature=2.0)


def draws(model, batch: int = 3, options: MaskGITOptions = OPTIONS, seed: int = 0):
    return model.sampling_draws(Keys.range(seed, batch), options)


def test_bert_is_that_of_transformers():
    pytest.importorskip("transformers")
    from transformers import BertConfig, BertModel

    from vistok.checkpoints import load_strictly
    from vistok.generators.maskgit.official import our_names

    config = BertConfig(
        vocab_size=20,
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=40,
        max_position_embeddings=9,
        attn_implementation="eager",
    )
    theirs = BertModel(config, add_pooling_layer=False).eval()
    sizes = {"vocabulary": 20, "length": 9, "dim": 16, "num_layers": 3, "num_heads": 2, "mlp_dim": 40}
    ours = Bert(**sizes, attn_drop=0.0, proj_drop=0.0).eval()
    state = our_names({f"model.{key}": value for key, value in theirs.state_dict().items()})
    load_strictly(ours, {key.removeprefix("network."): value for key, value in state.items()})
    ids = torch.randint(20, (2, 9), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(ours(ids), theirs(ids).last_hidden_state, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("network", ["bert", "uvit"])
def test_tokens_see_each_other_in_both_directions(network):
    model, condition = tiny("maskgit", network=network), labels(0, 1, 2)
    rows, ids = model.class_rows(condition), token_ids(model)
    other = ids.clone()
    other[:, 7] = (other[:, 7] + 1) % 32
    changed = (model.predict(ids, rows) - model.predict(other, rows)).abs().amax((0, 2))
    assert (changed > 0).all()


def test_an_odd_uvit_is_refused():
    with pytest.raises(ValueError, match="must be even"):
        tiny("maskgit", network="uvit", num_layers=3)


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 20), st.integers(0, 2**31))
def test_every_token_is_settled_once(steps, seed):
    model, options = tiny("maskgit"), MaskGITOptions(num_steps=steps, temperature=2.0)
    session = model.start(labels(0, 1), options, draws=draws(model, 2, options, seed))
    times = torch.zeros(2, 16, dtype=torch.int64)
    for chunk in session.generate():
        assert torch.equal(session.tokens[chunk.valid], chunk.tokens[chunk.valid])
        times += chunk.valid
    assert (times == 1).all()
    model.spec.check_ids(session.tokens)


def test_the_schedule_is_that_of_arccos():
    assert masked_share(0.0) == 1
    assert masked_share(1.0) == 0
    assert masked_share(0.5) == pytest.approx(2 / 3)
    model = tiny("maskgit")
    session = model.start(labels(0), MaskGITOptions(num_steps=4, temperature=0.0))
    settled = [int(chunk.valid.sum()) for chunk in session.generate()]
    left = [int(16 * masked_share(k / 4)) for k in range(1, 4)]
    assert settled == [16 - left[0], left[0] - left[1], left[1] - left[2], left[2]]


def test_without_temperature_the_most_confident_tokens_come_first():
    model = tiny("maskgit")
    session = model.start(labels(0), MaskGITOptions(num_steps=4, temperature=0.0))
    logits = model.predict(torch.full((1, 16), model.mask_id), model.class_rows(labels(0)))
    first = next(iter(session.generate()))
    best = logits.amax(-1)[0].topk(int(first.valid.sum())).indices
    assert set(best.tolist()) == set(first.valid[0].nonzero()[:, 0].tolist())
    assert torch.equal(first.tokens[first.valid], logits.argmax(-1)[first.valid])


def test_a_sample_does_not_depend_on_its_batch():
    model = tiny("maskgit")
    guided = MaskGITOptions(num_steps=4, temperature=2.0, guidance_scale=3.0)
    whole = model.sample(labels(0, 1, 2), guided, draws=draws(model))
    alone = model.sample(labels(1), guided, draws=model.sampling_draws(Keys.of(0, [1]), guided))
    assert torch.equal(whole[1:2], alone)


@pytest.mark.parametrize(
    ("schedule", "first", "last"), [("constant", 4, 4), ("linear-done", 1, 3.25), ("power-cosine", 1, 3.56)]
)
def test_guidance_schedules(schedule, first, last):
    options = MaskGITOptions(num_steps=4, guidance_scale=4.0, guidance_schedule=schedule)
    assert options.guidance.weights(0, 4)[0] == pytest.approx(first)
    assert options.guidance.weights(3, 4)[0] == pytest.approx(last, abs=0.01)


def test_edited_tokens_change_where_asked_and_nowhere_else():
    model = tiny("maskgit")
    tokens = token_ids(model)
    regenerate = torch.arange(16) < torch.tensor([[4], [0], [16]])
    edited = model.edit(tokens, regenerate, labels(0, 1, 2), OPTIONS, draws=draws(model))
    assert torch.equal(edited[~regenerate], tokens[~regenerate])
    assert not torch.equal(edited[regenerate], tokens[regenerate])


def test_known_tokens_stay_and_the_session_goes_on_from_them():
    model = tiny("maskgit")
    session = model.start(labels(0, 1), OPTIONS, draws=draws(model, 2))
    session.append(torch.tensor([[3, 4], [5, 6]]), torch.tensor([[0, 9], [2, 3]]))
    session.append(torch.tensor([[7], [8]]))
    for _ in session.generate(5):
        pass
    for _ in session.generate():
        pass
    tokens = session.tokens
    assert tokens[0, [0, 9, 1]].tolist() == [3, 4, 7]
    assert tokens[1, [2, 3, 0]].tolist() == [5, 6, 8]
    with pytest.raises(ValueError, match="set already"):
        session.append(torch.tensor([[3], [3]]), torch.tensor([0]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"num_steps": 0}, "num_steps"), ({"temperature": -1.0}, "temperature"), ({"guidance_schedule": "up"}, "'up'")],
)
def test_options_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        MaskGITOptions(**arguments)


def test_training_masks_at_least_one_token_and_all_of_them_at_times():
    model = tiny("maskgit")
    masked = model.training_draws(Keys.range(0, 500))["masked"].sum(1)
    assert masked.min() >= 1
    assert masked.max() == 16
    assert masked.float().mean().item() == pytest.approx(16 * 2 / torch.pi, abs=1)  # the mean of arccos is 1


def test_unmasked_tokens_do_not_count():
    model, tokens = tiny("maskgit"), token_ids(tiny("maskgit"))
    masked = torch.zeros(3, 16, dtype=torch.bool)
    masked[:, :2] = True
    output = model(tokens, labels(0, 1, 2), draws={"masked": masked})
    expected = torch.nn.functional.cross_entropy(
        output.prediction[:, :2].flatten(0, 1), tokens[:, :2].flatten(), label_smoothing=0.1
    )
    torch.testing.assert_close(output.loss, expected)
    with pytest.raises(ValueError, match="masks are random"):
        model(tokens, labels(0, 1, 2))

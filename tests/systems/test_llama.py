"""Llama: captions, positions, sizes."""

from __future__ import annotations

import pytest
import torch
from support.tiny_models import CAPTIONS, RASTER, captions, labels, tiny, token_ids

from vistok.draws import Keys
from vistok.generators.engine.sampling import DecodingOptions
from vistok.generators.llama import Llama, position_table
from vistok.nn.positions import sincos_1d
from vistok.nn.rotary import rotation_table
from vistok.types import Condition, TokenSpec


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        (labels(0), "not class labels"),
        (Condition.from_ids(torch.zeros(1, 5, dtype=torch.long)), "not condition ids"),
        (Condition.from_features(torch.zeros(1, 4, 6)), r"must be \(B, 5, 6\), padded on the left, got \(1, 4, 6\)"),
    ],
)
def test_captions_are_checked(condition, message):
    with pytest.raises(ValueError, match=message):
        tiny("llama", **CAPTIONS).sample(condition, DecodingOptions(temperature=0))


@torch.no_grad()
def test_padding_of_a_caption_is_not_seen():
    model, condition = tiny("llama", **CAPTIONS), captions()
    ids = token_ids(model)
    before = model.logits(ids, condition)
    padding = ~condition.mask[..., None]
    changed = Condition.from_features(condition.features + 100 * padding, condition.mask)
    assert torch.equal(model.logits(ids, changed), before)
    changed = Condition.from_features(condition.features + ~padding, condition.mask)
    assert not torch.allclose(model.logits(ids, changed), before, atol=1e-3)


def test_caption_mask_is_causal_without_padding_and_never_empty():
    model = tiny("llama", caption_dim=6, caption_length=3)
    condition = Condition.from_features(torch.zeros(2, 3, 6), torch.tensor([[0, 0, 1], [1, 1, 1]]))
    mask = model.attention_mask(condition, 0, 5)[:, 0].int()
    padded = [[1, 0, 0, 0, 0], [0, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 1, 1, 1]]
    assert mask.tolist() == [padded, torch.ones(5, 5).tril().int().tolist()]
    assert torch.equal(model.attention_mask(condition, 2, 4)[:, 0].int(), mask[:, 2:4, :4])


def test_null_caption_is_saved_and_never_trained():
    model = tiny("llama", **CAPTIONS)
    assert "null_caption" in model.state_dict()
    assert not [name for name, _ in model.named_parameters() if "null" in name]


def test_rotation_of_a_raster_is_by_row_then_column_and_absent_for_the_condition():
    spec = TokenSpec(6, 8, dim=4, grid=(2, 3))
    table = position_table(spec, 2, 8, "rope2d", 10000.0)
    assert table.cos.shape == (8, 4)
    assert table.at(slice(2)).cos.eq(0).all()
    assert table.at(slice(2)).sin.eq(0).all()
    axis = rotation_table(torch.arange(3)[:, None], 4)  # two pairs
    for row in range(2):
        for column in range(3):
            here = table.at(torch.tensor(2 + 3 * row + column))
            assert torch.equal(here.sin, torch.cat([axis.sin[row], axis.sin[column]]))
            assert torch.equal(here.cos, torch.cat([axis.cos[row], axis.cos[column]]))


def test_rotation_of_a_sequence_starts_at_the_condition():
    spec = TokenSpec(7, 8, dim=4)
    table = position_table(spec, 1, 8, "rope1d", 100.0)
    angles = torch.arange(8.0)[:, None] * 100.0 ** (-torch.arange(4) / 4)
    torch.testing.assert_close(table.cos, angles.cos())
    torch.testing.assert_close(table.sin, angles.sin())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"spec": TokenSpec(10, 32, dim=4)}, "needs tokens on an image raster.*positions='rope1d'"),
        ({"spec": TokenSpec(16, 32, dim=4, grid=(4, 2, 2))}, "needs tokens on an image raster"),
        ({"num_heads": 8}, "head_dim 2 must be divisible by 4"),
        ({"num_heads": 3}, "dim 16 is not divisible by num_heads 3"),
        ({"positions": "rope"}, "'rope2d', 'rope1d', 'learned' or 'sincos', got 'rope'"),
    ],
)
def test_llama_that_cannot_be_built_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny("llama", **arguments)


def test_square_sequences_need_no_grid():
    assert torch.equal(
        tiny("llama", spec=TokenSpec(16, 32, dim=4)).rotation.cos, tiny("llama", spec=RASTER).rotation.cos
    )


def test_rotation_keeps_its_precision_when_the_model_is_cast():
    model = tiny("llama")
    precise = model.rotation.cos.clone()
    model = model.to(torch.bfloat16)
    assert model.output.weight.dtype == torch.bfloat16
    assert torch.equal(model.rotation.cos, precise)
    assert "rotation.cos" not in model.state_dict()
    draws = model.sampling_draws(Keys.range(0, 2))
    assert model.sample(labels(0, 1), DecodingOptions(guidance_scale=2.0), draws=draws).shape == (2, 16)


@pytest.mark.parametrize(
    ("size", "millions"), [("B", 110.9), ("L", 342.9), ("XL", 774.7), ("XXL", 1411.0), ("3B", 3096.7)]
)
def test_sizes_have_the_published_parameters(size, millions):
    spec = TokenSpec(256, 16384, dim=8, grid=(16, 16))
    with torch.device("meta"):
        model = Llama(spec, **Llama.sizes[size])
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.1)


def test_logits_start_uniform():
    model = Llama(RASTER, num_classes=5, dim=16, num_layers=1, num_heads=2)
    loss = model(token_ids(model), labels(0, 1, 2)).loss
    assert loss.item() == pytest.approx(torch.tensor(32.0).log().item())


@pytest.mark.parametrize("positions", ["rope1d", "learned"])
def test_plain_sequences_are_sampled_as_they_are_trained(positions):
    model = tiny("llama", spec=TokenSpec(10, 32, dim=4), positions=positions)
    ids = model.sample(labels(1, 2), DecodingOptions(temperature=0))
    assert torch.equal(model.logits(ids, labels(1, 2)).argmax(-1), ids)
    # Positions matter: the same ids in another order are no permutation of the same logits.
    same = torch.full((1, 10), 3)
    assert len(model.logits(same, labels(1))[0].unique(dim=0)) == 10


# ---------------------------------------------------------------------------------------------------------------------
# Fewer heads of keys and values, norms of queries and keys, added positions, features


@torch.no_grad()
def test_fewer_heads_of_keys_and_values_are_shared_by_their_neighbours():
    few, many = tiny("llama", num_heads=4, num_kv_heads=2), tiny("llama", num_heads=4)
    state = few.state_dict()
    for index in range(len(few.blocks)):
        name = f"blocks.{index}.attn.qkv.weight"
        q, k, v = state[name].split((16, 8, 8))
        # Heads of 4 channels; each of the two becomes two in a row.
        state[name] = torch.cat(
            [q, *(part.unflatten(0, (2, 4)).repeat_interleave(2, 0).flatten(0, 1) for part in (k, v))]
        )
    many.load_state_dict(state)
    ids = token_ids(few)
    torch.testing.assert_close(few.logits(ids, labels(0, 1, 2)), many.logits(ids, labels(0, 1, 2)))
    assert few.cache_bytes(1, guided=False) == many.cache_bytes(1, guided=False) // 2


VARIANTS = {
    "shared heads": {"num_heads": 4, "num_kv_heads": 2},
    "shared heads, one axis": {"num_heads": 4, "num_kv_heads": 1, "positions": "rope1d"},
    "norms": {"qk_norm": True},
    "learned": {"positions": "learned"},
    "as few as are fed": {"positions": "learned", "num_positions": 16},
    "sines": {"positions": "sincos"},
    "positions kept": {"positions": "learned", "drop_before_positions": True},
}


@pytest.mark.parametrize("arguments", VARIANTS.values(), ids=VARIANTS)
@torch.no_grad()
def test_cached_sampling_agrees_with_teacher_forcing(arguments):
    model = tiny("llama", **arguments)
    condition = labels(0, 3)
    ids = model.sample(condition, DecodingOptions(temperature=0))
    assert torch.equal(model.logits(ids, condition).argmax(-1), ids)


def test_positions_are_dropped_with_the_tokens_or_kept():
    ids = token_ids(tiny("llama"))
    for before in (True, False):
        model = tiny("llama", positions="learned", token_drop=0.999999, drop_before_positions=before).train()
        x = model.dropout(model.token_embedding(ids))
        assert not x.any()
        hidden = model.hidden_states(ids, labels(0, 1, 2), 1)
        alike = torch.allclose(hidden[0, 1:], hidden[0, :1].expand(15, -1))
        assert alike is not before


def test_fixed_positions_are_sines():
    model = tiny("llama", positions="sincos")
    assert "positions" not in dict(model.named_parameters())
    torch.testing.assert_close(model.positions[:, :8], sincos_1d(torch.arange(17), 16).float()[:, :8])


def test_learned_positions_start_with_the_deviation_that_was_asked_for():
    spec = TokenSpec(4095, 8, dim=4)
    model = Llama(spec, dim=16, num_layers=1, num_heads=2, positions="learned", position_std=0.25)
    assert model.positions.shape == (4096, 16)
    assert model.positions.std().item() == pytest.approx(0.25, rel=0.05)


@torch.no_grad()
def test_hidden_states_of_the_last_block_give_the_logits():
    model, condition = tiny("llama"), labels(0, 1, 2)
    ids = token_ids(model)
    hidden = model.hidden_states(ids, condition, len(model.blocks))
    torch.testing.assert_close(model.head(hidden), model.logits(ids, condition))
    assert not torch.allclose(model.hidden_states(ids, condition, 1), hidden)
    with pytest.raises(ValueError, match=r"blocks 1\.\.2, got 3"):
        model.hidden_states(ids, condition, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_kv_heads": 3}, "num_kv_heads 3 must divide num_heads 2"),
        (
            {"positions": "learned", "num_positions": 15},
            r"num_positions is 15, but the sequence has 16 positions that are fed",
        ),
    ],
)
def test_arguments_that_do_not_fit_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny("llama", **arguments)

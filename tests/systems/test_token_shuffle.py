"""Token-Shuffle: folding, causality, the text before the image, its loss, and steps of whole windows."""

from __future__ import annotations

import math

import pytest
import torch
from support.tiny_models import labels, tiny, token_ids

from vistok.draws import Keys
from vistok.generators.engine.sampling import DecodingOptions
from vistok.generators.token_shuffle import SIZES, TokenShuffle, TokenShuffleOptions
from vistok.nn.windows import window_members
from vistok.types import Condition, TokenSpec

GREEDY = TokenShuffleOptions(temperature=0.0)
WIDE = TokenSpec(32, 32, dim=4, grid=(4, 8))
TEXT = {"num_classes": 0, "text_vocabulary": 9, "text_length": 3}


def texts() -> Condition:
    """Three texts of 3, 2 and 0 tokens."""
    mask = torch.tensor([[1, 1, 1], [0, 1, 1], [1, 1, 1]]).bool()
    ids = torch.tensor([[1, 2, 3], [0, 4, 5], [0, 0, 0]])
    return Condition.from_ids(ids, mask).drop(torch.tensor([False, False, True]))


# ---------------------------------------------------------------------------------------------------------------------
# Windows


@pytest.mark.parametrize("size", [1, 2, 4])
def test_folding_is_a_bijection(size):
    height, width = 4, 8
    members = window_members(height * width, (height, width), size)
    assert members.shape == (height * width // size**2, size**2)
    assert torch.equal(members.flatten().sort().values, torch.arange(height * width))
    for window, row in enumerate(members.tolist()):
        for slot, place in enumerate(row):
            y, x = divmod(place, width)
            assert window == (y // size) * (width // size) + x // size
            assert slot == (y % size) * size + x % size


def test_channels_lie_slot_by_slot():
    model = tiny("token_shuffle", spec=WIDE, window=2, num_fusion_blocks=0)
    torch.nn.init.zeros_(model.fold.compress.bias)
    torch.nn.init.eye_(model.fold.compress.weight)  # the first 4 of 16 channels
    model.embedding.weight.data.abs_()
    ids = token_ids(model)
    folded = model.embed_windows(ids[:, model.members])
    embedded = torch.nn.functional.gelu(model.embedding(model.vocabulary.joint(ids, "image"))[..., :4])
    for place in range(32):
        y, x = divmod(place, 8)
        slot = (y % 2) * 2 + x % 2
        torch.testing.assert_close(folded[:, (y // 2) * 4 + x // 2, 4 * slot : 4 * slot + 4], embedded[:, place])


@pytest.mark.parametrize(("window", "steps"), [(1, 32), (2, 8), (4, 2)])
def test_shapes_and_steps(window, steps):
    model = tiny("token_shuffle", spec=WIDE, window=window)
    ids, condition = token_ids(model), labels(0, 1, 2)
    assert model.logits(ids, condition).shape == (3, 32, model.vocabulary.size)
    assert model.num_entries == 1 + 1 + 1 + steps  # begin, class, begin of image, windows
    chunks = list(model.stream(condition, GREEDY))
    assert len(chunks) == steps
    assert all(chunk.tokens.shape == (3, window**2) for chunk in chunks)
    places = torch.cat([chunk.positions for chunk in chunks], 1)
    assert torch.equal(places.sort(1).values, torch.arange(32).expand(3, -1))


def test_parameters_of_the_published_size():
    with torch.device("meta"):
        spec = TokenSpec(4096, 16384, dim=8, grid=(64, 64))
        made = {
            window: TokenShuffle(spec, text_vocabulary=32000, text_length=256, window=window, **SIZES["2.7B"])
            for window in (1, 2)
        }
    counts = {window: sum(p.numel() for p in model.parameters()) for window, model in made.items()}
    assert 2.65e9 < counts[2] < 2.75e9
    dim, part = 3072, 3072 // 4
    linears, residual = 2 * dim * part + part + dim, 4 * (2 * dim * 2 * dim + dim)
    assert counts[2] - counts[1] == linears + residual


# ---------------------------------------------------------------------------------------------------------------------
# What sees what


@torch.no_grad()
@pytest.mark.parametrize("window", [1, 2])
def test_windows_see_those_before_them_and_not_themselves(window):
    model = tiny("token_shuffle", spec=WIDE, window=window)
    ids, condition = token_ids(model), labels(0, 1, 2)
    before = model.logits(ids, condition)[:, model.members]  # (B, M, s^2, V)
    for changed in (0, 3, model.num_windows - 1):
        other = ids.clone()
        other[:, model.members[changed, -1]] = (other[:, model.members[changed, -1]] + 1) % 32
        after = model.logits(other, condition)[:, model.members]
        assert torch.equal(after[:, : changed + 1], before[:, : changed + 1])
        if changed + 1 < model.num_windows:
            assert not torch.allclose(after[:, changed + 1], before[:, changed + 1])


@torch.no_grad()
def test_every_window_sees_the_text_and_none_its_padding():
    model, ids, condition = tiny("token_shuffle", **TEXT), torch.zeros(3, 16, dtype=torch.int64), texts()
    before = model.logits(ids, condition)
    changed = condition.ids.clone()
    changed[0, 0], changed[1, 0], changed[2] = 7, 7, 7  # the first row's is valid
    after = model.logits(ids, Condition.from_ids(changed, condition.part("ids").mask).drop(condition.dropped))
    assert not torch.isclose(after[0], before[0]).all(-1).any()
    assert torch.equal(after[1:], before[1:])


@torch.no_grad()
def test_a_text_is_the_same_wherever_its_padding_ends():
    model, longer = tiny("token_shuffle", **TEXT), tiny("token_shuffle", **TEXT | {"text_length": 6})
    ids, condition = token_ids(model), texts()
    padding = torch.zeros(3, 3, dtype=torch.int64)
    mask = torch.cat([padding.bool(), condition.part("ids").mask], 1)
    wide = Condition.from_ids(torch.cat([padding, condition.ids], 1), mask).drop(condition.dropped)
    torch.testing.assert_close(longer.logits(ids, wide), model.logits(ids, condition))


def test_without_a_text_the_sequence_begins_with_two_marks():
    model = tiny("token_shuffle", **TEXT)
    prefix, valid = model.prefix(texts())
    begin, image = (model.vocabulary.special(name) for name in ("begin", "begin_image"))
    rows = [row[mask].tolist() for row, mask in zip(prefix, valid)]
    assert rows == [[begin, 1, 2, 3, image], [begin, 4, 5, image], [begin, image]]
    assert torch.equal(model.prefix(Condition.none(3))[0][:, -2:], torch.tensor([[begin, image]] * 3))


def test_a_class_and_a_text_stand_together():
    model = tiny("token_shuffle", **TEXT | {"num_classes": 5})
    both = Condition.together(labels(4, 0, 1), texts())
    prefix, valid = model.prefix(both.without(["labels"], torch.tensor([False, True, False])))
    assert prefix[0][valid[0]].tolist()[1:-1] == [4, 6, 7, 8]
    assert prefix[1][valid[1]].tolist()[1:-1] == [9, 10]
    assert prefix[2][valid[2]].tolist()[1:-1] == [1]


# ---------------------------------------------------------------------------------------------------------------------
# A window of one token is the plain model


@torch.no_grad()
def test_windows_of_one_are_next_token_prediction():
    model, ids, condition = tiny("token_shuffle", window=1), None, labels(0, 4, 2)
    ids = token_ids(model)
    sequence = torch.cat([model.prefix(condition)[0], model.vocabulary.joint(ids, "image")], 1)[:, :-1]
    x, rotation = model.embedding(sequence), model.rotation(slice(0, sequence.shape[1]))
    for block in model.blocks:
        x = block(x, rotation, None, None)
    expected = model.output(model.norm(x))[:, -16:]
    torch.testing.assert_close(model.logits(ids, condition), expected)
    loss = torch.nn.functional.cross_entropy(expected.flatten(0, 1), model.vocabulary.joint(ids, "image").flatten())
    torch.testing.assert_close(model(ids, condition).metrics["image_loss"], loss)


# ---------------------------------------------------------------------------------------------------------------------
# Loss


def test_the_loss_is_the_mean_over_ids():
    model = tiny("token_shuffle", text_weight=0.0)
    ids, condition = token_ids(model), labels(0, 1, 2)
    output = model(ids, condition)
    terms = -output.prediction.log_softmax(-1).gather(2, model.vocabulary.joint(ids, "image")[..., None])
    torch.testing.assert_close(output.loss, terms.mean())
    torch.nn.init.zeros_(model.output.weight)
    torch.testing.assert_close(model(ids, condition).loss, torch.tensor(math.log(model.vocabulary.size)))


def test_text_and_z_loss_are_added():
    plain, all_terms = (tiny("token_shuffle", **TEXT, text_weight=w, z_loss=z) for w, z in ((0.0, 0.0), (0.5, 0.1)))
    ids = token_ids(plain)
    output = all_terms(ids, texts())
    expected = plain(ids, texts()).loss + 0.5 * output.metrics["text_loss"] + 0.1 * output.metrics["z_loss"]
    torch.testing.assert_close(output.loss, expected)
    assert (output.metrics["z_loss"] - output.prediction.logsumexp(-1).square().mean()).abs() < 1e-4


def test_fusion_starts_as_the_pure_fold():
    torch.manual_seed(0)
    sizes = {"dim": 16, "num_layers": 1, "num_heads": 2, "multiple_of": 16}
    deep = TokenShuffle(WIDE, 5, num_fusion_blocks=2, **sizes)
    shallow = TokenShuffle(WIDE, 5, num_fusion_blocks=0, **sizes)
    shallow.load_state_dict(deep.state_dict(), strict=False)
    ids = token_ids(deep)
    assert torch.equal(deep.logits(ids, labels(0, 1, 2)), shallow.logits(ids, labels(0, 1, 2)))


# ---------------------------------------------------------------------------------------------------------------------
# Sampling


@pytest.mark.parametrize("window", [1, 2])
def test_steps_do_not_read_the_text_again(window, monkeypatch):
    model, reads = tiny("token_shuffle", window=window, **TEXT), []
    prefix = model.prefix
    monkeypatch.setattr(model, "prefix", lambda condition: reads.append(condition) or prefix(condition))
    session = model.start(texts(), GREEDY)
    begun = len(reads)
    list(session.generate())
    assert len(reads) == begun


@torch.no_grad()
@pytest.mark.parametrize("window", [1, 2, 4])
@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_cached_windows_follow_teacher_forced_logits(window, scale):
    model, condition = tiny("token_shuffle", window=window, **TEXT), texts()
    options = TokenShuffleOptions(temperature=0.0, guidance_scale=scale)
    ids = model.sample(condition, options)
    first, stop = model.vocabulary.span("image")
    conditional, null = (model.logits(ids, c)[..., first:stop] for c in (condition, condition.null()))
    guided = conditional.clone()
    for step, places in enumerate(model.members):
        s = 1 + (scale - 1) * min(1, step / (model.num_windows / 2))
        guided[:, places] = null[:, places] + s * (conditional[:, places] - null[:, places])
    chosen = guided.gather(2, ids[..., None])[..., 0]
    assert (guided.amax(-1) - chosen).max() < 1e-4


def test_the_same_seed_gives_the_same_image_in_any_batch():
    model = tiny("token_shuffle")
    whole = model.sample(labels(0, 1, 2), draws=model.sampling_draws(Keys.range(0, 3)))
    one = model.sample(labels(1), draws=model.sampling_draws(Keys.range(0, 1, 1)))
    assert torch.equal(whole[1:2], one)
    assert TokenShuffleOptions().guidance_schedule == "half-linear"
    assert DecodingOptions().guidance_schedule == "constant"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"spec": TokenSpec(30, 32, dim=4, grid=(5, 6))}, r"window 2 does not divide the token grid \(5, 6\)"),
        ({"spec": TokenSpec(16, 32, dim=4)}, "does not divide the token grid None"),
        ({"window": 3}, r"window 3 does not divide the token grid \(4, 4\)"),
        ({"window": 0}, "window must be a whole number of at least 1, got 0"),
        ({"window": 2.0}, "window must be a whole number of at least 1, got 2.0"),
        ({"window": 4, "dim": 24}, "dim 24 must be divisible by the 16 tokens"),
        ({"spec": TokenSpec(16, None, dim=4, grid=(4, 4))}, "continuous latents"),
        ({"text_vocabulary": 9}, "go together"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny("token_shuffle", **arguments)


def test_windows_have_no_compiled_steps():
    with pytest.raises(ValueError, match="windows of 2 x 2 tokens have no compiled steps"):
        tiny("token_shuffle").compile_decoding()

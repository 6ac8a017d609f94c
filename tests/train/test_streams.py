"""Joint streams: templates of text and image segments, the joint vocabulary, padding, and a model that learns them."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from vistok.data import Loader, SequentialOrder, TokenCache, TokenCacheError, TokenWriter
from vistok.data.ragged import Piece
from vistok.data.streams import KINDS, TEMPLATES, StreamBatches, StreamConfig, Streams, parse_template
from vistok.types import ConditionSpec, IdSpec, JointVocabulary, TokenChunk, TokenSpec

SPEC = TokenSpec(4, 8, dim=2, grid=(2, 2))
TEXT = ConditionSpec(ids=IdSpec(16, 5), given=IdSpec(8, 4))
BEGIN, END, BEGIN_IMAGE, END_IMAGE, ANSWER = 24, 25, 26, 27, 28
IMAGE = 16  # where image ids begin


def text_of(index: int) -> list[int]:
    """Sample 3 has no text."""
    return [] if index == 3 else [index % 16] * (1 + index % 5)


@pytest.fixture
def cache(tmp_path: Path) -> TokenCache:
    with TokenWriter(tmp_path / "tokens", asdict(SPEC), "abc", condition=TEXT) as writer:
        tokens = (torch.arange(32)[:, None] + torch.arange(4)) % 8
        texts = [[Piece(np.array(text_of(i), np.int64), len(text_of(i)))] for i in range(32)]
        given = [[Piece(np.full(4, i % 8), 4)] for i in range(32)]
        writer.write(tokens[:, None], torch.full((32,), -1), {"ids": texts, "given": given})
    return TokenCache(tmp_path / "tokens")


def streams(cache: TokenCache, indices: list[int], **shares: float) -> Streams:
    return StreamBatches(cache, shares).load(np.array(indices), 0)[0].tokens


def rows(batch: Streams) -> list[list[int]]:
    return [ids[mask].tolist() for ids, mask in zip(batch.ids, batch.mask)]


def learned(batch: Streams) -> list[list[int]]:
    return [ids[mask].tolist() for ids, mask in zip(batch.ids, batch.in_loss)]


def test_templates_put_segments_in_their_order(cache):
    image, given, text = [IMAGE + 2, IMAGE + 3, IMAGE + 4, IMAGE + 5], [IMAGE + 2] * 4, [2, 2, 2]
    expected = {
        "text_to_image": [BEGIN, *text, ANSWER, BEGIN_IMAGE, *image, END_IMAGE],
        "image_to_text": [BEGIN, BEGIN_IMAGE, *image, END_IMAGE, ANSWER, *text, END],
        "edit": [BEGIN, BEGIN_IMAGE, *given, END_IMAGE, *text, ANSWER, BEGIN_IMAGE, *image, END_IMAGE],
    }
    drawn = [BEGIN_IMAGE, *image, END_IMAGE]
    in_loss = {"text_to_image": drawn, "image_to_text": [*text, END], "edit": drawn}
    for name in TEMPLATES:
        batch = streams(cache, [2], **{name: 1})
        assert rows(batch) == [expected[name]]
        assert learned(batch) == [in_loss[name]]
    kinds = [KINDS[kind] for kind in streams(cache, [2], text_to_image=1).kinds[0]]
    assert kinds == ["special", *["text"] * 3, *["special"] * 2, *["image"] * 4, "special"]


def test_a_template_takes_one_of_several_given_images(cache, tmp_path):
    two = ConditionSpec(ids=IdSpec(16, 5), given=IdSpec(8, 8))
    with TokenWriter(tmp_path / "two", asdict(SPEC), "abc", condition=two) as writer:
        tokens = torch.zeros(2, 1, 4, dtype=torch.int64)
        given = [[Piece(np.array([1] * 4 + [2] * 4), 8)], [Piece(np.array([3] * 4), 4)]]  # the second has only one
        texts = [[Piece(np.array([5]), 1)]] * 2
        writer.write(tokens, torch.full((2,), -1), {"ids": texts, "given": given})
    chain = "begin begin_image given:1 end_image answer begin_image* given:0* end_image* answer tokens*"
    reader = StreamBatches(TokenCache(tmp_path / "two"), {"chain": StreamConfig(template=chain)})
    one, other = rows(reader.load(np.arange(2), 0)[0].tokens)
    first, second = [IMAGE + 1] * 4, [IMAGE + 2] * 4
    marks = [BEGIN, BEGIN_IMAGE], [END_IMAGE, ANSWER, BEGIN_IMAGE], [END_IMAGE, ANSWER]
    assert one == [*marks[0], *second, *marks[1], *first, *marks[2], *[IMAGE] * 4]
    assert other == [*marks[0], *[IMAGE + 3] * 4, *marks[1], *marks[2], *[IMAGE] * 4]  # the missing image is left out
    assert reader.given_length == 4
    assert StreamBatches(TokenCache(tmp_path / "two"), {"edit": 1.0}).given_length == 8
    with pytest.raises(TokenCacheError, match=r"wants given:1, and .* has 1 given images of each sample"):
        StreamBatches(cache, {"chain": StreamConfig(template=chain)})
    with pytest.raises(ValueError, match=r"given:0, given:1, … for one of several texts and images"):
        parse_template("begin tokens:1*")


def test_streams_are_padded_at_the_end_and_a_missing_text_is_empty(cache):
    batch = streams(cache, [2, 3], text_to_image=1)
    assert batch.ids.shape == (2, 11)
    assert batch.mask[1].tolist() == [True] * 8 + [False] * 3
    assert rows(batch)[1][:3] == [BEGIN, ANSWER, BEGIN_IMAGE]
    assert not batch.in_loss[1, 8:].any()


def test_templates_are_drawn_by_their_shares_whatever_the_batch(cache):
    reader = StreamBatches(cache, {"text_to_image": 3, "image_to_text": 1}, seed=5)
    whole = next(batch.tokens for batch in Loader(reader, SequentialOrder(32, 32)))
    parts = [batch.tokens for batch in Loader(reader, SequentialOrder(32, 5))]
    assert rows(whole) == [row for part in parts for row in rows(part)]
    ends = sum(END in row for row in rows(whole))
    assert 2 <= ends <= 15


def test_latents_lie_where_image_tokens_are():
    vocabulary, segments = JointVocabulary(16, 1), TEMPLATES["text_to_image"]
    latents, text = torch.arange(24.0).view(2, 4, 3), torch.ones(2, 2, dtype=torch.int64)
    values = {"begin": text[:, :1], "ids": text, "begin_image": text[:, :1], "tokens": latents}
    values["end_image"] = values["answer"] = text[:, :1]
    parts = [(s, values[s.source], torch.ones(values[s.source].shape[:2], dtype=torch.bool)) for s in segments]
    batch = Streams.of(parts, vocabulary)
    image = batch.kinds == KINDS.index("image")
    assert torch.equal(batch.latents[image].view(2, 4, 3), latents)
    assert not batch.latents[~image].any()
    assert (batch.ids[image] == 16).all()


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        ({"poem": 1}, "templates are text_to_image"),
        ({"edit": 0}, "a share above 0"),
        ({}, "templates are"),
        ({"mine": StreamConfig(1, "begin picture*")}, "'picture.*' is no segment"),
        ({"mine": StreamConfig(1, "begin tokens:1*")}, "'tokens:1.*' is no segment"),
        ({"mine": StreamConfig(1, "begin ids tokens")}, "nothing in the loss"),
        ({"mine": StreamConfig(1, "begin ids:2 tokens*")}, "wants text 2 of samples, but .* has 1"),
    ],
)
def test_unknown_templates_are_refused(cache, shares, message):
    with pytest.raises(ValueError, match=message):
        StreamBatches(cache, shares)


def test_templates_need_what_they_are_made_of(tmp_path):
    with TokenWriter(tmp_path / "tokens", asdict(SPEC), "abc") as writer:
        writer.write(torch.zeros(2, 1, 4, dtype=torch.int64), torch.full((2,), -1))
    with pytest.raises(TokenCacheError, match="text_to_image needs 'ids'"):
        StreamBatches(TokenCache(tmp_path / "tokens"), {"text_to_image": 1})


def test_a_vocabulary_tells_kinds_apart():
    vocabulary = JointVocabulary(16, 8)
    assert vocabulary.size == 29
    assert [vocabulary.span(kind) for kind in KINDS] == [(0, 16), (16, 24), (24, 29)]
    ids = torch.arange(8)
    assert torch.equal(vocabulary.own(vocabulary.joint(ids, "image"), "image"), ids)
    with pytest.raises(ValueError, match="'pause' is no special token"):
        vocabulary.special("pause")
    assert TokenChunk(ids, ids, ids).kind == "image"


class Joint(nn.Module):
    """A throw-away joint model: a causal transformer over streams."""

    def __init__(self, vocabulary: JointVocabulary, dim: int = 32):
        super().__init__()
        self.embedding, self.positions = nn.Embedding(vocabulary.size, dim), nn.Embedding(32, dim)
        self.block = nn.TransformerEncoderLayer(dim, 2, 64, 0.0, batch_first=True, norm_first=True)
        self.output = nn.Linear(dim, vocabulary.size)

    def forward(self, streams: Streams) -> torch.Tensor:
        """Cross entropy of the tokens in the loss."""
        length = streams.ids.shape[1]
        x = self.embedding(streams.ids) + self.positions.weight[:length]
        x = self.block(x, src_mask=torch.ones(length, length, dtype=torch.bool).triu(1))
        logits, kept = self.output(x)[:, :-1], streams.in_loss[:, 1:]
        return F.cross_entropy(logits[kept], streams.ids[:, 1:][kept])


def test_a_joint_model_learns_text_and_images_in_one_sequence(cache):
    torch.manual_seed(0)
    reader = StreamBatches(cache, {"text_to_image": 1, "image_to_text": 1, "edit": 1})
    model = Joint(reader.vocabulary)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for epoch in range(30):
        for batch in Loader(reader, SequentialOrder(32, 16), epoch=epoch):
            loss = model(batch.tokens)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_a_template_chooses_among_several_texts(tmp_path):
    with TokenWriter(tmp_path / "tokens", asdict(SPEC), "abc", condition=ConditionSpec(ids=IdSpec(16, 5))) as writer:
        several = [[Piece(np.array(text), len(text)) for text in ([1, 1], [2], [3, 3, 3])], [Piece(np.array([4]), 1)]]
        writer.write(torch.zeros(2, 1, 4, dtype=torch.int64), torch.full((2,), -1), {"ids": several})
    template = "begin ids:2 answer begin_image* tokens* begin ids:0"
    reader = StreamBatches(TokenCache(tmp_path / "tokens"), {"mine": StreamConfig(1, template)})
    batch = reader.load(np.arange(2), 0)[0].tokens
    image = [BEGIN_IMAGE, *[IMAGE] * 4]
    assert rows(batch) == [
        [BEGIN, 3, 3, 3, ANSWER, *image, BEGIN, 1, 1],
        [BEGIN, ANSWER, *image, BEGIN, 4],  # it has only one text
    ]
    asked = reader.prompts(np.arange(2))
    assert asked.ids[0].tolist() == [0, 0, 3, 3, 3]
    assert asked.dropped.tolist() == [False, True]

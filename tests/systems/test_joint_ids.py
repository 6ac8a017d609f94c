"""Token-Shuffle with windows of one token as a joint model of texts and ids: training on streams, and captions."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.tiny_models import tiny
from support.tiny_runs import generator_config

import vistok
from vistok.data import DataConfig
from vistok.data.loader import evaluation_loader
from vistok.data.opening import open_source
from vistok.data.streams import TEMPLATES, Streams, parse_template
from vistok.draws import Keys
from vistok.pipelines import Pipeline
from vistok.pipelines.evaluations import score_generated_ids
from vistok.pipelines.semantic import score_ids
from vistok.signatures import ConfigError
from vistok.text import PromptEncoder, open_text_tokenizer
from vistok.train import train
from vistok.train.monitor import read_metrics
from vistok.train.tokenize import tokenize
from vistok.types import Condition, TokenSpec

SPEC = TokenSpec(8, 12, dim=4)
TEXTS, LENGTHS = torch.tensor([[3, 1, 4], [2, 0, 0]]), torch.tensor([3, 1])
MASK = torch.arange(3) < LENGTHS[:, None]
IDS = torch.tensor([[1, 5, 2, 11, 0, 7, 7, 3], [9, 9, 0, 4, 10, 6, 1, 2]])


def joint(**arguments):
    sizes = {"text_vocabulary": 6, "text_length": 3, "num_classes": 0, "window": 1, "writes": True}
    return tiny("token_shuffle", **{"spec": SPEC} | sizes | arguments)


def texts(rows: slice = slice(None)) -> Condition:
    return Condition.from_ids(TEXTS[rows], MASK[rows])


def streams(model, template: str) -> Streams:
    segments = TEMPLATES[template] if template in TEMPLATES else parse_template(template)
    every = {"ids": (TEXTS, MASK), "tokens": (IDS, torch.ones_like(IDS, dtype=torch.bool))}
    mark = torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, 1, dtype=torch.bool)
    return Streams.of([(segment, *every.get(segment.source, mark)) for segment in segments], model.vocabulary)


def test_an_image_after_a_text_is_learned_as_it_is_drawn():
    model = joint(text_weight=0.0)
    output = model(streams(model, "begin ids answer begin_image tokens*"), Condition.none(2))
    logits = model.logits(IDS, texts())
    wanted = model.vocabulary.joint(IDS, "image")
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), wanted.flatten())
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert output.metrics["image_loss"].item() == pytest.approx(expected.item(), rel=1e-5)
    steps = model.start(texts(), model.options_type(temperature=0.0)).generate()
    assert [chunk.tokens.shape for chunk in steps] == [(2, 1)] * 8


def test_dropped_texts_are_those_of_images_that_are_drawn():
    model = joint(text_weight=0.0, condition_dropout=0.5)
    drop = {"drop": torch.tensor([0.1, 0.9])}  # only the first is dropped
    drawn = streams(model, "begin ids answer begin_image tokens*")
    output = model(drawn, Condition.none(2), draws=drop)
    logits = model.logits(IDS, texts().without(("ids",), torch.tensor([True, False])))
    wanted = model.vocabulary.joint(IDS, "image")
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), wanted.flatten())
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    said = streams(model, "image_to_text")
    assert torch.equal(model(said, Condition.none(2), draws=drop).loss, model(said, Condition.none(2)).loss)


def test_words_and_marks_are_learned_after_an_image_and_padding_counts_nothing():
    model = joint(text_weight=0.5)
    both = streams(model, "image_to_text")
    output = model(both, Condition.none(2))
    nats, count = 0.0, 0
    for row in range(2):
        length = int(both.mask[row].sum())
        ids = both.ids[row : row + 1, :length]
        x, places = model.embed_joint(ids), torch.arange(length)[None]
        logits = model.head(model.transform(x, places, None, None))[0].double().log_softmax(-1)
        for place in both.in_loss[row].nonzero()[:, 0].tolist():
            nats, count = nats - logits[place - 1, ids[0, place]].item(), count + 1
    assert count == 3 + 1 + 1 + 1  # words, and the end of each text
    assert output.loss.item() == pytest.approx(0.5 * nats / count, rel=1e-5)
    assert output.metrics["image_loss"] == 0


def test_what_it_says_is_the_likeliest_word_each_time():
    model = joint()
    given = Condition.from_given(IDS)
    said = model.describe(given, 4)
    assert said.shape[1] <= 4
    special = model.vocabulary.special
    for row in range(2):
        marks = (torch.tensor([[special(name)]]) for name in ("begin", "begin_image", "end_image", "answer"))
        begin, start, stop, answer = marks
        ids = torch.cat([begin, start, model.vocabulary.joint(IDS[row : row + 1], "image"), stop, answer], 1)
        for word in said[row].tolist():
            hidden = model.transform(model.embed_joint(ids), torch.arange(ids.shape[1])[None], None, None)
            logits = model.head(hidden[:, -1])[0]
            allowed = [*range(6), special("end")]
            assert word == allowed[int(logits[allowed].argmax())]
            if word == special("end"):
                break
            ids = torch.cat([ids, torch.tensor([[word]])], 1)
    assert model.describe(given, 30).shape[1] <= 3 + 1  # no longer than the texts in training
    asked = Condition.together(given, texts())  # a question, one of them shorter
    alone = model.describe(Condition.together(Condition.from_given(IDS[1:]), texts(slice(1, 2))), 4)
    assert torch.equal(model.describe(asked, 4)[1:, : alone.shape[1]], alone)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: joint(window=2, spec=TokenSpec(16, 12, dim=4, grid=(4, 4))), "windows of 1 and texts as ids alone"),
        (lambda m: joint(num_classes=3), r"got window 1, 3 classes and texts of 3 ids; .* name condition=\[ids\]"),
        (lambda m: joint(text_vocabulary=0, text_length=0), "texts of 0 ids"),
        (lambda m: m(streams(joint(text_vocabulary=7), "text_to_image"), Condition.none(2)), "of another vocabulary"),
        (
            lambda m: m(streams(joint(spec=TokenSpec(8, 20, dim=4)), "text_to_image"), Condition.none(2)),
            "images of 12",
        ),
        (lambda m: m.describe(texts(), 3), "needs the ids of an image"),
        (lambda m: m.describe(Condition.from_given(IDS + 5), 3), "id of a given token"),
        (lambda m: m.sample(Condition.from_given(IDS)), "is described, not continued"),
        (lambda m: m.converse(), "holds no conversations"),
        (lambda m: m(streams(m, "begin tokens ids answer tokens*"), Condition.none(2)), "longer than the 20 positions"),
        (lambda m: tiny("token_shuffle")(streams(m, "text_to_image"), Condition.none(2)), "writes images alone"),
    ],
)
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(joint())


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """The ids of a tiny SEED over digits, with their names as bytes."""
    folder = tmp_path_factory.mktemp("seed") / "tokens"
    data = DataConfig(16, source="digits", channels=3, limit=100)
    text = PromptEncoder([open_text_tokenizer("bytes", length=8)])
    tokenize(tiny("seed"), data, folder, text=text)
    return folder


def run(folder, cache, **changes):
    sections = {
        "model": {"name": "token_shuffle", "window": 1, "writes": True, "num_fusion_blocks": 1},
        "streams": {"text_to_image": 0.5, "image_to_text": 0.5},
        "condition": ["ids"],
        "training": {"max_steps": 3},
    }
    return generator_config(folder, cache, **sections | changes)


def test_a_run_learns_both_ways_and_its_pipeline_draws_and_describes(cache, tmp_path):
    folder = train(run(tmp_path / "run", cache))
    assert {"image_loss", "text_loss"} <= read_metrics(folder / "metrics.jsonl")[-1].keys()
    pipe = vistok.pipeline(folder)
    tokens = pipe.generator.sample(
        pipe.text.condition(["a seven", "a one"]), draws=pipe.generator.sampling_draws(Keys.range(0, 2))
    )
    assert pipe.tokenizer.decode_features(tokens).shape == (2, 6)
    assert len(pipe.caption(Keys.range(0, 2).uniform("x", 3, 16, 16) * 2 - 1)) == 2


def test_a_plain_model_is_told_that_it_reads_no_streams(cache, tmp_path):
    with pytest.raises(ConfigError, match="token_shuffle reads no streams"):
        train(run(tmp_path / "run", cache, model={"name": "token_shuffle", "window": 1}))


def test_ids_of_another_tokenizer_are_refused():
    model = joint()
    with pytest.raises(ValueError, match="models other tokens"):
        Pipeline(tiny("seed"), model)


def test_drawn_ids_are_scored_by_what_they_find_and_texts_by_what_is_right(cache, tmp_path):
    folder = train(run(tmp_path / "run", cache))
    pipe = vistok.pipeline(folder)
    data = DataConfig(16, source="digits", channels=3, split="test", limit=12, batch_size=5)
    result = score_ids(pipe, data)
    scores = result["scores"]
    assert result["images"] == {"source": "ids drawn for the texts of digits (test)", "count": 12}
    batch = next(iter(evaluation_loader(open_source(data), replace(data, batch_size=12))))
    captions = [open_source(data).captions(index) for index in range(12)]
    draws = pipe.generator.sampling_draws(Keys.range(0, 12), pipe.options())
    ids = pipe.generator.sample(pipe.text.condition([several[0] for several in captions]), pipe.options(), draws=draws)
    targets = pipe.tokenizer.target_features(batch.pixels)
    similar = torch.nn.functional.cosine_similarity(pipe.tokenizer.decode_features(ids)[:, None], targets, dim=-1)
    assert scores["cosine"] == pytest.approx(similar.diagonal().mean().item(), abs=1e-5)
    found = batch.labels[similar.argmax(1)] == batch.labels
    assert scores["class_recall"] == pytest.approx(found.double().mean().item())
    assert scores["codes_used"] == len(ids.unique()) / 32
    said = pipe.caption(batch.pixels, max_tokens=8)
    assert scores["texts_right"] == sum(text in several for text, several in zip(said, captions)) / 12
    rest = ["data.source=digits", "data.channels=3", "data.split=test", "data.limit=12"]
    again = score_generated_ids(str(folder), rest, batch_size=7, device="cpu")
    assert again["scores"] == pytest.approx(scores, abs=1e-5)


def test_other_generators_of_ids_are_asked_by_class_and_those_of_pixels_refused():
    data = DataConfig(16, source="digits", channels=3, split="test", limit=4)
    seed = tiny("seed")
    by_class = Pipeline(seed, tiny("llama", spec=seed.spec, positions="rope1d", num_classes=10))
    scores = score_ids(by_class, data)["scores"]
    assert {"cosine", "class_recall", "codes_used"} <= scores.keys()
    assert "texts_right" not in scores
    with pytest.raises(ValueError, match="is asked by no condition; ids are scored by texts or by classes"):
        score_ids(Pipeline(seed, tiny("llama", spec=seed.spec, positions="rope1d", num_classes=0)), data)
    pixels = tiny("vit_vqgan")
    with pytest.raises(ValueError, match="ViTVQGAN decodes to images, not to embeddings"):
        score_ids(Pipeline(pixels, tiny("llama", spec=pixels.spec, positions="rope1d", num_classes=10)), data)

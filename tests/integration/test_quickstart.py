"""The quickstart with a few training steps, what its scores count, and its report."""

from __future__ import annotations

import json
import shlex
from dataclasses import fields

import pytest
import torch
from support.markup import ReportReader

import vistok
from vistok.cli import main
from vistok.config import load_config
from vistok.data.config import DataConfig
from vistok.data.pictures import GAP
from vistok.data.tokens import TokenCache
from vistok.quickstart import Recipe, quickstart
from vistok.quickstart.scores import (
    Digits,
    DigitScores,
    encode,
    equal_counts,
    fit_classifier,
    load_digits,
    nearest,
    repeated_latents,
    round_trip_error,
    score,
)
from vistok.quickstart.story import prefix_ladder, score_lines
from vistok.quickstart.systems import config_file, systems
from vistok.signatures import ConfigError
from vistok.tokenizers.kl_vae import KLVAE
from vistok.train.config import RunConfig
from vistok.train.tasks.objective import check_terms
from vistok.train.tokenize import tokenize
from vistok.types import ConditionSpec, FeatureSpec, IdSpec, TokenSpec, to_json

SHORT = Recipe(
    tokenizer=("training.max_steps=4", "training.log_every=2"),
    generator=("training.max_steps=4", "training.log_every=2", "model.num_layers=1"),
    views=2,
    classifier_steps=40,
    samples_per_class=3,
)
KEYS = ["recognised", "recognised_real", "frechet", "frechet_real", "distinct", "copies", "psnr", "seconds", "protocol"]


pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("a folder") / "quick start"
    quickstart(out, SHORT)
    return out


@pytest.fixture(scope="module")
def real():
    return load_digits("train")


@pytest.fixture(scope="module")
def held_out():
    return load_digits("test")


@pytest.fixture(scope="module")
def classifier(real):
    return fit_classifier(real, steps=120)


def test_result(folder):
    result = json.loads((folder / "result.json").read_text())
    assert list(result) == KEYS
    for share in ("recognised", "recognised_real", "distinct", "copies"):
        assert 0 <= result[share] <= 1
    assert result["seconds"] > 0
    assert result["frechet_real"] > 0
    protocol = result["protocol"]
    counts = [protocol[f"{what}_digits"] for what in ("training", "held_out", "generated", "frechet")]
    assert counts == [1433, 364, 30, 30]
    assert protocol["recipe"]["views"] == 2


def test_parts_are_ordinary_ones(folder):
    out = vistok.pipeline(folder / "generator", device="cpu")(["3", 5], seed=1)
    assert [image.size for image in out.images] == [(32, 32)] * 2
    assert out.labels == [3, 5]
    assert vistok.load(folder / "tokenizer" / "tokenizer").spec.length == 16
    assert TokenCache(folder / "tokens").views == 2
    assert {path.name for path in folder.glob("*.png")} == {
        "samples.png", "nearest.png", "reconstructions.png",
    }  # fmt: skip


def test_report_needs_nothing_else(folder):
    report = ReportReader(folder / "report.html")
    assert report.images()[0].size[0] == 10 * (64 + GAP) - GAP  # a column per class, twice as large
    assert {"svg", "path"} <= {tag for tag, _ in report.tags}  # curves, which take the page's colours
    assert not {"script", "link", "iframe"} & {tag for tag, _ in report.tags}
    text = (folder / "report.html").read_text()
    assert "http" not in text
    assert "url(" not in text


def test_report_shows_the_scores_and_commands_that_fit(folder):
    report = ReportReader(folder / "report.html")
    result = json.loads((folder / "result.json").read_text())
    scores = DigitScores(**{f.name: result[f.name] for f in fields(DigitScores)})
    spec = vistok.load(folder / "tokenizer" / "tokenizer").spec
    for line in score_lines(scores, result["seconds"], systems()["vit_vqgan"], spec=spec):
        assert line.name in report.text
        assert line.value in report.text
    commands = [line for line in report.text.splitlines() if line.startswith("vistok eval")]
    assert shlex.split(commands[0]) == ["vistok", "eval", str(folder / "tokenizer")]


def test_used_folder_is_refused(tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    assert _exit_code("quickstart", "--out", tmp_path) == 2
    message = " ".join(capsys.readouterr().err.split())
    assert str(tmp_path) in message
    assert "is not empty" in message
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    with pytest.raises(FileExistsError, match=r"notes\.txt"):
        quickstart(tmp_path / "notes.txt")


def test_wrong_change_leaves_nothing_behind(tmp_path):
    with pytest.raises(ConfigError, match="max_steps"):
        quickstart(tmp_path / "out", Recipe(tokenizer=("training.max_stepz=4",)))
    assert not list(tmp_path.iterdir())


def _exit_code(*arguments) -> int:
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    return stop.value.code


def test_real_digits_score_as_real_digits(folder, real, held_out, classifier):
    """Held-out digits in place of generated ones get the scores of held-out digits."""
    tokenizer, cache = vistok.load(folder / "tokenizer" / "tokenizer"), TokenCache(folder / "tokens")
    tokens = torch.arange(len(held_out) * 16).view(-1, 16)
    scores = score(held_out, tokens, classifier=classifier, tokenizer=tokenizer, cache=cache, train=real, test=held_out)
    assert scores.recognised == scores.recognised_real > 0.8
    assert scores.frechet == scores.frechet_real
    assert (scores.distinct, scores.copies) == (1, 0)
    blurred = Digits(torch.rand_like(held_out.pixels) * 2 - 1, held_out.labels)
    worse = score(blurred, tokens, classifier=classifier, tokenizer=tokenizer, cache=cache, train=real, test=held_out)
    assert worse.recognised < 0.5
    assert worse.frechet > 5 * worse.frechet_real


def test_copies_and_repeats_are_counted(folder, real, held_out, classifier):
    tokenizer, cache = vistok.load(folder / "tokenizer" / "tokenizer"), TokenCache(folder / "tokens")
    as_it_is = encode(tokenizer, real.pixels[:5])
    view, _ = cache.batch(range(5, 9), [1] * 4)
    new = torch.full((3, 16), tokenizer.spec.codebook_size)  # not a sequence of this tokenizer
    tokens = torch.cat([as_it_is, view, new])
    generated = Digits(held_out.pixels[:12], held_out.labels[:12])
    scores = score(generated, tokens, classifier=classifier, tokenizer=tokenizer, cache=cache, train=real, test=real)
    assert scores.copies == 9 / 12
    assert scores.distinct == len({tuple(row) for row in tokens.tolist()}) / 12 <= 10 / 12


def test_equal_latents_are_those_that_differ_no_more_than_a_round_trip():
    known = torch.tensor([[[0.0, 0.0]], [[5.0, 5.0]]])
    latents = torch.tensor([[[0.0, 0.1]], [[0.1, 0.0]], [[3.0, 3.0]], [[5.2, 5.0]]])
    repeats = repeated_latents(latents, known, tolerance=0.15)
    assert repeats.copies == 2 / 4
    assert repeats.distinct == 3 / 4


def test_continuous_tokens_are_scored(held_out, real, classifier, tmp_path):
    """With held-out digits in place of generated ones, no copies are counted; with training digits, all are copies."""
    tokenizer = tiny_kl_vae()
    config = DataConfig(32, source="digits", split="train", channels=1, batch_size=256, limit=40)
    cache = tokenize(tokenizer, config, tmp_path / "tokens")
    parts = {"classifier": classifier, "tokenizer": tokenizer, "cache": cache, "train": real, "test": held_out}
    few = Digits(real.pixels[:20], real.labels[:20])
    assert round_trip_error(tokenizer, held_out.pixels[:20]) > 0
    scores = score(few, encode(tokenizer, few.pixels), **parts)
    assert scores.copies == 1
    far = encode(tokenizer, few.pixels) + 1e4 * torch.arange(1, 21.0).view(-1, 1, 1)
    scores = score(few, far, **parts)
    assert (scores.copies, scores.distinct) == (0, 1)


def tiny_kl_vae():
    torch.manual_seed(0)
    sizes = {"block_out_channels": (8, 8, 8), "norm_groups": 4, "layers_per_block": 1, "latent_channels": 2}
    return KLVAE(image_size=32, in_channels=1, encoder_attention=(), **sizes).eval()


@pytest.mark.parametrize(
    ("system", "stage"),
    [
        (name, stage)
        for name, system in systems().items()
        for stage in ("generator", *(["predictor"] if system.given_frames else []))
    ],
)
def test_generator_of_every_system_fits_its_tokenizer(system, stage):
    runs = [RunConfig.parse(load_config(config_file(system, name))) for name in ("tokenizer", stage)]
    promised = systems()[system]
    with torch.device("meta"):
        tokenizer = runs[0].build_model(runs[0].model_entry().load().arguments_from(runs[0].data))
        text = IdSpec(256, promised.text_length) if promised.text_length else None
        given = IdSpec(tokenizer.spec.codebook_size, tokenizer.spec.length) if promised.given_frames else None
        if promised.captions:
            given = FeatureSpec(tokenizer.spec.dim, tokenizer.spec.length)
        condition = ConditionSpec(num_classes=0 if text else 10, ids=text, given=given)
        derived = runs[1].model_entry().load().condition_arguments(condition.only(runs[1].condition or condition.parts))
        generator = runs[1].build_model({"spec": to_json(tokenizer.spec), **derived})
    check_terms(tokenizer, runs[0].losses)
    generator.options_type(**runs[1].sampling)
    assert tokenizer.input_shape == runs[0].data.input_shape


def test_unknown_system_is_refused(tmp_path, capsys):
    assert _exit_code("quickstart", "--system", "vqgun", "--out", tmp_path / "out") == 2
    assert "vit_vqgan" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_ladder_of_prefixes():
    def ladder(length, step):
        return prefix_ladder(TokenSpec(length, 8, 2, prefix_step=step))

    assert ladder(16, 1) == [1, 2, 4, 8, 16]
    assert ladder(12, 4) == [4, 8, 12]
    assert ladder(4, 4) == [4]


def test_equal_counts_take_the_first_of_each_class():
    many = Digits(torch.arange(6.0).view(6, 1, 1, 1), torch.tensor([1, 0, 1, 1, 9, 0]))
    few = Digits(torch.zeros(3, 1, 1, 1), torch.tensor([1, 1, 0]))
    counts = equal_counts(many, few)
    assert counts.tolist() == [1, 2] + [0] * 8
    assert many.first_of_each_class(counts).pixels.flatten().tolist() == [1, 0, 2]


def test_splits_share_no_digit(real, held_out):
    assert (len(real), len(held_out)) == (1433, 364)
    distance = torch.cdist(held_out.pixels.flatten(1), real.pixels.flatten(1))
    assert distance.min() > 0
    assert nearest(real.pixels[[7, 3]] + 0.01, real.pixels).tolist() == [7, 3]


def test_classifier_depends_on_its_seed_alone(real):
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = fit_classifier(real, steps=3, seed=4)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    again, other = fit_classifier(real, steps=3, seed=4), fit_classifier(real, steps=3, seed=5)
    assert torch.equal(first.head.weight, again.head.weight)
    assert not torch.equal(first.head.weight, other.head.weight)

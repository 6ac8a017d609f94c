"""Pipelines in a notebook: how they and their outputs display, callbacks, clear errors, and model cards."""

from __future__ import annotations

import dataclasses
import io
import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.tiny_models import RASTER, tiny

import vistok
from vistok.checkpoints.registry import ENTRIES
from vistok.data.pictures import GAP, from_pil
from vistok.data.sheets import LINE
from vistok.pipelines import Pipeline
from vistok.pipelines.card import model_card
from vistok.pipelines.display import describe_tokens
from vistok.signatures import ConfigError
from vistok.types import Condition, TokenSpec

NAMES = ("cat", "dog, hound", "tench")


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return Pipeline(tiny("llamagen_vq"), tiny("llama", spec=RASTER, num_classes=3), class_names=NAMES)


def test_repr_tells_parts_sizes_and_classes(pipe):
    text = repr(pipe)
    assert "llamagen_vq" in text
    assert "3 classes (cat, dog, tench)" in text
    count = sum(parameter.numel() for parameter in pipe.generator.parameters())
    assert f"{count / 1e3:.3g}K parameters" in text
    assert "cpu, float32" in text


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        (TokenSpec(16, 512, 8, grid=(4, 4)), "4x4 tokens of 512 codes"),
        (TokenSpec(32, None, 12), "32 vectors of 12 channels"),
        (TokenSpec(8, 64, 4, prefix_step=1), "8 tokens of 64 codes, ordered from coarse to fine"),
        (TokenSpec(5, 64, 4, scales=((1, 1), (2, 2))), "5 tokens of 64 codes in 2 scales"),
        (TokenSpec(4, 64, 4, depth=2), "4 tokens of 64 codes, 2 codes each"),
    ],
)
def test_tokens_in_words(spec, text):
    assert describe_tokens(spec) == text


def test_an_output_shows_itself_with_a_column_per_class(pipe):
    out = pipe(["cat", "tench"], num_images_per_label=2, seed=1)
    assert out.names == ["cat", "cat", "tench", "tench"]
    side = out.images[0].width
    drawn = np.asarray(out.grid(scale=1))
    assert drawn.shape[:2] == (LINE + 2 * side + GAP, 2 * side + GAP)
    assert np.array_equal(drawn[LINE : LINE + side, side + GAP :], np.asarray(out.images[2]))  # the first tench
    assert out.grid(scale=2, columns=4).width == 4 * 2 * side + 3 * GAP
    assert out.grid(scale=0.5, columns=4).width == 4 * (side // 2) + 3 * GAP
    shown = Image.open(io.BytesIO(out._repr_png_()))
    assert shown.size == out.grid().size
    assert out._repr_html_() is None
    with pytest.raises(ValueError, match="scale must be above 0, got -1"):
        out.grid(scale=-1)


def test_an_image_without_a_class_has_no_class_name(pipe):
    made = pipe(condition=Condition.from_labels(torch.tensor([1, -1])), seed=0)
    assert made.class_names == [pipe.class_names[1], None]
    assert made.names == [pipe.class_names[1], ""]
    assert repr(made).endswith(f": {pipe.class_names[1]}, no class)")
    assert dataclasses.replace(made, class_names=None).names == ["1", ""]


def test_an_output_is_told_in_a_line(pipe):
    made = pipe([0, 1], num_images_per_label=5, seed=0)
    side = made.images[0].width
    names = ", ".join([pipe.class_names[0]] * 5 + [pipe.class_names[1]] * 3)
    assert repr(made) == f"PipelineOutput(10 images, {side}x{side}: {names}, …)"
    first = next(iter(pipe.stream([0], seed=0)))
    assert repr(first) == f"Preview({first.step} of {first.total} positions)"
    clip = dataclasses.replace(made, pixels=torch.zeros(1, 3, 7, 4, 6), labels=None, class_names=None)
    assert repr(clip) == "PipelineOutput(1 clip of 7 frames, 6x4)"


def test_tokens_and_pixels_that_are_no_tensors_are_told(pipe):
    tokenizer = pipe.tokenizer
    with pytest.raises(ValueError, match=r"token ids must be a tensor, got list; torch\.as_tensor"):
        tokenizer.decode([[0, 1]])
    with pytest.raises(ValueError, match=r"got shape \(\d+, \d+, \d+\); pixels\[None\] is a batch of one"):
        tokenizer.encode(torch.zeros(tokenizer.input_shape))


def test_a_callback_sees_every_step_and_may_stop(pipe):
    seen = []

    def note(given, step, positions, tensors):
        assert given is pipe
        seen.append((step, positions, tensors["tokens"].clone()))

    out = pipe([0, 1, 2], seed=4, batch_size=2, callback_on_step_end=note)
    length = RASTER.length
    assert [(step, positions) for step, positions, _ in seen] == [(i, i + 1) for i in range(length)] * 2
    assert torch.equal(torch.cat([tokens for *_, tokens in seen[:length]], 1).cpu(), out.tokens[:2])

    def stop(given, step, positions, tensors):
        if step == 2:
            raise InterruptedError("enough")

    with pytest.raises(InterruptedError):
        pipe([0], callback_on_step_end=stop)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"labels": 1}, "no keyword 'labels' here; did you mean class_labels"),
        ({"cfg_scale": 2}, "did you mean guidance_scale"),
        ({"temprature": 2}, "did you mean temperature"),
        ({"num_images_per_class": 2}, "did you mean num_images_per_label"),
        ({"zzzzzz": 2}, "no keyword 'zzzzzz' here. The call takes class_labels, num_images_per_label, prompt"),
    ],
)
def test_wrong_keywords_get_the_list_of_the_call(pipe, given, message):
    with pytest.raises(ConfigError, match=message):
        pipe([1], **given)
    with pytest.raises(ConfigError, match="The call takes class_labels"):
        pipe.stream([1], zzzz=1)


def test_seeds_are_whole_numbers(pipe):
    with pytest.raises(ValueError, match=r"seed must be a whole number, got 'abc' \(str\)"):
        pipe([1], seed="abc")
    assert torch.equal(pipe([1], seed=np.int64(3)).tokens, pipe([1], seed=3).tokens)


def test_a_generator_that_cannot_edit_says_so_before_any_work(pipe):
    latents = tiny("kl_vae")
    cells = Pipeline(latents, tiny("xar", spec=latents.spec, num_classes=3))
    with pytest.raises(ValueError, match="XAR cannot keep some tokens and generate the others"):
        cells.edit("no image", None)
    with pytest.raises(ValueError, match="images must be PIL images, got str"):
        pipe.edit("no image", None)


def test_preprocess_is_what_encode_reads(pipe):
    tokenizer = pipe.tokenizer
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 50, 3), dtype=np.uint8))
    pixels = tokenizer.preprocess(photo)
    size = tokenizer.input_shape[1:]
    assert torch.equal(pixels, from_pil([photo], size, 3))
    assert torch.equal(tokenizer.preprocess([photo, photo])[1:], pixels)
    assert tokenizer.to(torch.bfloat16).preprocess(photo).dtype == torch.bfloat16
    tokenizer.to(torch.float32)
    assert tokenizer.encode(pixels).shape == (1, RASTER.length)
    with pytest.raises(ValueError, match=r"pixels must be a tensor, got Image; tokenizer\.preprocess"):
        tokenizer.encode(photo)


def test_pixels_out_of_range_are_warned_of(pipe):
    pixels = torch.zeros(1, *pipe.tokenizer.input_shape)
    with pytest.warns(UserWarning, match=r"pixels lie in \[200, 200\], but tokenizers read \[-1, 1\]"):
        pipe.tokenizer.encode(pixels + 200)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipe.tokenizer.encode(pixels + 1.01)  # what a decoder overshoots


def test_a_card_says_what_it_is_how_to_load_it_and_under_which_licence(pipe, tmp_path):
    (tmp_path / "config.yaml").write_text("task: generator\n")
    told = {"images": {"count": 50}, "reference": {"source": "ref.npz"}}
    runs = [{"scores": {"fid": fid}, "guidance_scale": scale, **told} for fid, scale in ((9.0, 1.0), (3.5, 2.0))]
    (tmp_path / "result.json").write_text(json.dumps({"protocol": "adm", "runs": runs}))
    card = model_card(pipe, "me/pets", licence="apache-2.0", scores=tmp_path, run=tmp_path)
    text = str(card)
    assert card.data.license == "apache-2.0"
    assert card.data.library_name == "vistok"
    assert 'pipe = vistok.pipeline("me/pets")' in text
    assert "| fid | 3.5 |" in text
    assert "Protocol adm, 50 images against ref.npz, guidance_scale 2.0." in text
    assert "task: generator" in text
    assert "Classes, in the order of their ids: cat, dog, tench." in text
    papers = {entry.paper for entry in ENTRIES if entry.name in ("llamagen_vq", "llama")}
    assert all(f"arXiv:{paper}" in text for paper in papers)
    tables = [lines for lines in text.split("\n\n") if "|---|" in lines]
    assert all(line.startswith("|") for table in tables for line in table.splitlines() if not line.startswith("#"))


@pytest.mark.parametrize("name", ["fvd", "fid", "kid"])
def test_a_card_shows_the_setting_of_the_lowest_distance(pipe, tmp_path, name):
    values = (None, 9.0, 3.5)  # a setting without the score does not win
    runs = [{"scores": {name: value} if value else {"is": 2.0}, "guidance_scale": value} for value in values]
    (tmp_path / "result.json").write_text(json.dumps({"protocol": "p", "runs": runs}))
    assert f"| {name} | 3.5 |" in str(model_card(pipe, "me/pets", scores=tmp_path))


def test_a_card_has_only_tags_that_the_hub_has(pipe):
    tokenizer = tiny("larp", image_size=16)
    clips = Pipeline(tokenizer, tiny("llama", spec=tokenizer.spec, num_classes=2, positions="learned"))
    assert model_card(clips, "me/clips").data.pipeline_tag is None
    assert model_card(pipe, "me/pets").data.pipeline_tag == "unconditional-image-generation"


def test_a_card_without_licence_or_scores_says_so(pipe, tmp_path):
    text = str(model_card(pipe, "me/pets"))
    assert "No licence was given" in text
    assert "None were given." in text
    with pytest.raises(FileNotFoundError, match="is no training run"):
        model_card(pipe, "me/pets", run=tmp_path)
    (tmp_path / "result.json").write_text("[]")
    with pytest.raises(ValueError, match="holds no scores"):
        model_card(pipe, "me/pets", scores=tmp_path)


def test_push_to_hub_uploads_one_whole_folder(pipe, tmp_path, monkeypatch):
    import huggingface_hub

    uploaded = {}

    class Hub:
        def __init__(self, token):
            uploaded["token"] = token

        def create_repo(self, repo_id, **options):
            uploaded["repo"] = (repo_id, options)

        def upload_folder(self, *, repo_id, folder_path, commit_message):
            for path in sorted(Path(folder_path).rglob("*")):
                if path.is_file():
                    target = tmp_path / "hub" / path.relative_to(folder_path)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(path.read_bytes())

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    pipe.save_pretrained(tmp_path / "run")
    (tmp_path / "run" / "config.yaml").write_text("task: generator\n")
    loaded = vistok.pipeline(tmp_path / "run", device="cpu")
    address = loaded.push_to_hub("me/pets", license="mit", private=True, token="t")
    assert address.endswith("/me/pets")
    assert uploaded == {"token": "t", "repo": ("me/pets", {"private": True, "exist_ok": True})}
    assert "task: generator" in (tmp_path / "hub" / "README.md").read_text()
    again = vistok.pipeline(tmp_path / "hub", device="cpu")
    assert torch.equal(again([0], seed=1).tokens, pipe([0], seed=1).tokens)

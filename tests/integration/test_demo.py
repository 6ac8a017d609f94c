"""The demo: what a run can do, what it shows, and, if Gradio is installed, the app through its client."""

from __future__ import annotations

import math
import re
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.tiny_models import RASTER, tiny

from vistok.data.sheets import sheet
from vistok.demo.pictures import colour, compare, entropy_of, error_map, heat, note, picture, token_map, token_strip
from vistok.demo.runs import Run
from vistok.pipelines import Pipeline
from vistok.types import Condition

CLASSES = ("cat", "dog", "tench")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "pets"
    generator = tiny("llama", spec=RASTER, num_classes=3)
    Pipeline(tiny("llamagen_vq"), generator, class_names=CLASSES, sampling={"top_p": 0.9}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def run(folder) -> Run:
    return Run(str(folder), "cpu")


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8))


def test_a_run_knows_what_it_can_do(run, folder):
    assert run.name == "pets"
    assert run.classes == list(CLASSES)
    assert not run.takes_prompts
    assert set(run.knobs) == {"guidance_scale", "temperature", "top_p"}
    assert run.knobs["top_p"][3] == 0.9
    alone = Run(str(folder / "tokenizer"), "cpu")
    assert alone.name == "pets/tokenizer"
    assert alone.pipe is None
    assert alone.classes == []
    assert alone.knobs == {}
    assert alone.reads_pictures


def test_generation_previews_end_in_what_the_pipeline_makes(run):
    *previews, (last, text, out) = run.generate("dog", "", 2, 5, temperature=0.5)
    assert previews
    assert out is None
    assert text == f"{RASTER.length} of {RASTER.length} tokens"
    expected = run.pipe(["dog"], num_images_per_label=2, seed=5, temperature=0.5)
    assert np.array_equal(np.asarray(last), np.asarray(sheet(expected.images, 2, least=160)))


def test_a_picture_is_reconstructed_and_its_tokens_swapped(run, photo):
    reconstructed = run.reconstruct(photo)
    expected = run.tokenizer.reconstruct(run.tokenizer.preprocess(photo))
    assert torch.allclose(reconstructed.decoded, expected, atol=1e-5)
    assert math.isfinite(reconstructed.psnr)
    other = (int(reconstructed.tokens[0, 3]) + 1) % run.spec.codebook_size
    changed = run.swapped(reconstructed.tokens, 3, other)
    assert (changed != reconstructed.tokens).nonzero().tolist() == [[0, 3]]
    assert not torch.equal(run.decode(changed), reconstructed.decoded)
    with pytest.raises(ValueError, match=f"position {RASTER.length} is none of 0..{RASTER.length - 1}"):
        run.swapped(reconstructed.tokens, RASTER.length, 0)
    with pytest.raises(ValueError, match="id -1 is none of"):
        run.swapped(reconstructed.tokens, 0, -1)


def test_ordered_tokens_have_prefixes(tmp_path, photo):
    tiny("flextok").save_pretrained(tmp_path / "ordered")
    run = Run(str(tmp_path / "ordered"), "cpu")
    assert run.prefixes() == list(range(run.spec.prefix_step, run.spec.length + 1, run.spec.prefix_step))
    reconstructed = run.reconstruct(photo)
    assert run.decode(reconstructed.tokens[:, : run.prefixes()[0]]).shape == reconstructed.decoded.shape
    assert torch.equal(run.decode(reconstructed.tokens), reconstructed.decoded)  # the noise is the same every time


def test_entropy_is_that_of_the_generators_predictions(run, photo):
    tokens = run.reconstruct(photo).tokens
    bits = run.entropy(tokens, "cat")
    assert bits.shape == (RASTER.length,)
    assert bool((bits >= 0).all())
    assert bool((bits <= math.log2(RASTER.codebook_size) + 1e-6).all())
    generator = run.pipe.generator
    session = generator.start(
        Condition.from_labels(torch.tensor([0])), run.pipe.options(guidance_scale=1.0, temperature=0)
    )
    session.append(tokens[:, :5])
    assert bits[5] == pytest.approx(float(entropy_of(session.next_logits()[0, 0])), abs=1e-4)


def test_entropy_of_known_distributions():
    assert entropy_of(torch.zeros(8)) == pytest.approx(3)
    assert entropy_of(torch.tensor([0.0, -float("inf")])) == pytest.approx(0)


def test_pictures_of_errors_and_tokens():
    black, white = -torch.ones(3, 2, 2), torch.ones(3, 2, 2)
    assert np.asarray(error_map(black, black)).max() == 0
    assert np.asarray(error_map(black, white)).min() == 255
    assert np.asarray(heat(torch.tensor([[0.0, 1.0]]))).tolist() == [[[0, 0, 0], [255, 255, 255]]]
    image = Image.new("L", (16, 16))
    mapped = np.asarray(token_map(torch.tensor([[1, 2], [1, 3]]), image, opacity=1.0))
    assert mapped.shape == (384, 384, 3)
    assert tuple(mapped[0, 0]) == tuple(mapped[-1, 0]) == colour(1)
    assert len({colour(index) for index in range(500)}) > 480
    assert token_strip(torch.arange(40)).size == (32 * 24, 2 * 24)


def test_texts_in_pages_are_escaped():
    image = Image.new("L", (2, 2))
    for page in (note("<script>"), picture(image, '"><script>'), compare(image, image)):
        assert "<script>" not in page


# ---------------------------------------------------------------------------------------------------------------------
# Through Gradio's client


@pytest.fixture(scope="module")
def client(folder):
    pytest.importorskip("gradio", reason="of the extra demo")
    from gradio_client import Client

    from vistok.demo import launched

    before = set(Path(tempfile.gettempdir()).glob("vistok-demo-*"))
    with launched([str(folder)], device="cpu", max_upload_mb=0.05) as app:
        (uploads,) = set(Path(tempfile.gettempdir()).glob("vistok-demo-*")) - before
        client = Client(app.local_url, verbose=False, analytics_enabled=False)
        client.uploads = uploads
        yield client
    assert not uploads.exists()


def test_the_app_generates_with_previews(client):
    job = client.submit("dog", "", 2, 3, 1.5, 1.0, 0.9, api_name="/generate")
    shown, said = job.result(timeout=120)
    assert "data:image/png;base64," in shown
    assert f"{RASTER.length} of {RASTER.length} tokens" in said
    assert len(job.outputs()) > 2  # previews on the way


def test_the_app_listens_on_this_machine_alone_and_asks_nothing_of_a_network(client):
    assert client.src.startswith("http://127.0.0.1:")
    page = client.config
    assert page["analytics_enabled"] is False
    assert not re.findall(r"fonts\.(?:googleapis|gstatic)", str(page))


def test_an_upload_is_reconstructed_and_leaves_no_file(client, photo, tmp_path):
    from gradio_client import handle_file

    photo.save(tmp_path / "mine.png")
    before, errors = client.predict(handle_file(tmp_path / "mine.png"), api_name="/reconstruct")
    assert before.count("data:image/png;base64,") == 2
    assert "PSNR" in errors
    assert [path for path in client.uploads.rglob("*") if path.is_file() and path.stat().st_size] == []
    maps = client.predict("cat", api_name="/tokens")
    assert "bits on average" in maps
    swapped = client.predict(2, 1, api_name="/swap")
    assert "with id 1" in swapped


def test_what_is_wrong_is_told(client, photo, tmp_path):
    from gradio_client import handle_file

    (tmp_path / "notes.png").write_text("no image")
    with pytest.raises(Exception, match=r"no image that can be read; .*; expected \.png"):
        client.predict(handle_file(tmp_path / "notes.png"), api_name="/reconstruct")
    with pytest.raises(Exception, match=r"position|id 99999 is none of"):
        client.predict(2, 99999, api_name="/swap")
    photo.resize((400, 400)).save(tmp_path / "large.png")
    assert (tmp_path / "large.png").stat().st_size > 50_000
    with pytest.raises(Exception, match=r"(?i)413|size|too large"):
        client.predict(handle_file(tmp_path / "large.png"), api_name="/reconstruct")


def test_without_gradio_the_command_says_what_to_install(monkeypatch):
    import sys

    from vistok.demo import DemoError, launch

    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(DemoError, match=r"pip install 'vistok\[demo\]'"):
        launch(["nowhere"])
    with pytest.raises(ValueError, match="upload limit must be above 0"):
        launch(["nowhere"], max_upload_mb=0)

"""Odd paths, empty values and unknown devices: each is refused before the work whose result it gets."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import torch
from support.eval_data import colour_statistics, smooth_images, write_folder
from support.tiny_models import tiny
from support.tiny_runs import tokenizer_config

from vistok.cli import main
from vistok.data.files import open_tree
from vistok.eval import evaluate, evaluate_reconstruction
from vistok.pipelines import Pipeline
from vistok.signatures import ConfigError
from vistok.train import train
from vistok.utils.devices import choose_device
from vistok.utils.files import atomic_file
from vistok.utils.outputs import continued


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    Pipeline(tiny("vit_vqgan"), tiny("vit_vqgan_gpt")).save_pretrained(folder / "pipe")
    write_folder(folder / "photos", smooth_images(4, seed=0))
    names = {"pipe": "pipe", "photos": "photos", "photo": "photos/0000.png"}
    return {name: str(folder / path) for name, path in names.items()}


@pytest.fixture
def places(tmp_path: Path, monkeypatch) -> Path:
    """An empty current folder; beside it a file, a full folder, links, and a pipe."""
    for name in ("here", "full", "real"):
        (tmp_path / name).mkdir()
    (tmp_path / "file").write_text("kept")
    (tmp_path / "full" / "x").write_text("kept")
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "dangling").symlink_to("later")
    os.mkfifo(tmp_path / "fifo")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path


def contents(folder: Path) -> dict[str, str]:
    return {str(path): path.read_text() if path.is_file() else "" for path in sorted(folder.rglob("*"))}


def message(capsys, *arguments: str) -> str:
    """The message of a command that fails; "" if it works."""
    capsys.readouterr()
    try:
        main(arguments)
    except SystemExit as end:
        printed = " ".join(capsys.readouterr().err.split())
        return printed if end.code == 2 else f"ends with {end.code}: {printed}" * bool(end.code)
    return ""


WRITERS = {
    "sample": ("{pipe}", "--num", "1"),
    "tokenize": ("{pipe}/tokenizer", "data.root={photos}", "data.image_size=16"),
    "pipeline": ("{pipe}/tokenizer", "{pipe}/generator"),
    "convert": ("vit_vqgan/gpt", "{photo}"),
    "pairs": ("{pipe}", "data.root={photos}"),
}
"""Commands that write a folder, with their other arguments."""


def write_to(out: str, command: str, models: dict[str, str], capsys) -> str:
    return message(capsys, command, *(text.format(**models) for text in WRITERS[command]), f"--out={out}")


@pytest.mark.parametrize("command", WRITERS)
@pytest.mark.parametrize(
    ("out", "told"),
    [
        ("../file", "exists already"),
        ("../file/x", "file is a file, so there can be no folder"),
        ("../full", "exists already"),
        ("../fifo", "exists already"),
        (".", "exists already|is the current folder"),
        ("../here", "exists already|is the current folder"),
        ("../full/../here", "exists already|is the current folder"),
        ("", "--out.*it is empty"),
    ],
)
def test_a_folder_that_cannot_be_written_is_refused(command, out, told, models, places, capsys):
    before = contents(places)
    assert re.search(told, found := write_to(out, command, models, capsys)), found
    assert contents(places) == before


@pytest.mark.parametrize(("out", "real"), [("../link", "real"), ("../dangling", "later"), ("new", "here/new")])
def test_a_linked_folder_gets_the_samples(out, real, models, places, capsys):
    assert write_to(out, "sample", models, capsys) == ""
    assert (places / real / "000000.png").is_file()
    assert (places / "here" / out / "samples.json").is_file()
    assert not list(places.rglob("*.unfinished"))


def test_a_results_folder_that_is_a_file(places):
    for out in ("../file", "../file/x"):
        with pytest.raises(NotADirectoryError, match="is a file, so there can be no folder"), continued(Path(out), {}):
            pass
    for out in ("../file", ""):
        with pytest.raises((FileExistsError, ConfigError), match=r"is a file|output_dir is empty"):
            train(tokenizer_config(out))


BAD_FILES = [
    ("../full", IsADirectoryError, "is a folder; name a file"),
    (".", IsADirectoryError, "is a folder; name a file"),
    ("../file/x", NotADirectoryError, "is a file, so there can be no folder"),
    ("../fifo", ValueError, "is a device or a pipe"),
]


@pytest.mark.parametrize(("out", "error", "told"), BAD_FILES)
def test_a_file_that_cannot_be_written_is_refused_at_once(out, error, told, models, places, capsys, monkeypatch):
    before = contents(places)
    with pytest.raises(error, match=told), atomic_file(out):
        pass
    for name in ("vistok.eval.evaluate", "vistok.pipelines.samples._read_pictures"):
        monkeypatch.setattr(name, lambda *_, **__: pytest.fail("the work began"))
    assert told in message(capsys, "eval", models["photos"], "--reference", models["photos"], "--out", out)
    assert told in message(capsys, "reconstruct", f"{models['pipe']}/tokenizer", models["photo"], "--out", out)
    assert contents(places) == before


def test_a_folder_for_scores_that_is_a_file_is_refused_at_once(models, places):
    def features(images):
        pytest.fail("the work began")

    photos = models["photos"]
    with pytest.raises(NotADirectoryError, match="is a file, so there can be no folder"):
        evaluate(photos, photos, features=features, network="mine", out="../file")
    with pytest.raises(NotADirectoryError, match="is a file, so there can be no folder"):
        evaluate_reconstruction(photos, photos, out="../file/x")


@pytest.mark.parametrize(
    "arguments",
    [
        ("sample", "", "--out=x"),
        ("sample", "{pipe}", "--out=x", "--device="),
        ("sample", "{pipe}", "--out=x", "--prompts", ""),
        ("sample", "{pipe}", "", "--out=x"),
        ("eval", "{photos}", "--reference", ""),
        ("eval", "{photos}", "--reference={photos}", "--protocol", ""),
        ("reconstruct", "{pipe}/tokenizer", "{photo}", ""),
        ("quickstart", "--system="),
        ("configs", ""),
        ("train", ""),
    ],
)
def test_values_are_not_empty(arguments, models, places, capsys):
    assert "it is empty" in message(capsys, *(text.format(**models) for text in arguments))
    assert os.listdir() == []


def test_a_text_may_be_empty(models, places, capsys):
    told = message(capsys, "sample", models["pipe"], "--out=x", "--prompt", "")
    assert "takes no prompt" in told


def test_an_empty_init_from_is_not_none(places):
    with pytest.raises(ConfigError, match="init_from is empty"):
        train(tokenizer_config("run", init_from=""))


@pytest.mark.parametrize("device", ["gpu", "", "cuda:x", "meta", "mps", "xpu", "hpu", "lazy", "opengl", True, 1.5])
def test_a_device_that_this_machine_lacks(device, models):
    if device == "mps" and torch.backends.mps.is_available():
        pytest.skip("this machine has mps, so that nothing is refused")
    for use in (
        choose_device,
        lambda device: evaluate(
            models["photos"], models["photos"], features=colour_statistics, network="mine", device=device
        ),
    ):
        with pytest.raises(ValueError, match=r"unknown device|cannot compute on the device|no CUDA GPU"):
            use(device)


def test_links_that_lead_nowhere_in_any_way_are_left_out(tmp_path):
    write_folder(tmp_path / "photos", smooth_images(2, seed=0))
    for name, target in (("loop.png", "loop.png"), ("lost.png", "lost"), ("long.png", "x" * 300)):
        (tmp_path / "photos" / name).symlink_to(target)
    tree = open_tree(tmp_path / "photos")
    assert tree.images() == ["0000.png", "0001.png"]
    assert tree.skipped == [f"{name}.png (a link to nothing)" for name in ("long", "loop", "lost")]

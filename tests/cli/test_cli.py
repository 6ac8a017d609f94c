"""The command line, in-process: what each command writes and prints, and its messages for bad input."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.released import write_tokenizer

import vistok
from vistok.cli import COMMANDS, main
from vistok.config import save_config
from vistok.data.pictures import GAP, to_pil
from vistok.data.sheets import LINE
from vistok.generators.vit_vqgan_gpt import ViTVQGANGPT
from vistok.pipelines import Pipeline
from vistok.tokenizers.vit_vqgan import ViTVQGAN
from vistok.utils.recipes import FOLDER

TINY_VIT = {"dim": 32, "num_layers": 1, "num_heads": 1, "mlp_dim": 32}


def tiny_tokenizer(**arguments) -> ViTVQGAN:
    torch.manual_seed(0)
    settings = {"image_size": 16, "patch_size": 8, "codebook_size": 64, "codebook_embed_dim": 4}
    return ViTVQGAN(**{**settings, "encoder": TINY_VIT, "decoder": TINY_VIT, **arguments})


def tiny_pipeline(**arguments) -> Pipeline:
    tokenizer = tiny_tokenizer()
    torch.manual_seed(1)
    settings = {"num_classes": 3, "dim": 32, "num_layers": 1, "num_heads": 2, "condition_dropout": 0.1, **arguments}
    generator = ViTVQGANGPT(tokenizer.spec, **settings)
    names = ("cat", "dog", "emu") if settings["num_classes"] else ()
    return Pipeline(tokenizer, generator, class_names=names, sampling={"top_k": 40})


@pytest.fixture
def pipe(tmp_path: Path) -> Path:
    tiny_pipeline().save_pretrained(tmp_path / "pipe")
    return tmp_path / "pipe"


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            folder = tmp_path / "photos" / split / name
            folder.mkdir(parents=True)
            for number in range(3):
                low = Image.fromarray(rng.integers(0, 255, (5, 4, 3), dtype=np.uint8))
                low.resize((24, 30), Image.Resampling.BICUBIC).save(folder / f"{number}.png")
    return tmp_path / "photos"


@pytest.fixture
def tokenizer_run(tmp_path: Path, photos: Path) -> Path:
    """What a training run of a tokenizer leaves, as far as commands read it."""
    run = tmp_path / "runs" / "tok"
    tiny_tokenizer().save_pretrained(run / "tokenizer")
    save_config(
        {"task": "tokenizer", "data": {"root": str(photos), "image_size": 16, "flip": True}}, run / "config.yaml"
    )
    return run


def vistok_command(*arguments: object) -> int:
    """Run a command; return its exit code."""
    try:
        main([str(argument) for argument in arguments])
    except SystemExit as exit:
        return int(exit.code or 0)
    return 0


@pytest.fixture
def run_command(capsys):
    """Run a command that succeeds; return what it printed."""

    def run(*arguments: object) -> str:
        code = vistok_command(*arguments)
        printed = capsys.readouterr()
        assert code == 0, printed.err
        return printed.out

    return run


@pytest.fixture
def refused(capsys):
    """Run a command that fails; return its message."""

    def run(*arguments: object) -> str:
        assert vistok_command(*arguments) == 2
        printed = capsys.readouterr()
        assert "Traceback" not in printed.err
        return " ".join(printed.err.split())

    return run


def test_help_is_fast_and_lists_the_commands():
    code = "import sys; from vistok.cli import app; sys.exit(any(m in sys.modules for m in ('torch', 'numpy')))"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("columns", ["80", "110"])
def test_every_command_has_help_that_fits_the_terminal(command, columns, run_command, monkeypatch):
    monkeypatch.setenv("COLUMNS", columns)
    assert command in run_command("--help")
    shown = run_command(command, "--help")
    assert "Usage: vistok " + command in shown
    assert "bool>" not in shown  # flags take no value
    above = [line.strip() for line in shown.split("╭")[0].splitlines()]
    short = [line for line, after in pairwise(above) if after and 0 < len(line) < int(columns) - 30]
    assert all(line.endswith((".", ":")) for line in short), short  # only the terminal breaks lines


def test_version(run_command):
    assert run_command("--version").strip() == f"vistok {vistok.__version__}"


def test_sample_writes_pictures_grid_npz_and_record(pipe, tmp_path, run_command):
    out = tmp_path / "samples"
    printed = run_command(
        "sample", pipe, "--out", out, "--classes", "2,Cat", "--num", 5, "--batch-size", 2, "--seed", 9, "--npz",
        "--guidance-scale", 2, "guidance_interval=[0,3]", "--device", "cpu",
    )  # fmt: skip
    assert "grid.png" in printed
    names = sorted(path.name for path in out.iterdir())
    assert names == [*(f"{i:06d}.png" for i in range(5)), "grid.png", "samples.json", "samples.npz"]
    expected = vistok.pipeline(pipe, device="cpu")(
        [2, 0, 2, 0, 2], seed=9, batch_size=2, guidance_scale=2.0, guidance_interval=(0, 3)
    )
    written = np.stack([np.asarray(Image.open(out / f"{i:06d}.png")) for i in range(5)])
    assert np.array_equal(written, np.stack([np.asarray(image) for image in expected.images]))
    with np.load(out / "samples.npz") as archive:
        assert archive.files == ["arr_0"]
        assert archive["arr_0"].dtype == np.uint8
        assert np.array_equal(archive["arr_0"], written)
    assert Image.open(out / "grid.png").size == (2 * 64 + GAP, LINE + 3 * (64 + GAP) - GAP)  # a column per class
    record = json.loads((out / "samples.json").read_text())
    assert record["labels"] == [2, 0, 2, 0, 2]
    assert record["seed"] == 9
    assert record["options"]["guidance_interval"] == [0, 3]
    assert (record["options"]["guidance_scale"], record["options"]["top_k"]) == (2.0, 40)
    assert record["tokenizer"] == tiny_tokenizer().fingerprint()


def test_sample_in_bfloat16(pipe, tmp_path, run_command):
    run_command("sample", pipe, "--out", tmp_path / "samples", "--num", 3, "--dtype", "bf16", "--device", "cpu")
    expected = vistok.pipeline(pipe, device="cpu", dtype=torch.bfloat16)([0, 1, 2], seed=0)
    written = [np.asarray(Image.open(tmp_path / "samples" / f"{i:06d}.png")) for i in range(3)]
    assert np.array_equal(written, np.stack([np.asarray(image) for image in expected.images]))
    assert json.loads((tmp_path / "samples" / "samples.json").read_text())["dtype"] == "bfloat16"


def test_sample_takes_all_classes_in_turn_by_default(pipe, tmp_path, run_command):
    (tmp_path / "samples").mkdir()
    run_command("sample", pipe, "--out", tmp_path / "samples", "--num", 4)
    assert json.loads((tmp_path / "samples" / "samples.json").read_text())["labels"] == [0, 1, 2, 0]


def test_sample_unconditionally(tmp_path, run_command):
    tiny_pipeline(num_classes=0).save_pretrained(tmp_path / "pipe")
    run_command("sample", tmp_path / "pipe", "--out", tmp_path / "samples", "--num", 3)
    assert json.loads((tmp_path / "samples" / "samples.json").read_text())["labels"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--classes", "catt"], "unknown class 'catt'; did you mean 'cat'? There are 3 classes"),
        (["--classes", "3"], "class id 3 is out of range"),
        (["--num", 0], "number of images must be at least 1, got 0"),
        (["--batch-size", 0], "batch_size must be at least 1, got 0"),
        (["--top-p", 1.5], "top_p must lie in (0, 1]"),
        (["temprature=1"], "temprature: unknown key; did you mean temperature?"),
        (["temperature"], "override 'temperature': expected key=value"),
        (["--device", "gpu"], "unknown device 'gpu'"),
        (["--dtype", "half"], "unknown dtype 'half'; known are fp32, bf16, fp16"),
    ],
)
def test_sample_refuses(pipe, tmp_path, refused, arguments, message):
    assert message in refused("sample", pipe, "--out", tmp_path / "samples", *arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]


def test_existing_folders_are_refused_and_kept(pipe, tokenizer_run, photos, tmp_path, refused):
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine.txt").write_text("precious")
    assert "exists already and is not empty" in refused("sample", pipe, "--out", full)
    assert "exists already" in refused("tokenize", tokenizer_run, "--out", full)
    assert "exists already" in refused("convert", "llamagen", tmp_path / "c2i_B_256.pt", "--out", full)
    assert [(path.name, path.read_text()) for path in full.iterdir()] == [("mine.txt", "precious")]


def test_a_full_disk_leaves_nothing_behind(pipe, tmp_path, refused, monkeypatch):
    def disk_full(self, path, *args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", disk_full)
    message = refused("sample", pipe, "--out", tmp_path / "samples", "--num", 2)
    assert "No space left on device. Nothing was left half-written; free some space" in message
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]


def test_a_full_disk_halfway_says_to_resume(pipe, tmp_path, refused, monkeypatch):
    save, saved = Image.Image.save, []

    def disk_full(self, path, *args, **kwargs):
        if len(saved) == 1:
            raise OSError(28, "No space left on device")
        saved.append(path)
        save(self, path, *args, **kwargs)

    monkeypatch.setattr(Image.Image, "save", disk_full)
    message = refused("sample", pipe, "--out", tmp_path / "samples", "--num", 2)
    assert "No space left on device" in message
    assert "go on with --resume" in message
    assert "run the command again" not in message
    assert (tmp_path / "samples.unfinished" / "000000.png").exists()


def test_errors_are_one_message_unless_debugging(tmp_path, refused, monkeypatch):
    assert "there is no folder 'nowhere', and it is not a hub id" in refused(
        "sample", "nowhere", "--out", tmp_path / "x"
    )
    monkeypatch.setenv("VISTOK_DEBUG", "1")
    with pytest.raises(vistok.checkpoints.CheckpointError):
        main(["sample", "nowhere", "--out", str(tmp_path / "x")])


def test_errors_of_the_program_keep_their_traceback(pipe, tmp_path, monkeypatch):
    def bug(*args, **kwargs):
        raise KeyError("a bug")

    monkeypatch.setattr("vistok.pipelines.samples.write_samples", bug)
    with pytest.raises(KeyError):
        main(["sample", str(pipe), "--out", str(tmp_path / "x")])


def test_tokenize_takes_the_runs_data_or_other(tokenizer_run, photos, tmp_path, run_command):
    printed = run_command("tokenize", tokenizer_run, "--out", tmp_path / "tokens", "--augmentation", "flip")
    assert "6 images in 2 views each, 4 tokens per image" in printed
    assert vistok.data.TokenCache(tmp_path / "tokens").classes == ("cat", "dog")
    cats = photos / "test" / "cat"
    run_command("tokenize", tokenizer_run, f"data.root={cats}", "data.split=null", "--out", tmp_path / "cats")
    assert len(vistok.data.TokenCache(tmp_path / "cats")) == 3
    # A saved tokenizer without its run knows its image size, but no data.
    run_command("tokenize", tokenizer_run / "tokenizer", f"data.root={photos}", "--out", tmp_path / "alone")
    assert len(vistok.data.TokenCache(tmp_path / "alone")) == 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["root=elsewhere"], "override 'root=elsewhere': only data.… applies here"),
        (["data.rot=elsewhere"], "data.rot: unknown key; did you mean data.root?"),
        (["data.root=elsewhere"], "no such folder: elsewhere"),
        (["data.image_size=32"], "set data.image_size=16"),
        (["data.image_size=big"], "data.image_size: got 'big' (str): expected int"),
        (["--augmentation", "flips"], "did you mean 'flip'?"),
    ],
)
def test_tokenize_refuses(tokenizer_run, tmp_path, refused, arguments, message):
    assert message in refused("tokenize", tokenizer_run, "--out", tmp_path / "tokens", *arguments)
    assert not (tmp_path / "tokens").exists()


def test_an_empty_folder_of_images_is_refused(tokenizer_run, tmp_path, refused):
    (tmp_path / "empty").mkdir()
    message = refused("tokenize", tokenizer_run, f"data.root={tmp_path / 'empty'}", "--out", tmp_path / "tokens")
    assert "no images in" in message
    assert "accepted layouts" in message


def test_a_saved_tokenizer_without_data_says_what_is_missing(tokenizer_run, tmp_path, refused):
    assert "needs data.root=…" in refused("tokenize", tokenizer_run / "tokenizer", "--out", tmp_path / "tokens")


def test_reconstruct_shows_originals_over_reconstructions(tokenizer_run, photos, tmp_path, run_command):
    images = sorted(photos.rglob("*.png"))[:2]
    printed = run_command("reconstruct", tokenizer_run, *images, "--out", tmp_path / "sheet.png")
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    row = 8 * 16 + LINE + GAP  # an image, eight times as large, its label, and the line below
    assert sheet.shape == (2 * row - GAP, 2 * 8 * 16 + GAP, 3)
    tokenizer = vistok.load(tokenizer_run / "tokenizer")
    original = vistok.data.pictures.from_pil([Image.open(images[0])], (16, 16), 3)
    [below] = to_pil(tokenizer.reconstruct(original))
    [above] = to_pil(original)
    assert np.array_equal(sheet[: 8 * 16 : 8, : 8 * 16 : 8], np.asarray(above))
    assert np.array_equal(sheet[row : row + 8 * 16 : 8, : 8 * 16 : 8], np.asarray(below))
    error = np.square((np.asarray(above, float) - np.asarray(below, float)) / 255).mean()
    assert f"{images[0]}  PSNR {-10 * np.log10(error):.2f} dB" in printed


def test_reconstruct_refuses_what_is_no_image(tokenizer_run, tmp_path, refused):
    text = tmp_path / "notes.txt"
    text.write_text("not an image")
    assert "notes.txt: no image that can be read" in refused("reconstruct", tokenizer_run, text)
    assert "there is no image file" in refused("reconstruct", tokenizer_run, tmp_path / "gone.png")


def test_eval_of_a_tokenizer_scores_its_test_images(tokenizer_run, photos, tmp_path, run_command):
    printed = run_command("eval", tokenizer_run, "--out", tmp_path / "result.json")
    result = json.loads((tmp_path / "result.json").read_text())
    assert f"{result['scores']['psnr']:.4f}" in printed
    assert result["images"]["count"] == 6
    assert result["tokenizer"]["fingerprint"] == tiny_tokenizer().fingerprint()
    files = sorted((photos / "test").rglob("*.png"))
    pixels = vistok.data.pictures.from_pil([Image.open(file) for file in files], (16, 16), 3)
    originals = np.stack([np.asarray(image, float) for image in to_pil(pixels)])
    decoded = np.stack([np.asarray(image, float) for image in to_pil(tiny_tokenizer().reconstruct(pixels))])
    psnr = -10 * np.log10(np.square((originals - decoded) / 255).mean((1, 2, 3)))
    assert result["scores"]["psnr"] == pytest.approx(psnr.mean())
    other = run_command("eval", tokenizer_run, "--reference", photos / "train" / "cat", "data.split=null")
    assert "3 images" in other


def test_eval_of_a_tokenizer_refuses_images_it_cannot_read(tokenizer_run, photos, refused):
    (photos / "test" / "cat" / "0.png").write_bytes(b"not an image")
    assert "cannot read an image that is to be scored" in refused("eval", tokenizer_run)
    assert "reads 3 channels, got 1" in refused("eval", tokenizer_run, "data.channels=1", "data.split=train")


def test_eval_of_images_needs_a_reference(photos, refused, tmp_path):
    assert "--reference" in refused("eval", photos)
    assert "only the run of a tokenizer takes" in refused("eval", photos, "data.split=val", "--reference", photos)
    assert "unknown protocol 'fid'" in refused("eval", photos, "--reference", photos, "--protocol", "fid")
    missing = refused("eval", photos, "--reference", photos, "--weights", tmp_path / "gone.pth")
    assert "there is no weights file" in missing


def test_eval_of_images_hands_everything_on(photos, tmp_path, run_command, monkeypatch):
    asked = {}

    def score(images, reference, **options):
        asked.update(images=images, reference=reference, **options)
        described = {"count": 12, "source": images}
        return {
            "protocol": options["protocol"], "scores": {"fid": 1.23456, "psnr": None}, "images": described,
            "reference": described, "warnings": ["only 12 images"],
        }  # fmt: skip

    from vistok.utils.processes import Processes

    monkeypatch.setattr("vistok.eval.evaluate", score)
    printed = run_command(
        "eval", photos, "--reference", "ref.npz", "--protocol", "adm", "--metrics", "fid,is", "--batch-size", 8,
        "--out", tmp_path / "result.json",
    )  # fmt: skip
    assert "1.2346" in printed
    assert "infinite" in printed
    assert asked == {
        "images": str(photos), "reference": "ref.npz", "protocol": "adm", "metrics": ["fid", "is"], "weights": None,
        "lpips": None, "crop": None, "batch_size": 8, "device": None, "processes": Processes(),
    }  # fmt: skip
    assert json.loads((tmp_path / "result.json").read_text())["warnings"] == ["only 12 images"]


@pytest.fixture
def official(tmp_path: Path):
    """A released-looking file of a tiny ViT-VQGAN with training losses inside, and its arguments."""
    return write_tokenizer(tmp_path / "released", tiny_tokenizer(), **{"loss.logvar": torch.zeros(1)})


def test_convert_names_parameters_and_what_was_dropped(official, tmp_path, capsys):
    file, arguments = official
    out = tmp_path / "converted"
    assert vistok_command("convert", "vit_vqgan/tokenizer", file, "--out", out, "--config", arguments) == 0
    printed = capsys.readouterr()
    assert vistok.load(out).fingerprint() == tiny_tokenizer().fingerprint()
    count = sum(parameter.numel() for parameter in tiny_tokenizer().parameters())
    assert f"ViTVQGAN with {count:,} parameters" in printed.out
    assert "1 entries are no part of the model and were dropped: loss.logvar" in " ".join(printed.err.split())


def test_convert_refuses(official, tmp_path, refused):
    file, arguments = official
    out = tmp_path / "converted"
    assert "say vit_vqgan/tokenizer or vit_vqgan/gpt" in refused("convert", "vit_vqgan", file, "--out", out)
    assert "did you mean" in refused("convert", "vit_vqgam/tokenizer", file, "--out", out)
    absent = refused("convert", "vit_vqgan/tokenizer", file.with_name("tiny.pt"), "--out", out)
    assert "there is no file" in absent
    assert "tiny.ckpt" in absent
    assert "none.json" in refused("convert", "vit_vqgan", file, "--out", out, "--config", tmp_path / "none.json")
    assert "not the name of a released" in refused("convert", "vit_vqgan/tokenizer", file, "--out", out)
    arguments.write_text("{")
    message = refused("convert", "vit_vqgan/tokenizer", file, "--out", out, "--config", arguments)
    assert "tiny.json does not hold JSON" in message
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(b"\x00" * 20)
    message = refused("convert", "vit_vqgan", damaged.rename(tmp_path / "imagenet_vitvq_small.ckpt"), "--out", out)
    assert "cannot be read safely as weights" in message
    assert not out.exists()


def test_models_lists_every_system(run_command):
    from vistok.checkpoints.registry import ENTRIES

    printed = run_command("models")
    for item in ENTRIES:
        assert item.official in printed
        assert item.paper in printed
    assert "110.9 M" in printed  # LlamaGen-B, as its README says
    assert "c2i_XXL_384.pt" in printed


def test_models_can_be_filtered_by_a_word(run_command, refused):
    printed = run_command("models", "flextok")
    assert "imagenet256/flextok_d12_d12" in printed
    assert "Apple, research only" in printed
    assert "llamagen/gpt" in printed  # one of llamagen/gpt's recipes trains on FlexTok's tokens
    assert "c2i_XXL_384.pt" not in printed
    assert "LlamaGen/vq_ds16_c2i.pt" in run_command("models", "c2i_XXL_384")  # the tokenizer of c2i_XXL_384
    assert "no model has 'flextik' in its names" in refused("models", "flextik")


def test_models_needs_no_torch():
    code = "import sys; from vistok.cli import main; main(['models', 'rar']); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=60)


def test_the_catalogue_that_ships_is_that_of_the_registry(monkeypatch):
    """It is written by: python -m vistok.checkpoints.catalogue"""
    from vistok.checkpoints import catalogue

    shipped = json.loads(catalogue.FILE.read_text())
    monkeypatch.setattr(catalogue, "_parameters", lambda build, arguments: None)  # counting them takes seconds
    found = json.loads(json.dumps([dataclasses.asdict(item) for item in catalogue.catalogue()]))
    assert found == [item | {"sizes": dict.fromkeys(item["sizes"])} for item in shipped]


def test_the_catalogue_counts_parameters():
    from vistok.checkpoints import catalogue, registry

    counted = catalogue._describe(registry.entry("larp", "tokenizer")).sizes
    assert counted == next(item["sizes"] for item in json.loads(catalogue.FILE.read_text()) if item["name"] == "larp")


def test_help_and_version_are_commands_too(run_command, refused):
    assert "Autoregressive visual generation" in run_command("help")
    assert "--guidance-scale" in run_command("help", "sample")
    assert "there is no command 'smaple'; did you mean 'sample'? `vistok help` lists all" in refused("help", "smaple")
    assert run_command("version") == run_command("--version") == f"vistok {vistok.__version__}\n"


def test_shells_complete_commands_and_configs(monkeypatch, capsys):
    words = {"vistok train cifar10/llamagen": "cifar10/llamagen_vq", "vistok pipe": "pipeline"}
    for typed, expected in words.items():
        monkeypatch.setenv("_VISTOK_COMPLETE", "complete_bash")
        monkeypatch.setenv("COMP_WORDS", typed)
        monkeypatch.setenv("COMP_CWORD", str(typed.count(" ")))
        with pytest.raises(SystemExit):
            main([])
        assert expected in capsys.readouterr().out


def test_home_is_meant_by_a_tilde_everywhere(tmp_path, pipe, photos, run_command, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    run_command("sample", "~/pipe", "--num", 2, "--out", "~/made")
    assert (tmp_path / "made" / "grid.png").exists()
    assert vistok.pipeline("~/pipe").class_names == ("cat", "dog", "emu")
    assert vistok.load("~/pipe").registry_name == "vit_vqgan_gpt"
    run_command("tokenize", "~/pipe", "data.root=~/photos", "--out", "~/tokens")
    assert (tmp_path / "tokens").is_dir()


def test_a_folder_can_be_reconstructed(tokenizer_run, photos, tmp_path, run_command, refused):
    printed = run_command("reconstruct", tokenizer_run, photos, "--out", tmp_path / "r.png")
    assert printed.count("PSNR") == 12
    (tmp_path / "empty").mkdir()
    assert "there are no image files" in refused("reconstruct", tokenizer_run, tmp_path / "empty")


def test_what_a_config_leaves_open_hides_no_other_mistake(tmp_path, refused):
    message = refused("train", "cifar10/llamagen_vq", "data.imagesize=3")
    assert "did you mean data.image_size" in message
    assert "data.source=folder needs data.root=" in refused("train", "cifar10/llamagen_vq", f"output_dir={tmp_path}/r")
    hub = refused("train", "cifar10/llamagen_vq", "data.source=huggingface", f"output_dir={tmp_path}/r")
    assert "needs data.name=" in hub
    assert "needs 'tokens'" in refused("train", "cifar10/llama")
    paired = refused("train", "imagenet256/robustok_post", "data.root=x")
    assert "data.target_root is left open (???); give it: data.target_root=…" in paired


def test_messages_say_what_to_do(pipe, photos, tmp_path, run_command, refused, monkeypatch):
    assert "1 sample is in" in run_command("sample", pipe, "--num", 1, "--out", tmp_path / "one")
    unknown = refused("eval", photos, "--reference", photos, "--protocol", "pertubation")
    assert "of a tokenizer: reconstruction, perturbation; of clips: larp-ucf-gen, " in unknown

    def unreachable(*given, **named):
        raise OSError("no network")

    monkeypatch.setattr("torch.hub.load_state_dict_from_url", unreachable)
    lpips = refused("train", "imagenet256/llamagen_vq16", f"data.root={photos}", f"output_dir={tmp_path}/r")
    assert "losses.lpips_weights=FILE" in lpips


def test_a_folder_that_is_not_there_is_told_with_those_beside_it(pipe, tmp_path, refused, monkeypatch):
    (tmp_path / "runs" / "first" / "checkpoints" / "step-0000004").mkdir(parents=True)
    near = refused("sample", f"{tmp_path}/runs/first/checkpoints/step-4", "--out", tmp_path / "s")
    assert near.endswith("first/checkpoints has step-0000004")
    assert f"there is no folder {tmp_path}/runs/frist; {tmp_path}/runs has first" in refused(
        "report", tmp_path / "runs" / "frist"
    )
    assert "pipe is no training run with steps: it has no config.yaml" in refused("report", pipe)
    monkeypatch.chdir(tmp_path)
    assert "folder runs/first/checkpoints/step-5; runs/first/checkpoints has step-0000004" in refused(
        "sample", "runs/first/checkpoints/step-5", "--out", "s"
    )

    def unreachable(*given, **named):
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    either = refused("sample", "runs/second", "--out", "s")  # may be a hub id as well
    assert "there is no local folder 'runs/second'; runs has first, and it could not be fetched from the hub" in either


def test_configs_are_listed_printed_and_copied(run_command, refused, tmp_path):
    assert "LlamaGen's convolutional VQGAN at 32 px" in run_command("configs", "cifar10")
    assert "task: tokenizer" in run_command("configs", "cifar10/llamagen_vq")
    run_command("configs", "cifar10/llama.yaml", "--copy", tmp_path / "mine")
    assert (tmp_path / "mine" / "llama.yaml").read_bytes() == (FOLDER / "cifar10" / "llama.yaml").read_bytes()
    assert "exists already" in refused("configs", "cifar10/llama", "--copy", tmp_path / "mine")
    run_command("configs", "emoji", "--copy", tmp_path / "mine")
    copied = sorted(file.name for file in (tmp_path / "mine" / "emoji").iterdir())
    assert copied == ["llama.yaml", "llamagen_vq.yaml", "ta_titok.yaml"]
    assert "did you mean cifar10/llama" in refused("configs", "cifar10/lama")


def test_train_runs_a_config_by_its_name(run_command, refused, monkeypatch):
    asked = {}
    monkeypatch.setattr("vistok.train.train", lambda config, *, resume: asked.update(config) or Path("runs/x"))
    run_command("train", "cifar10/llamagen_vq", "data.root=p")
    assert asked["model"]["name"] == "llamagen_vq"
    assert "did you mean cifar10/llamagen_vq" in refused("train", "cifar10/llamagen_vp", "data.root=p")
    assert "did you mean" in refused("train", "../configs/cifar10/llama")


def test_train_passes_config_overrides_and_resume_on(tmp_path, run_command, monkeypatch):
    asked = {}

    def train(config, *, resume):
        asked.update(config=config, resume=resume)
        return Path("runs/x")

    monkeypatch.setattr("vistok.train.train", train)
    save_config({"task": "tokenizer", "optimizer": {"lr": 1e-3}}, tmp_path / "c.yaml")
    assert "runs/x" in run_command("train", tmp_path / "c.yaml", "optimizer.lr=2e-4", "data.root=p", "--resume")
    assert asked["resume"] is True
    assert asked["config"] == {"task": "tokenizer", "optimizer": {"lr": 2e-4}, "data": {"root": "p"}}


def test_train_refuses(tmp_path, refused):
    assert "there is no config file" in refused("train", tmp_path / "none.yaml")
    save_config({"task": "tokenizer", "optimiser": {"lr": 1e-3}}, tmp_path / "c.yaml")
    assert "did you mean optimizer?" in refused("train", tmp_path / "c.yaml")

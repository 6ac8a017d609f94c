"""Files from others only give values: no commands, no environment, no pickles."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from vistok.cli import main
from vistok.config import Allowed, load_config, override, save_config
from vistok.data import DataConfig, open_source
from vistok.pipelines.runs import data_of_run
from vistok.signatures import ConfigError, ShellCommand
from vistok.tokenizers.vit_vqgan import ViTConfig, ViTVQGAN
from vistok.train.tasks import any_config

TINY = ViTConfig(dim=16, num_layers=1, num_heads=1, mlp_dim=16)
RESOLVERS = [
    "${oc.env:HOME}",
    "x${oc.env:HOME,default}y",
    "${oc.env:${name}}",
    "${${name}.env:HOME}",
    "${oc.decode:'1'}",
    "${oc.create:${data}}",
    "${oc.select:name}",
    "${oc.deprecated:name}",
    "${oc.dict.keys:data}",
    "${unknown:x}",
    "\\\\${oc.env:HOME}",
]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The run folder of a valid tokenizer; its config is the attacker's."""
    monkeypatch.chdir(tmp_path)
    ViTVQGAN(16, 8, TINY, TINY, 32, 4).save_pretrained(tmp_path / "run" / "tokenizer")
    return tmp_path / "run"


def write(run: Path, **data: object) -> None:
    (run / "config.yaml").write_text(yaml.safe_dump({"data": {"image_size": 16, "source": "webdataset", **data}}))


def stopped(*arguments: str, capsys: pytest.CaptureFixture) -> str:
    """Run a command that must fail with one message; return the message."""
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    "root", ["pipe:touch owned; false", "pipe:touch {0..3}", "PiPe:touch owned", "{0..1}pipe:touch owned"]
)
@pytest.mark.parametrize("command", [["tokenize", "--out", "tokens"], ["eval"]])
def test_the_config_of_a_foreign_run_runs_nothing(run: Path, capsys, root: str, command: list[str]):
    write(run, root=root)
    before = set(run.parent.iterdir())
    stopped(command[0], str(run), *command[1:], capsys=capsys)
    assert set(run.parent.iterdir()) == before


@pytest.mark.parametrize("text", RESOLVERS)
def test_the_config_of_a_foreign_run_does_not_read_the_environment(run: Path, capsys, text: str):
    write(run, root=f"https://127.0.0.1:1/{text}")
    message = stopped("tokenize", str(run), "--out", "tokens", capsys=capsys)
    assert "config.yaml" in message
    assert "refers to its own keys alone" in message or "Interpolation" in message or "127.0.0.1:1" not in message


@pytest.mark.parametrize("section", ["data", "validation"])
def test_a_foreign_training_config_runs_nothing(tmp_path: Path, capsys, section: str, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = {"image_size": 16, "source": "digits", "channels": 1}
    attack = {"source": "webdataset", "root": "pipe:touch owned; false"}
    vit = {"dim": 16, "num_layers": 1, "num_heads": 1, "mlp_dim": 16}
    config = {
        "stage": "tokenizer",
        "output_dir": "out",
        "model": {"name": "vit_vqgan", "patch_size": 8, "encoder": vit, "decoder": vit, "codebook_size": 32}
        | {"codebook_embed_dim": 4},
        "losses": {"l2": 1.0},
        "data": data | (attack if section == "data" else {}),
        "training": {"max_steps": 1},
    }
    if section == "validation":
        config["validation"] = {"data": attack}
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(config))
    assert "would run a command" in stopped("train", "x.yaml", "--dry-run", capsys=capsys)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("text", RESOLVERS)
def test_files_call_no_resolver(tmp_path: Path, text: str, monkeypatch):
    path = tmp_path / "x.yaml"
    monkeypatch.setenv("SECRET", "s3cret")
    values = {"name": "oc", "data": {"a": 1}, "attack": [{"deep": text.replace("HOME", "SECRET")}]}
    path.write_text(yaml.safe_dump(values))
    with pytest.raises(ConfigError, match=r"x\.yaml: attack\[0\]\.deep: got .*refers to its own keys alone"):
        load_config(path)
    path.write_text("name: oc\n")
    with pytest.raises(ConfigError, match=r"reads the environment|refers to its own keys alone"):
        load_config(path, [f"attack={text}"])


def test_the_command_line_may_if_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "x.yaml"
    path.write_text("a: 1\nb: ${a}\n")
    monkeypatch.setenv("SHARDS", "${oc.env:HOME}/shards")
    environment, commands = Allowed(environment=True), Allowed(commands=True)
    found = load_config(
        path, ["c=${oc.env:SHARDS}/x", "d=${oc.env:NONE,5}", "e=${a}${oc.env:SHARDS}"], allowed=environment
    )
    assert found == {"a": 1, "b": 1, "c": "${oc.env:HOME}/shards/x", "d": 5, "e": "1${oc.env:HOME}/shards"}
    with pytest.raises(ConfigError, match="no environment variable NONE"):
        load_config(path, ["c=${oc.env:NONE}"], allowed=environment)
    with pytest.raises(ConfigError, match="add --allow-commands"):
        load_config(path, ["data.root=pipe:ls"], allowed=environment)
    found = load_config(path, ["data.root=pipe:ls {0..3} ${x}", "data.image_size=8"], allowed=commands)
    assert found["data"] == {"root": ShellCommand("ls {0..3} ${x}"), "image_size": 8}
    save_config(found, path)
    assert load_config(path)["data"]["root"] == "pipe:ls {0..3} ${x}", "which runs nothing any more"


def test_a_run_with_a_command_of_the_command_line(run: Path, tmp_path: Path, capsys):
    write(run)
    data = data_of_run(run, ["data.root=pipe:ls"], input_shape=(3, 16, 16), allowed=Allowed(commands=True))
    assert data.root == ShellCommand("ls")
    assert "add --allow-commands" in stopped("eval", str(run), "data.root=pipe:touch owned", capsys=capsys)
    stopped("eval", str(run), "data.root=pipe:touch owned", "data.split=train", "--allow-commands", capsys=capsys)
    assert (tmp_path / "owned").exists()


def test_texts_that_look_like_references_stay_texts(tmp_path: Path):
    path = tmp_path / "x.yaml"
    values = {"a": "${b}", "b": r"\${c}", "c": "\\\\${oc.env:HOME}", "d": "$" + "{", "e": ["${", "}${a.b}"]}
    save_config(values, path)
    assert load_config(path) == values
    assert override(values, ["f=1"]) == values | {"f": 1}


def test_yaml_bombs_are_refused(tmp_path: Path):
    path = tmp_path / "x.yaml"
    lines = ["a0: &a0 [x]"] + [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12)]
    path.write_text("\n".join(lines))
    with pytest.raises(ConfigError, match="more than 1,000,000 values"):
        load_config(path)
    path.write_text("a: &a [*a]")
    with pytest.raises(ConfigError, match=r"x\.yaml: "):
        load_config(path)
    path.write_text("a: " + "[" * 5000)
    with pytest.raises(ConfigError, match=r"x\.yaml: "):
        load_config(path)
    path.write_text("a: ${b}\nb: ${a}\n")
    with pytest.raises(ConfigError, match=r"x\.yaml: "):
        load_config(path)


class Attack:
    def __reduce__(self):
        return (Path.touch, (Path("owned"),))


def test_pickles_are_not_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from vistok.checkpoints import CheckpointError, read_weights

    monkeypatch.chdir(tmp_path)
    torch.save({"model": Attack()}, "state.pt")
    with pytest.raises(CheckpointError):
        read_weights("state.pt")
    (tmp_path / "_cache_").write_bytes(pickle.dumps(Attack()))
    for name in ("LSUN", "LSUNClass"):
        with pytest.raises(ValueError, match="unpickles a file"):
            open_source(DataConfig(8, source="torchvision", name=name, root=str(tmp_path)))
    with pytest.raises((FileNotFoundError, ConfigError)):
        open_source(DataConfig(8, source="huggingface", root="simplecache::ssh://host/x"))
    assert not (tmp_path / "owned").exists()


def test_every_door_of_the_command_line_is_closed(tmp_path: Path):
    """A file name with shell characters, and sampling options with references, stay plain text."""
    done = subprocess.run(
        [sys.executable, "-m", "vistok", "sample", "run", "--out", "$(touch owned)", "top_k=${oc.env:HOME}"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=120,
    )
    assert done.returncode == 2
    assert "add --allow-environment" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("output_dir=20241128", "20241128"),
        ("output_dir=012", "012"),
        ("output_dir=12:30", "12:30"),
        ("output_dir=[crop]", "[crop]"),
        ("output_dir=runs/a #2", "runs/a #2"),
        ("output_dir=true", "true"),
        ("output_dir=1e3", "1e3"),
        ("output_dir={a: 1}", "{a: 1}"),
        ("output_dir=a=b: c", "a=b: c"),
        ("output_dir=*x &y !z", "*x &y !z"),
        ('output_dir="quoted"', '"quoted"'),
        ("data.root=photos #2", "photos #2"),
        ("data.root=null", None),
        ("validation.data.root=2024 #1", "2024 #1"),
        ("init_from=null", None),
        ("tokens=0123", "0123"),
        ("tokens=[a, 012, b c]", ["a", "012", "b c"]),
        ("tokens=[a", "[a"),
        ("model.vae_weights=vae #2", "vae #2"),
        ("model.vae_weights=012", "012"),
        ("model.vae_weights=null", None),
        ("model.time_frequencies=12", 12),
        ("losses.lpips.weights=[vgg] #1", "[vgg] #1"),
        ("losses.lpips=0.5", 0.5),
        ("losses.lpips_weights=1e3", "1e3"),
        ("losses.code_prediction.tokenizer=2024", "2024"),
        ("losses.semantic.encoder.weights=a: b", "a: b"),
        ("losses.gan.discriminator.weights=12:30", "12:30"),
        ("losses.gan.weight=1e-1", 0.1),
    ],
)
def test_text_stays_text_where_the_key_is_a_string(tmp_path: Path, text: str, value: object):
    path = tmp_path / "x.yaml"
    path.write_text("seed: 0\nmodel: {name: llamagen_vq}\n")
    overrides = [text, "seed=3", "model.name=flextok", "model.image_size=16", "losses.gan.discriminator.name=dino"]
    found = load_config(path, overrides, target=any_config())
    assert found["seed"] == 3
    assert found["model"]["image_size"] == 16
    for part in text.partition("=")[0].split("."):
        found = found[part]
    assert found == value


@pytest.mark.parametrize(
    "value",
    ["a=b", "=", "=x", "a,b", "'q'", '"q"', '"q', "~", "~/x", "é/日本", "a b", "#x", "a #x", "[x", "{x", "- x", "x:"]
    + ["*x", "&x", "!x", "%41", "@x", "`x`", "|", "> x", "NULL", "~null", "None", "true", "0x10", ".inf", "a\nb", "-x"]
    + ["--x", "\\", "C:\\x", "file:///x", "x" * 5000, "\udce9"],
)
@pytest.mark.parametrize("key", ["output_dir", "data.root", "data.split", "data.caption_column", "init_from"])
def test_paths_and_names_are_what_is_behind_the_first_equals_sign(tmp_path: Path, key: str, value: str):
    path = tmp_path / "x.yaml"
    path.write_text("seed: 0\noutput_dir: runs/x\nmodel: {name: llamagen_vq}\ndata: {source: folder}\n")
    found = load_config(path, [f"{key}={value}"], target=any_config())
    for part in key.split("."):
        found = found[part]
    assert found == value


@pytest.mark.parametrize("key", ["output_dir", "data.root", "data.source", "model.name", "seed"])
def test_a_value_that_is_left_open_does_not_leave_the_old_one(tmp_path: Path, key: str):
    path = tmp_path / "x.yaml"
    path.write_text("seed: 0\noutput_dir: runs/x\nmodel: {name: llamagen_vq}\ndata: {source: folder, root: y}\n")
    with pytest.raises(ConfigError, match=rf"override '{key}=\?\?\?': \?\?\? stands for a value that is left open"):
        load_config(path, [f"{key}=???"], target=any_config())
    with pytest.raises(ConfigError, match=r"if \$\{ is part of a text, write \\\$\{"):
        load_config(path, [f"{key}=a${{b}}"], target=any_config())

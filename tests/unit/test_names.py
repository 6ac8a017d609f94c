"""Folders and files whose names are not UTF-8, as Linux allows: they work, or one message names the remedy."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.processes import SECONDS
from support.tiny_models import tiny
from support.tiny_runs import generator_config, tokenizer_config, write_tokens

import vistok
from vistok.signatures import ConfigError
from vistok.train import train
from vistok.utils.files import utf8_path

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="names are texts there")

NAME = os.fsdecode(b"caf\xe9")


def test_models_are_saved_and_loaded_below_such_a_folder(tmp_path: Path):
    model = tiny("vit_vqgan")
    model.save_pretrained(tmp_path / NAME)
    for key, tensor in vistok.load(tmp_path / NAME).state_dict().items():
        assert torch.equal(tensor, model.state_dict()[key]), key
    assert [path.name for path in tmp_path.iterdir()] == [NAME]


def test_a_file_of_such_a_name_is_named(tmp_path: Path):
    with (
        pytest.raises(ValueError, match=r"the name of the file 'caf\\udce9' is not UTF-8; rename it"),
        utf8_path(tmp_path / NAME),
    ):
        pass


@pytest.mark.parametrize("key", ["output_dir", "data.root"])
def test_a_config_cannot_hold_them_and_says_so_before_anything_is_written(tmp_path: Path, key: str):
    section, _, inner = key.rpartition(".")
    value = str(tmp_path / NAME)
    config = tokenizer_config(tmp_path / "run")
    config = config | ({section: config[section] | {inner: value}} if section else {key: value})
    with pytest.raises(ConfigError, match=rf"{key}: got .* a config is UTF-8, and this is not; rename it"):
        train(config)
    assert list(tmp_path.iterdir()) == []


EVERY_LINE = """
import os, sys
from vistok.cli import main
for number, line in enumerate(os.fsdecode(sys.stdin.buffer.read()).split("\\n")):
    print(end="\\0" if number else "")
    try:
        main(line.split("\\t"))
    except SystemExit as end:
        assert not end.code, (line, end.code)
"""
"""A process that runs the commands of its input, one per line with tabs between arguments, and prints NULs between."""


@pytest.mark.slow
def test_runs_that_were_moved_to_such_a_folder(tmp_path: Path):
    """Every command works on them, and prints; all in one process, since its start takes longest."""
    few = {"max_steps": 1, "image_every": 0}
    tokenizer = train(tokenizer_config(tmp_path / "tokenizer", training=few))
    generator = train(generator_config(tmp_path / "generator", write_tokens(tmp_path / "tokens"), training=few))
    folder = tmp_path / NAME
    folder.mkdir()
    for run in (tokenizer, generator):
        shutil.move(run, folder)
    commands = (
        ["report", folder / "tokenizer"],
        ["tokenize", folder / "tokenizer", "--out", folder / "tokens"],
        ["sample", folder / "generator", "--out", folder / "samples", "--num", "2"],
        ["reconstruct", folder / "tokenizer", folder / "samples", "--out", folder / f"{NAME}.png"],
        ["pipeline", folder / "tokenizer", folder / "generator", "--out", folder / "pipeline"],
    )
    texts = "\n".join("\t".join(map(os.fspath, command)) for command in commands)
    done = subprocess.run(
        [sys.executable, "-c", EVERY_LINE], input=os.fsencode(texts), capture_output=True, timeout=SECONDS
    )
    assert done.returncode == 0, done.stderr
    for command, printed in zip(commands, done.stdout.split(b"\0"), strict=True):
        assert b"caf\\udce9" in printed, command

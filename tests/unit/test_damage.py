"""Damaged files: for every damage, a vistok error names the file; no other error is raised."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import example, given
from hypothesis import strategies as st
from support.damages import FEW, changed, damages, outcome, places, values
from support.tiny_models import tiny
from support.tiny_runs import tokenizer_config, write_tokens

from vistok.checkpoints import CheckpointError, convert, from_official, load, read_weights
from vistok.config import load_config
from vistok.data.tokens import TokenCache, TokenCacheError
from vistok.eval.benchmark import RESULT_FILE, _earlier
from vistok.eval.plan import BenchmarkError
from vistok.pipelines.folders import read_settings
from vistok.signatures import ConfigError
from vistok.train.config import RunConfig


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("damage") / "model"
    tiny("vit_vqgan").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokens(tmp_path_factory.mktemp("damage") / "tokens")


@FEW
@given(damage=damages())
def test_config_json(model: Path, tmp_path_factory: pytest.TempPathFactory, damage: Callable):
    folder = tmp_path_factory.mktemp("copy") / "model"
    shutil.copytree(model, folder)
    path = folder / "config.json"
    path.write_bytes(damage(path.read_bytes()))
    from vistok.checkpoints.registry import UnknownModelError

    outcome(lambda: load(folder), (CheckpointError, UnknownModelError), "model")


@pytest.mark.parametrize(
    "arguments",
    [
        {"codebook_size": -1},
        {"codebook_size": 0},
        {"codebook_size": 1.5},
        {"codebook_size": 10**8},
        {"encoder": None},
        {"encoder": {"dim": -16, "num_layers": 1, "num_heads": 1, "mlp_dim": 16}},
        {"encoder": {"dim": 0, "num_layers": 1, "num_heads": 0, "mlp_dim": 16}},
        {"encoder": {"dim": 32, "num_layers": 2**70, "num_heads": 1, "mlp_dim": 32}},
        {"encoder": {"dim": 32, "num_layers": 10**6, "num_heads": 1, "mlp_dim": 32}},
        {"encoder": {"dim": 2**20, "num_layers": 1, "num_heads": 1, "mlp_dim": 32}},
        {"image_size": 0},
        {"image_size": 2**70},
        {"image_size": 2**31},
        {"patch_size": 0},
        {"codebook_embed_dim": "4"},
        {"unknown": 1},
    ],
)
def test_arguments_of_no_model(model: Path, tmp_path: Path, arguments: dict):
    shutil.copytree(model, tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    saved = json.loads(path.read_text())
    path.write_text(json.dumps(saved | {"arguments": saved["arguments"] | arguments}))
    with pytest.raises(CheckpointError, match=r"model"):
        load(tmp_path / "model")


@FEW
@given(damage=damages())
def test_index_json(cache: Path, tmp_path_factory: pytest.TempPathFactory, damage: Callable):
    folder = tmp_path_factory.mktemp("copy") / "tokens"
    shutil.copytree(cache, folder, ignore=shutil.ignore_patterns("tokenizer"))
    path = folder / "index.json"
    path.write_bytes(damage(path.read_bytes()))
    outcome(lambda: TokenCache(folder).batch([0], [0]), TokenCacheError, "tokens")


@pytest.mark.parametrize("kind", ["tokens", "labels"])
@pytest.mark.parametrize("dtype", [np.float64, np.int8, np.complex64, object])
def test_shards_of_another_type(cache: Path, tmp_path: Path, kind: str, dtype: type):
    shutil.copytree(cache, tmp_path / "tokens")
    path = tmp_path / "tokens" / f"{kind}-00000.npy"
    np.save(path, np.load(path).astype(dtype), allow_pickle=True)
    with pytest.raises(TokenCacheError, match=rf"{kind}-00000\.npy"):
        TokenCache(tmp_path / "tokens")


@FEW
@given(damage=damages())
def test_pipeline_json(tmp_path_factory: pytest.TempPathFactory, damage: Callable):
    folder = tmp_path_factory.mktemp("pipeline")
    content = json.dumps({"class_names": ["cat", "dog"], "sampling": {"guidance_scale": 2.0}}).encode()
    (folder / "pipeline.json").write_bytes(damage(content))
    outcome(lambda: read_settings(folder), CheckpointError, "pipeline.json")


@FEW
@given(damage=damages())
def test_result_json(tmp_path_factory: pytest.TempPathFactory, damage: Callable):
    from vistok.eval.plan import BenchmarkPlan

    folder = tmp_path_factory.mktemp("benchmark")
    (folder / RESULT_FILE).write_bytes(damage(json.dumps({"runs": [{"guidance_scale": [1.0, 2.0]}]}).encode()))
    plan = BenchmarkPlan(16, "none", 0, 0, {}, "a", "b", {}, "float32", (16, 16), None)
    outcome(lambda: _earlier(folder, plan, []), BenchmarkError, RESULT_FILE)


@FEW
@given(damage=damages())
@example(damage=lambda content: b'{"task": ["tokenizer"]}')
@example(damage=lambda content: b"a: !!timestamp 2001-01-01")
@example(damage=lambda content: b"1: 2\nnull: 3\n[a, b]: 4")
@example(damage=lambda content: b"a: \xff")
@example(damage=lambda content: b"a: !!binary x")
@example(damage=lambda content: b"? {a: 1}\n: b")
@example(damage=lambda content: b"a: &x\n  <<: *x")
@example(damage=lambda content: b"--- 1\n--- 2")
def test_yaml(tmp_path_factory: pytest.TempPathFactory, damage: Callable):
    path = tmp_path_factory.mktemp("yaml") / "run.yaml"
    content = damage(json.dumps(tokenizer_config("out")).encode())  # JSON is YAML
    path.write_bytes(content)
    configs = []
    outcome(lambda: configs.append(load_config(path)), ConfigError, "run.yaml")
    for config in configs:
        outcome(lambda: RunConfig.parse(config).build_model({"image_size": 16, "in_channels": 1}), ValueError, "")  # noqa: B023


@FEW
@given(data=st.data())
def test_safetensors(model: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject):
    content = (model / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    kind = data.draw(st.sampled_from(["header", "length", "cut", "bytes"]))
    if kind == "header":
        found = places(header)
        place = found[data.draw(st.integers(0, len(found) - 1))]
        how = data.draw(st.sampled_from(["change", "remove", "rename"]))
        changed_header = json.dumps(changed(header, place, how, data.draw(values))).encode()
        damaged = struct.pack("<Q", len(changed_header)) + changed_header + content[8 + length :]
    elif kind == "length":
        damaged = struct.pack("<Q", data.draw(st.sampled_from([0, 1, 7, 2**31, 2**63, 2**64 - 1]))) + content[8:]
    elif kind == "cut":
        damaged = content[: data.draw(st.integers(0, len(content) - 1))]
    else:
        place = data.draw(st.integers(0, 8 + length))
        damaged = content[:place] + data.draw(st.binary(min_size=1, max_size=4)) + content[place + 4 :]
    folder = tmp_path_factory.mktemp("copy") / "model"
    shutil.copytree(model, folder)
    (folder / "model.safetensors").write_bytes(damaged)
    outcome(lambda: load(folder), CheckpointError, "model")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "holds a list, no state dict"),
        (torch.zeros(3), "holds a Tensor, no state dict"),
        ({1: torch.zeros(1)}, r"has the key 1 \(int\)"),
        ({"a": 1}, "no weights found"),
        ({"a": torch.zeros(1), "b": 3}, "."),
    ],
)
def test_odd_state_dicts(tmp_path: Path, content: Any, message: str):
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match=message):
        convert("vit_vqgan/tokenizer", tmp_path / "w.pt", {})


def test_files_of_old_torch_are_read_and_damaged_ones_are_called_so(tmp_path: Path):
    torch.save({"a": torch.ones(2)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert torch.equal(read_weights(tmp_path / "old.pt")["a"], torch.ones(2))
    (tmp_path / "cut.pt").write_bytes((tmp_path / "old.pt").read_bytes()[:40])
    for name in ("cut.pt", "text.pt", "empty.pt"):
        if name != "cut.pt":
            (tmp_path / name).write_bytes(b"no weights" if name == "text.pt" else b"")
        with pytest.raises(CheckpointError, match=rf"{name} cannot be read .* damaged, incomplete"):
            read_weights(tmp_path / name)


@pytest.mark.parametrize("layers", [10**5, 2**70])
def test_more_layers_than_the_weights_could_fill(layers: int):
    sizes = {name: {"dim": 16, "depth": layers, "heads": 1, "mlp_dim": 16} for name in ("encoder", "decoder")}
    config = {"image_size": 16, "patch_size": 4, "quantizer": {"n_embed": 4, "embed_dim": 4}, **sizes}
    with pytest.raises(CheckpointError, match=r"beyond the size of any model|describe more than"):
        from_official("vit_vqgan/tokenizer", config, {})


def test_sizes_and_names_of_no_model_on_the_command_line(tmp_path: Path, capsys):
    from vistok.cli import main

    gan = {"weight": 0.1, "start_step": 0, "discriminator": {"name": "patchgan"}}
    config = tokenizer_config(tmp_path / "out", losses={"gan": gan})
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(config))
    sizes = "model.encoder={{dim: {}, num_layers: {}, num_heads: 1, mlp_dim: 32}}"
    huge = (sizes.format(32, 2**70), sizes.format(2**30, 1))
    huge += (
        "model.codebook_size=100000000000",
        "data.image_size=60000",
        "data.num_workers=100000",
        "training.lora={rank: 100000000}",
        "losses.gan.discriminator.width=1000000",
        "losses.ar_prior={dim: 1000000}",
        "optimizer.lr=.nan",
    )
    negative = ("model.codebook_size=-1", "model.patch_size=0", "model.codebook_embed_dim=-3")
    names = ("model.name", "model.quantizer.name", "losses.gan.discriminator.name", "optimizer.name")
    for override in (*negative, *huge, *(f"{key}=[1]" for key in names), "task=[1]"):
        with pytest.raises(SystemExit) as stop:
            main(["train", str(tmp_path / "x.yaml"), override, "--dry-run"])
        assert stop.value.code == 2
        printed = capsys.readouterr().err
        assert "Error:" in printed
        assert "Traceback" not in printed

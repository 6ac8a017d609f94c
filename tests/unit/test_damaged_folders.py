"""Damaged pipelines, runs, token caches and references: for every damage, a vistok error names the file."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from support.damages import FEW, byte_damages, damages, outcome
from support.tiny_models import tiny
from support.tiny_runs import tokenizer_config, write_tokens

from vistok import pipeline
from vistok.checkpoints import CheckpointError
from vistok.data.tokens import TokenCache, TokenCacheError
from vistok.eval.images import ImageError
from vistok.eval.references import InvalidReferenceError, open_reference
from vistok.pipelines import Pipeline
from vistok.pipelines.runs import data_of_run
from vistok.signatures import ConfigError
from vistok.text import TextError
from vistok.train.checkpoints import BEST, Checkpoints
from vistok.train.monitor import read_metrics
from vistok.utils.outputs import PLAN, SETTINGS, ResumeError, collected, continued, unfinished


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("damage") / "saved"
    tokenizer = tiny("vit_vqgan")
    generator = tiny("llama", spec={"length": 16, "codebook_size": 32, "grid": [4, 4], "dim": 4})
    Pipeline(tokenizer, generator).save_pretrained(folder)
    return folder


@FEW
@given(
    name=st.sampled_from(["pipeline.json", "generator/config.json", "tokenizer/config.json"]),
    damage=damages(),
)
def test_pipelines(saved: Path, tmp_path_factory: pytest.TempPathFactory, name: str, damage: Callable):
    folder = tmp_path_factory.mktemp("copy") / "saved"
    shutil.copytree(saved, folder)
    path = folder / name
    path.write_bytes(damage(path.read_bytes()))
    # If parts do not fit each other, no single file is wrong: a ValueError names the parts.
    outcome(lambda: pipeline(folder), (CheckpointError, ValueError), "")


@FEW
@given(name=st.sampled_from(["generator", "tokenizer"]), damage=byte_damages())
def test_weights_of_pipelines(saved: Path, tmp_path_factory: pytest.TempPathFactory, name: str, damage: Callable):
    folder = tmp_path_factory.mktemp("copy") / "saved"
    shutil.copytree(saved, folder)
    path = folder / name / "model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    outcome(lambda: pipeline(folder), CheckpointError, str(folder / name))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokens(tmp_path_factory.mktemp("damage") / "tokens")


@FEW
@given(name=st.sampled_from(["tokens-00000.npy", "labels-00000.npy"]), damage=byte_damages())
def test_shards_of_token_caches(cache: Path, tmp_path_factory: pytest.TempPathFactory, name: str, damage: Callable):
    folder = tmp_path_factory.mktemp("copy") / "tokens"
    shutil.copytree(cache, folder, ignore=shutil.ignore_patterns("tokenizer"))
    path = folder / name
    path.write_bytes(damage(path.read_bytes()))
    outcome(lambda: TokenCache(folder).batch(np.arange(200), np.zeros(200, int)), TokenCacheError, name)


@FEW
@given(damage=damages())
def test_configs_of_runs(tmp_path_factory: pytest.TempPathFactory, damage: Callable):
    folder = tmp_path_factory.mktemp("run")
    content = json.dumps(tokenizer_config("out")).encode()  # JSON is YAML
    (folder / "config.yaml").write_bytes(damage(content))
    outcome(lambda: data_of_run(folder, (), input_shape=(1, 16, 16)), ConfigError, "config.yaml")


def test_values_of_a_run_s_config_are_named_with_it(tmp_path: Path):
    for data in ({"image_size": 0, "source": "digits"}, 3, ["a"]):
        (tmp_path / "config.yaml").write_text(yaml.safe_dump({"data": data}))
        with pytest.raises(ConfigError, match=r"config\.yaml"):
            data_of_run(tmp_path, (), input_shape=(1, 16, 16))


@FEW
@given(damage=damages() | byte_damages())
def test_metrics_of_runs(tmp_path_factory: pytest.TempPathFactory, damage: Callable):
    path = tmp_path_factory.mktemp("run") / "metrics.jsonl"
    rows = [json.dumps({"step": step, "loss": 1 / (step + 1), "seconds": None}) for step in range(3)]
    path.write_bytes(
        b"".join(damage(row.encode()) if number == 1 else row.encode() + b"\n" for number, row in enumerate(rows))
    )
    outcome(lambda: read_metrics(path), ValueError, "metrics.jsonl, line ")


@FEW
@given(damage=damages())
def test_best_checkpoints(tmp_path_factory: pytest.TempPathFactory, damage: Callable):
    folder = tmp_path_factory.mktemp("checkpoints")
    content = json.dumps({"step": 3, "metric": "psnr", "value": 20.5}).encode()
    (folder / BEST).write_bytes(damage(content))
    outcome(lambda: Checkpoints(folder, 2, None).prune(), ValueError, BEST)


def killed(target: Path, settings: dict) -> None:
    with collected(target, settings, resume=False) as folder:
        (folder / "0.png").touch()
        raise KeyboardInterrupt


@FEW
@given(damage=damages())
def test_records_of_what_is_gone_on_with(tmp_path_factory: pytest.TempPathFactory, damage: Callable):
    target, settings = tmp_path_factory.mktemp("samples") / "out", {"seed": 0, "sampling": {"scale": [1.0, 2.0]}}
    with pytest.raises(KeyboardInterrupt):
        killed(target, settings)
    with continued(target, settings):
        pass
    for folder, name in ((unfinished(target), SETTINGS), (target, PLAN)):
        (folder / name).write_bytes(damage((folder / name).read_bytes()))

    def go_on() -> None:
        with continued(target, settings):
            shutil.rmtree(target)
        with collected(target, settings, resume=True):
            pass

    outcome(go_on, ResumeError, target.name)


@pytest.fixture(scope="module")
def arrays() -> dict[str, np.ndarray]:
    rows = np.random.default_rng(0).normal(size=(30, 4))
    return {"mu": rows.mean(0), "sigma": np.cov(rows, rowvar=False), "pool": rows.astype(np.float32)}


@FEW
@given(damage=byte_damages())
def test_references(tmp_path_factory: pytest.TempPathFactory, arrays: dict, damage: Callable):
    path = tmp_path_factory.mktemp("reference") / "x.npz"
    np.savez(path, **arrays)
    path.write_bytes(damage(path.read_bytes()))
    outcome(lambda: open_reference(path), InvalidReferenceError, "x.npz")


@FEW
@given(damage=byte_damages(), compressed=st.booleans())
def test_images_in_arrays(tmp_path_factory: pytest.TempPathFactory, damage: Callable, compressed: bool):
    path = tmp_path_factory.mktemp("images") / "x.npz"
    images = np.random.default_rng(0).integers(0, 256, (3, 4, 4, 3), dtype=np.uint8)
    (np.savez_compressed if compressed else np.savez)(path, arr_0=images)
    path.write_bytes(damage(path.read_bytes()))
    outcome(lambda: list(open_reference(path).images.batches(2)), (InvalidReferenceError, ImageError), "x.npz")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("weights_sha256", 5),
        ("network", 1.5),
        ("split", 3),
        ("count", "many"),
        ("count", -4),
        ("crop", "x"),
        ("resize", 7),
        ("moments_sha256", 3),
        ("image_size", 16),
        ("fingerprint", True),
    ],
)
def test_facts_of_references_have_their_types(tmp_path: Path, arrays: dict, key: str, value: object):
    np.savez(tmp_path / "x.npz", **arrays, **{key: np.array(value)})
    with pytest.raises(InvalidReferenceError, match=rf"x\.npz.*{key}"):
        open_reference(tmp_path / "x.npz")


@FEW
@given(damage=damages())
def test_records_of_text_encoders(tmp_path_factory: pytest.TempPathFactory, damage: Callable):
    from vistok.text import PromptEncoder

    folder = tmp_path_factory.mktemp("text")
    (folder / "text_ids").mkdir()
    record = {"kind": "bytes", "name": "bytes", "length": 4, "hash": "x", "carried": False}
    from vistok.text.prompts import RECORD

    (folder / "text_ids" / RECORD).write_bytes(damage(json.dumps(record).encode()))
    outcome(lambda: PromptEncoder.load(folder), TextError, RECORD)

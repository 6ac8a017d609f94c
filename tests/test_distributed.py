"""Training on two processes goes through the numbers of one."""

from __future__ import annotations

import subprocess
import sys

import pytest
from tiny_runs import GAN, tokenizer_config

from vistok.config import save_config
from vistok.train import train
from vistok.train.monitor import read_metrics


def test_two_processes_train_like_one(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    # No batch statistics; the adaptive weight is a ratio of local gradients, so it is left out.
    gan = GAN | {"balance": "fixed", "discriminator": {"name": "patchgan", "width": 4, "layers": 1, "norm": "none"}}
    config = tokenizer_config(tmp_path / "one", losses={"gan": gan}, training={"gradient_accumulation_steps": 2})
    one = train(config)
    config["output_dir"] = str(tmp_path / "two")
    config["data"]["batch_size"] //= 2
    save_config(config, tmp_path / "two.yaml")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "vistok"]
    done = subprocess.run([*launch, "train", str(tmp_path / "two.yaml")], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    curves = [read_metrics(folder / "metrics.jsonl") for folder in (one, tmp_path / "two")]
    for name in ("loss", "d_loss", "psnr", "codebook_usage"):
        ours, theirs = ([row[name] for row in rows if name in row] for rows in curves)
        assert theirs == pytest.approx(ours, rel=1e-4), name

"""Configs of training runs that take a second."""

from __future__ import annotations

import torch

from vistok.data import Affine, DataConfig
from vistok.tokenizers.vit_vqgan import ViTConfig, ViTVQGAN
from vistok.train.monitor import read_metrics
from vistok.train.tokenize import tokenize

TINY = {"dim": 16, "num_layers": 1, "num_heads": 1, "mlp_dim": 16}

GAN = {
    "weight": 0.1,
    "balance": "adaptive",
    "discriminator": {"name": "patchgan", "width": 4, "num_layers": 1},
    "start_step": 1,
    "r1_weight": 1.0,
    "r1_every": 2,
    "lecam_weight": 0.01,
}


def tokenizer_config(folder, **changes) -> dict:
    config = {
        "task": "tokenizer",
        "output_dir": str(folder),
        "model": {
            "name": "vit_vqgan",
            "patch_size": 8,
            "encoder": TINY,
            "decoder": TINY,
            "codebook_size": 32,
            "codebook_embed_dim": 4,
        },
        "losses": {"l2": 1.0, "codebook": 1.0, "commitment": 0.25},
        "data": {"source": "digits", "image_size": 16, "channels": 1, "batch_size": 16, "affine": {"translate": 0.1}},
        "optimizer": {"lr": 1e-3},
        "lr_scheduler": {"name": "cosine", "warmup_steps": 2},
        "training": {"max_steps": 6, "ema_decay": 0.9, "log_every": 1, "image_every": 3, "save_every": 3},
    }
    for key, value in changes.items():
        config[key] = config[key] | value if isinstance(value, dict) and key in config else value
    return config


def generator_config(folder, tokens, **changes) -> dict:
    config = {
        "task": "generator",
        "output_dir": str(folder),
        "tokens": str(tokens),
        "model": {"name": "llama", "dim": 16, "num_layers": 1, "num_heads": 2, "multiple_of": 8},
        "training": {"max_steps": 6, "batch_size": 16, "ema_decay": 0.9, "log_every": 1, "save_every": 3},
        "sampling": {"guidance_scale": 2.0},
    }
    for key, value in changes.items():
        config[key] = config[key] | value if isinstance(value, dict) and key in config else value
    return config


def write_tokens(folder):
    """A token cache of some digits, two views each, by an untrained tokenizer."""
    torch.manual_seed(0)
    tokenizer = ViTVQGAN(16, 8, ViTConfig(**TINY), ViTConfig(**TINY), 32, 4, in_channels=1)
    data = DataConfig(16, source="digits", channels=1, limit=200, affine=Affine(translate=0.1))
    tokenize(tokenizer, data, folder, augmentation="random:2")
    return folder


def killed_at(step: int):
    """Replaces ``Trainer.optimise``: stops like a killed process after so many steps."""
    from vistok.train.loop import Trainer

    original = Trainer.optimise

    def optimise(self, batches):
        if self.step == step:
            raise KeyboardInterrupt
        return original(self, batches)

    return optimise


def losses_of(folder) -> list[float]:
    return [row["loss"] for row in read_metrics(folder / "metrics.jsonl")]


def saved_steps(folder) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").glob("step-*"))

"""Tiny files in the formats of released files: a tokenizer and a class-conditional generator that fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from support.tiny_models import official_vit_config

from vistok.tokenizers.vit_vqgan import ViTVQGAN

SIDE = {"dim": 32, "num_layers": 1, "num_heads": 1, "mlp_dim": 32}
NAMES = {"to_patches": "encoder.to_patch_embedding.0", "to_pixels": "decoder.to_pixel.1"}
NAMES |= {"encoder.positions": "encoder.en_pos_embedding", "decoder.positions": "decoder.de_pos_embedding"}
INNER = {"norm1": "0.norm", "attn.qkv": "0.fn.to_qkv", "attn.out": "0.fn.to_out", "norm2": "1.norm"}
INNER |= {"mlp.up": "1.fn.net.0", "mlp.down": "1.fn.net.2"}


def official_state(model: ViTVQGAN) -> dict[str, torch.Tensor]:
    """The weights of a tokenizer with one block in encoder and decoder, under the names of released files."""
    state = {}
    for key, tensor in model.state_dict().items():
        for ours, theirs in NAMES.items():
            key = theirs + key.removeprefix(ours) if key.startswith(ours) else key
        for side in ("encoder", "decoder"):
            for ours, theirs in INNER.items():
                key = key.replace(f"{side}.blocks.0.{ours}.", f"{side}.transformer.layers.0.{theirs}.")
            key = key.replace(f"{side}.norm.", f"{side}.transformer.norm.")
        state[key] = tensor
    return state


def write_tokenizer(folder: Path, model: ViTVQGAN, **beside: torch.Tensor) -> tuple[Path, Path]:
    """A tokenizer's released-looking file, with other entries beside its weights, and its arguments as JSON."""
    config = model.config
    sides = {side: official_vit_config(config[side]) for side in ("encoder", "decoder")}
    quantizer = {"embed_dim": config["codebook_embed_dim"], "n_embed": config["codebook_size"]}
    sizes = {key: config[key] for key in ("image_size", "patch_size")}
    folder.mkdir(parents=True, exist_ok=True)
    torch.save({"state_dict": official_state(model) | beside, "epoch": 3}, folder / "tiny.ckpt")
    (folder / "tiny.json").write_text(json.dumps({**sizes, "quantizer": quantizer, **sides}))
    return folder / "tiny.ckpt", folder / "tiny.json"


def write_generator(folder: Path, num_classes: int = 1000) -> tuple[Path, Path]:
    """A class-conditional generator of 16 tokens of 64 codes in LlamaGen's format, and its arguments as JSON."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"cls_embedding.embedding_table.weight": (num_classes + 1, 32), "tok_embeddings.weight": (64, 32)}
    shapes |= {"norm.weight": (32,), "output.weight": (64, 32)}
    layer = {"attention.wqkv": (96, 32), "attention.wo": (32, 32), "attention_norm": (32,), "ffn_norm": (32,)}
    layer |= {"feed_forward.w1": (96, 32), "feed_forward.w3": (96, 32), "feed_forward.w2": (32, 96)}
    shapes |= {f"layers.0.{name}.weight": shape for name, shape in layer.items()}
    state = {name: torch.randn(shape, generator=generator) * 0.2 for name, shape in shapes.items()}
    config: dict[str, Any] = {"dim": 32, "n_layer": 1, "n_head": 2, "multiple_of": 32, "num_classes": num_classes}
    config |= {"vocab_size": 64, "block_size": 16, "cls_token_num": 1, "model_type": "c2i"}
    folder.mkdir(parents=True, exist_ok=True)
    torch.save({"model": state}, folder / "gpt.pt")
    (folder / "gpt.json").write_text(json.dumps(config))
    return folder / "gpt.pt", folder / "gpt.json"


def tiny_tokenizer() -> ViTVQGAN:
    """The tokenizer of such tokens: images of 32 px as 4x4 tokens of 64 codes."""
    torch.manual_seed(0)
    return ViTVQGAN(32, 8, SIDE, SIDE, codebook_size=64, codebook_embed_dim=4)

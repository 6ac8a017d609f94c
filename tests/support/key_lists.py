"""The key lists of released checkpoints, and full-size models of them without memory for their weights."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import torch
from torch import Tensor

import vistok
from vistok.checkpoints import Model, registry

FOLDER = Path(__file__).parents[1] / "golden" / "keys"
KNOWN_IDS = {checkpoint.id for entry in registry.ENTRIES for _, checkpoint in entry.released()}


def read_key_list(path: Path) -> dict:
    """A key list, with the id of its checkpoint and its "system/part"."""
    listed = json.loads(gzip.decompress(path.read_bytes()))
    # ViT-VQGAN's lists write "repository: file (remark)"; some name the repository alone.
    released = listed["checkpoint"].split(" (")[0].replace(": ", "/")
    listed["id"] = next((known for known in KNOWN_IDS if f"{known}/".startswith(f"{released}/")), released)
    listed["model"] = listed.get("model", f"{listed['system']}/tokenizer").split(" (")[0]
    return listed


def on_meta(shapes: dict[str, list[int]]) -> dict[str, Tensor]:
    """Tensors of these shapes without memory."""
    return {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}


def build(listed: dict, state: dict[str, Tensor]) -> Model:
    """The model of a key list, without memory for its weights."""
    entry = registry.official_entry(listed["model"])
    with torch.device("meta"):
        return vistok.from_official(listed["model"], listed["config"], entry.load().clean_official(state))

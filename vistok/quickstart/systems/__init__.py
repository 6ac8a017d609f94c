"""What the quickstart can show: a folder per system, with the configs of its tokenizer and of its generator."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

__all__ = ["SYSTEMS", "System", "config_file", "find_system"]

Stage = Literal["tokenizer", "generator"]


@dataclass(frozen=True)
class System:
    """A tokenizer and a generator that go together.

    Attributes:
        summary: one line for people.
        recognised: share of generated digits that must be recognised, in [0, 1].
        minutes: the whole chain may take, on two cores.
        views: augmented versions of each training digit in the token cache.
    """

    summary: str
    recognised: float
    minutes: float
    views: int = 32


SYSTEMS = {
    "vit_vqgan": System("ViT-VQGAN's tokenizer and its GPT: 4x4 tokens, one after the other", 0.85, 5),
    "flextok": System("FlexTok's ordered tokens and flow decoder, and a Llama: 8 tokens, coarse to fine", 0.75, 10),
    "dar": System("D-AR's groups of tokens, a flow step each, and a Llama: 16 tokens, guided ever more", 0.85, 10),
    "titok": System("TiTok's tokens in a row, and RAR: 12 tokens, learned in many orders", 0.85, 10),
    "gigatok": System("GigaTok's raster of tokens, and a Llama: 4x4 tokens, one after the other", 0.85, 10),
    "xar": System("A KL autoencoder and xAR: 4x4 latents, generated in four cells by flow matching", 0.8, 10),
}


def find_system(name: str) -> System:
    """The system of that name.

    Raises:
        ValueError: there is none.
    """
    if name not in SYSTEMS:
        raise ValueError(f"the quickstart has no system {name!r}; it has {', '.join(SYSTEMS)}")
    return SYSTEMS[name]


def config_file(system: str, stage: Stage) -> Path:
    """Where the config of a stage lies."""
    return Path(__file__).parent / system / f"{stage}.yaml"

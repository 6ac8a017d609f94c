"""Probe a tokenizer with a small generator: how well it predicts the tokens, and what its features tell about classes.

GigaTok (arXiv 2504.08736, section 3.1) evaluates tokenizers in this way, before it trains a large generator.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vistok.checkpoints import load
from vistok.config import load_config
from vistok.data.tokens import TokenCache
from vistok.pipelines.folders import GENERATOR
from vistok.probing.settings import ProbeSettings
from vistok.probing.tokenizer import labelled_probe
from vistok.train import train
from vistok.train.monitor import read_metrics
from vistok.types import Condition, TokenSpec
from vistok.utils.progress import track

CONFIGS = Path(__file__).parent
BATCH = 64


def probe_generator(train_tokens: Path, test_tokens: Path, out: Path, settings: ProbeSettings) -> dict[str, Any]:
    """Train the small generator in the folder ``out``, or resume there, and score it on held-out tokens.

    Returns:
        ``parameters``, ``steps``, ``loss`` (which loss it is), and its value on held-out tokens after the last step as
        ``loss_per_token`` and ``loss_per_image``. For discrete tokens also ``accuracy`` of the next id,
        ``uniform_loss``, the loss per token of a uniform prediction, and, if there are classes, ``probe``, the linear
        probe of the middle block. Only ``refused``, with the reason, if tokens have several ids.
    """
    cache, held_out = TokenCache(train_tokens), TokenCache(test_tokens)
    spec = TokenSpec(**cache.spec)
    if spec.depth > 1:
        return {"refused": f"no small generator takes {spec.depth} ids per token"}
    config = load_config(CONFIGS / ("discrete.yaml" if spec.discrete else "continuous.yaml"), settings.generator)
    rhythm = {"max_steps": settings.steps, "batch_size": min(settings.batch_size, len(cache)), "image_every": 0}
    rhythm |= {"save_every": settings.steps, "log_every": max(settings.steps // 20, 1), "keep_checkpoints": 1}
    folder = train(
        config
        | {"task": "generator", "output_dir": str(out), "tokens": str(train_tokens), "seed": settings.seed}
        | {"condition": ["labels"] if cache.classes else [], "validation": {"tokens": str(test_tokens)}}
        | {"training": config["training"] | rhythm},
        resume=out.exists(),
    )
    last: dict[str, Any] = next(row for row in reversed(read_metrics(folder / "metrics.jsonl")) if "val_loss" in row)
    model = load(folder / GENERATOR).eval()
    result = {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "steps": settings.steps,
        "loss": "cross entropy in nats" if spec.discrete else "the loss of a diffusion head",
        "loss_per_token": last["val_loss"],
        "loss_per_image": last["val_loss"] * spec.length,
    }
    if spec.discrete:
        result |= {"accuracy": last["val_accuracy"], "uniform_loss": float(np.log(spec.num_ids))}
        if len(cache.classes) > 1:
            features = [_middle(model, tokens) for tokens in (cache, held_out)]
            result["probe"] = labelled_probe(features[0], cache.labels, features[1], held_out.labels)
    return result


@torch.no_grad()
def _middle(model: Any, cache: TokenCache) -> Tensor:
    """Features (N, D) for the linear probe: the output of block n // 2 of n, averaged over positions.

    The condition is the null class, so that the features cannot contain the label; the last token is not fed.
    """
    layer, parts = max(len(model.blocks) // 2, 1), []
    starts = range(0, len(cache), BATCH)
    for start in track(starts, "features of the generator", len(starts)):
        indices = np.arange(start, min(start + BATCH, len(cache)))
        ids, _ = cache.batch(indices, np.zeros_like(indices))
        parts.append(model.hidden_states(ids, Condition.none(len(ids)), layer).float().mean(1))
    return torch.cat(parts)

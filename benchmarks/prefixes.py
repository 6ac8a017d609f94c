"""How well the first k tokens of 32 px images decode, for tokenizers of ordered tokens; see ``cifar10.py``."""

from __future__ import annotations

from itertools import pairwise

import torch
from common import say
from torch import Tensor

from vistok.draws import Keys
from vistok.tokenizers.base import Tokenizer
from vistok.train.tasks.images import psnr
from vistok.types import TokenSpec

LENGTHS = (1, 4, 16)


def prefix_figures(tokenizer: Tokenizer, instrument, test: Tensor, train: Tensor) -> tuple[dict, dict]:
    """Print a table of scores at every prefix length, and return the ratios and figures of it.

    Args:
        instrument: the classifier's module.
        test: pixels (N, 3, 32, 32) in [-1, 1] to encode, decode and score.
        train: pixels to fit the principal components to.
    """
    lengths = prefix_lengths(tokenizer.spec)
    scores = [score(instrument, decoded, test) for decoded in decode_prefixes(tokenizer, test, lengths)]
    components = principal_psnr(train, test, lengths)
    say(f"prefixes of {tokenizer.spec.length} tokens, {len(test):,} test images; Frechet distance to the originals:")
    for k, row, pca in zip(lengths, scores, components, strict=True):
        say(f"{k:5} tokens: {row['psnr']:.2f} dB, Frechet {row['frechet']:.2f}; PCA of {k} floats {pca:.2f} dB")
    rises = [b["psnr"] - a["psnr"] for a, b in pairwise(scores)]
    say(
        f"PSNR {'rises' if min(rises) > 0 else 'DOES NOT RISE'} from each length to the next; least by {min(rises):.2f}"
    )
    figures = {f"psnr_{k}": row["psnr"] for k, row in zip(lengths, scores, strict=True)}
    figures |= {f"frechet_cifar10_classifier_{k}": row["frechet"] for k, row in zip(lengths, scores, strict=True)}
    figures |= {f"psnr_pca_{k}": pca for k, pca in zip(lengths, components, strict=True)}
    figures |= {"psnr": scores[-1]["psnr"], "images": len(test)}
    return {"smallest_psnr_rise_db": min(rises)}, figures


def prefix_lengths(spec: TokenSpec) -> list[int]:
    """1, 4, 16 and all tokens, without those lengths whose prefixes do not decode."""
    return [k for k in LENGTHS if k < spec.length and k % spec.prefix_step == 0] + [spec.length]


@torch.no_grad()
def decode_prefixes(tokenizer: Tokenizer, pixels: Tensor, lengths: list[int], batch_size: int = 250) -> list[Tensor]:
    """Pixels (N, 3, 32, 32) decoded from the first k ids, for each k, all from the same noise, with the config's steps
    and guidance (none in the cifar10 configs)."""
    parts = []
    for start in range(0, len(pixels), batch_size):
        ids = tokenizer.encode(pixels[start : start + batch_size])
        draws = tokenizer.decoding_draws(Keys.range(0, len(ids), start))
        parts.append([tokenizer.decode(ids[:, :k], draws=draws).clamp(-1, 1) for k in lengths])
    return [torch.cat(part) for part in zip(*parts, strict=True)]


@torch.no_grad()
def score(instrument, decoded: Tensor, original: Tensor) -> dict[str, float]:
    classifier = instrument.load()
    features = [torch.cat([classifier.features(part) for part in x.split(500)]) for x in (decoded, original)]
    return {"psnr": psnr(decoded, original).item(), "frechet": instrument.frechet_distance(*features)}


def principal_psnr(train: Tensor, test: Tensor, counts: list[int]) -> list[float]:
    """PSNR of test images from their first k principal components, for each k."""
    mean = train.flatten(1).mean(0)
    torch.manual_seed(0)
    axes = torch.pca_lowrank(train.flatten(1) - mean, q=max(counts) + 16, center=False, niter=4)[2]
    coordinates = (test.flatten(1) - mean) @ axes
    return [psnr((coordinates[:, :k] @ axes[:, :k].T + mean).view_as(test), test).item() for k in counts]

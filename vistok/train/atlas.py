"""An atlas of a codebook: which codes are in use, and the image patches that get each code."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from vistok.data.pictures import to_pil
from vistok.data.sheets import sheet
from vistok.draws import Keys, draws_on
from vistok.tokenizers.base import Tokenizer
from vistok.train.monitor import expected_usage, perplexity

BATCH = 32
SHOWN_CODES, PATCHES = 16, 8
CONTEXT = 2
"""Side of a patch in tokens: the token's own part of the image, and half a token on each side."""


@dataclass(frozen=True)
class Atlas:
    """The codes that a tokenizer chose for some images.

    Attributes:
        counts: (codebook_size,) how often each code was chosen.
        images: the number of images.
        picture: a row for each of the most frequent codes, with image patches around tokens that have it. If the
            tokenizer returns latents, the patches whose latents lie nearest to the code come first. None if tokens have
            no place in the image.
    """

    counts: Tensor
    images: int
    picture: Image.Image | None

    @property
    def dead(self) -> int:
        """The number of codes that no token has."""
        return int((self.counts == 0).sum())

    @property
    def possible(self) -> float:
        """The share of codes, in [0, 1], that the same number of uniformly drawn tokens would be expected to use."""
        return expected_usage(len(self.counts), int(self.counts.sum()))

    @property
    def perplexity(self) -> float:
        """The perplexity of the distribution of codes, 1 .. codebook_size."""
        return float(perplexity(self.counts.double()))


@torch.no_grad()
def codebook_atlas(tokenizer: Tokenizer, pixels: Tensor) -> Atlas:
    """The atlas of the codes of images (B, C, H, W), or clips (B, C, T, H, W), in [-1, 1].

    Raises:
        ValueError: the tokenizer has continuous latents.
    """
    spec = tokenizer.spec
    if not spec.discrete:
        raise ValueError(f"{type(tokenizer).__name__} has no codebook: its tokens are continuous")
    parts = (part.to(tokenizer.device, tokenizer.dtype) for part in pixels.split(BATCH))
    ids = torch.cat([tokenizer.encode(part).cpu() for part in parts])  # (B, L[, depth])
    counts = torch.bincount(ids.flatten(), minlength=spec.num_ids)
    placed = pixels.ndim == 4 and spec.grid is not None and len(spec.grid) == 2 and not spec.scales
    picture = _picture(tokenizer, pixels, ids if spec.depth == 1 else ids[..., 0], counts) if placed else None
    return Atlas(counts, len(pixels), picture)


def _picture(tokenizer: Tokenizer, pixels: Tensor, ids: Tensor, counts: Tensor) -> Image.Image:
    rows, columns = tokenizer.spec.raster
    height, width = pixels.shape[2] // rows, pixels.shape[3] // columns  # of the part of one token
    around = (height * (CONTEXT - 1) // 2, width * (CONTEXT - 1) // 2)
    padded = F.pad(pixels, (around[1], around[1], around[0], around[0]), mode="replicate")
    distances = _distances(tokenizer, pixels, ids)  # (B, L)
    chosen = counts.argsort(descending=True, stable=True)[: min(SHOWN_CODES, int((counts > 0).sum()))].tolist()
    patches, blank = [], torch.ones(pixels.shape[1], height + 2 * around[0], width + 2 * around[1])
    for code in chosen:
        places = (ids == code).nonzero()  # (n, 2)
        places = places[distances[places[:, 0], places[:, 1]].argsort(stable=True)][:PATCHES].tolist()
        for image, position in places:
            row, column = divmod(position, columns)
            top, left = row * height, column * width
            patches.append(padded[image, :, top : top + blank.shape[1], left : left + blank.shape[2]])
        patches += [blank] * (PATCHES - len(places))
    labels = [f"code {code} ({int(counts[code]):,})" for code in chosen]
    return sheet(to_pil(torch.stack(patches)), PATCHES, row_labels=labels, least=40)


def _distances(tokenizer: Tokenizer, pixels: Tensor, ids: Tensor) -> Tensor:
    """The squared distance of each token's latent to its code, (B, L); zeros if the tokenizer returns no latents."""
    unknown, found = torch.zeros(ids.shape), []
    if tokenizer.spec.depth != 1 or tokenizer.condition_spec.parts:
        return unknown
    for start in range(0, len(pixels), BATCH):
        part = pixels[start : start + BATCH].to(tokenizer.device, tokenizer.dtype)
        draws = draws_on(tokenizer.training_draws(Keys.range(0, len(part), start)), tokenizer.device)
        features = tokenizer(part, draws=draws).features
        latents, quantized = features.get("latents"), features.get("quantized")
        if latents is None or quantized is None or latents.shape != quantized.shape or latents.ndim != 3:
            return unknown
        latents, quantized = latents.float(), quantized.float()
        if bool(((quantized.norm(dim=-1) - 1).abs() < 1e-3).all()):  # l2-normalised codes
            latents = F.normalize(latents, dim=-1)
        found.append((latents - quantized).square().sum(-1).cpu())
    return torch.cat(found)

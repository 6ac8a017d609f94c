"""What a codebook has come to: which codes are in use, and what images look like where each was chosen."""

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

BATCH = 32
SHOWN_CODES, PATCHES = 16, 8
CONTEXT = 2
"""Side of a patch in tokens: the token's own part of the image, and half as much around it."""


@dataclass(frozen=True)
class Atlas:
    """The codes that a tokenizer chose for some images.

    Attributes:
        counts: (codebook_size,) times that each code was chosen.
        images: how many images there were.
        picture: a row for each of the most frequent codes, with patches of the images around tokens that have it, those
            first whose latent lies nearest to the code where the tokenizer tells latents; None if tokens have no place
            in the image.
    """

    counts: Tensor
    images: int
    picture: Image.Image | None

    @property
    def dead(self) -> int:
        """Codes that no token has."""
        return int((self.counts == 0).sum())

    @property
    def possible(self) -> float:
        """The share of codes that so many evenly spread tokens would use, in [0, 1]."""
        size = len(self.counts)
        return 1 - (1 - 1 / size) ** int(self.counts.sum())

    @property
    def perplexity(self) -> float:
        """The perplexity of the distribution of codes, 1 .. codebook_size."""
        share = self.counts.double() / self.counts.sum()
        return float(torch.special.entr(share).sum().exp())


@torch.no_grad()
def codebook_atlas(tokenizer: Tokenizer, pixels: Tensor) -> Atlas:
    """Look at the codes of images (B, C, H, W), or clips (B, C, T, H, W), in [-1, 1].

    Raises:
        ValueError: a tokenizer of continuous latents.
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
    height, width = pixels.shape[2] // rows, pixels.shape[3] // columns  # of the pixels that one token stands for
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
    """How far the latent of each token lies from its code, (B, L); zeros where the tokenizer does not tell."""
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
        if bool(((quantized.norm(dim=-1) - 1).abs() < 1e-3).all()):  # codes that are compared by their direction
            latents = F.normalize(latents, dim=-1)
        found.append((latents - quantized).square().sum(-1).cpu())
    return torch.cat(found)

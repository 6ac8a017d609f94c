"""Renderers, which make images of embeddings for tokenizers that decode to embeddings (``Pipeline.renderer``).

``vistok.eval.retrieval.Gallery`` is another renderer: it shows the nearest image of a data set.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from vistok.checkpoints import CheckpointError


class Renderer(Protocol):
    """Makes images (N, C, H, W) in [-1, 1] of embeddings (N, E)."""

    def __call__(self, embeddings: Tensor) -> Tensor: ...


class UnCLIP:
    """Stable unCLIP of ``diffusers``, which SEED renders with (arXiv 2310.01218); it takes embeddings of CLIP ViT-H/14.

    Args:
        weights: local folder or hub id of such a pipeline, for example of stable-diffusion-2-1-unclip.
        num_steps, guidance_scale: of the sampler.
        noise_level: level of the noise that is added to the embeddings.
        seed: of the sampler's noise; the i-th image of every call has the same noise.

    Raises:
        CheckpointError: ``weights`` holds no unCLIP pipeline.
    """

    def __init__(
        self,
        weights: str | Path,
        *,
        num_steps: int = 20,
        guidance_scale: float = 10.0,
        noise_level: int = 0,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ):
        from diffusers import StableUnCLIPImg2ImgPipeline

        try:
            self._pipe = StableUnCLIPImg2ImgPipeline.from_pretrained(str(weights)).to(device)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{weights} holds no unCLIP pipeline of diffusers ({str(error).splitlines()[0]}); without one, "
                "vistok.eval.retrieval.Gallery shows the nearest image of a data set in place of a rendering"
            ) from error
        self._options = {
            "num_inference_steps": num_steps,
            "guidance_scale": guidance_scale,
            "noise_level": noise_level,
            "output_type": "pt",
        }
        self._seed, self._device = seed, device

    @torch.no_grad()
    def __call__(self, embeddings: Tensor) -> Tensor:
        noise = [torch.Generator().manual_seed(self._seed + index) for index in range(len(embeddings))]
        made = self._pipe(
            prompt=[""] * len(embeddings),
            image_embeds=embeddings.to(self._device, self._pipe.dtype),
            generator=noise,
            **self._options,
        )
        return made.images.float().cpu() * 2 - 1  # from [0, 1]

"""MingTok's expander: from tokens to the semantic features that a generator reads."""

from __future__ import annotations

from torch import Tensor

from vistok.nn.attention import GrowingCache
from vistok.quantizers.gaussian import LatentScale
from vistok.tokenizers.mingtok.networks import SemanticDecoder
from vistok.types import Expander, TokenSpec


class SemanticExpander(Expander):
    """Expands standardised latents to semantic features, all at once or step by step, with the same result.

    Args:
        decoder: expands raw latents.
        scale: standardisation of the latents.
        spec: of the tokens, for checks.
    """

    def __init__(self, decoder: SemanticDecoder, scale: LatentScale, spec: TokenSpec):
        self._decoder, self._scale, self._spec = decoder, scale, spec
        self._caches = [GrowingCache() for _ in decoder.blocks]
        self._seen = 0

    def expand(self, tokens: Tensor) -> Tensor:
        """Features (B, L, D) of whole sequences of latents (B, L, d), independent of ``step``."""
        return self._decoder(self._scale.restore(self._spec.check_latents(tokens)))

    def step(self, tokens: Tensor) -> Tensor:
        """Features (B, n, D) of the next n latents (B, n, d), which attend to those of earlier calls."""
        latents = self._scale.restore(self._spec.check_latents(tokens))
        features = self._decoder(latents, self._seen, self._caches)
        self._seen += latents.shape[1]
        return features

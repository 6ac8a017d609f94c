"""The base of generators of continuous latents: the check of the token spec, and the start of sampling."""

from __future__ import annotations

from typing import Any, ClassVar

from vistok.draws import Draws
from vistok.generators.base import Generator, Session, check_draws
from vistok.types import Condition, Expands, TokenSpec


class ContinuousGenerator(Generator):
    """A generator of standardised latents (B, L, D), unconditional or conditioned on a class."""

    num_classes: int | None
    session_type: ClassVar[type]
    """The class of sampling sessions; its arguments are the model, the condition, the options and the draws."""

    @staticmethod
    def check_spec(spec: TokenSpec, model: str) -> TokenSpec:
        """Return the spec if its tokens are continuous; else raise ValueError."""
        if spec.discrete:
            raise ValueError(
                f"{model} generates continuous latents; this tokenizer has {spec.codebook_size} discrete codes"
            )
        return spec

    def start(
        self,
        condition: Condition,
        options: Any = None,
        *,
        draws: Draws | None = None,
        tokenizer: Expands | None = None,
    ) -> Session:
        options = options or self.options_type()
        self.check_start(condition, options.guidance, tokenizer)
        if draws is None:
            raise ValueError("sampling starts from noise: pass sampling_draws(Keys.range(seed, B), options)")
        check_draws(draws, len(condition), 1.0, names=("noise",))  # there is noise at any temperature
        return self.session_type(self, condition, options, draws)

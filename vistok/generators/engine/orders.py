"""Generators that are trained on tokens in orders of their own: each sample has an order of its places."""

from __future__ import annotations

from abc import abstractmethod

from torch import Tensor

from vistok.draws import Draws
from vistok.generators.base import token_loss
from vistok.generators.engine.autoregressive import AutoregressiveGenerator
from vistok.generators.engine.plan import in_order, in_places
from vistok.types import Clock, Condition, Expands, GeneratorOutput


class OrderedGenerator(AutoregressiveGenerator):
    """The training pass of a generator whose draws have an "order" (B, L), the places of the tokens in order."""

    @abstractmethod
    def predict(self, ids: Tensor, orders: Tensor, condition: Condition, draws: Draws) -> Tensor:
        """Teacher-forced logits (B, L, V) in the order of generation.

        Args:
            ids: (B, L), already in that order.
            orders: (B, L), the places of these tokens.
            draws: of ``training_draws``, or none.
        """

    def logits(self, ids: Tensor, condition: Condition, orders: Tensor | None = None, **draws: Tensor) -> Tensor:
        """Teacher-forced logits (B, L, V): the i-th one predicts the i-th token in order.

        Args:
            ids: (B, L) in raster order.
            orders: (B, L), the places of the tokens in order; None is raster order.
            **draws: the other draws of ``training_draws``.

        Raises:
            ValueError: orders that are not one permutation for each row.
        """
        return self.predict(*in_order(ids, orders), condition, draws)

    def forward(
        self,
        tokens: Tensor,
        condition: Condition,
        *,
        draws: Draws | None = None,
        weights: Tensor | None = None,
        clock: Clock | None = None,
        tokenizer: Expands | None = None,
        context: Tensor | None = None,
    ) -> GeneratorOutput:
        """Cross entropy in nats per token; metric "accuracy". Predictions (B, L, V) are in the order of ``draws``.

        Raises:
            ValueError: orders that are not one permutation for each row.
        """
        self.check_tokenizer(tokenizer)
        draws = draws or {}
        condition = self.drop_condition(condition, draws)
        orders = draws.get("order")
        fed, _ = in_order(tokens if context is None else context, orders)
        tokens, orders = in_order(tokens, orders)
        logits = self.predict(fed, orders, condition, draws)
        return token_loss(logits, tokens, weights)

    def training_logits(self, tokens: Tensor, condition: Condition, draws: Draws, tokenizer: Expands | None) -> Tensor:
        ids, orders = in_order(tokens, draws.get("order"))
        return in_places(self.predict(ids, orders, condition, draws), orders)

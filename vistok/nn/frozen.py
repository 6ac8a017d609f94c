"""A frozen network inside of a module, neither trained nor saved with it."""

from __future__ import annotations

from typing import Any

from torch import nn


class Frozen:
    """Holds a network that is never trained. It is no submodule of its owner, so it is not saved; deep copies of the
    owner share it."""

    def __init__(self, network: nn.Module):
        self.network: Any = network.eval().requires_grad_(False)

    def __deepcopy__(self, memo: Any) -> Frozen:
        return self

"""Weights of frozen networks that losses download."""

from __future__ import annotations

from urllib.error import URLError

import torch
from torch import Tensor

from vistok.checkpoints import CheckpointError


def fetch_weights(url: str, what: str, remedy: str) -> dict[str, Tensor]:
    """A state dict from a URL whose file name holds its hash; the file is cached.

    Args:
        what: the name of the weights, for messages.
        remedy: how a local file is given, for messages.

    Raises:
        CheckpointError: the download failed, or the hash differs.
    """
    try:
        return torch.hub.load_state_dict_from_url(url, map_location="cpu", weights_only=True, check_hash=True)
    except (URLError, OSError, RuntimeError) as error:  # RuntimeError: the hash differs
        raise CheckpointError(
            f"the {what} weights could not be fetched from {url}: {error}. Download the file elsewhere and give its "
            f"local path: {remedy}"
        ) from error

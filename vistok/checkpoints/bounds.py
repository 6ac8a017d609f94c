"""Bounds on what a config may build: a size of no model is refused before it fills memory or runs for hours."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import psutil
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

MAX_INTEGER = 2**40
MAX_IMAGE_SIZE = 2**16
MAX_TENSORS = 50_000  # published models of many experts have up to 20,000


class OversizedError(RuntimeError):
    """Arguments that describe a model larger than any that could be meant."""


@contextmanager
def bounded(arguments: Mapping[str, Any], weights: Mapping[str, Tensor] | None = None) -> Iterator[None]:
    """Within this context, a model built from ``arguments`` has bearable sizes.

    Args:
        arguments: the constructor's, which come from a file.
        weights: those that the model will load, where they are known: it has no more than a small multiple of them.

    Raises:
        OversizedError: an integer beyond 2^40, an image size beyond 2^16; more parameters than ``weights`` could fill;
            more than 50,000 tensors; or more bytes than the machine has memory.
    """
    for place, value in integers(arguments):
        if abs(value) > (MAX_IMAGE_SIZE if "image_size" in place else MAX_INTEGER):
            raise OversizedError(f"{place} is {_short(value)}, beyond the size of any model")
    builder = threading.get_ident()
    most_tensors, most_elements = MAX_TENSORS, float("inf")
    if weights is not None:
        # What a reference joins, ours may hold in parts, and the reverse.
        most_tensors = 4 * len(weights) + 1000
        most_elements = 4 * sum(tensor.numel() for tensor in weights.values() if isinstance(tensor, Tensor)) + 2**20
    memory = psutil.virtual_memory().total
    tensors = elements = size = 0

    def count(_module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        nonlocal tensors, elements, size
        if parameter is None or threading.get_ident() != builder:
            return
        tensors, elements = tensors + 1, elements + parameter.numel()
        size += parameter.numel() * parameter.element_size() if parameter.device.type == "cpu" else 0
        if tensors > most_tensors or elements > most_elements:
            of = "" if weights is None else f"; the weights hold {len(weights):,} tensors"
            raise OversizedError(f"they describe more than {tensors - 1:,} tensors, {elements:,} numbers{of}")
        if size > memory:
            raise OversizedError(
                f"they describe more than {size / 2**30:.0f} GiB of weights; this machine has {memory / 2**30:.0f} GiB"
            )

    hook = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        hook.remove()


def _short(value: int) -> str:
    return str(value) if abs(value) < 10**12 else "a number of more than 12 digits"  # Python may refuse to write it


def integers(value: Any, place: str = "") -> Iterator[tuple[str, int]]:
    """The integers in nested arguments, each with where it stands: "encoder.num_layers"."""
    if isinstance(value, int):
        yield place, value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from integers(inner, f"{place}.{key}" if place else str(key))
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for number, inner in enumerate(value):
            yield from integers(inner, f"{place}.{number}")

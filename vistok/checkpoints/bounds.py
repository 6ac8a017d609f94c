"""Bounds on the models that a config may build: absurd sizes are refused before they fill memory or run for hours."""

from __future__ import annotations

import dataclasses
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import psutil
import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)

Built = TypeVar("Built", bound=nn.Module)

MAX_INTEGER = 2**40
MOST = {"image_size": 2**16, "layers": 1000, "blocks": 1000, "depth": 1000, "refiners": 1000}
"""The largest integer of an argument whose name contains the word."""
TOO_MUCH_FOR_AN_ERROR = 1 / 16
"""A model that takes more than this share of memory is not built again for a better error message."""
MAX_TENSORS = 25_000  # published models of many experts have up to 20,000


class OversizedError(RuntimeError):
    """The arguments describe a model that is too large to be meant."""


def check_bytes(what: str, size: int) -> None:
    """Raise OversizedError if ``what`` would take more bytes than the machine has."""
    memory = psutil.virtual_memory().total
    if size > memory:
        raise OversizedError(f"{what} would take {_gigabytes(size)}; this machine has {_gigabytes(memory)}")


def construct(
    module: Callable[..., Built], arguments: Mapping[str, Any], weights: Mapping[str, Tensor] | None = None
) -> Built:
    """Return ``module(**arguments)``; a model that is too large is refused before its memory is allocated.

    The model is first built on torch's meta device, where tensors have shapes but no data. This step is left out if no
    argument exceeds the largest side of ``weights``.

    Raises:
        OversizedError: as :func:`bounded`.
        Exception: any error of the constructor.
    """
    sides = [max(tensor.shape, default=1) for tensor in (weights or {}).values() if tensor.numel()]
    if weights is not None and all(value <= max(sides, default=1) for _, value in integers(arguments)):
        with bounded(arguments, weights):
            return module(**arguments)
    with (
        bounded(arguments, weights) as counted,
        torch.random.fork_rng(devices=[]),
        warnings.catch_warnings(),
        torch.device("meta"),
    ):
        warnings.simplefilter("ignore")  # the second build repeats those that matter
        try:
            module(**arguments)
        except OversizedError:
            raise
        except Exception:
            # Either sizes do not fit each other, and the second build gives the better message; or the module reads
            # data or files while it is built, and the second build counts its sizes as they are allocated.
            if counted.bytes > psutil.virtual_memory().total * TOO_MUCH_FOR_AN_ERROR:
                raise
    with bounded(arguments, weights):
        return module(**arguments)


@dataclasses.dataclass
class Counted:
    """The parameters and buffers built so far."""

    tensors: int = 0
    elements: int = 0
    bytes: int = 0


@contextmanager
def bounded(arguments: Mapping[str, Any], weights: Mapping[str, Tensor] | None = None) -> Iterator[Counted]:
    """A context in which the model built from ``arguments`` may not exceed bounds on its size.

    Args:
        arguments: the constructor's arguments, read from a file.
        weights: the weights that the model will load, if known; the model may have a small multiple of their number.

    Raises:
        OversizedError: an integer beyond 2^40, an image size beyond 2^16, a number of layers or blocks beyond 1000;
            more parameters than ``weights`` could fill; more than 25,000 tensors; or more bytes than the machine has
            memory.
    """
    for place, value in integers(arguments):
        most = min((bound for word, bound in MOST.items() if word in place), default=MAX_INTEGER)
        if abs(value) > most:
            raise OversizedError(f"{place} is {_short(value)}, beyond the size of any model (at most {most:,})")
    builder = threading.get_ident()
    most_tensors, most_elements = MAX_TENSORS, float("inf")
    if weights is not None:
        # Our model may split a tensor of the reference into several, or fuse several into one.
        most_tensors = 4 * len(weights) + 1000
        most_elements = 4 * sum(tensor.numel() for tensor in weights.values() if isinstance(tensor, Tensor)) + 2**20
    memory = psutil.virtual_memory().total
    counted = Counted()

    def weigh(_module: nn.Module, name: str, tensor: Tensor | None) -> None:
        if tensor is None or threading.get_ident() != builder:
            return
        counted.bytes += tensor.numel() * tensor.element_size() if tensor.device.type in ("cpu", "meta") else 0
        if counted.bytes > memory:
            raise OversizedError(
                f"they describe more than {_gigabytes(counted.bytes)} of weights; this machine has {_gigabytes(memory)}"
            )

    def count(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        weigh(module, name, parameter)
        if parameter is None or threading.get_ident() != builder:
            return
        counted.tensors += 1
        counted.elements += parameter.numel()
        if counted.tensors > most_tensors or counted.elements > most_elements:
            of = "" if weights is None else f"; the weights hold {len(weights):,} tensors"
            raise OversizedError(
                f"they describe more than {counted.tensors - 1:,} tensors, {counted.elements:,} numbers{of}"
            )

    hooks = register_module_parameter_registration_hook(count), register_module_buffer_registration_hook(weigh)
    try:
        yield counted
    finally:
        for hook in hooks:
            hook.remove()


def _gigabytes(size: int) -> str:
    return f"{size / 2**30:.0f} GiB" if size < 2**60 else "2^30 GiB"


def _short(value: int) -> str:
    return str(value) if abs(value) < 10**12 else "a number of more than 12 digits"  # Python may refuse to write it


def integers(value: Any) -> Iterator[tuple[str, int]]:
    """The integers in nested arguments, each with its dotted path, such as "encoder.num_layers"."""
    return ((place, number) for place, number in numbers(value) if isinstance(number, int))


def numbers(value: Any, place: str = "") -> Iterator[tuple[str, int | float]]:
    """The numbers in nested arguments, each with its dotted path."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, int | float):
        yield place, value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from numbers(inner, f"{place}.{key}" if place else str(key))
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for number, inner in enumerate(value):
            yield from numbers(inner, f"{place}.{number}")

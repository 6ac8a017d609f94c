"""Devices and precisions as users name them."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Precisions by their short names."""


def choose_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """``dtype`` as a ``torch.dtype``; None stays None.

    Raises:
        ValueError: the name is unknown.
    """
    if not isinstance(dtype, str):
        return dtype
    if dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}; known are {', '.join(DTYPES)}")
    return DTYPES[dtype]


def dtype_of(model: nn.Module) -> str:
    """The precision of a model's weights by its name in records: "float32", "bfloat16", …"""
    return str(next(model.parameters()).dtype).removeprefix("torch.")


def choose_device(device: torch.device | str | None) -> torch.device:
    """``device`` as a ``torch.device``; None takes a GPU if there is one, else the CPU.

    Raises:
        ValueError: the device is unknown, or this machine does not have it.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"unknown device {device!r}; known are cpu, cuda, cuda:1, mps, …") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"there is no CUDA GPU for device {str(device)!r}; leave the device out, or take cpu")
    try:
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError, ModuleNotFoundError) as error:  # each kind of device has its own error
        raise ValueError(
            f"this machine cannot compute on the device {str(device)!r}; leave the device out, or take cpu"
        ) from error
    return torch.device("cpu") if device.type == "cpu" else device  # cpu:1 is the CPU, too


def without_autocast(device: torch.device) -> AbstractContextManager:
    """A context in which operations on ``device`` compute in the precision of their inputs, even under autocast."""
    if not torch.amp.is_autocast_available(device.type):  # torch.autocast raises for such a device
        return nullcontext()
    return torch.autocast(device.type, enabled=False)

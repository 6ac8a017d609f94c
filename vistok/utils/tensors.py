"""Files of tensors (safetensors), also in folders with names that are not UTF-8, which safetensors cannot open."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from vistok.utils.files import utf8_path


def save_file(
    tensors: Mapping[str, Tensor], path: str | os.PathLike[str], metadata: dict[str, str] | None = None
) -> None:
    """Write tensors by name; raises what ``safetensors.torch.save_file`` does."""
    with utf8_path(path) as name:
        safetensors.torch.save_file(dict(tensors), name, metadata=metadata)


def load_file(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """All tensors of a file by name; raises what ``safetensors.torch.load_file`` does."""
    with utf8_path(path) as name:
        return safetensors.torch.load_file(name)


@contextmanager
def opened(path: str | os.PathLike[str]) -> Iterator[Any]:
    """Open a file to read its metadata and single tensors; raises what ``safetensors.safe_open`` does."""
    with utf8_path(path) as name, safetensors.safe_open(name, "pt") as file:
        yield file

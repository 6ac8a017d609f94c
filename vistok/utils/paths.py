"""Paths that begin with ``~``."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def at_home(text: str) -> str:
    """A command line argument with ``~`` expanded, also in ``data.root=~/photos``, which shells leave as it is."""
    key = match[0] if (match := re.match(r"[\w.-]+=", text)) else ""
    value = text.removeprefix(key)
    return f"{key}{os.path.expanduser(value)}" if value == "~" or value.startswith("~/") else text


def local(path: str | Path) -> str | Path:
    """A path with ``~`` expanded; hub ids stay as they are."""
    return Path(path).expanduser() if str(path).startswith("~") else path


def expand(value: Any) -> Any:
    """A config with all texts that begin with ``~/`` expanded, in nested sections too."""
    if isinstance(value, Mapping):
        return {key: expand(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(expand(item) for item in value)
    return os.path.expanduser(value) if isinstance(value, str) and value.startswith("~/") else value

"""Damages to files, drawn by hypothesis."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

FEW = settings(
    max_examples=int(os.environ.get("VISTOK_DAMAGES", "60")),
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

scalars = (
    st.none()
    | st.booleans()
    | st.integers(-5, 70)
    | st.sampled_from([-(2**70), 2**70, 10**400, 1e400, -1e400, float("nan"), 0.5, "", "x", "0", "\ud800"])
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["a", "dim", "0"]), inner, max_size=3),
    max_leaves=6,
)


def places(tree: Any, path: tuple = ()) -> list[tuple]:
    """The paths to all values of a JSON tree."""
    inner = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [path, *(place for key, value in inner for place in places(value, (*path, key)))]


def changed(tree: Any, path: tuple, how: str, value: Any) -> Any:
    """The tree with the value at a path replaced, removed or renamed."""
    tree = json.loads(json.dumps(tree))
    if not path:
        return value
    inner = tree
    for key in path[:-1]:
        inner = inner[key]
    if how == "change":
        inner[path[-1]] = value
    else:
        removed = inner.pop(path[-1])
        if how == "rename" and isinstance(inner, dict):
            inner["unknown"] = removed
    return tree


@st.composite
def damages(draw: st.DrawFn) -> Callable[[bytes], bytes]:
    """Damages to a JSON file."""
    kind = draw(st.sampled_from(["value", "value", "value", "cut", "bytes", "deep"]))
    number, how, value = (
        draw(st.integers(0, 10**6)),
        draw(st.sampled_from(["change", "remove", "rename"])),
        draw(values),
    )
    noise = draw(st.binary(max_size=8))

    def damage(content: bytes) -> bytes:
        if kind == "value":
            tree = json.loads(content)
            found = places(tree)
            return json.dumps(changed(tree, found[number % len(found)], how, value)).encode()
        if kind == "cut":
            return content[: number % (len(content) + 1)]
        if kind == "deep":
            return b"[" * 10_000
        place = number % (len(content) + 1)
        return content[:place] + noise + content[place + len(noise) :]

    return damage


def outcome(use: Callable[[], Any], errors: type[Exception] | tuple[type[Exception], ...], name: str) -> None:
    """``use`` works, or raises one of ``errors`` with the file's name."""
    raised = None
    try:
        use()
    except errors as error:
        raised = str(error)
    assert raised is None or (name in raised and len(raised) < 20_000), raised


@st.composite
def byte_damages(draw: st.DrawFn) -> Callable[[bytes], bytes]:
    """Damages to any file: cut, overwritten, emptied, filled with zeros or replaced by text."""
    kind = draw(st.sampled_from(["cut", "bytes", "bytes", "bits", "zeros", "text"]))
    number, noise = draw(st.integers(0, 10**6)), draw(st.binary(min_size=1, max_size=16))

    def damage(content: bytes) -> bytes:
        place = number % max(len(content), 1)
        if kind == "cut":
            return content[:place]
        if kind == "bytes":
            return content[:place] + noise + content[place + len(noise) :]
        if kind == "bits":
            return content[:place] + bytes([content[place] ^ (1 << number % 8)]) + content[place + 1 :]
        return bytes(len(content)) if kind == "zeros" else b"<html>404</html>"

    return damage

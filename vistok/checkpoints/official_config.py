"""The arguments of a reference implementation, read so that none is ignored by accident.

``from_official`` takes the keys that it uses. Each key that is left over must be listed, with a reason, as having no
effect on what the model computes; otherwise it is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

from vistok.checkpoints.weights import CheckpointError

_REQUIRED = object()


class OfficialConfig:
    """A nested config whose leaves are taken one by one, by dotted path.

    Args:
        config: the reference's arguments, nested mappings of values.
        without_effect: from a pattern of dotted paths (``*`` matches anything) to the reason why these keys do not
            change what the model computes.
    """

    def __init__(self, config: Mapping[str, Any], without_effect: Mapping[str, str]):
        self._left = dict(_leaves(config))
        self._without_effect = without_effect

    def take(self, path: str, default: Any = _REQUIRED) -> Any:
        """Take and return the value at ``path``, or a nested mapping if ``path`` names a section.

        Raises:
            CheckpointError: ``path`` is absent and has no default.
        """
        if path in self._left:
            return self._left.pop(path)
        inside = {key: value for key, value in self._left.items() if key.startswith(f"{path}.")}
        if inside:
            for key in inside:
                del self._left[key]
            return _nested({key.removeprefix(f"{path}."): value for key, value in inside.items()})
        if default is _REQUIRED:
            raise CheckpointError(f"the reference's config lacks {path}")
        return default

    def require(self, path: str, *allowed: Any, why: str) -> None:
        """Take a key that must be absent or have one of the ``allowed`` values.

        Raises:
            CheckpointError: it has another value.
        """
        value = self.take(path, allowed[0])
        if value not in allowed:
            raise CheckpointError(f"{path} is {value!r}; only {' or '.join(map(repr, allowed))} is supported: {why}")

    def without_effect(self) -> dict[str, str]:
        """The keys that were not taken but are known to have no effect, each with the reason."""
        found = {}
        for key in self._left:
            reason = next((why for pattern, why in self._without_effect.items() if fnmatchcase(key, pattern)), None)
            if reason is not None:
                found[key] = reason
        return found

    def finish(self) -> None:
        """Check that only keys without effect are left over.

        Raises:
            CheckpointError: other keys are left; the message names them.
        """
        unknown = self._left.keys() - self.without_effect().keys()
        if unknown:
            raise CheckpointError(
                f"the reference's config has keys that this model does not know: {', '.join(sorted(unknown))}; they "
                "might change what it computes. Remove them if you are sure that they do not"
            )


def _leaves(config: Mapping[str, Any], prefix: str = ""):
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for path, value in flat.items():
        *parents, last = path.split(".")
        inner = nested
        for parent in parents:
            inner = inner.setdefault(parent, {})
        inner[last] = value
    return nested

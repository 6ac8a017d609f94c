"""Classes by id or by name."""

from __future__ import annotations

import operator
import re
import unicodedata
from collections.abc import Iterable, Sequence
from typing import SupportsIndex, cast

from vistok.utils.spelling import suggestion

ClassLabel = SupportsIndex | str
"""A class: its id (int, or an integer scalar of NumPy or torch), or its name."""


class ClassNames:
    """The classes of a generator, which users give by id or by name.

    Names are compared without regard to case and to the form of accents (NFC, or macOS's NFD), unless that leaves
    several. ImageNet's names list synonyms ("tench, Tinca tinca"); each synonym is a name of the class. A string of
    digits that is no name is an id, as on the command line.

    Args:
        count: number of classes.
        names: their names in the order of the ids; empty if they have none.

    Raises:
        ValueError: the number of names differs from ``count``.
    """

    def __init__(self, count: int, names: Sequence[str] = ()) -> None:
        if names and len(names) != count:
            raise ValueError(f"there are {len(names)} class names, but the generator has {count} classes")
        self.count, self.names = count, tuple(names)
        self._ids: dict[str, list[int]] = {}
        for index, name in enumerate(self.names):
            for synonym in dict.fromkeys((name, *name.split(","))):
                self._ids.setdefault(_compared(synonym), []).append(index)

    def resolve(self, labels: ClassLabel | Iterable[ClassLabel]) -> list[int]:
        """Ids of one class or several.

        Raises:
            ValueError: an unknown or ambiguous name, or an id out of range.
        """
        if isinstance(labels, str) or not isinstance(labels, Iterable) or getattr(labels, "ndim", 1) == 0:
            return [self._id(cast(ClassLabel, labels))]
        return [self._id(label) for label in labels]

    def _id(self, label: ClassLabel) -> int:
        if isinstance(label, str):
            return self._id_of_name(label.strip())
        try:
            index = None if isinstance(label, bool) else operator.index(label)
        except TypeError:
            index = None
        if index is None:
            raise ValueError(f"a class is an id or a name, got {label!r} ({type(label).__name__})")
        return self._check_range(index)

    def _id_of_name(self, name: str) -> int:
        ids = list(dict.fromkeys(self._ids.get(_compared(name), ())))
        if len(ids) > 1 and self.names.count(name) == 1:
            return self.names.index(name)
        if len(ids) == 1:
            return ids[0]
        if ids:
            meant = "; ".join(f"{index}: {self.names[index]}" for index in ids)
            raise ValueError(f"class {name!r} is ambiguous; give its id ({meant})")
        if re.fullmatch(r"-?[0-9]{1,18}", name):
            return self._check_range(int(name))
        hint = suggestion(name, list(self._ids)) or "."
        raise ValueError(f"unknown class {name!r}{hint} {self._known()}")

    def _check_range(self, index: int) -> int:
        if not 0 <= index < self.count:
            raise ValueError(f"class id {index} is out of range. {self._known()}")
        return index

    def _known(self) -> str:
        if not self.names:
            return f"This generator knows its {self.count} classes by id only, 0..{self.count - 1}."
        shown = ", ".join(self.names[:3]) + (", …" if self.count > 3 else "")
        return (
            f"There are {self.count} classes ({shown}), ids 0..{self.count - 1}; all are listed in "
            "pipe.class_names and in the pipeline's pipeline.json."
        )


def _compared(name: str) -> str:
    return unicodedata.normalize("NFC", name).strip().lower()

"""torch's containers, with the types of what they hold. At run time they are torch's own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, Generic, TypeVar, overload

from torch import nn

Layer = TypeVar("Layer", bound=nn.Module, covariant=True)

if TYPE_CHECKING:

    class ModuleList(nn.ModuleList, Generic[Layer]):
        """Layers of one type."""

        def __init__(self, modules: Iterable[Layer] | None = None) -> None: ...

        @overload
        def __getitem__(self, idx: slice) -> ModuleList[Layer]: ...

        @overload
        def __getitem__(self, idx: int) -> Layer: ...

        def __getitem__(self, idx: int | slice) -> Layer | ModuleList[Layer]: ...

        def __iter__(self) -> Iterator[Layer]: ...

    class Sequential(nn.Sequential):
        """Layers of several types; a layer read by its index has the type Any."""

        def __getitem__(self, idx: int | slice) -> Any: ...

else:
    ModuleList, Sequential = nn.ModuleList, nn.Sequential

"""A stand-in for an accelerator, for machines that have none.

Tensors "on" it keep a real CPU tensor inside, and every operation runs for real on that; but an operation that mixes
them with tensors of the CPU raises the RuntimeError that a GPU raises. So a test on any machine sees a draw, an index
or a table that was left on the CPU. What a GPU allows is allowed: copies between devices, CPU scalars (0 dimensions) in
elementwise operations, CPU indices into a tensor of the device.

``with other_device() as device: model.to(device)`` is all that a test needs; gradients, optimizers, ``deepcopy`` and
``torch.save`` work. Tensors of the device may leave the ``with``, but none can be made outside.
``recorded_waits`` tells where the host would wait for a GPU. There is no autocast and no activation checkpointing:
PyTorch has none for such a device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# PyTorch knows this device type, builds without it everywhere, and runs the backward pass of its tensors in the CPU's
# queue. (A "cuda" tensor would ask for the streams of a GPU that is not there.)
DEVICE = torch.device("lazy", 0)

aten = torch.ops.aten
COPIES = {aten.copy_.default, aten._foreach_copy_.default}
FILLS = {aten.masked_fill.Tensor, aten.masked_fill_.Tensor, aten.fill_.Tensor}
INDEXING = {aten.index.Tensor, aten._unsafe_index.Tensor, aten.index_put.default, aten.index_put_.default}
# PyTorch resolves these lazily, in a layer that does not see the tensors inside.
AT_ONCE = {aten._conj.default: aten._conj_physical.default, aten._neg_view.default: aten.neg.default}


@contextmanager
def other_device() -> Iterator[torch.device]:
    """The stand-in's device, for ``.to(device)`` and ``device=…`` inside."""
    before = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(…, device=…) copies to the device where we see it
    try:
        with _Factories():
            yield DEVICE
    finally:
        torch._C._set_only_lift_cpu_tensors(before)


@contextmanager
def recorded_waits() -> Iterator[list[str]]:
    """The operations, meanwhile, that make the host wait until a GPU has done all that it was given: reading values,
    results whose size depends on values, copies that are not ``non_blocking``."""
    _recorders.append(waits := [])
    try:
        yield waits
    finally:
        _recorders.remove(waits)


_recorders: list[list[str]] = []


class OtherTensor(Tensor):
    """A tensor that says it is on ``DEVICE``, around one on the CPU that holds its values."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> OtherTensor:
        return Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=DEVICE,
        )

    def __init__(self, inner: Tensor):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return _run(function, args, kwargs or {})

    def tolist(self):
        return self.cpu().tolist()

    def numpy(self, *, force: bool = False):
        if not force:
            raise TypeError(f"can't convert {DEVICE} device type tensor to numpy. Use Tensor.cpu() first.")
        return self.detach().cpu().numpy(force=True)

    def __reduce_ex__(self, protocol):
        # A file of a GPU's tensors is read with map_location="cpu", which gives this.
        return self.inner.__reduce_ex__(protocol)


class _Factories(TorchDispatchMode):
    """Sees operations without a tensor of the device, too: those that make one."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return _run(function, args, kwargs or {})


def _run(function, args: tuple, kwargs: dict[str, Any]) -> Any:
    """The operation on the CPU tensors inside, its results wrapped if they are on the device."""
    tensors = list(_tensors((args, tuple(kwargs.values()))))
    wrappers = {id(tensor.inner): tensor for tensor in tensors if isinstance(tensor, OtherTensor)}
    if wrappers and _strangers(function, args, tensors):
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found at least two devices, {DEVICE} and cpu! "
            f"(when checking the arguments of {function})"
        )
    there = isinstance(args[0], OtherTensor) if function in COPIES else bool(wrappers)
    if kwargs.get("device") is not None:
        there = torch.device(kwargs["device"]).type == DEVICE.type
        kwargs = kwargs | {"device": torch.device("cpu")}
    if there and kwargs.get("generator") is not None:
        raise RuntimeError(f"Expected a '{DEVICE.type}' device type for generator but found 'cpu'")
    if (wrappers or there) and _waits(function, args, kwargs, there):
        for waits in _recorders:
            waits.append(str(function))
    inner = {name: _map(_unwrap, value) for name, value in kwargs.items()}
    results = AT_ONCE.get(function, function)(*_map(_unwrap, args), **inner)

    def wrap(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        # An operation in place returns its argument, which must stay the same object.
        if id(value) in wrappers:
            return wrappers[id(value)]
        with torch.inference_mode(False):  # PyTorch makes no views of a wrapper that is an inference tensor
            return OtherTensor(value)

    return _map(wrap, results) if there else results


# Arguments and results nest in tuples and lists only; torch.utils._pytree, which knows more, takes ten times as long.
def _map(change: Callable[[Any], Any], value: Any) -> Any:
    return type(value)(_map(change, part) for part in value) if isinstance(value, tuple | list) else change(value)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for part in value:
            yield from _tensors(part)


def _unwrap(value: Any) -> Any:
    return value.inner if isinstance(value, OtherTensor) else value


def _strangers(function, args: tuple, tensors: list[Tensor]) -> list[Tensor]:
    """Those of the operation's CPU tensors that a GPU does not combine with tensors of its own."""
    if function in COPIES:
        return []
    strangers = [tensor for tensor in tensors if not isinstance(tensor, OtherTensor)]
    if not isinstance(args[0], OtherTensor) and (function in INDEXING or function._schema.is_mutable):
        return strangers  # what is indexed, or changed in place, is on the CPU itself
    if function in INDEXING:
        strangers = [tensor for tensor in strangers if all(tensor is not index for index in args[1])]
    if function in INDEXING | FILLS or torch.Tag.pointwise in function.tags:
        strangers = [tensor for tensor in strangers if tensor.ndim]
    return strangers


def _waits(function, args: tuple, kwargs: dict[str, Any], there: bool) -> bool:
    """Whether the host waits for this operation on a GPU, whose result is ``there`` or on the CPU."""
    if function in (aten._to_copy.default, aten.copy_.default):
        source = args[0] if function is aten._to_copy.default else args[1]
        blocking = not (kwargs.get("non_blocking") or args[2:3] == (True,))
        return isinstance(source, OtherTensor) != there and (blocking or not there)
    if function in INDEXING:
        return any(index is not None and index.dtype == torch.bool for index in args[1])
    sized_by_values = torch.Tag.dynamic_output_shape in function.tags or function is aten.bincount.default
    return sized_by_values or torch.Tag.data_dependent_output in function.tags

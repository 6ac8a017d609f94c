"""Linear layers for the few rows of a decoding step on a CPU, with weights packed by oneDNN.

A product of a few rows should take as long as reading the weight. PyTorch's takes longer, because it rearranges the
weight in every call; oneDNN does that once and keeps a packed copy. The operators used here are part of PyTorch but not
public. The public way (``torch.utils.mkldnn.to_mkldnn``) keeps PyTorch's layout, and took 3 times as long in float32
and 8 times in bfloat16 (8 rows, weights of (2304, 768), two cores).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self, TypeGuard

import torch
from torch import Tensor, nn

from vistok.generators.engine.copies import is_altered, is_plain_linear, with_layers
from vistok.nn.mlp import GatedMLP

FEWEST_ROWS = 4
"""The fewest rows that packing pays for: with fewer, products are as fast in PyTorch's layout."""


@dataclass(frozen=True)
class DecodingCopy:
    """A copy of a model whose linear layers have packed weights.

    Attributes:
        model: the copy; the model itself if nothing is packed.
        rows: number of rows of a step.
    """

    model: Any  # a module, with all that the original has
    rows: int
    _seen: list[tuple[Any, ...]]
    _weights: list[nn.Parameter]
    _versions: list[int]

    @classmethod
    def of(cls, model: nn.Module, rows: int) -> Self:
        """Pack the weights of ``model`` for steps of ``rows`` rows."""
        weights = [weight for weight in model.parameters() if not weight.is_inference()]
        versions = [weight._version for weight in weights]
        return cls(pack(model, rows), rows, _state(model), weights, versions)

    def is_copy_of(self, model: nn.Module) -> bool:
        """Whether the copy still matches ``model``: the same weights, modules and hooks."""
        return self._seen == _state(model) and self.has_todays_weights()

    def has_todays_weights(self) -> bool:
        """Whether the weights have not changed since they were packed. A change through ``.data`` goes unnoticed,
        because PyTorch does not count it."""
        return [weight._version for weight in self._weights] == self._versions


class DecodingCopies:
    """Holds a generator's last decoding copy, which sampling, streams and previews share.

    It is not part of the model's state: copies and pickles of the model start without one.
    """

    def __init__(self) -> None:
        self._last: DecodingCopy | None = None

    def of(self, model: nn.Module, rows: int) -> DecodingCopy:
        """The copy for steps of ``rows`` rows, packed again if the model has changed."""
        last = self._last
        if last is None or last.rows != rows or not last.is_copy_of(model):
            self._last = last = DecodingCopy.of(model, rows)
        return last

    def clear(self) -> None:
        """Free the copy's memory, which is as large as the weights."""
        self._last = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return type(self)()

    def __reduce__(self) -> tuple[type[Self], tuple[()]]:
        return type(self), ()


def _state(model: nn.Module) -> list[tuple[Any, ...]]:
    """What the copy depends on besides the values of weights: modules and tensors by identity, modes, hooks."""
    modules = [(_Same(m), m.training, is_altered(m), m._compiled_call_impl is not None) for m in model.modules()]
    weights = [(_Same(p), p.data_ptr(), object() if p.is_inference() else None) for p in model.parameters()]
    return [*modules, *weights, (torch.is_autocast_enabled("cpu"),)]


class _Same:
    """Compares an object by identity, and keeps it alive."""

    def __init__(self, value: object):
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.value is other.value

    __hash__ = None  # type: ignore[assignment]  # Python's own way to make a class unhashable


def pack(model: nn.Module, rows: int) -> nn.Module:
    """A copy of ``model`` for steps of ``rows`` rows without gradients, or the model itself if nothing is packed.

    A layer is not packed if it is on another device, is quantised, has hooks, or is inside a module that the caller
    compiled. Under autocast no layer is packed, because autocast chooses the dtypes.
    """
    if rows < FEWEST_ROWS or torch.is_autocast_enabled("cpu"):
        return model
    dtypes = _packable_dtypes()

    def is_packable(module: nn.Module) -> TypeGuard[nn.Linear]:
        return is_plain_linear(module) and module.weight.is_cpu and module.weight.dtype in dtypes

    def packed(module: nn.Module) -> nn.Module | None:
        if module is not model and (module._compiled_call_impl or "_orig_mod" in module._modules):
            return module  # compiled graphs choose their own kernels, and cannot use these
        if is_packable(module):
            return PackedLinear([module], rows)
        if isinstance(module, GatedMLP) and not is_altered(module):
            gate, up = module.gate, module.up
            if is_packable(gate) and is_packable(up):
                return PackedGatedMLP(module, PackedLinear([gate, up], rows), with_layers(module.down, packed))
        return None

    return with_layers(model, packed)


class PackedLinear(nn.Module):
    """Linear layers of the same input as one product, outputs concatenated: (..., D) -> (..., O)."""

    def __init__(self, linears: Sequence[nn.Linear], rows: int):
        super().__init__()
        with torch.no_grad():
            weight = torch.cat([linear.weight for linear in linears]) if len(linears) > 1 else linears[0].weight
            self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), rows)
            self._bias = None if linears[0].bias is None else torch.cat([linear.bias for linear in linears])

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, "none", [], "")


class PackedGatedMLP(nn.Module):
    """A gated feed-forward (..., D) -> (..., D) that multiplies once for gate and up.

    Args:
        mlp: the module whose activation and dropout are used.
        gate_up: the joined gate and up projections.
        down: the output projection.
    """

    def __init__(self, mlp: GatedMLP, gate_up: PackedLinear, down: nn.Module):
        super().__init__()
        self.gate_up, self.down, self.activation = gate_up, down, mlp.activation
        self.hidden_drop, self.drop = mlp.hidden_drop, mlp.drop

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, -1)
        return self.drop(self.down(self.hidden_drop(self.activation(gate) * up)))


def _packable_dtypes() -> tuple[torch.dtype, ...]:
    """The dtypes that this build of PyTorch packs on this processor. The operators are private, and may be absent."""
    operators = torch.ops.mkldnn
    if not torch.backends.mkldnn.is_available() or not hasattr(operators, "_reorder_linear_weight"):
        return ()
    bfloat16 = hasattr(operators, "_is_mkldnn_bf16_supported") and operators._is_mkldnn_bf16_supported()
    return (torch.float32, torch.bfloat16) if bfloat16 else (torch.float32,)

"""Linear layers with weights in the order in which a CPU's matrix kernels read them.

A step of cached sampling multiplies a few rows by every weight of a model. In PyTorch's layout the kernels spend a good
part of that time on rearranging weights, anew in each step; oneDNN can do it once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from vistok.nn.mlp import GatedMLP

FEWEST_ROWS = 4
"""With fewer the products are as fast in PyTorch's layout."""


@contextmanager
def packed_linears(model: nn.Module, rows: int) -> Iterator[None]:
    """Within the block the linear layers of ``model``, on a CPU, compute with packed copies of their weights; the two
    of a ``GatedMLP`` that take the same input, as one.

    The copies take as much memory as the weights; what happens to the weights inside the block is not seen. Nothing
    is packed for other devices, for processors without the instructions, or for ``rows`` so few that it does not pay.

    Args:
        rows: how many rows the layers will mostly be given.
    """
    products = _products(model, rows) if rows >= FEWEST_ROWS else {}
    for module, product in products.items():
        # On the instance, so that hooks of the module still run; a copy of its own needs no second set of modules.
        module.forward = product
    try:
        yield
    finally:
        for module in products:
            vars(module).pop("forward", None)


Product = Callable[[Tensor], Tensor]
"""A layer as a function of its input, which holds a packed copy of the weight."""


def _products(model: nn.Module, rows: int) -> dict[nn.Module, Product]:
    """What replaces the forward pass of which module, without those that are replaced already: blocks may be nested."""
    products: dict[nn.Module, Product] = {}
    within: set[nn.Module] = set()
    for module in model.modules():  # parents before children
        gated = isinstance(module, GatedMLP) and not module.training and _is_packable(module.gate)
        if gated:
            within |= {module.gate, module.up}
        if "forward" in vars(module):
            continue
        if gated:
            products[module] = _gated_product(module, rows)
        elif module not in within and _is_packable(module):
            products[module] = _product([module], rows)
    return products


def _product(linears: Sequence[nn.Linear], rows: int) -> Product:
    """Layers of one input as one, their outputs side by side."""
    with torch.no_grad():
        weight = torch.ops.mkldnn._reorder_linear_weight(_joined([linear.weight for linear in linears]), rows)
        bias = None if linears[0].bias is None else _joined([linear.bias for linear in linears])
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0].detach() if len(parts) == 1 else torch.cat([part.detach() for part in parts])


def _gated_product(mlp: GatedMLP, rows: int) -> Product:
    """The feed-forward without dropout; its last layer is packed by itself."""
    product = _product([mlp.gate, mlp.up], rows)

    def forward(x: Tensor) -> Tensor:
        gate, up = product(x).chunk(2, -1)
        return mlp.down(mlp.activation(gate) * up)

    return forward


def _is_packable(module: nn.Module) -> bool:
    if type(module) is not nn.Linear:
        return False
    weight = module.weight
    # A subclass of Parameter is quantised, or sharded over processes.
    return type(weight) is nn.Parameter and weight.device.type == "cpu" and weight.dtype in _packable_dtypes()


def _packable_dtypes() -> tuple[torch.dtype, ...]:
    """Those that this build of PyTorch packs on this processor: the operators are its own, and may go."""
    operators = torch.ops.mkldnn
    if not torch.backends.mkldnn.is_available() or not hasattr(operators, "_reorder_linear_weight"):
        return ()
    bfloat16 = hasattr(operators, "_is_mkldnn_bf16_supported") and operators._is_mkldnn_bf16_supported()
    return (torch.float32, torch.bfloat16) if bfloat16 else (torch.float32,)

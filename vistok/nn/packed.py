"""Linear layers with weights in the order in which a CPU's matrix kernels read them.

A step of cached sampling multiplies a few rows by every weight of a model. In PyTorch's layout the kernels spend a good
part of that time on rearranging weights, anew in each step; oneDNN can do it once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

FEWEST_ROWS = 4
"""With fewer the products are as fast in PyTorch's layout."""


@contextmanager
def packed_linears(model: nn.Module, rows: int) -> Iterator[None]:
    """Within the block the linear layers of ``model``, on a CPU, compute with packed copies of their weights.

    The copies take as much memory as the weights; what happens to the weights inside the block is not seen. Nothing
    is packed for other devices, for processors without the instructions, or for ``rows`` so few that it does not pay.

    Args:
        rows: how many rows the layers will mostly be given.
    """
    packed = [linear for linear in model.modules() if _is_packable(linear)] if rows >= FEWEST_ROWS else []
    for linear in packed:
        # On the instance, so that hooks of the module still run; a copy of its own needs no second set of modules.
        linear.forward = _product(linear, rows)
    try:
        yield
    finally:
        for linear in packed:
            vars(linear).pop("forward", None)


def _product(linear: nn.Linear, rows: int) -> Callable[[Tensor], Tensor]:
    """The layer as a function of its input, which holds a packed copy of the weight."""
    bias = linear.bias
    with torch.no_grad():
        weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), rows)
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _is_packable(module: nn.Module) -> bool:
    if type(module) is not nn.Linear or "forward" in vars(module):  # packed already: blocks may be nested
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

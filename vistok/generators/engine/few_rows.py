"""Linear layers and norms for a few rows at a time on a CPU, as in the steps of cached sampling.

Such a product takes as long as reading the weight does, and PyTorch's own way of computing it takes longer: its kernels
rearrange the weight, anew in each step. oneDNN can do that once and keep a packed copy; for bfloat16, where the
processor allows it, our own kernel needs no copy and reads faster still (``vistok.generators.engine.amx``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from vistok.generators.engine import amx
from vistok.generators.engine.plain import is_altered, is_plain_linear
from vistok.nn.mlp import GatedMLP
from vistok.nn.norms import RMSNorm

FEWEST_PACKED = 4
"""With fewer rows oneDNN's products are as fast in PyTorch's layout."""


@contextmanager
def layers_for(model: nn.Module, rows: int) -> Iterator[None]:
    """Within the block linear layers and norms of ``model``, on a CPU, compute in the way that is fastest for ``rows``
    rows; without gradients.

    Packed copies take as much memory as the weights, and what happens to the weights inside the block is not seen.
    Layers on other devices, quantised ones, those within compiled modules, all of them under autocast, which chooses
    their types itself, and those for which nothing is faster stay as they are.
    """
    products = _products(model, rows) if rows and not torch.is_autocast_enabled("cpu") else {}
    try:
        for module, product in products.items():
            # On the instance, so that hooks of the module still run; a copy of its own needs no second set of modules.
            module.forward = product
        yield
    finally:
        for module in products:
            vars(module).pop("forward", None)


Product = Callable[[Tensor], Tensor]
"""A layer as a function of its input."""


def _products(model: nn.Module, rows: int) -> dict[nn.Module, Product]:
    """What replaces the forward pass of which module, without those that are replaced already: blocks may be nested."""
    products: dict[nn.Module, Product] = {}
    left_alone = _parts_of_compiled(model)
    for module in model.modules():  # parents before children
        gated = isinstance(module, GatedMLP) and not module.training and _are_joinable([module.gate, module.up], rows)
        if gated:
            left_alone |= {module.gate, module.up}
        if module in left_alone or "forward" in vars(module):
            continue
        if gated:
            products[module] = _gated_product(module, rows)
        elif _is_direct(module, rows):
            products[module] = _direct_product(module)
        elif type(module) is RMSNorm and rows <= amx.MOST_ROWS and amx.suits(module.weight):
            products[module] = _direct_norm(module)
        elif _is_packable(module, rows):
            products[module] = _packed_product([module], rows)
    return products


def _parts_of_compiled(model: nn.Module) -> set[nn.Module]:
    """The modules within those that the caller compiled, by either way of ``torch.compile``: graphs choose their own
    products, and cannot take ours. ``model`` itself does not count: sampling calls its parts."""
    inner = (module for module in model.modules() if module is not model)
    compiled = (module for module in inner if module._compiled_call_impl or "_orig_mod" in module._modules)
    return {part for module in compiled for part in module.modules()}


def _direct_product(linear: nn.Linear) -> Product:
    return lambda x: amx.linear(x, linear.weight, linear.bias)


def _direct_norm(norm: RMSNorm) -> Product:
    return lambda x: amx.rms_norm(x, norm.weight, norm.eps)


def _packed_product(linears: Sequence[nn.Linear], rows: int) -> Product:
    """Layers of one input as one, their outputs side by side."""
    with torch.no_grad():
        weight = torch.ops.mkldnn._reorder_linear_weight(_joined([linear.weight for linear in linears]), rows)
        bias = None if linears[0].bias is None else _joined([linear.bias for linear in linears])
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0].detach() if len(parts) == 1 else torch.cat([part.detach() for part in parts])


def _gated_product(mlp: GatedMLP, rows: int) -> Product:
    """The feed-forward without dropout; its last layer is packed by itself."""
    product = _packed_product([mlp.gate, mlp.up], rows)

    def forward(x: Tensor) -> Tensor:
        gate, up = product(x).chunk(2, -1)
        return mlp.down(mlp.activation(gate) * up)

    return forward


def _is_direct(module: nn.Module, rows: int) -> bool:
    return _is_plain(module) and rows <= amx.MOST_ROWS and amx.suits(module.weight)


def _is_packable(module: nn.Module, rows: int) -> bool:
    """Whether oneDNN packs the layer, which our own kernel does not serve."""
    packable = _is_plain(module) and rows >= FEWEST_PACKED and module.weight.dtype in _packable_dtypes()
    return packable and not _is_direct(module, rows)


def _are_joinable(layers: Sequence[nn.Module], rows: int) -> bool:
    """Whether oneDNN packs each, and none does more than multiply."""
    return not any(map(is_altered, layers)) and all(_is_packable(layer, rows) for layer in layers)


def _is_plain(module: nn.Module) -> bool:
    return is_plain_linear(module) and module.weight.is_cpu


def _packable_dtypes() -> tuple[torch.dtype, ...]:
    """Those that this build of PyTorch packs on this processor: the operators are its own, and may go."""
    operators = torch.ops.mkldnn
    if not torch.backends.mkldnn.is_available() or not hasattr(operators, "_reorder_linear_weight"):
        return ()
    bfloat16 = hasattr(operators, "_is_mkldnn_bf16_supported") and operators._is_mkldnn_bf16_supported()
    return (torch.float32, torch.bfloat16) if bfloat16 else (torch.float32,)

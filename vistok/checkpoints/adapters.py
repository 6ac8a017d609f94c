"""Low-rank adapters (LoRA, arXiv 2106.09685) on disk: merged into the weights, or apart in the format of PEFT.

In training a weight W is parametrized as ``W + scale * B A``, and a state dict holds W, A, B and the scale (see
``parts_of``). An adapter that is kept apart lies beside the weights, with the file names and keys of PEFT, which can
load it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from vistok.checkpoints.weights import CheckpointError, read_weights
from vistok.utils.files import read_json, write_json
from vistok.utils.tensors import save_file

ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
ORIGINAL = ".parametrizations.weight.original"
LOW_RANK = ".parametrizations.weight.0."
_PEFT = "base_model.model."


def parts_of(state: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The adapters in a state dict of training: for each module, the tensors "down" (A), "up" (B) and "scale"."""
    modules = [key.removesuffix(ORIGINAL) for key in state if key.endswith(ORIGINAL)]
    return {
        module: {name: state[f"{module}{LOW_RANK}{name}"] for name in ("down", "up", "scale")} for module in modules
    }


def merged(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict with all adapters merged into their weights."""
    found = parts_of(state)
    result = without_adapters(state)
    for module, part in found.items():
        result[f"{module}.weight"] = added(result[f"{module}.weight"], **part)
    return result


def without_adapters(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of the base weights, without adapters."""
    return {key.replace(ORIGINAL, ".weight"): tensor for key, tensor in state.items() if LOW_RANK not in key}


def added(weight: Tensor, down: Tensor, up: Tensor, scale: Tensor | float) -> Tensor:
    """``weight`` (out, ...) plus ``scale * up @ down``, for down (rank, inputs) and up (out, rank)."""
    return weight + (scale * (up @ down)).view_as(weight)


def save_adapter(folder: Path, state: Mapping[str, Tensor], base: str) -> None:
    """Write the adapters of a state dict in the format of PEFT.

    Args:
        base: name of the base model, for PEFT's config.

    Raises:
        CheckpointError: modules differ in rank or scale, of which the config holds one.
    """
    found = parts_of(state)
    tensors, kinds = {}, set()
    for module, part in found.items():
        tensors[f"{_PEFT}{module}.lora_A.weight"] = part["down"].detach().cpu().contiguous()
        tensors[f"{_PEFT}{module}.lora_B.weight"] = part["up"].detach().cpu().contiguous()
        kinds.add((len(part["down"]), float(part["scale"])))
    if len(kinds) != 1:
        told = "; ".join(f"rank {rank}, scale {scale:g}" for rank, scale in sorted(kinds)) or "none"
        raise CheckpointError(f"an adapter file holds adapters of one rank and one scale; these have {told}")
    ((rank, scale),) = kinds
    save_file(tensors, folder / ADAPTER, metadata={"format": "pt"})
    config = {"peft_type": "LORA", "base_model_name_or_path": base, "r": rank, "target_modules": sorted(found)}
    config |= {"lora_alpha": rank * scale, "bias": "none", "inference_mode": True}
    write_json(folder / ADAPTER_CONFIG, config)


def with_adapter(state: dict[str, Tensor], folder: Path) -> dict[str, Tensor]:
    """Merge the adapter in ``folder``, if there is one, into the weights ``state``.

    Raises:
        CheckpointError: the adapter is damaged, or of another model.
    """
    if not (folder / ADAPTER).is_file():
        return state
    try:
        config = read_json(folder / ADAPTER_CONFIG)
        scale = config["lora_alpha"] / config["r"]
    except (OSError, ValueError, KeyError, TypeError, ZeroDivisionError) as error:
        raise CheckpointError(f"{folder / ADAPTER_CONFIG} does not describe an adapter: {error!r}") from error
    tensors, result = read_weights(folder / ADAPTER), dict(state)
    for key in [key for key in tensors if key.endswith(".lora_A.weight")]:
        module = key.removesuffix(".lora_A.weight")
        weight = f"{module.removeprefix(_PEFT)}.weight"
        try:
            result[weight] = added(state[weight], tensors[key], tensors[f"{module}.lora_B.weight"], scale)
        except (KeyError, RuntimeError) as error:
            raise CheckpointError(f"{folder / ADAPTER} does not fit the weights beside it: {error}") from error
    return result

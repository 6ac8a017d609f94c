"""Weights: reading files safely, renaming and joining keys, loading them strictly.

Files are read as safetensors, or by torch with ``weights_only=True``, which unpickles no arbitrary objects.
"""

from __future__ import annotations

import argparse
import json
import re
import zipfile
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from vistok.utils.tensors import load_file

STATE = "state.pt"
"""The file of a training checkpoint."""


def exported(state: Mapping[str, Any], where: str | Path) -> dict[str, Tensor]:
    """The weights that a run would export from a checkpoint's state: the averaged ones, if there are any.

    Raises:
        CheckpointError: ``state`` is no state of a run.
    """
    try:
        return dict((state["average"] or state)["model"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{where} holds no state of a training run ({error!r})") from error


def hash_weights(digest: Any, state: Mapping[str, Tensor]) -> None:
    """Add names, shapes, dtypes and values to a digest of hashlib."""
    for key, tensor in sorted(state.items()):
        digest.update(f"{key}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)


class CheckpointError(ValueError):
    """A checkpoint that cannot be loaded: absent, damaged, or of another model."""


def read_weights(path: str | Path, *, stand_ins: Sequence[tuple[type, str]] = ()) -> dict[str, Any]:
    """Read a safetensors file, the index file of several (``*.safetensors.index.json``), or a torch file with
    ``weights_only=True``.

    Args:
        stand_ins: inert classes, each with the name of the pickled class that it replaces.

    Raises:
        CheckpointError: the file is absent or damaged, would need unpickling of arbitrary objects, is TorchScript, or
            is an index that does not match its files.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"there is no weights file {path}")
    if path.name.endswith(INDEX_SUFFIX):
        return _read_shards(path)
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (SafetensorError, OSError, ValueError, TypeError, LookupError, RuntimeError, MemoryError) as error:
            raise CheckpointError(
                f"{path} is damaged or incomplete ({path.stat().st_size:,} bytes): {error}; fetch or save it again"
            ) from error
    if is_torchscript(path):
        raise CheckpointError(
            f"{path} is TorchScript, which runs the code in the file when it is loaded, so it is not read as weights. "
            "If you trust the file, save its state dict alone: torch.save(torch.jit.load(FILE).state_dict(), "
            '"weights.pt")'
        )
    try:
        # Training checkpoints often store their command line as a Namespace.
        with torch.serialization.safe_globals([argparse.Namespace, *stand_ins]):
            # Files from before PyTorch 1.6 are no zip archives, and cannot be memory-mapped.
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # torch raises several types, none of them its own
        lines = _ESCAPES.sub("", str(error)).splitlines() or [repr(error)]
        reason = next((line.strip() for line in lines if "WeightsUnpickler error" in line), lines[0])
        if "Unsupported global" not in reason and "Unsupported class" not in reason:
            raise CheckpointError(
                f"{path} cannot be read safely as weights: it is damaged, incomplete ({path.stat().st_size:,} bytes) "
                f"or no file of weights ({reason}); fetch or save it again"
            ) from error
        named = _GLOBAL.search(reason)
        what = f"a {named[1]}" if named else "other objects"
        raise CheckpointError(
            f"{path} cannot be read safely as weights: it pickles {what} beside them, and unpickling that may run any "
            "code. If you trust the file, save its state dict alone, where its own code is installed: "
            'torch.save(torch.load(FILE, weights_only=False)["state_dict"], "weights.pt"), or whichever key it is under'
        ) from error
    if not isinstance(found, Mapping):
        raise CheckpointError(f"{path} holds a {type(found).__name__}, no state dict")
    return dict(found)


def is_torchscript(path: str | Path) -> bool:
    """Whether a file is a TorchScript archive, which holds code; nothing of it is run."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(PurePosixPath(name).name == "constants.pkl" for name in archive.namelist())
    except (zipfile.BadZipFile, OSError, ValueError):
        return False


_ESCAPES = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
"""Escape sequences of terminals, such as those for bold print."""
_GLOBAL = re.compile(r"(?:Unsupported (?:global|class)[^:]*: (?:GLOBAL )?)([\w.]+)")


INDEX_SUFFIX = ".safetensors.index.json"


def shard_names(index: Path) -> dict[str, str]:
    """The file name of each tensor's shard, from an index file; shards lie in its folder.

    Raises:
        CheckpointError: the file is no index, or a name leads out of the folder.
    """
    try:
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        proper = isinstance(names, dict) and all(isinstance(name, str) for name in names.values())
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{index} is no index of safetensors files (no weight_map): {error!r}") from error
    odd = [name for name in names.values() if not _is_shard(name)] if proper else [names]
    if odd:
        raise CheckpointError(f"{index} names {odd[0]!r}, which is no safetensors file beside it")
    return names


def _is_shard(name: str) -> bool:
    return name.endswith(".safetensors") and name == Path(name).name and "\\" not in name


def _read_shards(index: Path) -> dict[str, Tensor]:
    """The tensors of all shards of an index; raises CheckpointError unless each is where the index says."""
    names, found = shard_names(index), dict[tuple[str, str], Tensor]()
    absent = sorted({name for name in names.values() if not (index.parent / name).is_file()})
    if absent:
        raise CheckpointError(f"{index} names files that are not beside it: {listing(absent)}; fetch them too")
    for shard in sorted(set(names.values())):
        found |= {(shard, key): tensor for key, tensor in read_weights(index.parent / shard).items()}
    named = {(shard, key) for key, shard in names.items()}
    missing, surplus = named - found.keys(), found.keys() - named
    if missing or surplus:
        wrong = listing(f"{shard}: {key}" for shard, key in (missing or surplus))
        what = "tensors that their files lack" if missing else "files with tensors that it does not name"
        raise CheckpointError(f"{index} names {what}: {wrong}; its files are of another checkpoint, or incomplete")
    return {key: tensor for (_, key), tensor in found.items()}


WRAPPERS = ("ema", "model_ema", "model", "module", "state_dict")


def unwrap(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """Find the state dict in a training checkpoint, and strip the prefixes of wrapped and compiled models."""
    for _ in range(MOST_WRAPPERS):
        odd = next((key for key in checkpoint if not isinstance(key, str)), None)
        if odd is not None:
            raise CheckpointError(
                f"a state dict names its tensors; the file has the key {odd!r} ({type(odd).__name__})"
            )
        if any(isinstance(value, Tensor) for value in checkpoint.values()):
            return _renamed(checkpoint, partial(_PREFIXES.sub, ""))
        found = sorted(checkpoint)
        checkpoint = next((checkpoint[key] for key in WRAPPERS if isinstance(checkpoint.get(key), Mapping)), {})
        if not checkpoint:
            break
    raise CheckpointError(f"no weights found; the file has {found}, expected one of {WRAPPERS}")


MOST_WRAPPERS = 4
_PREFIXES = re.compile(r"^(?:module\.|_orig_mod\.)+")
"""Prefixes that DistributedDataParallel and torch.compile add to names, in either order."""


def rename(state: Mapping[str, Tensor], rules: Iterable[tuple[str, str]]) -> dict[str, Tensor]:
    """Rename each key by the first rule (pattern, replacement) that matches all of it; other keys stay."""
    compiled = [(re.compile(pattern), replacement) for pattern, replacement in rules]

    def new_name(key: str) -> str:
        for pattern, replacement in compiled:
            if match := pattern.fullmatch(key):
                return match.expand(replacement)
        return key

    return _renamed(state, new_name)


def _renamed(state: Mapping[str, Tensor], new_name: Callable[[str], str]) -> dict[str, Tensor]:
    """The state with other keys. Raises CheckpointError if two different tensors get one name."""
    renamed, old_names = dict[str, Tensor](), dict[str, str]()
    for key, tensor in state.items():
        name = new_name(key)
        if name in renamed and renamed[name] is not tensor:
            raise CheckpointError(
                f"{old_names[name]} and {key} are two tensors for {name}; keep one of them in the file"
            )
        renamed[name], old_names[name] = tensor, key
    return renamed


def fuse(state: Mapping[str, Tensor], parts: Sequence[str], whole: str) -> dict[str, Tensor]:
    """Concatenate, along the first axis, tensors whose keys differ in one dotted part only.

    ``fuse(state, ("wq", "wk", "wv"), "qkv")`` joins "a.wq.weight", "a.wk.weight" and "a.wv.weight" to "a.qkv.weight".
    If one of them is absent or has another shape, all stay as they are, and ``load_strictly`` reports them.
    """
    fused = dict(state)
    first = re.compile(rf"(?<![^.]){re.escape(parts[0])}(?![^.])")
    for key in state:
        keys = [first.sub(part, key) for part in parts]
        if not first.search(key) or any(other not in state for other in keys):
            continue
        if len({state[other].shape[1:] for other in keys}) == 1:
            fused[first.sub(whole, key)] = torch.cat([fused.pop(other) for other in keys])
    return fused


def with_averages(state: Mapping[str, Tensor], prefix: str = "model_ema.") -> dict[str, Tensor]:
    """The weights of a training checkpoint, each replaced by its moving average where the file has averages.

    The key of an average is ``prefix`` plus the weight's key without its dots, as in the code of latent diffusion. The
    result has no such keys.

    Raises:
        CheckpointError: some weights have averages and others have none.
    """
    averages = {key.removeprefix(prefix): tensor for key, tensor in state.items() if key.startswith(prefix)}
    weights = {key: tensor for key, tensor in state.items() if not key.startswith(prefix)}
    if not averages:
        return weights
    lacking = [key for key in weights if key.replace(".", "") not in averages]
    if lacking:
        raise CheckpointError(f"the file has moving averages, but none of {len(lacking)} weights: {listing(lacking)}")
    return {key: averages[key.replace(".", "")] for key in weights}


FIRST_STAGE = "first_stage_model."
"""Prefix of the tokenizer's weights in the file of a transformer that was trained on its tokens."""


def first_stage(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tokenizer's weights in a training checkpoint of taming-transformers, without the networks of its losses.

    Averaged weights are taken if the file has them. In a transformer's file the tokenizer is the one inside it.

    Raises:
        CheckpointError: only a part of the weights has averages.
    """
    inside = {key.removeprefix(FIRST_STAGE): tensor for key, tensor in state.items() if key.startswith(FIRST_STAGE)}
    return with_averages(without_losses(inside or state))


def second_stage(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The transformer's weights in a checkpoint of taming-transformers, without its tokenizer and KV cache."""
    return {
        key.removeprefix("transformer."): tensor
        for key, tensor in state.items()
        if not key.startswith(FIRST_STAGE) and ".attention.kv_cache." not in key
    }


def without_losses(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights without those of losses (LPIPS, discriminator), which training checkpoints also hold."""
    return {key: tensor for key, tensor in state.items() if not key.startswith("loss.")}


def load_strictly(model: nn.Module, state: Mapping[str, Tensor], *, source: str = "the state dict") -> None:
    """Check ``state`` by ``check_state``, then load it into ``model``; a model that it does not fit stays unchanged.

    If the model is on the meta device, its parameters become the given tensors.

    Raises:
        CheckpointError: as ``check_state``.
    """
    check_state(model, state, source=source)
    model.load_state_dict(state, assign=any(tensor.is_meta for tensor in model.state_dict().values()))


def check_state(model: nn.Module, state: Mapping[str, Tensor], *, source: str, optional: Collection[str] = ()) -> None:
    """Check that ``state`` fits ``model``: its keys, shapes and kinds of numbers, and that no value is NaN.

    Args:
        source: name of the state in the error message.
        optional: keys that the state may lack.

    Raises:
        CheckpointError: the state does not fit; the message lists missing keys, surplus keys, differing shapes,
            integers instead of floats, tensors with NaN, and parameters with infinities.
    """
    odd = [f"{key} ({type(value).__name__})" for key, value in state.items() if not isinstance(value, Tensor)]
    if odd:
        raise CheckpointError(f"{source} holds {len(odd)} values that are no tensors: {listing(odd)}")
    own = model.state_dict()
    shared = sorted(own.keys() & state.keys())
    wrong = [
        f"{key} {tuple(state[key].shape)} instead of {tuple(own[key].shape)}"
        for key in shared
        if own[key].shape != state[key].shape
    ]
    kinds = [
        f"{key} {state[key].dtype} instead of {own[key].dtype}"
        for key in shared
        if own[key].is_floating_point() and not state[key].is_floating_point()
    ]
    stored = [
        f"{key} ({'without values' if state[key].is_meta else state[key].layout})"
        for key in shared
        if state[key].layout != own[key].layout or (state[key].is_meta and not own[key].is_meta)
    ]
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    problems = [
        f"{len(names)} {what}: {listing(names)}"
        for what, names in (
            ("missing", own.keys() - state.keys() - set(optional)),
            ("surplus", state.keys() - own.keys()),
            ("of another shape", wrong),
            ("of another kind", kinds),
            ("not stored as plain numbers", stored),
            (
                "with NaN or infinities",
                [key for key in shared if not _is_sound(state[key], own[key], key in parameters)],
            ),
        )
        if names
    ]
    if problems:
        raise CheckpointError(f"{source} does not fit {type(model).__name__}; {'; '.join(problems)}")


def _is_sound(tensor: Tensor, own: Tensor, finite: bool) -> bool:
    """Whether a tensor has no NaN and, if ``finite``, no infinity, also in the precision of the model's ``own``;
    buffers may be masks with infinities."""
    if not tensor.is_floating_point() or tensor.is_meta or tensor.layout != torch.strided:
        return True
    if own.is_floating_point() and own.element_size() < tensor.element_size():
        tensor = tensor.to(own.dtype)
    if tensor.element_size() == 1:  # float8 has no comparisons
        tensor = tensor.float()
    return bool((tensor.isfinite() if finite else ~tensor.isnan()).all())


def listing(names: Iterable[str], limit: int = 12) -> str:
    names = sorted(names)
    more = f", … and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more

"""Models as folders: saving, loading, and the one door through which official weights come in.

A saved model is a folder with ``config.json`` (the registry name and the constructor's arguments) and
``model.safetensors``. Foreign checkpoints are read as safetensors, or by torch with ``weights_only=True``;
nothing is ever unpickled blindly.
"""

from __future__ import annotations

import argparse
import hashlib
import inspect
import json
import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from huggingface_hub import PyTorchModelHubMixin
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vistok import registry
from vistok._version import __version__
from vistok.files import atomic_folder, write_json
from vistok.types import to_json

CONFIG, WEIGHTS = "config.json", "model.safetensors"

log = logging.getLogger(__name__)


class CheckpointError(ValueError):
    """A checkpoint that cannot be loaded: absent, damaged, or of another model."""


class Model(
    nn.Module,
    PyTorchModelHubMixin,
    library_name="vistok",
    tags=["vistok", "autoregressive-image-generation"],
):
    """Base of all tokenizers and generators: an ``nn.Module`` whose constructor arguments are its config.

    A subclass sets ``registry_name``; ``checkpoints`` lists the official weights that it reads.
    """

    registry_name: ClassVar[str]
    sizes: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    checkpoints: ClassVar[tuple[OfficialCheckpoint, ...]] = ()

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        self = super().__new__(cls, *args, **kwargs)
        if "registry_name" in cls.__dict__:
            try:
                bound = inspect.signature(cls.__init__).bind(self, *args, **kwargs)
            except TypeError:  # copying and unpickling make a bare object; a wrong call fails in __init__
                return self
            bound.apply_defaults()
            self._arguments = {name: value for name, value in bound.arguments.items() if name != "self"}
        return self

    @property
    def config(self) -> dict[str, Any]:
        """The constructor's arguments, defaults included, JSON-ready."""
        return to_json(self._arguments)

    @classmethod
    def from_official(cls, config: Mapping[str, Any], state_dict: Mapping[str, Tensor]) -> Self:
        """Build the model that the reference's own arguments describe, and load the reference's weights."""
        raise CheckpointError(f"{cls.registry_name} has no official weights")

    def save_pretrained(self, save_directory: str | Path, **hub_options: Any) -> None:
        """Write the model folder ``save_directory`` as a whole, or not at all; a folder that exists is replaced.

        ``hub_options`` are those that ``push_to_hub`` of huggingface_hub passes on (a config, card details).
        """
        with atomic_folder(save_directory, replace=True) as folder:
            self._save_pretrained(folder)
            if hub_options.get("model_card_kwargs") is not None:
                self.generate_model_card(**hub_options["model_card_kwargs"]).save(folder / "README.md")

    def _save_pretrained(self, save_directory: Path) -> None:
        header = {"model": self.registry_name, "vistok_version": __version__}
        write_json(save_directory / CONFIG, header | {"arguments": self.config})
        state = {key: tensor.detach().cpu().contiguous() for key, tensor in self.state_dict().items()}
        save_file(state, save_directory / WEIGHTS, metadata={"format": "pt"})

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **hub_options: Any) -> Self:
        """Load a folder or a hub id that ``save_pretrained`` / ``push_to_hub`` made; see ``load``.

        Raises:
            CheckpointError: as ``load``; also if the folder holds another class of model.
        """
        model = load(pretrained_model_name_or_path, **hub_options)
        if not isinstance(model, cls):
            raise CheckpointError(
                f"{pretrained_model_name_or_path} holds a {type(model).__name__} ({model.registry_name}), not a "
                f"{cls.__name__}; load it with {type(model).__name__}.from_pretrained or vistok.load"
            )
        return model

    def fingerprint(self) -> str:
        """A hash of the config and all weights: equal exactly for models that compute the same."""
        digest = hashlib.sha256(json.dumps([self.registry_name, self.config], sort_keys=True).encode())
        for key, tensor in sorted(self.state_dict().items()):
            digest.update(f"{key}{tuple(tensor.shape)}{tensor.dtype}".encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()


class OfficialCheckpoint:
    """One released file: hub repository, file name, and the reference's arguments that build it.

    ``repo`` is "owner/name" on the hub; for a file that is not there, the folder that its authors put it in, or "".
    """

    def __init__(self, repo: str, filename: str, config: Mapping[str, Any]):
        self.repo, self.filename, self.config = repo, filename, config

    @property
    def id(self) -> str:
        return f"{self.repo}/{self.filename}".lstrip("/")


def load(source: str | Path, **hub_options: Any) -> Model:
    """Load any vistok model from a folder, a hub id of ours, or an official checkpoint's id ("repo/owner/file").

    Args:
        source: a folder made by ``save_pretrained``; a hub id; or an id that ``vistok models`` lists.
        hub_options: passed to huggingface_hub's downloads (``revision``, ``token``, ``cache_dir``, ...).

    Raises:
        CheckpointError: nothing there, unreachable hub, damaged weights, or keys that do not fit the config.
    """
    for item in registry.ENTRIES if not Path(source).exists() else ():
        for checkpoint in item.load().checkpoints:
            if str(source) == checkpoint.id:
                file = _download(checkpoint.repo, checkpoint.filename, hub_options)
                return convert(item.official, file, default=checkpoint.config)
    folder = Path(source)
    if not folder.exists():
        folder = snapshot(str(source), [CONFIG, WEIGHTS], **hub_options)
    saved = read_config(folder)
    model_class = registry.entry(saved["model"]).load()
    model = model_class(**saved["arguments"])
    load_strictly(model, read_weights(folder / WEIGHTS), source=str(folder))
    return model.eval()


def read_config(folder: str | Path) -> dict[str, Any]:
    """Read ``config.json`` of a saved model.

    Raises:
        CheckpointError: it is absent or not one of ours.
    """
    path = Path(folder) / CONFIG
    if not path.is_file():
        raise CheckpointError(f"{folder} is no saved model: it has no {CONFIG}")
    try:
        saved = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    if not isinstance(saved, dict) or not {"model", "arguments"} <= saved.keys():
        raise CheckpointError(
            f"{path} was not written by vistok (no 'model' and 'arguments'); "
            "official checkpoints come in through `vistok convert`"
        )
    return saved


def from_official(name: str, config: Mapping[str, Any], state_dict: Mapping[str, Tensor]) -> Model:
    """Build a vistok model from a reference implementation's own arguments and state dict.

    Args:
        name: "system/part", for example "llamagen/gpt"; ``vistok models`` lists them.
        config: the reference's constructor arguments.
        state_dict: the reference's weights, under their original names.

    Raises:
        CheckpointError: keys are missing or left over, or a shape differs; the message lists them.
        UnknownModelError: no system has that name.
    """
    item = registry.official_entry(name)
    return item.load().from_official({**config, **item.variants.get(name, {})}, state_dict).eval()


def convert(
    name: str,
    file: str | Path,
    config: Mapping[str, Any] | None = None,
    *,
    default: Mapping[str, Any] | None = None,
) -> Model:
    """Read a released file of system ``name`` ("system/part") and build the vistok model.

    Args:
        config: the reference's arguments. None takes those that the file holds beside its weights, then ``default``,
            then those of the official checkpoint of the file's name.

    Raises:
        CheckpointError: an unreadable file, unknown arguments, or weights that do not fit.
    """
    item = registry.official_entry(name)
    model_class, content = item.load(), read_weights(file)
    if config is None:
        embedded = getattr(model_class, "embedded_config", None)
        config = (embedded and embedded(Path(file), content)) or default or known_config(item, file)
    state = unwrap(content)
    clean = getattr(model_class, "clean_official", None)
    kept = clean(state) if clean else state
    # Cleaning may rename, but the tensors it keeps are the same objects.
    dropped = {key for key, tensor in state.items() if all(tensor is not other for other in kept.values())}
    if dropped:
        log.info("%s: %d entries are no part of the model and were dropped: %s", file, len(dropped), _listing(dropped))
    return from_official(name, config, kept)


def official_name(system: str, filename: str) -> str:
    """The "system/part" that a released file of ``system`` holds; ``system`` may name the part itself.

    Raises:
        UnknownModelError: no such system.
        CheckpointError: the file's name does not tell which part it is.
    """
    names = {name: item for item in registry.ENTRIES for name in item.official_names}
    parts = {name: item for name, item in names.items() if name.partition("/")[0] == system}
    if not parts:
        registry.official_entry(system)
        return system
    released = {
        name for name, item in parts.items() if any(filename == known.filename for known in item.load().checkpoints)
    }
    found = released or set(parts)
    if len(found) > 1:
        raise CheckpointError(f"the name {filename!r} does not tell what the file is; say {' or '.join(parts)}")
    return found.pop()


def known_config(item: registry.Entry, file: str | Path) -> Mapping[str, Any]:
    """The reference's arguments for a released file, found by its name, and by its folders where releases share one."""
    path = Path(file)
    found = [checkpoint for checkpoint in item.load().checkpoints if checkpoint.filename == path.name]
    closer = [checkpoint for checkpoint in found if f"/{path.as_posix()}".endswith(f"/{checkpoint.id}")]
    found = closer or found
    if not found:
        known = ", ".join(sorted({checkpoint.filename for checkpoint in item.load().checkpoints}))
        raise CheckpointError(
            f"{path.name!r} is not the name of a released {item.official} checkpoint ({known}); "
            "rename the file to the one it is, or give the reference's arguments as JSON with --config"
        )
    if any(checkpoint.config != found[0].config for checkpoint in found):
        raise CheckpointError(
            f"{path.name!r} may be any of {', '.join(checkpoint.id for checkpoint in found)}; "
            "put it into a folder of that name, or give the reference's arguments as JSON with --config"
        )
    return found[0].config


def read_weights(path: str | Path) -> dict[str, Any]:
    """Read a safetensors file, or a torch file with ``weights_only=True``.

    Raises:
        CheckpointError: the file is absent, damaged, or would need unpickling of arbitrary objects.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"there is no weights file {path}")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(
                f"{path} is damaged or incomplete ({path.stat().st_size:,} bytes): {error}; fetch or save it again"
            ) from error
    try:
        # Training files keep their command line and config beside the weights; these stand-ins are inert.
        with torch.serialization.safe_globals([argparse.Namespace, (ConfigStandIn, "config_util.Config")]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises several types, none of them its own
        reason = str(error).splitlines()[0]
        raise CheckpointError(
            f"{path} cannot be read safely as weights: {reason}. Files that pickle other objects beside the "
            "weights are not loaded; save the state dict alone, best as safetensors"
        ) from error


class ConfigStandIn(Mapping):
    """Takes the place of the config object that D-AR's trainer pickles: a mapping around the dictionary ``_data``."""

    def __init__(self, data: Mapping[str, Any] | None = None):
        self._data = dict(data or {})

    def __getitem__(self, key: str) -> Any:
        return self._data[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._data)

    def __len__(self) -> int:
        return len(self._data)


WRAPPERS = ("ema", "model_ema", "model", "module", "state_dict")


def unwrap(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """Find the state dict in a training checkpoint, and strip the prefix of a compiled model."""
    if not any(isinstance(value, Tensor) for value in checkpoint.values()):
        inner = next((checkpoint[key] for key in WRAPPERS if isinstance(checkpoint.get(key), Mapping)), None)
        if inner is None:
            raise CheckpointError(f"no weights found; the file has {sorted(checkpoint)}, expected one of {WRAPPERS}")
        checkpoint = inner
    return {key.removeprefix("module.").removeprefix("_orig_mod."): value for key, value in checkpoint.items()}


def rename(state: Mapping[str, Tensor], rules: Iterable[tuple[str, str]]) -> dict[str, Tensor]:
    """Rename keys: the first rule (pattern, replacement) that matches a whole key applies; others keep their name."""
    compiled = [(re.compile(pattern), replacement) for pattern, replacement in rules]

    def new_name(key: str) -> str:
        for pattern, replacement in compiled:
            if match := pattern.fullmatch(key):
                return match.expand(replacement)
        return key

    return {new_name(key): tensor for key, tensor in state.items()}


def fuse(state: Mapping[str, Tensor], parts: Sequence[str], whole: str) -> dict[str, Tensor]:
    """Concatenate, along their first axis, tensors whose keys differ in one part only.

    ``fuse(state, ("wq", "wk", "wv"), "qkv")`` joins "a.wq.weight", "a.wk.weight" and "a.wv.weight" to "a.qkv.weight".
    Where one of them is absent or of another shape all stay as they are, for ``load_strictly`` to name.
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


def load_strictly(model: nn.Module, state: Mapping[str, Tensor], *, source: str = "the state dict") -> None:
    """Load ``state`` into ``model``: every key must be there, none may be left over, every shape must fit.

    Works for a model on the meta device too (its parameters become the given tensors).

    Raises:
        CheckpointError: lists missing keys, surplus keys and differing shapes. The model is left as it was.
    """
    own = model.state_dict()
    missing, surplus = own.keys() - state.keys(), state.keys() - own.keys()
    wrong = [
        f"{key} {tuple(state[key].shape)} instead of {tuple(own[key].shape)}"
        for key in own.keys() & state.keys()
        if own[key].shape != state[key].shape
    ]
    problems = [
        f"{len(names)} {what}: {_listing(names)}"
        for what, names in (("missing", missing), ("surplus", surplus), ("of another shape", wrong))
        if names
    ]
    if problems:
        raise CheckpointError(f"{source} does not fit {type(model).__name__}; {'; '.join(problems)}")
    model.load_state_dict(state, assign=any(tensor.is_meta for tensor in own.values()))


def _listing(names: Iterable[str], limit: int = 12) -> str:
    names = sorted(names)
    more = f", … and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def _download(repo: str, filename: str, options: Mapping[str, Any]) -> Path:
    from huggingface_hub import hf_hub_download

    if "/" not in repo:
        raise CheckpointError(
            f"{filename} is not on the hub: fetch it as its authors describe, then `vistok convert` the local file"
        )
    return _reach(f"{repo}/{filename}", lambda: hf_hub_download(repo, filename, **options))


def snapshot(repo: str, files: Sequence[str], **hub_options: Any) -> Path:
    """Fetch some files of a hub repository; the local folder.

    Raises:
        CheckpointError: no hub id, an unreachable hub, or no such repository.
    """
    from huggingface_hub import snapshot_download

    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        raise CheckpointError(f"there is no folder {repo!r}, and it is not a hub id of the form owner/name")
    return _reach(repo, lambda: snapshot_download(repo, allow_patterns=list(files), **hub_options))


def _reach(what: str, download) -> Path:
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(download())
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(
            f"there is no local folder {what!r} and it could not be fetched from the hub: {reason}. "
            "Check the name and the connection, or download the files elsewhere and give their local path"
        ) from error

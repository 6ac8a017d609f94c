"""``Model``, the base of all models, and ``load``, which reads any saved or official model.

A saved model is a folder with ``config.json`` (the registry name and the constructor's arguments) and
``model.safetensors``.
"""

from __future__ import annotations

import difflib
import errno
import hashlib
import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from huggingface_hub import PyTorchModelHubMixin
from safetensors import SafetensorError
from torch import Tensor, nn

from vistok._version import __version__
from vistok.checkpoints import registry
from vistok.checkpoints.adapters import ADAPTER, ADAPTER_CONFIG, merged, save_adapter, with_adapter, without_adapters
from vistok.checkpoints.bounds import construct, numbers
from vistok.checkpoints.hub import download, snapshot
from vistok.checkpoints.official import OfficialCheckpoint, convert
from vistok.checkpoints.weights import (
    STATE,
    CheckpointError,
    exported,
    hash_weights,
    load_strictly,
    read_weights,
)
from vistok.signatures import check, with_todays_names
from vistok.types import to_json
from vistok.utils.files import atomic_folder, missing_folder, read_json, restore, write_json
from vistok.utils.paths import local
from vistok.utils.spelling import did_you_mean
from vistok.utils.tensors import save_file

CONFIG, WEIGHTS = "config.json", "model.safetensors"
MODEL_FILES = (CONFIG, WEIGHTS, ADAPTER, ADAPTER_CONFIG)
"""All files that a model's folder may hold."""


class Model(
    nn.Module,
    PyTorchModelHubMixin,
    library_name="vistok",
    tags=["vistok", "autoregressive-image-generation"],
):
    """Base of all tokenizers and generators: an ``nn.Module`` whose constructor arguments are its config.

    A subclass sets ``registry_name``, and in ``checkpoints`` the official weights that it reads.
    """

    registry_name: ClassVar[str]
    sizes: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """Constructor arguments of the published sizes, by name."""
    tiny: ClassVar[Mapping[str, Any]] = {}
    """Constructor arguments of a model that is small enough for tests."""
    checkpoints: ClassVar[tuple[OfficialCheckpoint, ...]] = ()
    pickled_stand_ins: ClassVar[tuple[tuple[type, str], ...]] = ()
    """Inert classes, each with the name of a class that released files pickle beside their weights; it is unpickled
    instead."""

    num_classes: int | None = None
    """How many classes a generator can be conditioned on; None if it takes no labels."""

    class_names: tuple[str, ...] = ()
    """The names of a generator's classes in the order of the ids, if they are known for its weights."""

    adapter_apart: bool = False
    """Whether low-rank adapters are saved beside the weights rather than merged into them."""

    _arguments: dict[str, Any]  # of the constructor, defaults included
    _saved_arguments: Mapping[str, Any] | None = None  # of a loaded model, as its config.json has them

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        self = super().__new__(cls, *args, **kwargs)
        if "registry_name" in cls.__dict__:
            try:
                bound = inspect.signature(cls.__init__).bind(self, *args, **kwargs)
            except TypeError:  # copying and unpickling make a bare object; a wrong call fails in __init__
                return self
            bound.apply_defaults()
            self._arguments = {name: value for name, value in bound.arguments.items() if name != "self"}
            _check_ranges(self._arguments)
        return self

    @property
    def config(self) -> dict[str, Any]:
        """The constructor's arguments with defaults, as JSON values."""
        return to_json(self._arguments)

    def change_arguments(self, **changes: Any) -> None:
        """Set constructor arguments to what they became after construction, for the config and the fingerprint."""
        self._arguments |= changes
        self._saved_arguments = None

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The type of the weights."""
        return next(self.parameters()).dtype

    def with_official_weights(self, state_dict: Mapping[str, Tensor]) -> Self:
        """Load official weights, already under our names, and return the model; the last step of ``from_official``.

        Raises:
            CheckpointError: the weights do not fit.
        """
        load_strictly(self, state_dict, source="the official state dict")
        return self

    @classmethod
    def from_official(cls, config: Mapping[str, Any], state_dict: Mapping[str, Tensor]) -> Self:
        """Build the model that the reference's own arguments describe, and load the reference's weights."""
        raise CheckpointError(f"{cls.registry_name} has no official weights")

    @staticmethod
    def embedded_config(file: Path, content: Mapping[str, Any]) -> Mapping[str, Any] | None:
        """The reference's arguments stored in a released file or beside it; None if there are none."""
        return None

    @staticmethod
    def clean_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The released state dict without entries that do not belong to the model."""
        return dict(state)

    def save_pretrained(self, save_directory: str | Path, **hub_options: Any) -> None:
        """Write the model folder ``save_directory`` as a whole, or not at all; an existing folder is replaced.

        ``hub_options`` are passed by ``push_to_hub`` of huggingface_hub (a config, details of the model card).
        """
        with atomic_folder(save_directory, replace=True) as folder:
            self._save_pretrained(folder)
            if hub_options.get("model_card_kwargs") is not None:
                self.generate_model_card(**hub_options["model_card_kwargs"]).save(folder / "README.md")

    def _save_pretrained(self, save_directory: Path) -> None:
        self.write_config(save_directory)
        trained = self.state_dict()
        state = without_adapters(trained) if self.adapter_apart else merged(trained)
        state = {key: tensor.detach().cpu().contiguous() for key, tensor in state.items()}
        try:
            save_file(state, save_directory / WEIGHTS, metadata={"format": "pt"})
            if self.adapter_apart:
                save_adapter(save_directory, trained, base=self.registry_name)
        except SafetensorError as error:  # raised for a failed write, nearly always a full disk
            raise OSError(errno.ENOSPC, f"weights could not be written: {error}", str(save_directory)) from error

    def write_config(self, folder: Path) -> None:
        """Write ``config.json`` alone, which ``load`` builds the model from."""
        header = {"model": self.registry_name, "vistok_version": __version__}
        names = {"class_names": list(self.class_names)} if self.class_names else {}
        write_json(folder / CONFIG, header | {"arguments": self.config} | names)

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
        """A hash of the config and all weights, which identifies the model in records.

        For a loaded model the arguments are hashed as they were saved, so that the hash is the one that an earlier
        version recorded.
        """
        arguments = self.config if self._saved_arguments is None else self._saved_arguments
        digest = hashlib.sha256(json.dumps([self.registry_name, arguments], sort_keys=True).encode())
        hash_weights(digest, merged(self.state_dict()))
        return digest.hexdigest()


LEAST = {"dim": 1, "num_layers": 1, "num_heads": 1, "num_classes": 0}
"""The least values of arguments that many models have."""
SHARES = ("dropout", "_drop", "drop_path", "drop_rate")
"""How arguments end that are shares of what is dropped, also in sections such as ``encoder``."""


def _check_ranges(arguments: Mapping[str, Any]) -> None:
    """Raise ValueError for constructor arguments out of the range that their names imply."""
    for name, value in numbers(arguments):
        if isinstance(value, bool):
            continue
        if name.endswith(SHARES) and not 0 <= value <= 1:
            raise ValueError(f"{name} is a share from 0 to 1, got {value}")
        if name in LEAST and not value >= LEAST[name]:
            raise ValueError(f"{name} must be at least {LEAST[name]}, got {value}")


CONSTRUCTION_ERRORS = (ValueError, TypeError, LookupError, ArithmeticError, AssertionError, RuntimeError, MemoryError)
"""Errors that a constructor may raise for impossible sizes."""


def load(source: str | Path, **hub_options: Any) -> Model:
    """Load a model from a folder, a hub id, or the id of an official checkpoint ("owner/name/file").

    Args:
        source: a folder made by ``save_pretrained``; a run or a pipeline, whose generator is loaded if there is one,
            else its tokenizer; a checkpoint of a run, RUN/checkpoints/step-N, whose averaged weights are loaded if
            there are any; a hub id; or an id that ``vistok models`` lists.
        hub_options: passed to huggingface_hub's downloads (``revision``, ``token``, ``cache_dir``, ...).

    Raises:
        CheckpointError: nothing is found, the hub is unreachable, or weights are damaged or do not fit the config.
    """
    source = local(source)
    official = None if Path(source).exists() else find_official(str(source))
    if official is not None:
        name, checkpoint = official
        file = download(checkpoint.repo, checkpoint.filename, hub_options)
        return convert(name, file, default=checkpoint.config)
    folder = model_folder(source, **hub_options)
    saved = read_config(folder)
    weights = read_exported(folder)
    model = build(saved, folder, weights)
    load_strictly(model, weights, source=str(folder))
    return model.eval()


def find_official(source: str) -> tuple[str, OfficialCheckpoint] | None:
    """The official checkpoint with the id ``source``, and the official name ("system/part") of the model it holds.

    Returns None if ``source`` may be a hub id of a saved model.

    Raises:
        CheckpointError: ``source`` is no known id, but is like one or has the suffix of a weights file.
    """
    known = {checkpoint.id: (name, checkpoint) for item in registry.ENTRIES for name, checkpoint in item.released()}
    if source in known:
        return known[source]
    if Path(source).is_absolute():
        return None
    if source.count("/") > 1 and Path(source).parent.is_dir():  # no hub id, so a local path is meant
        raise CheckpointError(missing_folder(source))
    near = [name for name in known if name.endswith(f"/{source}")] or difflib.get_close_matches(source, known, n=3)
    if near or source.endswith(RELEASED_SUFFIXES):
        hint = did_you_mean(*near)
        raise CheckpointError(
            f"there is no folder {source!r}, and no official checkpoint of that name{hint} `vistok models` lists them"
        )
    return None


RELEASED_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".safetensors")
PARTS = ("generator", "tokenizer")
"""The folders of a run or a pipeline that hold models; ``load`` takes the first that exists."""


def model_folder(source: str | Path, **hub_options: Any) -> Path:
    """The folder with a model's config: ``source`` itself, its part, or the download if ``source`` is a hub id.

    Raises:
        CheckpointError: nothing is found, the hub is unreachable, or ``source`` is a file.
    """
    folder = Path(source)
    if not folder.exists() and folder.parent.is_dir():
        restore(folder.parent)
    if not folder.exists():
        return snapshot(str(source), MODEL_FILES, **hub_options)
    if folder.is_file():
        raise CheckpointError(f"{folder} is a file, but a model is a folder; `vistok convert` reads released files")
    restore(folder)
    candidates = [folder, *(folder / part for part in PARTS)]
    return next((candidate for candidate in candidates if (candidate / CONFIG).is_file()), folder)


def build(saved: Mapping[str, Any], folder: Path, weights: Mapping[str, Tensor]) -> Model:
    """Build the model that a ``config.json`` describes, without loading ``weights``, which bound its size.

    Raises:
        CheckpointError: the config does not describe a model.
    """
    model_class = registry.entry(saved["model"]).load()
    try:
        arguments = with_todays_names(model_class, saved["arguments"])
        check(model_class, arguments, "")
        model = construct(model_class, arguments, weights)
    except CONSTRUCTION_ERRORS as error:  # a ConfigError, or an error of the constructor or torch
        raise CheckpointError(f"{folder / CONFIG} does not describe a {saved['model']}: {error}") from error
    model._saved_arguments = saved["arguments"]
    model.class_names = tuple(saved.get("class_names", ()))
    return model


def read_exported(folder: Path) -> dict[str, Tensor]:
    """The weights in a model's folder, or those that a training checkpoint would export."""
    if (folder / STATE).is_file() and not (folder / WEIGHTS).exists():
        return merged(exported(read_weights(folder / STATE), folder))
    return with_adapter(read_weights(folder / WEIGHTS), folder)


def read_config(folder: str | Path) -> dict[str, Any]:
    """Read ``config.json`` of a saved model.

    Raises:
        CheckpointError: the file is absent, damaged, or not written by vistok.
    """
    path = Path(folder) / CONFIG
    if not path.is_file():
        raise CheckpointError(f"{folder} is no saved model: it has no {CONFIG}{_contents(Path(folder))}")
    try:
        saved = read_json(path)
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    if (
        not isinstance(saved, dict)
        or not isinstance(saved.get("model"), str)
        or not isinstance(saved.get("arguments"), dict)
    ):
        raise CheckpointError(
            f"{path} was not written by vistok (no 'model' and 'arguments'); "
            "official checkpoints come in through `vistok convert`"
        )
    names = saved.get("class_names", [])
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise CheckpointError(f"{path}: class_names must be a list of texts, got {names!r}"[:300])
    return saved


def _contents(folder: Path) -> str:
    """The end of the message about a folder that holds no model: what it is instead, if that is known."""
    if (folder / STATE).is_file():
        return ", which checkpoints of an earlier version lack; load the run"
    steps = sorted(folder.glob("checkpoints/step-*"))
    if steps:
        return f"; its run has not exported a model yet, but there is {steps[-1]}"
    return ""

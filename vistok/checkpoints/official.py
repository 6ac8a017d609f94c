"""Official weights: from a released file, or from a reference implementation's config and state dict."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vistok.checkpoints import imagenet, registry
from vistok.checkpoints.bounds import bounded
from vistok.checkpoints.weights import CheckpointError, listing, read_weights, unwrap

if TYPE_CHECKING:
    from vistok.checkpoints.model import Model

log = logging.getLogger(__name__)


class OfficialCheckpoint:
    """One released file: hub repository, file name, and the reference's arguments that build its model.

    Args:
        repo: "owner/name" on the hub; for a file that is not on the hub, its folder in the authors' release, or "".
        tokenizer: for a generator: the id of the released tokenizer whose tokens it models.
        text_encoder: for a generator of text features: the kind (see ``vistok.text``) and hub name of its encoder.
        licence: of the weights, if it differs from that of the system's other weights.
    """

    def __init__(
        self,
        repo: str,
        filename: str,
        config: Mapping[str, Any],
        *,
        tokenizer: str | None = None,
        text_encoder: tuple[str, str] | None = None,
        licence: str | None = None,
    ):
        self.repo, self.filename, self.config = repo, filename, config
        self.tokenizer, self.text_encoder, self.licence = tokenizer, text_encoder, licence

    @property
    def id(self) -> str:
        return f"{self.repo}/{self.filename}".lstrip("/")


@dataclass(frozen=True)
class OfficialReference:
    """A further reference implementation whose models a vistok class also covers.

    Attributes:
        build: function from the vistok class, the reference's arguments and its state dict to a model.
        checkpoints: the reference's released files.
        licence: of the reference's code and weights.
    """

    build: Callable[[type[Any], Mapping[str, Any], Mapping[str, Tensor]], Any]
    checkpoints: tuple[OfficialCheckpoint, ...] = ()
    licence: registry.Licence = registry.UNSTATED


def from_official(name: str, config: Mapping[str, Any], state_dict: Mapping[str, Tensor]) -> Model:
    """Build a vistok model from a reference implementation's own arguments and state dict.

    Args:
        name: "system/part", for example "llamagen/gpt"; ``vistok models`` lists them.
        config: the reference's constructor arguments.
        state_dict: the reference's weights, under their original names.

    Raises:
        CheckpointError: the config does not describe such a model, or keys or shapes of the weights do not fit.
        UnknownModelError: no system has that name.
    """
    item = registry.official_entry(name)
    try:
        model_class, reference = item.load(), item.reference(name)
        build = model_class.from_official if reference is None else partial(reference.build, model_class)
        with bounded(config, state_dict):
            return build(config, state_dict).eval()
    except KeyError as error:
        raise CheckpointError(
            f"the config of a {name} needs the key {error}; it has {listing(config) or 'none'}"
        ) from error
    except torch.OutOfMemoryError:
        raise
    except (TypeError, AttributeError, ArithmeticError, IndexError, RuntimeError) as error:  # torch: negative sizes
        raise CheckpointError(f"the config does not describe a {name}: {error}") from error


def convert(
    name: str,
    file: str | Path,
    config: Mapping[str, Any] | None = None,
    *,
    default: Mapping[str, Any] | None = None,
) -> Model:
    """Read a released file of system ``name`` ("system/part") and build the vistok model.

    Args:
        config: the reference's arguments. None takes those stored in the file, else ``default``, else those of the
            official checkpoint with the same file name.

    Raises:
        CheckpointError: the file is unreadable, its arguments are unknown, or its weights do not fit.
    """
    item = registry.official_entry(name)
    model_class: type[Model] = item.load()
    content = read_weights(file, stand_ins=model_class.pickled_stand_ins)
    if config is None:
        config = model_class.embedded_config(Path(file), content) or default or known_config(item, file)
    state = unwrap(content)
    kept = model_class.clean_official(state)
    # Cleaning may rename, but the tensors it keeps are the same objects.
    dropped = {key for key, tensor in state.items() if all(tensor is not other for other in kept.values())}
    if dropped:
        log.info("%s: %d entries are no part of the model and were dropped: %s", file, len(dropped), listing(dropped))
    model = from_official(name, config, kept)
    if model.num_classes == imagenet.NUM_CLASSES:  # no other data set of official weights has so many
        model.class_names = imagenet.class_names()
    return model


def official_name(system: str, filename: str) -> str:
    """The "system/part" that a released file of ``system`` holds; ``system`` may name the part itself.

    Raises:
        UnknownModelError: no such system.
        CheckpointError: the file's name does not tell which part it holds.
    """
    names = {name: item for item in registry.ENTRIES for name in item.official_names}
    parts = {name: item for name, item in names.items() if name.partition("/")[0] == system}
    if not parts:
        registry.official_entry(system)
        return system
    files = {(name, known.filename) for item in parts.values() for name, known in item.released()}
    released = {name for name in parts if (name, filename) in files}
    found = released or set(parts)
    if len(found) > 1:
        raise CheckpointError(f"the name {filename!r} does not tell what the file is; say {' or '.join(parts)}")
    return found.pop()


def known_config(item: registry.Entry, file: str | Path) -> Mapping[str, Any]:
    """The reference's arguments for a released file, found by its name; if several share it, also by its folder.

    Raises:
        CheckpointError: the name is unknown, or several files with different arguments have it.
    """
    path = Path(file)
    known = [checkpoint for _, checkpoint in item.released()]
    found = [checkpoint for checkpoint in known if checkpoint.filename == path.name]
    closer = [checkpoint for checkpoint in found if f"/{path.as_posix()}".endswith(f"/{checkpoint.id}")]
    found = closer or found
    if not found:
        names = ", ".join(sorted({checkpoint.filename for checkpoint in known}))
        raise CheckpointError(
            f"{path.name!r} is not the name of a released {item.official} checkpoint ({names}); "
            "rename the file to the one it is, or give the reference's arguments as JSON with --config"
        )
    if any(checkpoint.config != found[0].config for checkpoint in found):
        raise CheckpointError(
            f"{path.name!r} may be any of {', '.join(checkpoint.id for checkpoint in found)}; "
            "put it into a folder of that name, or give the reference's arguments as JSON with --config"
        )
    return found[0].config

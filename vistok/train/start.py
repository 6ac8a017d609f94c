"""The start of a run: weights from other runs, frozen parameters, and low-rank adapters."""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from vistok.checkpoints import CheckpointError, Model, load, load_strictly, read_config, read_weights, unwrap
from vistok.checkpoints.adapters import merged
from vistok.checkpoints.model import CONFIG, model_folder, read_exported
from vistok.checkpoints.weights import STATE, exported, listing
from vistok.conditions import PARTS
from vistok.generators.base import Generator
from vistok.signatures import ConfigError
from vistok.train.config import InitFrom, LoraConfig, RunConfig
from vistok.train.lora import add_adapters
from vistok.train.names import matching
from vistok.train.tasks import Learner, task_type
from vistok.types import ConditionSpec, FeatureSpec, IdSpec

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Start:
    """A source of weights that was found, but is not read yet.

    Attributes:
        source: the entry of ``init_from``.
        saved: ``config.json`` of the model; None if there are only weights.
        place: the folder of the model or the checkpoint, or the weights file; or the model itself, if it had to be
            fetched and converted.
    """

    source: InitFrom
    saved: Mapping[str, Any] | None
    place: Path | Model

    @property
    def name(self) -> str:
        return f"init_from {self.source.path}"

    def weights(self) -> dict[str, Tensor]:
        if isinstance(self.place, Model):
            return self.place.state_dict()
        if self.place.is_file():
            return unwrap(read_weights(self.place))
        if (self.place / CONFIG).is_file():
            return read_exported(self.place)
        return merged(exported(read_weights(self.place / STATE), self.place))


def find(source: InitFrom, kind: str) -> Start:
    """Find a source without reading its weights; a model that is not on disk is fetched and converted.

    Args:
        kind: "tokenizer" or "generator", the subfolder of a run folder.

    Raises:
        CheckpointError: nothing is there, or it is not a model.
    """
    path = Path(source.path).expanduser()
    if path.is_file():
        return Start(source, None, path)
    if not path.exists():
        model = load(source.path)
        saved = {"model": model.registry_name, "arguments": model.config}
        return Start(source, saved, model)
    folder = path / kind if (path / kind).is_dir() else model_folder(path)
    if (folder / STATE).is_file() and not (folder / CONFIG).is_file():  # a checkpoint of an earlier version
        return Start(source, None, folder)
    try:
        return Start(source, read_config(folder), folder)
    except CheckpointError as error:
        raise CheckpointError(f"init_from: {error}") from error


Found = dict[str, Start]
"""Sources by path that were found while the config was read. Whoever takes one removes it, so that the weights of a
model that was fetched are freed once they are loaded."""


def with_model_of_source(config: Mapping[str, Any]) -> tuple[Mapping[str, Any], Found]:
    """The config of a run, with the ``model`` of its last ``init_from`` if it has no ``model.name``; its own keys win.

    Arguments that follow from the data (tokens, classes, image size) are left out.

    Returns:
        The config, and the source that was looked at, if any.

    Raises:
        CheckpointError: nothing is there.
        ConfigError: the source has only weights, so its model is unknown.
    """
    own = config.get("model") or {}
    source = config.get("init_from")
    source = source[-1] if isinstance(source, list | tuple) and source else source
    path = source.get("path") if isinstance(source, Mapping) else source
    if not isinstance(own, Mapping) or "name" in own or not isinstance(path, str):
        return config, {}
    kind = task_type(config.get("task")).config_type.kind
    found = find(InitFrom(path), kind)
    saved = found.saved
    if saved is None:
        raise ConfigError(f"init_from {path} holds weights alone, so the config has to say model.name")
    derived = _derived_keys(saved["model"], kind)
    arguments = {key: value for key, value in saved["arguments"].items() if key not in derived}
    return {**config, "model": {"name": saved["model"], **arguments, **own}}, {path: found}


def _derived_keys(name: str, kind: str) -> set[str]:
    """The arguments of a model that a run takes from its data."""
    from vistok.checkpoints.registry import entry

    model_class = entry(name, kind).load()
    if kind == "tokenizer":
        return set(model_class.data_arguments)
    return {"spec", "num_classes", *_condition_keys(model_class)}


def _condition_keys(model_class: type[Generator]) -> set[str]:
    everything, found = ConditionSpec(1, IdSpec(1, 1), FeatureSpec(1, 1), IdSpec(1, 1)), set[str]()
    for part in PARTS:
        try:
            found.update(model_class.condition_arguments(everything.only((part,))))
        except ValueError:  # this generator does not take that part
            continue
    return found


def open_starts(run: RunConfig, found: Found) -> list[Start]:
    """Find and check the sources of a run, before its data are read.

    Args:
        found: sources that need not be looked for again; those of this run are taken out.

    Raises:
        CheckpointError: nothing is there, or the weights are those of another model.
    """
    starts = [
        replace(found.pop(source.path), source=source) if source.path in found else find(source, run.kind)
        for source in run.sources
    ]
    for start in starts:
        whole = not start.source.module and not start.source.rename and start.source.strict
        if whole and start.saved is not None and start.saved["model"] != run.model["name"]:
            raise CheckpointError(
                f"{start.name} is a {start.saved['model']}, but the model of this run is a {run.model['name']}: leave "
                "model out to train that one on, or say what fits with init_from.module, .rename and .strict=false"
            )
    return starts


def initialise(model: Model, starts: Sequence[Start]) -> set[str]:
    """Load weights into a model from one source after another, and log the entries that no source has.

    Returns:
        The entries of the model's state that stay new, or new in part; none without sources.

    Raises:
        CheckpointError: the weights do not fit.
        ConfigError: the model has no such module.
    """
    new = set(model.state_dict()) if starts else set()
    for start in starts:
        try:
            filled, tables = _load(model, start)
        except CheckpointError as error:
            for difference in _differences(model, start):
                error.add_note(difference)
            raise
        new = (new - filled) | tables
    if new:
        log.warning("init_from: %d entries of the model stay new: %s", len(new), listing(new))
    return new


def _differences(model: Model, start: Start) -> list[str]:
    """The arguments in which a source of the same model class differs, which may be why its weights do not fit."""
    if start.source.module or start.saved is None or start.saved["model"] != model.registry_name:
        return []
    kind = "generator" if isinstance(model, Generator) else "tokenizer"
    derived, own = _derived_keys(model.registry_name, kind), model.config
    theirs = {key: value for key, value in start.saved["arguments"].items() if key in own and key not in derived}
    return [
        f"model.{key} is {own[key]} here, and {value} in {start.source.path}"
        for key, value in theirs.items()
        if value != own[key]
    ]


def check_frozen(frozen: Collection[str], new: set[str], starts: Sequence[Start]) -> None:
    """Check that frozen parameters do not stay random.

    Without ``init_from`` this only warns, because the model may have read weights of its own.

    Args:
        frozen: names of the parameters that the config freezes.
        new: names of the entries that ``starts`` left new.

    Raises:
        ConfigError: a parameter is both frozen and new.
    """
    if starts and (left := new.intersection(frozen)):
        raise ConfigError(
            f"freeze keeps {len(left)} parameters as they are that none of init_from has, so they would stay random: "
            f"{listing(left)}; name the run that has them with init_from"
        )
    if frozen and not starts:
        log.warning(
            "%d parameters are frozen, and there is no init_from: what the model did not read itself stays random: %s",
            len(frozen),
            listing(frozen),
        )


def adapt(learner: Learner, lora: LoraConfig, new: set[str]) -> None:
    """Add low-rank adapters, and freeze all parameters but these, the ``new`` ones and those that the config names.

    Args:
        new: names of the entries that ``init_from`` left new.

    Raises:
        ConfigError: a pattern matches no name.
    """
    trained = add_adapters(learner.model, lora)
    names = {name for name, _ in learner.model.named_parameters()}
    trained |= matching(names, lora.also, "training.lora.also") | (new & names)
    learner.leave(names - trained)


def _load(model: Model, start: Start) -> tuple[set[str], set[str]]:
    """Load one source; returns the keys of the model's state that it filled, and the tables with new classes."""
    source, tables = start.source, set[str]()
    part = _module(model, source.module)
    weights = _renamed(start.weights(), source.rename, start.name)
    if not source.module:
        weights, tables = _with_own_classes(model, weights, start)
    if not source.strict:
        weights = _known(part, weights, start.name)
        load_strictly(part, dict(part.state_dict()) | weights, source=start.name)
    else:
        load_strictly(part, weights, source=start.name)
    prefix = f"{source.module}." if source.module else ""
    return {prefix + key for key in weights}, tables


def _with_own_classes(model: Model, weights: dict[str, Tensor], start: Start) -> tuple[dict[str, Tensor], set[str]]:
    """Adapt weights to another number of classes; returns the weights, and the names of the tables that changed.

    In each table with a row per class, these rows stay the model's own, which are new; all other rows are taken over.
    """
    theirs = start.saved and start.saved["arguments"].get("num_classes")
    ours = getattr(model, "num_classes", None)
    if not theirs or not ours or theirs == ours:
        return weights, set()
    first, result, tables = model.class_rows_from, dict(weights), set()
    for key, own in model.state_dict().items():
        given = weights.get(key)
        if (
            given is None
            or given.ndim == 0
            or given.shape[1:] != own.shape[1:]
            or len(own) - len(given) != ours - theirs
        ):
            continue
        table = own.clone()
        table[:first] = given[:first]
        table[first + ours :] = given[first + theirs :]
        result[key] = table
        tables.add(key)
    if tables:
        log.warning(
            "%s has %d classes and this run %d: those of %s begin anew", start.name, theirs, ours, listing(tables)
        )
    return result, tables


def _module(model: Model, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError as error:
        names = ", ".join(child for child, _ in model.named_children())
        raise ConfigError(f"init_from.module: {type(model).__name__} has no {name!r}; it has {names}") from error


def _renamed(weights: Mapping[str, Tensor], rules: Mapping[str, str | None], name: str) -> dict[str, Tensor]:
    """Weights with renamed keys, by the first rule whose pattern matches the beginning of a key; see ``InitFrom``."""
    compiled, unused, result = {re.compile(pattern): new for pattern, new in rules.items()}, set(rules), {}
    for key, tensor in weights.items():
        pattern = next((pattern for pattern in compiled if pattern.match(key)), None)
        if pattern is not None:
            unused.discard(pattern.pattern)
            new = compiled[pattern]
            if new is None:
                continue
            key = pattern.sub(new, key, count=1)
        if key in result:
            raise CheckpointError(f"{name}: rename gives two tensors the name {key}")
        result[key] = tensor
    if unused:
        raise CheckpointError(
            f"{name}: no key begins with {sorted(unused)[0]!r} (rename); there are {listing(weights)}"
        )
    return result


def _known(part: nn.Module, weights: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """The weights that the module has an entry for; the others are logged.

    Raises:
        CheckpointError: the module has none of them.
    """
    own = part.state_dict()
    known = {key: tensor for key, tensor in weights.items() if key in own}
    if not known:
        raise CheckpointError(f"{name}: {type(part).__name__} has none of its keys, which are {listing(weights)}")
    if len(known) < len(weights):
        log.warning("%s: %d keys are not used: %s", name, len(weights) - len(known), listing(weights.keys() - known))
    return known

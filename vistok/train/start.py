"""What a run starts from: weights of other runs, and which parameters it leaves as they are."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor, nn

from vistok.checkpoints import WEIGHTS, CheckpointError, Model, load_strictly, read_weights, unwrap
from vistok.checkpoints.weights import listing
from vistok.config import ConfigError
from vistok.train.checkpoints import STATE
from vistok.train.config import InitFrom

log = logging.getLogger(__name__)


def initialise(model: Model, sources: Sequence[InitFrom], kind: str) -> None:
    """Load weights into a model, from one source after another; what none of them has stays new, and is logged.

    Args:
        kind: "tokenizer" or "generator": the part of a run folder that is meant.

    Raises:
        CheckpointError: nothing there, or weights that do not fit.
        ConfigError: no such module.
    """
    new = set(model.state_dict()) if sources else set()
    for source in sources:
        new -= _load(model, source, kind)
    if new:
        log.warning("init_from: %d entries of the model stay new: %s", len(new), listing(new))


def _load(model: Model, source: InitFrom, kind: str) -> set[str]:
    """Load one source; the keys of the model's state that it filled."""
    part = _module(model, source.module)
    name = f"init_from {source.path}"
    weights = _renamed(_weights(Path(source.path), kind), source.rename, name)
    if not source.strict:
        weights = _known(part, weights, name)
        load_strictly(part, dict(part.state_dict()) | weights, source=name)
    else:
        load_strictly(part, weights, source=name)
    prefix = f"{source.module}." if source.module else ""
    return {prefix + key for key in weights}


def _module(model: Model, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError as error:
        names = ", ".join(child for child, _ in model.named_children())
        raise ConfigError(f"init_from.module: {type(model).__name__} has no {name!r}; it has {names}") from error


def _weights(source: Path, kind: str) -> dict[str, Tensor]:
    """The state dict of a run, model or checkpoint folder, or of a weights file.

    Of a checkpoint those count that would be exported: the averaged ones, if there are any.
    """
    folder = source / kind if (source / kind).is_dir() else source
    if not folder.exists():
        raise CheckpointError(f"init_from: there is no folder {source}")
    if folder.is_file():
        return unwrap(read_weights(folder))
    if (folder / STATE).exists():
        state = read_weights(folder / STATE)
        return (state["average"] or state)["model"]
    return read_weights(folder / WEIGHTS)


def _renamed(weights: Mapping[str, Tensor], rules: Mapping[str, str | None], name: str) -> dict[str, Tensor]:
    """Keys as the first pattern that begins one says; what it maps to null is left out."""
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
    """Those that the module has a place for; others are logged.

    Raises:
        CheckpointError: there are none.
    """
    own = part.state_dict()
    known = {key: tensor for key, tensor in weights.items() if key in own}
    if not known:
        raise CheckpointError(f"{name}: {type(part).__name__} has none of its keys, which are {listing(weights)}")
    if len(known) < len(weights):
        log.warning("%s: %d keys are not used: %s", name, len(weights) - len(known), listing(weights.keys() - known))
    return known

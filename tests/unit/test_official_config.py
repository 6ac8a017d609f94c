"""No key of a reference's config is ignored by accident.

Every key of every golden case and of every released config is changed in turn. The change must give another model or an
error, or the adapter must list the key as without effect, with the reason.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

import pytest
from golden.harness import Case
from support.key_lists import FOLDER, build, on_meta, read_key_list

from vistok.checkpoints import CheckpointError, registry
from vistok.checkpoints.official_config import OfficialConfig

NAMES = sorted(
    name for entry in registry.ENTRIES if "from_official" in vars(entry.load()) for name in entry.official_names
)


class Reference:
    """A reference's config with the shapes of its weights."""

    def __init__(self, name: str, model: str, config: Mapping[str, Any], shapes: Mapping[str, Any]):
        self.name, self.model, self.config, self.shapes = name, model, config, shapes

    def build(self, config: Mapping[str, Any]) -> Any:
        return build({"model": self.model, "config": config}, on_meta(self.shapes))

    def builds(self) -> bool:
        """Some cases hold other parts of a system beside the model, such as a discriminator."""
        try:
            self.build(self.config)
        except CheckpointError:
            return False
        return True


@lru_cache
def references(model: str) -> list[Reference]:
    found = []
    for folder in sorted((FOLDER.parent / "cases").iterdir()):
        case = Case(folder)
        if case.model == model:
            config = dict(case.config)
            if widths := case.build.get("vae_block_out_channels"):
                config["vae"] = config["vae"] | {"block_out_channels": widths}
            found.append(Reference(folder.name, model, config, case.shapes))
    for path in sorted(FOLDER.glob("*.json.gz")):
        listed = read_key_list(path)
        if listed["model"] == model:
            found.append(Reference(path.name, model, listed["config"], listed["state"]))
    return [reference for reference in found if reference.builds()]


def leaves(config: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            yield from leaves(value, (*path, key))
        else:
            yield (*path, key)


def sections(config: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    yield path
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from sections(value, (*path, key))


def inside(config: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        config = config[key]
    return config


def with_value(config: Mapping[str, Any], path: tuple[str, ...], value: Any) -> dict[str, Any]:
    changed = copy.deepcopy(dict(config))
    inside(changed, path[:-1])[path[-1]] = value
    return changed


def others(value: Any) -> list[Any]:
    """Values near and far: a size may be divided and rounded, and a default may be written out."""
    match value:
        case bool():
            return [not value]
        case None:
            return [1, 0.5]
        case int():
            return [value + 1, 2 * value]
        case float():
            return [value / 2 + 0.31]
        case str():
            return [f"{value}_other"]
        case list() | tuple():
            return [[others(item)[0] for item in value] or [1]]
    return [None]


@pytest.fixture
def without_effect(monkeypatch) -> dict[str, str]:
    """The keys that the adapters let pass from now on, with their reasons."""
    passed, finish = {}, OfficialConfig.finish

    def recording(self: OfficialConfig) -> None:
        finish(self)
        passed.update(self.without_effect())

    monkeypatch.setattr(OfficialConfig, "finish", recording)
    return passed


def same_model(reference: Reference, expected: Mapping[str, Any], config: Mapping[str, Any]) -> bool:
    try:
        return reference.build(config).config == expected
    except ValueError:  # a CheckpointError, or the model's own
        return False


@pytest.mark.parametrize("model", NAMES)
def test_every_key_changes_the_model_or_is_refused_or_known_to_have_no_effect(model, without_effect):
    seen, silent = set(), []
    for reference in references(model):
        new = [path for path in leaves(reference.config) if path not in seen]
        if not new:
            continue
        seen.update(new)
        config = reference.build(reference.config).config
        for path in new:
            changes = [with_value(reference.config, path, value) for value in others(inside(reference.config, path))]
            without_effect.clear()
            same = all(same_model(reference, config, changed) for changed in changes)
            if same and not without_effect.get(".".join(path)):
                silent.append(f"{reference.name}: {'.'.join(path)}")
    assert seen, f"no golden case and no released config of {model}"
    assert not silent


@pytest.mark.parametrize("model", NAMES)
def test_an_unknown_key_is_refused_by_name_in_every_section(model, without_effect):
    reference, accepted = references(model)[0], []
    for path in sections(reference.config):
        try:
            reference.build(with_value(reference.config, (*path, "surprise"), 7))
        except CheckpointError as error:
            assert "surprise" in str(error)  # noqa: PT017
        else:
            if not without_effect.get(".".join((*path, "surprise"))):
                accepted.append(".".join(path))
    assert not accepted

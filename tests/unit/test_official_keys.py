"""Configs of references: every key changes the model, is refused, or is listed as without effect."""

from __future__ import annotations

from copy import deepcopy
from fnmatch import fnmatchcase
from importlib import import_module

import pytest
from support.key_lists import FOLDER, build, on_meta, read_key_list

from vistok.checkpoints import CheckpointError
from vistok.checkpoints.official_config import OfficialConfig

LISTS = {
    "titok_s128": "vistok.tokenizers.titok.official",
    "titok_sl256_vq8k": "vistok.tokenizers.titok.official",
    "titok_bl64_vae_c16": "vistok.tokenizers.titok.official",
    "titok_tatitok_bl32_vq": "vistok.tokenizers.titok.official",
    "titok_maskgit_vqgan_f16": "vistok.tokenizers.maskgit_vqgan",
    "titok_generator_l32": "vistok.generators.maskgit.official",
    "rar_b": "vistok.generators.rar.official",
    "robustok_main-train": "vistok.tokenizers.robustok.official",
}
"""Key lists whose adapters read their configs key by key, and the module with WITHOUT_EFFECT."""


def leaves(config: dict, prefix: str = "") -> list[str]:
    found = []
    for key, value in config.items():
        found += leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else [f"{prefix}{key}"]
    return found


def changed(config: dict, path: str) -> dict:
    """A copy in which the value at ``path`` is another one of its type."""
    config = deepcopy(config)
    *parents, last = path.split(".")
    section = config
    for parent in parents:
        section = section[parent]
    value = section[last]
    if isinstance(value, bool):
        section[last] = not value
    elif isinstance(value, int):
        section[last] = 2 * value
    elif isinstance(value, float):
        section[last] = value + 0.05
    elif isinstance(value, list):
        section[last] = value[:-1]
    else:
        section[last] = f"{value}-other"
    return config


CASES = [(name, path) for name in LISTS for path in leaves(read_key_list(FOLDER / f"{name}.json.gz")["config"])]


@pytest.mark.parametrize(("name", "path"), CASES, ids=[f"{name}:{path}" for name, path in CASES])
def test_every_key_counts_or_is_listed(name, path):
    without_effect = import_module(LISTS[name]).WITHOUT_EFFECT
    if any(fnmatchcase(path, pattern) for pattern in without_effect):
        return
    listed = read_key_list(FOLDER / f"{name}.json.gz")
    state = on_meta(listed["state"])
    try:
        other = build(listed | {"config": changed(listed["config"], path)}, state)
    except (CheckpointError, ValueError):
        return
    assert other.config != build(listed, state).config


@pytest.mark.parametrize("name", LISTS)
def test_an_unknown_key_is_refused_by_name(name):
    listed = read_key_list(FOLDER / f"{name}.json.gz")
    with pytest.raises(CheckpointError, match=r"does not know: .*invented"):
        build(listed | {"config": listed["config"] | {"invented": 3}}, on_meta(listed["state"]))


def test_sections_and_defaults_of_a_config():
    given = OfficialConfig({"a": {"b": 1, "c": {"d": 2}}, "e": {}}, {"x*": "no effect"})
    assert given.take("a.b") == 1
    assert given.take("a.c") == {"d": 2}
    assert given.take("a.c", 5) == 5
    with pytest.raises(CheckpointError, match=r"lacks a\.b"):
        given.take("a.b")
    with pytest.raises(CheckpointError, match=r"e is \{\}"):
        given.require("e", 3, why="of a reason")
    given.finish()


def test_keys_without_effect_may_stay():
    OfficialConfig({"losses": {"gan": 1}}, {"losses.*": "of the run"}).finish()
    with pytest.raises(CheckpointError, match=r"losses\.gan"):
        OfficialConfig({"losses": {"gan": 1}}, {}).finish()

"""Training runs on disk: what kind of model a path holds, and the config and data of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vistok.checkpoints import CONFIG, read_config
from vistok.checkpoints.registry import entry
from vistok.config import NOTHING, Allowed, load_config, override
from vistok.data.config import DataConfig
from vistok.pipelines.folders import BEST_MODEL, GENERATOR, PIPELINE, TOKENIZER
from vistok.signatures import ConfigError, check

RUN_CONFIG = "config.yaml"


@dataclass(frozen=True)
class _DataSection:
    """The section that ``data.…=…`` overrides apply to."""

    data: DataConfig


def holds_tokenizer_only(path: str | Path) -> bool:
    """Whether ``path`` is a saved tokenizer or the run of one, rather than a pipeline or a set of images."""
    folder = Path(path)
    if (folder / CONFIG).is_file():
        return entry(read_config(folder)["model"]).kind == "tokenizer"
    return (folder / TOKENIZER).is_dir() and not any((folder / part).exists() for part in (GENERATOR, PIPELINE))


def config_of_run(path: str | Path) -> dict[str, Any] | None:
    """The config of a run folder, or of its best/; None if ``path`` is no run.

    Raises:
        ConfigError: the run's config.yaml is malformed.
    """
    file = _config_file(path)
    return load_config(file) if file.is_file() else None


def _config_file(path: str | Path) -> Path:
    folder = Path(path).absolute()
    file = folder / RUN_CONFIG
    return folder.parent / RUN_CONFIG if folder.name == BEST_MODEL and not file.is_file() else file


def holds_generator(path: str | Path) -> bool:
    """Whether ``path`` is the run of a generator, or a pipeline."""
    return any((Path(path) / part).exists() for part in (GENERATOR, PIPELINE))


def data_of_run(
    path: str | Path,
    overrides: Sequence[str],
    *,
    input_shape: tuple[int, ...],
    split: str | None = None,
    allowed: Allowed = NOTHING,
) -> DataConfig:
    """The data that a tokenizer's run was trained on, changed by ``data.…=…`` overrides.

    Args:
        path: the run folder, or its best/. If it has no config.yaml, size, channels and frames come from
            ``input_shape``.
        overrides: ``data.key=value`` texts.
        input_shape: the tokenizer's, (C, H, W) or (C, T, H, W).
        split: replaces the run's split, unless an override sets it.
        allowed: what the overrides may do; the run's own config may do nothing.

    Raises:
        ConfigError: an override is not of ``data``, or the config is invalid.
    """
    foreign = [text for text in overrides if not text.startswith("data.")]
    if foreign:
        raise ConfigError(f"override {foreign[0]!r}: only data.… applies here, for example data.root=photos/")
    file, section = _config_file(path), (config_of_run(path) or {}).get("data")
    if section and not isinstance(section, Mapping):
        raise ConfigError(f"{file}: data is {section!r}, no section")
    if not section:
        frames = {"num_frames": input_shape[1]} if len(input_shape) == 4 else {}
        section = {"channels": input_shape[0], "image_size": input_shape[-2]} | frames
    if split is not None:
        section = {**section, "split": split}
    values = override({"data": section}, overrides, source=str(file), target=_DataSection, allowed=allowed)["data"]
    try:
        return DataConfig(**check(DataConfig, values, "data"))
    except ValueError as error:
        raise ConfigError(f"data, of {file}: {error}" if file.is_file() else str(error)) from error

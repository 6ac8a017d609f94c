"""The folder of a pipeline: ``tokenizer/``, ``generator/``, and ``pipeline.json`` with class names and default options.

The run folder of a trained generator is a pipeline folder; that of a tokenizer has ``tokenizer/`` only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vistok.checkpoints import CONFIG, CheckpointError, load, snapshot
from vistok.checkpoints.model import MODEL_FILES, Model
from vistok.checkpoints.weights import STATE
from vistok.generators.base import Generator
from vistok.text import TEXT, PromptEncoder
from vistok.tokenizers.base import Tokenizer
from vistok.types import to_json
from vistok.utils.files import atomic_folder, read_json, restore, write_json
from vistok.utils.paths import local

PIPELINE, TOKENIZER, GENERATOR = "pipeline.json", "tokenizer", "generator"
BEST_MODEL = "best"
"""Folder in the run of a training that validates: the same files as in the run, from the best step."""


def write_settings(folder: str | Path, *, class_names: Sequence[str], sampling: Mapping[str, Any]) -> None:
    """Write ``pipeline.json`` into a folder that has (or gets) ``tokenizer/`` and ``generator/``."""
    write_json(Path(folder) / PIPELINE, {"class_names": list(class_names), "sampling": to_json(dict(sampling))})


def write_pipeline(
    folder: str | Path,
    parts: Mapping[str, Model],
    text: PromptEncoder,
    *,
    class_names: Sequence[str],
    sampling: Mapping[str, Any],
) -> None:
    """Write a pipeline folder as a whole, or not at all; an older pipeline there is replaced.

    Raises:
        FileExistsError: the folder holds other files, such as those of a training run.
    """
    folder = Path(folder)
    present = {entry.name for entry in folder.iterdir()} if folder.exists() else set()
    others = present - {PIPELINE, TOKENIZER, GENERATOR, TEXT}
    if others:
        raise FileExistsError(f"{folder} holds other files ({', '.join(sorted(others)[:5])}); choose a new folder")
    with atomic_folder(folder, replace=True) as partial:
        for name, part in parts.items():
            part.save_pretrained(partial / name)
        if text.parts:
            text.save(partial / TEXT)
        write_settings(partial, class_names=class_names, sampling=sampling)


def pipeline_folder(path: str | Path) -> Path:
    """The local folder of a pipeline, fetched from the hub if need be.

    Raises:
        CheckpointError: nothing is found, or the pipeline is incomplete.
    """
    path = local(path)
    folder = Path(path)
    if not folder.exists():
        files = [PIPELINE, *(f"{part}/{file}" for part in (TOKENIZER, GENERATOR) for file in MODEL_FILES)]
        files.append(f"{TEXT}/*")
        return snapshot(str(path), files)
    if folder.is_dir():
        restore(folder)
    missing = [name for name in (PIPELINE, TOKENIZER, GENERATOR) if not (folder / name).exists()]
    if not missing:
        return folder
    hint = ""
    if (folder / CONFIG).is_file():
        hint = " (it is a single model, which vistok.load reads)"
    elif missing == [GENERATOR] and (folder / "checkpoints").is_dir():
        hint = " (a run that has not exported one yet: sample one of its checkpoints, RUN/checkpoints/step-…)"
    elif GENERATOR in missing and TOKENIZER not in missing:
        hint = " (it has a tokenizer only: train a generator on its tokens, or look at it with `vistok reconstruct`)"
    raise CheckpointError(f"{folder} is no pipeline: it has no {', no '.join(missing)}{hint}")


def read_settings(folder: Path) -> dict[str, Any]:
    """Read ``pipeline.json``; returns ``class_names`` and ``sampling``, which are arguments of ``Pipeline``.

    Raises:
        CheckpointError: the file is damaged.
    """
    path = folder / PIPELINE
    try:
        settings = read_json(path)
        names, sampling = settings["class_names"], settings["sampling"]
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise TypeError(f"class_names must be a list of texts, got {names!r}"[:200])
        return {"class_names": tuple(names), "sampling": dict(sampling)}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f'{path} is damaged ({error!r}); expected {{"class_names": [...], "sampling": {{...}}}}'
        ) from error


def load_part(folder: Path, part: str, kind: type[Any]) -> Any:
    """Load the model in ``folder / part``.

    Raises:
        CheckpointError: weights are damaged, or the model is not a ``kind``.
    """
    model = load(folder / part)
    if not isinstance(model, kind):
        raise CheckpointError(f"{folder / part} holds a {type(model).__name__}, which is no {part}")
    return model


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Load a tokenizer: from a model folder, a run or pipeline (its ``tokenizer/``), a token cache, a checkpoint of a
    run, or a hub id.

    Raises:
        CheckpointError: nothing is found, weights are damaged, or the model is a generator.
    """
    path = local(path)
    inner = Path(path) / TOKENIZER
    if Path(path).is_dir():
        restore(Path(path))
    model = load(inner if inner.is_dir() else path)
    if not isinstance(model, Tokenizer):
        raise CheckpointError(f"{path} holds a generator ({model.registry_name}), but a tokenizer is needed")
    return model


def load_generator(path: str | Path) -> Generator:
    """Load a generator: from a model folder, a run or pipeline (its ``generator/``), a checkpoint of a run, or a hub
    id.

    Raises:
        CheckpointError: nothing is found, weights are damaged, or the model is a tokenizer.
    """
    model = load(path)
    if not isinstance(model, Generator):
        raise CheckpointError(f"{path} holds a tokenizer ({model.registry_name}), but a generator is needed")
    return model


def home_of(path: str | Path) -> Path | None:
    """The folder whose ``pipeline.json`` belongs to the generator at ``path``: ``path`` itself, or the run of which
    ``path`` is ``generator/`` or a checkpoint. None if there is no such folder."""
    path = Path(path)
    homes = [path]
    if path.name == GENERATOR:
        homes.append(path.parent)
    if (path / STATE).is_file():
        homes.append(path.parent.parent)
    return next((home for home in homes if (home / PIPELINE).is_file()), None)

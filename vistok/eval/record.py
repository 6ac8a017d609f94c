"""The record beside a score, from which a reader can tell whether it is comparable with another score."""

from __future__ import annotations

import dataclasses
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

from vistok._version import __version__
from vistok.data.config import DataConfig
from vistok.eval.images import ImageSet
from vistok.eval.scoring import Side
from vistok.tokenizers.base import Tokenizer
from vistok.types import to_json
from vistok.utils.files import check_file_to_write, write_json

RESULT_FILE = "result.json"


def check_result_folder(folder: str | Path | None) -> None:
    """Raise OSError, before anything is computed, if ``save_result`` cannot write there; None is no folder."""
    if folder is not None:
        check_file_to_write(Path(folder) / RESULT_FILE)


def save_result(result: dict[str, Any], folder: str | Path) -> Path:
    """Write ``result.json`` into ``folder`` (made if needed), atomically, and return its path.

    Raises:
        ValueError: a score is not finite.
    """
    path = Path(folder) / RESULT_FILE
    write_json(path, result)
    return path


def describe_images(images: ImageSet) -> dict[str, Any]:
    """Source, count, size (H, W), number of lossily compressed files, and the files that were read; JSON-ready."""
    described = {
        "source": images.source,
        "count": images.count,
        "size": list(images.size),
        "lossy": images.lossy,
    }
    if images.files_read is not None:
        read = dataclasses.asdict(images.files_read)
        described["files"] = read | {"left_out": images.files_read.left_out._asdict()}
    return to_json(described)


def describe_side(side: Side) -> dict[str, Any]:
    """One side, JSON-ready: its images with fingerprint and number of distinct ones, and its stored moments."""
    reference, extraction = side.reference, side.extraction
    moments = "stored" if reference.gaussians else "computed"
    described: dict[str, Any] = {"source": reference.source, "count": side.count, "moments": moments}
    if reference.images is not None:
        described |= describe_images(reference.images)
    if extraction is not None:
        described |= {"count": extraction.count, "size": list(extraction.size)}
        described |= {"distinct": extraction.distinct, "fingerprint": extraction.fingerprint}
    if reference.gaussians:
        recorded = dataclasses.asdict(reference.provenance) | {"moments_sha256": reference.moments_sha256}
        described["stored"] = {name: value for name, value in recorded.items() if value is not None}
    return described


def describe_tokenizer(tokenizer: Tokenizer, data: DataConfig) -> dict[str, Any]:
    """A tokenizer and the data that it is scored on, JSON-ready."""
    return {
        "model": tokenizer.registry_name,
        "fingerprint": tokenizer.fingerprint(),
        "spec": dataclasses.asdict(tokenizer.spec_for(data.input_shape)),
        "data": dataclasses.asdict(data),
    }


def library_versions() -> dict[str, str]:
    libraries = {name: version(name) for name in ("torch", "torch-fidelity", "numpy", "pillow")}
    return {"vistok": __version__, "python": platform.python_version()} | libraries

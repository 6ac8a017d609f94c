"""Downloads from the Hugging Face hub; errors say what to do without the hub."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vistok.checkpoints.weights import INDEX_SUFFIX, CheckpointError, shard_names
from vistok.utils.files import beside


def download(repo: str, filename: str, options: Mapping[str, Any]) -> Path:
    """Download one file of a hub repository and return its local path; for an index file, also all files it names.

    Raises:
        CheckpointError: the file or repository is not on the hub, or the hub is unreachable.
    """
    from huggingface_hub import hf_hub_download

    if "/" not in repo:
        raise CheckpointError(
            f"{filename} is not on the hub: fetch it as its authors describe, then `vistok convert` the local file"
        )

    def fetch(name: str) -> Path:
        return _reach(f"{repo}/{name}", lambda: hf_hub_download(repo, name, **options))

    path = fetch(filename)
    if filename.endswith(INDEX_SUFFIX):
        folder = filename.rpartition("/")[0]
        for shard in sorted(set(shard_names(path).values())):
            fetch(f"{folder}/{shard}".lstrip("/"))
    return path


def snapshot(repo: str, files: Sequence[str], **hub_options: Any) -> Path:
    """Download the ``files`` (patterns) of a hub repository and return the local folder.

    Raises:
        CheckpointError: ``repo`` is no hub id or not on the hub, or the hub is unreachable.
    """
    from huggingface_hub import snapshot_download

    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        near = beside(repo) or ", and it is not a hub id of the form owner/name"
        raise CheckpointError(f"there is no folder {repo!r}{near}")
    return _reach(repo, lambda: snapshot_download(repo, allow_patterns=list(files), **hub_options))


def _reach(what: str, fetch: Callable[[], str]) -> Path:
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(fetch())
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise CheckpointError(
            f"there is no local folder {what!r}{beside(what)}, and it could not be fetched from the hub: {reason}. "
            "Check the name and the connection, or download the files elsewhere and give their local path"
        ) from error

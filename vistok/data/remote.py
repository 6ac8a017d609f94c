"""Remote shards, which are fetched whole, once, without a shell.

Addresses come from files that others wrote, so only a short list of schemes is allowed (``SCHEMES``). The standard
library reads http and https; fsspec reads s3, gs and hf. Only a :class:`vistok.config.ShellCommand`, which no file can
hold, runs a command.
"""

from __future__ import annotations

import hashlib
import http.client
import logging
import re
import subprocess
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, cast

from vistok._version import __version__
from vistok.signatures import ConfigError, ShellCommand
from vistok.utils.files import atomic_file

log = logging.getLogger(__name__)

WEB = ("http", "https")
SCHEMES = (*WEB, "s3", "gs", "hf")
TRIES = 3
SECONDS_OF_SILENCE = 60
BLOCK = 1 << 20
LONGEST_NAME = 100

Shard = str | ShellCommand
"""A path, an address, or a command."""


def is_remote(path: Shard) -> bool:
    """Whether ``path`` is an address or a command (also one that is refused), not a local path."""
    return isinstance(path, ShellCommand) or "://" in path or path.lower().startswith(ShellCommand.PREFIX)


def check_address(address: Shard) -> None:
    """Raise ValueError unless :func:`fetch` may read ``address``."""
    if isinstance(address, ShellCommand):
        return
    if address.lower().startswith(ShellCommand.PREFIX):
        raise ValueError(
            f"{address} would run a command, which only the command line may ask for: data.root='pipe:…' with "
            "--allow-commands (in Python: vistok.config.ShellCommand)"
        )
    scheme = address.partition("://")[0]
    if scheme not in SCHEMES:
        raise ValueError(
            f"cannot fetch {address}: {scheme!r} is none of {', '.join(SCHEMES)}; name local files by their path"
        )


def fetch(addresses: Sequence[Shard], cache: Path) -> list[Path]:
    """The paths of the local copies of remote shards.

    One process fetches the missing copies, while others that need the same shards wait.

    Raises:
        ValueError: an address that is not allowed (see :func:`check_address`).
        ConfigError: the package that reads such an address is not installed.
        OSError: a shard cannot be fetched.
    """
    from filelock import FileLock

    for address in addresses:
        check_address(address)
    copies = {address: _copy_of(str(address), cache) for address in addresses}
    if all(path.exists() for path in copies.values()):
        return list(copies.values())
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / f"{_key(*map(str, addresses))}.lock"):
        missing = {address: path for address, path in copies.items() if not path.exists()}
        for number, (address, path) in enumerate(missing.items(), 1):
            log.info("fetching shard %d of %d: %s", number, len(missing), address)
            _download(address, path)
    return list(copies.values())


def _copy_of(address: str, cache: Path) -> Path:
    name = re.sub(r"[^\w.-]", "_", address.rsplit("/", 1)[-1])[-LONGEST_NAME:].lstrip(".")
    return cache / _key(address)[:16] / (name or "shard")


def _key(*texts: str) -> str:
    """A hash of texts, for the name of a file."""
    return hashlib.sha256("".join(f"{text}\n" for text in texts).encode()).hexdigest()[:32]


def _download(address: Shard, path: Path) -> None:
    for left in reversed(range(TRIES)):
        try:
            with atomic_file(path) as temporary, temporary.open("wb") as file, _opened(address) as stream:
                while block := stream.read(BLOCK):
                    file.write(block)
                if file.tell() == 0:
                    raise FileNotFoundError(f"nothing could be read from {address}")
            return
        except (ConnectionError, TimeoutError, http.client.HTTPException) as error:
            if not left:
                raise OSError(f"{address} could not be fetched in {TRIES} tries: {error!r}") from error
            log.warning("%s broke off (%s); it is fetched again", address, error)


@contextmanager
def _opened(address: Shard) -> Iterator[IO[bytes]]:
    """The bytes of a shard. Leaving the context raises an error if some are missing."""
    if isinstance(address, ShellCommand):
        with _output_of(address) as stream:
            yield stream
    elif address.partition("://")[0] in WEB:
        with _web(address) as stream:
            yield stream
    else:
        with _stored(address) as stream:
            yield stream


@contextmanager
def _output_of(command: ShellCommand) -> Iterator[IO[bytes]]:
    with subprocess.Popen(command.command, shell=True, stdout=subprocess.PIPE) as process:
        yield cast(IO[bytes], process.stdout)
    if process.returncode:
        raise OSError(f"{command} ended with exit code {process.returncode}")


@contextmanager
def _web(address: str) -> Iterator[IO[bytes]]:
    request = urllib.request.Request(address, headers={"User-Agent": f"vistok/{__version__}"})
    try:
        response = urllib.request.urlopen(request, timeout=SECONDS_OF_SILENCE)
    except (OSError, ValueError, http.client.InvalidURL) as error:
        reason = getattr(error, "reason", error)
        if isinstance(reason, ConnectionError | TimeoutError):
            raise reason from error
        raise OSError(f"{address} cannot be fetched: {error}") from error
    with response:
        yield response
        if response.length:  # the bytes that http.client still expects after the last block
            raise ConnectionError(f"{address} ended {response.length:,} bytes too early")


@contextmanager
def _stored(address: str) -> Iterator[IO[bytes]]:
    """An object of a store that fsspec reads. fsspec's chained addresses ("a::b") could open anything, so only the
    plain scheme is passed on."""
    import fsspec

    scheme, _, path = address.partition("://")
    try:
        system = fsspec.filesystem(scheme)
    except ImportError as error:
        raise ConfigError(f"data.root={address}: {error}; pip install 'vistok[webdataset]'") from error
    try:
        with system.open(path, "rb") as stream:
            yield stream
    except OSError:
        raise
    except Exception as error:  # each store has errors of its own, such as "no credentials"
        raise OSError(f"{address} cannot be fetched: {error!r}") from error

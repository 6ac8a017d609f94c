"""Remote shards: addresses and commands, downloaded once, whole or not at all."""

from __future__ import annotations

import http.server
import io
import tarfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vistok.data import remote
from vistok.data.config import DataConfig
from vistok.data.opening import open_source
from vistok.data.remote import fetch
from vistok.signatures import ConfigError, ShellCommand


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Three shards of four images."""
    folder = tmp_path / "shards"
    folder.mkdir()
    for shard in range(3):
        with tarfile.open(folder / f"{shard}.tar", "w") as archive:
            for number in range(4 * shard, 4 * shard + 4):
                file = io.BytesIO()
                Image.new("RGB", (8, 8), (number, 0, 0)).save(file, "PNG")
                member = tarfile.TarInfo(f"{number:04d}.png")
                member.size = len(file.getvalue())
                archive.addfile(member, io.BytesIO(file.getvalue()))
    return folder


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Serves a folder; ``cut/NAME`` is the first half of a file that claims to be whole, once."""

    cut: list[str]

    def log_message(self, *_): ...

    def do_GET(self):
        if self.path.startswith("/cut/"):
            self.path = self.path.removeprefix("/cut")
            if self.path not in self.cut:
                self.cut.append(self.path)
                content = Path(self.translate_path(self.path)).read_bytes()
                self.send_response(200)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content[: len(content) // 2])
                return
        super().do_GET()


@pytest.fixture
def server(shards: Path) -> Iterator[str]:
    handler = partial(type("Handler", (Quiet,), {"cut": []}), directory=str(shards))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


def config(root: object) -> DataConfig:
    return DataConfig(8, source="webdataset", root=root)


def test_shards_of_a_web_server(shards: Path, server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    root = f"{server}/{{0..2}}.tar"
    fetched, local = open_source(config(root)), open_source(config(str(shards / "*.tar")))
    assert fetched.fingerprint() == local.fingerprint()
    for shard in shards.iterdir():
        shard.unlink()
    assert np.asarray(open_source(config(root))[5][0])[0, 0, 0] == 5


def test_a_shard_that_breaks_off_is_fetched_again(shards: Path, server: str, tmp_path: Path):
    [path] = fetch([f"{server}/cut/1.tar"], tmp_path / "cache")
    assert path.read_bytes() == (shards / "1.tar").read_bytes()


def test_what_cannot_be_fetched_is_named_and_leaves_nothing(server: str, tmp_path: Path):
    for address in (f"{server}/gone.tar", ShellCommand(f"cat {tmp_path}/gone.tar")):
        with pytest.raises(OSError, match=r"gone\.tar"):
            fetch([address], tmp_path / "cache")
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.suffix != ".lock"]


def test_commands_of_the_command_line(shards: Path):
    command = ShellCommand(f"cat {shards}/{{0..2}}.tar")
    assert len(open_source(config(command))) == 12
    with pytest.raises(ValueError, match="only source: webdataset reads"):
        DataConfig(8, root=command)


def test_processes_do_not_fetch_the_same_shards(shards: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    commands = [ShellCommand(f"echo >>{tmp_path}/fetched; sleep 0.1; cat {path}") for path in sorted(shards.iterdir())]
    with caplog.at_level("INFO"), ThreadPoolExecutor() as pool:
        one, other = pool.map(lambda _: fetch(commands, tmp_path / "cache"), range(2))
    assert one == other
    assert [path.read_bytes() for path in one] == [path.read_bytes() for path in sorted(shards.iterdir())]
    assert len((tmp_path / "fetched").read_text()) == 3
    assert "fetching shard 3 of 3: pipe:" in caplog.text


@pytest.mark.parametrize(
    "address",
    [
        "pipe:touch owned",
        "PIPE:touch owned",
        "file:///etc/passwd",
        "ssh://host/0.tar",
        "local://x",
        "simplecache::https://example.org/0.tar",
        "reference::s3://a/b",
        "ftp://example.org/0.tar",
        "gopen://x",
    ],
)
def test_other_addresses_are_refused_before_anything_is_opened(address: str, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"would run a command|is none of http, https, s3, gs, hf"):
        open_source(config(address))
    with pytest.raises(ValueError, match=r"would run a command|is none of http, https, s3, gs, hf"):
        fetch([address], tmp_path / "cache")
    assert list(tmp_path.iterdir()) == []


def test_a_store_whose_reader_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(__import__("sys").modules, "s3fs", None)
    with pytest.raises(ConfigError, match=r"pip install 'vistok\[webdataset\]'"):
        fetch(["s3://bucket/0.tar"], tmp_path)


def test_a_store(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """fsspec's memory store stands for all stores: it gets a path, not a chain."""
    import fsspec

    memory = fsspec.filesystem("memory")
    with memory.open("bucket/0.tar", "wb") as file:
        file.write((shards / "0.tar").read_bytes())
    monkeypatch.setattr(remote, "SCHEMES", (*remote.SCHEMES, "memory"))
    [path] = fetch(["memory://bucket/0.tar"], tmp_path / "cache")
    assert path.read_bytes() == (shards / "0.tar").read_bytes()
    with pytest.raises(FileNotFoundError):
        fetch(["memory://local::/etc/hostname"], tmp_path / "cache")


@pytest.mark.parametrize(
    "address", ["https://h/..", "https://h/.", "https://h/", "https://h/" + 400 * "x", "https://h/a/../../b"]
)
def test_copies_stay_in_the_cache(address: str, tmp_path: Path):
    copy = remote._copy_of(address, tmp_path)
    assert copy.parent.parent == tmp_path
    assert len(copy.name) <= remote.LONGEST_NAME
    assert copy.name not in ("", ".", "..")

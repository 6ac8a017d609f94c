"""The project's public address, once it has one, in everything that names it."""

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from shutil import copytree, ignore_patterns

import pytest

ROOT = Path(__file__).resolve().parents[2]
ADDRESS = "https://github.com/first-owner/vistok"


@pytest.fixture
def checkout(tmp_path):
    for name in ("pyproject.toml", "README.md", "CONTRIBUTING.md", "LICENSE"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    for name in ("docs", "notebooks"):
        copytree(ROOT / name, tmp_path / name, ignore=ignore_patterns("generated", ".*"))
    return tmp_path


def publish(checkout, address=ADDRESS):
    command = [sys.executable, str(ROOT / "docs" / "address.py"), address, "--root", str(checkout)]
    return subprocess.run(command, capture_output=True, text=True)


def contents(checkout):
    return {file: file.read_bytes() for file in sorted(checkout.rglob("*")) if file.is_file()}


def test_metadata_readme_and_notebooks_name_it(checkout):
    assert publish(checkout).returncode == 0
    project = tomllib.loads((checkout / "pyproject.toml").read_text())["project"]
    assert project["urls"]["Homepage"] == ADDRESS
    assert project["scripts"]["vistok"] == "vistok.cli:main"
    readme = (checkout / "README.md").read_text()
    links = re.findall(r"\]\(([^)]+)\)|src=\"([^\"]+)\"", readme)
    assert all(link.startswith(("https://", "#")) for pair in links for link in pair if link)
    assert f"({ADDRESS}/blob/main/CONTRIBUTING.md)" in readme
    assert f'src="{ADDRESS}/raw/main/docs/images/quickstart.png"' in readme
    for file in (checkout / "notebooks").glob("*.ipynb"):
        before, after = json.loads((ROOT / "notebooks" / file.name).read_text()), json.loads(file.read_text())
        assert f"/github/first-owner/vistok/blob/main/notebooks/{file.name})" in after["cells"][0]["source"][-1]
        assert after["cells"][1:] == before["cells"][1:]


def test_a_new_address_replaces_the_old_one(checkout):
    publish(checkout)
    once = contents(checkout)
    publish(checkout, ADDRESS + ".git/")
    assert contents(checkout) == once
    publish(checkout, "https://github.com/second-owner/vistok")
    assert not any(b"first-owner" in data for data in contents(checkout).values())
    publish(checkout)
    assert contents(checkout) == once


def test_what_is_no_address_changes_nothing(checkout):
    before = contents(checkout)
    for address in ("vistok", "http://github.com/a/b", "https://github.com/a", "https://github.com/a/b c"):
        result = publish(checkout, address)
        assert result.returncode == 2
        assert "expected the address of a repository" in result.stderr
    assert contents(checkout) == before


def test_colab_reads_from_github_alone(checkout):
    result = publish(checkout, "https://code.example.org/first-owner/vistok")
    assert "no badge" in result.stdout
    assert "colab" not in (checkout / "notebooks" / "01_quickstart.ipynb").read_text()

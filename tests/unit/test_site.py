"""The documentation site: the pages that docs/pages.py generates, and their sources."""

from __future__ import annotations

import json
import re
import sys
from importlib.resources import files
from pathlib import Path

import pytest

from vistok.utils.recipes import FOLDER

DOCS = Path(__file__).parents[2] / "docs"
CATALOGUE = json.loads((files("vistok") / "checkpoints" / "catalogue.json").read_text())
NAMES = [item["name"] for item in CATALOGUE]


@pytest.fixture(scope="module")
def pages():
    sys.path.insert(0, str(DOCS))
    try:
        import pages
    finally:
        sys.path.remove(str(DOCS))
    return pages


@pytest.mark.parametrize("item", CATALOGUE, ids=NAMES)
def test_the_page_of_a_system_says_what_differs_from_the_paper(pages, item):
    page = pages.system_page(item)
    _, section = page.split("\n## What differs from the paper\n\n")
    bullets = section.split("\n## ")[0].strip()
    assert all(re.match(r"(- [A-Z`]|  \S)", line) for line in bullets.splitlines()), bullets
    assert 2 <= len(re.findall(r"^- ", bullets, re.MULTILINE)) <= 6


def test_a_system_without_its_differences_stops_the_site(pages):
    with pytest.raises(FileNotFoundError, match=r"brand_new\.md is missing: say in 2 to 6 bullets what of brand_new"):
        pages.differences("brand_new")


def test_there_are_no_differences_of_unknown_systems():
    assert {file.stem for file in (DOCS / "differences").iterdir()} == set(NAMES)


FOLDERS = "|".join(folder.name for folder in FOLDER.iterdir())
NAMED = re.compile(rf"`((?:{FOLDERS})/[a-z0-9_]+)(…?)`")


@pytest.mark.parametrize("file", sorted((DOCS / "differences").iterdir()), ids=lambda file: file.stem)
def test_recipes_that_they_name_are_there(file):
    for name, more in NAMED.findall(file.read_text()):
        assert list(FOLDER.glob(f"{name}*.yaml" if more else f"{name}.yaml")), name

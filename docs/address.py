"""Give the project a public address: everything that has to name it is written by this command, again if it changes.

    python docs/address.py https://github.com/OWNER/vistok

- pyproject.toml: ``[project.urls]``, which the wheel's metadata carry;
- README.md: relative links and pictures become absolute, so that they hold on the page of the wheel too;
- notebooks/*.ipynb: a badge under the title that opens the notebook in Colab (which reads from github.com alone).
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
GITHUB = "https://github.com/"
BRANCH = "main"
COLAB = "https://colab.research.google.com"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("address", help="where the repository can be read by everybody")
    parser.add_argument("--root", type=Path, default=ROOT, help="the checkout that is changed")
    given = parser.parse_args()
    address = given.address.rstrip("/").removesuffix(".git")
    if not re.fullmatch(r"https://[\w.-]+(/[\w.-]+){2,}", address):
        parser.error(f"got {given.address!r}; expected the address of a repository, as {GITHUB}OWNER/vistok")
    notebooks = sorted((given.root / "notebooks").glob("*.ipynb"))
    if not address.startswith(GITHUB):
        print(f"Colab opens notebooks of {GITHUB} alone: the {len(notebooks)} notebooks get no badge")
        notebooks = []
    change(given.root / "pyproject.toml", lambda text: with_urls(text, address))
    change(given.root / "README.md", lambda text: with_absolute_links(text, address, given.root))
    for notebook in notebooks:
        change(notebook, lambda text, name=notebook.name: with_badge(text, address, name))


def change(file: Path, edit) -> None:
    before = file.read_text(encoding="utf-8")
    after = edit(before)
    print(f"{'changed' if after != before else 'as it was'}: {file}")
    file.write_text(after, encoding="utf-8")


def with_urls(text: str, address: str) -> str:
    """pyproject.toml with the section of URLs, in place of an older one."""
    page = f"{address}/blob/{BRANCH}"
    urls = {
        "Homepage": address,
        "Documentation": f"{address}/tree/{BRANCH}/docs",
        "Changelog": f"{page}/CHANGELOG.md",
        "Issues": f"{address}/issues",
    }
    section = "[project.urls]\n" + "".join(f'{name} = "{url}"\n' for name, url in urls.items())
    rest = re.sub(r"\[project\.urls\]\n(?:[^\[\n].*\n)*\n?", "", text)
    return rest.replace("[project.scripts]\n", f"{section}\n[project.scripts]\n", 1)


def with_absolute_links(text: str, address: str, root: Path) -> str:
    """README.md with links to files of the repository under its address; an older address is replaced."""

    def absolute(match: re.Match[str]) -> str:
        before, __older, link, after = match.groups()
        path = link.partition("#")[0]
        if not path or not (root / path).exists():
            return match[0]
        picture = path.endswith((".png", ".gif"))
        return f"{before}{address}/{'raw' if picture else 'blob'}/{BRANCH}/{link}{after}"

    return re.sub(rf'(\]\(|src=")(https://[^\s()"]+/(?:raw|blob)/{BRANCH}/)?([^\s()":]+)(\)|")', absolute, text)


def with_badge(text: str, address: str, name: str) -> str:
    """A notebook whose first cell, its title, ends with the badge."""
    notebook = json.loads(text)
    cell = notebook["cells"][0]
    lines = [line for line in "".join(cell["source"]).rstrip().splitlines(keepends=True) if COLAB not in line]
    where = f"{COLAB}/github/{address.removeprefix(GITHUB)}/blob/{BRANCH}/notebooks/{name}"
    badge = f"[![Open in Colab]({COLAB}/assets/colab-badge.svg)]({where})"
    cell["source"] = f"{''.join(lines).rstrip()}\n\n{badge}".splitlines(keepends=True)
    return json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    main()

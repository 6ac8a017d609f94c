"""Pages of the site that are made from the registry: one per system, and the model zoo with its licences.

What no registry knows is written by hand: ``differences/NAME.md``, what differs from the paper.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from importlib.resources import files
from pathlib import Path
from typing import Any

from vistok.checkpoints import registry
from vistok.utils.recipes import models_of_configs, summary

HERE = Path(__file__).parent
NOTEBOOKS = HERE.parent / "notebooks"
DIFFERENCES = HERE / "differences"


def write_pages(folder: Path) -> None:
    """Write all generated pages into ``folder``, which is made anew."""
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "systems").mkdir(parents=True)
    (folder / "notebooks").mkdir()
    catalogue = json.loads((files("vistok") / "checkpoints" / "catalogue.json").read_text())
    for item in catalogue:
        (folder / "systems" / f"{item['name']}.md").write_text(system_page(item))
    (folder / "zoo.md").write_text(zoo_page(catalogue))
    for notebook in sorted(NOTEBOOKS.glob("*.ipynb")):
        shutil.copyfile(notebook, folder / "notebooks" / notebook.name)


def system_page(item: dict[str, Any]) -> str:
    """What it is (the class' docstring), sizes, recipes, checkpoints, what differs from the paper, reference curves."""
    module, _, name = registry.entry(item["name"]).target.partition(":")
    lines = [f"# {item['name']}", "", f"A {item['kind']}: `{item['official']}` in official names."]
    if item["paper"]:
        lines.append(f"Paper: [arXiv {item['paper']}](https://arxiv.org/abs/{item['paper']}).")
    if item["tokenizer"]:
        lines.append(f"Its paper models the tokens of [{item['tokenizer']}]({item['tokenizer']}.md).")
    lines += ["", "```{eval-rst}", f".. autoclass:: {module}.{name}", "```", "", "## Sizes", ""]
    lines += table(("size", "parameters"), ((size, f"{count:,}") for size, count in item["sizes"].items()))
    lines += ["", "## Recipes", ""]
    own = [config for config, model in models_of_configs().items() if model == item["name"]]
    lines += table(("config", "what it trains"), ((f"`vistok train {config}`", summary(config)) for config in own))
    lines += ["", "## Official checkpoints", ""]
    lines += checkpoint_table(item["checkpoints"])
    lines += ["", "## What differs from the paper", "", differences(item["name"])]
    curves = [curve for curve in curve_names() if item["name"] in curve.split("-")]
    if curves:
        lines += ["", "## Reference curves", "", "`docs/curves/README.md` tells how each was made."]
    for curve in curves:
        lines += ["", f"![{curve}](../../curves/{curve}.png)"]
    return "\n".join(lines) + "\n"


def differences(name: str) -> str:
    """The bullets of a system.

    Raises:
        FileNotFoundError: it has none.
    """
    file = DIFFERENCES / f"{name}.md"
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing: say in 2 to 6 bullets what of {name} differs from its paper")
    return file.read_text().rstrip()


def zoo_page(catalogue: list[dict[str, Any]]) -> str:
    """Every released file, what it goes with, and licences."""
    lines = [
        "# Model zoo", "",
        "Every checkpoint that vistok reads. `vistok models WORD` shows the same. Licences are those that the",
        "repositories state; read them there before you use weights.", "",
    ]  # fmt: skip
    lines += ["## Licences of code", ""]
    names = {name.partition("/")[0]: name for item in registry.ENTRIES for name in reversed(item.official_names)}
    licences = {system: registry.official_entry(name).licence_of(name) for system, name in names.items()}
    lines += table(
        ("system", "reference implementation", "weights"),
        ((system, licence.code, licence.weights) for system, licence in sorted(licences.items())),
    )
    lines += ["", "## Checkpoints", ""]
    lines += checkpoint_table([file for item in catalogue for file in item["checkpoints"]])
    return "\n".join(lines) + "\n"


def checkpoint_table(checkpoints: list[dict[str, Any]]) -> list[str]:
    def row(file: dict[str, Any]) -> tuple[str, ...]:
        goes_with = f"`{file['tokenizer']}`" if file["tokenizer"] else ""
        return f"`{file['id']}`", file["official"], goes_with, file["licence"]

    return table(("checkpoint", "system", "goes with", "licence of weights"), map(row, checkpoints))


def curve_names() -> list[str]:
    return sorted(file.stem for file in (HERE / "curves").glob("*.png"))


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    """Lines of a table; a sentence where there are no rows."""
    body = [f"| {' | '.join(row)} |" for row in rows]
    head = list(header)
    return [f"| {' | '.join(head)} |", "|" + "---|" * len(head), *body] if body else ["None."]

"""The configs that ship with the package, by name: ``cifar10/llamagen_vq``."""

from __future__ import annotations

import difflib
import re
from importlib.resources import files
from pathlib import Path

from vistok.utils.spelling import did_you_mean

FOLDER = Path(str(files("vistok"))) / "train" / "configs"


def recipes() -> list[str]:
    """The names of all shipped configs, sorted."""
    return sorted(file.relative_to(FOLDER).with_suffix("").as_posix() for file in FOLDER.rglob("*.yaml"))


def find_recipe(name: str | Path) -> Path:
    """The path of a config: an existing file, or a shipped config by its name.

    Raises:
        FileNotFoundError: there is neither; the message names the nearest shipped ones.
    """
    own, known = Path(name).expanduser(), recipes()
    if own.is_file():
        return own
    asked = str(name).removesuffix(".yaml")
    if asked in known:
        return FOLDER / f"{asked}.yaml"
    asked = asked.removeprefix("configs/").lower()
    near = [known_name for known_name in known if asked in known_name][:5]
    near = near or difflib.get_close_matches(asked, known, n=3, cutoff=0.5)
    hint = did_you_mean(*near)
    raise FileNotFoundError(
        f"there is no config file {name}, and none of that name ships{hint} `vistok configs` lists all"
    )


def models_of_configs() -> dict[str, str]:
    """From the name of each shipped config to the registered name of the model it trains."""
    found = {}
    for name in recipes():
        match = re.search(r"^model:(?:\s*\{|\s*\n(?:\s*#.*\n)*\s+)name: (\w+)", _text(name), re.MULTILINE)
        if match:
            found[name] = match[1]
    return found


def summary(name: str) -> str:
    """The first sentence of the comment that a config begins with."""
    lines = []
    for line in _text(name).splitlines():
        if not line.startswith("#") or line.startswith("#   "):
            break
        lines.append(line.lstrip("# "))
    return re.split(r"(?<=\.)\s|:$", " ".join(lines))[0]


def _text(name: str) -> str:
    return (FOLDER / f"{name}.yaml").read_text(encoding="utf-8")

"""Each system has its own file or folder (its room), and no other code names it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import vistok
from vistok.checkpoints import registry

PACKAGE = Path(vistok.__file__).parent
REGISTRY = PACKAGE / "checkpoints" / "registry.py"
NAMES = {entry.name for entry in registry.ENTRIES} | {
    name.partition("/")[0] for entry in registry.ENTRIES for name in entry.official_names
}
NAMES -= {"framewise"}  # not a system: it applies any image tokenizer to clips
# Parts of one system that are built into another.
BUILT_IN = {
    "flextok": {"kl_vae"},  # its frozen autoencoder
    "titok": {"maskgit_vqgan", "maskgit"},  # the codec whose codes it predicts
    "framewise": {"vit_vqgan"},  # the image tokenizer of its tiny model
    "llama": {"llamagen"},  # one system, by its model's name and by its paper's
    "maskgit": {"titok"},  # the hub's names of its weights
    "maskgit_vqgan": {"titok"},
    "ming_univision": {"mingtok"},  # the tokenizer in its loop; one file holds both
    "mingtok": {"ming_univision"},
    "rar": {"robustok", "titok", "maskgit"},  # the hub's names of its weights, and of their tokenizer
    "randar": {"llama", "llamagen", "maskgit", "titok"},  # its blocks; the hub's names of weights
    "lpd": {"llama", "llamagen"},  # the hub's name of its tokenizer
    "kl_vae": {"flextok"},
    "token_shuffle": {"llama"},  # its blocks
    "open_magvit2_gpt": {"llama"},  # the transformer that it extends
    "ibq_gpt": {"llama"},
}
# Names that are also ordinary words (a variance, a RAR archive, a random seed): patterns that mean the system.
WRITTEN = {
    "var": r"(?<![A-Za-z])VAR(?![A-Za-z_])|generators\.var(?!\w)|(?<!\w)var/",
    "rar": r"(?<![A-Za-z])(?:rar|RAR)(?![A-Za-z])(?! archive)",
    "seed": r"(?<![A-Za-z_])SEED(?![A-Za-z_])|tokenizers\.seed(?!\w)|(?<!\w)seed/",
}
# Published protocols have the names of their papers, and results contain these names.
MEASURES = {
    "eval/guards.py": {"var"},
    "eval/reconstruction.py": {"llamagen"},
    "eval/video_protocols.py": {"larp"},
}


def room_of(file: Path) -> str | None:
    """The system whose room a file is in."""
    kind, *rest = file.relative_to(PACKAGE).parts
    if kind not in ("tokenizers", "generators") or rest[0] in ("base.py", "__init__.py", "engine"):
        return None
    return rest[0].removesuffix(".py")


def words(file: Path) -> Iterator[tuple[int, str]]:
    """Identifiers, strings and imports of a module, docstrings aside, with their lines."""
    tree = ast.parse(file.read_text())
    bodies = [node.body for node in ast.walk(tree) if isinstance(getattr(node, "body", None), list)]
    docstrings = {
        id(statement.value)
        for body in bodies
        for statement in body
        if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
    }
    for node in ast.walk(tree):
        match node:
            case ast.Constant(value=str(text)) if id(node) not in docstrings:
                yield node.lineno, text
            case ast.Name(id=name) | ast.Attribute(attr=name) | ast.arg(arg=name):
                yield node.lineno, name
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                yield node.lineno, name
            case ast.keyword(arg=str(name)):
                yield node.value.lineno, name
            case ast.ImportFrom(module=module, names=names):
                yield node.lineno, f"{module or ''} {' '.join(alias.name for alias in names)}"
            case ast.Import(names=names):
                yield node.lineno, " ".join(alias.name for alias in names)


@cache
def named_in(text: str) -> set[str]:
    """The systems that a text names, in upper or lower case."""
    snake = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", text)
    words = {name for name, written in WRITTEN.items() if re.search(written, text)}
    return words | {
        name
        for name in NAMES - WRITTEN.keys()
        for written in (text.lower(), snake.lower())
        if re.search(rf"(?<![a-z]){re.escape(name)}(?![a-z])", written)
    }


def is_at_home(name: str, room: str | None) -> bool:
    if room is None:
        return False
    plain, own = name.replace("_", ""), room.replace("_", "")
    return plain in own or own in plain or name in BUILT_IN.get(room, ())


def test_no_system_is_named_outside_its_room():
    foreign = []
    for file in sorted(PACKAGE.rglob("*.py")):
        room, measures = room_of(file), MEASURES.get(file.relative_to(PACKAGE).as_posix(), set())
        for line, text in words(file) if file != REGISTRY else ():
            names = {name for name in named_in(text) if not is_at_home(name, room)} - measures
            foreign += [f"{file.relative_to(PACKAGE)}:{line}: {name} in {text[:60]!r}" for name in sorted(names)]
    assert not foreign


def test_the_walk_finds_names_of_every_kind(tmp_path):
    file = tmp_path / "module.py"
    file.write_text(
        '"""FlexTok in a docstring."""\n'
        "from vistok.tokenizers.flextok import FlexTok\n"
        "def like_flextok(flextok_option): return FlexTok(flextok=1)\n"
        "names = ['flextok', 'FlexTok is good']\n"
        "radar, marked = 'summary', 'dark'\n"
    )
    found = [line for line, text in words(file) if named_in(text)]
    assert set(found) == {2, 3, 4}

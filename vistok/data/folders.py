"""Images in folders and archives: where their splits lie, and which classes they have."""

from __future__ import annotations

import logging
import re
import unicodedata
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from vistok.data.captions import FolderCaptions
from vistok.data.decoding import ImageDecoder
from vistok.data.files import SPLITS, FileTree, open_tree, printable
from vistok.data.formats import image_extensions
from vistok.data.imagefiles import SHOWN, TreeFiles
from vistok.data.sources import FileSource, hash_lines
from vistok.data.tar import UNCONDITIONAL

log = logging.getLogger(__name__)

LIKE_SPLITS = re.compile(r"(?i)(?<![a-z])(train(ing)?|val(id(ation)?)?|test(ing)?|dev|eval|held.?out)(?![a-z])")
"""Names of folders that are probably splits."""


UNSEEN = ("Cf", "Zs")
"""Unicode's categories of invisible signs and of spaces."""


def accepted_layouts() -> str:
    """The layouts of folders that are read, for messages."""
    return (
        "accepted layouts: <class>/*, the same under train/, val/ or test/, or images side by side without classes; "
        f"extensions: {' '.join(image_extensions())}"
    )


class FolderSource(FileSource):
    """Images in a folder or a .zip file, read in place.

    Images lie in ``<class>/`` folders (at any depth below), or all side by side, which makes the source
    unconditional. If the folders at the root are splits (train, val, validation, test; all of the folders, or at least
    two), ``split`` picks one. A root without such folders holds training images only. Splits may lie deeper
    (``Data/CLS-LOC/train/``) if all images lie there. A zip may have one more folder around everything. Hidden files
    are ignored; a warning counts other files, and images outside the splits.

    Raises:
        FileNotFoundError: no such root, no such split, or no images.
        ValueError: images both inside and beside class folders, or a damaged archive.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        split: str | None = "train",
        decoder: ImageDecoder = ImageDecoder(),  # noqa: B008 (immutable)
    ) -> None:
        self._tree = tree = open_tree(root)
        images = tree.images()
        if not images:
            others = tree.others()
            beside = f" (but {len(others)} other files, such as {printable(others[0])})" if others else ""
            raise FileNotFoundError(f"no images in {root}{beside}; {accepted_layouts()}")
        self.prefix = "" if split is None else _split_prefix(images, split, tree)
        files = TreeFiles(tree, self.prefix)
        self.classes, labels = _label(files.paths, self.prefix, tree)
        super().__init__(files, labels, decoder)
        if files.left_out.count:
            log.warning("%s: %s", tree.root, files.left_out)

    def fingerprint(self) -> str:
        files = self.files
        return hash_lines(
            f"{files.path(index).removeprefix(self.prefix)} {files.size(index)}" for index in range(len(files))
        )

    def captions(self, index: int) -> tuple[str, ...]:
        return self._captions.of(self.files.path(index))

    @cached_property
    def _captions(self) -> FolderCaptions:
        return FolderCaptions(self._tree, self.prefix)


def _split_prefix(images: Sequence[str], split: str, tree: FileTree) -> str:
    """The folder of a split, with its slash; empty if the tree is not divided into splits."""
    divided = divided_at(images)
    if divided is None:
        _warn_of_deeper_splits(images, tree)
        if split == "train":
            return ""
        raise FileNotFoundError(
            f"{tree.root} is not divided into splits, so it has no {split!r}: put the images into train/ and {split}/, "
            "or name another folder as root with data.split=null"
        )
    found = sorted({name for name in SPLITS if any(path.startswith(f"{divided}{name}/") for path in images)})
    if split not in found:
        raise FileNotFoundError(f"{tree.root} has no images in {divided}{split}/; it has {', '.join(found)}")
    if divided:
        log.info("%s: its splits lie in %s", tree.root, divided)
    beside = [path for path in images if not path.startswith(tuple(f"{divided}{name}/" for name in found))]
    if beside:
        log.warning(
            "%s: %d images are in none of %s and are ignored, such as %s",
            tree.root,
            len(beside),
            ", ".join(found),
            printable(beside[0]),
        )
    return f"{divided}{split}/"


def divided_at(images: Sequence[str]) -> str | None:
    """The folder whose subfolders are splits, with its slash ("" is the root); None if there is none.

    The root is divided into splits if all of its folders are splits, or at least two. A deeper folder is, if at least
    two of its folders are splits and all images lie in it.
    """
    tops = {path.partition("/")[0] for path in images}
    splits = tops & set(SPLITS)
    if splits == tops or len(splits) > 1:
        return ""
    common = _common_folder(images)
    while common:
        if len({path.removeprefix(common).partition("/")[0] for path in images} & set(SPLITS)) > 1:
            return common
        common = common[:-1].rpartition("/")[0] + "/" if "/" in common[:-1] else ""
    return None


def _common_folder(images: Sequence[str]) -> str:
    """The deepest folder, with its slash, that holds all images; "" is the root."""
    parts = [path.split("/")[:-1] for path in (min(images), max(images))]
    common = []
    for one, other in zip(*parts):
        if one != other:
            break
        common.append(one)
    return "".join(f"{part}/" for part in common)


def _warn_of_deeper_splits(images: Sequence[str], tree: FileTree) -> None:
    """Warn if only a part of the images lies in splits, and name the folder that was probably meant as root."""
    below: dict[str, set[str]] = {}
    for path in images:
        folders = path.split("/")[:-1]
        depth = next((depth for depth, name in enumerate(folders) if name in SPLITS), None)
        if depth:
            below.setdefault("/".join(folders[:depth]), set()).add(folders[depth])
    for folder, splits in below.items():
        if len(splits) > 1:
            names, meant = ", ".join(sorted(splits)), printable(tree.as_root(folder))
            log.warning("%s: all of it is read; is %s meant, which has %s?", tree.root, meant, names)


def _label(files: Sequence[str], prefix: str, tree: FileTree) -> tuple[tuple[str, ...], list[int]]:
    """Class names, and the label of every file."""
    folders = [printable(path.removeprefix(prefix).rpartition("/")[0].partition("/")[0]) for path in files]
    classes = tuple(sorted(set(folders)))
    if classes == ("",):
        return (), [UNCONDITIONAL] * len(files)
    if "" in classes:
        loose = [path for path, folder in zip(files, folders, strict=True) if not folder]
        raise ValueError(
            f"{tree.root}/{prefix} holds {len(loose)} images (such as {printable(loose[0])}) beside the folders "
            f"{', '.join(classes[1:6])}; {accepted_layouts()}"
        )
    _warn_of_a_single_class(files, prefix, tree)
    _warn_of_splits_as_classes(classes, tree)
    _warn_of_classes_that_look_alike(classes, tree)
    labels = {name: label for label, name in enumerate(classes)}
    return classes, [labels[folder] for folder in folders]


def _warn_of_splits_as_classes(classes: Sequence[str], tree: FileTree) -> None:
    """Warn if the names of all classes look like splits ("train2017", "Validation", "seg_test")."""
    if len(classes) > 1 and all(LIKE_SPLITS.search(name) for name in classes):
        log.warning(
            "%s: its folders %s are read as classes; if they are splits, take one as root, or call them %s",
            tree.root,
            ", ".join(classes),
            ", ".join(SPLITS),
        )


def _warn_of_classes_that_look_alike(classes: Sequence[str], tree: FileTree) -> None:
    """Warn of classes whose names differ only in case, spaces, invisible signs or the form of their accents, as copies
    from other systems do."""
    alike: dict[str, list[str]] = {}
    for name in classes:
        seen = unicodedata.normalize("NFKC", name).casefold()
        alike.setdefault("".join(sign for sign in seen if unicodedata.category(sign) not in UNSEEN), []).append(name)
    groups = [names for names in alike.values() if len(names) > 1]
    if groups:
        log.warning(
            "%s: folders whose names look alike are classes of their own: %s; rename or merge them if they are one",
            tree.root,
            "; ".join(", ".join(map(ascii, names)) for names in groups[:SHOWN])
            + ("; …" if len(groups) > SHOWN else ""),
        )


def _warn_of_a_single_class(files: Sequence[str], prefix: str, tree: FileTree) -> None:
    """Warn if all images are of one class although they lie in several folders further below."""
    common = _common_folder(files)
    below = {path.removeprefix(common).partition("/")[0] for path in files if "/" in path.removeprefix(common)}
    if common == prefix or len(below) < 2:
        return
    if all(LIKE_SPLITS.search(name) for name in below):
        log.warning(
            "%s: all images lie in %s, so there is one class; if its folders %s are splits, take one as root, or call "
            "them %s",
            tree.root,
            printable(common),
            ", ".join(map(printable, sorted(below))),
            ", ".join(SPLITS),
        )
    else:
        log.warning(
            "%s: all images lie in %s, so there is one class; if its %d folders are the classes, take %s as root",
            tree.root,
            printable(common),
            len(below),
            printable(tree.as_root(common.rstrip("/"))),
        )

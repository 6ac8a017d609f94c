"""The pictures of the gallery: the first rows of what finished quickstarts drew.

python docs/gallery.py FOLDER …      # each written by `vistok quickstart --system NAME --out FOLDER`
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from PIL import Image

from vistok.data.sheets import enlarged

IMAGES = Path(__file__).parent / "images"
PICTURES = ("samples.png", "conversations.png", "frames.png")
HEIGHT = 285  # four rows of digits below their names
WIDTH = 500  # at least


def main(folders: list[str]) -> None:
    for folder in map(Path, folders):
        system = json.loads((folder / "result.json").read_text())["protocol"]["recipe"]["system"]
        file = next(path for path in (folder / name for name in PICTURES) if path.is_file())
        picture = Image.open(file).convert("L")
        picture = picture.crop((0, 0, picture.width, min(picture.height, HEIGHT)))
        if picture.width < WIDTH:
            picture = enlarged(picture, WIDTH // picture.width + 1)
        picture.quantize(32).save(IMAGES / f"gallery-{system}.png", optimize=True)


if __name__ == "__main__":
    main(sys.argv[1:])

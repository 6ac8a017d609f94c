"""Memory and time to read large images and crop them to 256 pixels, by format.

Each file is read in a separate process, as data sets are read: decoded, turned upright, put on white, and cropped.
Memory is the rise of the process's peak (Linux).

    python benchmarks/large_images.py
    python benchmarks/large_images.py --side 4000 --size 128
"""

from __future__ import annotations

import argparse
import tempfile
import time
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from common import finish, say
from PIL import Image

from vistok.data.decoding import ImageDecoder
from vistok.data.transforms import center_crop_adm

KINDS = {
    "jpeg": ("RGB", "jpg", {}),
    "jpeg, progressive": ("RGB", "jpg", {"progressive": True}),
    "jpeg, CMYK": ("CMYK", "jpg", {}),
    "jpeg, several pictures (MPO)": ("RGB", "mpo", {}),
    "png": ("RGB", "png", {"compress_level": 1}),
    "png, transparent": ("RGBA", "png", {"compress_level": 1}),
    "png, 16 bits": ("I;16", "png", {"compress_level": 1}),
    "webp": ("RGB", "webp", {"method": 0, "quality": 50}),
    "webp, transparent": ("RGBA", "webp", {"method": 0, "quality": 50}),
    "bmp": ("RGB", "bmp", {}),
    "gif": ("P", "gif", {}),
    "tiff": ("RGB", "tif", {}),
    "tiff, compressed": ("RGB", "tif", {"compression": "tiff_lzw"}),
    "avif": ("RGB", "avif", {"speed": 10, "quality": 30}),
}


def picture(mode: str, side: int) -> Image.Image:
    """A smooth picture with some noise, in a mode of PIL."""
    block = np.add.outer(np.arange(500), np.arange(500)) // 4 + np.random.default_rng(0).integers(0, 6, (500, 500))
    ramp = np.tile(block.astype(np.uint8), (-(-side // 500), -(-side // 500)))[:side, :side]
    if mode == "I;16":
        return Image.fromarray(ramp.astype(np.uint16) << 8)
    image = Image.fromarray(ramp)
    return image if mode == "L" else image.convert("RGB").convert(mode)


def read(file: Path, size: int) -> tuple[float, float]:
    """MiB and CPU seconds that reading a file takes; called in a separate process."""
    Image.MAX_IMAGE_PIXELS = None
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before, begin = kibibytes("VmRSS"), time.process_time()
    with file.open("rb") as opened:
        center_crop_adm(ImageDecoder(side=size).read(opened), size)
    return (kibibytes("VmHWM") - before) / 1024, time.process_time() - begin


def kibibytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=12000, help="of the images, in pixels")
    parser.add_argument("--size", type=int, default=256, help="of what they become")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS), help="which of them")
    arguments = parser.parse_args()
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.kinds:
            mode, extension, options = KINDS[name]
            file = Path(folder) / f"large.{extension}"
            picture(mode, arguments.side).save(file, **options)
            # A forked process would reuse the memory that writing the file took.
            with get_context("spawn").Pool(1) as pool:
                memory, seconds = pool.apply_async(read, (file, arguments.size)).get(timeout=300)
            file.unlink()
            say(f"{name}: {memory:,.0f} MiB, {seconds:.1f} s")
            results[name] = {"mib": round(memory), "seconds": round(seconds, 2)}
    figures = {f"{name}, {what}": value for name, found in results.items() for what, value in found.items()}
    finish("large_images", {}, {"side": arguments.side, "size": arguments.size, **figures})


if __name__ == "__main__":
    main()

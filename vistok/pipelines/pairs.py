"""Pairs for the post-training of a tokenizer: images decoded from partly generated tokens, with the real images.

RobusTok: Image Tokenizer Needs Post-Training (arXiv 2509.12474). A generator samples a sequence in which each token is
kept from the real image with probability sigma. The tokenizer's decoder then learns to make the real image of it.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vistok._version import __version__
from vistok.data.batches import Failures, ImageBatch
from vistok.data.config import DataConfig
from vistok.data.folders import FolderSource
from vistok.data.loader import Source, TooManyUnreadableError, batch_reader, check_failures, listed
from vistok.data.movies import shown
from vistok.data.opening import open_source
from vistok.data.pictures import save_png
from vistok.data.sources import Selection
from vistok.data.targets import stems
from vistok.draws import Keys
from vistok.pipelines.generation import Pipeline
from vistok.types import Condition, to_json
from vistok.utils.files import write_json
from vistok.utils.numbers import check_whole
from vistok.utils.outputs import collected
from vistok.utils.processes import ALONE, Processes
from vistok.utils.progress import track

GENERATED, REAL, RECORD = "generated", "real", "pairs.json"

log = logging.getLogger(__name__)


@torch.no_grad()
def partly_generated(
    pipe: Pipeline, pixels: Tensor, condition: Condition, sigma: float, keys: Keys, options: Any
) -> Tensor:
    """Images of the tokens of ``pixels`` (B, C, H, W), each kept with probability ``sigma`` and otherwise generated.

    Args:
        condition: the generator's condition for the images.
        sigma: the probability with which each token is kept.
        keys: of the images; each image depends only on its own key.
        options: sampling options, from ``pipe.options``.

    Returns:
        (B, C, H, W) in [-1, 1], float32 on the CPU.
    """
    tokens = pipe.tokenizer.encode(pipe.to_tokenizer(pixels), condition=pipe.own_condition(condition))
    kept = keys.uniform("kept", tokens.shape[1]) < sigma
    made = pipe.generator.sample_forced(
        tokens.to(pipe.device),
        kept.to(pipe.device),
        condition.to(pipe.device),
        options,
        draws=pipe.generator.sampling_draws(keys, options),
        tokenizer=pipe.in_loop,
    )
    return pipe.decode(made, keys, condition)


def write_pairs(
    pipe: Pipeline,
    data: DataConfig,
    out: str | Path,
    *,
    sigma: float = 0.7,
    seed: int = 0,
    batch_size: int = 64,
    sampling: Mapping[str, Any] | None = None,
    resume: bool = False,
    processes: Processes = ALONE,
) -> dict[str, Any]:
    """Make a pair of every image of ``data``: out/generated/NAME.png of partly generated tokens, and out/real/NAME.png.

    Images are read without augmentation, as for evaluation. NAME is the file's name, or the image's index if the source
    has no files. A pair depends on the seed and the image's index in the source, not on batches and processes. Until
    all pairs are made they lie in ``OUT.unfinished/``, where ``resume`` continues; out/pairs.json records the settings.

    Args:
        sigma: share of the tokens that are kept, in [0, 1]; RobusTok uses 0.7.
        sampling: options that differ from the pipeline's.
        resume: keep the pairs that an unfinished run has written.
        processes: the processes that share the work; each makes this call with the same arguments.

    Returns:
        the content of pairs.json.

    Raises:
        FileExistsError: ``out`` is not empty; or ``OUT.unfinished`` exists and ``resume`` is False.
        ResumeError: there is nothing to resume, or it was made with other settings.
        FolderInUseError: another process writes ``out``.
        TooManyUnreadableError: more than 1 % of the images cannot be read.
        ValueError: sigma is out of range, images differ from the pipeline's in size or classes, two files have one
            name, or the generator cannot keep given tokens while it samples.
    """
    out = Path(out)
    if not 0 <= sigma <= 1:
        raise ValueError(f"sigma is the share of tokens that are kept and must lie in [0, 1], got {sigma}")
    check_whole("batch_size", batch_size, least=1)
    pipe.tokenizer.check_renders("making pairs")
    pipe.tokenizer.image_shape("making pairs")
    pipe.tokenizer.spec_for(data.input_shape)
    source, options = open_source(data), pipe.options(**(sampling or {}))
    _check_classes(pipe, source.classes)
    settings = {
        "sigma": sigma,
        "seed": seed,
        "images": len(source),
        "source": source.fingerprint(),
        **{name: getattr(data, name) for name in ("image_size", "channels", "reading", "crop")},
        "options": to_json(dataclasses.asdict(options)),
        "tokenizer": pipe.tokenizer.fingerprint(),
        "generator": pipe.generator.fingerprint(),
    }
    names = pair_names(source)
    with collected(out, settings, resume=resume, processes=processes, hopeless=TooManyUnreadableError) as folder:
        writer = _Writer(pipe, source, data, names, folder, sigma=sigma, seed=seed, options=options)
        ranges = writer.missing(batch_size, processes)
        for start, stop in track(ranges, f"{len(source):,} pairs", len(ranges)):
            writer.write(start, stop)
        failures = {key: why for part in processes.gather(writer.failures) for key, why in part.items()}
        check_failures(failures, len(source))
        record = settings | {"unreadable": sorted(failures.values()), "vistok_version": __version__}
        if processes.is_first:
            if failures:
                log.warning("%d images could not be read and have no pair:\n%s", len(failures), listed(failures))
            write_json(folder / RECORD, record)
    return record


class _Writer:
    """Writes pairs, a range of images at a time."""

    def __init__(
        self,
        pipe: Pipeline,
        source: Source,
        data: DataConfig,
        names: Sequence[str],
        folder: Path,
        *,
        sigma: float,
        seed: int,
        options: Any,
    ) -> None:
        self.pipe, self.source, self.names, self.folder = pipe, source, names, folder
        self.sigma, self.seed, self.options = sigma, seed, options
        self.reader = batch_reader(source, data, augmented=False)
        self.failures: Failures = {}

    def file(self, kind: str, index: int) -> Path:
        return self.folder / kind / f"{self.names[index]}.png"

    def missing(self, batch_size: int, processes: Processes) -> list[tuple[int, int]]:
        """The ranges of images that this process has to write."""
        ranges = processes.ranges(len(self.names), batch_size)
        return [part for part in ranges if not all(self.file(GENERATED, index).exists() for index in range(*part))]

    def write(self, start: int, stop: int) -> None:
        batch, failures = self.reader.load(np.arange(start, stop), 0)
        self.failures |= failures
        if not len(batch.indices):
            return
        keys, condition = Keys.of(self.seed, batch.indices), self._condition(batch)
        made = partly_generated(self.pipe, batch.pixels, condition, self.sigma, keys, self.options)
        for kind, pixels in ((REAL, batch.pixels), (GENERATED, made)):  # written last: its file marks a complete pair
            for index, image in zip(batch.indices.tolist(), shown(pixels), strict=True):
                file = self.file(kind, index)
                file.parent.mkdir(parents=True, exist_ok=True)
                save_png(image, file)

    def _condition(self, batch: ImageBatch) -> Condition:
        """The generator's condition for the images: their classes and first captions, as far as it takes them."""
        taken, given = self.pipe.generator.condition_spec.parts, []
        if "labels" in taken:
            given.append(Condition.from_labels(batch.labels))
        if self.pipe.text.parts:
            captions = (self.source.captions(index) for index in batch.indices.tolist())
            given.append(self.pipe.text.condition([next(iter(texts), None) for texts in captions]))
        condition = Condition.together(*given) if given else Condition.none(len(batch.indices))
        self.pipe.generator.check_condition(condition)
        return condition


def pair_names(source: Source) -> list[str]:
    """The name of each image's pair: the file's path in the source without its suffix, or the image's index.

    Raises:
        ValueError: two files differ in their suffixes only.
    """
    if isinstance(source, Selection):
        names = pair_names(source.source)
        return [names[index] for index in source.indices]
    if not isinstance(source, FolderSource):
        return [f"{index:08d}" for index in range(len(source))]
    names, seen = stems(source), set()
    for name in names:
        if name in seen:
            raise ValueError(f"two images are called {name} and differ in their endings only: pairs go by that name")
        seen.add(name)
    return names


def _check_classes(pipe: Pipeline, classes: Sequence[str]) -> None:
    """Raise ValueError if the data's classes are not those of the pipeline."""
    known = pipe.class_names
    if pipe.generator.num_classes and known and classes and tuple(classes) != tuple(known):
        foreign = sorted(set(classes) ^ set(known))
        raise ValueError(
            f"the images have other classes than the generator was trained on "
            f"({', '.join(foreign[:3]) or 'in another order'}), so their labels mean something else; take images of "
            "the same classes"
        )

"""The two stages that the loop trains: images to a tokenizer, cached tokens to a generator."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from vistok.checkpoints import Model
from vistok.config import ConfigError, check
from vistok.data.config import DataConfig
from vistok.data.loader import ImageBatch, ImageBatches, Loader, check_failures, evaluation_loader, training_loader
from vistok.data.opening import open_source
from vistok.data.overlap import shared_images
from vistok.data.pictures import comparison, grid
from vistok.data.sources import ImageSource
from vistok.data.tokens import TokenBatch, TokenCache, TokenMixture, token_evaluation_loader, token_loader
from vistok.data.transforms import ImageTransform
from vistok.draws import Draws, Keys, draws_on
from vistok.generators.base import Generator
from vistok.losses import adaptive_weight
from vistok.pipelines import Pipeline
from vistok.pipelines.folders import GENERATOR, TOKENIZER, load_tokenizer, write_settings
from vistok.text import TEXT, copy_encoders
from vistok.tokenizers.base import Tokenizer
from vistok.train.adversary import Adversary
from vistok.train.config import RunConfig
from vistok.train.monitor import CodebookWatch, CodeUsage
from vistok.train.objectives import TokenizerObjective, gan_config
from vistok.types import ConditionSpec, GeneratorOutput, TokenizerOutput, TokenSpec, to_json

log = logging.getLogger(__name__)

STANDARDISED_ON = 256
"""Images that the mean and the scale of continuous latents are measured on."""


class Stage(ABC):
    """One stage: its model, its data, and what one batch contributes.

    Attributes:
        model: the bare model, on the CPU until the loop moves it.
        loader: batches of this process.
        held_out: batches to validate on, or None.
        objective: modules that the loss needs (LPIPS), for the loop to move to the device; or None.
        adversary: the second player of a GAN, or None.
        usage: which codes a tokenizer chose since the last log row, or None.
        watch: notices a dying codebook, or None.
        unit: what throughput counts.
    """

    model: Model
    loader: Loader
    held_out: Loader | None = None
    objective: nn.Module | None = None
    adversary: Adversary | None = None
    usage: CodeUsage | None = None
    watch: CodebookWatch | None = None
    unit: str

    @abstractmethod
    def losses(self, model: nn.Module, batch: Any, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss to minimise and scalar terms to log. ``model`` is the wrapped model of the loop."""

    def adversary_losses(self, adversary: nn.Module, step: int) -> dict[str, Tensor]:
        """The second player's terms on the batch that ``losses`` saw last; "d_loss" is minimised."""
        return {}

    @torch.no_grad()
    def validate(self, model: Model, step: int, stopping: Callable[[], bool]) -> dict[str, float]:
        """Means over the held-out samples, as "val_loss", ...; the draws are those of every time before. Nothing if
        the run is ``stopping`` before all are measured."""
        device, totals, count = next(model.parameters()).device, {}, 0
        self.held_out.epoch = 0  # of a token cache with several views, the same ones
        for number, batch in enumerate(self.held_out):
            if stopping():
                return {}
            batch = on_device(batch, device)
            for name, value in self._held_out_terms(model, batch, step, number).items():
                totals[name] = totals.get(name, 0) + value.float() * len(batch.indices)
            count += len(batch.indices)
        return {f"val_{name}": (total / count).item() for name, total in totals.items()}

    @abstractmethod
    def _held_out_terms(self, model: Model, batch: Any, step: int, number: int) -> dict[str, Tensor]:
        """Means over one batch, "loss" among them; it is batch ``number`` of the held-out ones."""

    def dead_worker(self) -> str | None:
        """After an error: which process that reads data died of what, or None."""
        loaders = [loader for loader in (self.loader, self.held_out) if loader is not None]
        return next(filter(None, (loader.dead_worker() for loader in loaders)), None)

    @abstractmethod
    def window_metrics(self) -> dict[str, Tensor]:
        """Metrics that only make sense over a whole logging window."""

    def warning(self, step: int, row: dict[str, float]) -> str | None:
        """What the log row of ``step`` should make a user do something about."""
        return None

    @abstractmethod
    def count(self, batch: Any) -> int:
        """How many units of throughput a batch is."""

    @abstractmethod
    def sample_name(self, index: int) -> str:
        """What to call a sample in a message: its file, or where it lies in the cache."""

    @abstractmethod
    def picture(self, model: Model) -> Image.Image:
        """A picture of what the model can do now."""

    @abstractmethod
    def export(self, folder: Path, model: Model) -> None:
        """Write what users load into the run folder."""


class TokenizerStage(Stage):
    """Reconstruct images; see ``TokenizerObjective`` and ``Adversary``."""

    unit = "images_per_second"

    def __init__(self, config: RunConfig, rank: int, world_size: int):
        source = open_source(config.data)
        self.model: Tokenizer = config.build_model(config.model_entry().load().arguments_from(config.data))
        self.objective = TokenizerObjective(self.model, config.losses)
        self.gan = gan_config(self.model, config.losses)
        self.adversary = Adversary(self.gan, self.model.input_shape) if self.gan else None
        self.loader = training_loader(source, config.data, rank=rank, world_size=world_size)
        self.held_out = _held_out_images(config, source)
        self.seed = config.seed
        self.usage = CodeUsage(self.model.spec.codebook_size) if self.model.spec.discrete else None
        self.watch = _codebook_watch(self.model, config, world_size)
        self._source, self._data = source, config.data
        self._examples = example_images(source, config.data)
        self._seen: tuple[Tensor, Tensor] | None = None

    def losses(self, model: nn.Module, batch: ImageBatch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        pixels, output = batch.pixels, self._output(model, batch, step, draws_of=step)
        terms = self.objective(output, pixels)
        total = self.objective.total(terms)
        if self.usage is not None:
            self.usage.add(output.tokens)
        if self.adversary is not None and step >= self.gan.start_step:
            fake = self.model.to_native(output.reconstruction)
            terms["g_loss"] = self.adversary.fool(fake)
            total = total + self._gan_weight(terms) * terms["g_loss"]
            self._seen = (self.model.to_native(pixels), fake.detach())
        terms = {name: value.detach() for name, value in terms.items()}
        return total, {"loss": total.detach()} | terms | _psnr_of(output, pixels)

    def _output(self, model: nn.Module, batch: ImageBatch, step: int, *, draws_of: int) -> TokenizerOutput:
        draws = self.model.training_draws(Keys.of(self.seed, batch.indices, draws_of))
        return model(batch.pixels, step=step, draws=draws_on(draws, batch.pixels.device))

    def _held_out_terms(self, model: Tokenizer, batch: ImageBatch, step: int, number: int) -> dict[str, Tensor]:
        output = self._output(model, batch, step, draws_of=0)  # each image has draws of its own, in whichever batch
        terms = self.objective(output, batch.pixels)
        return {"loss": self.objective.total(terms)} | terms | _psnr_of(output, batch.pixels)

    def _gan_weight(self, terms: dict[str, Tensor]) -> Tensor | float:
        if self.gan.balance == "fixed":
            return self.gan.weight
        reconstruction = self.objective.reconstruction_total(terms)
        return self.gan.weight * adaptive_weight(reconstruction, terms["g_loss"], self.model.last_layer)

    def adversary_losses(self, adversary: nn.Module, step: int) -> dict[str, Tensor]:
        if self._seen is None:
            return {}
        (real, fake), self._seen = self._seen, None
        return adversary(real, fake, step)

    def window_metrics(self) -> dict[str, Tensor]:
        return self.usage.read() if self.usage is not None else {}

    def warning(self, step: int, row: dict[str, float]) -> str | None:
        return self.watch.update(step, row["codebook_usage"]) if self.usage is not None else None

    def count(self, batch: ImageBatch) -> int:
        return len(batch.pixels)

    def sample_name(self, index: int) -> str:
        return self._source.name(index)

    def picture(self, model: Tokenizer) -> Image.Image:
        """Originals over reconstructions."""
        examples = self._examples.to(next(model.parameters()).device)
        return comparison(examples, model.reconstruct(examples))

    def export(self, folder: Path, model: Tokenizer) -> None:
        if not model.spec.discrete:
            device = next(model.parameters()).device
            model.standardise(example_images(self._source, self._data, STANDARDISED_ON).to(device))
        model.save_pretrained(folder / TOKENIZER)


class GeneratorStage(Stage):
    """Predict cached tokens, given their class labels if there are any."""

    unit = "tokens_per_second"

    def __init__(self, config: RunConfig, rank: int, world_size: int):
        folders = [config.tokens] if isinstance(config.tokens, str) else config.tokens
        cache = TokenMixture([TokenCache(folder) for folder in folders], config.token_weights)
        self.tokenizer = load_tokenizer(cache.folder)
        cache.check_tokenizer(self.tokenizer.fingerprint())
        condition = _chosen_parts(cache, config.condition)
        self.classes = cache.classes if "labels" in condition.parts else ()
        spec = TokenSpec(**cache.spec)
        derived = config.model_entry().load().condition_arguments(condition)
        self.model: Generator = config.build_model({"spec": to_json(spec), **derived})
        check(self.model.options_type, config.sampling, "sampling")
        self.sampling, self.seed, self.length = config.sampling, config.seed, spec.length
        self.cache_folder = cache.folder
        self.loader = token_loader(
            cache,
            config.training.batch_size,
            seed=config.seed,
            rank=rank,
            world_size=world_size,
            parts=condition.parts,
        )
        self.held_out = _held_out_tokens(config, cache, condition.parts)

    def losses(self, model: nn.Module, batch: TokenBatch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        output = self._output(model, batch, self._draws(batch, step))
        return output.loss, {"loss": output.loss.detach()} | output.metrics

    def _draws(self, batch: TokenBatch, step: int) -> Draws:
        return self.model.training_draws(Keys.of(self.seed, batch.indices, step))

    def _output(self, model: nn.Module, batch: TokenBatch, draws: Draws) -> GeneratorOutput:
        return model(batch.tokens, batch.condition, draws=draws_on(draws, batch.tokens.device))

    def _held_out_terms(self, model: Generator, batch: TokenBatch, step: int, number: int) -> dict[str, Tensor]:
        draws = self._draws(batch, number)  # of which some may be one for the whole batch: MAR's share of masks
        draws.pop("drop", None)  # classes stay
        output = self._output(model, batch, draws)
        return {"loss": output.loss} | output.metrics

    def window_metrics(self) -> dict[str, Tensor]:
        return {}

    def count(self, batch: TokenBatch) -> int:
        return len(batch.tokens) * self.length

    def sample_name(self, index: int) -> str:
        return f"{self.cache_folder}[{index}]"

    def pipeline(self, model: Generator) -> Pipeline:
        return Pipeline(self.tokenizer, model, class_names=self.classes, sampling=self.sampling)

    def picture(self, model: Generator) -> Image.Image:
        """Samples, one row per class of the first eight, or per sample of the cache whose condition it has."""
        rows, columns = min(len(self.classes), 8) or 4, 8
        reader = self.loader.reader
        if reader.parts == ("labels",):
            what = {"class_labels": range(rows), "num_images_per_label": columns}
        elif reader.parts:
            shown = np.arange(rows) * len(reader) // rows
            what = {"condition": reader.load(shown, 0)[0].condition, "num_images_per_label": columns}
        else:
            what = {"num_images": rows * columns}
        pipe = self.pipeline(model)
        self.tokenizer.to(pipe.device)
        try:
            images = pipe(**what, seed=self.seed).images
        finally:
            self.tokenizer.to("cpu")  # training needs the memory
        return grid(images, columns=columns)

    def export(self, folder: Path, model: Generator) -> None:
        model.save_pretrained(folder / GENERATOR)
        if not (folder / TOKENIZER).exists():
            self.tokenizer.save_pretrained(folder / TOKENIZER)
        if not (folder / TEXT).exists():
            copy_encoders(self.cache_folder / TEXT, folder / TEXT, self.loader.reader.parts)
        write_settings(folder, class_names=self.classes, sampling=self.sampling)


def _codebook_watch(tokenizer: Tokenizer, config: RunConfig, world_size: int) -> CodebookWatch | None:
    """Only discrete tokenizers have a codebook; the remedies are those that this one offers and does not use yet."""
    if not tokenizer.spec.discrete:
        return None
    training, size = config.training, tokenizer.spec.codebook_size
    images = config.data.batch_size * world_size * training.gradient_accumulation_steps * max(training.log_every, 1)
    possible = 1 - (1 - 1 / size) ** (images * tokenizer.spec.length * tokenizer.spec.depth)
    arguments, remedies = tokenizer.config, []
    if arguments.get("codebook_restart_after") == 0:
        remedies.append("restart dead codes (model.codebook_restart_after=100)")
    if arguments.get("codebook_l2_norm") is False:
        remedies.append("compare normalised codes (model.codebook_l2_norm=true)")
    if "entropy_temperature" in arguments and not config.losses.get("entropy"):
        remedies.append("an entropy loss (model.entropy_temperature=0.01 losses.entropy=0.1)")
    return CodebookWatch(possible, remedies)


def on_device(batch: Any, device: torch.device) -> Any:
    """The batch on the device, but for its indices: the host reads them, and would wait for the device."""
    moved = type(batch)(*(part.to(device, non_blocking=True) for part in batch))
    return moved._replace(indices=batch.indices)


def _psnr_of(output: TokenizerOutput, target: Tensor) -> dict[str, Tensor]:
    """Of tokenizers whose training reconstructs."""
    return {} if output.reconstruction is None else {"psnr": psnr(output.reconstruction.detach(), target)}


def psnr(reconstruction: Tensor, target: Tensor) -> Tensor:
    """Mean over images of the PSNR in dB, for pixels in [-1, 1]; the reconstruction is clamped."""
    error = (reconstruction.clamp(-1, 1) - target).square().flatten(1).mean(1)
    return (10 * torch.log10(4 / error.clamp_min(1e-12))).mean()


def _held_out_images(config: RunConfig, trained: ImageSource) -> Loader[ImageBatch] | None:
    if config.validation is None:
        return None
    changed = asdict(config.data) | config.validation.data
    values = check(DataConfig, changed, "validation.data")
    try:
        data = DataConfig(**values)
        source = open_source(data)
    except (ValueError, OSError) as error:
        error.add_note("This is about the held-out images, whose keys are below validation.data.")
        raise
    for key in ("image_size", "channels"):
        asked, own = getattr(data, key), getattr(config.data, key)
        if asked != own:
            raise ConfigError(f"validation.data.{key} is {asked}, but the run's images have {own}; leave the key out")
    if all(getattr(data, key) == getattr(config.data, key) for key in ("source", "root", "name", "split")):
        raise ConfigError("validation.data names the images that the run trains on; name others: split=test, or a root")
    shared = shared_images(trained, source)
    if shared.found == shared.looked_at:
        raise ConfigError(
            "validation.data names the images that the run trains on, by another name or in a copy "
            f"(such as {shared.example}); name others: split=test, or a root"
        )
    if shared.found:
        log.warning("%s", shared)
    return evaluation_loader(source, data)


def _chosen_parts(cache: TokenMixture, chosen: Sequence[str] | None) -> ConditionSpec:
    """What a generator of these tokens is conditioned on: all that they are, or the chosen parts of it."""
    parts = cache.condition_spec.parts if chosen is None else chosen
    missing = [part for part in parts if part not in cache.condition_spec.parts]
    if missing:
        raise ConfigError(
            f"condition names {missing[0]!r}, but {cache.folder} has {' and '.join(cache.condition_spec.parts) or 'no'}"
            " conditions; `vistok tokenize` makes ids and features of captions"
        )
    return cache.condition_spec.only(parts)


def _held_out_tokens(config: RunConfig, trained: TokenMixture, parts: Sequence[str]) -> Loader[TokenBatch] | None:
    if config.validation is None:
        return None
    cache = TokenCache(config.validation.tokens)
    cache.check_tokenizer(trained.tokenizer_hash)
    if cache.classes != trained.classes:
        differing = sorted(set(cache.classes) ^ set(trained.classes))
        raise ConfigError(
            f"validation.tokens: {cache.folder} has other classes than {trained.folder} "
            f"({', '.join(differing[:3]) or 'in another order'}), so its labels mean something else"
        )
    texts = [(c.condition_spec.only(parts), {part: c.text.get(part) for part in parts}) for c in (cache, trained)]
    if texts[0] != texts[1]:
        raise ConfigError(
            f"validation.tokens: {cache.folder} is not conditioned as {trained.folder} is: by other parts, or by texts "
            "of another encoder"
        )
    if any(_of_the_same_images(cache, other) for other in trained.caches):
        raise ConfigError(
            f"validation.tokens: {cache.folder} holds the images that the run trains on; make a cache of others: "
            "vistok tokenize … data.split=test"
        )
    return token_evaluation_loader(cache, config.training.batch_size, seed=config.seed, parts=parts)


def _of_the_same_images(one: TokenCache, other: TokenCache) -> bool:
    """As far as can be seen: imported caches do not say which images they are of."""
    known = one.source_fingerprint == other.source_fingerprint != ""
    return one.folder.samefile(other.folder) or (known and torch.equal(one.labels, other.labels))


def forever(loader: Loader) -> Iterator[Any]:
    """One epoch after another."""
    while True:
        yield from loader


def example_images(source: ImageSource, data: DataConfig, count: int = 8) -> Tensor:
    """A few images, evenly spread over the source, as evaluation sees them: (at most ``count``, C, H, W) in [-1, 1].

    Of each of ``count`` equal parts of the source it is the first image that can be read.

    Raises:
        TooManyUnreadableError: the ones that cannot be read are more than 1 % of the source.
    """
    reader = ImageBatches(source, ImageTransform(data.image_size, data.crop).without_augmentation())
    count, pixels, failures = min(count, len(source)), [], {}
    for part in range(count):
        for index in range(part * len(source) // count, (part + 1) * len(source) // count):
            batch, failed = reader.load(np.array([index]), epoch=0)
            failures |= failed
            if not failed:
                pixels.append(batch.pixels)
                break
    check_failures(failures, len(source))
    return torch.cat(pixels)


STAGES = {"tokenizer": TokenizerStage, "generator": GeneratorStage}

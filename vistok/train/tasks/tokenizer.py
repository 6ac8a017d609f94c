"""The task of tokenizers: reconstruct images."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, ClassVar, cast

from PIL import Image
from torch import Tensor, nn
from torch.profiler import record_function

from vistok.checkpoints.bounds import OversizedError, construct
from vistok.data.batches import ImageBatch
from vistok.data.config import DataConfig
from vistok.data.loader import Source, training_loader
from vistok.data.movies import compared, overview
from vistok.data.opening import open_source
from vistok.draws import Draws, Keys, draws_on
from vistok.losses import adaptive_weight
from vistok.pipelines.folders import TOKENIZER
from vistok.pipelines.texts import TextConfig
from vistok.quantizers.named import QUANTIZERS
from vistok.quantizers.perturbation import perturbation_draws
from vistok.signatures import ConfigError, KeysOf, build
from vistok.tokenizers.base import Tokenizer
from vistok.train.checkpoints import check_alike
from vistok.train.config import MODEL, PlayerConfig, RunConfig
from vistok.train.monitor import CodebookMonitor, CodebookWatch, expected_usage
from vistok.train.tasks.adversary import Adversary, GanConfig
from vistok.train.tasks.base import Learner, Task, Turn, on_device
from vistok.train.tasks.images import example_batch, held_out_images, psnr
from vistok.train.tasks.objective import SETTING_TYPES, TERMS, TokenizerObjective
from vistok.train.tasks.perturbation import LatentPerturbation, PerturbationConfig
from vistok.train.tasks.text_conditions import text_guide, text_of
from vistok.types import Clock, Condition, TokenizerOutput

ADVERSARY = "adversary"
STANDARDISED_ON = 256
"""The number of images on which the mean and the scale of continuous latents are measured."""


def loss_keys(section: Mapping[str, Any]) -> dict[str, Any]:
    """The types of the keys in a ``losses`` section, except for the tokenizer's own terms."""
    return {"gan": GanConfig, **SETTING_TYPES} | {name: kind.config_type for name, kind in TERMS.items()}


@dataclass(frozen=True)
class TokenizerRun(RunConfig):
    """The config of a tokenizer's run.

    Attributes:
        losses: by the name of a term, its weight or section (see ``TokenizerObjective``); ``gan`` is the adversary's.
        data: the images.
        perturbation: replaces tokens with near codes in training (see ``PerturbationConfig``); None is off.
        decoder_only: also freezes all parameters that tokens depend on, so that the tokenizer still makes the tokens
            that generators were trained on.
        text: how captions become conditions, for a tokenizer that decodes with texts; None reads no captions.
    """

    needed = "data"
    kind = "tokenizer"

    losses: Annotated[dict[str, Any], KeysOf(loss_keys)] = field(default_factory=dict)
    data: DataConfig | None = None
    perturbation: PerturbationConfig | None = None
    decoder_only: bool = False
    text: TextConfig | None = None

    def check_sections(self) -> None:
        super().check_sections()
        if self.decoder_only and not self.sources:
            raise ConfigError(
                "decoder_only leaves all that tokens depend on as it is: name the run that it comes from with init_from"
            )
        if not self.losses:
            raise ConfigError("losses is empty; give at least one weight, for example losses.l2=1.0")


class TokenizerLearner(Learner):
    """A tokenizer and its objective; ``perturbation``, if given, replaces its tokens with near codes."""

    model: Tokenizer

    def __init__(self, model: Tokenizer, objective: TokenizerObjective, perturbation: LatentPerturbation | None = None):
        super().__init__(model)
        self.objective, self.perturbation = objective, perturbation

    def forward(
        self,
        pixels: Tensor,
        target: Tensor | None,
        clock: Clock,
        draws: Draws,
        labels: Tensor | None = None,
        condition: Condition | None = None,
    ) -> tuple[TokenizerOutput, dict[str, Tensor]]:
        """The tokenizer's output for pixels (B, C, H, W), or clips, and the unweighted terms of its objective.

        Args:
            target: the pixels to reconstruct; None if they are ``pixels``.
            labels: (B,) classes, -1 where there is none.
            condition: of the images, for a tokenizer that reads one.
        """
        if self.perturbation is not None:
            self.perturbation.set(self.model, clock)
        output = self.model(pixels, condition=condition, target=target, clock=clock, draws=draws)
        if self.objective.reads_codes(clock.step):
            output.features["codes"] = self.model.codes()
        if self.objective.reads_labels(clock.step):
            output.features["labels"] = labels
        return output, self.objective(output, pixels if target is None else target, clock, draws, self.model)

    def training_draws(self, keys: Keys) -> Draws:
        draws = self.model.training_draws(keys) | self.objective.training_draws(keys)
        return draws if self.perturbation is None else draws | perturbation_draws(keys, self.model.spec.length)


class TokenizerTask(Task):
    """Reconstruct images; see ``TokenizerObjective`` and ``Adversary``."""

    config_type = TokenizerRun
    metric_prefixes: ClassVar[Mapping[str, str]] = {MODEL: "", ADVERSARY: "d_"}
    config: TokenizerRun
    learner: TokenizerLearner
    unit = "images_per_second"

    def __init__(self, config: TokenizerRun, rank: int, world_size: int):
        if config.data is None:
            raise ConfigError("task tokenizer needs 'data'")
        source = open_source(config.data)
        model = config.build_model(config.model_entry().load().arguments_from(config.data))
        self.config, self.data, self.seed = config, config.data, config.seed
        perturbation = LatentPerturbation(config.perturbation, model) if config.perturbation else None
        objective = TokenizerObjective(model, config.losses)
        objective.prepare(source.classes)
        self.learner = TokenizerLearner(model, objective, perturbation)
        self.gan = gan_config(model, config.losses)
        self.adversary = _adversary(self.gan, model) if self.gan else None
        self.loader = training_loader(source, self.data, rank=rank, world_size=world_size)
        changes = None if config.validation is None else config.validation.data
        self.held_out = held_out_images(self.data, source, changes)
        self.codebook = CodebookMonitor(model.spec.codebook_size, _codebook_watch(model, config, world_size))
        begins = {self.gan.start_step} if self.gan else set()
        self.objective_changes = tuple(sorted(begins | self.learner.objective.changes))
        self.changing_parameters = self.learner.objective.changing_parameters
        self._source = source
        self._examples = example_batch(source, self.data)
        self._text = text_guide(config.text, model, self.data)

    @property
    def model(self) -> Tokenizer:
        return self.learner.model

    @property
    def freeze(self) -> tuple[str, ...]:
        if not self.config.decoder_only:
            return self.config.freeze
        self.model.check_renders("decoder_only")
        names = self.learner.parameters_by_name()
        present = [p for p in self.model.encoding_parts if any(fnmatchcase(name, p) for name in names)]
        return (*self.config.freeze, *present)

    def players(self) -> dict[str, nn.Module]:
        return super().players() | ({ADVERSARY: self.adversary} if self.adversary is not None else {})

    def player_config(self, name: str) -> PlayerConfig:
        if name == ADVERSARY and self.gan is not None and self.gan.lr:
            return self.config.player(name, lr=self.gan.lr)
        return self.config.player(name)

    def frozen(self) -> dict[str, nn.Module]:
        parts = dict(self.learner.objective.frozen())
        if self.adversary is not None:
            parts |= self.adversary.frozen()
        if self._text is not None:
            parts["text_encoder"] = self._text.network
        return parts

    @property
    def complete_from(self) -> int:
        return max(self.learner.objective.complete_from, self.gan.start_step if self.gan else 0)

    def check_sharding(self) -> None:
        if self.gan is not None and self.gan.balance == "adaptive":
            raise ConfigError("losses.gan.balance=adaptive reads a whole weight, which FSDP2 shards; use fixed, or DDP")

    def losses(self, players: Mapping[str, nn.Module], batch: ImageBatch, clock: Clock) -> Iterator[Turn]:
        keys = Keys.of(self.seed, batch.indices, clock.step).on(batch.pixels.device)
        output, terms = self._output(players[MODEL], batch, clock, keys, self._source)
        self.codebook.add(output.tokens)
        if self.gan is None or clock.step < self.gan.start_step:
            yield self._model_turn(output, terms, batch)
            return
        reconstruction = cast(Tensor, output.reconstruction)  # a GAN has one
        real, fake = self.model.to_native(_target(batch)), self.model.to_native(reconstruction)
        learns = (clock.step - self.gan.start_step) % self.gan.every_n_steps == 0
        if learns and self.gan.order == "adversary_first":
            yield self._adversary_turn(players, real, fake, keys)
        yield self._model_turn(output, terms, batch, (fake, keys))
        if learns and self.gan.order == "model_first":
            yield self._adversary_turn(players, real, fake, keys)

    def _output(
        self, learner: nn.Module, batch: ImageBatch, clock: Clock, keys: Keys, source: Source
    ) -> tuple[TokenizerOutput, dict[str, Tensor]]:
        """The learner's output for a batch from ``source``."""
        with record_function("draws"):
            draws = draws_on(self.learner.training_draws(keys), batch.pixels.device)
        return learner(batch.pixels, batch.target, clock, draws, batch.labels, self._condition(batch, keys, source))

    def _condition(self, batch: ImageBatch, keys: Keys, source: Source) -> Condition | None:
        return None if self._text is None else text_of(batch, self._text.reader(source), keys)

    def _model_turn(
        self,
        output: TokenizerOutput,
        terms: dict[str, Tensor],
        batch: ImageBatch,
        shown: tuple[Tensor, Keys] | None = None,
    ) -> Turn:
        """The learner's turn; ``shown`` are the images for the adversary and their keys, if it takes part."""
        total = self.learner.objective.total(terms)
        if shown is not None and self.adversary is not None and self.gan is not None:
            g_loss = self.adversary.generator_loss(*shown)
            total = total + self._gan_weight(self.gan, terms, g_loss) * g_loss
            terms = terms | {"g_loss": g_loss}
        logged = {name: value.detach() for name, value in terms.items()}
        return Turn(MODEL, total, {"loss": total.detach()} | logged | _psnr_of(output, _target(batch)))

    def _gan_weight(self, gan: GanConfig, terms: Mapping[str, Tensor], g_loss: Tensor) -> Tensor | float:
        if gan.balance == "fixed":
            return gan.weight
        reconstruction = self.learner.objective.reconstruction_total(terms)
        return gan.weight * adaptive_weight(reconstruction, g_loss, self.model.last_layer)

    def _adversary_turn(self, players: Mapping[str, nn.Module], real: Tensor, fake: Tensor, keys: Keys) -> Turn:
        terms = players[ADVERSARY](real, fake.detach(), keys)
        return Turn(ADVERSARY, terms["d_loss"], terms)

    def _held_out_terms(
        self, learner: TokenizerLearner, batch: ImageBatch, clock: Clock, number: int
    ) -> dict[str, Tensor]:
        # The draws of an image do not depend on its batch.
        keys = Keys.of(self.seed, batch.indices, 0).on(batch.pixels.device)
        output, terms = self._output(learner, batch, clock, keys, cast(Any, self.held_out.reader).source)
        return {"loss": learner.objective.total(terms)} | terms | _psnr_of(output, _target(batch))

    def window_metrics(self) -> dict[str, Tensor]:
        return self.codebook.read()

    def warning(self, step: int, row: dict[str, float]) -> str | None:
        return self.codebook.warning(step, row)

    def state_dict(self) -> dict[str, Any]:
        return {"codebook": self.codebook.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any], *, first_process: bool) -> None:
        check_alike(state["codebook"], self.codebook.state_dict(), "counts of codes")
        self.codebook.load_state_dict(state["codebook"], first_process=first_process)

    def count(self, batch: ImageBatch) -> int:
        return len(batch.pixels)

    def sample_name(self, index: int) -> str:
        return self._source.name(index)

    def show(self, batch: ImageBatch) -> Tensor:
        return batch.pixels

    def examples(self, count: int) -> Tensor:
        return example_batch(self._source, self.data, count).pixels

    def pictures(self, model: Tokenizer) -> list[Image.Image]:
        """A picture of originals above their reconstructions; of originals alone if the tokenizer renders no pixels."""
        if not model.renders:
            return [overview(self._examples.pixels)]
        examples = on_device(self._examples, model.device)
        condition = self._condition(examples, Keys.of(self.seed, examples.indices, 0), self._source)
        return [compared(examples.pixels, model.reconstruct(examples.pixels, condition=condition))]

    def export(self, folder: Path, model: Tokenizer) -> None:
        if not model.spec.discrete:
            examples = example_batch(self._source, self.data, STANDARDISED_ON)
            model.standardise(examples.pixels.to(model.device))
        model.save_pretrained(folder / TOKENIZER)


def gan_config(tokenizer: Tokenizer, losses: Mapping[str, Any]) -> GanConfig | None:
    """The ``gan`` section of ``losses``, or None. Raises ConfigError if the tokenizer cannot have one."""
    section = losses.get("gan")
    if section is None:
        return None
    if not tokenizer.reconstructs:
        raise ConfigError(
            f"losses.gan: {type(tokenizer).__name__} is not trained through its pixels, a GAN has no input"
        )
    return build(GanConfig, section, "losses.gan")


def _codebook_watch(tokenizer: Tokenizer, config: TokenizerRun, world_size: int) -> CodebookWatch | None:
    """Watches the codebook of a discrete tokenizer; None for a continuous one."""
    if not tokenizer.spec.discrete or config.data is None:
        return None
    training, size = config.training, tokenizer.spec.num_ids
    images = config.data.batch_size * world_size * training.gradient_accumulation_steps * max(training.log_every, 1)
    possible = expected_usage(size, images * tokenizer.spec.length * tokenizer.spec.depth)
    return CodebookWatch(possible, _remedies(tokenizer, config.losses))


def _remedies(tokenizer: Tokenizer, losses: Mapping[str, Any]) -> list[str]:
    """The options against dying codes that the tokenizer, or its named quantizer, has and does not use yet."""
    arguments, where, restart, norm = tokenizer.config, "model", "codebook_restart_after", "codebook_l2_norm"
    if named := arguments.get("quantizer"):
        parameters = inspect.signature(QUANTIZERS[named["name"]]).parameters.values()
        arguments = {parameter.name: parameter.default for parameter in parameters} | named
        where, restart, norm = "model.quantizer", "restart_after", "normalize"
    remedies = []
    if arguments.get(restart) == 0:
        remedies.append(f"restart dead codes ({where}.{restart}=100)")
    if arguments.get(norm) is False:
        remedies.append(f"compare normalised codes ({where}.{norm}=true)")
    if "entropy_temperature" in arguments and not losses.get("entropy"):
        remedies.append(f"an entropy loss ({where}.entropy_temperature=0.01 losses.entropy=0.1)")
    return remedies


def _target(batch: ImageBatch) -> Tensor:
    return batch.pixels if batch.target is None else batch.target


def _psnr_of(output: TokenizerOutput, target: Tensor) -> dict[str, Tensor]:
    """The PSNR of a training output; empty if the tokenizer does not reconstruct in training."""
    return {} if output.reconstruction is None else {"psnr": psnr(output.reconstruction.detach(), target)}


def _adversary(config: GanConfig, model: Tokenizer) -> Adversary:
    """The adversary of a config. Raises ConfigError if it is larger than the machine's memory."""
    arguments = {"config": config, "input_shape": model.input_shape, "value_range": model.native_range}
    try:
        return construct(Adversary, arguments)
    except OversizedError as error:
        raise ConfigError(f"losses.gan: {error}") from error

"""The task of generators: predict the tokens of a tokenizer, given a condition if there is one."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.profiler import record_function

from vistok.data.loader import no_samples
from vistok.data.overlap import shared_tokens
from vistok.data.pictures import grid
from vistok.data.streams import KINDS, StreamConfig, Streams, stream_evaluation_loader, stream_loader
from vistok.data.tokens import TokenBatch, TokenCache, TokenMixture, token_evaluation_loader, token_loader
from vistok.draws import Draws, Keys, draws_on
from vistok.generators.base import Generator
from vistok.pipelines import Pipeline
from vistok.pipelines.folders import GENERATOR, TOKENIZER, home_of, load_tokenizer, write_settings
from vistok.signatures import ConfigError, build
from vistok.text import TEXT, PromptEncoder, copy_encoders
from vistok.tokenizers.base import Tokenizer
from vistok.train.config import MODEL, InitFrom, RunConfig
from vistok.train.tasks.base import Learner, Task, Turn
from vistok.train.tasks.prediction import PredictionConfig, PredictionObjective
from vistok.types import Clock, Condition, ConditionSpec, GeneratorOutput, TokenSpec, to_json

log = logging.getLogger(__name__)
PLAIN = PredictionConfig()


@dataclass(frozen=True)
class GeneratorRun(RunConfig):
    """The config of a generator's run.

    Attributes:
        tokens: folder of a token cache; or several, of the same images by the same tokenizer. Every epoch then draws
            one of them for each image.
        token_weights: how often each of several token caches is drawn, relative to the others; equally often by
            default.
        condition: the parts of the tokens' condition that the generator learns, of ``labels``, ``ids``, ``features``
            and ``given``; by default all that the cache has, and [] is none.
        streams: for a model of texts and images in one sequence: by name, the share or ``StreamConfig`` of each
            template that samples may follow. By default the model learns tokens, given their condition.
        sampling: default sampling options, saved with the pipeline and used for its pictures.
        objective: the predictions to train (see ``PredictionConfig``); by default the generator's own loss.
    """

    needed = "tokens"
    kind = "generator"

    tokens: str | tuple[str, ...] | None = None
    token_weights: tuple[float, ...] | None = None
    condition: tuple[str, ...] | None = None
    streams: dict[str, float | StreamConfig] = field(default_factory=dict)
    sampling: dict[str, Any] = field(default_factory=dict)
    objective: PredictionConfig = PLAIN


class GeneratorLearner(Learner):
    """A generator with its own loss or, in training, that of an objective."""

    model: Generator

    def __init__(self, model: Generator, objective: PredictionObjective | None = None):
        super().__init__(model)
        self.objective = objective

    def forward(
        self,
        tokens: Tensor,
        condition: Condition,
        clock: Clock,
        draws: Draws,
        tokenizer: Tokenizer | None = None,
    ) -> GeneratorOutput:
        if self.objective is not None and self.training:
            return self.objective(self.model, tokens, condition, clock, draws, tokenizer)
        return self.model(tokens, condition, draws=draws, clock=clock, tokenizer=tokenizer)

    def training_draws(self, keys: Keys) -> Draws:
        draws = self.model.training_draws(keys)
        return draws if self.objective is None else draws | self.objective.training_draws(keys, self.model)


class GeneratorTask(Task):
    """Predict cached tokens, given their condition."""

    config_type = GeneratorRun
    config: GeneratorRun
    learner: GeneratorLearner
    unit = "tokens_per_second"

    def __init__(self, config: GeneratorRun, rank: int, world_size: int):
        folders = [config.tokens] if isinstance(config.tokens, str) else config.tokens or ()
        cache = TokenMixture([TokenCache(folder) for folder in folders], config.token_weights)
        self.tokenizer = load_tokenizer(cache.folder)
        cache.check_tokenizer(self.tokenizer.fingerprint())
        condition = _chosen_parts(cache, config.condition)
        for source in config.sources:
            _check_texts(source, cache, condition.parts)
        self.classes = cache.classes if "labels" in condition.parts else ()
        spec = TokenSpec(**cache.spec)
        self.config, self.seed, self.length = config, config.seed, spec.length
        self.cache_folder, self.parts = cache.folder, condition.parts
        self._meaning = {
            "tokenizer": cache.tokenizer_hash,
            "classes": list(self.classes),
            "text encoder": {part: text.get("hash") for part, text in cache.text.items() if part in self.parts},
        }
        kind = config.model_entry().load()
        if config.streams:
            _check_reads_streams(kind)
            self._check_streams(condition)
        self._open_loaders(cache, rank, world_size)
        if config.streams and condition.given is not None:  # a stream may take single images of several given ones
            reader: Any = self.loader.reader
            condition = replace(condition, given=replace(condition.given, length=reader.given_length))
        derived = kind.condition_arguments(condition) | kind.tokenizer_arguments(self.tokenizer)
        model = config.build_model({"spec": to_json(spec), **derived})
        if config.streams:  # some models read streams only with certain arguments
            _check_reads_streams(model)
        objective = None
        if not config.objective.is_plain:
            objective = PredictionObjective(model, config.objective, config.seed, config.training.max_steps)
            self.changing_parameters = bool(list(objective.parameters()))
        _check_content(model, cache, config.objective)
        self.learner = GeneratorLearner(model, objective)
        build(self.model.options_type, config.sampling, "sampling")  # not first when images are made

    def _check_streams(self, condition: ConditionSpec) -> None:
        if not self.config.objective.is_plain:
            raise ConfigError("streams have their own loss: leave objective out")
        if condition.ids is None:
            raise ConfigError("streams have texts, and these tokens have no ids; make them with --text-tokenizer")

    def _open_loaders(self, cache: TokenMixture, rank: int, world_size: int) -> None:
        held_out, seed = _held_out_tokens(self.config, cache, self.parts), self.config.seed
        size, processes = self.config.training.batch_size, {"rank": rank, "world_size": world_size}
        self.held_out = no_samples()
        if streams := self.config.streams:
            self.loader = stream_loader(cache, streams, size, seed=seed, **processes)
            if held_out is not None:
                self.held_out = stream_evaluation_loader(held_out, streams, size, seed=seed)
        else:
            self.loader = token_loader(cache, size, seed=seed, parts=self.parts, **processes)
            if held_out is not None:
                self.held_out = token_evaluation_loader(held_out, size, seed=seed, parts=self.parts)

    @property
    def model(self) -> Generator:
        return self.learner.model

    def frozen(self) -> dict[str, nn.Module]:
        """The tokenizer, if the generator needs it in training."""
        return {TOKENIZER: self.tokenizer} if self.model.needs_tokenizer else {}

    def losses(self, players: Mapping[str, nn.Module], batch: TokenBatch, clock: Clock) -> Iterator[Turn]:
        with record_function("draws"):
            draws = self.learner.training_draws(self._keys(batch, clock.step))
        output = self._output(players[MODEL], batch, clock, draws)
        yield Turn(MODEL, output.loss, {"loss": output.loss.detach()} | output.metrics)

    def _keys(self, batch: TokenBatch, step: int) -> Keys:
        return Keys.of(self.seed, batch.indices, step).on(batch.tokens.device)

    def _output(self, learner: nn.Module, batch: TokenBatch, clock: Clock, draws: Draws) -> GeneratorOutput:
        draws, tokenizer = draws_on(draws, batch.tokens.device), self.frozen().get(TOKENIZER)
        return learner(batch.tokens, batch.condition, clock, draws, tokenizer)

    def _held_out_terms(
        self, learner: GeneratorLearner, batch: TokenBatch, clock: Clock, number: int
    ) -> dict[str, Tensor]:
        # Keyed by the number of the batch: some draws are one for a whole batch, such as the share of masks.
        draws = self.model.training_draws(self._keys(batch, number))
        draws.pop("drop", None)  # conditions are not dropped in validation
        output = self._output(learner, batch, clock, draws)
        return {"loss": output.loss} | output.metrics

    def count(self, batch: TokenBatch) -> int:
        return len(batch.tokens) * self.length

    def sample_name(self, index: int) -> str:
        return f"{self.cache_folder}[{index}]"

    def state_dict(self) -> dict[str, Any]:
        """What the ids of tokens, classes and texts mean."""
        return {"meaning": self._meaning}

    def load_state_dict(self, state: Mapping[str, Any], *, first_process: bool) -> None:
        saved = state.get("meaning", {})  # nothing in those of version 0.4
        other = [name for name in saved if saved[name] != self._meaning[name]]
        if other:
            raise ConfigError(
                f"{self.cache_folder} has tokens of another {' and another '.join(other)} than those that the "
                "checkpoint was trained on, so that they mean something else"
            )

    @torch.no_grad()
    def show(self, batch: TokenBatch) -> Tensor:
        condition = self.tokenizer.own_condition(batch.condition)
        tokens = _image_tokens(batch.tokens, self.length)
        if self.model.reads_latents:
            tokens = self.tokenizer.quantizer.encode(tokens)
        return self.tokenizer.eval().decode(tokens, condition=condition).clamp(-1, 1)

    def pipeline(self, model: Generator) -> Pipeline:
        return Pipeline(self.tokenizer, model, class_names=self.classes, sampling=self.config.sampling)

    def pictures(self, model: Generator) -> list[Image.Image]:
        """A grid of samples: a row for each of the first eight classes, or for each of a few conditions of the cache,
        with eight images or the frames of a clip. Empty if the tokenizer renders no pixels."""
        if not self.tokenizer.renders:
            return []
        rows, columns = min(len(self.classes), 8) or 4, 1 if len(self.tokenizer.input_shape) == 4 else 8
        reader: Any = self.loader.reader
        what: dict[str, Any]
        if self.config.streams:
            asked = reader.prompts(np.arange(rows) * len(reader) // rows)
            if asked is None:
                return []
            what = {"condition": asked, "num_images_per_label": columns}
        elif self.parts == ("labels",):
            what = {"class_labels": range(rows), "num_images_per_label": columns}
        elif self.parts:
            shown = np.arange(rows) * len(reader) // rows
            what = {"condition": reader.load(shown, 0)[0].condition, "num_images_per_label": columns}
        else:
            what = {"num_images": rows * columns}
        pipe = self.pipeline(model)
        self.tokenizer.to(pipe.device)
        try:
            images = pipe(**what, seed=self.seed).images
        finally:
            if TOKENIZER not in self.frozen():
                self.tokenizer.to("cpu")  # training needs the memory
        return [grid(images, columns=columns)]

    def save_companions(self, folder: Path, *, anew: bool = False) -> None:
        if anew or not (folder / TOKENIZER).exists():
            self.tokenizer.save_pretrained(folder / TOKENIZER)
        if anew or not (folder / TEXT).exists():
            copy_encoders(self.cache_folder / TEXT, folder / TEXT, self.parts)
        write_settings(folder, class_names=self.classes, sampling=self.config.sampling)

    def export(self, folder: Path, model: Generator) -> None:
        model.save_pretrained(folder / GENERATOR)
        self.save_companions(folder)


def _check_reads_streams(model: Generator | type[Generator]) -> None:
    if not model.takes_streams:
        raise ConfigError(
            f"{model.registry_name} reads no streams of texts and images; leave streams out, or take a model that does"
        )


def _check_content(model: Generator, cache: TokenMixture, objective: PredictionConfig) -> None:
    """Raise ConfigError unless the cache holds what the generator is trained on: tokens, or latents before
    quantization."""
    name = model.registry_name
    if model.reads_latents and not objective.is_plain:
        raise ConfigError(
            f"self_correction of {name} chooses what is fed and predicted: leave the section objective out"
        )
    if model.reads_latents == (cache.content == "latents"):
        return
    if model.reads_latents:
        raise ConfigError(
            f"self_correction of {name} turns bits while they are made of latents, and {cache.folder} holds ids: make "
            "a cache with `vistok tokenize … --latents`"
        )
    raise ConfigError(
        f"{cache.folder} holds the latents that ids are made of, which only self-correction reads: set "
        "model.self_correction of var, or make a cache without --latents"
    )


def _image_tokens(tokens: Tensor | Streams, length: int) -> Tensor:
    """The tokens of a batch; for streams, those of the last image of each."""
    if not isinstance(tokens, Streams):
        return tokens
    images = tokens.kinds == KINDS.index("image")
    last = images & (images.flip(1).cumsum(1).flip(1) <= length)
    values = tokens.ids if tokens.latents is None else tokens.latents
    return values[last].unflatten(0, (len(tokens), length))


def _chosen_parts(cache: TokenMixture, chosen: Sequence[str] | None) -> ConditionSpec:
    """The condition of a generator: that of the cache, or the chosen parts of it. Raises ConfigError if one is
    missing."""
    parts = cache.condition_spec.parts if chosen is None else chosen
    missing = [part for part in parts if part not in cache.condition_spec.parts]
    if missing:
        raise ConfigError(
            f"condition names {missing[0]!r}, but the tokens in {cache.folder} come with "
            f"{' and '.join(cache.condition_spec.parts) or 'nothing'}; `vistok tokenize` makes ids (--text-tokenizer) "
            "and features (--text-encoder) of captions, and given tokens (--given-frames) of clips"
        )
    return cache.condition_spec.only(parts)


def _check_texts(source: InitFrom, cache: TokenMixture, parts: Sequence[str]) -> None:
    """Raise ConfigError if the source was trained with another text encoder than the cache's; if it is not strict,
    only warn."""
    home = home_of(source.path)
    known = PromptEncoder.load(home / TEXT).identities if home is not None else {}
    for part in parts:
        old, new = ({key: text.get(part, {}).get(key) for key in ("kind", "hash")} for text in (known, cache.text))
        if part not in known or old == new:
            continue
        name = known[part]["name"]
        if source.strict:
            raise ConfigError(
                f"init_from: {source.path} was trained with {part} of {name}, and {cache.folder} has those of another "
                "text encoder. Make the cache with that one, or learn the new one with init_from.strict=false"
            )
        log.warning("%s was trained with %s of %s; the texts of %s are learned anew", home, part, name, cache.folder)


def _held_out_tokens(config: GeneratorRun, trained: TokenMixture, parts: Sequence[str]) -> TokenCache | None:
    """The cache for validation, checked against the training cache; None without validation.

    Raises:
        ConfigError: it has other contents, classes or conditions, or holds the training images.
        TokenCacheError: another tokenizer made it.
    """
    if config.validation is None or config.validation.tokens is None:
        return None
    cache = TokenCache(config.validation.tokens)
    cache.check_tokenizer(trained.tokenizer_hash)
    if cache.content != trained.content:
        raise ConfigError(
            f"validation.tokens: {cache.folder} holds {cache.content}, and {trained.folder} {trained.content}; make "
            "both in the same way"
        )
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
    shared = shared_tokens(trained.caches, cache)
    if shared.is_whole or any(_of_the_same_images(cache, other) for other in trained.caches):
        raise ConfigError(
            f"validation.tokens: {cache.folder} holds the images that the run trains on; make a cache of others: "
            "vistok tokenize … data.split=test"
        )
    if shared.found:
        log.warning("%s", shared)
    return cache


def _of_the_same_images(one: TokenCache, other: TokenCache) -> bool:
    """Whether two caches are of the same images, by their fingerprints, which imported caches do not have."""
    known = one.source_fingerprint == other.source_fingerprint != ""
    return one.folder.samefile(other.folder) or (known and torch.equal(one.labels, other.labels))

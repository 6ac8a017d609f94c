"""The config of a training run: its sections, their defaults, and the check before any work starts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from vistok.checkpoints import registry
from vistok.config import ConfigError, KeysOf, check, check_least
from vistok.data.config import DataConfig


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW or Adam.

    Attributes:
        lr: the peak learning rate.
        betas: decay of the first and second moment.
        weight_decay: decoupled for adamw, an L2 term for adam; on tensors of two or more dimensions only.
    """

    name: Literal["adamw", "adam"] = "adamw"
    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.0
    eps: float = 1e-8

    def __post_init__(self) -> None:
        check_least(self, lr=0, weight_decay=0, eps=0)
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must lie in [0, 1), got {self.betas}")


@dataclass(frozen=True)
class SchedulerConfig:
    """Factor on the learning rate: linear warmup, then constant, cosine, or warmup-stable-decay.

    Attributes:
        warmup_steps: steps of the linear rise.
        warmup_from: the factor at step 0 of the rise; None for 1 / (warmup_steps + 1).
        final_factor: the factor at the last step of cosine and wsd.
        decay_share: share of all steps that the tail of wsd takes.
        decay_shape: of the tail at the share p of it that is done: "linear", as 1 - p; or "sqrt", as 1 - sqrt(p)
            (arXiv 2405.18392).
    """

    name: Literal["constant", "cosine", "wsd"] = "constant"
    warmup_steps: int = 0
    final_factor: float = 0.0
    decay_share: float = 0.2
    warmup_from: float | None = None
    decay_shape: Literal["linear", "sqrt"] = "linear"

    def __post_init__(self) -> None:
        check_least(self, warmup_steps=0, final_factor=0)
        if self.warmup_from is not None and not 0 <= self.warmup_from <= 1:
            raise ValueError(f"warmup_from must lie in [0, 1], a share of the learning rate; got {self.warmup_from}")
        if not 0 < self.decay_share <= 1:
            raise ValueError(f"decay_share must lie in (0, 1], got {self.decay_share}")


@dataclass(frozen=True)
class TrainingConfig:
    """Length, precision and rhythm of a run; all intervals are optimisation steps, 0 turns them off.

    Attributes:
        max_steps: optimisation steps.
        batch_size: token sequences per step and process (generators; images have data.batch_size).
        gradient_accumulation_steps: batches per optimisation step.
        max_grad_norm: gradients are clipped to this norm; 0 is off.
        mixed_precision: autocast of forward passes. ``accelerate launch --mixed_precision`` may not say another one.
        ema_decay: decay of the averaged weights that are saved and sampled; 0 keeps no average.
        compile: torch.compile the model.
        activation_checkpointing: blocks recompute their activations in the backward pass: less memory, a third more
            work.
        parallel: how several processes share the work: each a whole model (ddp), or parameters, gradients and
            optimizer spread over all (fsdp2). ``accelerate launch --use_fsdp`` means fsdp2, too. A run that was started
            in one way can be resumed in another, also on one process.
        log_every, image_every, save_every: when metrics, pictures and checkpoints are written.
        keep_checkpoints: how many of the newest checkpoints stay.
        best_metric: the checkpoint that is best by this metric (its mean over a log window) stays, too; by default
            psnr where it is logged, else loss; with ``validation``, the held-out one (val_psnr, val_loss). Those from
            before an adversary takes part do not count once it does.
        trackers: who gets the metrics, besides metrics.jsonl.
    """

    max_steps: int
    batch_size: int = 64
    gradient_accumulation_steps: int = 1
    max_grad_norm: float = 1.0
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    ema_decay: float = 0.0
    compile: bool = False
    activation_checkpointing: bool = False
    parallel: Literal["ddp", "fsdp2"] = "ddp"
    log_every: int = 20
    image_every: int = 500
    save_every: int = 1000
    keep_checkpoints: int = 2
    best_metric: str | None = None
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ("tensorboard",)

    def __post_init__(self) -> None:
        check_least(self, max_steps=1, batch_size=1, gradient_accumulation_steps=1, keep_checkpoints=1)
        check_least(self, max_grad_norm=0, log_every=0, image_every=0, save_every=0)
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay must lie in [0, 1), got {self.ema_decay}")


@dataclass(frozen=True)
class GanConfig:
    """The adversarial part of a tokenizer's objective.

    Attributes:
        weight: of the generator's loss, from ``start_step`` on.
        loss: vanilla (StyleGAN's softplus), hinge, or least_squares.
        discriminator: {name: stylegan | patchgan, ...arguments of that discriminator}.
        start_step: the first step at which the adversary takes part.
        balance: ``fixed`` applies ``weight`` as it is; ``adaptive`` scales it by the ratio of the reconstruction's and
            the adversary's gradients at the decoder's last layer (VQGAN, arXiv 2012.09841, eq. 7).
        r1_weight, r1_every: gradient penalty on real images, taken every so many steps and scaled up accordingly.
        lecam_weight: weight of the LeCam regulariser (arXiv 2104.03310).
        lr: the discriminator's learning rate; None takes the optimizer's.
    """

    weight: float
    loss: Literal["vanilla", "hinge", "least_squares"] = "hinge"
    discriminator: dict[str, Any] = field(default_factory=lambda: {"name": "patchgan"})
    start_step: int = 0
    balance: Literal["fixed", "adaptive"] = "fixed"
    r1_weight: float = 0.0
    r1_every: int = 16
    lecam_weight: float = 0.0
    lr: float | None = None

    def __post_init__(self) -> None:
        check_least(self, weight=0, start_step=0, r1_weight=0, r1_every=1, lecam_weight=0)


@dataclass(frozen=True)
class ValidationConfig:
    """Samples that a run does not train on. Their losses, as "val_loss" and so on, are in the log row of every step
    that saves a checkpoint, and say which checkpoint is the best; the model of that step is in the run's ``best/``.

    They are measured with the averaged weights, without dropout or augmentation, and with the same draws every time;
    by the first process, for which the others wait.

    Attributes:
        data: the keys of the run's ``data`` that differ for held-out images (tokenizers): ``{split: test}``. ``limit``
            and ``batch_size`` can be among them.
        tokens: a cache of held-out images by the same tokenizer (generators).
    """

    data: Annotated[dict[str, Any], KeysOf(DataConfig)] = field(default_factory=dict)
    tokens: str | None = None

    def check(self, needed: Literal["data", "tokens"]) -> None:
        """Raise ConfigError unless exactly what the stage reads is given."""
        given = [name for name in ("data", "tokens") if getattr(self, name)]
        if given != [needed]:
            raise ConfigError(
                f"validation has {' and '.join(given) or 'nothing'}, but this stage reads {needed!r}; for example "
                f"{VALIDATION_EXAMPLES[needed]}"
            )


VALIDATION_EXAMPLES = {"data": "validation.data.split=test", "tokens": "validation.tokens=held_out_tokens/"}


@dataclass(frozen=True)
class RunConfig:
    """A whole training run, as its YAML has it.

    Attributes:
        stage: what is trained.
        output_dir: the run folder; it must not exist, unless the run resumes.
        model: ``name`` (see ``vistok models``) and constructor arguments.
        losses: weights by name (tokenizers); ``lpips_weights`` and ``gan`` configure those two.
        data: images (tokenizers).
        tokens: token cache folder (generators); or several, of the same images by the same tokenizer, of which every
            epoch draws one anew for each image.
        token_weights: how often each of several token caches is drawn, relative to the others; all alike by default.
        condition: what of the tokens' condition the generator learns: of ``labels``, ``ids``, ``features`` and
            ``given``; all that the cache has by default, nothing with [].
        sampling: default sampling options, saved with the pipeline and used for its pictures (generators).
        validation: held-out samples; None is no validation.
        seed: of initial weights, order, augmentation and every draw.
        init_from: a run, model or checkpoint folder whose weights training starts from.
    """

    stage: Literal["tokenizer", "generator"]
    output_dir: str
    model: dict[str, Any]
    training: TrainingConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    lr_scheduler: SchedulerConfig = SchedulerConfig()
    losses: dict[str, Any] = field(default_factory=dict)
    data: DataConfig | None = None
    tokens: str | tuple[str, ...] | None = None
    token_weights: tuple[float, ...] | None = None
    condition: tuple[str, ...] | None = None
    sampling: dict[str, Any] = field(default_factory=dict)
    validation: ValidationConfig | None = None
    seed: int = 0
    init_from: str | None = None

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> RunConfig:
        """Check every section but ``model`` (see ``model_arguments``) and return the typed config.

        Raises:
            ConfigError: unknown keys, wrong types, or sections that do not belong to the stage.
        """
        config = cls(**check(cls, values, ""))
        images, tokens = ("data", "losses"), ("tokens", "token_weights", "condition", "sampling")
        (needed, *_), others = (images, tokens) if config.stage == "tokenizer" else (tokens, images)
        if not getattr(config, needed):
            raise ConfigError(f"stage {config.stage} needs {needed!r}; for example {EXAMPLES[needed]}")
        for other in others:
            if getattr(config, other):
                raise ConfigError(f"stage {config.stage} takes no {other!r}: it reads {needed!r}")
        if config.validation is not None:
            config.validation.check(needed)
        elif (config.training.best_metric or "").startswith("val_"):
            raise ConfigError(
                f"training.best_metric is {config.training.best_metric!r}, but there are no held-out samples to "
                f"measure it on; name some, for example {VALIDATION_EXAMPLES[needed]}"
            )
        return config

    def model_entry(self) -> registry.Entry:
        if "name" not in self.model:
            raise ConfigError("model.name is missing; `vistok models` lists the names")
        if not isinstance(self.model["name"], str):
            raise ConfigError(f"model.name must be a text, got {self.model['name']!r}; `vistok models` lists the names")
        return registry.entry(self.model["name"], self.stage)

    def build_model(self, derived: Mapping[str, Any]):
        """Build the model from ``model`` and the arguments that follow from the data.

        Raises:
            ConfigError: an argument is wrong, or given although it is derived and differs.
        """
        model_class = self.model_entry().load()
        given = {key: value for key, value in self.model.items() if key != "name"}
        for key, value in derived.items():
            if given.setdefault(key, value) != value:
                raise ConfigError(f"model.{key} is {given[key]!r}, but the data say {value!r}; leave the key out")
        arguments = check(model_class, given, "model")
        try:
            return model_class(**arguments)
        except (TypeError, LookupError, ArithmeticError, AssertionError, RuntimeError, MemoryError) as error:
            # What sizes that no model has do to torch, such as a negative one.
            raise ConfigError(f"model: no {self.model['name']} can be built of these arguments: {error}") from error


EXAMPLES = {"data": "data.source=folder data.root=photos/ data.image_size=256", "tokens": "tokens=tokens/"}

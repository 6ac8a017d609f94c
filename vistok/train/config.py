"""The config of a training run: its sections, their defaults, and the checks before any work starts."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Annotated, Any, ClassVar, Literal

from vistok.checkpoints import registry
from vistok.checkpoints.bounds import construct, integers
from vistok.data.config import DataConfig
from vistok.signatures import ConfigError, KeysOf, annotations_of, build, check, check_least
from vistok.train.curves import curve_file

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class GroupConfig:
    """A group of parameters with a learning rate or weight decay of its own.

    Attributes:
        parameters: patterns of their names, such as ``encoder.*``.
        lr, weight_decay: in place of the optimizer's; None keeps those.
    """

    parameters: tuple[str, ...]
    lr: float | None = None
    weight_decay: float | None = None

    def __post_init__(self) -> None:
        check_least(self, **{key: 0 for key in ("lr", "weight_decay") if getattr(self, key) is not None})


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW or Adam.

    Attributes:
        lr: the peak learning rate.
        betas: decay of the first and second moment.
        weight_decay: decoupled for adamw, an L2 term for adam.
        eps: term added to the denominator.
        decayed: the parameters with weight decay: tensors of two or more dimensions (``matrices``), or ``all``.
        no_decay: patterns of the names of parameters without weight decay.
        groups: parameters with a rate or decay of their own; if several groups match, the last one wins.
        final_weight_decay: the weight decay at the last step, reached along half a cosine; those of groups change in
            proportion. None keeps it constant.
    """

    name: Literal["adamw", "adam"] = "adamw"
    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.0
    eps: float = 1e-8
    decayed: Literal["matrices", "all"] = "matrices"
    no_decay: tuple[str, ...] = ()
    groups: tuple[GroupConfig, ...] = ()
    final_weight_decay: float | None = None

    def __post_init__(self) -> None:
        check_least(self, lr=0, weight_decay=0, eps=0)
        if self.final_weight_decay is not None:
            check_least(self, final_weight_decay=0)
            if not self.weight_decay:
                raise ValueError(
                    f"final_weight_decay {self.final_weight_decay} changes weight_decay, which is 0; set that, too"
                )
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must lie in [0, 1), got {self.betas}")


@dataclass(frozen=True)
class SchedulerConfig:
    """Factor on the learning rates: linear warmup, then one of

    - constant, cosine, or warmup-stable-decay (wsd);
    - linear or exponential decay, which begins after the share ``hold`` of the steps after the warmup;
    - bent: two lines that meet at the share ``bend`` of these steps, where the first one has fallen half as far as a
      single line would have;
    - steps: multiplied by ``step_factor`` at each milestone.

    Attributes:
        warmup_steps: steps of the linear warmup.
        warmup_from: the factor at step 0. By default the warmup begins one step above 0, because a step at rate 0 would
            be wasted.
        final_factor: the factor at the last step; not used by constant and steps. Exponential decay never reaches 0, so
            it needs a factor or a rate above that.
        final_lr: the learning rate at the last step, in place of ``final_factor``.
        decay_share: share of all steps in which wsd decays.
        decay_shape: the decay of wsd, by the share p of it that is over: ``linear`` is 1 - p, ``sqrt`` is 1 - sqrt(p)
            (arXiv 2405.18392), ``cosine`` is (1 + cos(pi p)) / 2.
        start_step: the step at which the schedule begins, for a player that joins later.
        hold: share of the steps for which linear and exponential stay at 1.
        bend: share of the steps at which bent changes its slope.
        milestones, step_factor: of steps; milestones count from ``start_step``.

    Raises:
        ValueError: a value is out of range, or would have no effect on this schedule.
    """

    USED_BY: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "decay_share": ("wsd",),
        "decay_shape": ("wsd",),
        "final_lr": ("cosine", "wsd", "linear", "exponential", "bent"),
        "hold": ("linear", "exponential"),
        "bend": ("bent",),
        "milestones": ("steps",),
        "step_factor": ("steps",),
    }
    """The schedules that read a key, for the keys that the others refuse."""

    name: Literal["constant", "cosine", "wsd", "linear", "exponential", "bent", "steps"] = "constant"
    warmup_steps: int = 0
    final_factor: float = 0.0
    decay_share: float = 0.2
    warmup_from: float | None = None
    decay_shape: Literal["linear", "sqrt", "cosine"] = "linear"
    final_lr: float | None = None
    start_step: int = 0
    hold: float = 0.0
    bend: float = 0.5
    milestones: tuple[int, ...] = ()
    step_factor: float = 0.1

    def __post_init__(self) -> None:
        check_least(self, warmup_steps=0, final_factor=0, start_step=0, step_factor=0)
        if bool(self.milestones) != (self.name == "steps") or list(self.milestones) != sorted(set(self.milestones)):
            raise ValueError(
                "milestones are the rising steps of the schedule 'steps', and of no other; got "
                f"{list(self.milestones)} for {self.name!r}"
            )
        if not 0 <= self.hold < 1:
            raise ValueError(f"hold must lie in [0, 1), a share of the steps; got {self.hold}")
        if not 0 < self.bend < 1:
            raise ValueError(f"bend must lie in (0, 1), a share of the steps; got {self.bend}")
        if not 0 < self.decay_share <= 1:
            raise ValueError(f"decay_share must lie in (0, 1], got {self.decay_share}")
        if self.warmup_from is not None and not 0 <= self.warmup_from <= 1:
            raise ValueError(f"warmup_from must lie in [0, 1], a share of the learning rate; got {self.warmup_from}")
        if self.final_lr is not None and self.final_factor:
            raise ValueError(
                f"final_lr {self.final_lr} and final_factor {self.final_factor} say the same thing; leave one out"
            )
        if self.final_lr is not None:
            check_least(self, final_lr=0)
        for key, schedules in self.USED_BY.items():
            value, default = getattr(self, key), getattr(type(self), key)
            if self.name not in schedules and value != default:
                raise ValueError(
                    f"{key} {value} has no effect on the schedule {self.name!r}: leave it out "
                    f"({key}={'null' if default is None else default}), or choose {' or '.join(schedules)} by name"
                )
        if self.name == "exponential" and not (self.final_factor if self.final_lr is None else self.final_lr):
            raise ValueError(
                "the schedule 'exponential' never falls to 0: set final_factor or final_lr above 0, for example "
                "final_factor=0.01"
            )

    def inherited(self, name: str) -> dict[str, Any]:
        """The keys that the schedule of another player takes over, if it is called ``name``."""
        keys = (key.name for key in fields(self) if name in self.USED_BY.get(key.name, (name,)))
        return {key: getattr(self, key) for key in keys}


@dataclass(frozen=True)
class PlayerConfig:
    """How one player (a module with its own optimizer) is trained. In the config, ``players.NAME`` has the keys that
    differ from the run's.

    Attributes:
        optimizer, lr_scheduler: of this player.
        max_grad_norm: its gradients are clipped to this norm; 0 is off.
    """

    optimizer: OptimizerConfig = OptimizerConfig()
    lr_scheduler: SchedulerConfig = SchedulerConfig()
    max_grad_norm: float = 1.0

    def __post_init__(self) -> None:
        check_least(self, max_grad_norm=0)
        if self.lr_scheduler.final_lr and not self.optimizer.lr:
            raise ValueError(
                f"the rate cannot end at lr_scheduler.final_lr {self.lr_scheduler.final_lr}, because optimizer.lr is "
                "0; set final_lr to null"
            )


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters (LoRA, arXiv 2106.09685), which are trained in place of the model's weights.

    Attributes:
        rank: of the product that is added to each weight.
        alpha: the product is scaled by alpha / rank.
        targets: patterns of the names of the linear and convolutional layers that get an adapter, such as ``*.attn.*``;
            all by default.
        also: patterns of the names of parameters that are trained beside the adapters. Parameters that ``init_from``
            leaves new, such as a table of other classes, are trained in any case.
        merge: whether exported weights include the adapters; else they lie beside the weights, as in PEFT.
    """

    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = ("*",)
    also: tuple[str, ...] = ()
    merge: bool = True

    def __post_init__(self) -> None:
        check_least(self, rank=1, alpha=0)
        if not self.targets:
            raise ValueError("targets is empty: name the layers that get an adapter, such as ['*.attn.*']")


@dataclass(frozen=True)
class TrainingConfig:
    """Length, precision and intervals of a run. Intervals are optimisation steps; 0 turns them off.

    Attributes:
        max_steps: optimisation steps.
        batch_size: token sequences per batch and process, for generators (tokenizers have ``data.batch_size``).
        gradient_accumulation_steps: batches per optimisation step.
        max_grad_norm: gradients are clipped to this norm; 0 is off.
        mixed_precision: autocast of forward passes; must agree with ``accelerate launch --mixed_precision``, if given.
        ema_decay: decay of the averaged weights (EMA) that are exported and sampled; 0 keeps no average.
        compile: torch.compile the model.
        activation_checkpointing: blocks recompute their activations in the backward pass, which takes less memory and
            about a third more work.
        parallel: how several processes share the work: each has a whole model (ddp), or parameters, gradients and
            optimizer state are sharded over all (fsdp2). ``accelerate launch --use_fsdp`` also selects fsdp2. A run can
            be resumed with another value, or on one process.
        log_every, image_every, save_every: intervals at which metrics, pictures and checkpoints are written.
        keep_checkpoints: how many of the newest checkpoints are kept.
        best_metric: the checkpoint with the best value of this metric (its mean over a log window) is kept, too. By
            default psnr if it is logged, else loss; with ``validation``, val_psnr or val_loss. When the objective
            changes (for example, an adversary joins), earlier checkpoints no longer count.
        trackers: services that get the metrics, besides metrics.jsonl.
        lora: trains low-rank adapters instead of the weights; None trains the weights.
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
    lora: LoraConfig | None = None

    def __post_init__(self) -> None:
        check_least(self, max_steps=1, batch_size=1, gradient_accumulation_steps=1, keep_checkpoints=1)
        check_least(self, max_grad_norm=0, log_every=0, image_every=0, save_every=0)
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay must lie in [0, 1), got {self.ema_decay}")
        if self.lora is not None and self.parallel == "fsdp2":
            raise ValueError("lora does not go with parallel fsdp2, which shards whole weights; use ddp")


@dataclass(frozen=True)
class ValidationConfig:
    """Held-out samples, which a run does not train on.

    Every step that saves a checkpoint logs their losses ("val_loss" and so on), which choose the best checkpoint. The
    model of that step is exported to the run's ``best/``. The losses are measured with the averaged weights, without
    dropout or augmentation, and with the same draws every time. The first process measures them, and the others wait.

    Attributes:
        data: for tokenizers, the keys of the run's ``data`` that differ for held-out images, such as ``{split: test}``,
            ``limit`` or ``batch_size``.
        tokens: for generators, a cache of held-out images, made by the same tokenizer.
    """

    data: Annotated[dict[str, Any], KeysOf(DataConfig)] = field(default_factory=dict)
    tokens: str | None = None

    def check(self, needed: Literal["data", "tokens"]) -> None:
        """Raise ConfigError unless the section that the task needs is given, and the other one is not."""
        given = [name for name in ("data", "tokens") if getattr(self, name)]
        if given != [needed]:
            raise ConfigError(
                f"validation has {' and '.join(given) or 'nothing'}, but this task reads {needed!r}; for example "
                f"{VALIDATION_EXAMPLES[needed]}"
            )


VALIDATION_EXAMPLES = {"data": "validation.data.split=test", "tokens": "validation.tokens=held_out_tokens/"}


@dataclass(frozen=True)
class InitFrom:
    """Weights that training starts from. A config may give the path alone in place of this section.

    Attributes:
        path: a weights file, or anything that ``vistok.load`` takes: a run, a model's folder, RUN/checkpoints/step-N, a
            hub id, or the id of an official checkpoint.
        module: the submodule that gets the weights; by default the whole model.
        rename: maps regular expressions to new text. The first that matches the beginning of a key replaces it there;
            null drops the key.
        strict: the keys of the weights and of the module must be the same.
    """

    path: str
    module: str = ""
    rename: dict[str, str | None] = field(default_factory=dict)
    strict: bool = True

    def __post_init__(self) -> None:
        if not self.path:
            raise ConfigError("init_from is empty; name a run or a weights file, or write null for none")


def _model_keys(section: Mapping[str, Any]) -> dict[str, Any]:
    """The types of the keys in a ``model`` section; an unknown name is reported later."""
    try:
        return {"name": str, **annotations_of(registry.entry(section.get("name", "")).load())}
    except registry.UnknownModelError:
        return {"name": str}


@dataclass(frozen=True)
class RunConfig:
    """The config of a whole training run, as in its YAML file. Each task adds sections of its own.

    Attributes:
        task: ``tokenizer`` or ``generator``.
        output_dir: the run folder; it must not exist, unless the run resumes.
        model: ``name`` (see ``vistok models``) and constructor arguments; without a name, those of ``init_from``.
        players: by the name of a player (such as "adversary"), the keys of ``PlayerConfig`` that differ for it.
        validation: held-out samples; None is no validation.
        seed: of initial weights, order, augmentation and every draw.
        init_from: weights that training starts from: a path, an ``InitFrom``, or several, of which later ones win.
        freeze: patterns of the names of parameters that are not trained; modules that have no others stay in evaluation
            mode.
        curve: a reference that report.html shows with the run's curves: a shipped one (``vistok/train/curves``), or the
            metrics.jsonl of another run.
    """

    needed: ClassVar[Literal["data", "tokens"]]
    """The section that names the training samples."""
    kind: ClassVar[Literal["tokenizer", "generator"]]
    """The kind of the model that is trained."""

    task: str
    output_dir: str
    training: TrainingConfig
    model: Annotated[dict[str, Any], KeysOf(_model_keys)] = field(default_factory=dict)
    optimizer: OptimizerConfig = OptimizerConfig()
    lr_scheduler: SchedulerConfig = SchedulerConfig()
    players: dict[str, dict[str, Any]] = field(default_factory=dict)
    validation: ValidationConfig | None = None
    seed: int = 0
    init_from: str | InitFrom | tuple[str | InitFrom, ...] | None = None
    freeze: tuple[str, ...] = ()
    curve: str | None = None

    @staticmethod
    def parse(values: Mapping[str, Any]) -> RunConfig:
        """Check every section but ``model`` (see ``build_model``) and return the typed config of the task.

        Raises:
            ConfigError: unknown keys, wrong types, or sections that do not belong to the task.
        """
        from vistok.train.tasks import TASKS, task_type  # imported here, because tasks import configs

        if "stage" in values and "task" not in values:
            log.warning("stage is called task now: task: %s", values["stage"])
            values = {"task" if key == "stage" else key: value for key, value in values.items()}
        name = values.get("task")
        kind = task_type(name).config_type
        for other in TASKS:
            foreign = _own_keys(task_type(other).config_type) - _own_keys(kind)
            for key in [key for key in foreign if values.get(key)]:
                raise ConfigError(f"task {name} takes no {key!r}: it reads {kind.needed!r}")
            values = {key: value for key, value in values.items() if key not in foreign}
        config = kind(**check(kind, values, ""))
        config.check_sections()
        return config

    def check_sections(self) -> None:
        """Raise ConfigError if sections are missing or do not fit together."""
        if not getattr(self, self.needed):
            raise ConfigError(f"task {self.task} needs {self.needed!r}; for example {EXAMPLES[self.needed]}")
        if not self.output_dir:
            raise ConfigError("output_dir is empty; name the folder of the run, for example output_dir=runs/first")
        if self.curve is not None:
            curve_file(self.curve)
        warmup, steps = self.lr_scheduler.warmup_steps, self.training.max_steps
        if warmup >= steps:
            log.warning(
                "lr_scheduler.warmup_steps %d is no less than training.max_steps %d: the learning rate never reaches "
                "optimizer.lr %g",
                warmup,
                steps,
                self.optimizer.lr,
            )
        if self.validation is not None:
            self.validation.check(self.needed)
        elif (self.training.best_metric or "").startswith("val_"):
            raise ConfigError(
                f"training.best_metric is {self.training.best_metric!r}, but there are no held-out samples to "
                f"measure it on; name some, for example {VALIDATION_EXAMPLES[self.needed]}"
            )

    @property
    def sources(self) -> list[InitFrom]:
        """The sources in ``init_from``, as a list."""
        given = self.init_from if isinstance(self.init_from, tuple) else [self.init_from]
        return [InitFrom(source) if isinstance(source, str) else source for source in given if source is not None]

    def model_entry(self) -> registry.Entry:
        if "name" not in self.model:
            raise ConfigError(
                "model.name is missing; `vistok models` lists the names, and init_from=RUN takes the model of a run"
            )
        if not isinstance(self.model["name"], str):
            raise ConfigError(f"model.name must be a text, got {self.model['name']!r}; `vistok models` lists the names")
        return registry.entry(self.model["name"], self.kind)

    def build_model(self, derived: Mapping[str, Any]):
        """Build the model from ``model`` and the ``derived`` arguments, which follow from the data.

        Raises:
            ConfigError: an argument is wrong, or differs from a derived one.
        """
        model_class = self.model_entry().load()
        given = {key: value for key, value in self.model.items() if key != "name"}
        for key, value in derived.items():
            if given.setdefault(key, value) != value:
                raise ConfigError(f"model.{key} is {given[key]!r}, but the data say {value!r}; leave the key out")
        arguments = check(model_class, given, "model")
        try:
            return construct(model_class, arguments)
        except (TypeError, LookupError, ArithmeticError, AssertionError, RuntimeError, MemoryError) as error:
            # Torch raises these for impossible sizes, such as a negative one.
            odd = [
                f"model.{place}={value}" for place, value in integers(arguments) if value <= 0 and value is not False
            ]
            hint = f"; look at {', '.join(odd)}" if odd else ""
            raise ConfigError(
                f"model: no {self.model['name']} can be built of these arguments: {error}{hint}"
            ) from error

    def player(self, name: str, **optimizer: Any) -> PlayerConfig:
        """The config of the player ``name``: that of the run, changed by ``players.NAME``.

        Args:
            optimizer: defaults of this player's optimizer that differ from the run's.
        """
        own = self.players.get(name, {})
        schedule = own.get("lr_scheduler", {})
        schedule_name = schedule.get("name") if isinstance(schedule, Mapping) else None
        base = {key: getattr(self.optimizer, key) for key in (f.name for f in fields(self.optimizer))}
        if name != MODEL:  # these patterns name parameters of the model
            base |= {"groups": (), "no_decay": ()}
        sections: dict[str, Any] = {
            "optimizer": base | optimizer,
            "lr_scheduler": self.lr_scheduler.inherited(schedule_name or self.lr_scheduler.name),
            "max_grad_norm": self.training.max_grad_norm,
        }
        for key, value in own.items():
            sections[key] = sections.get(key, {}) | value if isinstance(value, Mapping) else value
        return build(PlayerConfig, sections, f"players.{name}")


def _own_keys(kind: type[RunConfig]) -> set[str]:
    """The sections that a task adds to ``RunConfig``."""
    return {f.name for f in fields(kind)} - {f.name for f in fields(RunConfig)}


MODEL = "model"
"""The name of the player that holds the exported model."""
EXAMPLES = {"data": "data.source=folder data.root=photos/ data.image_size=256", "tokens": "tokens=tokens/"}

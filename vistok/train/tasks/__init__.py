"""Training tasks by name, each with the config sections that it reads."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module

from vistok.signatures import ConfigError
from vistok.train.tasks.base import Learner, Task, Turn
from vistok.utils.spelling import suggestion

__all__ = ["TASKS", "Learner", "Task", "Turn", "any_config", "task_type"]

TASKS = {
    "tokenizer": "vistok.train.tasks.tokenizer:TokenizerTask",
    "generator": "vistok.train.tasks.generator:GeneratorTask",
}
"""The class of each task, which is imported when it is used."""


def any_config() -> type:
    """A dataclass with the sections of all tasks, to parse overrides on the command line before the task is known."""
    return dataclass(frozen=True)(type("AnyRun", tuple(task_type(name).config_type for name in TASKS), {}))


def task_type(name: str | None) -> type[Task]:
    """The class of a task.

    Raises:
        ConfigError: there is no task of this name.
    """
    if not isinstance(name, str) or name not in TASKS:
        raise ConfigError(f"task: got {name!r}, expected one of {', '.join(TASKS)}{suggestion(name, tuple(TASKS))}")
    module, _, kind = TASKS[name].partition(":")
    return getattr(import_module(module), kind)

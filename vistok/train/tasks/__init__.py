"""What can be trained: tasks by name, each with the sections of the config that it reads."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module

from vistok.config import ConfigError, suggestion
from vistok.train.tasks.base import Learner, Task, Turn

__all__ = ["TASKS", "Learner", "Task", "Turn", "any_config", "task_type"]

TASKS = {
    "tokenizer": "vistok.train.tasks.tokenizer:TokenizerTask",
    "generator": "vistok.train.tasks.generator:GeneratorTask",
}
"""Where each task is defined; they are imported when they are asked for."""


def any_config() -> type:
    """A dataclass with the sections of all tasks, for texts on the command line, whose task is not known yet."""
    return dataclass(frozen=True)(type("AnyRun", tuple(task_type(name).config_type for name in TASKS), {}))


def task_type(name: str | None) -> type[Task]:
    """The task of that name.

    Raises:
        ConfigError: there is none.
    """
    if not isinstance(name, str) or name not in TASKS:
        raise ConfigError(f"task: got {name!r}, expected one of {', '.join(TASKS)}{suggestion(name, tuple(TASKS))}")
    module, _, kind = TASKS[name].partition(":")
    return getattr(import_module(module), kind)

"""Progress bars for work that takes long: on standard error, and only where somebody watches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Self, TypeVar

T = TypeVar("T")


def track(items: Iterable[T], description: str, total: int) -> Iterator[T]:
    """Yield ``items``, of which there are ``total``, under a bar with the time left."""
    with Bar(description, total) as bar:
        for count, item in enumerate(items):
            bar.show(count)
            yield item
        bar.show(total)


class Bar:
    """A bar with the time left, whose parts can be told in fractions, with a note beside it.

    Attributes:
        live: whether somebody watches.
    """

    def __init__(self, description: str, total: float):
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

        console = Console(stderr=True)
        self.live = console.is_terminal
        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
        self._progress = Progress(*columns, TextColumn("{task.fields[note]}"), console=console, disable=not self.live)
        self._task = self._progress.add_task(description, total=total, note="")

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._progress.stop()

    def show(self, completed: float, note: str = "") -> None:
        """Say how much is done."""
        self._progress.update(self._task, completed=completed, note=note)

    def of_batch(self, done: float, size: float, length: int) -> dict[str, Any]:
        """Arguments for a pipeline's call that let the bar show how far a batch is; none where nobody watches.

        Args:
            done: what the bar had before.
            size: what the batch adds to it.
            length: positions of each image.
        """

        def callback(pipe: Any, step: int, positions: int, tensors: Any) -> None:
            self.show(done + size * positions / length, f"{positions:,}/{length:,} tokens, step {step + 1:,}")

        return {"callback_on_step_end": callback} if self.live else {}

"""Progress bars for long work, on standard error and only if it is a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Self, TypeVar

T = TypeVar("T")


def track(items: Iterable[T], description: str, total: int) -> Iterator[T]:
    """Yield the ``total`` items while a bar shows the progress and the time left."""
    with Bar(description, total) as bar:
        for count, item in enumerate(items):
            bar.show(count)
            yield item
        bar.show(total)


class Bar:
    """A bar with the time left and a note; progress may be a fraction of an item.

    Attributes:
        live: whether standard error is a terminal.
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
        """Set the progress and the note."""
        self._progress.update(self._task, completed=completed, note=note)

    def of_batch(self, done: float, size: float, length: int) -> dict[str, Any]:
        """Arguments for a pipeline's call that show the progress within a batch; empty if the bar is not live.

        Args:
            done: the progress before the batch.
            size: the progress that the batch adds.
            length: number of positions of each image.
        """

        def callback(pipe: Any, step: int, positions: int, tensors: Any) -> None:
            self.show(done + size * positions / length, f"{positions:,}/{length:,} tokens, step {step + 1:,}")

        return {"callback_on_step_end": callback} if self.live else {}

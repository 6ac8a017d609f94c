"""The ``vistok`` command: parses, calls, prints. What is heavy is imported by the command that needs it."""

from __future__ import annotations

import errno
import os
import sys
import threading
from collections.abc import Sequence
from typing import Annotated

import typer
from rich.markup import escape

from vistok.cli.console import errors, output
from vistok.cli.models import convert, models
from vistok.cli.sampling import pairs, reconstruct, sample
from vistok.cli.scoring import benchmark, evaluate
from vistok.cli.training import import_tokens, quickstart, tokenize, train

__all__ = ["app", "main"]

EPILOG = "VISTOK_DEBUG=1 in the environment shows the traceback of an error."

app = typer.Typer(
    name="vistok",
    help="Autoregressive visual generation: train tokenizers and generators, sample, evaluate.",
    epilog=EPILOG,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; a failure that a user can act upon is one message and exit code 2."""
    _show_logs()
    if not os.environ.get("VISTOK_DEBUG"):
        threading.excepthook = _name_failed_thread
    try:
        app(arguments, prog_name="vistok")
    except Exception as error:
        if os.environ.get("VISTOK_DEBUG") or not _is_for_users(error):
            raise
        errors.print(f"[bold red]Error:[/] {escape(_message(error))}")
        sys.exit(2)


def _name_failed_thread(failure: threading.ExceptHookArgs) -> None:
    """In place of a traceback: threads are those of libraries, such as the one that writes TensorBoard's events."""
    if failure.exc_type is not SystemExit:
        errors.print(f"[yellow]Note:[/] a thread in the background ended: {escape(str(failure.exc_value))}")


def _is_for_users(error: Exception) -> bool:
    """Bad input and failing files, and the errors that vistok itself defines."""
    return isinstance(error, ValueError | OSError) or type(error).__module__.startswith("vistok.")


def _message(error: Exception) -> str:
    text, notes = str(error) or type(error).__name__, getattr(error, "__notes__", ())
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        advice = notes or ("Nothing was left half-written; free some space and run the command again.",)
        return " ".join((f"{text}.", *advice))
    return "\n".join((text, *notes))


def _show_logs() -> None:
    """vistok's own messages (images left out, weights dropped) go to standard error, as they come."""
    import logging

    from rich.logging import RichHandler

    logger = logging.getLogger("vistok")
    if not logger.handlers:
        logger.addHandler(RichHandler(console=errors, show_time=False, show_path=False))
        logger.setLevel(logging.INFO)


@app.callback(invoke_without_command=True)
def root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        from vistok._version import __version__

        output.print(f"vistok {__version__}")
        raise typer.Exit


COMMANDS = {
    "quickstart": quickstart,
    "train": train,
    "tokenize": tokenize,
    "import-tokens": import_tokens,
    "sample": sample,
    "pairs": pairs,
    "reconstruct": reconstruct,
    "eval": evaluate,
    "benchmark": benchmark,
    "convert": convert,
    "models": models,
}
for _name, _command in COMMANDS.items():
    app.command(_name)(_command)

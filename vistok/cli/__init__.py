"""The ``vistok`` command line. Each command imports heavy modules itself, so that ``--help`` is quick."""

from __future__ import annotations

import errno
import io
import os
import re
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Annotated

import typer
from rich.markup import escape

from vistok.cli.commands import Command, Group, help_of
from vistok.cli.configs import configs
from vistok.cli.console import errors, output
from vistok.cli.models import convert, models, pipeline
from vistok.cli.probing import compare, probe
from vistok.cli.sampling import caption, demo, pairs, reconstruct, sample
from vistok.cli.scoring import benchmark, evaluate
from vistok.cli.training import import_tokens, quickstart, report, tokenize, train
from vistok.utils.paths import at_home
from vistok.utils.spelling import suggestion

__all__ = ["app", "main"]

EPILOG = "VISTOK_DEBUG=1 in the environment shows the traceback of an error."

LONGEST_WORD = 1000
"""Words of messages that are longer, such as a number of thousands of digits, are cut."""

app = typer.Typer(
    name="vistok",
    cls=Group,
    help="Autoregressive visual generation: train tokenizers and generators, sample, evaluate.",
    epilog=EPILOG,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; an error that a user can fix prints one message and exits with code 2."""
    _show_logs()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names of files need not be UTF-8
    if not os.environ.get("VISTOK_DEBUG"):
        threading.excepthook = _name_failed_thread
    given = sys.argv[1:] if arguments is None else arguments
    try:
        app([at_home(text) for text in given], prog_name="vistok")
    except SystemExit as end:
        _advise_after_interruption(end)
        raise
    except Exception as error:
        if os.environ.get("VISTOK_DEBUG") or not _is_for_users(error):
            raise
        errors.print(f"[bold red]Error:[/] {escape(_message(error))}")
        sys.exit(2)


def _advise_after_interruption(end: SystemExit) -> None:
    """After Ctrl-C, which typer turns into an exit, print the notes on how to resume the interrupted work."""
    cause: BaseException | None = end
    while cause is not None and not isinstance(cause, KeyboardInterrupt):
        cause = cause.__cause__ or cause.__context__
    for note in getattr(cause, "__notes__", ()):
        errors.print(f"[yellow]Note:[/] {escape(note)}")


def _name_failed_thread(failure: threading.ExceptHookArgs) -> None:
    """Print one line instead of a traceback: such threads belong to libraries, like TensorBoard's event writer."""
    if failure.exc_type is not SystemExit:
        errors.print(f"[yellow]Note:[/] a thread in the background ended: {escape(str(failure.exc_value))}")


def _is_for_users(error: Exception) -> bool:
    """Whether an error is bad input, a failing file, or one of vistok's own error types."""
    return isinstance(error, ValueError | OSError) or type(error).__module__.startswith("vistok.")


def _message(error: Exception) -> str:
    text, notes = str(error) or type(error).__name__, getattr(error, "__notes__", ())
    text = re.sub(rf"\S{{{LONGEST_WORD},}}", lambda word: f"{word[0][:100]}…{word[0][-100:]}", text)
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        advice = notes or ("Nothing was left half-written; free some space and run the command again.",)
        return " ".join((f"{text}.", *advice))
    return "\n".join((text, *notes))


def _show_logs() -> None:
    """Send vistok's log messages (unreadable images, dropped weights) to standard error."""
    import logging

    from rich.logging import RichHandler

    logger = logging.getLogger("vistok")
    if not logger.handlers:
        logger.addHandler(RichHandler(console=errors, show_time=False, show_path=False))
        logger.setLevel(logging.INFO)


def help_(
    command: Annotated[str | None, typer.Argument(metavar="COMMAND", help="What to explain.")] = None,
) -> None:
    """Say what vistok or one of its commands does."""
    if command is not None and command not in COMMANDS:
        raise ValueError(
            f"there is no command {command!r}{suggestion(command, list(COMMANDS)) or '.'} `vistok help` lists all"
        )
    app(["--help"] if command is None else [command, "--help"], prog_name="vistok")


def version() -> None:
    """Print the version."""
    from vistok._version import __version__

    output.print(f"vistok {__version__}")


@app.callback(invoke_without_command=True)
def root(show: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if show:
        version()
        raise typer.Exit


COMMANDS: dict[str, Callable[..., None]] = {
    "quickstart": quickstart,
    "train": train,
    "report": report,
    "tokenize": tokenize,
    "import-tokens": import_tokens,
    "sample": sample,
    "pairs": pairs,
    "reconstruct": reconstruct,
    "demo": demo,
    "caption": caption,
    "eval": evaluate,
    "benchmark": benchmark,
    "probe": probe,
    "compare": compare,
    "convert": convert,
    "pipeline": pipeline,
    "models": models,
    "configs": configs,
    "help": help_,
    "version": version,
}
for _name, _command in COMMANDS.items():
    app.command(_name, cls=Command, help=help_of(_command))(_command)

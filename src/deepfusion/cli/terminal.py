"""What a command owes its terminal: text in any encoding, one line for every mistake, and an orderly end."""

from __future__ import annotations

import codecs
import logging
import os
import re
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

import typer.core
import typer.main

from deepfusion import progress
from deepfusion.errors import InputError, no_access

# What a shell reports of a program that a signal has ended: 128 and its number (SIGINT, SIGPIPE, SIGTERM).
INTERRUPTED, CLOSED, TERMINATED = 130, 141, 143

# Later versions of typer have a copy of click of their own, and raise its errors.
UsageError: type[Exception] = typer.BadParameter.__mro__[1]

_PLAIN = {
    "–": "-",
    "—": "-",
    "−": "-",
    "…": "...",
    "×": "x",
    "→": "->",
    "±": "+/-",
    "·": "-",
    "“": '"',
    "”": '"',
    "‘": "'",
    "’": "'",
}
_terminated = False


def prepare() -> None:
    """Let every line reach this terminal, whatever its encoding, and keep out what libraries tell their developers."""
    codecs.register_error("plain", _plain)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="plain")
    if not sys.warnoptions:  # nobody asked for warnings
        # Of the libraries below us: nothing that a user could act on.
        for category in (DeprecationWarning, FutureWarning, UserWarning):
            warnings.filterwarnings("ignore", category=category, module=r"(?!deepfusion)")
        if logging.lastResort is not None:  # prints what no handler was set up for
            logging.lastResort.setLevel(logging.ERROR)
    progress.to_terminal()
    typer.main.TyperArgument = _Argument  # type: ignore[misc]


def run(command: Callable[[], object]) -> int:
    """Run a command of the command line; its exit code. Whatever a user can cause ends in at most one line on
    stderr."""
    global _terminated  # noqa: PLW0603 - a signal reaches the whole process
    _terminated = False
    with _terminable():
        try:
            left = command()
            sys.stdout.flush()
            code = left if isinstance(left, int) else 0
        except InputError as error:
            return _refuse(error)
        except UsageError as error:
            # Who asked for nothing was shown the help.
            return 2 if type(error).__name__ == "NoArgsIsHelpError" else _refuse(usage_error(error))
        except UnicodeEncodeError as error:
            if error.encoding.lower().replace("-", "") == "utf8":
                raise
            return _refuse(_no_such_letter(error))
        except (KeyboardInterrupt, typer.Abort):
            code = INTERRUPTED
        except BrokenPipeError:
            code = CLOSED
        except SystemExit as end:
            # So typer and rich leave when nobody reads on; a defect of ours ends with a traceback.
            code = CLOSED if end.code == 1 else end.code if isinstance(end.code, int) else 0
        except Exception as error:
            refused = no_access(error, progress.attached())
            if refused is None:
                raise
            return _refuse(refused)
    if code == INTERRUPTED:
        folder = progress.attached()
        progress.say(f"deepfusion: stopped{f'; the same command goes on with {folder}' if folder else ''}")
        return TERMINATED if _terminated else INTERRUPTED
    if code == CLOSED:
        _forget(sys.stdout)
    return code


def usage_error(error: Any) -> InputError:
    """What the parser of the command line says, as one line of ours."""
    what, *hints = re.split(
        r"\s*\(?(?:Did you mean|Possible options:)\s*", " ".join(error.format_message().split())
    )
    what = re.sub(r"'(-{1,2}[\w-]+)'", r"\1", what).rstrip(". ")
    command = error.ctx.command_path if error.ctx else "deepfusion"
    hint = re.sub(r"'(-{0,2}[\w-]+)'", r"\1", hints[0]).rstrip("?). ") if hints else ""
    fix = f"did you mean {hint}?" if hint else f"{command} --help"
    return InputError(what[:1].lower() + what[1:], fix=fix, code="bad-usage")


def utf8() -> bool:
    """Whether stdout takes every letter."""
    return (sys.stdout.encoding or "").lower().replace("-", "").startswith("utf")


class _Argument(typer.core.TyperArgument):
    """An argument that keeps its help: typer 0.20 sets it first, and click 8.5 then sets it to what typer did not
    tell it.
    """

    def __init__(self, **arguments: object) -> None:
        super().__init__(**arguments)  # type: ignore[arg-type]
        self.help = arguments.get("help")  # type: ignore[assignment]


def _plain(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError)
    letter = error.object[error.start]
    return _PLAIN.get(letter) or letter.encode("ascii", "backslashreplace").decode(), error.start + 1


def _refuse(error: InputError) -> int:
    print(f"deepfusion: {error}", file=sys.stderr)
    return 2


def _no_such_letter(error: UnicodeEncodeError) -> InputError:
    letters = error.object[error.start : error.end]
    what = f"this system's encoding, {error.encoding}, has no {letters[:20]!a}, which a file name holds"
    return InputError(what, fix="set PYTHONUTF8=1 in the environment", code="bad-encoding")


def _forget(stream: object) -> None:
    """Nobody reads this stream any more: what is still to be written to it would be an error at the end of the
    process.
    """
    with suppress(OSError, AttributeError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # type: ignore[attr-defined]


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM ends a command as cleanly as Ctrl-C."""

    def stop(number: int, frame: FrameType | None) -> None:
        global _terminated  # noqa: PLW0603 - see above
        _terminated = True
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)

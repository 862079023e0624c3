"""What all commands share: errors in one line, exit codes, consoles."""

from __future__ import annotations

import io
import json
import math
import signal
import sys
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.markup import escape
from typer.core import TyperCommand, TyperGroup

from stepinfluence.extras import install_command
from stepinfluence.writers import remove_own_leftovers

FAILED_CHECK = 1
WRONG_USE = 2

UsageError: type[Exception] = typer.BadParameter.__mro__[1]
"""What a command line is refused with; of click, or of the copy of it that newer versions of typer bring."""

INTERRUPTED = 128 + signal.SIGINT
"""Exit status after Ctrl-C; other signals that end a command have 128 and their own number."""


class Stopped(KeyboardInterrupt):  # no error
    """A signal that asks a command to end; handled wherever Ctrl-C is."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


_came: list[int] = []
"""Signals that asked this process to end."""


def print_anything() -> None:
    """Have characters that a terminal or UTF-8 does not have (a file's name may be any bytes) spelled out."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def end_on_signals() -> None:
    """Have SIGTERM and SIGHUP end this process as Ctrl-C does: files aside and locks go, what is finished stays.

    A signal that whoever started the process has it ignore (``nohup``) stays ignored.
    """

    def stop(number: int, _: object) -> None:
        _came.append(number)
        raise Stopped(number)

    for name in ("SIGTERM", "SIGHUP"):  # Windows has no SIGHUP
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, stop)


def left(error: KeyboardInterrupt | SystemExit) -> SystemExit:
    """How the program ends, whose command has left so: where a signal struck outside of the command itself, click has
    taken it for Ctrl-C and says nothing."""
    if isinstance(error, SystemExit):
        if error.code != INTERRUPTED or not _came:
            return error
        error = Stopped(_came[-1])
    return SystemExit(interrupted(error).exit_code)


def interrupted(error: KeyboardInterrupt, then: str = "nothing is half-written") -> typer.Exit:
    """Say on stderr that a command was interrupted, by which signal, and what that means; the way to leave."""
    remove_own_leftovers()
    name = f" by {signal.Signals(error.number).name}" if isinstance(error, Stopped) else ""
    console(json_output=True).print(f"[bold]interrupted{name}[/bold]: {then}", soft_wrap=True)
    return typer.Exit(128 + error.number if isinstance(error, Stopped) else INTERRUPTED)


class _OneLineErrors:
    """Turns the library's errors into one line on stderr and exit code 2; ``--debug`` anywhere shows the traceback."""

    program = "sdi"
    """What the line begins with."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """People add ``--debug`` at the end of the line that has just failed: take it from there too."""
        self._debug = "--debug" in args
        rest = [a for a in args if a != "--debug"]
        try:
            return super().parse_args(ctx, rest or args)  # type: ignore[misc, no-any-return]  # of click's command
        except UsageError as error:
            self._refuse(error)

    def invoke(self, ctx: Any) -> Any:
        """Run the command.

        Raises:
            typer.Exit: with code 2, after an error that the user can mend; after a signal, with 128 and its number.
        """
        try:
            return super().invoke(ctx)  # type: ignore[misc]
        except BrokenPipeError:  # the reader of stdout has gone (head): typer leaves without a word
            raise
        except UsageError as error:
            self._refuse(error)
        # StepInfluenceError is a ValueError; naming it would import torch.
        except (ValueError, OSError) as error:
            if self._debug:
                raise
            fail(_words(error), program=self.program)
        except SystemExit as error:  # no command of ours calls it, and its status 0 would mean that all is well
            if self._debug:
                raise
            fail(
                f"a project's code or data ended the program (sys.exit({error.code!r})); have it raise an error",
                program=self.program,
            )
        except KeyboardInterrupt as error:
            raise interrupted(error) from None

    def _refuse(self, error: Any) -> NoReturn:
        """A command line that cannot be read, in one line; with nothing on it, the help.

        Raises:
            typer.Exit: with code 2.
        """
        if type(error).__name__ == "NoArgsIsHelpError":
            raise error
        where = error.ctx.command_path if error.ctx is not None else self.program
        fail(f"{error.format_message().rstrip('.')}; see {where} --help", program=self.program)


class _PlainTypes:
    """Help without names of Python's types: a flag takes nothing, and what an option takes is called by its metavar."""

    def get_params(self, ctx: Any) -> list[Any]:
        """Parameters of the command, ``--help`` included."""
        params: list[Any] = super().get_params(ctx)  # type: ignore[misc]  # of click's command
        for param in params:
            if getattr(param, "is_flag", False):
                param.metavar = ""
            elif param.param_type_name == "option" and param.metavar is None:
                param.metavar = max(param.opts, key=len).removeprefix("--").replace("-", "_").upper()
            elif param.param_type_name == "argument":
                param.display_type_rich = lambda ctx: ""  # its name says what it is
        return params


class CommandGroup(_PlainTypes, _OneLineErrors, TyperGroup):
    """A command with subcommands, such as ``sdi``; errors in one line."""


class Command(_PlainTypes, _OneLineErrors, TyperCommand):
    """A command of its own; errors in one line."""


class SubGroup(_PlainTypes, TyperGroup):
    """A group below ``sdi``, which deals with errors."""


class SubCommand(_PlainTypes, TyperCommand):
    """A command below ``sdi``, which deals with errors."""


def _words(error: Exception) -> str:
    """What an error says; of the system's, which file it is about and what was wrong."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error) or type(error).__name__


def fail(message: str, *, program: str = "sdi") -> NoReturn:
    """Say in one line on stderr what is wrong, and leave.

    Raises:
        typer.Exit: with code 2.
    """
    typer.secho(f"{program}: ", fg="red", bold=True, nl=False, err=True)
    typer.echo(" ".join(message.split()), err=True)
    raise typer.Exit(WRONG_USE)


def require_run(run: Path) -> None:
    """Before anything is imported that takes a second: that the folder is there.

    Raises:
        typer.Exit: with code 2, if it is not.
    """
    if not run.is_dir():
        fail(f"{run}: no run here (no such folder); sdi featurize makes one")


def require_output(path: Path, *suffixes: str) -> None:
    """Before anything is computed: that a file that was asked for can be written, and takes nobody else's place.

    Args:
        suffixes: what its name ends in, if a file of that name may be replaced.

    Raises:
        typer.Exit: with code 2, if it is a folder, its folder is missing, it is one of a run's own files, or it exists
            and is of another kind.
    """
    if path.is_dir():
        fail(f"out: {path} is a folder; give the name of a file")
    if not path.parent.is_dir():
        fail(f"out: {path} cannot be written: there is no folder {path.parent}; make it first")
    within = (path.absolute().parent, *path.absolute().parent.parents)[:3]
    of_run = path.name in ("config.yaml", ".lock", ".written-here") or path.name.endswith(OF_A_RUN)
    if any(map(_is_store, within)) or (of_run and any(map(_is_store, path.absolute().parent.glob("*/")))):
        fail(f"out: {path} is among the files of a store or run, which would be lost; give another name")
    if path.is_file() and path.suffix not in suffixes:
        fail(f"out: {path} exists, and does not end in {' or '.join(suffixes)}; give another name")


def _is_store(folder: Path) -> bool:
    """Whether a folder has a store's manifest: of others' there are many of that name."""
    try:
        with (folder / "manifest.json").open("rb") as file:
            return b'"sdi-store-' in file.read(64)
    except OSError:
        return False


OF_A_RUN = (".pinned.json", ".answers.json")
"""What names of files beside a run's stores end in."""

TRUST_HELP = "Run the project file that a run from elsewhere names."


def require_trust(run: Path, project: Path, *, trusted: bool) -> None:
    """Before the project file that a run's config names is run: unless the run was written here, ask, or leave.

    Args:
        trusted: it was said on the command line that it may be run.

    Raises:
        typer.Exit: with code 2, if it may not.
    """
    from stepinfluence.app.runs.trust import is_written_here, mark

    if not trusted and not is_written_here(run, project):
        what = f"{run}: was not written here by you, and this runs the code of {project}"
        if not (sys.stdin.isatty() and sys.stderr.isatty()):
            fail(f"{what}; look at it first, then add --trust-project")
        if not typer.confirm(f"{what}. Run it?", err=True):
            raise typer.Exit(WRONG_USE)
    mark(run, project)


DAMPING_HELP = (
    "Of the curvature: training (1 / training's length), auto, or relative to the largest eigenvalue. "
    "\\[default: the run's; else training where the store knows it, else auto]"
)

DampingOption = Annotated[str | None, typer.Option("--damping", metavar="X", help=DAMPING_HELP)]


def damping_of(text: str | None) -> Any:
    """``--damping``: a number, ``"auto"`` or ``"training"``; None where nothing was given."""
    if text is None or text in ("auto", "training"):
        return text
    try:
        return float(text)
    except ValueError:
        fail(f"damping: got {text!r}; give training, auto, or a number relative to the largest eigenvalue")


def shown(value: object) -> str:
    """A name that others gave, to be put into what a console prints: brackets in it are no markup."""
    return escape(str(value))


def print_json(value: Any) -> None:
    """Print JSON on stdout: as it is read best there, and with null for numbers that JSON does not have."""
    plain = _finite(value)
    text = json.dumps(plain, ensure_ascii=False, indent=2)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        text = json.dumps(plain, indent=2)
    typer.echo(text)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def console(*, json_output: bool = False) -> Console:
    """Where to print for people: stdout, or stderr when stdout is for JSON."""
    return Console(stderr=json_output, highlight=False)


def show_version(asked: bool) -> None:
    """Print the version and leave, if asked to."""
    if asked:
        try:
            version = metadata.version("sdi-kernels")
        except metadata.PackageNotFoundError:  # run from a source tree that was never installed
            from sdi_kernels import __version__ as version
        typer.echo(f"sdi {version}")
        raise typer.Exit


def need_extra(extra: str, missing: list[str], *, program: str = "sdi") -> None:
    """Leave with the command that installs an extra, if modules of it are missing.

    Raises:
        typer.Exit: with code 2.
    """
    if missing:
        fail(f"{', '.join(missing)} not installed: run {install_command(extra)}", program=program)

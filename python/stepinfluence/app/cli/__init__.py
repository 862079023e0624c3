"""The ``sdi`` command. One module for each subcommand; torch and plotly are imported inside commands only, so that
``sdi --help`` is quick.

A new command: write ``cli/<name>.py`` with a typed function ``run``, and register it below.
"""

from __future__ import annotations

from typing import Annotated

import typer

from stepinfluence.app.cli import demo, doctor, evaluate, explore, featurize, influence, init, outliers, query, store
from stepinfluence.app.cli._common import (
    CommandGroup,
    SubCommand,
    end_on_signals,
    left,
    print_anything,
    show_version,
)

HELP = """Which training examples shaped a looped transformer's answer, and at which loop step.

[bold]First steps[/bold]
  [cyan]sdi demo --quick[/cyan]            every part on a tiny model, in seconds
  [cyan]sdi doctor[/cyan]                  what this machine has, and what will be used

[bold]Your own model[/bold]
  [cyan]sdi init my_project.py[/cyan]      a file that says how to find model and data
  [cyan]sdi featurize -p my_project.py -s train -s query -o run[/cyan]
  [cyan]sdi query run --row 0[/cyan]       which examples shaped the first query's answer?
  [cyan]sdi explore run[/cyan]             the same in a browser

In Python: [cyan]import stepinfluence; help(stepinfluence)[/cyan]
"""

app = typer.Typer(
    name="sdi",
    cls=CommandGroup,
    help=HELP,
    epilog="Exit status: 0 all well, 1 a check failed, 2 wrong use, 130 interrupted (SIGTERM 143, SIGHUP 129).",
    rich_markup_mode="rich",
    no_args_is_help=True,
    pretty_exceptions_enable=False,  # with --debug, the plain traceback; without, one line (CommandGroup)
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def _options(
    _version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
    _debug: Annotated[
        bool, typer.Option("--debug", help="Show the full traceback of an error. May also follow the command.")
    ] = False,
) -> None:
    pass


for name, module, panel in (
    ("demo", demo, "See it work"),
    ("doctor", doctor, "See it work"),
    ("evaluate", evaluate, "See it work"),
    ("init", init, "Your own model"),
    ("featurize", featurize, "Your own model"),
    ("query", query, "Your own model"),
    ("influence", influence, "Your own model"),
    ("outliers", outliers, "Your own model"),
):
    epilog = getattr(module, "EPILOG", None)
    app.command(name, cls=SubCommand, help=module.HELP, epilog=epilog, rich_help_panel=panel)(module.run)
app.add_typer(store.app, name="store", help=store.HELP, epilog=store.EPILOG, rich_help_panel="Your own model")
for name, text, run in (
    ("explore", explore.EXPLORE_HELP, explore.explore),
    ("report", explore.REPORT_HELP, explore.report),
):
    app.command(name, cls=SubCommand, help=text, rich_help_panel="Look at a run")(run)


def main() -> None:
    """Entry point of the ``sdi`` command and of ``python -m stepinfluence``."""
    print_anything()
    end_on_signals()
    try:
        app(prog_name="sdi")
    except (KeyboardInterrupt, SystemExit) as error:
        raise left(error) from None

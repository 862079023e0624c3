"""The ``sdi`` command. One module for each subcommand; torch and plotly are imported inside commands only, so that
``sdi --help`` is quick.

A new command: write ``cli/<name>.py`` with a typed function ``run``, and register it below.
"""

from __future__ import annotations

from typing import Annotated

import typer

from stepinfluence.app.cli import demo, doctor, evaluate, explore, featurize, influence, init, outliers, query, store
from stepinfluence.app.cli._common import CommandGroup, end_on_signals, left, show_version

HELP = """Which training examples shaped a looped transformer's answer, and at which loop step.

[bold]First steps[/bold]
  [cyan]sdi doctor[/cyan]                  what this machine has, and what will be used
  [cyan]sdi demo --quick[/cyan]            every part on a tiny model, in seconds
  [cyan]sdi demo --out my-demo[/cyan]      train, attribute, and write my-demo/report.html

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


app.command("demo", help=demo.HELP, rich_help_panel="See it work")(demo.run)
app.command("doctor", help=doctor.HELP, rich_help_panel="See it work")(doctor.run)
app.command("evaluate", help=evaluate.HELP, rich_help_panel="See it work")(evaluate.run)
app.command("explore", help=explore.EXPLORE_HELP, rich_help_panel="Look at a run")(explore.explore)
app.command("report", help=explore.REPORT_HELP, rich_help_panel="Look at a run")(explore.report)
app.command("init", help=init.HELP, rich_help_panel="Your own model")(init.run)
app.command("featurize", help=featurize.HELP, epilog=featurize.EPILOG, rich_help_panel="Your own model")(featurize.run)
app.command("query", help=query.HELP, epilog=query.EPILOG, rich_help_panel="Your own model")(query.run)
app.command("influence", help=influence.HELP, epilog=influence.EPILOG, rich_help_panel="Your own model")(influence.run)
app.command("outliers", help=outliers.HELP, epilog=outliers.EPILOG, rich_help_panel="Your own model")(outliers.run)
app.add_typer(store.app, name="store", help=store.HELP, epilog=store.EPILOG, rich_help_panel="Your own model")


def main() -> None:
    """Entry point of the ``sdi`` command and of ``python -m stepinfluence``."""
    end_on_signals()
    try:
        app(prog_name="sdi")
    except (KeyboardInterrupt, SystemExit) as error:
        raise left(error) from None

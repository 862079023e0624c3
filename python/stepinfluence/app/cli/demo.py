"""``sdi demo``: from training to influence trajectories, on this machine."""

from __future__ import annotations

import json
import shutil
import time
import webbrowser
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from stepinfluence.app.cli._common import FAILED_CHECK, console, need_extra, print_json

if TYPE_CHECKING:
    from stepinfluence.app.demo.data import DemoConfig, DemoResult

REPLAY = "sdi demo"
HELP = """Train a looped transformer, then ask which training examples shaped its answers, and at which loop step.

The task is parity: is the number of ones in a bit string odd? The model applies one block once per bit.
About three minutes on a CPU core.

[bold]Written to DIR[/bold]
  report.html     the charts; opens in any browser, offline
  influence.npz   all scores
  config.json     repeats the run, see --config
  checkpoints/    with optimizer state

[bold]Examples[/bold]
  [cyan]sdi demo --open[/cyan]
  [cyan]sdi demo --quick --out /tmp/try[/cyan]
  [cyan]sdi demo --config sdi-demo/config.json --out again[/cyan]
"""

LARGEST_SEED = 2**63 - 1  # that torch's generators take


def run(
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="DIR", help="Folder for the report, the scores and the checkpoints.")
    ] = Path("sdi-demo"),
    seed: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=0, max=LARGEST_SEED, help="Of the data, the model and the sketches. \\[default: 0]"
        ),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="A tiny model, in seconds. It need not solve the task.")
    ] = False,
    config: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Repeat the run that wrote this config.json.")
    ] = None,
    open_: Annotated[bool, typer.Option("--open/--no-open", help="Open the report in a browser at the end.")] = False,
    images: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Also save two charts as PNG files there, and what their tests found."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on stdout; progress goes to stderr.")] = False,
) -> None:
    """See :data:`HELP`."""
    screen = console(json_output=as_json)
    if config is not None and (quick or seed is not None):
        raise typer.BadParameter("give either --config, or --seed and --quick", param_hint="'--config'")
    with screen.status("starting"):
        from stepinfluence.app.demo.data import DemoConfig, save_arrays, save_config
        from stepinfluence.app.demo.run import run_demo
        from stepinfluence.app.doctor import EXTRAS, missing_modules

        need_extra("report", missing_modules(EXTRAS["report"]))
        if config is not None:
            chosen = DemoConfig.from_json(config)
        else:
            chosen = (DemoConfig.quick if quick else DemoConfig.full)(seed=seed or 0)
    _prepare(out)
    save_config(chosen, out / "config.json")

    numbers = iter(range(1, 100))
    result = run_demo(
        chosen, out / "checkpoints", announce=lambda name: screen.print(f"[dim]{next(numbers)}[/dim] {name}")
    )
    from stepinfluence.app.demo.report import demo_report
    from stepinfluence.app.view.report import write_report

    began = time.perf_counter()
    report = demo_report(result, command=_command(chosen))
    save_arrays(result, out / "influence.npz")
    write_report(report, out / "report.html")
    if images is not None:
        from stepinfluence.app.view.report.pictures import save_pictures
        from stepinfluence.files import write_bytes

        images.mkdir(parents=True, exist_ok=True)
        save_pictures(report, images, prefix="demo-")
        write_bytes(images / "demo-findings.json", (json.dumps(_findings(result), indent=2) + "\n").encode())
    wrote = time.perf_counter() - began

    if as_json:
        print_json(_json(result, out))
    else:
        from stepinfluence.app.demo.summary import show

        show(screen, result, wrote)
        _show_files(screen, out)
    if open_:
        webbrowser.open((out / "report.html").resolve().as_uri())
    _judge(result)


def _command(config: DemoConfig) -> str:
    for name, preset in (("", type(config).full), (" --quick", type(config).quick)):
        if config == preset(seed=config.seed):
            return f"{REPLAY}{name} --seed {config.seed}"
    return f"{REPLAY} --config config.json"


def _prepare(folder: Path) -> None:
    """Make the output folder, or clear away an earlier demo there; anything else in it is not ours to touch.

    Raises:
        ValueError: the folder holds other things.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        earlier = json.loads((folder / "config.json").read_text(encoding="utf-8"))["replay"].startswith(REPLAY)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        earlier = False
    if not earlier and any(folder.iterdir()):
        raise ValueError(f"out: {folder} is not empty and holds no earlier demo; choose another folder with --out")
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    for name in ("report.html", "influence.npz"):
        (folder / name).unlink(missing_ok=True)


def _findings(result: DemoResult) -> dict[str, Any]:
    """What may be said beside the pictures: the tests of the query that they show, and where they come from."""
    from stepinfluence.app.demo.report import default_note

    query = result.queries[0].example
    return {
        "command": _command(result.config),
        "query": query.text,
        "bits": query.n_digits,
        "loop_steps": result.sdi.shape[2],
        "aggregation": default_note(result),
        "periods": {name: asdict(period) for name, period in result.periods(0).items()},
        "versions": dict(result.versions),
        "machine": dict(result.machine),
    }


def _show_files(screen: Console, out: Path) -> None:
    from rich.text import Text

    report = (out / "report.html").resolve()
    screen.print(Text.assemble("\nOpen ", (str(out / "report.html"), f"bold link {report.as_uri()}")))
    screen.print(
        Text(f"     {out / 'influence.npz'} has every score, {out / 'config.json'} repeats this run", style="dim")
    )


def _judge(result: DemoResult) -> None:
    """Leave with a failure if the model cannot do the task, or the sketches do not add up."""
    loud = Console(stderr=True)
    if not result.solved:
        asked = {n: result.accuracy_beyond[n] for n in result.asked_lengths if n not in result.accuracy}
        known = {**result.accuracy, **asked}
        worst = min(known, key=lambda n: known[n])
        loud.print(
            f"[bold white on red] NOT SOLVED [/] accuracy {result.overall_accuracy:.1%} over the lengths of training, "
            f"{known[worst]:.1%} at {worst} bits; {result.config.required_accuracy:.0%} is required. "
            "Influence on answers that are wrong explains little: try another --seed."
        )
    if not result.conserved:
        loud.print(f"[bold white on red] NOT CONSERVED [/] relative error {result.conservation:.1e}: this is a bug.")
    if not (result.solved and result.conserved):
        raise typer.Exit(FAILED_CHECK)


def _json(result: DemoResult, out: Path) -> dict[str, Any]:
    from stepinfluence.app.demo.report import default_note
    from stepinfluence.attribution.aggregation import SHARE, energy_shares
    from stepinfluence.display.words import peak_step, top_rows

    def example(row: int, column: int) -> dict[str, Any]:
        e = result.train[row]
        scores = result.sdi[row, column]
        return {"id": e.id, "text": e.text, "total": float(scores.sum()), "peak_step": peak_step(scores)}

    queries = []
    for column, query in enumerate(result.queries):
        helpful, harmful = top_rows(result.tracin[:, column], 5)
        queries.append(
            {
                "text": query.example.text,
                "loss": query.loss,
                "truth": query.example.parity,
                "prediction": query.prediction,
                "helpful": [example(row, column) for row in helpful],
                "harmful": [example(row, column) for row in harmful],
                "periods": {name: asdict(period) for name, period in result.periods(column).items()},
                "largest_example": result.largest_example(column),
                "checkpoint_shares": energy_shares(result.energy_by_checkpoint[:, column]).tolist(),
                "dominated_by": None if (owner := result.dominance(column)) is None else owner.name,
            }
        )
    return {
        "solved": result.solved,
        "accuracy": {str(n): a for n, a in result.accuracy.items()},
        "accuracy_beyond_training": {str(n): a for n, a in result.accuracy_beyond.items()},
        "conservation_error": result.conservation,
        "sdi_error": result.sdi_error,
        "tracin_error": result.tracin_error,
        "convention": "positive = training on the example lowers the query's loss; peak_step counts from 1",
        "curvature": {"kind": result.config.curvature, "damping": result.damping},
        "aggregation": default_note(result),
        "unit": SHARE,
        "checkpoints": result.checkpoint_names,
        "chosen": result.checkpoint_names[result.chosen],
        "queries": queries,
        "etas": result.etas,
        "stages": [
            {"name": s.name, "seconds": s.seconds, "cpu_seconds": s.cpu_seconds, "peak_bytes": s.peak_bytes}
            for s in result.stages
        ],
        "files": {name: str(out / name) for name in ("report.html", "influence.npz", "config.json", "checkpoints")},
        "versions": dict(result.versions),
        "machine": dict(result.machine),
    }

"""Every option of every command does something: the answer is another one with it, or it is refused where it says
nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from commands import call, featurized, invoke, refused
from stepinfluence.app.cli import app, explore
from stepinfluence.app.cli._common import WRONG_USE
from typer.main import get_command

SETS: dict[str, dict[str, tuple[str, str]]] = {
    "query": {
        "--id": ("query RUN --row 0", "query RUN --row 0 --id 3"),
        "--row": ("query RUN --row 0", "query RUN --row 1"),
        "--input": ("query RUN --row 0", "query RUN --input NEW"),
        "-k": ("query RUN --row 0 --json", "query RUN --row 0 --json -k 3"),
        "--step": ("query RUN --row 0 --json", "query RUN --row 0 --json --step 1"),
        "--harmful": ("query RUN --row 0", "query RUN --row 0 --harmful"),
        "--exact": ("query RUN --row 0", "query RUN --row 0 --exact"),
        "--candidates": (
            "query RUN --row 0 --exact -k 5 --json",
            "query RUN --row 0 --exact -k 5 --candidates 5 --json",
        ),
        "--parameters": ("query RUN --row 0", "query RUN --row 0 --parameters *.bias"),
        "--curvature": ("query RUN --row 0", "query RUN --row 0 --curvature none"),
        "--damping": ("query RUN --row 0", "query RUN --row 0 --damping 0.5"),
        "--train": ("query RUN --row 0", "query RUN --row 0 --train query --query query"),
        "--query": ("query RUN --row 0", "query RUN --row 0 --query train"),
        "--json": ("query RUN --row 0", "query RUN --row 0 --json"),
    },
    "influence": {
        "--out": ("influence RUN", "influence RUN -o OUT.npy"),
        "--top-k": ("influence RUN", "influence RUN -k 2"),
        "--format": ("influence RUN -k 2", "influence RUN -k 2 --format csv"),
        "--per-step": ("influence RUN -k 2", "influence RUN -k 2 --per-step"),
        "--harmful": ("influence RUN -k 2", "influence RUN -k 2 --harmful"),
        "--parameters": ("influence RUN -k 2", "influence RUN -k 2 --parameters *.bias"),
        "--curvature": ("influence RUN -k 2", "influence RUN -k 2 --curvature fisher"),
        "--damping": ("influence RUN -k 2 --curvature fisher", "influence RUN -k 2 --curvature fisher --damping 0.5"),
        "--train": ("influence RUN -k 2", "influence RUN -k 2 --train query --query query"),
        "--query": ("influence RUN -k 2", "influence RUN -k 2 --query train"),
        "--json": ("influence RUN", "influence RUN --json"),
    },
    "outliers": {
        "-k": ("outliers RUN", "outliers RUN -k 2"),
        "--by": ("outliers RUN", "outliers RUN --by leverage"),
        "--curvature": ("outliers RUN --by leverage", "outliers RUN --by leverage --curvature block"),
        "--damping": ("outliers RUN --by leverage", "outliers RUN --by leverage --damping 0.5"),
        "--train": ("outliers RUN", "outliers RUN --train query"),
        "--json": ("outliers RUN", "outliers RUN --json"),
    },
    "report": {
        "--out": ("report RUN", "report RUN -o OUT.html"),
        "--train": ("report RUN -o OUT.html", "report RUN -o OUT.html --train query --query query"),
        "--query": ("report RUN -o OUT.html", "report RUN -o OUT.html --query train"),
        "--curvature": ("report RUN -o OUT.html", "report RUN -o OUT.html --curvature none"),
        "--damping": ("report RUN -o OUT.html", "report RUN -o OUT.html --damping 0.5"),
        "--queries": ("report RUN -o OUT.html", "report RUN -o OUT.html --queries 2"),
        "--id": ("report RUN -o OUT.html", "report RUN -o OUT.html --id 3"),
        "--exact": ("report RUN -o OUT.html", "report RUN -o OUT.html --exact"),
        "--open": ("report RUN -o OUT.html", "report RUN -o OUT.html --open"),
    },
    "explore": {
        "--train": ("explore RUN --no-open", "explore RUN --no-open --train query --query query"),
        "--query": ("explore RUN --no-open", "explore RUN --no-open --query train"),
        "--curvature": ("explore RUN --no-open", "explore RUN --no-open --curvature none"),
        "--damping": ("explore RUN --no-open", "explore RUN --no-open --damping 0.5"),
        "--port": ("explore RUN --no-open", "explore RUN --no-open --port 1234"),
        "--host": ("explore RUN --no-open", "explore RUN --no-open --host 0.0.0.0"),
        "--open": ("explore RUN --no-open", "explore RUN --open"),
    },
    "init": {
        "--template": ("init OUT.py", "init OUT.py --template parity"),
    },
    "doctor": {"--json": ("doctor", "doctor --json")},
    "store info": {"--json": ("store info RUN", "store info RUN --json")},
    "store verify": {
        "--json": ("store verify RUN", "store verify RUN --json"),
        "--report": ("store verify RUN", "store verify RUN --report PAGE"),
    },
    "store merge": {
        "--out": ("store merge RUN/train --out OUT1", "store merge RUN/train --out OUT2"),
        "--copy": ("store merge RUN/train --out OUT1", "store merge RUN/train --out OUT1 --copy"),
    },
}
"""By command and option: a call without it, and one with it, whose answers differ."""

NOTHING = [
    ("query RUN --input NEW --query train", "query: is the split of --id and --row"),
    ("query RUN --row 0 --device cpu", "device: is where the model runs, for --input and --exact"),
    ("query RUN --row 0 --curvature none --damping 1", "damping: goes with scores that are corrected"),
    ("query RUN --row 0 --step 9", "step: got '9'; the queries have steps 1 to 4"),
    ("report RUN --id 3 --queries 2", "queries: the file holds those of --id"),
    ("report RUN --device cpu", "device: is where the model runs, for --exact and --tokens"),
    ("report RUN --curvature none --damping 1", "damping: goes with curvature fisher or block"),
    ("explore RUN --no-open --curvature none --damping 1", "damping: goes with curvature fisher or block"),
]
"""Calls with an option that says nothing there, and how they are refused."""

DEVICES = [
    "query RUN --row 0 --exact", "query RUN --input NEW", "report RUN --exact", "report RUN --tokens",
    "explore RUN --no-open", "influence RUN", "influence RUN -k 2",
]  # fmt: skip
"""Calls that take a device: one that is not there is refused at once. With another one, answers are the same."""

ELSEWHERE = {
    "": "--version and --debug: test_cli.py",
    "demo": "test_demo.py", "evaluate": "evaluation/test_cli.py", "featurize": "runs/test_featurize.py, test_misuse.py",
}  # fmt: skip
"""Commands whose options are settings of a run of their own, and where they are tested."""

ALLOWED = {"--trust-project", "--force", "--help"}
"""Leave to do what is refused otherwise; nothing is lost where it is given without need."""

WRITTEN = ("influence.npy", "influence.json", "report.html")
"""Files that calls write into the run unless told otherwise."""

OTHER = {"init": {"--hf", "--data", "--task"}, "report": {"--tokens"}}
"""Need a model of the hub, or a project with tokens: integrations/test_pretrained.py, explore/test_model.py."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = featurized(tmp_path_factory.mktemp("options"), "def from_json(f): return dataset('query')[f['place']]\n")
    (folder.parent / "new.jsonl").write_text('{"place": 2}\n')
    invoke("report", folder, "--out", folder.parent / "page.html")
    return folder


def options() -> Iterator[tuple[str, str]]:
    """Every command and option, by the first name of each."""
    left: list[tuple[str, Any]] = [("", get_command(app))]
    while left:
        words, command = left.pop()
        left += [(f"{words} {name}".strip(), one) for name, one in getattr(command, "commands", {}).items()]
        for parameter in command.params:
            if parameter.param_type_name == "option":
                yield words, parameter.opts[0]


def words(line: str, run: Path, out: Path) -> list[str]:
    places = {"RUN": run, "NEW": run.parent / "new.jsonl", "PAGE": run.parent / "page.html"}
    found = []
    for word in line.split():
        name, _, rest = word.partition("/")
        if name in places:
            found.append(str(places[name] / rest if rest else places[name]))
        else:
            found.append(str(out / word) if word.startswith("OUT") else word)
    return found


def answer(line: str, run: Path, out: Path) -> tuple[Any, ...]:
    """All that a call tells: what it prints, the files that it writes, what it would serve and opens."""
    out.mkdir()
    told: list[Any] = []

    def serve(explorer: Any, *, host: str, port: int, ready: Any) -> None:
        ready("address")
        told.append((host, port, json.dumps(explorer.overview(), default=str, sort_keys=True)))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(explore.webbrowser, "open", lambda address: told.append(("opened", address)))
        patch.setattr("stepinfluence.app.view.explore.serve.serve", serve)
        done = call(*words(line, run, out))
    assert done.exit_code in (0, WRONG_USE), done.output
    files = [
        (str(f.relative_to(out)), f.stat().st_nlink, f.read_bytes().replace(str(out).encode(), b""))
        for f in sorted(out.rglob("*"))
        if f.is_file()
    ]
    written = [(run / name).is_file() for name in WRITTEN]
    for name in WRITTEN:
        (run / name).unlink(missing_ok=True)
    return done.exit_code, done.stdout.replace(str(out), ""), done.stderr.replace(str(out), ""), files, written, told


@pytest.fixture(scope="module")
def answers() -> dict[str, tuple[Any, ...]]:
    """Of calls without an option, which several options are compared with."""
    return {}


@pytest.mark.parametrize(("command", "option"), [(c, o) for c, some in SETS.items() for o in some])
def test_an_option_changes_the_answer(
    run: Path, answers: dict[str, tuple[Any, ...]], command: str, option: str, tmp_path: Path
) -> None:
    without, with_ = SETS[command][option]
    assert without.startswith(command)
    assert with_.startswith(command)
    if without not in answers:
        answers[without] = answer(without, run, tmp_path / "a")
    assert answers[without][0] == 0
    assert answers[without] != answer(with_, run, tmp_path / "b")


@pytest.mark.parametrize(("line", "message"), NOTHING)
def test_an_option_that_says_nothing_is_refused(run: Path, line: str, message: str, tmp_path: Path) -> None:
    assert message in refused(*words(line, run, tmp_path))


@pytest.mark.parametrize("line", DEVICES)
def test_a_device_that_is_not_there_is_refused(run: Path, line: str, tmp_path: Path) -> None:
    assert "device: got 'xyz'; use auto, cpu, cuda or cuda:N" in refused(*words(line, run, tmp_path), "--device", "xyz")


def test_every_option_is_here() -> None:
    known = {(command, option) for command, some in (*SETS.items(), *OTHER.items()) for option in some}
    devices = {(line.split()[0], "--device") for line in DEVICES}
    left = {(c, o) for c, o in options() if c not in ELSEWHERE and o not in ALLOWED}
    assert left == known | devices

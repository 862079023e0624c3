"""Damaged settings, pins, descriptions of scores, marks of places, and files of new examples."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from random import Random
from types import ModuleType
from typing import Any, TypeAlias

import yaml

from bench.attack.campaign import Attack, Campaign
from bench.attack.made import featurize, write_project
from bench.attack.mutate import damaged, odd_json, odd_value
from bench.attack.processes import must, preload, sdi
from bench.attack.verdicts import OTHER, REFUSED, SAME, SILENT, Verdict, judged

Use: TypeAlias = Callable[[Path], Any]

SNIPPETS = (
    "seed: !!python/object/apply:os.system ['true']\n",
    "seed: !!python/name:os.system\n",
    "? [1, 2]\n: 3\n",
    "a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\nd: &d [*c, *c]\n",
    "seed: 2026-99-99\n",
    "seed: 9999-12-31T23:59:60Z\n",
    "seed: 190:20:30.15\n",
    "seed: 0x_\n",
    "seed: .inf\n",
    "seed: " + "9" * 5000 + "\n",
    "<<: {seed: 1}\n",
    "<<: [1]\n",
    "--- \n--- \n",
    "%YAML 9.9\n",
    "\t\n",
    'project: "a\\0b"\n',
    "=: =\n",
    "seed: !!binary '%%%'\n",
    "seed: !!set {a}\n",
    "seed: !!omap [a]\n",
)


def module(name: str) -> ModuleType | None:
    """A module of the package; None where this version has none of that name."""
    with contextlib.suppress(ImportError):
        return importlib.import_module(name)
    return None


def odd_yaml(rng: Random, data: bytes) -> bytes:
    """A YAML file with odd values, lines in other places, or pieces of YAML that few files have."""
    kind = rng.randrange(5)
    if kind == 0:
        lines = data.splitlines(keepends=True)
        rng.shuffle(lines)
        return b"".join(lines)
    if kind == 1:
        return data + rng.choice(SNIPPETS).encode()
    if kind == 2:
        depth = rng.choice((3, 100, 5000))
        return data + b"seed: " + rng.choice((b"[", b"{a: ", b"- ")) * depth
    with contextlib.suppress(Exception):  # what YAML cannot write is damaged instead
        return yaml.safe_dump(odd_value(rng, yaml.safe_load(data)), allow_unicode=rng.random() < 0.5).encode()
    return damaged(rng, data)


def new_examples(path: Path) -> Any:
    """What ``sdi query --input`` reads; its way to leave is the refusal."""
    from stepinfluence.app.cli.query import _examples
    from stepinfluence.errors import ConfigError

    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return _examples(str(path))
    except Exception as left:
        if getattr(left, "exit_code", None) == 2:
            raise ConfigError(said.getvalue().rstrip("\n")) from None
        raise


def uses(folder: Path) -> dict[Path, tuple[Use, str]]:
    """How each file of a run is read, and what a change in it that is taken means."""
    from stepinfluence.app.runs.config import RunConfig

    found: dict[Path, tuple[Use, str]] = {
        folder / "run" / "config.yaml": (RunConfig.load, OTHER),
        folder / "new.jsonl": (new_examples, OTHER),
        folder / "new.json": (new_examples, OTHER),
    }
    if (pinned := module("stepinfluence.app.runs.pinned")) is not None:
        found[folder / "run" / "train.pinned.json"] = (pinned.Pins.read, SILENT)
    if (trust := module("stepinfluence.app.runs.trust")) is not None:
        project = folder / "my_project.py"
        found[folder / "run" / ".written-here"] = (lambda path: trust.is_written_here(path.parent, project), SILENT)
    scores = module("stepinfluence.app.runs.scores")
    for name in ("influence.json", "influence.npy"):
        found[folder / "run" / name] = (lambda path: pair(path.with_suffix(".npy"), scores), SILENT)
    return found


def pair(path: Path, scores: ModuleType | None) -> Any:
    """A run's scores and their description, where ``sdi store verify`` has nothing against them."""
    from stepinfluence.errors import StoreError

    problem = scores.scores_problem(path) if scores is not None else None
    if problem is not None:
        raise StoreError(problem)
    return path.read_bytes(), json.loads(path.with_suffix(".json").read_bytes())


def prepare(folder: Path) -> Attack:
    from stepinfluence.errors import StepInfluenceError

    preload()
    os.environ["XDG_CONFIG_HOME"] = str(folder / "settings")
    project = write_project(folder)
    must(sdi(*featurize(project, folder / "run")), folder)
    must(sdi("influence", folder / "run"), folder)
    examples = [{"x": [float(k)] * 6, "text": "a\u2028b é"} for k in range(3)]
    (folder / "new.jsonl").write_text("".join(json.dumps(e) + "\n" for e in examples))
    (folder / "new.json").write_text(json.dumps(examples))
    files = uses(folder)
    whole = {path: path.read_bytes() for path in files}
    before = {path: use(path) for path, (use, _) in files.items()}

    def made(rng: Random, path: Path) -> bytes:
        data = whole[path]
        if rng.random() < 0.4:
            return damaged(rng, data, whole[rng.choice(list(files))])
        if path.suffix == ".yaml":
            return odd_yaml(rng, data)
        if path.suffix == ".json":
            from stepinfluence.files import sealed

            return odd_json(rng, data, sealed if rng.random() < 0.3 else None)
        return damaged(rng, data)

    def attack(rng: Random) -> Verdict:
        path = rng.choice(list(files))
        use, taken = files[path]
        changed = made(rng, path)
        path.write_bytes(changed)
        try:
            found, verdict = judged(lambda: use(path), (StepInfluenceError,), path.name)
        finally:
            path.write_bytes(whole[path])
        if verdict is not None:
            return verdict
        if found is False:  # a mark that is not believed
            return Verdict(REFUSED, path.name)
        if found == before[path]:
            return Verdict(SAME, path.name)
        # A checksum was made anew over odd values: nothing could tell, and what comes of it must still be an error.
        return Verdict(
            OTHER if b'"sha256"' in changed and _is_sealed(changed) else taken, f"{path.name}: other content"
        )

    return attack


def _is_sealed(data: bytes) -> bool:
    from stepinfluence.files import sealed

    with contextlib.suppress(ValueError, RecursionError, AttributeError):
        content = json.loads(data)
        return data == sealed({key: value for key, value in content.items() if key != "sha256"})
    return False


CAMPAIGN = Campaign("configs", "damaged settings, pins, descriptions and files of new examples", 0.06, prepare)

"""Messages of the command line speak of what its user wrote: files, options and ids, not Python's insides."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from stepinfluence.app.cli import app
from typer.testing import CliRunner

INSIDES = re.compile(
    r"\b(loss_fn|store\.ids|NoneType|IndexError|KeyError|EOFError|struct\.error|list index|range\(|object at|"
    r"(dict|str|int|bool|tuple)\b)"
)


def refused(*arguments: str | Path) -> str:
    done = CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "80", "NO_COLOR": "1"})
    assert done.exit_code == 2, done.output
    message = done.stderr.strip().splitlines()[-1]
    assert message.startswith("sdi: ")
    assert not INSIDES.search(message), message
    return message


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("messages")
    assert CliRunner().invoke(app, ["init", str(folder / "p.py"), "--template", "blank"]).exit_code == 0
    asked = ["featurize", "-p", str(folder / "p.py"), "-s", "train", "-s", "query", "--sketch-size", "64"]
    assert CliRunner().invoke(app, [*asked, "-o", str(folder / "run")]).exit_code == 0
    return folder / "run"


def changed(run: Path, was: str, now: str, name: str) -> Path:
    text = (run.parent / "p.py").read_text(encoding="utf-8")
    assert was in text
    path = run.parent / name
    path.write_text(text.replace(was, now), encoding="utf-8")
    return path


def test_an_id_that_is_not_there_names_some_that_are(run: Path) -> None:
    assert refused("query", run, "--id", "nobody").endswith("there are 8, such as 0, 1, 2")


def test_steps_count_from_1(run: Path) -> None:
    assert "the queries have steps 1 to 4" in refused("query", run, "--row", "0", "--step", "9")


def test_a_loss_of_a_wrong_shape_is_the_file_s_and_skipping_is_not_offered(run: Path) -> None:
    project = changed(run, 'reduction="none"', 'reduction="mean"', "mean.py")
    for more in ([], ["--on-error", "skip"]):
        message = refused("featurize", "-p", project, "-s", "train", "-o", run.parent / "mean", *more)
        assert f"{project}: loss(): returned shape ()" in message
        assert "skip" not in message


def test_a_loss_that_is_not_finite_offers_to_skip_it(run: Path) -> None:
    project = changed(
        run, "return nn.functional.cross_entropy(", "return float('nan') * nn.functional.cross_entropy(", "nan.py"
    )
    message = refused("featurize", "-p", project, "-s", "train", "-o", run.parent / "nan")
    assert f"{project}: loss(): loss is NaN" in message
    assert "--on-error skip goes on without them" in message


@pytest.mark.parametrize("content", [b"", b"eeee", b"PK\x03\x04" + bytes(20), b"\x80\x02}q\x00."])
def test_a_file_that_is_no_checkpoint(run: Path, content: bytes) -> None:
    path = run.parent / "broken.pt"
    path.write_bytes(content)
    message = refused(
        "featurize", "-p", run.parent / "p.py", "-s", "train", "-o", run.parent / "x", "--checkpoints", path
    )
    assert f"{path}: " in message


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("sketch_size", "big", "got 'big', a text; give a whole number"),
        ("fold", 3, "got 3, a whole number; give true or false"),
        ("splits", ["train"], "got ['train'], a list; give a mapping"),
        ("eta", {}, "got {}, a mapping; give a number or a whole number or nothing"),
    ],
)
def test_settings_are_called_as_in_their_file(run: Path, key: str, value: object, said: str) -> None:
    content = {"project": "p.py", "splits": {"train": {}}, key: value}
    path = run.parent / "bad.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    assert said in refused("featurize", "--config", path, "-o", run.parent / "y")


def test_other_settings_than_the_run_s(run: Path) -> None:
    message = refused("featurize", "-s", "train", "-o", run, "--eta", "0.5", "--trust-project")
    assert "eta: the run in" in message
    assert "begun with nothing, not 0.5" in message

"""Project files: what is asked of them, and what is said when it is not there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from stepinfluence import Project, ProjectError
from torch import nn


def refused(path: Path) -> str:
    with pytest.raises(ProjectError) as caught:
        Project.load(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_functions_and_defaults(project_file: Path) -> None:
    project = Project.load(project_file)
    model = project.model()
    assert isinstance(model, nn.Module)
    assert project.body(model) == "core"
    data = project.dataset("train")
    assert len(data) == 22
    assert project.example_id(data[3], 3) == "train-3"
    assert project.text(data[3]) == "example train-3"
    assert project.metadata(data[3]) == {}
    assert project.tokens(data[3]) is None
    assert project.from_json({"id": 1}) == {"id": 1}
    assert project.attach_options() == {}
    assert project.loss(model, project.collate([data[0], data[1]])).shape == (2,)


def test_defaults_without_fields(tmp_path: Path) -> None:
    path = tmp_path / "plain.py"
    path.write_text(
        "import torch\nfrom torch import nn\ndef model(): return nn.Linear(2, 2)\ndef body(m): return m\n"
        "def dataset(split): return [torch.ones(2)]\ndef loss(m, b): return m(b).sum(1)\n"
        "def metadata(e): return {'size': torch.tensor(2)}\n"
    )
    project = Project.load(path)
    example = project.dataset("any")[0]
    assert (project.example_id(example, 7), project.text(example)) == (7, None)
    assert project.metadata(example) == {"size": 2}
    assert project.collate([example, example]).shape == (2, 2)


def test_random_weights_are_the_same_everywhere(project_file: Path) -> None:
    before = torch.get_rng_state()
    first, second, other = (Project.load(project_file).model(seed=s).state_dict() for s in (0, 0, 1))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", ["model", "dataset", "loss", "body"])
def test_missing_function(write_project: Callable[..., Path], name: str) -> None:
    message = refused(write_project((f"def {name}(", f"def other_{name}(")))
    assert f"defines no {name}" in message
    assert f"{name}(" in message.split("add:")[1]


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("def loss(model, batch)", "def loss(model)", "write def loss(model, batch) -> Tensor of shape (B,)"),
        ("def text(example)", "def text(example, index)", "write def text(example) -> str"),
        ("def body(model):\n    return", "body = ", "body is str, not a function"),
        ("def model():\n    return Looped()", "model = Looped", "model is the class Looped, not a function"),
        (
            "def model():",
            "raise RuntimeError('no luck')\ndef model():",
            "could not be run: RuntimeError: no luck (line",
        ),
        ("def model():", "def model(:", "could not be run: SyntaxError"),
        ("import torch", "import nonesuch", "could not be run: ModuleNotFoundError"),
        ("import torch", "raise SystemExit(3)", "could not be run: SystemExit: 3"),
    ],
)
def test_wrong_file(write_project: Callable[..., Path], old: str, new: str, words: str) -> None:
    assert words in refused(write_project((old, new)))


def test_no_such_file(tmp_path: Path) -> None:
    assert "sdi init writes one" in refused(tmp_path / "none.py")


@pytest.mark.parametrize(
    ("old", "new", "call", "words"),
    [
        ("return Looped()", "return 3", lambda p: p.model(), "model() returned int; expected model() -> nn.Module"),
        ("return Looped()", "return 1 / 0", lambda p: p.model(), "model() failed: ZeroDivisionError"),
        ("    sizes =", "    return 5\n    sizes =", lambda p: p.dataset("train"), "dataset() returned int"),
        (
            "    sizes =",
            "    return iter([])\n    sizes =",
            lambda p: p.dataset("train"),
            "dataset() returned list_iter",
        ),
        ('return "core"', "return None", lambda p: p.body(None), "body() returned None"),
        (
            "return \"example \" + example['id']".replace("'", '"'),
            "return 5",
            lambda p: p.text({}),
            "text() returned int",
        ),
        (
            "def text(e",
            "def example_id(example, index): return 1.5\ndef text(e",
            lambda p: p.example_id({}, 0),
            "float",
        ),
        ("def text(e", "def metadata(e): return {'a': [1]}\ndef text(e", lambda p: p.metadata({}), "returned list"),
        ("def text(e", "def tokens(e): return 'abc'\ndef text(e", lambda p: p.tokens({}), "tokens() returned str"),
        (
            "def text(e",
            "def attach_options(): return {'sketch_size': 3}\ndef text(e",
            lambda p: p.attach_options(),
            "set by sdi featurize --sketch-size",
        ),
    ],
)
def test_wrong_results(
    write_project: Callable[..., Path], old: str, new: str, call: Callable[[Project], object], words: str
) -> None:
    project = Project.load(write_project((old, new)))
    with pytest.raises(ProjectError, match=r"changed\.py") as caught:
        call(project)
    assert words in str(caught.value)


def test_unknown_split_names_the_line(project_file: Path) -> None:
    with pytest.raises(ProjectError, match=r"dataset\('tset'\) failed: KeyError: 'tset' \(line \d+\)"):
        Project.load(project_file).dataset("tset")

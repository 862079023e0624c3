"""A run knows what it was computed from: going on with other code, data or losses is refused, and said by name."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import content
from stepinfluence import Project, StoreError
from stepinfluence.app.runs import Prepared, RunConfig, SplitConfig, Worker, pinned, run_splits
from stepinfluence.app.runs.pinned import Pins, batch_content
from stepinfluence.app.runs.sources import sources_of
from stepinfluence.files import read_sealed, sealed
from stepinfluence.machine import arithmetic
from stepinfluence.store import Store

PROJECT = """
import json
from pathlib import Path
import torch
from torch import nn
from parts import double
HERE = Path(__file__).parent

class Looped(nn.Module):
    def __init__(self):
        super().__init__()
        self.core = nn.Sequential(nn.Linear(6, 6), nn.Tanh())

    def forward(self, x):
        state = x
        for _ in range(3):
            state = self.core(state + x)
        return state.sum(-1)

def model():
    return Looped()

def body(model):
    return "core"

def dataset(split):
    facts = json.loads((HERE / "data.json").read_text())
    generator = torch.Generator().manual_seed(0)
    examples = [{"id": i, "text": t, "x": torch.randn(6, generator=generator)} for i, t in facts["rows"]]
    for row, value in facts["add"].items():
        examples[int(row)]["x"] = examples[int(row)]["x"] * value
    return examples

def loss(model, batch):
    import late
    factor = json.loads((HERE / "data.json").read_text())["factor"]
    return double(late.same(model(batch["x"]) ** 2)) * factor

def collate(examples):
    return {"x": torch.stack([e["x"] for e in examples]), "name": [e["text"] for e in examples]}
"""
SPLIT = SplitConfig(batch_size=4, shard_rows=8, threads=1)


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """22 rows in 3 shards of two batches each; rows and factors of the loss in a file beside the code."""
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # it goes by seconds
    folder = tmp_path / "code"
    folder.mkdir()
    (folder / "project.py").write_text(PROJECT)
    (folder / "parts").mkdir()
    (folder / "parts" / "__init__.py").write_text("from .numbers import double\n")
    (folder / "parts" / "numbers.py").write_text("def double(x):\n    return 2 * x\n")
    (folder / "late.py").write_text("def same(x):\n    return x\n")
    facts = {"rows": [(f"id-{n}", f"text {n}") for n in range(22)], "add": {}, "factor": 1.0}
    (folder / "data.json").write_text(json.dumps(facts))
    return folder / "project.py"


def featurize(project: Path, out: Path, *, accept: bool = False, worker: Worker | None = None, **options: Any) -> Any:
    for name in ("late", "parts", "parts.numbers"):  # as in a new process
        sys.modules.pop(name, None)
    config = RunConfig(project, {"train": SPLIT}, sketch_size=16, **options)
    prepared = Prepared(Project.load(project), config, torch.device("cpu"))
    (done,) = run_splits(prepared, out, accept_changes=accept, worker=worker, progress=False)
    return done


def begun(project: Path, out: Path, **options: Any) -> None:
    """A run that was killed after two of its three shards."""
    featurize(project, out, **options)
    for file in out.rglob("shard-00000002*"):
        file.unlink()


def facts(project: Path, change: Callable[[dict[str, Any]], object]) -> None:
    file = project.with_name("data.json")
    found = json.loads(file.read_text())
    change(found)
    file.write_text(json.dumps(found))


def _edit(name: str, old: str, new: str) -> Callable[[Path], None]:
    def edit(project: Path) -> None:
        text = (project.parent / name).read_text()
        assert old in text
        (project.parent / name).write_text(text.replace(old, new))

    return edit


def _facts(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    return lambda project: facts(project, change)


CHANGES: dict[str, tuple[Callable[[Path], None], tuple[str, ...]]] = {
    "loss": (_edit("project.py", ") ** 2", ") ** 4"), ("the project's code (project.py)", "the loss of row 0")),
    "code without effect": (
        _edit("project.py", "state = x\n", "state = x + 0\n"),
        ("the project's code (project.py)",),
    ),
    "a module it imports": (_edit("parts/numbers.py", "2 * x", "3 * x"), ("code (parts/numbers.py)",)),
    "a module it imports late": (_edit("late.py", "return x", "return x + 1"), ("code (late.py)",)),
    "what the loss reads": (_facts(lambda f: f.update(factor=2.0)), ("the loss of row 0 at checkpoint model()",)),
    "values of the first batch": (_facts(lambda f: f["add"].update({"2": 0.5})), ("first batch of data", "of row 2")),
    "values of a later shard": (_facts(lambda f: f["add"].update({"9": 0.5})), ("the loss of row 9",)),
    "order of ids": (_facts(lambda f: f["rows"].reverse()), ("row 0, whose id was 'id-0' and is 'id-21'",)),
    "ids of a later shard": (_facts(lambda f: f["rows"][8].__setitem__(0, "new")), ("row 8, whose id was 'id-8'",)),
    "texts": (_facts(lambda f: f["rows"][9].__setitem__(1, "new")), ("text, metadata or tokens of row 9 (id 'id-9')",)),
}


@pytest.mark.parametrize("finished", [False, True], ids=["killed", "finished"])
@pytest.mark.parametrize("name", CHANGES)
def test_what_has_changed_is_refused_by_name(project: Path, tmp_path: Path, name: str, finished: bool) -> None:
    change, words = CHANGES[name]
    (featurize if finished else begun)(project, tmp_path / "run")
    before = content(tmp_path / "run")
    change(project)
    with pytest.raises(StoreError) as caught:
        featurize(project, tmp_path / "run")
    for part in (*words, "going on would mix two computations", "--accept-changes"):
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)
    assert content(tmp_path / "run") == before, "nothing was written"


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_accepted_knowingly_and_recorded(project: Path, tmp_path: Path, name: str) -> None:
    begun(project, tmp_path / "run")
    CHANGES[name][0](project)
    assert featurize(project, tmp_path / "run", accept=True).complete
    (entry,) = Pins.read(tmp_path / "run" / "train.pinned.json").accepted
    assert entry["shards"] == [[0, 2]]
    assert any(CHANGES[name][1][0].split(" (")[0] in line for line in entry["changed"])
    assert featurize(project, tmp_path / "run").written == 0, "accepted once, it is not asked again"
    facts(project, lambda f: f.update(factor=7.0))
    with pytest.raises(StoreError, match="the loss of row 16"):  # the shard that was written since
        featurize(project, tmp_path / "run")


def test_as_it_was_it_goes_on(project: Path, tmp_path: Path) -> None:
    featurize(project, tmp_path / "whole")
    begun(project, tmp_path / "run")
    _edit("late.py", "return x", "return x + 1")(project)
    _edit("late.py", "return x + 1", "return x")(project)
    project.with_name("unrelated.py").write_text("x = 1\n")
    assert featurize(project, tmp_path / "run").written == 1
    assert content(tmp_path / "run") == content(tmp_path / "whole")
    assert featurize(project, tmp_path / "run").written == 0


def test_folded_checkpoints_and_several_workers(project: Path, tmp_path: Path) -> None:
    for k in range(2):
        torch.manual_seed(k)
        torch.save(Project.load(project).model().state_dict(), tmp_path / f"c{k}.pt")
    options = {"checkpoints": (str(tmp_path / "c*.pt"),), "eta": 0.5}
    for fold in (False, True):
        out = tmp_path / f"run-{fold}"
        begun(project, out, fold=fold, **options)
        assert featurize(project, out, worker=Worker(0, 2), fold=fold, **options).complete
        facts(project, lambda f: f.update(factor=2.0))
        for rank in range(2):  # each looks at shards of its own
            with pytest.raises(StoreError, match=f"the loss of row {8 * rank} at checkpoint"):
                featurize(project, out, worker=Worker(rank, 2), fold=fold, **options)
        facts(project, lambda f: f.update(factor=1.0))


def test_rounding_of_another_machine_is_no_change(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same machine repeats every bit; of another, half the digits are asked for."""
    begun(project, tmp_path / "run")
    eps = torch.finfo(torch.float32).eps
    for factor, refused_here, refused_there in ((1 + eps, True, False), (1 + 1e-5, True, False), (1.01, True, True)):
        facts(project, lambda f, factor=factor: f.update(factor=factor, add={"0": factor}))
        for machine, refused in ((arithmetic(), refused_here), ("another", refused_there)):
            monkeypatch.setattr(pinned, "arithmetic", lambda machine=machine: machine)
            if refused:
                with pytest.raises(StoreError, match=r"the first batch of data; the loss of row 0"):
                    featurize(project, tmp_path / "run")
            else:
                prepared = Prepared(
                    Project.load(project), RunConfig(project, {"train": SPLIT}, sketch_size=16), torch.device("cpu")
                )
                data = prepared.project.dataset("train")
                path = tmp_path / "run" / "train"
                pinned.checked_pins(prepared, path, data, 4, Worker(), accept_changes=False)


def test_at_most_so_many_shards_are_looked_at(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    featurize(project, tmp_path / "run")
    monkeypatch.setattr(pinned, "PROBES", 2)
    seen = []
    real = pinned.featurize_part
    monkeypatch.setattr(pinned, "featurize_part", lambda p, d, rows, **o: seen.append(rows) or real(p, d, rows, **o))
    featurize(project, tmp_path / "run")
    assert seen == [range(4), range(16, 20)]


def test_a_store_without_pins_is_checked_by_its_rows(project: Path, tmp_path: Path) -> None:
    begun(project, tmp_path / "run")
    (tmp_path / "run" / "train.pinned.json").unlink()
    facts(project, lambda f: f.update(factor=2.0))
    with pytest.raises(StoreError, match="the loss of row 0"):
        featurize(project, tmp_path / "run")
    facts(project, lambda f: f.update(factor=1.0))
    featurize(project, tmp_path / "run")
    assert Pins.read(tmp_path / "run" / "train.pinned.json").sources == sources_of(project)


def test_damaged_pins_are_refused(project: Path, tmp_path: Path) -> None:
    begun(project, tmp_path / "run")
    file = tmp_path / "run" / "train.pinned.json"
    assert read_sealed(file, 1 << 20)["accepted"] == []
    file.write_bytes(file.read_bytes().replace(b"project.py", b"project.px"))
    with pytest.raises(StoreError, match="does not fit its checksum"):
        featurize(project, tmp_path / "run")


def test_a_worker_with_other_code_is_noticed_when_it_begins(project: Path, tmp_path: Path) -> None:
    featurize(project, tmp_path / "run", worker=Worker(0, 2))
    assert not Store.open(tmp_path / "run" / "train").complete
    _edit("late.py", "return x", "return x * 1")(project)
    with pytest.raises(StoreError, match=r"the project's code \(late\.py\)"):
        featurize(project, tmp_path / "run", worker=Worker(1, 2))


def test_sources_are_those_that_are_imported(project: Path) -> None:
    (project.parent / "torch").mkdir()  # a namespace package of that name hides nothing
    project.with_name("other.py").write_text("")
    assert list(sources_of(project)) == ["late.py", "parts/__init__.py", "parts/numbers.py", "project.py"]
    project.with_name("late.py").write_text("from parts import numbers\nimport other, late\nfrom . import nothing\n")
    assert list(sources_of(project)) == ["late.py", "other.py", "parts/__init__.py", "parts/numbers.py", "project.py"]
    project.with_name("late.py").write_text("def (:\n")
    assert "late.py" in sources_of(project)
    assert sources_of(project.with_name("none.py")) == {}


def test_batches_are_told_apart_by_every_leaf() -> None:
    def batch(**changes: Any) -> dict[str, Any]:
        made = {
            "x": torch.arange(6.0).reshape(2, 3),
            "half": torch.ones(2, dtype=torch.bfloat16),
            "labels": torch.tensor([1, 2]),
            "mask": torch.tensor([True, False]),
            "wave": torch.tensor([1 + 2j]),
            "array": torch.arange(3).numpy(),
            "ragged": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
            "texts": ["a", "b"],
            "number": 1,
            "nothing": None,
        }
        return {**made, **changes}

    first = batch_content(batch())
    assert first == batch_content(batch())
    changed = [
        {"x": torch.arange(6.0).reshape(3, 2)},
        {"x": torch.arange(6.0).reshape(2, 3).double()},
        {"half": torch.tensor([1, 1 + 2**-7], dtype=torch.bfloat16)},
        {"labels": torch.tensor([2, 1])},
        {"mask": torch.tensor([False, True])},
        {"wave": torch.tensor([1 - 2j])},
        {"array": torch.arange(3).numpy()[::-1].copy()},
        {"texts": ["b", "a"]},
        {"number": 2},
        {"nothing": 0},
        {"x": torch.full((2, 3), torch.nan)},
    ]
    found = [json.dumps(batch_content(batch(**change))) for change in changed]
    assert len({json.dumps(first), *found}) == 1 + len(changed)


@pytest.mark.parametrize(
    "field",
    [
        {"accepted": 3},
        {"accepted": [3]},
        {"accepted": [{"shards": [[1]]}]},
        {"accepted": [{"shards": [["a", "b"]]}]},
        {"sources": []},
        {"sources": {"a.py": 1}},
        {"batch": 1},
        {"batch": {"sums": [[1.0]]}},
        {"machine": None},
        {"rows": 1},
        {"more": 1},
    ],
    ids=repr,
)
def test_pins_of_other_types_are_refused(field: dict[str, Any], tmp_path: Path) -> None:
    """A checksum can be made by anyone."""
    whole = {"format": pinned.FORMAT, "machine": "m", "sources": {}, "batch": {}, "rows": "", "accepted": []}
    (tmp_path / "whole.json").write_bytes(sealed(whole))
    assert Pins.read(tmp_path / "whole.json") == Pins("m", {}, {}, "")
    (tmp_path / "odd.json").write_bytes(sealed({**whole, **field}))
    with pytest.raises(StoreError, match=r"odd\.json: not of the format"):
        Pins.read(tmp_path / "odd.json")

"""``--damping training`` and ``--curvature source`` as typed: from checkpoints to scores, their names, and refusals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from stepinfluence import Fisher, influence
from stepinfluence.app.cli import app
from stepinfluence.app.project import Project
from stepinfluence.app.runs.config import RunConfig
from stepinfluence.attribution.curvature import Segment, TrainingTime, Unrolled
from stepinfluence.integrations.checkpointing import Saver
from stepinfluence.search import top_k
from stepinfluence.store import Store
from typer.testing import CliRunner, Result

pytestmark = pytest.mark.numeric

PROJECT = """
import torch
from torch import nn

class Looped(nn.Module):
    def __init__(self):
        super().__init__()
        self.core = nn.Sequential(nn.Linear(6, 6), nn.Tanh())
        self.head = nn.Linear(6, 1)

    def forward(self, x):
        state = x
        for _ in range(3):
            state = self.core(state + x)
        return self.head(state).squeeze(1)

def model():
    return Looped()

def body(model):
    return "core"

def dataset(split):
    size = 24 if split == "train" else 5
    generator = torch.Generator().manual_seed(len(split))
    return [{"id": f"{split}-{n}", "x": torch.randn(6, generator=generator)} for n in range(size)]

def collate(examples):
    return {"x": torch.stack([e["x"] for e in examples])}

def loss(model, batch):
    return (model(batch["x"]) - batch["x"].sum(1)) ** 2

def text(example):
    return "example " + example["id"]
"""

RATE = 0.05
SPLITS = ("--split", "train", "--split", "query", "--sketch-size", "32")


def invoke(*arguments: str | Path, code: int = 0) -> Result:
    done = CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "160", "NO_COLOR": "1", "TERM": "dumb"})
    assert done.exit_code == code, done.output
    return done


def line(result: Result) -> str:
    """What stderr says, in one line."""
    return " ".join(result.stderr.split())


def checkpoints(project: Path, folder: Path, at: tuple[int, ...]) -> None:
    loaded = Project.load(project)
    torch.manual_seed(0)
    model = loaded.model()
    data = loaded.dataset("train")
    batch = loaded.collate([data[k] for k in range(len(data))])
    optimizer, saver = torch.optim.SGD(model.parameters(), lr=RATE), Saver(folder)
    for number in range(1, at[-1] + 1):
        optimizer.zero_grad()
        loaded.loss(model, batch).mean().backward()
        optimizer.step()
        if number in at:
            saver.save(number, model, optimizer)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    project = folder / "my_project.py"
    project.write_text(PROJECT)
    (folder / "saved").mkdir()
    checkpoints(project, folder / "saved", (10, 40))
    invoke(
        "featurize", "--project", project, *SPLITS, "--checkpoints", folder / "saved" / "*.pt", "--out", folder / "run"
    )
    return folder / "run"


TIMES = TrainingTime((10 * RATE, 40 * RATE))


def test_a_store_knows_how_long_training_went_on(run: Path) -> None:
    (facts,) = json.loads(invoke("store", "info", run / "train", "--json").stdout)
    assert facts["training"] == {"time": pytest.approx(TIMES.times), "unknown": None}
    assert "length 0.5, 2" in invoke("store", "info", run / "train").stdout
    assert RunConfig.load(run / "config.yaml").damping is None


def test_query_by_training_length(run: Path) -> None:
    train, query = (Store.open(run / split) for split in ("train", "query"))
    fitted = [Fisher.fit(train, checkpoint=k, damping=TIMES.at(k, 2)) for k in range(2)]
    asked = [query.features(k, rows=[3]) for k in range(2)]
    want = top_k(train, asked, curvature=fitted, progress=False)
    rows = [train.features(k) for k in range(2)]
    dense = influence(rows, asked, etas=RATE, curvature="fisher", damping=TIMES).sdi[:, 0]
    ask = ("query", run, "--row", "3", "--curvature", "fisher", "--json")
    for damping in (("--damping", "training"), ()):  # it is what is taken where the store knows it
        (found,) = json.loads(invoke(*ask, *damping).stdout)
        numbers = ", ".join(f"{one.damping:.2g}" for one in fitted)
        assert found["score"].endswith(f"Fisher, damping from training's length ({numbers})")
        assert [hit["row"] for hit in found["hits"]] == want.rows[0].tolist()
        for hit in found["hits"]:
            # float32 features, and a matrix with a condition number of at most 1 + T h, about a hundred
            assert hit["trajectory"] == pytest.approx(dense[hit["row"]].tolist(), rel=1e-3, abs=1e-5)
            assert sum(hit["trajectory"]) == pytest.approx(hit["total"], rel=1e-5, abs=1e-6)
    (auto,) = json.loads(invoke(*ask, "--damping", "auto").stdout)
    assert auto["score"].count("(auto)") == 2
    shown = invoke("query", run, "--row", "3", "--damping", "training").stdout
    assert 0 < shown.index("damping from training's length") < shown.index("SDI (eq. 5), without curvature")
    (exact,) = json.loads(invoke(*ask, "--exact", "--damping", "training").stdout)
    assert exact["score"] == found["score"]
    assert exact["hits"][0]["row"] == found["hits"][0]["row"]


def test_the_setting_of_a_run(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    config = folder / "config.yaml"
    text = config.read_text()
    assert "damping: null" in text
    for setting, shown in (("auto", "(auto)"), ("0.5", "damping 0.5, 0.5"), ("training", "training's length")):
        config.write_text(text.replace("damping: null", f"damping: {setting}"))
        assert shown in invoke("query", folder, "--row", "3").stdout
    config.write_text(text.replace("damping: null", "damping: best"))
    assert "damping: got 'best'; give a number relative to" in line(invoke("query", folder, "--row", "3", code=2))
    again = ("featurize", "--config", run / "config.yaml", "--split", "query", "--out", tmp_path / "again")
    invoke(*again, "--damping", "training")
    assert RunConfig.load(tmp_path / "again" / "config.yaml").damping == "training"


def test_all_commands_take_it(run: Path, tmp_path: Path) -> None:
    train = Store.open(run / "train")
    invoke("influence", run, "--curvature", "fisher", "--damping", "training", "-o", tmp_path / "scores.npy")
    told = json.loads((tmp_path / "scores.json").read_text())
    assert told["score"].startswith("influence corrected by the train features' Fisher, damping from training's length")
    query = Store.open(run / "query")
    want = influence(
        [train.features(k) for k in range(2)],
        [query.features(k) for k in range(2)],
        etas=RATE,
        curvature="fisher",
        damping=TIMES,
    ).sdi
    # two orders of summation in float32
    np.testing.assert_allclose(np.load(tmp_path / "scores.npy"), want.numpy(), rtol=1e-3, atol=1e-5)
    invoke("influence", run, "-o", tmp_path / "plain.npy")
    assert json.loads((tmp_path / "plain.json").read_text())["score"] == "SDI (eq. 5), without curvature"
    top = invoke("influence", run, "--top-k", "3", "--curvature", "fisher", "--damping", "training")
    assert "training's length" in line(top)
    assert json.loads(top.stdout)[0]["hits"][0]["row"] == int(want.sum(2)[:, 0].argmax())

    found = json.loads(invoke("outliers", run, "-k", "3", "--by", "leverage", "--damping", "training", "--json").stdout)
    leverage = sum(
        RATE * Fisher.fit(train, checkpoint=k, damping="training").leverage(train.features(k)) for k in range(2)
    )
    assert isinstance(leverage, torch.Tensor)
    assert [one["row"] for one in found] == leverage.topk(3).indices.tolist()
    shown = invoke("outliers", run, "--by", "leverage", "--damping", "training").stdout
    assert "damping from training's length" in " ".join(shown.split())
    assert "(auto)" in invoke("outliers", run, "--by", "leverage").stdout


def test_where_it_is_not_known_auto_is_taken_and_training_refused(run: Path, tmp_path: Path) -> None:
    project = run.parent / "my_project.py"
    invoke("featurize", "--project", project, *SPLITS, "--out", tmp_path / "no-file")
    (found,) = json.loads(invoke("query", tmp_path / "no-file", "--row", "3", "--json").stdout)
    assert found["score"].endswith("(auto)")
    for command in (
        ("query", tmp_path / "no-file", "--row", "3"),
        ("influence", tmp_path / "no-file", "--curvature", "fisher"),
        ("outliers", tmp_path / "no-file", "--by", "leverage"),
        ("report", tmp_path / "no-file"),
    ):
        said = line(invoke(*command, "--damping", "training", code=2))
        assert "not known at checkpoint 'model()': the weights are those that the project's model() returns" in said
    assert "length not known" in invoke("store", "info", tmp_path / "no-file" / "train").stdout

    # A checkpoint that does not count its updates.
    content = torch.load(run.parent / "saved" / "step-0000040.pt", weights_only=True)
    del content["step"]
    torch.save(content, tmp_path / "uncounted.pt")
    options = ("--checkpoints", tmp_path / "uncounted.pt", "--out", tmp_path / "uncounted")
    invoke("featurize", "--project", project, *SPLITS, *options)
    said = line(invoke("query", tmp_path / "uncounted", "--row", "3", "--damping", "training", code=2))
    assert "'uncounted.pt': it does not say how many updates had been made; save the number as 'step'" in said

    # Folded checkpoints have no Fisher at all.
    options = ("--checkpoints", run.parent / "saved" / "*.pt", "--fold", "--out", tmp_path / "folded")
    invoke("featurize", "--project", project, *SPLITS, *options)
    said = line(invoke("query", tmp_path / "folded", "--row", "3", "--damping", "training", code=2))
    assert "folded into one; use the store that was folded" in said


def test_wrong_uses(run: Path) -> None:
    ask = ("query", run, "--row", "3")
    for command in (
        (*ask, "--curvature", "none", "--damping", "training"),
        (*ask, "--exact", "--damping", "training"),
        ("influence", run, "--damping", "training"),
        ("report", run, "--curvature", "none", "--damping", "training"),
    ):
        assert "damping: goes with" in line(invoke(*command, code=2))
    assert "damping: got 'lots'; give training, auto, or a number" in line(invoke(*ask, "--damping", "lots", code=2))


def test_a_report_says_it(run: Path, tmp_path: Path) -> None:
    pytest.importorskip("jinja2")
    invoke("report", run, "--damping", "training", "--out", tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text().replace("\\u0027", "'")
    assert "corrected for curvature: Fisher, damping from training's length" in page


# ----------------------------------------------------------------------------------------------------------------
# SOURCE


def test_query_by_source(run: Path) -> None:
    train, query = (Store.open(run / split) for split in ("train", "query"))
    unrolled = Unrolled.fit(train, [Segment((0,), RATE, 10), Segment((1,), RATE, 30)])
    rows = [train.features(k) for k in range(2)]
    want = influence(rows, unrolled.transform(query.features(1, rows=[3]))).sdi[:, 0]
    ask = ("query", run, "--row", "3", "--curvature", "source")
    for _ in range(2):  # the second time it is read from the run's folder
        (found,) = json.loads(invoke(*ask, "--json").stdout)
        assert found["score"] == "influence through training by SOURCE, in 2 segments"
        assert found["unit"] == "first order, per unit of an example's weight in training"
        assert found["agreement"]["unknown"] == "SOURCE is not fitted again to halves of the columns"
        assert [hit["row"] for hit in found["hits"]] == want.sum(1).topk(10).indices.tolist()
        scale = float(want.abs().max())
        for hit in found["hits"]:
            # learning rates are divided and multiplied by numbers of updates, in float64; the rest is float32
            assert hit["trajectory"] == pytest.approx(want[hit["row"]].tolist(), abs=1e-5 * scale)
            assert sum(hit["trajectory"]) == pytest.approx(hit["total"], abs=1e-6 * scale)
        assert sum(one["share"] for one in found["checkpoints"]) == pytest.approx(1)
    assert (run / "curvature" / "train" / "source" / "fisher.json").is_file()
    shown = invoke(*ask).stdout
    assert "Score: influence through training by SOURCE, in 2 segments" in shown
    assert "SDI (eq. 5)" not in shown


def test_source_as_a_setting_and_in_tables(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    config = folder / "config.yaml"
    config.write_text(config.read_text().replace("curvature: fisher", "curvature: source"))
    shown = invoke("query", folder, "--row", "3").stdout
    assert 0 < shown.index("by SOURCE") < shown.index("SDI (eq. 5)")
    invoke("influence", run, "--curvature", "source", "-o", tmp_path / "scores.npy")
    told = json.loads((tmp_path / "scores.json").read_text())
    assert told["score"].startswith("influence through training by SOURCE")
    assert told["etas"] == [1.0, 1.0]


def test_source_in_report_and_explorer(run: Path, tmp_path: Path) -> None:
    pytest.importorskip("jinja2")
    from stepinfluence.app.runs.curvatures import curvatures_to_show
    from stepinfluence.app.view.explore import Explorer
    from stepinfluence.app.view.explore.agreement import agreement
    from stepinfluence.app.view.explore.everything import reverse
    from stepinfluence.app.view.explore.scored import What

    invoke("report", run, "--curvature", "source", "--out", tmp_path / "report.html")
    assert "SOURCE, 2 segments" in (tmp_path / "report.html").read_text()
    explorer = Explorer.open(run, curvatures=lambda store: curvatures_to_show(run, store, "source"))
    assert [one["name"] for one in explorer.overview()["scores"]] == ["SOURCE, 2 segments", "SDI (the paper's)"]
    whole = explorer.scores(3)
    scale = float(np.abs(whole).max())
    alone = [explorer.scores(3, checkpoint=k) for k in range(2)]
    np.testing.assert_allclose(alone[0] + alone[1], whole, atol=1e-5 * scale)
    # One training example and all queries: followed to the end of training, instead of the queries being carried back.
    leading = int(whole.sum(1).argmax())
    entry = next(one for one in reverse(explorer, leading)["helpful"] if one["row"] == 3)
    assert entry["sdi"] == pytest.approx(whole[leading].tolist(), abs=1e-5 * scale)
    pair = explorer.pair(3, leading)
    assert np.sum(pair["byCheckpoint"], 0) == pytest.approx(whole[leading], abs=1e-5 * scale)
    assert agreement(explorer, What(3))["noHalves"] == "SOURCE is not fitted again to halves of the columns"


def test_source_is_refused_where_it_cannot_be(run: Path, tmp_path: Path) -> None:
    ask = ("query", run, "--row", "3", "--curvature", "source")
    assert "damping: SOURCE has none" in line(invoke(*ask, "--damping", "training", code=2))
    assert "for curvature='fisher' only" in line(invoke(*ask, "--exact", code=2))
    said = line(invoke("outliers", run, "--by", "leverage", "--curvature", "source", code=2))
    assert "curvature: got 'source'; leverage needs fisher or block" in said
    project = run.parent / "my_project.py"
    options = ("--checkpoints", run.parent / "saved" / "step-0000040.pt", "--out", tmp_path / "one")
    invoke("featurize", "--project", project, *SPLITS, *options)
    for command in (("query", tmp_path / "one", "--row", "3"), ("influence", tmp_path / "one")):
        said = line(invoke(*command, "--curvature", "source", code=2))
        assert "curvature: 'source' needs training's length" in said
    config = tmp_path / "one" / "config.yaml"
    config.write_text(config.read_text().replace("curvature: fisher", "curvature: source"))
    shown = " ".join(invoke("query", tmp_path / "one", "--row", "3").stdout.split())
    assert "Score: SDI (eq. 5)" in shown
    assert "Not corrected for curvature: curvature: 'source' needs" in shown

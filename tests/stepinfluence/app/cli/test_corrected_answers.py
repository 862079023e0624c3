"""``sdi query --curvature`` and ``sdi outliers``, as a user types them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from stepinfluence import BlockFisher, ExactCapture, Fisher, influence, self_influence
from stepinfluence.app.cli import app
from stepinfluence.app.project import Project
from stepinfluence.app.runs.curvatures import kept_curvatures
from stepinfluence.search import top_k
from stepinfluence.store import Store
from typer.testing import CliRunner, Result

pytestmark = pytest.mark.numeric


def invoke(*arguments: str | Path, code: int = 0) -> Result:
    done = CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "110", "NO_COLOR": "1", "TERM": "dumb"})
    assert done.exit_code == code, done.output
    return done


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    project = folder / "my_project.py"
    invoke("init", project, "--template", "blank")
    options = ("--sketch-size", "64", "--batch-size", "16", "--shard-rows", "32")
    invoke("featurize", "--project", project, "--split", "train", "--split", "query", *options, "--out", folder / "run")
    return folder / "run"


@pytest.mark.parametrize("kind", [Fisher, BlockFisher])
def test_query_under_a_curvature(run: Path, kind: type[Fisher]) -> None:
    train, query = (Store.open(run / split) for split in ("train", "query"))
    fitted = kind.fit(train)
    found = json.loads(invoke("query", run, "--row", "3", "--curvature", kind.kind, "--json").stdout)[0]
    assert found["score"].startswith("influence corrected by the train features' Fisher")
    assert found["score"].endswith(f"damping {fitted.damping:.2g} (auto)")
    want = top_k(train, query.features(rows=[3]), curvature=fitted, progress=False)
    assert [hit["row"] for hit in found["hits"]] == want.rows[0].tolist()
    # The second time it is read from the run's folder, and another damping needs no second fit.
    kept = run / "curvature" / "train" / f"{kind.kind}-0" / "fisher.safetensors"
    before = kept.stat().st_mtime_ns
    again = json.loads(
        invoke("query", run, "--row", "3", "--curvature", kind.kind, "--damping", "0.5", "--json").stdout
    )[0]
    assert kept.stat().st_mtime_ns == before
    assert again["score"].endswith("damping 0.5")
    want = top_k(train, query.features(rows=[3]), curvature=fitted.with_damping(0.5), progress=False)
    assert [hit["row"] for hit in again["hits"]] == want.rows[0].tolist()


def test_query_says_which_score_it_shows(run: Path) -> None:
    alone = invoke("query", run, "--row", "3", "--curvature", "none").stdout
    assert "Score: SDI (eq. 5), without curvature" in alone
    assert "Fisher" not in alone
    corrected = invoke("query", run, "--row", "3", "--curvature", "fisher").stdout
    assert "Fisher, damping" in corrected
    assert "SDI (eq. 5)" not in corrected


def test_both_scores_are_shown_the_better_one_first_unless_a_run_says_otherwise(run: Path, tmp_path: Path) -> None:
    ask = ("query", run, "--row", "3", "-k", "4")
    shown = invoke(*ask).stdout
    assert 0 < shown.index("Fisher, damping") < shown.index("SDI (eq. 5)")
    (both,) = json.loads(invoke(*ask, "--json").stdout)
    for kind, found in (("fisher", both), ("none", both["also"][0])):
        (alone,) = json.loads(invoke(*ask, "--curvature", kind, "--json").stdout)
        assert alone["also"] == []
        assert found["hits"] == alone["hits"]
        assert found["score"] == alone["score"]
    shared = {hit["row"] for hit in both["hits"]} & {hit["row"] for hit in both["also"][0]["hits"]}
    assert f"{len(shared)} of the 4 are in both lists" in shown

    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    config = folder / "config.yaml"
    text = config.read_text().replace("../my_project.py", str(run.parent / "my_project.py"))
    config.write_text(text.replace("curvature: fisher", "curvature: block"))
    assert "Fisher by parameter" in invoke("query", folder, "--row", "3").stdout
    config.write_text(text.replace("curvature: fisher", "curvature: none"))
    assert "Fisher" not in invoke("query", folder, "--row", "3").stdout


def test_where_no_curvature_can_be_fitted_sdi_is_shown_with_the_reason(run: Path, tmp_path: Path) -> None:
    """All training losses alike leave nothing that the damping could be chosen by."""
    file = tmp_path / "alike.py"
    text = (run.parent / "my_project.py").read_text()
    same = "\n\n_loss = loss\n\n\ndef loss(*given):\n    found = _loss(*given)\n    return found - found.detach() + 1\n"
    file.write_text(text + same)
    splits = ("--split", "train", "--split", "query")
    invoke("featurize", "--project", file, *splits, "--sketch-size", "16", "--out", tmp_path / "run")
    shown = invoke("query", tmp_path / "run", "--row", "3").stdout
    assert "SDI (eq. 5)" in shown
    assert "Not corrected for curvature: damping: 'auto' predicts the train losses" in " ".join(shown.split())
    said = invoke("query", tmp_path / "run", "--row", "3", "--curvature", "fisher", code=2).stderr
    assert "these are all the same" in " ".join(said.split())


def test_exact_corrected_scores(run: Path) -> None:
    """By exact gradients of all training rows, at the damping that the sketches chose."""
    command = ("query", run, "--row", "3", "-k", "4", "--curvature", "fisher")
    project = Project.load(run.parent / "my_project.py")
    train, asked = (project.dataset(split) for split in ("train", "query"))
    model = project.model().eval()
    exact = ExactCapture(model, body=model.core)
    rows = exact.featurize([project.collate([train[r] for r in range(len(train))])], project.loss, per_step=False)
    one = exact.featurize([project.collate([asked[3]])], project.loss)
    store = Store.open(run / "train")
    (fitted,) = kept_curvatures(run, store, "fisher") or ()
    scores = influence(rows, one, curvature="fisher", damping=fitted.damping).sdi[:, 0]
    wanted = store.checkpoints[0].eta * scores
    found = json.loads(invoke(*command, "--exact", "--json").stdout)[0]
    assert found["also"] == []
    best = wanted.sum(1).topk(4)
    assert [hit["row"] for hit in found["hits"]] == best.indices.tolist()
    # Inner products are taken in float32, and divided by the damping: 1e-3 of the largest is far from a mistake.
    scale = float(wanted.abs().max())
    for hit in found["hits"]:
        assert hit["trajectory"] == pytest.approx(wanted[hit["row"]].tolist(), abs=1e-3 * scale)
    assert "exact, recomputed from the model" in invoke(*command, "--exact").stdout


def test_outliers(run: Path) -> None:
    train = Store.open(run / "train")
    plain = train.checkpoints[0].eta * self_influence(train.features())
    found = json.loads(invoke("outliers", run, "-k", "5", "--json").stdout)
    assert [one["row"] for one in found] == plain.topk(5).indices.tolist()
    fitted = Fisher.fit(train)
    leverage = fitted.leverage(train.features())
    found = json.loads(invoke("outliers", run, "-k", "5", "--by", "leverage", "--json").stdout)
    assert [one["row"] for one in found] == leverage.topk(5).indices.tolist()
    torch.testing.assert_close(
        torch.tensor([one["score"] for one in found]),
        train.checkpoints[0].eta * leverage.topk(5).values,
        rtol=1e-3,
        atol=1e-6,
    )
    shown = invoke("outliers", run, "-k", "5").stdout
    assert "Score: self-influence." in shown
    assert [one["text"] for one in found] == [train.row(one["row"]).text for one in found]
    assert "Score: leverage under curvature fisher" in invoke("outliers", run, "--by", "leverage").stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("query", "--row", "3", "--curvature", "hessian"), "curvature: got 'hessian'"),
        (("query", "--row", "3", "--curvature", "none", "--damping", "0.1"), "damping: goes with scores"),
        (("query", "--row", "3", "--curvature", "fisher", "--damping", "much"), "damping: got 'much'"),
        (("query", "--row", "3", "--curvature", "block", "--exact"), "for curvature='fisher' only"),
        (("outliers", "--by", "size"), "by: got 'size'"),
        (("outliers", "--damping", "0.1"), "damping: goes with --by leverage"),
        (("outliers", "--by", "leverage", "--curvature", "none"), "leverage needs fisher or block"),
    ],
)
def test_wrong_use_is_one_line(run: Path, arguments: tuple[str, ...], words: str) -> None:
    done = invoke(arguments[0], run, *arguments[1:], code=2)
    assert words in " ".join(done.stderr.split())
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""

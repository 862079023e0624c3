"""``sdi query --curvature`` and ``sdi outliers``, as a user types them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from stepinfluence import BlockFisher, Fisher, self_influence
from stepinfluence.app.cli import app
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
    assert "Score: SDI (eq. 5), without curvature." in invoke("query", run, "--row", "3").stdout
    assert "Fisher, damping" in invoke("query", run, "--row", "3", "--curvature", "fisher").stdout


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
        (("query", "--row", "3", "--damping", "0.1"), "damping: goes with --curvature"),
        (("query", "--row", "3", "--curvature", "fisher", "--damping", "much"), "damping: got 'much'"),
        (("query", "--row", "3", "--curvature", "fisher", "--exact"), "exact: recomputes scores without curvature"),
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

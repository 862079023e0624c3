"""``sdi init``, ``featurize``, ``query``, ``influence`` and ``store``, as a new user types them."""

from __future__ import annotations

import csv
import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from accuracy import inner_products
from rounding import Rounding, check_influence, influence_of_sketches, measure_body
from stepinfluence import Project, attach
from stepinfluence.app.cli import app
from stepinfluence.app.templates import TEMPLATES
from stepinfluence.store import Store
from typer.testing import CliRunner, Result


def invoke(*arguments: str | Path, input: str | None = None, code: int = 0) -> Result:  # noqa: A002  # CliRunner's word
    done = CliRunner().invoke(
        app, [str(a) for a in arguments], input=input, env={"COLUMNS": "110", "NO_COLOR": "1", "TERM": "dumb"}
    )
    assert done.exit_code == code, done.output
    return done


def refused(*arguments: str | Path, input: str | None = None) -> str:  # noqa: A002  # CliRunner's word
    done = invoke(*arguments, input=input, code=2)
    assert done.stderr.count("\n") == 1, done.stderr
    assert done.stdout == ""
    return done.stderr


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the blank template at random weights."""
    folder = tmp_path_factory.mktemp("cli")
    invoke("init", folder / "my_project.py", "--template", "blank")
    options = ("--sketch-size", "64", "--batch-size", "16", "--shard-rows", "32")
    project = folder / "my_project.py"
    invoke("featurize", "--project", project, "--split", "train", "--split", "query", *options, "--out", folder / "run")
    return folder / "run"


@pytest.mark.parametrize("template", TEMPLATES)
def test_every_template_runs_as_it_is(tmp_path: Path, template: str) -> None:
    file = tmp_path / "mine.py"
    done = invoke("init", file, "-t", template)
    assert "sdi featurize --project" in done.stderr
    assert "my_project" not in file.read_text()
    project = Project.load(file)
    for split in ("train", "query"):
        data = project.dataset(split)
        assert len({project.example_id(data[k], k) for k in range(len(data))}) == len(data)
        assert project.text(data[0])
    done = invoke("featurize", "-p", file, "-s", "query", "--sketch-size", "32", "-o", tmp_path / "run", "--json")
    (report,) = json.loads(done.stdout)["splits"]
    assert (report["split"], report["complete"], report["shards_missing"]) == ("query", True, 0)
    assert "at the weights that model() returns" in done.stderr


def test_templates_train_and_save_what_featurize_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    invoke("init", "b.py", "-t", "blank")
    Project.load("b.py")._functions["model"].__globals__["train"](steps=4)
    invoke("featurize", "-p", "b.py", "-s", "train", "--checkpoints", "checkpoints/*.pt", "-o", "run")
    assert [(c.name, c.eta) for c in Store.open("run/train").checkpoints] == [("step-2.pt", 0.01), ("step-4.pt", 0.01)]


def test_init_leaves_files_alone(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("precious")
    assert "exists; give another name, or --force" in refused("init", file)
    assert file.read_text() == "precious"
    invoke("init", file, "--force")
    assert "one of gpt, parity, blank" in refused("init", tmp_path / "a.py", "-t", "nope")
    assert "ends in .py" in refused("init", tmp_path / "a.txt")


def test_config_repeats_the_run(run: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    done = invoke("featurize", "--config", run / "config.yaml", "--out", again)
    assert done.stdout == ""
    for file in run.rglob("shard-*"):
        assert (again / file.relative_to(run)).read_bytes() == file.read_bytes()
    assert yaml.safe_load((run / "config.yaml").read_text())["splits"]["train"]["per_step"] is False
    assert "nothing left to do" in invoke("featurize", "--config", again / "config.yaml").stderr


def test_a_split_more_takes_the_runs_settings(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run.parent, tmp_path / "copy")
    out = tmp_path / "copy" / "run"
    shutil.rmtree(out / "query")
    invoke("featurize", "--split", "query", "--trust-project", "--out", out)
    manifest = Store.open(out / "query").manifest
    assert set(manifest.sketch.sizes.values()) <= {64, 16}  # vectors are kept at their own length
    assert "sketch_size: the run in" in refused("featurize", "--split", "query", "--sketch-size", "32", "--out", out)


def test_wrong_use_of_featurize(run: Path, tmp_path: Path) -> None:
    project = run.parent / "my_project.py"
    assert "--out run" in refused("featurize", "-p", project, "-s", "train")
    assert "--split train" in refused("featurize", "-p", project, "-o", tmp_path / "a")
    assert "sdi init writes one" in refused("featurize", "-s", "train", "-o", tmp_path / "a")
    assert "no split 'tset'" in refused("featurize", "-p", project, "-s", "tset", "-o", tmp_path / "a")
    assert "hashing: got 'md5'" in refused(
        "featurize", "-p", project, "-s", "train", "--hashing", "md5", "-o", tmp_path / "a"
    )
    assert not (tmp_path / "a").exists()


def test_a_first_call_that_fails_leaves_nothing_that_binds(run: Path, tmp_path: Path) -> None:
    """The product's own advice can be followed: nothing of the first call is held against the second."""
    project, out, options = run.parent / "my_project.py", tmp_path / "run", ("--sketch-size", "16")
    command = ("featurize", "-p", project, "-s", "query", *options, "-o", out)
    refused(*command, "--checkpoints", tmp_path / "wrong.pt")
    assert not out.exists()
    torch.save(Project.load(project).model().state_dict(), tmp_path / "c.pt")
    assert "--eta 1" in refused(*command, "--checkpoints", tmp_path / "c.pt")
    assert not out.exists()
    invoke(*command, "--checkpoints", tmp_path / "c.pt", "--eta", "1")
    assert sorted(p.name for p in out.iterdir()) == [".written-here", "config.yaml", "query", "query.pinned.json"]


def test_the_project_of_a_run_from_elsewhere_is_run_only_if_it_is_trusted(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Copied, moved, or with another project file in its config: whoever made it may have written that file."""
    shutil.copytree(run.parent, tmp_path / "copy")
    copy, ran = tmp_path / "copy" / "run", tmp_path / "ran"
    project = tmp_path / "copy" / "my_project.py"
    project.write_text(project.read_text() + f"\n\nopen({str(ran)!r}, 'w').close()\n")
    commands: list[tuple[Any, ...]] = [
        ("query", copy, "--row", "0", "--exact"),
        ("query", copy, "--input", "-"),
        ("featurize", "--out", copy, "--split", "query"),
        ("featurize", "--config", copy / "config.yaml", "--out", tmp_path / "other"),
    ]
    for command in commands:
        said = refused(*command, input="{}")
        assert "was not written here by you" in said
        assert "--trust-project" in said
        assert not ran.exists()
    for command in (("query", copy, "--row", "0"), ("influence", copy), ("store", "verify", copy)):
        invoke(*command)
        assert not ran.exists(), "what reads stores alone runs no code"
    config = (run / "config.yaml").read_text()
    try:  # a run that was written here, which somebody has made to name another file
        (run / "config.yaml").write_text(config.replace("../my_project.py", str(project)))
        refused("query", run, "--row", "0", "--exact")
    finally:
        (run / "config.yaml").write_text(config)
    invoke("query", run, "--row", "0", "--exact")
    with monkeypatch.context() as patch:
        patch.setenv("XDG_CONFIG_HOME", str(tmp_path / "somebody"))
        refused("query", run, "--row", "0", "--exact")
    assert not ran.exists()
    invoke(*commands[0], "--trust-project")
    assert ran.exists()
    invoke(*commands[0])  # said once


def test_a_changed_project_is_accepted_knowingly(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run.parent, tmp_path / "copy")
    project, out = tmp_path / "copy" / "my_project.py", tmp_path / "copy" / "run"
    project.write_text(project.read_text() + "\n# a remark\n")
    again = ("featurize", "--config", out / "config.yaml")
    said = invoke(*again, "--trust-project", code=2).stderr
    assert "the project's code (my_project.py)" in said
    assert "--accept-changes" in said
    invoke(*again, "--accept-changes")
    assert "nothing left to do" in invoke(*again).stderr
    assert json.loads((out / "train.pinned.json").read_text())["accepted"][0]["changed"]


@pytest.mark.numeric
def test_query_by_row_id_and_new_example(run: Path, tmp_path: Path) -> None:
    def first(*arguments: str | Path, input: str | None = None) -> dict[str, object]:  # noqa: A002
        found: dict[str, object] = json.loads(
            invoke("query", run, *arguments, "--curvature", "none", "--json", input=input).stdout
        )[0]
        return found

    by_row, by_id = first("--row", "3"), first("--id", "3")
    assert by_row == by_id
    train, query = (Store.open(run / split).features() for split in ("train", "query"))
    sdi = torch.einsum("nd,sd->ns", train.values, query.values[3])
    best = sdi.sum(1).topk(10)
    hits = by_row["hits"]
    assert [hit["row"] for hit in hits] == best.indices.tolist()
    left, right = train.values[best.indices], query.values[3]
    inner_products("nd,sd->n", left, right).check(torch.tensor([hit["score"] for hit in hits]))
    inner_products("nd,sd->ns", left, right).check(torch.tensor([hit["trajectory"] for hit in hits]))
    assert hits[0]["peak_step"] == 1 + int(sdi[best.indices[0]].abs().argmax())

    late = first("--row", "3", "--step", "3-4", "--harmful", "-k", "2")["hits"]
    assert [hit["row"] for hit in late] == sdi[:, 2:].sum(1).topk(2, largest=False).indices.tolist()

    file = run.parent / "from_json.py"
    file.write_text(
        (run.parent / "my_project.py").read_text()
        + "\n\ndef from_json(fields):\n    return torch.tensor(fields['x']), fields['label']\n"
    )
    inputs, label = Project.load(file).dataset("query")[3]
    config = (run / "config.yaml").read_text()
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "config.yaml").write_text(config.replace("../my_project.py", str(file)))
    line = json.dumps({"x": inputs.tolist(), "label": label, "text": "a\u2028b"}, ensure_ascii=False)
    asked = ("query", tmp_path / "run", "--trust-project", "--input", "-", "--curvature", "none", "--json")
    done = invoke(*asked, input=line + "\n")
    project = Project.load(file)
    capture = attach(project.model(), body="core", sketch_size=64)
    sketches = {target.name: target.sketch for target in capture.targets}
    sides = gradients(project, best.indices.tolist(), 3)
    alone = torch.tensor([hit["trajectory"] for hit in json.loads(done.stdout)[0]["hits"]])
    influence_of_sketches(*sides, sketches).check(alone[:, None])


def gradients(project: Project, rows: list[int], query: int) -> list[Rounding]:
    """Of some training examples and of one query, by the oracle."""
    model = project.model().eval()
    names = [f"core.{name}" for name, _ in model.core.named_parameters()]
    train, asked = (project.dataset(split) for split in ("train", "query"))
    batches = project.collate([train[r] for r in rows]), project.collate([asked[query]])
    return [measure_body(model, [batch], project.loss, model.core, names) for batch in batches]


@pytest.mark.numeric
def test_query_exact(run: Path) -> None:
    arguments = ("query", run, "--row", "3", "-k", "3", "--json")
    estimated, exact = (json.loads(invoke(*arguments, *more).stdout)[0]["hits"] for more in ((), ("--exact",)))
    sides = gradients(Project.load(run.parent / "my_project.py"), [hit["row"] for hit in exact], 3)
    check_influence(torch.tensor([hit["trajectory"] for hit in exact])[:, None], [(1.0, *sides)], "exact:")
    assert all(hit["estimate"] != hit["score"] for hit in exact)
    assert len(exact) == len(estimated) == 3


@pytest.mark.parametrize("fold", ["--no-fold", "--fold"])
def test_query_exact_loads_each_checkpoint_once(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fold: str
) -> None:
    """Whatever the number of queries, the influence of each is that of the model at every checkpoint."""
    from stepinfluence import ExactCapture, influence_over_checkpoints
    from stepinfluence.attribution import visiting

    project = Project.load(run.parent / "my_project.py")
    paths = []
    for k in range(2):
        torch.manual_seed(k)
        paths.append(tmp_path / f"c{k}.pt")
        torch.save(project.model().state_dict(), paths[-1])
    options = ("--sketch-size", "16", "--eta", "0.5", "--checkpoints", tmp_path / "c*.pt", fold)
    invoke("featurize", "-p", project.path, "-s", "train", "-s", "query", *options, "-o", tmp_path / "run")
    loaded: list[str] = []
    load = visiting.load_checkpoint

    def counted(path: Path, **options: Any) -> Any:
        loaded.append(path.name)
        return load(path, **options)

    monkeypatch.setattr(visiting, "load_checkpoint", counted)
    ask = ("query", tmp_path / "run", "--row", "3", "--row", "0", "-k", "2", "--candidates", "100", "--exact", "--json")
    answers = json.loads(invoke(*ask).stdout)
    assert loaded == ["c0.pt", "c1.pt"]
    capture = ExactCapture(project.model(), body="core")
    train, query = (project.collate(list(project.dataset(split))) for split in ("train", "query"))
    expected = influence_over_checkpoints(capture, paths, [train], [query], project.loss, etas=0.5, progress=False)
    for one, column in zip(answers, (3, 0), strict=True):
        assert [hit["row"] for hit in one["hits"]] == expected.top(column, 2).rows
        for hit in one["hits"]:
            np.testing.assert_allclose(hit["trajectory"], expected.sdi[hit["row"], column], rtol=1e-3, atol=1e-5)


def test_query_exact_refuses_other_checkpoints_and_other_data(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run.parent, tmp_path / "copy")
    file, folder = tmp_path / "copy" / "my_project.py", tmp_path / "run"
    model, saved = Project.load(file).model(), tmp_path / "c.pt"
    torch.save(model.state_dict(), saved)
    options = ("--sketch-size", "16", "--eta", "1", "--checkpoints", saved)
    invoke("featurize", "-p", file, "-s", "train", "-s", "query", *options, "-o", folder)
    torch.save({name: value + 1 for name, value in model.state_dict().items()}, saved)
    said = invoke("query", folder, "--row", "0", "--exact", code=2).stderr
    assert "c.pt does not hold the weights of checkpoint 0 of the features" in " ".join(said.split())
    torch.save(model.state_dict(), saved)
    file.write_text(file.read_text() + "\n\ndef example_id(example, row):\n    return f'new {row}'\n")
    said = invoke("query", folder, "--row", "0", "--exact", code=2).stderr
    assert "the project's dataset now has 'new" in " ".join(said.split())


def test_new_examples_are_not_compared_with_another_loss(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run.parent, tmp_path / "copy")
    project, folder = tmp_path / "copy" / "my_project.py", tmp_path / "copy" / "run"
    text = project.read_text() + "\n\ndef from_json(fields):\n    return dataset('query')[fields]\n"
    project.write_text(text)
    ask = ("query", folder, "--trust-project", "--input", "-", "-k", "1")
    invoke(*ask, input="0\n")
    project.write_text(text + "\nfirst = loss\n\ndef loss(model, batch):\n    return 2 * first(model, batch)\n")
    said = invoke(*ask, input="0\n", code=2).stderr
    assert "new examples cannot be compared with it" in said
    assert "the loss of row 0 at checkpoint model()" in said


def test_query_for_people(run: Path) -> None:
    shown = invoke("query", run, "--row", "0", "-k", "2").stdout
    for words in ("Query 0", "loss", "total", "peak", "steps 1–4", "step ", "lowers the query's loss most", "negative"):
        assert words in shown
    assert "first order, per unit of learning rate" in " ".join(shown.split())  # no checkpoints, so no rates
    assert "SDI energy" not in shown  # one model as it is owns nothing
    assert "steps 2-3" in invoke("query", run, "--row", "0", "--step", "2-3", "--harmful").stdout


def test_query_names_a_checkpoint_that_owns_the_sum(run: Path, tmp_path: Path) -> None:
    """Two checkpoints of the same weights, one with a far larger learning rate."""
    model = Project.load(run.parent / "my_project.py").model()
    for k, rate in enumerate((0.001, 1.0)):
        optimizer = torch.optim.SGD(model.parameters(), lr=rate)
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / f"c{k}.pt")
    project, options = run.parent / "my_project.py", ("--sketch-size", "16", "--checkpoints", tmp_path / "c*.pt")
    invoke("featurize", "-p", project, "-s", "train", "-s", "query", *options, "-o", tmp_path / "run")
    shown = " ".join(invoke("query", tmp_path / "run", "--row", "0", "-k", "1").stdout.split())
    assert "Checkpoint c1.pt holds 99.9 % of this query's SDI energy" in shown
    assert "first order, weighted by learning rate" in shown
    done = invoke("query", tmp_path / "run", "--row", "0", "-k", "1", "--curvature", "none", "--json")
    (found,) = json.loads(done.stdout)
    assert found["dominated_by"] == "c1.pt"
    assert [c["name"] for c in found["checkpoints"]] == ["c0.pt", "c1.pt"]
    assert found["checkpoints"][1]["share"] == pytest.approx(1 / 1.001, rel=1e-4)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "say what to ask about"),
        (("--row", "99"), "row: got 99;"),
        (("--id", "nobody"), "no row with id 'nobody'"),
        (("--row", "0", "--step", "0"), "counted from 1"),
        (("--row", "0", "--step", "9"), "step: got '9'; the queries have steps 1 to 4"),
        (("--row", "0", "--train", "no"), "no split 'no' in it; it has train, query"),
        (("--input", "missing.jsonl"), "missing.jsonl could not be read"),
        (("--input", "-"), "- is not JSON (maximum recursion depth"),
        (("--row", "0", "--parameters", "*.qqq"), "fits none of"),
    ],
)
def test_wrong_queries(run: Path, arguments: tuple[str, ...], words: str) -> None:
    assert words in refused("query", run, *arguments, input="[" * 100_000)


def test_hostile_text_does_not_reach_the_terminal(run: Path, tmp_path: Path) -> None:
    file = tmp_path / "p.py"
    text = (run.parent / "my_project.py").read_text()
    file.write_text(
        text.replace("    return f\"{'positive'", "    return '[red]\\x1b[2J\\u202e\\n'\n    return f\"{'positive'")
    )
    for split in ("train", "query"):
        invoke("featurize", "-p", file, "-s", split, "--sketch-size", "16", "-o", tmp_path / "run")
    shown = invoke("query", tmp_path / "run", "--row", "0", "-k", "1").stdout
    assert "[red]�[2J� " in shown
    assert "\x1b[2J" not in shown


@pytest.mark.numeric
def test_influence_full_and_leading(run: Path, tmp_path: Path) -> None:
    train, query = (Store.open(run / split).features() for split in ("train", "query"))
    expected = torch.einsum("nd,qsd->nqs", train.values, query.values).numpy()
    done = invoke("influence", run, "--out", tmp_path / "scores.npy", "--json")
    assert json.loads(done.stdout)["shape"] == [64, 8, 4]
    inner_products("nd,qsd->nqs", train.values, query.values).check(torch.from_numpy(np.load(tmp_path / "scores.npy")))
    ids = json.loads((tmp_path / "scores.json").read_text())
    assert ids["train"]["ids"] == list(range(64))
    assert ids["query"]["ids"] == list(range(8))

    rows = list(csv.DictReader(io.StringIO(invoke("influence", run, "-k", "3", "--format", "csv").stdout)))
    order = (-expected.sum(2)).argsort(0)[:3].T
    assert [int(row["train_row"]) for row in rows] == order.flatten().tolist()
    stores = [Store.open(run / split) for split in ("train", "query")]
    for row in rows:
        assert row["train_text"] == stores[0].row(int(row["train_row"])).text
        assert row["query_text"] == stores[1].row(int(row["query_row"])).text
    parquet = pytest.importorskip("pyarrow.parquet")
    invoke("influence", run, "-k", "3", "--format", "parquet", "--out", tmp_path / "top.parquet")
    table = parquet.read_table(tmp_path / "top.parquet").to_pylist()
    assert [(r["query_row"], r["train_row"], r["train_text"]) for r in table] == [
        (int(r["query_row"]), int(r["train_row"]), r["train_text"]) for r in rows
    ]
    np.testing.assert_allclose(table[0]["trajectory"], expected[table[0]["train_row"], 0], rtol=1e-4, atol=1e-5)
    entries = json.loads(invoke("influence", run, "-k", "1", "--per-step", "--harmful").stdout)
    assert [e["step"] for e in entries] == [1, 2, 3, 4] * 8
    assert [e["hits"][0]["row"] for e in entries] == expected.argmin(0).flatten().tolist()
    assert entries[0]["hits"][0]["text"] == stores[0].row(entries[0]["hits"][0]["row"]).text
    assert entries[0]["query"]["text"] == stores[1].row(0).text
    assert "go with --top-k" in refused("influence", run, "--harmful")
    assert "use json, csv or parquet" in refused("influence", run, "-k", "2", "--format", "xml")
    assert "into a file" in refused("influence", run, "-k", "2", "--format", "parquet")


def test_store_commands(run: Path, tmp_path: Path) -> None:
    facts = json.loads(invoke("store", "info", run, "--json").stdout)
    assert [(f["rows"], f["per_step"], f["complete"]) for f in facts] == [(8, True, True), (64, False, True)]
    assert "summed over loop steps" in invoke("store", "info", run / "train").stdout
    assert invoke("store", "verify", run).stdout == ""
    shutil.copytree(run, tmp_path / "scored")
    invoke("influence", tmp_path / "scored")
    assert invoke("store", "verify", tmp_path / "scored").stdout == ""
    (tmp_path / "scored" / "influence.json").unlink()
    assert "has no influence.json" in invoke("store", "verify", tmp_path / "scored", code=1).stdout
    invoke("store", "export", run / "query", tmp_path / "query.npz")
    assert np.load(tmp_path / "query.npz")["features_0"].shape[:2] == (8, 4)
    assert "exists" in refused("store", "export", run / "query", tmp_path / "query.npz")
    assert "end it in .npz" in refused("store", "export", run / "query", tmp_path / "query.txt")

    parts = [tmp_path / name for name in ("a", "b")]
    for part, shard in zip(parts, (0, 1), strict=True):
        shutil.copytree(run / "train", part)
        (part / "c000" / f"shard-{shard:08d}.json").unlink()
    invoke("store", "merge", *parts, "--out", tmp_path / "merged")
    assert Store.open(tmp_path / "merged").complete
    assert "incomplete" in refused("store", "export", parts[0], tmp_path / "part.npz")

    values = tmp_path / "a" / "c000" / "shard-00000001.safetensors"
    raw = bytearray(values.read_bytes())
    raw[-1] ^= 1
    values.write_bytes(raw)
    done = invoke("store", "verify", tmp_path / "a", code=1)
    assert str(values) in done.stdout
    assert "no store here" in refused("store", "info", tmp_path / "none")


def test_help_teaches() -> None:
    for command in ("init", "featurize", "query", "influence", "store"):
        shown = invoke(command, "--help").stdout
        assert "Examples" in shown
        assert f"sdi {command}" in shown
    assert "130 interrupted" in invoke("featurize", "--help").stdout

"""Misuse of every command is refused in one line that names the argument, and loses nothing."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from commands import featurized, invoke, refused
from stepinfluence.app.cli import app
from stepinfluence.store import Store
from typer.testing import CliRunner

PYTHON = "import sys; from stepinfluence.app.cli import main; sys.argv[0] = 'sdi'; main()"


def contents(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return featurized(tmp_path_factory.mktemp("misuse"))


# ----------------------------------------------------------------------------------------------------------------
# Arguments


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("query RUN --row x", "'--row'.*see sdi query --help"),
        ("query RUN --row 0 -k 0", "'-k'.*see sdi query --help"),
        ("query", "'RUN'; see sdi query --help"),
        ("nonsense", "'nonsense'; see sdi --help"),
        ("--nonsense", "--nonsense; see sdi --help"),
        ("store nonsense", "'nonsense'; see sdi store --help"),
        ("doctor more", r"\(more\); see sdi doctor --help"),
        ("demo --seed 18446744073709551616", "'--seed'.*see sdi demo --help"),
        ("evaluate adder --threads 100000", "'--threads'.*see sdi evaluate --help"),
        ("evaluate adder --out none/x.json", "out: none/x.json cannot be written: there is no folder none"),
        ("query RUN --row 0 --candidates 3", "candidates: is the length of --exact's short list"),
        ("query RUN --row 0 --exact --curvature fisher --candidates 3", "candidates: .*takes all rows"),
        ("outliers RUN --curvature block", "curvature: goes with --by leverage"),
        ("outliers RUN --by leverage --curvature source", "curvature: got 'source'; leverage needs fisher or block"),
        ("influence RUN --format csv", "format: goes with --top-k"),
        ("influence RUN --top-k 2 --json", "json: .*with --top-k, give --format json"),
        ("init x.py --data d.jsonl", "data: goes with --hf"),
        ("init x.py --task causal-lm", "task: goes with --hf"),
        ("init x.py --hf m --data {split}.jsonl -t gpt", "template: --hf writes a file of its own"),
        ("explore RUN --host= --no-open", "host: got ''; give an address"),
        ("explore RUN --host 999.1.1.1 --no-open", "host: cannot listen on 999.1.1.1:0 .*another --host"),
        ("featurize --config none.yaml -s train -p PROJECT -o o", "config: none.yaml is no file"),
        ("featurize --config RUN -s train -p PROJECT -o o", "config: .* is no file"),
    ],
)
def test_arguments(run: Path, arguments: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    given = [a.replace("RUN", str(run)).replace("PROJECT", str(run.parent / "p.py")) for a in arguments.split()]
    line = refused(*given)
    assert re.search(message, line), line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (("--workspace", 2**70), "workspace: got a number of more than 64 bits"),
        (("--seed", 2**70), "seed: got a number of more than 64 bits"),
        (("--threads", 100_000), "threads: got 100000; give at most 4096"),
        (("--eta", "nan"), "eta: got nan; give a finite number"),
        (("--device", "mps"), "device: got 'mps', which torch cannot use here"),
        (("--device", "meta"), "device: got 'meta', which torch cannot use here"),
        (("--device", "xyz"), "device: got 'xyz'; use auto, cpu, cuda or cuda:N"),
    ],
)
def test_settings_that_cannot_be_kept_or_used_are_refused_at_once(
    run: Path, option: tuple[str, object], message: str, tmp_path: Path
) -> None:
    """Of a number that config.yaml cannot hold, features were computed, and the run could not be read again."""
    assert message in refused("featurize", "-p", run.parent / "p.py", "-s", "query", "-o", tmp_path / "o", *option)
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("device", ["mps", "meta", "xyz", "cuda:99"])
def test_a_search_refuses_a_device_that_is_not_there(run: Path, device: str) -> None:
    for how in ((), ("--top-k", 2), ("--curvature", "fisher")):
        assert f"device: got '{device}'" in refused("influence", run, "--device", device, *how)


# ----------------------------------------------------------------------------------------------------------------
# Projects


@pytest.mark.parametrize(
    "extra",
    [
        "def loss(model, batch): raise SystemExit(0)",
        "def dataset(split): raise SystemExit",
        "def model(): raise SystemExit(0)",
        "class Odd(list):\n    def __getitem__(self, k): raise SystemExit(0)\ndef dataset(split): return Odd([1, 2])",
    ],
)
def test_a_project_that_ends_the_program_is_no_success(tmp_path: Path, extra: str) -> None:
    invoke("init", tmp_path / "p.py", "--template", "blank")
    with (tmp_path / "p.py").open("a") as file:
        file.write(extra + "\n")
    line = refused("featurize", "-p", tmp_path / "p.py", "-s", "query", "-o", tmp_path / "run")
    assert "SystemExit" in line or "sys.exit(" in line
    assert not (tmp_path / "run").exists()


NO_TRAIN = "_all = dataset\ndef dataset(split): return [] if split == 'train' else _all(split)\n"
NO_QUERY = "_all = dataset\ndef dataset(split): return [] if split == 'query' else _all(split)\n"


def test_a_run_without_training_examples(tmp_path: Path) -> None:
    run = featurized(tmp_path, NO_TRAIN)
    assert "no training example" in invoke("query", run, "--row", 0).stdout
    assert "train: has no rows with features" in refused("query", run, "--row", 0, "--exact")
    assert "no training example" in invoke("outliers", run).stdout
    assert "has no rows" in refused("report", run)


def test_a_run_without_queries(tmp_path: Path) -> None:
    run = featurized(tmp_path, NO_QUERY)
    assert "row: got 0; " in (line := refused("query", run, "--row", 0))
    assert line.endswith("has no rows")
    assert "query: has no rows" in refused("influence", run)
    assert "query: has no rows" in refused("influence", run, "--top-k", 3)


@pytest.mark.parametrize("dtype", ["fp32", "int8"])
def test_scores_that_overflow_are_refused_rather_than_left_out(tmp_path: Path, dtype: str) -> None:
    """A row whose influence is infinite would be missing at the top of a ranking."""
    run = featurized(tmp_path, "_l = loss\ndef loss(model, batch): return _l(model, batch) * 1e25\n", "--dtype", dtype)
    for asked in (("influence", run), ("influence", run, "-k", 3), ("query", run, "--row", 0, "--curvature", "none")):
        assert "scores: some are too large for float32" in refused(*asked)
    assert not (run / "influence.npy").exists()


def test_scores_that_are_too_small_are_refused(tmp_path: Path) -> None:
    run = featurized(tmp_path, "_l = loss\ndef loss(model, batch): return _l(model, batch) * 1e-25\n")
    for asked in (("influence", run), ("influence", run, "-k", 3), ("query", run, "--row", 0, "--curvature", "none")):
        assert "scores: all are too small for float32" in refused(*asked)
    assert not (run / "influence.npy").exists()


# ----------------------------------------------------------------------------------------------------------------
# Files


def test_nothing_of_a_run_is_written_over(run: Path, tmp_path: Path) -> None:
    before = contents(run.parent)
    for target in ("train/manifest.json", "train/c000/shard-00000000.json", "train.pinned.json"):
        assert "would be lost" in refused("influence", run, "-k", 2, "-o", run / target)
    for target in ("train/manifest.npy", "train/new.npy"):
        assert "would be lost" in refused("influence", run, "-o", run / target)
    assert "would be lost" in refused("report", run, "-o", run / "config.yaml")
    assert "does not end in .html" in refused("report", run, "-o", run.parent / "p.py")
    assert "would be lost" in refused("store", "export", run / "query", run / "query" / "x.npz")
    assert contents(run.parent) == before


def test_a_manifest_of_something_else_is_no_store(run: Path, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"name": "a site", "version": "1"}')
    invoke("influence", run, "-k", 2, "-o", tmp_path / "top.json")
    assert json.loads((tmp_path / "top.json").read_text())


def test_the_ids_beside_scores_take_no_other_file_s_place(run: Path, tmp_path: Path) -> None:
    (tmp_path / "data.json").write_text("[1, 2, 3]")
    assert "data.json, which is there and holds something else" in refused(
        "influence", run, "-o", tmp_path / "data.npy"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["data.json"]
    assert (tmp_path / "data.json").read_text() == "[1, 2, 3]"
    for _ in range(2):  # what was written by it may be replaced
        invoke("influence", run, "-o", tmp_path / "mine.npy")


def limited(folder: Path, bytes_: int, *arguments: object) -> subprocess.CompletedProcess[str]:
    """sdi, with no file larger than some bytes: what a full disk is, for a file."""

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_, bytes_))

    command = [sys.executable, "-c", PYTHON, *map(str, arguments)]
    return subprocess.run(
        command, cwd=folder, capture_output=True, text=True, preexec_fn=limit, check=False, timeout=300
    )


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("top.csv", "influence RUN -k 9 --format csv -o top.csv"),
        ("top.json", "influence RUN -k 9 -o top.json"),
        ("top.parquet", "influence RUN -k 9 --format parquet -o top.parquet"),
        ("page.html", "report RUN -o page.html"),
        ("mine.py", "init mine.py --force"),
        ("all.npz", "store export RUN/train all.npz --force"),
    ],
)
def test_a_full_disk_leaves_what_was_there(run: Path, name: str, arguments: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("precious")
    done = limited(tmp_path, 500, *(a.replace("RUN", str(run)) for a in arguments.split()))
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert "File too large" in done.stderr
    assert ".aside" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == "precious"


@pytest.mark.slow
def test_the_demonstration_on_a_full_disk_is_one_line(tmp_path: Path) -> None:
    done = limited(tmp_path, 9_000, "demo", "--quick", "--out", "demo")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("sdi: ")
    assert "Traceback" not in done.stderr
    assert "could not be written" in done.stderr


def test_what_is_no_file_is_written_to(run: Path) -> None:
    """``--out /dev/stdout`` must not replace the device."""
    done = subprocess.run(
        [sys.executable, "-c", PYTHON, "influence", str(run), "-k", "1", "--format", "csv", "-o", "/dev/stdout"],
        capture_output=True, text=True, check=True, timeout=300,
    )  # fmt: skip
    assert done.stdout.startswith("query_row,")
    assert Path("/dev/stdout").is_symlink()


# ----------------------------------------------------------------------------------------------------------------
# Names


ODD_TEXT = (
    "def text(example): return 'half \\ud800 [bold]x[/] [/z]'\ndef example_id(example, k): return f'\\ud800[/q]{k}'\n"
)


def test_halves_of_characters_are_spelled_out(tmp_path: Path) -> None:
    run = featurized(tmp_path, ODD_TEXT)
    for form in ("csv", "json", "parquet"):
        invoke("influence", run, "-k", 2, "--format", form, "-o", tmp_path / f"top.{form}")
    rows = csv.DictReader((tmp_path / "top.csv").read_text(encoding="utf-8").splitlines())
    assert next(rows)["query_id"] == "\\ud800[/q]0"
    found = json.loads((tmp_path / "top.json").read_text(encoding="utf-8"))
    assert found[0]["query"]["id"] == "\ud800[/q]0"
    command = [sys.executable, "-c", PYTHON, "query", str(run), "--row", "0", "--json"]  # of a stdout that is UTF-8
    done = subprocess.run(command, capture_output=True, check=True, timeout=300)
    assert json.loads(done.stdout.decode("utf-8"))[0]["query"]["id"] == "\ud800[/q]0"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="names of any bytes")
def test_a_folder_of_any_name(tmp_path: Path) -> None:
    """Every command on a run whose name is no text, and looks like markup, does the same as ever."""
    name = b"r\xff [bold]x[/y] [[\n\xe2\x80\xae {split} %s"
    folder = tmp_path / os.fsdecode(name)
    folder.mkdir(parents=True)  # its name has a slash, too
    script = tmp_path / "all.py"
    script.write_text(
        "import json, sys\nfrom stepinfluence.app.cli import main\n"
        "for line in json.loads(sys.argv[1]):\n"
        "    sys.argv = ['sdi', *line]\n"
        "    try:\n        main()\n"
        "    except SystemExit as end:\n        assert not end.code, (line, end.code)\n"
    )
    run = str(folder / "run")
    lines = [
        ["init", str(folder / "p.py"), "-t", "blank"],
        ["featurize", "-p", str(folder / "p.py"), "-s", "train", "-s", "query", "--sketch-size", "16", "-o", run],
        ["featurize", "-s", "query", "-o", run],
        ["query", run, "--row", "0", "--exact"],
        ["influence", run, "--json"],
        ["report", run],
        ["store", "info", run],
        ["store", "info", run, "--json"],
        ["store", "verify", run, "--report", run + "/report.html"],
        ["store", "merge", run + "/train", "-o", run + "-merged"],
        ["store", "export", run + "/train", run + ".npz"],
    ]
    done = subprocess.run(
        [sys.executable, str(script), json.dumps(lines)], capture_output=True, check=False, timeout=300, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert Store.open(Path(run) / "train").complete
    assert b"Traceback" not in done.stderr
    assert b"[bold]x[/y] [[" in done.stderr  # as it is, not as markup


def test_an_example_s_error_that_looks_like_markup_is_shown_as_it_is(tmp_path: Path) -> None:
    extra = (
        "_c = torch.utils.data.default_collate\n"
        "def collate(examples):\n"
        "    if len(examples) == 64 or float(examples[0][0].sum()) > 3: raise ValueError('bad [/x] [bold]')\n"
        "    return _c(examples)\n"
    )
    invoke("init", tmp_path / "p.py", "--template", "blank")
    with (tmp_path / "p.py").open("a") as file:
        file.write(extra)
    asked = (
        "featurize",
        "-p",
        tmp_path / "p.py",
        "-s",
        "train",
        "--sketch-size",
        "16",
        "-b",
        1,
        "-o",
        tmp_path / "run",
    )
    done = invoke(*asked, "--on-error", "skip")
    assert "bad [/x] [bold]" in done.stderr


def test_new_examples_with_a_byte_order_mark(run: Path, tmp_path: Path) -> None:
    """As PowerShell and Excel write them."""
    (tmp_path / "new.json").write_bytes(b"\xef\xbb\xbf[]")
    assert "holds no example" in refused("query", run, "--input", tmp_path / "new.json")


def test_a_report_that_was_cut_short_is_told(run: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    invoke("report", run, "-o", page)
    invoke("store", "verify", run, "--report", page)
    whole = page.read_bytes()
    for cut in (len(whole) // 2, len(whole) - 10):
        page.write_bytes(whole[:cut])
        done = CliRunner().invoke(app, ["store", "verify", str(run), "--report", str(page)])
        assert done.exit_code in (1, 2)
        assert "cut short" in done.output or "holds no answers" in done.output

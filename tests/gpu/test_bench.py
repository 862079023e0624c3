"""The GPU benchmark's own logic, on a CPU with a small model: what only a GPU can tell is in test_kernels.py."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from sketch_cases import expected_linear

from bench.gpu import check, end_to_end, layers, report, run
from bench.gpu.end_to_end import Bench, Setup
from bench.gpu.layers import cases, checked_error, published_formula
from sdi_kernels import TensorSketch

ABOUT = {"gpu": "Test GPU", "torch": "2.11.0", "triton": "3.6.0", "commit": "abc"}
CPU = torch.device("cpu")
NEVER: Callable[[], bool] = lambda: False  # noqa: E731
# What a GPU machine has is python, torch, triton, numpy, scipy, matplotlib and pytest.
ABSENT = ("typer", "rich", "tqdm", "safetensors", "jinja2", "plotly", "transformers", "lightning", "sklearn", "faiss",
          "hypothesis", "opacus", "yaml", "starlette", "uvicorn")  # fmt: skip


@pytest.fixture(scope="module")
def bench() -> Bench:
    return Bench(Setup.tiny(), CPU)


# ---------------------------------------------------------------------------------------------------------------
# The parts


def test_costs(bench: Bench) -> None:
    found = end_to_end.costs(bench)
    assert set(found["seconds"]) == {"inference", "training_step", "featurize", "checkpoint"}
    assert all(s > 0 for s in found["seconds"].values())
    assert set(found["peak_bytes"].values()) == {None}, "there is no CUDA allocator to ask"
    steps, tensors = bench.setup.model.steps, sum(p.dim() == 2 for p in bench.model.core.parameters())
    assert found["sketch_bytes"] == 4 * bench.setup.batch * steps * tensors * bench.setup.sketch_size
    assert found["parameters"] == sum(p.numel() for p in bench.model.parameters())


def test_errors_over_the_sketch_size(bench: Bench) -> None:
    *grown, found = end_to_end.errors(bench)
    assert len(grown) == len(bench.setup.error_sizes)
    for family in ("balanced", "iid", "block"):
        assert all(0 < e < 2 for m in (32, 64) for e in found["sdi"][family][str(m)])
        assert found["slope"][family] < 0
        assert len(found["tracin"][family]["64"]) == bench.setup.error_seeds
    # Against per-example gradients by plain autograd, for one of the sketches.
    batch = bench.batch(bench.setup.error_batch)
    exact = end_to_end.ExactCapture(bench.model, body=bench.model.core)
    want = end_to_end.sdi(exact.featurize([batch], end_to_end.gpt_loss, progress=False).values.double())
    got = end_to_end.sdi(bench.featurize(batch).values.double())  # balanced, m = 64, seed 0
    assert found["sdi"]["balanced"]["64"][0] == pytest.approx(float((got - want).norm() / want.norm()), rel=1e-4)


def test_influence_of_parts_is_influence_of_the_whole() -> None:
    per_step = torch.randn(3, 4, (1 << 20) + 7)
    got = end_to_end.sdi_in_parts(per_step)
    want = torch.einsum("isd,jtd->ijt", per_step.double(), per_step.double())
    torch.testing.assert_close(got, want)


def test_errors_stop_when_told(bench: Bench) -> None:
    (found,) = end_to_end.errors(bench, lambda: True)
    assert found["stopped"] == "no time left"
    assert found["sdi"] == {}


def test_largest_batch_by_peak_memory() -> None:
    assert end_to_end.largest_batch((4, 8), (20, 30), 1000) == (950 - 20) * 4 // 10 + 4
    assert end_to_end.largest_batch((1, 2), (900, 1800), 1000) == 1
    assert end_to_end.largest_batch((1, 2), (9000, 18000), 1000) == 0
    with pytest.raises(ValueError, match="memory must grow"):
        end_to_end.largest_batch((1, 2), (10, 10), 1000)


def test_feasible_runs_the_batch_it_names(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """With an allocator that is a formula: 10 bytes, and 2 (sketched) or 50 (exact) an example."""
    sizes: list[int] = []

    def peak(call: Callable[[], Any]) -> int:
        before = len(sizes)
        call()
        return sizes[before]

    def featurize(batch: dict[str, torch.Tensor]) -> None:
        size = len(batch["tokens"])
        if size > 40:
            raise torch.cuda.OutOfMemoryError("too much")
        sizes.append(10 + 2 * size)

    class Exact:
        def __init__(self, *_: object, **__: object) -> None: ...

        def featurize(self, loader: list[dict[str, torch.Tensor]], *_: object, **__: object) -> None:
            sizes.append(10 + 50 * len(loader[0]["tokens"]))

    monkeypatch.setattr(bench, "peak_bytes", peak)
    monkeypatch.setattr(bench, "featurize", featurize)
    monkeypatch.setattr(end_to_end, "ExactCapture", Exact)
    found = end_to_end.feasible(bench, 116)
    assert found["sketched"]["largest_batch"] == 50
    assert found["sketched"]["largest_batch_run"] == 40, "50 does not fit: the next one tried is 45, then 40"
    assert found["exact"]["largest_batch"] == 2


def test_paper_setup_is_the_papers_model() -> None:
    model = Setup().model
    assert (model.steps, model.sequence_len, model.n_prelude, model.n_core, model.n_coda) == (32, 128, 2, 4, 2)
    with torch.device("meta"):
        parameters = sum(p.numel() for p in end_to_end.LoopedGPT(model).parameters())
    assert parameters == 135_069_696


# ---------------------------------------------------------------------------------------------------------------
# The runner


def test_every_result_is_written_as_it_comes(tmp_path: Path) -> None:
    """A run that is killed leaves valid files with what it had."""
    results, seen = report.new(ABOUT), []

    def save() -> None:
        path = report.write(results, tmp_path)
        seen.append(set(json.loads(path.read_text())["end_to_end"]))
        assert "did not come to its end" in path.with_suffix(".md").read_text()

    run.run_end_to_end(results, save, NEVER, CPU, Setup.tiny())
    assert results["refused"] == []
    assert results["not_reached"] == []
    assert seen[0] == {"costs"}
    assert seen[-1] == {"costs", "errors", "feasible"}
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"Test_GPU-2.11.0-3.6.0{s}" for s in (".json", ".md")]
    results["finished"] = True
    text = report.write(results, tmp_path).with_suffix(".md").read_text()
    assert "did not come to its end" not in text
    for expected in (
        "Featurizing over a training step",
        "Relative errors, batch 2",
        "Log-log slope",
        "the paper: -0.489",
    ):
        assert expected in text
    assert stat.S_IMODE((tmp_path / "Test_GPU-2.11.0-3.6.0.md").stat().st_mode) == 0o644


def test_a_part_that_fails_is_refused_and_what_came_before_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> Any:
        raise RuntimeError("a kernel went wrong")

    monkeypatch.setattr(end_to_end, "errors", broken)
    results = report.new(ABOUT)
    run.run_end_to_end(results, lambda: None, NEVER, CPU, Setup.tiny())
    assert results["refused"] == ["end to end: RuntimeError: a kernel went wrong"]
    assert results["not_reached"] == ["end to end: errors", "end to end: feasible"]
    assert "costs" in results["end_to_end"]


def test_layers_stop_in_time_and_survive_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[str] = []

    def time_case(case: Any) -> dict[str, Any]:
        timed.append(case.name)
        if len(timed) == 1:
            raise RuntimeError("illegal memory access")
        if len(timed) == 2:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.\nmore")
        return record(case)

    monkeypatch.setattr(run, "time_case", time_case)
    results = report.new(ABOUT)
    run.run_layers(results, lambda: None, lambda: len(timed) >= 4)
    assert [c["m"] for c in results["cases"]] == [2048, 2048]
    assert results["refused"][0] == f"{timed[0]}: RuntimeError: illegal memory access"
    assert results["refused"][1] == f"{timed[1]}: out of memory (CUDA out of memory.)"
    assert results["refused"][2] == f"{timed[2]} direct: wrong"
    assert len(results["not_reached"]) == len(list(cases())) - 4
    results["ceilings"] = {"copy_gb_s": 100.0}
    table = report.markdown(results)
    assert "| 256 × 256 | 2048 | 2048 | float32 | 1.00 | refused | – | fft | 0.50 |" in table


def test_a_route_that_fails_does_not_take_the_others_along(monkeypatch: pytest.MonkeyPatch) -> None:
    made, calls = layers.Case(8, 8, 4, 16, torch.float32), []

    def time_route(record: dict[str, Any], route: str, *_: object) -> None:
        calls.append(route)
        if route == "fft":
            raise RuntimeError("no such kernel\nmore")
        record["ms"][route] = 1.0

    def no_memory(*_: object) -> float:
        raise torch.cuda.OutOfMemoryError("too much")

    real = {name: getattr(torch, name) for name in ("randn", "zeros", "Generator")}
    monkeypatch.setattr(layers.torch, "randn", lambda *a, **k: real["randn"](*a))
    monkeypatch.setattr(layers.torch, "zeros", lambda *a, **k: real["zeros"](*a))
    monkeypatch.setattr(layers.torch, "Generator", lambda *_: real["Generator"]())
    monkeypatch.setattr(TensorSketch, "tables", lambda self, *_: [])
    monkeypatch.setattr(layers, "median_ms", lambda run: 2.0)
    monkeypatch.setattr(layers, "_time_route", time_route)
    monkeypatch.setattr(layers, "_published", no_memory)
    found = layers.time_case(made)
    assert calls[:2] == ["fft", "direct"]
    assert found["refused"] == {"fft": "RuntimeError: no such kernel", "published_formula": "out of memory (too much)"}
    assert set(found["ms"]) >= {"direct", "weight_gradient_gemm", "per_example_gradients"}


def test_the_halves_of_a_check_do_not_stop_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def half(name: str, code: str, seconds: float = 60, log: bool = True) -> check.Half:
        return check.Half(name, [sys.executable, "-c", code], seconds, tmp_path / f"{name}.log" if log else None)

    hangs = "import time; print('tests/a.py::test_x FAILED [ 5%]', flush=True); time.sleep(600)"
    slow = "import time; print('tests/a.py::test_x PASSED [ 5%]', flush=True); time.sleep(600)"
    monkeypatch.setattr(sys, "argv", ["check"])
    for found, status, said in (
        (
            [half("bench", "raise SystemExit(1)"), half("tests", "print('3 passed in 1 s')")],
            1,
            "tests: 3 passed in 1 s",
        ),
        ([half("bench", "pass", log=False), half("tests", "print('3 passed')")], 0, "bench: ended with status 0"),
        ([half("bench", "pass", log=False), half("tests", slow, 5)], 0, "tests: stopped after 5 s"),
        ([half("bench", "pass", log=False), half("tests", hangs, 5)], 1, "tests: WRONG: stopped after 5 s"),
    ):
        monkeypatch.setattr(check, "halves", lambda found=found: found)
        assert check.main() == status
        assert said in capsys.readouterr().out
    assert "FAILED" in (tmp_path / "tests.log").read_text(), "what it had finished is there"


def test_both_halves_fit_into_nine_minutes() -> None:
    found = check.halves()
    assert [h.name for h in found] == ["bench", "tests"]
    assert sum(h.seconds for h in found) < 9 * 60
    assert float(found[0].command[-1]) < found[0].seconds, "the benchmark ends by itself"


def record(case: Any) -> dict[str, Any]:
    tokens = case.rows * case.tokens
    ms = {
        "fft": 1e-6 * tokens,
        "weight_gradient_gemm": 2e-6 * tokens,
        "published_formula": 1.0,
        "per_example_gradients": 1.0,
    }
    return {
        "d_out": case.d_out, "d_in": case.d_in, "tokens": 2048, "m": case.m, "dtype": "float32", "rows": tokens // 2048,
        "input_bytes": 8, "planned": "fft", "ms": ms, "refused": {"direct": "wrong"},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("script", "seconds", "outcome"),
    [
        (None, 100, "skipped (compute-sanitizer is not installed)"),
        ("exit 0", 10, "skipped (no time left)"),
        ("exit 0", 100, "passed"),
        ("echo Invalid __global__ read; exit 86", 100, "FAILED with exit code 86: Invalid __global__ read"),
    ],
)
def test_sanitizer(
    script: str | None, seconds: float, outcome: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if script is not None:
        program = tmp_path / "compute-sanitizer"
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin" if script else str(tmp_path))
    monkeypatch.setattr(run.shutil, "which", real_which(run.shutil.which, tmp_path))
    assert run.sanitize("memcheck", seconds) == outcome


def real_which(which: Callable[..., str | None], folder: Path) -> Callable[..., str | None]:
    """Looks in ``folder`` alone, so that a machine with the tool gives the same answers."""
    return lambda name, path=None: which(name, path=str(folder))


def test_published_formula_is_the_sketch() -> None:
    a, g = torch.randn(2, 5, 12), torch.randn(2, 5, 20)
    sketch = TensorSketch(20, 12, 16)
    got = published_formula(a, g, sketch.tables(), 16)
    expected = expected_linear(a, g, sketch)
    expected.check(got)
    error = (got.double() - expected.exact).norm(dim=-1) / expected.exact.norm(dim=-1)
    assert checked_error(got, a, g, sketch) == pytest.approx(float(error.max()))


def test_nothing_is_needed_that_a_gpu_machine_lacks(tmp_path: Path) -> None:
    """``make gpu-check``'s modules, and the small end-to-end run, with every other package hidden."""
    code = f"""
import sys
sys.modules.update(dict.fromkeys({ABSENT!r}))  # None: not importable, not found
import runpy, torch
from pathlib import Path
runpy.run_path("tests/conftest.py")
runpy.run_path("tests/gpu/checks.py", run_name="checks")
from bench.gpu import check, end_to_end, report, run
results = report.new({ABOUT!r})
run.run_end_to_end(results, lambda: report.write(results, Path({str(tmp_path)!r})), lambda: True,
                   torch.device("cpu"), end_to_end.Setup.tiny())
assert set(results["end_to_end"]) == {{"costs"}}, results
"""
    root = Path(__file__).parents[2]
    env = {**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{root / 'python'}"}
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root, env=env, stdout=subprocess.DEVNULL)
    assert len(list(tmp_path.iterdir())) == 2


def test_without_a_gpu_nothing_is_timed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["run"])
    assert run.main() == 2
    assert "Nothing was timed" in capsys.readouterr().err

"""The kernel gate that needs no GPU: every kernel compiles for real targets, without spilling, on tensor cores.

``pytest -s`` shows the table. What a case may need is declared with it in gate_cases.py. compile_gate.py runs as a
process of its own: it starts workers, and must not see the interpreter's setting.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import compile_gate
import pytest
from gate_cases import SM90, Case

from bench.gpu.counted import COUNTED
from sdi_kernels.triton import cost, transforms

GATE = Path(__file__).parent / "compile_gate.py"


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
@pytest.mark.skipif(sys.platform != "linux", reason="Triton brings its tools for Linux only")
def test_kernels_compile_within_their_limits() -> None:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p or os.curdir for p in sys.path)}
    env.pop("TRITON_INTERPRET", None)
    # Other forms of the same kernels, and other targets: `make test-triton`, under both versions of Triton.
    result = subprocess.run(
        [sys.executable, str(GATE), "--brief"], env=env, capture_output=True, text=True, check=False
    )
    print(f"\n{result.stdout}")
    assert "| fft m=2048 half | sm_90 |" in result.stdout, result.stderr
    assert result.returncode == 0, result.stdout.rpartition("|\n")[2]


LIMITS = {"shared_cycles": 100, "issue_cycles": 20, "wide_loads": 2, "single_loads": 3}
CASE = Case("fft", SM90, "fft", "kernel", {}, {}, 8, 1, ("HGMMA",), **LIMITS)  # type: ignore[arg-type]
FINE = compile_gate.Cost(CASE, matrix={"HGMMA": 1}, shared_cycles=100, loop=10, wide_loads=2, single_loads=3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stack": 8}, "8 bytes of stack"),
        ({"local": 1}, "1 local loads and stores in the loop"),
        ({"shared": 1 << 20}, "of shared memory, 227 KB are there"),
        ({"shared_cycles": 101}, "101 cycles of shared memory a token"),
        ({"loop": 11}, "22 cycles a token to issue, 20 allowed"),
        ({"single_loads": 2}, "2 loads of 16 bits in the loop, 3 wanted"),
        ({"wide_loads": 1}, "1 loads of 128 bits in the loop, 2 wanted"),
        ({"matrix": {"HMMA": 3}}, "none of HGMMA"),
        ({"atomics": ("lanes go down",)}, "lanes go down"),
        ({"error": "no"}, "does not compile"),
    ],
)
def test_every_limit_is_held(change: dict[str, object], message: str) -> None:
    assert compile_gate.problems(FINE) == []
    (problem,) = compile_gate.problems(FINE._replace(**change))  # type: ignore[arg-type]
    assert message in problem


def ttgir(threads: str) -> str:
    return f"""#blocked = #ttg.blocked<{{sizePerThread = [1, 1], threadsPerWarp = {threads}, order = [0, 1]}}>
    %1 = tt.atomic_rmw fadd, relaxed, gpu, %p, %v, %m : (tensor<64x64x!tt.ptr<f32>, #blocked>, tensor<64x64xf32>)
    """


def test_atomics_down_the_rows_or_of_several_values_are_found() -> None:
    ptx = "atom.global.gpu.relaxed.add.f32"
    assert compile_gate._atomics({"ttgir": ttgir("[1, 32]"), "ptx": ptx}) == ()
    assert "down the rows" in compile_gate._atomics({"ttgir": ttgir("[32, 1]"), "ptx": ptx})[0]
    several = "red.relaxed.gpu.global.add.v4.f32"
    assert several in compile_gate._atomics({"ttgir": ttgir("[1, 32]"), "ptx": several})[0]


def test_shared_memory_cycles() -> None:
    """LDSM.x4 moves 512 bytes for a warp, at 128 bytes a cycle; LDS.128 as much."""
    assert compile_gate._shared_cycles({"LDSM.16.M88.4": 2, "LDS.128": 1, "STS": 3, "STS.64": 1, "HMMA": 9}) == 17


def test_products_and_operands_of_hgmma() -> None:
    """64 x 32 x 16 products of fp16 take 16 cycles of a warpgroup's four warps. 1 KB of its second operand takes 8 of
    shared memory, 2 KB of a first one that is there 16 more."""
    both = "HGMMA.64x32x16.F32 R24, gdesc[UR4], R24, gsb0"
    one = "HGMMA.64x32x16.F32 R24, R4, gdesc[UR8], R24"
    assert compile_gate._hgmma([both, "LDS R1, [R2]", one]) == ((24 + 8) / 4, 2 * 16 / 4)


@pytest.mark.parametrize("has_low", [False, True])
def test_the_cost_model_counts_what_the_gate_allows(has_low: bool) -> None:
    for m, kinds in cost.FFT_CYCLES.items():
        counted = COUNTED[m, 768, 768][has_low]
        cycles = (transforms.SKETCH[m].residues * x for x in counted[:3])
        assert tuple(kinds[has_low]) == pytest.approx(tuple(cycles), abs=1), m

"""Compile the shipped kernels for GPUs that need not be there, and read from the machine code what they cost.

``python tests/kernels/compile_gate.py`` prints the table of docs/kernels.md and fails where a case needs more than was
declared with it; ``... compile_gate.py vector matrix`` does so for the cases with these words in their names. Triton
caches what it compiled (by source and options), so only a change costs time again.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

Target = tuple[str, int | str]
SM80, SM86, SM90, SM100 = ("cuda", 80), ("cuda", 86), ("cuda", 90), ("cuda", 100)
GFX942 = ("hip", "gfx942")
SHARED_LIMIT: dict[Target, int] = {SM80: 163, SM86: 99, SM90: 227, SM100: 227, GFX942: 64}
"""KB of shared memory that one program can use."""


class Case(NamedTuple):
    """One kernel x configuration x target, and what it may need."""

    name: str
    target: Target
    module: str
    kernel: str
    constants: dict[str, Any]
    dtypes: dict[str, str]
    num_warps: int
    num_stages: int
    matrix: tuple[str, ...] = ()
    """Matrix instructions of which at least one kind must be there."""
    stack: int = 0
    """Bytes of stack per thread that are allowed; above 0 only where measured and small beside the loop."""
    unit: bool = False
    """All sizes and strides are 1: the launcher then passes them as constants, which is another program to compile."""


class Cost(NamedTuple):
    """What the machine code of a case needs. Instruction counts are static, over the whole kernel."""

    case: Case
    registers: int
    stack: int
    shared: int
    spills: int
    matrix: dict[str, int]
    instructions: int
    loop: int
    """Instructions from the target of the longest backward branch to the branch."""
    error: str = ""


EPILOGUE_STACK = 32
"""Of ``direct``: a few values around the epilogue, none of them in the token loop."""

ANY_MATRIX = ("HGMMA", "HMMA", "UTCHMMA", "MFMA")
"""Small transforms need not fill a warpgroup's tile: either kind will do."""

FFT_STACK = {(SM80, 2048): 16, (SM90, 2048): 16, (SM90, 4096): 32, (SM90, 8192): 128,
             (SM100, 2048): 48, (SM86, 2048): 16, (SM86, 4096): 80}  # fmt: skip
"""With three tf32 products, as seen with Triton 3.7.1: a few spilled values in a loop of more than a thousand
instructions."""


def _fft_cases(
    target: Target, sizes: tuple[int, ...], unrolls: tuple[int, ...], configs: str,
    precisions: tuple[str, ...] = ("tf32", "tf32x3"),
) -> list[Case]:  # fmt: skip
    from sdi_kernels.triton import fft

    cases = []
    for m in sizes:
        config = getattr(fft, configs)[m]
        for precision in precisions:
            shape = {"N1": config.n1, "N2": config.n2, "R": config.residues, "PRECISION": precision}
            warps, label = config.num_warps, f"fft m={m} {precision}"
            for unroll in unrolls:
                constants = {
                    **shape, "BLOCK_T": config.tokens, "UNROLL_IN": unroll, "UNROLL_OUT": unroll, "IS_WIDE": False,
                    "PREFETCH": config.prefetch, "stride_ad": 1, "stride_gd": 1,
                }  # fmt: skip
                name = label + (f" {unroll} sources" if unroll > 1 else "")
                stack = FFT_STACK.get((target, m), 0) if precision == "tf32x3" else 0
                cases.append(Case(name, target, "fft", "fft_sketch_kernel", constants, {}, warps, 1, ANY_MATRIX, stack))
            constants = {**shape, "stride_om": 1}
            stack = 16  # runs once per row, not per token
            cases.append(
                Case(f"{label} finish", target, "fft", "fft_finish_kernel", constants, {}, warps, 1, ANY_MATRIX, stack)
            )
    return cases


def _tuned(kernel: str, kinds: tuple[str, ...], all_candidates: bool) -> list[tuple[str, str, Any]]:
    """(name, kind, tile) of what ships for a kernel, or of everything that tuning may choose."""
    from sdi_kernels.triton import configs

    found = []
    for key, candidates in configs.CANDIDATES.items():
        kind = key.rpartition(" ")[2]
        if key.split()[0] == kernel and kind in kinds:
            for number, config in enumerate(candidates if all_candidates else candidates[:1]):
                found.append((key + (f" tile {number + 1}" if number else ""), kind, config))
    return found


def _half(kind: str, *pointers: str) -> dict[str, str]:
    return dict.fromkeys(pointers, "bf16") if kind == "half" else {}


def _direct_cases(
    target: Target, kinds: tuple[str, ...], scales: tuple[bool, ...] = (False, True), all_candidates: bool = False
) -> list[Case]:
    cases = []
    for name, kind, config in _tuned("direct", kinds, all_candidates):
        for scaled in scales if "tile" not in name else (False,):
            constants = {
                "BLOCK_O": config.block_out, "BLOCK_I": config.block_in, "BLOCK_T": config.block_tokens,
                "HAS_SCALE": scaled, "IS_HALF": kind == "half", "IS_WIDE": False,
                "PRECISION": "tf32" if kind == "half" else kind,
                "stride_om": 1, "stride_ad": 1, "stride_gd": 1, "stride_pi": 1,
            }  # fmt: skip
            cases.append(
                Case(name + (" scaled" if scaled else ""), target, "direct", "direct_sketch_kernel", constants,
                     _half(kind, "p_a", "p_g"), config.num_warps, config.num_stages, _wanted(target), EPILOGUE_STACK)
            )  # fmt: skip
    return cases


def _shear_cases(
    target: Target, kinds: tuple[str, ...], sizes: tuple[int, ...] = (2048,), all_candidates: bool = False
) -> list[Case]:
    cases = []
    for name, kind, config in _tuned("shear", kinds, all_candidates):
        for m in sizes if "tile" not in name else sizes[:1]:
            constants = {
                "BLOCKS": config.blocks, "COLUMNS": config.columns, "BLOCK_T": config.tokens, "GROUPS": m // 16,
                "R": 16, "IS_HALF": kind == "half", "IS_WIDE": False, "PRECISION": "tf32" if kind == "half" else kind,
                "stride_om": 1, "stride_ad": 1, "stride_gd": 1, "width": 1,
            }  # fmt: skip
            cases.append(
                Case(f"{name} m={m}", target, "shear", "shear_sketch_kernel", constants, _half(kind, "p_a", "p_g"),
                     config.num_warps, config.num_stages, _wanted(target), EPILOGUE_STACK)
            )  # fmt: skip
    return cases


def _pairwise_cases(target: Target, kinds: tuple[str, ...], all_candidates: bool = False) -> list[Case]:
    cases = []
    for name, kind, config in _tuned("pairwise", kinds, all_candidates):
        constants = {
            "BLOCK_X": config.block_train, "BLOCK_Y": config.block_query, "BLOCK_D": config.block_d,
            "IS_HALF": kind == "half", "PRECISION": "tf32" if kind == "half" else kind,
            "stride_ad": 1, "stride_gd": 1, "stride_qad": 1, "stride_qgd": 1,
        }  # fmt: skip
        dtypes = _half(kind, "p_a", "p_g", "p_qa", "p_qg")
        cases.append(
            Case(name, target, "pairwise", "pairwise_kernel", constants, dtypes, config.num_warps, config.num_stages,
                 _wanted(target))
        )  # fmt: skip
    return cases


def _vector_cases(target: Target) -> list[Case]:
    from sdi_kernels.triton import vector

    cases = []
    for name, given in (("vector", False), ("scaled vector", True)):
        flags = {"HAS_FACTORS": given, "HAS_CENTER": given, "HAS_SCALE": given}
        shared = {"BLOCK_T": vector.BLOCK_T, **flags, "stride_om": 1, "stride_gd": 1, "stride_xd": 1}
        scatter = {**shared, "BLOCK_D": vector.BLOCK_D, "IS_ATOMIC": True}
        gather = {**shared, "BLOCK_M": vector.BLOCK_D}
        cases += [
            Case(f"{name} scatter", target, "vector", "vector_scatter_kernel", scatter, {}, vector.NUM_WARPS, 3),
            Case(f"{name} gather", target, "vector", "vector_gather_kernel", gather, {}, vector.NUM_WARPS, 3),
        ]
    return cases


def _matrix_cases(target: Target) -> list[Case]:
    from sdi_kernels.triton import matrix

    cases = []
    for scaled in (False, True):
        shared = {"HAS_SCALE": scaled, "stride_om": 1, "stride_xi": 1, "stride_pi": 1}
        gather = {**shared, "BLOCK_O": matrix.BLOCK_O, "BLOCK_M": matrix.BLOCK_M, "IS_ATOMIC": False}
        scatter = {**shared, "TILE_O": matrix.TILE_O, "TILE_I": matrix.TILE_I}
        word = " scaled" if scaled else ""
        # Two registers' worth with 168 of 255 in use: ptxas's choice, not a lack of them.
        stack = 8 if scaled and target == SM80 else 0
        cases += [
            Case(f"matrix gather{word}", target, "matrix", "matrix_gather_kernel", gather, {}, matrix.NUM_WARPS, 3,
                 stack=stack),
            Case(f"matrix scatter{word}", target, "matrix", "matrix_scatter_kernel", scatter, {}, matrix.NUM_WARPS, 3),
        ]  # fmt: skip
    return cases


def _other_cases(target: Target) -> list[Case]:
    from sdi_kernels.triton import embedding

    embed = {
        "BLOCK_T": embedding.BLOCK_T, "BLOCK_M": embedding.BLOCK_M, "IS_ATOMIC": False, "stride_it": 1, "stride_om": 1,
        "stride_gd": 1,
    }  # fmt: skip
    return [
        *_vector_cases(target),
        *_matrix_cases(target),
        Case("embedding", target, "embedding", "embedding_sketch_kernel", embed, {}, embedding.NUM_WARPS, 3),
    ]


def _wanted(target: Target) -> tuple[str, ...]:
    return {SM90: ("HGMMA",), SM100: ("UTCHMMA",), GFX942: ("MFMA",)}.get(target, ("HMMA",))


def cases() -> list[Case]:
    """Every kernel x configuration for sm_90; every kernel at its main configurations for the other targets."""
    kinds, half = ("half", "tf32", "tf32x3"), ("half",)
    found = _fft_cases(SM90, (256, 512, 1024, 2048, 4096, 8192), (1,), "CONFIGS")
    found += [c for c in _fft_cases(SM90, (2048,), (4,), "CONFIGS") if "finish" not in c.name]
    found += _direct_cases(SM90, kinds, all_candidates=True) + _shear_cases(SM90, kinds, (2048, 8192), True)
    found += _pairwise_cases(SM90, kinds, True) + _other_cases(SM90)
    found += _fft_cases(SM80, (512, 2048), (1,), "CONFIGS")
    found += _direct_cases(SM80, kinds, (False,)) + _shear_cases(SM80, kinds) + _pairwise_cases(SM80, kinds)
    found += _other_cases(SM80)
    found += _fft_cases(SM86, (2048, 4096), (1,), "COMPACT_CONFIGS")
    found += _fft_cases(SM100, (2048,), (1,), "CONFIGS")
    found += _direct_cases(SM100, half, (False,))[:1] + _shear_cases(SM100, half) + _pairwise_cases(SM100, half)
    found += _other_cases(SM100)
    found += _fft_cases(GFX942, (512,), (1,), "COMPACT_CONFIGS", ("ieee",))
    found += _direct_cases(GFX942, half, (False,))[:1] + _shear_cases(GFX942, half) + _pairwise_cases(GFX942, half)
    found += _other_cases(GFX942)
    first: dict[str, Case] = {}
    for case in found:
        if case.target == SM90:
            first.setdefault(case.kernel, case)
    found += [c._replace(name=f"{c.name}, sizes 1", unit=True, matrix=(), stack=64) for c in first.values()]
    return found


PLAIN = ("tokens", "tokens_per_split", "lines_per_split", "width_in", "width_out", "splits", "query_tokens",
         "queries_per_split")  # fmt: skip
"""Arguments that the kernels ask the launcher not to specialize on."""


def _constants(case: Case, names: list[str]) -> dict[str, Any]:
    unit = {n: 1 for n in names if not n.startswith("p_") and n not in PLAIN} if case.unit else {}
    return {**unit, **case.constants}


def _signature(case: Case, names: list[str]) -> tuple[dict[str, str], dict[tuple[int, ...], list[list[Any]]]]:
    types = {"p_table_in": "i32", "p_table_out": "i32", "p_table": "i32", "p_bucket": "i32", "p_h_out": "i32",
             "p_h_in": "i32", "p_sign": "i8", "p_s_out": "i8", "p_s_in": "i8", "p_ids": "i64",
             **case.dtypes}  # fmt: skip
    signature: dict[str, str] = {}
    aligned: dict[tuple[int, ...], list[list[Any]]] = {}
    for position, name in enumerate(names):
        if name in _constants(case, names):
            signature[name] = "constexpr"
            continue
        signature[name] = "*" + types.get(name, "fp32") if name.startswith("p_") else "i32"
        if name not in PLAIN:
            aligned[(position,)] = [["tt.divisibility", 16]]  # as the launcher finds it for usual sizes
    return signature, aligned


def _tool(name: str) -> str:
    import triton

    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def measure(case: Case) -> Cost:
    """Compile ``case`` and read registers, stack, shared memory and instructions from its machine code."""
    import importlib

    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(importlib.import_module(f"sdi_kernels.triton.{case.module}"), case.kernel)
    signature, aligned = _signature(case, kernel.arg_names)
    backend, arch = case.target
    stages = case.num_stages if backend == "cuda" else min(2, case.num_stages)  # what AMD's launcher takes by default
    source = ASTSource(fn=kernel, signature=signature, constexprs=_constants(case, kernel.arg_names), attrs=aligned)
    target = GPUTarget(backend, arch, 64 if backend == "hip" else 32)
    try:
        compiled = triton.compile(source, target=target, options={"num_warps": case.num_warps, "num_stages": stages})
    except Exception as error:  # reported with the case's name
        return Cost(case, 0, 0, 0, 0, {}, 0, 0, f"{type(error).__name__}: {str(error)[-300:]}")
    if backend == "hip":
        text = compiled.asm["amdgcn"]
        used = {
            k: int(v)
            for k, v in re.findall(r"\.(vgpr_count|vgpr_spill_count|private_segment_fixed_size): +(\d+)", text)
        }
        return Cost(
            case, used["vgpr_count"], used["private_segment_fixed_size"], compiled.metadata.shared,
            used["vgpr_spill_count"], {"MFMA": n} if (n := text.count("v_mfma")) else {}, 0, 0,
        )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        run = [_tool("cuobjdump"), "--dump-resource-usage", str(cubin)]
        usage = dict(
            re.findall(r"(REG|STACK):(\d+)", subprocess.run(run, capture_output=True, text=True, check=True).stdout)
        )
        run = [_tool("cuobjdump"), "-sass", str(cubin)]
        sass = subprocess.run(run, capture_output=True, text=True, check=True).stdout
    lines = [(int(a, 16), text) for a, text in re.findall(r"/\*([0-9a-f]{4,})\*/ +(\S.*?);", sass)]
    opcodes = [re.sub(r"^@!?\w+ +", "", text).split()[0].split(".")[0] for _, text in lines]
    count = Counter(opcodes)
    # The loop: everything between the longest backward branch and where it goes.
    loop = (0, 0)
    for address, text in lines:
        jump = re.search(r"\bBRA\b.*?(0x[0-9a-f]+)", text)
        if jump and address - int(jump[1], 16) > loop[1] - loop[0]:
            loop = (int(jump[1], 16), address)
    matrix = {name: n for name, n in count.items() if name.endswith("MMA")}
    return Cost(
        case, int(usage["REG"]), int(usage["STACK"]), compiled.metadata.shared, count["LDL"] + count["STL"], matrix,
        len(lines), sum(loop[0] <= address <= loop[1] for address, _ in lines),
    )  # fmt: skip


def measure_all(chosen: list[Case]) -> list[Cost]:
    """Measure in worker processes (compiling holds the interpreter's lock)."""
    with ProcessPoolExecutor(min(8, os.cpu_count() or 1), mp_context=get_context("spawn")) as pool:
        return list(pool.map(measure, chosen))


def table(costs: list[Cost]) -> str:
    """Markdown table."""
    rows = [
        "| kernel and configuration | target | warps | registers | stack B | shared KB | matrix ops | loop / all |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for cost in costs:
        case = cost.case
        arch = f"sm_{case.target[1]}" if case.target[0] == "cuda" else case.target[1]
        matrix = " ".join(f"{n} {name}" for name, n in cost.matrix.items()) or "–"
        rows.append(
            f"| {case.name} | {arch} | {case.num_warps} | {cost.registers} | {cost.stack} | {cost.shared / 1024:.0f} "
            f"| {matrix} | {cost.loop} / {cost.instructions} |" + (f" {cost.error}" if cost.error else "")
        )
    return "\n".join(rows)


def problems(cost: Cost) -> list[str]:
    """What is wrong with a case, in words."""
    case = cost.case
    name = f"{case.name} for {case.target[1]}"
    if cost.error:
        return [f"{name}: does not compile: {cost.error}"]
    found = []
    if cost.stack > case.stack:
        found.append(f"{name}: {cost.stack} bytes of stack, {case.stack} allowed: it spills registers")
    if cost.shared > SHARED_LIMIT[case.target] << 10:
        found.append(f"{name}: {cost.shared} bytes of shared memory, {SHARED_LIMIT[case.target]} KB are there")
    if case.matrix and not any(cost.matrix.get(kind) for kind in case.matrix):
        found.append(f"{name}: none of {', '.join(case.matrix)} in the machine code, found {cost.matrix}")
    return found


def main(names: list[str]) -> int:
    """All cases, or those with one of ``names`` in their own."""
    chosen = cases()
    costs = measure_all([case for case in chosen if not names or any(name in case.name for name in names)])
    found = [line for cost in costs for line in problems(cost)]
    sys.stdout.write("\n".join([table(costs), *found]) + "\n")
    return 1 if found else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

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
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

from gate_cases import SHARED_LIMIT, Case, cases, is_main


class Cost(NamedTuple):
    """What the machine code of a case needs. Instruction counts are static, over the whole kernel."""

    case: Case
    registers: int = 0
    stack: int = 0
    shared: int = 0
    spills: int = 0
    matrix: Mapping[str, int] = {}
    instructions: int = 0
    loop: int = 0
    """Instructions from the target of the longest backward branch to the branch."""
    local: int = 0
    """Local loads and stores among them."""
    shared_cycles: float = 0.0
    """Cycles of a multiprocessor's shared memory a token, at 128 bytes each and without conflicts; what HGMMA reads
    there included."""
    tensor_cycles: float = 0.0
    """Cycles of its tensor cores a token, of HGMMA alone."""
    single_loads: int = 0
    """Loads of one 16-bit number in the loop, from global memory."""
    wide_loads: int = 0
    """Loads of 128 bits in the loop, from global memory."""
    atomics: tuple[str, ...] = ()
    """Problems of the atomics, in words."""
    error: str = ""


PLAIN = ("rows", "tokens", "tokens_per_split", "lines_per_split", "passes_in", "passes_out", "table_step", "splits",
         "parts", "i_begin", "query_tokens", "queries_per_split")  # fmt: skip
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
        return Cost(case, error=f"{type(error).__name__}: {str(error)[-300:]}")
    found = Cost(case, shared=compiled.metadata.shared, atomics=_atomics(compiled.asm))
    return _amd(found, compiled.asm["amdgcn"]) if backend == "hip" else _nvidia(found, compiled.asm["cubin"])


def _amd(found: Cost, text: str) -> Cost:
    pattern = r"\.(vgpr_count|vgpr_spill_count|private_segment_fixed_size): +(\d+)"
    used = {name: int(value) for name, value in re.findall(pattern, text)}
    return found._replace(
        registers=used["vgpr_count"], stack=used["private_segment_fixed_size"], spills=used["vgpr_spill_count"],
        matrix={"MFMA": n} if (n := text.count("v_mfma")) else {},
    )  # fmt: skip


def _nvidia(found: Cost, binary: bytes) -> Cost:
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(binary)
        usage, sass = (
            subprocess.run([_tool("cuobjdump"), option, str(cubin)], capture_output=True, text=True, check=True).stdout
            for option in ("--dump-resource-usage", "-sass")
        )
    used = {name: int(value) for name, value in re.findall(r"(REG|STACK):(\d+)", usage)}
    lines = [(int(a, 16), text) for a, text in re.findall(r"/\*([0-9a-f]{4,})\*/ +(\S.*?);", sass)]
    # The loop: everything between the longest backward branch and where it goes.
    first, last = 0, -1
    for address, text in lines:
        jump = re.search(r"\bBRA\b.*?(0x[0-9a-f]+)", text)
        if jump and address - int(jump[1], 16) > last - first:
            first, last = int(jump[1], 16), address
    opcodes = [(address, re.sub(r"^@!?\w+ +", "", text).split()[0]) for address, text in lines]
    count = Counter(opcode.split(".")[0] for _, opcode in opcodes)
    loop = Counter(opcode for address, opcode in opcodes if first <= address <= last)
    operands, products = _hgmma([text for address, text in lines if first <= address <= last])
    return found._replace(
        registers=used["REG"], stack=used["STACK"], spills=count["LDL"] + count["STL"],
        matrix={name: n for name, n in count.items() if name.endswith("MMA")},
        single_loads=sum(n for opcode, n in loop.items() if opcode.startswith("LDG") and "U16" in opcode),
        instructions=len(lines), loop=loop.total(),
        local=sum(n for opcode, n in loop.items() if opcode.split(".")[0] in ("LDL", "STL")),
        wide_loads=sum(n for opcode, n in loop.items() if opcode.startswith("LDG") and "128" in opcode.split(".")),
        shared_cycles=(_shared_cycles(loop) + operands) * found.case.num_warps / found.case.tokens,
        tensor_cycles=products * found.case.num_warps / found.case.tokens,
    )  # fmt: skip


def _hgmma(code: list[str]) -> tuple[float, float]:
    """Cycles of shared memory and of tensor cores for the HGMMA of a loop, a warp's share of its warpgroup's.

    One of 64 x N x K multiplies 64 x N x 32 bytes at 4096 products of bytes a cycle. It reads its second operand, and a
    first one that is no register, from shared memory.
    """
    operands = products = 0.0
    for text in code:
        if found := re.search(r"HGMMA\.64x(\d+)x\d+\.\S+ R\w+, (\w+)", text):
            columns = int(found[1])
            operands += (columns + (64 if found[2] == "gdesc" else 0)) * 32 / 128 / 4
            products += columns / 2 / 4
    return operands, products


def _shared_cycles(loop: Mapping[str, int]) -> int:
    """Cycles that shared memory is busy for one warp's pass of a loop."""
    total = 0
    for opcode, count in loop.items():
        name, *flags = opcode.split(".")
        if name in ("LDSM", "STSM"):
            total += count * (4 if "4" in flags else 2 if "2" in flags else 1)
        elif name in ("LDS", "STS"):
            total += count * (4 if "128" in flags else 2 if "64" in flags else 1)
    return total


def _atomics(asm: Mapping[str, str]) -> tuple[str, ...]:
    """What is wrong with a kernel's atomics: tiles whose lanes go down the rows, and several adds in one.

    A hint of contiguity decides how lanes lie. It must never make one add of several, which would need it to be true.
    """
    found = []
    layouts = dict(re.findall(r"^(#\w+) = (.*)$", asm["ttgir"], re.MULTILINE))
    for line in asm["ttgir"].splitlines():
        if "tt.atomic_rmw" not in line:
            continue
        for name in set(re.findall(r"x!tt\.ptr<f32>, (#\w+)>", line)):
            threads = re.search(r"threadsPerWarp = \[(\d+), (\d+)\]", layouts[name])
            if threads and int(threads[1]) > 1:
                found.append(f"lanes of an atomic go down the rows: {layouts[name]}")
    if wide := re.search(r"\b(?:atom|red)\.[\w.]*global[\w.]*\.(?:v[248]|b?f16x2)\b[\w.]*", asm.get("ptx", "")):
        found.append(f"one atomic adds several values: {wide[0]}")
    return tuple(found)


def measure_all(chosen: list[Case]) -> list[Cost]:
    """Measure in worker processes (compiling holds the interpreter's lock)."""
    with ProcessPoolExecutor(min(8, os.cpu_count() or 1), mp_context=get_context("spawn")) as pool:
        return list(pool.map(measure, chosen))


def issue_cycles(cost: Cost) -> float:
    """Cycles of a multiprocessor to issue the loop's instructions for a token: four schedulers, one each."""
    return cost.loop * cost.case.num_warps / 4 / cost.case.tokens


def cycles(cost: Cost) -> str:
    """Issue, shared memory and tensor cores of a case whose loop is over tokens."""
    if cost.case.shared_cycles is None:
        return "–"
    return f"{issue_cycles(cost):.0f}, {cost.shared_cycles:.0f}, {cost.tensor_cycles:.0f}"


def table(costs: list[Cost]) -> str:
    """Markdown table."""
    rows = [
        "| kernel | target | warps | registers | stack B (loop) | shared KB | matrix ops | loop / all | cycles |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for cost in costs:
        case = cost.case
        arch = f"sm_{case.target[1]}" if case.target[0] == "cuda" else case.target[1]
        matrix = " ".join(f"{n} {name}" for name, n in cost.matrix.items()) or "–"
        rows.append(
            f"| {case.name} | {arch} | {case.num_warps} | {cost.registers} | {cost.stack} ({cost.local}) "
            f"| {cost.shared / 1024:.0f} | {matrix} | {cost.loop} / {cost.instructions} "
            f"| {cycles(cost)} |" + (f" {cost.error}" if cost.error else "")
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
    if cost.local > case.local:
        found.append(f"{name}: {cost.local} local loads and stores in the loop, {case.local} allowed")
    if case.shared_cycles is not None and cost.shared_cycles > case.shared_cycles:
        found.append(f"{name}: {cost.shared_cycles:.0f} cycles of shared memory a token, {case.shared_cycles} allowed")
    if case.issue_cycles is not None and issue_cycles(cost) > case.issue_cycles:
        found.append(f"{name}: {issue_cycles(cost):.0f} cycles a token to issue, {case.issue_cycles} allowed")
    if cost.single_loads < case.single_loads:
        found.append(f"{name}: {cost.single_loads} loads of 16 bits in the loop, {case.single_loads} wanted")
    if cost.wide_loads < case.wide_loads:
        found.append(f"{name}: {cost.wide_loads} loads of 128 bits in the loop, {case.wide_loads} wanted")
    found += [f"{name}: {problem}" for problem in cost.atomics]
    if case.matrix and not any(cost.matrix.get(kind) for kind in case.matrix):
        found.append(f"{name}: none of {', '.join(case.matrix)} in the machine code, found {cost.matrix}")
    return found


def main(arguments: list[str]) -> int:
    """All cases, or those with one of the given words in their name; of these, with ``--brief``, what a GPU of today
    runs most."""
    names = [a for a in arguments if a != "--brief"]
    chosen = [case for case in cases() if not names or any(name in case.name for name in names)]
    costs = measure_all([case for case in chosen if is_main(case)] if "--brief" in arguments else chosen)
    found = [line for cost in costs for line in problems(cost)]
    sys.stdout.write("\n".join([table(costs), *found]) + "\n")
    return 1 if found else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

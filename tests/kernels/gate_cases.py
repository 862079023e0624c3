"""Which kernels the compile gate (compile_gate.py) compiles, for which GPUs, and what each may need.

Needs nothing but the configurations; kernels are imported where a case is measured.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, NamedTuple

sys.path.append(str(Path(__file__).resolve().parents[2]))  # the gate runs as a script, too

from bench.gpu.counted import COUNTED, Counted

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
    local: int = 0
    """Local loads and stores (spilled registers) that are allowed in the longest loop."""
    tokens: int = 1
    """Tokens that one pass of the loop works off."""
    shared_cycles: float | None = None
    """Cycles of shared memory a token that are allowed, where they are counted."""
    issue_cycles: float | None = None
    """Cycles a token to issue the loop's instructions that are allowed, where they are counted."""
    single_loads: int = 0
    """Loads of one 16-bit number that have to be in the loop: gathers, whose hint of contiguity need not be true."""
    wide_loads: int = 0
    """Loads of 128 bits that have to be in the loop."""
    unit: bool = False
    """All sizes and strides are 1: the launcher then passes them as constants, which is another program to compile."""


EPILOGUE_STACK = 32
"""Of ``direct``: a few values around the epilogue, none of them in the token loop."""

FFT_SPILLS: dict[tuple[Target, str], tuple[int, int]] = {
    (SM80, "fft m=512 half"): (88, 21), (SM80, "fft m=512 fp32"): (432, 144), (SM80, "fft m=2048 fp32"): (16, 4),
    (SM80, "fft m=512 finish"): (72, 0), (SM80, "fft m=2048 finish"): (112, 0),
    (SM86, "fft m=2048 fp32"): (16, 3), (SM86, "fft m=4096 fp32"): (80, 30),
    (SM86, "fft m=4096 half layer 4096x11008"): (264, 128), (SM86, "fft m=4096 fp32 layer 4096x11008"): (304, 122),
    (SM86, "fft m=1024 finish"): (128, 0), (SM86, "fft m=2048 finish"): (128, 0), (SM86, "fft m=4096 finish"): (16, 7),
    (SM100, "fft m=2048 fp32"): (32, 5),
    (SM90, "fft m=4096 half layer 2048x4096 iid"): (192, 81), (SM90, "fft m=8192 half layer 2048x4096 iid"): (152, 54),
    (SM90, "fft m=2048 fp32 layer 2048x4096 iid"): (48, 6), (SM90, "fft m=4096 fp32 layer 2048x4096 iid"): (352, 112),
    (SM90, "fft m=8192 fp32 layer 2048x4096 iid"): (280, 85), (SM90, "fft m=2048 fp32 layer of 4 passes"): (128, 39),
}  # fmt: skip
"""(Bytes of stack, local loads and stores in the loop) of cases that are not counted, by target and name: the most of
both versions. All others need none."""


def _fft_case(
    target: Target, m: int, has_low: bool, layouts: tuple[Any, Any], name: str = "", counted: Counted | None = None
) -> Case:
    """``layouts``: of the sides "in" and "out"."""
    from sdi_kernels.triton import slots, transforms

    config = transforms.config_of(m, has_low, SHARED_LIMIT[target] << 10)
    size = 4 if has_low else 2
    constants = {
        "N1": config.rows, "N2": config.n2, "R": config.residues, "BLOCK_T": config.tokens, "HAS_LOW": has_low,
        **slots.constants_of(layouts, size, config), "IS_WIDE": False, "stride_ad": 1, "stride_gd": 1, **ONE_PAIR,
    }  # fmt: skip
    name = f"fft m={m} {'fp32' if has_low else 'half'}{name}"
    stack, local = FFT_SPILLS.get((target, name), (0, 0))
    is_single = counted and config.tokens > 1 and not has_low
    single = 2 * config.rows * config.n2 * config.tokens // (32 * config.num_warps) if is_single else 0
    return Case(
        name, target, "fft", "fft_sketch_kernel", constants, {} if has_low else _half("half", "p_a", "p_g"),
        config.num_warps, 1, _wanted(target), counted.stack if counted else stack, counted.local if counted else local,
        config.tokens, counted and counted.shared, counted and counted.issue, single,
        counted.wide if counted else 0,
    )  # fmt: skip


def _layouts(
    target: Target, m: int, d_out: int, d_in: int, has_low: bool, hashing: Any = "balanced"
) -> tuple[Any, Any]:
    import numpy as np

    from sdi_kernels import TensorSketch
    from sdi_kernels.triton import slots, transforms

    config = transforms.config_of(m, has_low, SHARED_LIMIT[target] << 10)
    sketch = TensorSketch(d_out, d_in, m, hashing=hashing)
    layout_in, layout_out = (
        slots.layout_of(side.bucket.astype(np.int64), side.d, 4 if has_low else 2, config)
        for side in (sketch.inp, sketch.out)
    )
    return layout_in, layout_out


def _fft_layers(target: Target, sizes: tuple[int, ...]) -> list[Case]:
    """Every sketch size at 768 x 768; on sm_90 whatever was counted, and where shared memory is short wide rows."""
    cases = []
    for (m, d_out, d_in), counts in COUNTED.items():
        is_wide = target == SM86 and (m, d_out, d_in) == (4096, 4096, 11008)
        if m in sizes and (target == SM90 or (d_out, d_in) == (768, 768) or is_wide):
            for has_low in (False, True):
                name = "" if (d_out, d_in) == (768, 768) else f" layer {d_out}x{d_in}"
                counted = counts[has_low] if target == SM90 else None
                cases.append(_fft_case(target, m, has_low, _layouts(target, m, d_out, d_in, has_low), name, counted))
    return cases


def _fft_variants() -> list[Case]:
    """Buckets with several sources that are gathered from memory, independent hashing, rows in several passes."""
    from sdi_kernels.triton.slots import Layout

    cases = []
    for has_low in (False, True):
        for m in (256, 512):
            many = Layout(0, 0, 1, 2)
            cases.append(_fft_case(SM90, m, has_low, (many, many), " 2 sources"))
        cases += [
            _fft_case(SM90, m, has_low, _layouts(SM90, m, 2048, 4096, has_low, "iid"), " layer 2048x4096 iid")
            for m in (1024, 2048, 4096, 8192)
        ]
        long = Layout(8192, 2, 1, 4)
        cases.append(_fft_case(SM90, 2048, has_low, (long, long), " layer of 4 passes"))
    return cases


def _finish_cases(target: Target, sizes: tuple[int, ...]) -> list[Case]:
    from sdi_kernels.triton import inverse, transforms

    cases = []
    for m in sizes:
        config = transforms.FINISH[m]
        constants = {
            "N1": config.rows, "N2": config.n2, "R": config.residues, "COLS": transforms.COLUMNS,
            "AHEAD": inverse.AHEAD, "stride_om": 1, "IS_LIST": False,
        }  # fmt: skip
        cases.append(
            Case(f"fft m={m} finish", target, "inverse", "fft_finish_kernel", constants, {}, config.num_warps, 1,
                 _wanted(target), *FFT_SPILLS.get((target, f"fft m={m} finish"), (0, 0)))
        )  # fmt: skip
    return cases


def _fft_cases(target: Target, sizes: tuple[int, ...]) -> list[Case]:
    return _fft_layers(target, sizes) + _finish_cases(target, sizes)


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


LIST_STACK, LIST_LOCAL = 16, 2

ONE_PAIR = {"IS_LIST": False, "IS_ALIGNED": False}


def _lists(found: list[Case]) -> list[Case]:
    """Cases of the linear kernels as they read lists of pairs, with rows that allow wide loads. What ``fft`` reads of
    the table may take a register or two, and a few instructions."""
    return [
        case._replace(
            stack=case.stack + LIST_STACK * (case.kernel == "fft_sketch_kernel"),
            local=case.local + LIST_LOCAL * (case.kernel == "fft_sketch_kernel"),
            issue_cycles=case.issue_cycles and 1.01 * case.issue_cycles,
            name=f"{case.name}, list", dtypes={**case.dtypes, "p_table": "i64"},
            constants={**case.constants, **{name: True for name in ONE_PAIR if name in case.constants}},
        )
        for case in found
    ]  # fmt: skip


def _wide_loads(config: Any, kind: str) -> int:
    """Of ``direct``: a thread's share of a block of both sides. Of fp32, the side that a product takes transposed is
    loaded number by number."""
    size = 2 if kind == "half" else 4
    features = config.block_in + (config.block_out if kind == "half" else 0)
    return config.block_tokens * features * size // (16 * 32 * config.num_warps)


def _half(kind: str, *pointers: str) -> dict[str, str]:
    return dict.fromkeys(pointers, "bf16") if kind == "half" else {}


def _direct_cases(
    target: Target, kinds: tuple[str, ...], metrics: tuple[bool, ...] = (False, True), all_candidates: bool = False
) -> list[Case]:
    cases = []
    for name, kind, config in _tuned("direct", kinds, all_candidates):
        for weighted in metrics if "tile" not in name else (False,):
            constants = {
                "BLOCK_O": config.block_out, "BLOCK_I": config.block_in, "BLOCK_T": config.block_tokens,
                "HAS_METRIC": weighted, "IS_HALF": kind == "half", "IS_WIDE": False,
                "PRECISION": "tf32" if kind == "half" else kind,
                "stride_om": 1, "stride_ad": 1, "stride_gd": 1, "stride_mi": 1, **ONE_PAIR,
            }  # fmt: skip
            cases.append(
                Case(name + (" metric" if weighted else ""), target, "direct", "direct_sketch_kernel", constants,
                     _half(kind, "p_a", "p_g"), config.num_warps, config.num_stages, _wanted(target), EPILOGUE_STACK,
                     8 if target == SM100 else 0,  # there the longest loop holds more than the tokens'
                     wide_loads=_wide_loads(config, kind) if target == SM90 else 0)
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
                "stride_om": 1, "stride_ad": 1, "stride_gd": 1, "width": 1, **ONE_PAIR,
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
    for weighted in (False, True):
        shared = {"HAS_METRIC": weighted, "stride_om": 1, "stride_xi": 1, "stride_mi": 1}
        gather = {**shared, "BLOCK_O": matrix.BLOCK_O, "BLOCK_M": matrix.BLOCK_M, "IS_ATOMIC": False}
        scatter = {**shared, "TILE_O": matrix.TILE_O, "TILE_I": matrix.TILE_I}
        word = " metric" if weighted else ""
        # Two registers' worth with 168 of 255 in use: ptxas's choice, not a lack of them.
        stack, local = (16, 1) if weighted and target == SM80 else (0, 0)
        cases += [
            Case(f"matrix gather{word}", target, "matrix", "matrix_gather_kernel", gather, {}, matrix.NUM_WARPS, 3,
                 stack=stack, local=local),
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


def is_main(case: Case) -> bool:
    """For sm_90, of what ships, one pair of tensors with one source to a bucket: `make test` compiles these. All others
    are variants of them, and `make test-triton` compiles all, under both versions of Triton."""
    variants = (" sources", " layer ", " tile ", ", list", ", sizes 1", " metric")
    return case.target == SM90 and not any(word in case.name for word in variants)


def cases() -> list[Case]:
    """Every kernel x configuration for sm_90; every kernel at its main configurations for the other targets."""
    kinds, half = ("half", "tf32", "tf32x3"), ("half",)
    sizes = 256, 512, 1024, 2048, 4096, 8192
    found = _lists([case for case in _fft_cases(SM90, sizes) if " layer " not in case.name])
    found += _lists(_direct_cases(SM90, kinds) + _shear_cases(SM90, kinds))
    found += _lists(_fft_cases(SM80, (2048,)) + _direct_cases(SM80, kinds, (False,)))
    found += _fft_cases(SM90, sizes) + _fft_variants()
    found += _direct_cases(SM90, kinds, all_candidates=True) + _shear_cases(SM90, kinds, (2048, 8192), True)
    found += _pairwise_cases(SM90, kinds, True) + _other_cases(SM90)
    found += _fft_cases(SM80, (512, 2048))
    found += _direct_cases(SM80, kinds, (False,)) + _shear_cases(SM80, kinds) + _pairwise_cases(SM80, kinds)
    found += _other_cases(SM80)
    found += _fft_cases(SM86, (1024, 2048, 4096))
    found += _fft_cases(SM100, (2048,))
    found += _direct_cases(SM100, half, (False,))[:1] + _shear_cases(SM100, half) + _pairwise_cases(SM100, half)
    found += _other_cases(SM100)
    found += _fft_cases(GFX942, (512,))
    found += _direct_cases(GFX942, half, (False,))[:1] + _shear_cases(GFX942, half) + _pairwise_cases(GFX942, half)
    found += _other_cases(GFX942)
    first: dict[str, Case] = {}
    for case in found:
        if case.target == SM90 and not case.constants.get("IS_LIST"):
            first.setdefault(case.kernel, case)
    found += [
        c._replace(name=f"{c.name}, sizes 1", unit=True, matrix=(), stack=128, local=32, shared_cycles=None,
                   issue_cycles=None, wide_loads=0, single_loads=0)
        for c in first.values()
    ]  # fmt: skip
    return found

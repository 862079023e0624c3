"""What ``fft`` takes for a token, counted in the machine code for sm_90: the compile gate holds the kernels to it, and
:mod:`bench.gpu.predict` makes times of it. Where it changes: ``python tests/kernels/compile_gate.py fft``.
"""

from __future__ import annotations

from typing import NamedTuple


class Counted(NamedTuple):
    """A token of one program, the most of Triton 3.6.0 and 3.7.1.

    Attributes:
        issue, shared, tensor: cycles of a multiprocessor (:class:`sdi_kernels.triton.cost.Cycles`).
        local: local loads and stores in the loop: registers that spill.
        stack: bytes of a thread's stack.
        wide: loads of 128 bits in the loop, the fewest.
    """

    issue: float
    shared: float
    tensor: float
    local: int
    stack: int
    wide: int


COUNTED: dict[tuple[int, int, int], tuple[Counted, Counted]] = {
    (256, 768, 768): (Counted(68, 55, 48, 0, 0, 0), Counted(113, 140, 132, 0, 0, 0)),
    (512, 768, 768): (Counted(138, 109, 96, 0, 0, 0), Counted(227, 280, 264, 0, 0, 0)),
    (1024, 256, 256): (Counted(313, 284, 128, 0, 0, 0), Counted(526, 684, 360, 0, 0, 1)),
    (1024, 768, 768): (Counted(323, 320, 160, 0, 0, 1), Counted(516, 772, 456, 0, 0, 4)),
    (1024, 768, 3072): (Counted(401, 512, 160, 0, 0, 4), Counted(605, 1028, 456, 0, 0, 10)),
    (1024, 3072, 768): (Counted(393, 464, 160, 0, 0, 4), Counted(593, 964, 456, 0, 0, 10)),
    (1024, 1280, 1280): (Counted(413, 464, 160, 0, 0, 4), Counted(579, 964, 456, 0, 0, 8)),
    (1024, 2048, 2048): (Counted(413, 464, 160, 0, 0, 4), Counted(579, 964, 456, 0, 0, 8)),
    (1024, 4096, 4096): (Counted(491, 656, 160, 0, 0, 8), Counted(701, 1220, 456, 0, 0, 16)),
    (1024, 4096, 11008): (Counted(1408, 1232, 160, 18, 48, 60), Counted(1740, 1988, 456, 124, 360, 80)),
    (2048, 256, 256): (Counted(484, 436, 320, 0, 0, 0), Counted(848, 1016, 864, 0, 0, 2)),
    (2048, 768, 768): (Counted(496, 448, 320, 0, 0, 0), Counted(861, 1040, 864, 0, 0, 4)),
    (2048, 768, 3072): (Counted(623, 688, 384, 0, 0, 9), Counted(991, 1424, 1056, 0, 0, 14)),
    (2048, 3072, 768): (Counted(540, 560, 320, 0, 0, 4), Counted(935, 1200, 864, 0, 0, 10)),
    (2048, 1280, 1280): (Counted(530, 512, 384, 0, 0, 2), Counted(859, 1200, 1056, 0, 0, 8)),
    (2048, 2048, 2048): (Counted(530, 512, 384, 0, 0, 2), Counted(859, 1200, 1056, 0, 0, 8)),
    (2048, 4096, 4096): (Counted(746, 800, 384, 0, 0, 16), Counted(1136, 1584, 1056, 0, 0, 24)),
    (2048, 4096, 11008): (Counted(1618, 1376, 384, 81, 184, 60), Counted(2152, 2352, 1056, 249, 624, 80)),
    (4096, 256, 256): (Counted(582, 500, 320, 0, 0, 0), Counted(906, 1080, 864, 1, 8, 2)),
    (4096, 768, 768): (Counted(591, 512, 320, 0, 0, 0), Counted(954, 1104, 864, 0, 0, 4)),
    (4096, 768, 3072): (Counted(779, 560, 384, 0, 0, 9), Counted(1116, 1232, 1056, 0, 0, 18)),
    (4096, 3072, 768): (Counted(598, 560, 320, 0, 8, 4), Counted(964, 1200, 864, 0, 0, 10)),
    (4096, 1280, 1280): (Counted(630, 576, 384, 0, 0, 0), Counted(974, 1264, 1056, 0, 8, 8)),
    (4096, 2048, 2048): (Counted(630, 576, 384, 0, 0, 0), Counted(974, 1264, 1056, 0, 8, 8)),
    (4096, 4096, 4096): (Counted(794, 608, 384, 0, 0, 12), Counted(1150, 1328, 1056, 0, 0, 24)),
    (4096, 4096, 11008): (Counted(2265, 1760, 768, 297, 736, 60), Counted(3244, 3392, 2112, 444, 1144, 80)),
    (2048, 768, 1536): (Counted(520, 496, 384, 0, 0, 1), Counted(847, 1168, 1056, 0, 0, 6)),
    (8192, 768, 768): (Counted(1073, 688, 384, 0, 0, 17), Counted(1400, 1360, 1056, 0, 0, 22)),
}  # fmt: skip
"""By sketch size, d_out and d_in: (16-bit inputs, fp32), tables of the default family."""

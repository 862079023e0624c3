"""Operands of tensor-core products, rounded the way the hardware does not."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def operand(b_x, PRECISION: tl.constexpr):
    """fp32 ``b_x`` as an operand of a product: for one tf32 product rounded to nearest, else as it is.

    Tensor cores cut the low 13 bits of a tf32 operand off, which would make every product too small: a bias. (Of three
    tf32 products, Triton rounds the operands itself.) ``8193 x - 8192 x`` with the first product rounded leaves the
    11 bits that count, and NaN stays NaN, which adding half a unit to the bit pattern would not do.
    """
    if PRECISION == "tf32":
        b_x = tl.fma(b_x, -8192.0, b_x * 8193.0)
    return b_x

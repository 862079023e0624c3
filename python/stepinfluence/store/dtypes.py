"""In which dtypes feature rows are stored; how, :mod:`stepinfluence.store.codecs` says."""

from __future__ import annotations

from typing import Literal, TypeAlias, get_args

import numpy as np
import numpy.typing as npt

from stepinfluence.arguments import one_of, positive_int

StoreDtype: TypeAlias = Literal["fp32", "fp16", "bf16", "int8"]
STORE_DTYPES: tuple[str, ...] = get_args(StoreDtype)

NUMPY_DTYPES: dict[str, npt.DTypeLike] = {"fp32": "<f4", "fp16": "<f2", "bf16": "<u2", "int8": "i1"}
"""What :meth:`Store.raw_blocks` gives; numpy has no bfloat16, so its bits come as uint16."""

SCALED = ("fp16", "int8")
"""Dtypes with a float32 scale per row: value = code * scale."""


def bytes_per_row(width: int, dtype: StoreDtype) -> int:
    """Bytes of one row of ``width`` columns, its scale included."""
    positive_int("width", width)
    one_of("dtype", dtype, STORE_DTYPES)
    return width * np.dtype(NUMPY_DTYPES[dtype]).itemsize + (4 if dtype in SCALED else 0)

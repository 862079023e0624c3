"""Names of the hash tables that manifests hold: they are read without ``sdi_kernels``, which imports torch.

``tests/stepinfluence/store/test_hashes.py`` holds them equal to those of ``sdi_kernels.hashing``.
"""

from __future__ import annotations

from typing import Literal, TypeAlias, get_args

HashFamily: TypeAlias = Literal["balanced", "iid", "block"]
HASH_FAMILIES: tuple[str, ...] = get_args(HashFamily)
HASH_FORMAT = "sdi-hash-1"

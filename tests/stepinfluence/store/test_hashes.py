"""What manifests name is what the kernels call it."""

from __future__ import annotations

from typing import get_args

from stepinfluence.store import hashes

from sdi_kernels import hashing


def test_the_same_names_as_the_kernels() -> None:
    assert hashes.HASH_FORMAT == hashing.HASH_FORMAT
    assert hashes.HASH_FAMILIES == hashing.HASH_FAMILIES
    assert get_args(hashes.HashFamily) == get_args(hashing.HashFamily)

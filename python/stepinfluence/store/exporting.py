"""Stores as single files that other programs read: decoded to float32, written in bounded memory."""

from __future__ import annotations

import json
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Literal, TypeAlias, get_args

import numpy as np
import numpy.typing as npt

from stepinfluence.errors import StoreError
from stepinfluence.files import write_atomically
from stepinfluence.store.manifest import MANIFEST
from stepinfluence.store.reader import Store
from stepinfluence.writers import remove_leftovers

ExportFormat: TypeAlias = Literal["npz", "safetensors"]
Chunks: TypeAlias = Callable[[], Iterator[npt.NDArray[np.generic]]]
Array: TypeAlias = tuple[npt.DTypeLike, tuple[int, ...], Chunks]


def export(path: str | Path, out: str | Path, format: ExportFormat = "npz") -> Path:  # noqa: A002  # as np, torch
    """Write a complete store's content to one file.

    Arrays, for each checkpoint ``k``: ``features_k`` float32 ``(n, [steps,] D')`` and ``losses_k`` float32 ``(n,)``;
    and ``etas`` float64 ``(checkpoints,)``, ``valid`` uint8 ``(n,)``: 0 for rows without features. Ids and the
    manifest come as JSON: in ``.npz`` as the uint8 arrays ``ids_json`` and ``manifest_json``, in ``.safetensors`` as
    metadata ``ids`` and ``manifest``.

    Args:
        path: the store.
        out: the file to write.
        format: ``"npz"`` (``numpy.load``) or ``"safetensors"``.

    Returns:
        ``out`` as a path.

    Raises:
        ValueError: an unknown format.
        StoreError: the store is incomplete or damaged, or the file could not be written.
    """
    if format not in get_args(ExportFormat):
        raise ValueError(f"format: got {format!r}; use 'npz' or 'safetensors'")
    store, out = Store.open(path), Path(out)
    remove_leftovers(out.parent)
    if not store.complete:
        raise StoreError(f"{path}: incomplete: {store.missing_count} shards are missing; featurize again to resume")
    texts = {"ids": json.dumps(list(store.ids)), "manifest": (store.path / MANIFEST).read_text()}
    fill = _fill_npz if format == "npz" else _fill_safetensors
    write_atomically(out, lambda aside: fill(aside, _arrays(store), texts))
    return out


def _arrays(store: Store) -> dict[str, Array]:
    n = len(store)
    shape = (n, store.steps, store.width) if store.per_step else (n, store.width)
    etas = np.array([c.eta for c in store.checkpoints])
    arrays: dict[str, Array] = {
        "etas": ("<f8", (len(etas),), lambda: iter([etas])),
        "valid": ("u1", (n,), lambda: iter([store.valid.astype("u1")])),
    }
    for k in range(len(store.checkpoints)):
        arrays[f"features_{k}"] = ("<f4", shape, lambda k=k: (values.numpy() for _, values in store.blocks(k)))  # type: ignore[misc]
        arrays[f"losses_{k}"] = ("<f4", (n,), lambda k=k: iter([store.losses(k)]))  # type: ignore[misc]
    return arrays


def _write(file: IO[bytes], array: Array) -> None:
    dtype, _, chunks = array
    for chunk in chunks():
        file.write(np.ascontiguousarray(chunk, dtype=dtype).data)


def _fill_npz(path: Path, arrays: dict[str, Array], texts: dict[str, str]) -> None:
    for name, text in texts.items():
        data = np.frombuffer(text.encode("utf-8", "surrogatepass"), "u1")
        arrays[f"{name}_json"] = ("u1", data.shape, lambda data=data: iter([data]))  # type: ignore[misc]
    with zipfile.ZipFile(path, "w", allowZip64=True) as archive:
        for name, array in arrays.items():
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as file:
                dtype, shape, _ = array
                header = {
                    "descr": np.lib.format.dtype_to_descr(np.dtype(dtype)),
                    "fortran_order": False,
                    "shape": shape,
                }
                np.lib.format.write_array_header_2_0(file, header)
                _write(file, array)


def _fill_safetensors(path: Path, arrays: dict[str, Array], texts: dict[str, str]) -> None:
    """The format's header and data by hand: its library takes arrays that are in memory whole."""
    header: dict[str, object] = {"__metadata__": texts}
    # Widest types first, so that each array starts at a multiple of its item size.
    ordered = dict(sorted(arrays.items(), key=lambda item: -np.dtype(item[1][0]).itemsize))
    names, place = {"<f8": "F64", "<f4": "F32", "u1": "U8"}, 0
    for name, (dtype, shape, _) in ordered.items():
        size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
        header[name] = {"dtype": names[str(dtype)], "shape": shape, "data_offsets": [place, place + size]}
        place += size
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(head)) + head)
        for array in ordered.values():
            _write(file, array)

"""An approximate index of a store's rows through faiss: candidates in a fraction of a scan's time.

Rows of several checkpoints are indexed side by side, so that one inner product with the queries' features, weighted by
eta, is the influence summed over checkpoints. The index is built block by block in bounded memory, kept beside the
store with a digest of it, and refused when the store has changed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from stepinfluence.errors import StoreError
from stepinfluence.extras import needed
from stepinfluence.files import file_digest, make_folder, read_sealed, remove, sealed, write_atomically, write_bytes
from stepinfluence.progress import tqdm
from stepinfluence.search.question import Question
from stepinfluence.search.sources import Rows, RowSource, as_source
from stepinfluence.writers import unknown_files

FORMAT = "sdi-index-2"
FILE, DESCRIPTION = "rows.faiss", "index.json"
DESCRIPTION_LIMIT = 1 << 20
BLOCK_BYTES = 32 << 20
SAMPLES_PER_LIST = 40
"""Rows that the lists' centres are trained on, for each list."""


def _faiss() -> Any:
    with needed("index"):
        import faiss
    return faiss


def _decoded(source: RowSource, rows: npt.NDArray[np.int64] | None = None) -> Iterator[tuple[int, Tensor]]:
    """Blocks of rows ``(first, (r, K * D))``: summed over steps, float32, checkpoints side by side. All rows, or some
    in the order given (``first`` then counts those)."""
    width = sum(s.width for s in source.spaces)
    if rows is not None:
        for start in range(0, len(rows), size := max(1, BLOCK_BYTES // (4 * width))):
            wanted = rows[start : start + size].tolist()
            yield start, torch.cat([_summed(source.take(k, wanted)) for k in range(len(source.spaces))], 1)
        return
    for blocks in zip(*(source.blocks(k) for k in range(len(source.spaces))), strict=True):
        widest = sum(b.codes[0].numel() for b in blocks) if len(blocks[0].codes) else 1
        size = max(1, BLOCK_BYTES // (4 * widest))
        for start in range(0, len(blocks[0].codes), size):
            parts = [b.part(start, start + size) for b in blocks]
            values = [b.codes.float() if b.scales is None else b.codes.float() * b.scales.unsqueeze(-1) for b in parts]
            yield parts[0].first, torch.cat([_summed(v) for v in values], 1)


def _summed(values: Tensor) -> Tensor:
    return (values.sum(1) if values.dim() == 3 else values).to("cpu", torch.float32)


def _is_whole(file: Path, expected: Mapping[str, Any]) -> bool:
    """Whether a file has the size and the digest that it was written with."""
    return (
        file.is_file() and file.stat().st_size == expected.get("bytes") and file_digest(file) == expected.get("sha256")
    )


def default_factory(rows: int) -> str:
    """Inverted lists, about ``sqrt(rows)`` of them, of rows quantised to 8 bits a column."""
    lists = int(max(1, min(65536, rows**0.5, rows // 39)))
    return f"IVF{lists},SQ8"


class Index:
    """An approximate index of the rows of a search; made by :meth:`build` or :meth:`open`.

    Attributes:
        source: the rows.
        probes: lists that a query looks at; more find more, and take longer.
    """

    def __init__(self, source: RowSource, index: Any, *, probes: int = 32) -> None:
        self.source = source
        self._index = index
        self.probes = probes

    @classmethod
    def build(
        cls,
        train: Rows,
        path: str | Path | None = None,
        *,
        factory: str | None = None,
        probes: int = 32,
        sample: int | None = None,
        seed: int = 0,
        progress: bool = True,
    ) -> Index:
        """Index all rows that have features.

        Args:
            train: the rows, as for :func:`top_k`.
            path: a folder to keep the index in; in memory only if not given. It must be new, or an index's.
            factory: a faiss factory string; :func:`default_factory` of the number of rows if not given.
            probes: lists that a query looks at, for inverted lists.
            sample: rows to train on; 40 for every list if not given.
            seed: of the sample.

        Raises:
            ImportError: faiss is not installed.
            StoreError: a store is incomplete, or the index could not be written.
            ValueError: there is nothing to index, or the factory string is not faiss's.
        """
        faiss = _faiss()
        source = as_source("train", train)
        good = np.flatnonzero(source.valid)
        if not len(good):
            raise ValueError("train: no row has features; there is nothing to index")
        factory = factory if factory is not None else default_factory(len(good))
        width = sum(s.width for s in source.spaces)
        try:
            index = faiss.index_factory(width, factory, faiss.METRIC_INNER_PRODUCT)
        except RuntimeError as error:
            raise ValueError(f"factory: got {factory!r}, which faiss does not take; use such as 'IVF1024,SQ8'") from (
                error
            )
        index = index if hasattr(index, "nprobe") else faiss.IndexIDMap2(index)
        if not index.is_trained:
            want = sample if sample is not None else SAMPLES_PER_LIST * getattr(index, "nlist", 256)
            chosen = np.sort(np.random.default_rng(seed).choice(good, min(len(good), max(1, want)), replace=False))
            index.train(torch.cat([v for _, v in _decoded(source, chosen)]).numpy())
        with tqdm(total=len(source), desc="index", unit="row", delay=2, disable=not progress) as bar:
            for first, values in _decoded(source):
                kept = source.valid[first : first + len(values)]
                rows = np.arange(first, first + len(values), dtype=np.int64)[kept]
                index.add_with_ids(np.ascontiguousarray(values.numpy()[kept]), rows)
                bar.update(len(values))
        made = cls(source, index, probes=probes)
        if path is not None:
            made._save(Path(path), factory)
        return made

    def _save(self, path: Path, factory: str) -> None:
        faiss = _faiss()
        strange = unknown_files(path, (FILE, DESCRIPTION))
        if strange:
            raise StoreError(f"{path}: holds other files ({strange[0]}); give a new folder for the index")
        make_folder(path)
        # The description goes first and comes last: an index without one does not count.
        remove(path / DESCRIPTION)
        write_atomically(path / FILE, lambda aside: faiss.write_index(self._index, str(aside)))
        description = {
            "format": FORMAT,
            "factory": factory,
            "rows": len(self.source),
            "store": self.source.digest(),
            "file": {"bytes": (path / FILE).stat().st_size, "sha256": file_digest(path / FILE)},
        }
        write_bytes(path / DESCRIPTION, sealed(description))

    @classmethod
    def open(cls, path: str | Path, train: Rows, *, probes: int = 32) -> Index:
        """Open the index of these rows that was kept in a folder. Its bytes are checked first; inverted lists stay on
        disk, memory-mapped.

        Raises:
            ImportError: faiss is not installed.
            StoreError: there is no index, it is damaged, or not of these rows as they are now.
        """
        faiss = _faiss()
        path, source = Path(path), as_source("train", train)
        if not (path / DESCRIPTION).is_file():
            raise StoreError(f"{path}: no index here; build one with search.Index.build")
        description = read_sealed(path / DESCRIPTION, DESCRIPTION_LIMIT)
        if description.get("format") != FORMAT:
            raise StoreError(f"{path}: its format is {description.get('format')!r}, not {FORMAT!r}; build it again")
        if description.get("store") != source.digest():
            raise StoreError(f"{path}: built from other rows than these, or from this store before it changed; rebuild")
        file = description.get("file")
        if not isinstance(file, dict) or not _is_whole(path / FILE, file):
            raise StoreError(f"{path / FILE}: damaged: missing, or its bytes do not fit {DESCRIPTION}; build it again")
        try:
            index = faiss.read_index(str(path / FILE), faiss.IO_FLAG_MMAP | faiss.IO_FLAG_READ_ONLY)
        except RuntimeError as error:
            raise StoreError(f"{path / FILE}: could not be read ({str(error).splitlines()[0]}); build it again") from (
                error
            )
        return cls(source, index, probes=probes)

    def candidates(self, question: Question, k: int) -> Tensor:
        """Rows ``(C, k)`` int64 that probably come first in each ranking of a question; -1 where fewer were found.

        Raises:
            StoreError: the index gives a row that its source does not have.
        """
        heads = []
        for space, head in zip(self.source.spaces, question.heads(), strict=True):
            full = head.new_zeros(len(head), space.width)
            full[:, question.columns] = head
            heads.append(full)
        vectors = torch.cat(heads, 1).to("cpu", torch.float32)
        if hasattr(self._index, "nprobe"):
            self._index.nprobe = min(self.probes, self._index.nlist)
        _, rows = self._index.search((-vectors if question.harmful else vectors).contiguous().numpy(), k)
        if rows.size and not (rows.min() >= -1 and rows.max() < len(self.source)):
            raise StoreError(f"index: gives row {rows.max()} of {len(self.source)}; it is damaged: build it again")
        return torch.from_numpy(rows)

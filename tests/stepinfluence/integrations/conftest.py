"""Folders with tiny models and data; no network."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch


@pytest.fixture
def saved(tmp_path: Path) -> Callable[..., Path]:
    """``saved("AlbertForMaskedLM", config)``: a folder with that model, random weights, and the tokenizer."""

    def save(architecture: str, config: Any) -> Path:
        from hf_models import save_tokenizer, transformers

        torch.manual_seed(0)
        folder = tmp_path / architecture
        getattr(transformers, architecture)(config).save_pretrained(folder)
        save_tokenizer(folder)
        return folder

    return save


@pytest.fixture
def lines(tmp_path: Path) -> Callable[..., str]:
    """``lines(train=[...], query=[...])``: JSON lines of each split; returns the pattern of their paths."""

    def write(**splits: list[dict[str, Any]]) -> str:
        for split, records in splits.items():
            text = "".join(json.dumps(record) + "\n" for record in records)
            (tmp_path / f"{split}.jsonl").write_text(text, encoding="utf-8")
        return str(tmp_path / "{split}.jsonl")

    return write

"""Tiny looped models of the Hugging Face format, and a tokenizer of a few words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

transformers = pytest.importorskip("transformers", reason="the hf extra")

WORDS = ("the", "cat", "dog", "bird", "sees", "hears", "likes", "a", "red", "blue", "green", "house")
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
NAMED = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), SPECIAL, strict=True))


def save_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    vocabulary = {word: number for number, word in enumerate((*SPECIAL, *WORDS))}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token=NAMED["unk_token"]))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])]
    )
    transformers.PreTrainedTokenizerFast(tokenizer_object=made, **NAMED).save_pretrained(folder)


def albert_config(**changes: Any) -> Any:
    shape = {
        "vocab_size": len(SPECIAL) + len(WORDS), "embedding_size": 8, "hidden_size": 16, "intermediate_size": 32,
        "num_attention_heads": 2, "num_hidden_layers": 3, "max_position_embeddings": 32,
    }  # fmt: skip
    return transformers.AlbertConfig(**(shape | changes))

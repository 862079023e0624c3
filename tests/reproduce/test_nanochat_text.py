"""Text for language models: the user's records, rows of tokens, what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from reproduce.nanochat.text import (
    ASSISTANT,
    DOCUMENT,
    END,
    USER,
    BPETokenizer,
    ByteTokenizer,
    Conversation,
    Document,
    document_stream,
    python_reference,
    read_records,
    render,
    windows,
)


def test_python_reference_is_text() -> None:
    documents = python_reference()
    assert len(documents) > 50
    assert sum(len(d.text) for d in documents) > 200_000
    assert "iterate over" in next(d.text for d in documents if d.name == "for")


def test_records(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    lines = [
        {"text": "hello", "split": "test"},
        {"question": "1+1", "answer": "2", "source": "gsm8k"},
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
    ]
    path.write_text("\n\n".join(json.dumps(line) for line in lines))
    documents, conversations = read_records(path)
    assert documents == [Document("d:1", "hello", "test")]
    assert conversations == [
        Conversation("gsm8k", (("user", "1+1"), ("assistant", "2"))),
        Conversation("", (("user", "a"), ("assistant", "b"))),
    ]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("not json", "line 2 .* is no record"),
        ('{"question": "x"}', "line 2 .*'answer'"),
        ('{"text": 3}', "line 2 .*int where a text should be"),
        ('{"text": "x", "split": "dev"}', "split 'dev'"),
        ('{"messages": [{"role": "robot", "content": "x"}]}', "role 'robot' is none of user, system, assistant"),
        ('{"messages": [{"role": "user", "content": "x"}]}', "no assistant turn"),
        ("[1]", "line 2"),
    ],
)
def test_damaged_records_are_named(tmp_path: Path, line: str, reason: str) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text('{"text": "fine"}\n' + line)
    with pytest.raises(ValueError, match=reason):
        read_records(path)


def test_files_without_records(tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(ValueError, match="holds no records"):
        read_records(tmp_path / "empty")
    with pytest.raises(ValueError, match="cannot be read"):
        read_records(tmp_path / "missing")


def test_stream_and_windows() -> None:
    stream = document_stream([Document("a", "hi"), Document("b", "é")], ByteTokenizer())
    assert stream.tolist() == [DOCUMENT, ord("h") + 4, ord("i") + 4, DOCUMENT, 0xC3 + 4, 0xA9 + 4]
    rows = windows(torch.arange(10), torch.tensor([0, 6]), 3)
    assert rows["tokens"].tolist() == [[0, 1, 2], [6, 7, 8]]
    assert rows["targets"].tolist() == [[1, 2, 3], [7, 8, 9]]
    assert rows["mask"].tolist() == [[1, 1, 1]] * 2


def test_render_counts_the_assistant_only() -> None:
    talk = Conversation("", (("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")))
    rows = render([talk], ByteTokenizer(), 14)
    a, b, c, d = (ord(x) + 4 for x in "abcd")
    whole = [DOCUMENT, USER, a, END, ASSISTANT, b, END, USER, c, END, ASSISTANT, d, END]
    assert rows["tokens"][0].tolist() == [*whole[:-1], 0, 0]
    assert rows["targets"][0].tolist() == [*whole[1:], 0, 0]
    assert rows["targets"][0][rows["mask"][0].bool()].tolist() == [b, END, d, END]
    short = render([talk, Conversation("", (("user", "a" * 9), ("assistant", "b")))], ByteTokenizer(), 5)
    assert len(short["tokens"]) == 1  # the other's answer is behind the cut
    assert short["targets"][0][short["mask"][0].bool()].tolist() == [b]
    with pytest.raises(ValueError, match="length: no conversation's answer begins within 3 tokens"):
        render([talk], ByteTokenizer(), 3)


def test_bpe_needs_room_for_bytes() -> None:
    with pytest.raises(ValueError, match="vocab_size: got 100"):
        BPETokenizer(["text"], 100)

"""Text for language models: the user's records, rows of tokens, what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from reproduce.nanochat.spelling import SOURCES, spelling_tasks, words
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
    trimmed,
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
    rows = render([talk], ByteTokenizer(), 14).rows
    a, b, c, d = (ord(x) + 4 for x in "abcd")
    whole = [DOCUMENT, USER, a, END, ASSISTANT, b, END, USER, c, END, ASSISTANT, d, END]
    assert rows["tokens"][0].tolist() == [*whole[:-1], 0, 0]
    assert rows["targets"][0].tolist() == [*whole[1:], 0, 0]
    assert rows["targets"][0][rows["mask"][0].bool()].tolist() == [b, END, d, END]
    everything = render([talk], ByteTokenizer(), 14, all_tokens=True).rows
    assert everything["mask"][0].tolist() == [1] * 12 + [0, 0]
    assert torch.equal(everything["tokens"], rows["tokens"])


def test_render_drops_what_does_not_fit() -> None:
    talks = [Conversation("", (("user", "a" * n), ("assistant", "b"))) for n in (1, 9, 2, 3)]
    found = render(talks, ByteTokenizer(), 8)  # nine tokens with three of the user, the last of them only a target
    assert (len(found), found.dropped) == (3, 1)
    assert found.rows["targets"][2].tolist()[-2:] == [ord("b") + 4, END]  # the longest that fits is whole
    with pytest.raises(ValueError, match="length: none of 4 conversations fits into 3 tokens"):
        render(talks, ByteTokenizer(), 3)


def test_trimmed_rows_end_with_the_longest() -> None:
    talks = [Conversation("", (("user", "a" * n), ("assistant", "b"))) for n in (1, 3)]
    rows = render(talks, ByteTokenizer(), 20).rows
    short = trimmed(rows)
    assert {value.shape for value in short.values()} == {(2, 8)}
    assert torch.equal(short["mask"], rows["mask"][:, :8])
    assert int(rows["mask"][:, 8:].sum()) == 0


def test_a_folder_has_a_file_for_each_split(tmp_path: Path) -> None:
    for name in ("train", "test"):
        record = json.dumps({"question": f"{name}\u2028?", "answer": "2"}, ensure_ascii=False)
        (tmp_path / f"{name}.jsonl").write_text(record + "\n", encoding="utf-8")
    _, conversations = read_records(tmp_path)
    assert [(c.turns[0][1], c.split) for c in conversations] == [("train\u2028?", "train"), ("test\u2028?", "test")]
    (tmp_path / "test.jsonl").unlink()
    with pytest.raises(ValueError, match=r"test.jsonl cannot be read"):
        read_records(tmp_path)


def test_bpe_needs_room_for_bytes() -> None:
    with pytest.raises(ValueError, match="vocab_size: got 100"):
        BPETokenizer(["text"], 100)


def test_spelling_tasks_are_right() -> None:
    known = words(["A bee saw 3 strawberries;", "the bee, the sea. Under_score"])
    assert known == ["bee", "saw", "sea", "strawberries", "the"]
    made = spelling_tasks(known, 200, seed=0)
    assert made == spelling_tasks(known, 200, seed=0) != spelling_tasks(known, 200, seed=1)
    assert {c.source for c in made} == set(SOURCES)
    absent = 0
    for talk in made:
        (_, question), (_, answer) = talk.turns
        if talk.source == "spelling":
            word = question.removeprefix("Spell the word: ")
            assert answer == f"{word}:{','.join(word)}"
            continue
        asked = re.fullmatch(r"How many (\w) are in the word (\w+)\?", question)
        assert asked is not None
        assert answer.endswith(f"#### {asked[2].count(asked[1])}")
        assert answer.count("hit!") == asked[2].count(asked[1])
        absent += asked[1] not in asked[2]
    assert 0 < absent < 20
    with pytest.raises(ValueError, match="data: the training texts have no words"):
        spelling_tasks([], 3, seed=0)

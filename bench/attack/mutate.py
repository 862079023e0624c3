"""Damage to bytes, and odd values in JSON and YAML: all from a generator, so that a seed tells everything."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

ODD: tuple[Callable[[Random], Any], ...] = (
    lambda r: None,
    lambda r: r.random() < 0.5,
    lambda r: r.choice((-1, 0, 1, 2, 3, 255, 2**16, 2**22, 2**31, 2**40, 2**63, 2**64, -(2**63), 10**30)),
    lambda r: r.choice((0.5, -0.0, 1e308, -1e308, 5e-324, float("nan"), float("inf"))),
    lambda r: r.choice(("", " ", "x", "fp32", "int8", "sum", "exact", "../../etc/passwd", "/dev/zero", "a\0b", "a\nb")),
    lambda r: r.choice(("\ud800", "\u2028", "\u202e", "0", "1e9", "NaN", "9" * 400, "x" * 100_000)),
    lambda r: "".join(chr(r.choice((32, 65, 48, 0x2028, 0xE9, 0x1F600))) for _ in range(r.randrange(40))),
    lambda r: [],
    lambda r: {},
    lambda r: [r.randrange(9) for _ in range(r.randrange(1, 50))],
    lambda r: {str(r.randrange(9)): r.randrange(9), "": None},
    lambda r: nested(r.choice((3, 60, 3000))),
)
"""Values that nobody expects."""


def nested(depth: int) -> Any:
    value: Any = 0
    for _ in range(depth):
        value = [value]
    return value


def damaged(rng: Random, data: bytes, other: bytes = b"") -> bytes:
    """Bytes changed in one to eight places: bits, bytes, stretches cut, doubled, swapped, filled, put in; ``other`` is
    where a stretch of another file may come from."""
    made = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        if not made:
            made += rng.randbytes(rng.randrange(1, 64))
        place, length = rng.randrange(len(made)), rng.choice((1, 1, 2, 4, 8, 64, 512))
        stretch = slice(place, place + length)
        kind = rng.randrange(10)
        if kind == 0:
            made[place] ^= 1 << rng.randrange(8)
        elif kind == 1:
            made[place] = rng.randrange(256)
        elif kind == 2:
            del made[stretch]
        elif kind == 3:
            del made[place:]
        elif kind == 4:
            made[place:place] = rng.randbytes(length)
        elif kind == 5:
            made[place:place] = made[stretch]
        elif kind == 6:
            made[stretch] = bytes([rng.choice((0, 255, 0x7F, 0x80))]) * len(made[stretch])
        elif kind == 7:
            made[stretch] = rng.randbytes(len(made[stretch]))
        elif kind == 8:
            source = other or data
            start = rng.randrange(len(source)) if source else 0
            made[stretch] = source[start : start + length]
        else:
            second = rng.randrange(len(made))
            a, b = bytes(made[stretch]), bytes(made[second : second + length])
            made[stretch], made[second : second + len(b)] = b, a
    return bytes(made)


def odd_value(rng: Random, content: Any) -> Any:
    """A copy of JSON values with one to three of them gone, renamed, swapped, doubled or replaced by odd ones."""
    content = copy.deepcopy(content)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        holders = list(_holders(content))
        if not holders:
            return rng.choice(ODD)(rng)
        holder = rng.choice(holders)
        keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
        key = rng.choice(keys)
        kind = rng.randrange(8)
        if kind == 0:
            del holder[key]
        elif kind == 1 and isinstance(holder, dict):
            holder[rng.choice(("", "x", "\ud800", "a\nb", "sha256", str(key) + " ", str(key).upper()))] = holder.pop(
                key
            )
        elif kind == 2:
            second = rng.choice(keys)
            holder[key], holder[second] = holder[second], holder[key]
        elif kind == 3 and isinstance(holder, list):
            holder.insert(key, copy.deepcopy(holder[key]))
        elif kind == 4 and isinstance(holder[key], int | float) and not isinstance(holder[key], bool):
            holder[key] += rng.choice((-1, 1, 0.5, 1000))
        elif kind == 5 and isinstance(holder[key], str) and holder[key]:
            at = rng.randrange(len(holder[key]))
            holder[key] = holder[key][:at] + rng.choice("0aZ\n/ ") + holder[key][at + 1 :]
        else:
            holder[key] = rng.choice(ODD)(rng)
    return content


def _holders(value: Any) -> Any:
    """The lists and mappings in a value that hold something."""
    if isinstance(value, dict | list) and value:
        yield value
        for item in list(value.values()) if isinstance(value, dict) else list(value):
            yield from _holders(item)


def odd_json(rng: Random, data: bytes, seal: Callable[[dict[str, Any]], bytes] | None = None) -> bytes:
    """A JSON file with odd values in it; now and then with a checksum that fits them, made by ``seal``."""
    try:
        content = odd_value(rng, json.loads(data))
        if seal is not None and isinstance(content, dict) and rng.random() < 0.7:
            return seal({key: value for key, value in content.items() if key != "sha256"})
        return json.dumps(content, indent=rng.choice((None, 2))).encode()
    except (ValueError, RecursionError, TypeError):  # what cannot be written stays out; bytes are damaged instead
        return damaged(rng, data)


def files_of(folder: Path) -> list[Path]:
    """All files in a folder, in one order."""
    return sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))


def content_of(folder: Path) -> dict[str, bytes]:
    """Every file of a store or run by its path, but the log of times, and the mark of its place."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in ("times.jsonl", ".written-here")
    }

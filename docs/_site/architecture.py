"""The tower of packages as a picture, drawn from the imports: ``python docs/_site/architecture.py`` writes it anew.

What is looked at is what runs: imports inside functions count, those for type checkers only do not.
"""

from __future__ import annotations

import ast
import html
from collections.abc import Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PICTURE = ROOT / "docs" / "images" / "architecture.svg"
PACKAGES = {
    "sdi_kernels": ROOT / "sdi_kernels",
    "stepinfluence": ROOT / "python" / "stepinfluence",
    "reproduce": ROOT / "reproduce",
    "bench": ROOT / "bench",
}
BASE = "base"
"""The room of the modules that lie in ``stepinfluence`` itself and that any other may use."""

Graph = Mapping[str, set[str]]


# ----------------------------------------------------------------------------------------------------------------
# Imports


def modules() -> dict[str, Path]:
    """All modules by their full name."""
    found = {}
    for package, folder in PACKAGES.items():
        for file in folder.rglob("*.py"):
            parts = (package, *file.relative_to(folder).with_suffix("").parts)
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def imported(node: ast.AST, *, types: bool = False) -> Iterator[tuple[str, str]]:
    """(module, name taken from it) of a file's imports: those that run, or with ``types`` also those for types only."""
    for child in ast.iter_child_nodes(node):
        if not types and isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        if isinstance(child, ast.Import):
            yield from ((alias.name, "") for alias in child.names)
        elif isinstance(child, ast.ImportFrom) and child.module is not None:
            yield from ((child.module, alias.name) for alias in child.names)
        else:
            yield from imported(child, types=types)


def imports() -> dict[str, set[str]]:
    """For each module the modules that it imports."""
    known = modules()
    graph: dict[str, set[str]] = {}
    for name, file in known.items():
        graph[name] = set()
        for module, taken in imported(ast.parse(file.read_text(encoding="utf-8"))):
            whole = f"{module}.{taken}"
            graph[name] |= {whole if whole in known else module} & (known.keys() - {name})
    return graph


def circles(graph: Graph) -> list[list[str]]:
    """Groups of nodes that reach one another (Tarjan's strongly connected components of more than one)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in sorted(graph[node]):
            if other not in index:
                visit(other)
            if other in stack:
                low[node] = min(low[node], low[other])
        if low[node] == index[node]:
            group = [stack.pop()]
            while group[-1] != node:
                group.append(stack.pop())
            if len(group) > 1:
                found.append(sorted(group))

    for node in sorted(graph):
        if node not in index:
            visit(node)
    return found


# ----------------------------------------------------------------------------------------------------------------
# Rooms


def room_of(module: str) -> str | None:
    """The room that a module belongs to; None for the library's doors, which only say where names are."""
    package, _, rest = module.partition(".")
    first, _, more = rest.partition(".")
    if package != "stepinfluence":
        return package
    if first in ("", "__main__"):
        return None
    if first == "app":
        return f"app.{more.partition('.')[0]}" if more else None
    return first if (PACKAGES[package] / first).is_dir() or first == "compat" else BASE


def rooms() -> dict[str, set[str]]:
    """For each room the rooms that it imports."""
    graph: dict[str, set[str]] = {}
    for module, others in imports().items():
        room = room_of(module)
        if room is not None:
            graph.setdefault(room, set()).update({r for o in others if (r := room_of(o)) not in (None, room)})
    return graph


def floors(graph: Graph) -> list[list[str]]:
    """Rooms by height: each lies just above the highest that it imports."""
    height: dict[str, int] = {}

    def measure(room: str) -> int:
        if room not in height:
            height[room] = 1 + max((measure(other) for other in graph[room]), default=-1)
        return height[room]

    for room in graph:
        measure(room)
    return [sorted(r for r in graph if height[r] == level) for level in range(1 + max(height.values()))]


def direct(graph: Graph) -> dict[str, set[str]]:
    """The imports without those that another import implies: ``a -> c`` where there are ``a -> b`` and ``b -> c``."""

    def below(room: str) -> set[str]:
        return graph[room].union(*(below(other) for other in graph[room]))

    return {room: others - set().union(*(below(other) for other in others)) for room, others in graph.items()}


# ----------------------------------------------------------------------------------------------------------------
# The picture

BOX, GAP, FLOOR, MARGIN, SIDE = (132, 34), 22, 76, 16, 90
STYLE = """
    rect { fill: #eceff1; stroke: #546e7a } text { fill: #263238; font: 14px sans-serif; text-anchor: middle }
    path { fill: none; stroke: #78909c; stroke-width: 1.3 }
    .kernels rect { fill: #ffe0b2 } .app rect { fill: #c8e6c9 } .clone rect { fill: #e1bee7 }
    @media (prefers-color-scheme: dark) {
      rect { fill: #37474f; stroke: #90a4ae } text { fill: #eceff1 }
      .kernels rect { fill: #5d4037 } .app rect { fill: #2e5a32 } .clone rect { fill: #5b3a66 }
    }"""


def kind(room: str) -> str:
    """Which of the four colours a room has."""
    if room == "sdi_kernels":
        return "kernels"
    return "clone" if room in PACKAGES else "app" if room.startswith("app.") else "library"


def picture() -> str:
    """The tower as an SVG: one row for each floor, a line for each direct import, downwards."""
    graph = rooms()
    levels = floors(graph)[::-1]
    across = max(map(len, levels))
    width = 2 * SIDE + across * BOX[0] + (across - 1) * GAP
    height = 2 * MARGIN + (len(levels) - 1) * FLOOR + BOX[1]
    place = {}
    for row, level in enumerate(levels):
        used = len(level) * BOX[0] + (len(level) - 1) * GAP
        for column, room in enumerate(level):
            place[room] = ((width - used) / 2 + column * (BOX[0] + GAP), MARGIN + row * FLOOR)
    lines = []
    for room, others in sorted(direct(graph).items()):
        for other in sorted(others):
            (x, y), (u, v) = place[room], place[other]
            a, b, c = x + BOX[0] / 2, y + BOX[1], u + BOX[0] / 2
            bend = (v - b) / 3
            # Lines past other floors swing out to the side, around the boxes there.
            side = (1 if c >= a else -1) * BOX[0] * (0 if v - b < FLOOR else min(2, (v - b) / FLOOR / 3))
            lines.append(
                f'<path d="M{a:g} {b:g} C{a + side:g} {b + bend:g} {c + side:g} {v - bend:g} {c:g} {v:g}">'
                f"<title>{html.escape(room)} imports {html.escape(other)}</title></path>"
            )
    boxes = [
        f'<g class="{kind(room)}"><rect x="{x:g}" y="{y:g}" width="{BOX[0]}" height="{BOX[1]}" rx="5"/>'
        f'<text x="{x + BOX[0] / 2:g}" y="{y + BOX[1] / 2 + 5:g}">{html.escape(room)}</text></g>'
        for room, (x, y) in place.items()
    ]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}">\n'
        f"  <style>{STYLE}\n  </style>\n  " + "\n  ".join([*lines, *boxes]) + "\n</svg>\n"
    )


if __name__ == "__main__":
    PICTURE.write_text(picture(), encoding="utf-8")

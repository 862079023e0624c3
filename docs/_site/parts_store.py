"""Figures of sketch sizes and store layouts."""

# ruff: noqa: E501  # sentences of the pages
from __future__ import annotations

from typing import Any

from kept import Parts, load, mean, source, span, table

PATH = (
    ("iid", "concat", 2048, "fp32", False),
    ("balanced", "concat", 2048, "fp32", False),
    ("balanced", "concat", 2048, "int8", False),
    ("balanced", "concat", 1024, "int8", False),
    ("balanced", "energy", 1024, "int8", False),
    ("balanced", "sum", 1024, "int8", False),
    ("balanced", "energy", 1024, "int8", True),
    ("balanced", "sum", 1024, "int8", True),
)
PLANS = {"concat": "concat", "sum": "sum", "energy": "concat by energy"}
NAMES = {"gpt": "Looped GPT", "parity": "Parity"}


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    layout = row["layout"]
    return layout["hashing"], layout["plan"], layout["m"], layout["dtype"], layout["folded"]


def _name(key: tuple[Any, ...]) -> str:
    hashing, plan, m, dtype, folded = key
    return f"{hashing}, {PLANS[plan]}, m = {m}, {dtype}{', folded' if folded else ''}"


def _layouts() -> dict[str, dict[tuple[Any, ...], dict[str, Any]]]:
    result = load("store-layouts.json")
    return {model: {_key(r): r for r in result[model]["rows"]} for model in NAMES}


def _share(part: float, whole: float) -> str:
    return "1" if part == whole else f"1/{whole / part:.1f}"


def layout_tables() -> str:
    result, layouts = load("store-layouts.json"), _layouts()
    texts = [f"{source('store-layouts.json', False, result)} Means over {result['seeds']} draws of the tables."]
    for model, name in NAMES.items():
        about, rows = result[model], layouts[model]
        paper = rows[PATH[0]]
        texts.append(
            f"**{name}** ({about['model']}): {about['parameters']} body parameters, {about['vectors']} of them vectors, "
            f"{about['numbers']:,} numbers; {about['train']} training examples × {about['query']} queries of "
            f"{about['steps']} steps, {about['checkpoints']} checkpoints."
        )
        head = ["layout", "bytes per example", "of the paper's", "SDI error", "TracIn error"]
        cells = [
            [_name(k), f"{r['bytes']:,}", _share(r["bytes"], paper["bytes"]), f"{r['sdi']:.4f}", f"{r['tracin']:.4f}"]
            for k, r in ((k, rows[k]) for k in PATH)
        ]
        texts.append(table(head, cells))
    return "\n\n".join(texts)


def layout_findings() -> str:
    layouts = _layouts()
    lines = []
    for model, name in NAMES.items():
        rows = layouts[model]
        paper = rows[PATH[0]]
        best = min((r for r in rows.values() if r["bytes"] <= paper["bytes"] / 8), key=lambda r: r["sdi"])
        least = min((r for r in rows.values() if r["sdi"] <= paper["sdi"]), key=lambda r: r["bytes"])
        verdict = "met" if best["sdi"] <= paper["sdi"] else "missed"
        lines.append(
            f"- **The aim**, the error of the paper's layout ({paper['sdi']:.4f}) in an eighth of its bytes, is {verdict} "
            f"on the {name} model: {best['sdi']:.4f} with {_name(_key(best))}. The fewest bytes with no more error are "
            f"{_share(least['bytes'], paper['bytes'])} of the paper's ({_name(_key(least))})."
        )

    def change(model: str, one: tuple[Any, ...], other: tuple[Any, ...]) -> float:
        return layouts[model][other]["sdi"] / layouts[model][one]["sdi"] - 1

    rounding = max(
        abs(rows[(*k[:3], "int8", k[4])]["sdi"] - rows[k]["sdi"])
        for rows in layouts.values()
        for k in rows
        if k[3] == "fp32"
    )
    lines.append(
        f"- **int8** takes a quarter of the bytes; the error differs from fp32's by at most {rounding:.4f}, over all "
        "layouts of both models."
    )
    concat, energy, summed = PATH[3], PATH[4], PATH[5]
    lines.append(
        "- **Columns where they count** is what halves the width at no loss: uniform sizes at half the width change the "
        f"error by {change('gpt', PATH[2], concat):+.0%} on the GPT model and {change('parity', PATH[2], concat):+.0%} on "
        f"parity; sizes by energy by {change('gpt', PATH[2], energy):+.0%} and {change('parity', PATH[2], energy):+.0%}, "
        f"`sum` by {change('gpt', PATH[2], summed):+.0%} and {change('parity', PATH[2], summed):+.0%}, at twice and more "
        "of the bytes where the model has vectors."
    )
    iid, balanced = (layouts["parity"][PATH[k]]["bytes"] for k in (0, 1))
    lines.append(
        f"- **Short vectors at their own length** save {1 - balanced / iid:.0%} of the parity model's bytes, nothing on a "
        "model without vectors."
    )
    for model, name in NAMES.items():
        found = [
            change(model, ("iid", *k[1:]), k) for k in layouts[model] if k[0] == "balanced" and k[3:] == ("fp32", False)
        ]
        lines.append(
            f"- **Balanced hashing** against iid at the same nominal m changes the SDI error by {min(found):+.0%} to "
            f"{max(found):+.0%} on the {name} model, over plans and sizes (fp32, not folded)."
        )
    for model, name in NAMES.items():
        found = [
            change(model, (*k[:4], False), k) for k in layouts[model] if k[0] == "balanced" and k[3] == "int8" and k[4]
        ]
        lines.append(
            f"- **Folding** three checkpoints takes a third of the bytes and changes the error by {min(found):+.0%} to "
            f"{max(found):+.0%} on the {name} model (balanced, int8)."
        )
    return "\n".join(lines)


def readme_layouts() -> str:
    layouts = _layouts()
    parts = []
    for model, what in (("gpt", "a small looped GPT"), ("parity", "a small parity model")):
        paper, ours = layouts[model][PATH[0]], layouts[model][PATH[4]]
        parts.append(f"{ours['sdi']:.3f} against {paper['sdi']:.3f} on {what}")
    return (
        "int8 rows with sketch sizes by gradient energy take an eighth of the bytes of the paper's fp32 sketches, with a "
        f"relative error of {parts[0]}, and {parts[1]} ([kept run](bench/results/store-layouts.json))."
    )


# ---------------------------------------------------------------------------------------------------------------------
# Sizes


def _sizes() -> dict[str, dict[tuple[str, int], dict[str, Any]]]:
    result = load("sketch-sizes.json")
    return {model: {(r["hashing"], r["m"]): r for r in result[model]["rows"]} for model in NAMES}


def size_table() -> str:
    result, sizes = load("sketch-sizes.json"), _sizes()
    head = ["model", "m", "hashing", "SDI error", "TracIn error", "with self-influence", "top 10 shared", "rank corr."]
    rows = [
        [
            NAMES[model], str(m), hashing, *(f"{mean(r[k]):.3f}" for k in ("sdi", "tracin", "with_self")),
            f"{mean(r['top']):.0%}", f"{mean(r['rank']):.3f}",
        ]
        for model, found in sizes.items()
        for (hashing, m), r in sorted(found.items(), key=lambda item: (item[0][1], item[0][0]))
    ]  # fmt: skip
    return (
        f"{source('sketch-sizes.json', False, result)} Means over {result['seeds']} draws of the tables.\n\n"
        + table(head, rows)
    )


def faq_sizes() -> str:
    sizes, seeds = _sizes(), load("sketch-sizes.json")["seeds"]

    def over(figure: str, m: int, digits: int = 2) -> str:
        return span([mean(sizes[model]["balanced", m][figure]) for model in NAMES], digits)

    def percent(figure: str, m: int) -> str:
        values = [mean(sizes[model]["balanced", m][figure]) for model in NAMES]
        return f"{100 * min(values):.0f} to {100 * max(values):.0f} %"

    return (
        f"On two small trained models (balanced hashing, {seeds} draws of the tables), the relative error of SDI between "
        f"different examples is {over('sdi', 2048)} at m = 2048, {over('sdi', 1024)} at 1024, {over('sdi', 512)} at 512 "
        f"and {over('sdi', 256)} at 256. Of the ten most helpful examples of a query, {percent('top', 2048)} are among "
        f"the sketched ten at 2048, {percent('top', 512)} at 512, {percent('top', 256)} at 256; rank correlations are "
        f"{over('rank', 2048, 3)}, {over('rank', 512, 3)} and {over('rank', 256, 3)} ([the table](store.md))."
    )


def hashing_sentence() -> str:
    sizes, seeds = _sizes(), load("sketch-sizes.json")["seeds"]
    parts = []
    for model, name in NAMES.items():
        found = sizes[model]
        changes = [
            mean(r["sdi"]) / mean(found["iid", m]["sdi"]) - 1
            for (hashing, m), r in found.items()
            if hashing == "balanced"
        ]
        parts.append(f"by {min(changes):+.0%} to {max(changes):+.0%} on the {name} model")
    return (
        f"{' and '.join(parts)}, in the paper's layout at sizes from 256 to 2048 (means over {seeds} draws of the tables). "
        "Few draws in other layouts go either way"
    )


def readme_hashing() -> str:
    return (
        "Balanced hashing, the default, has a lower variance bound than the paper's independent hashing "
        "([docs/design.md](docs/design.md)). On two small models it changed the error between different examples "
        f"{hashing_sentence()} ([docs/store.md](docs/store.md)). "
        '`hashing="iid"` is the paper\'s estimator.'
    )


def faq_hashing() -> str:
    return (
        f"on two small models balanced hashing changed the error between different examples {hashing_sentence()} "
        "([the tables](store.md))."
    )


PARTS: Parts = {
    "layout-tables": layout_tables,
    "layout-findings": layout_findings,
    "readme-layouts": readme_layouts,
    "size-table": size_table,
    "faq-sizes": faq_sizes,
    "readme-hashing": readme_hashing,
    "faq-hashing": faq_hashing,
}

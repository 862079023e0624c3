"""The tables in docs/capture.md."""

# ruff: noqa: E501  # sentences of the pages
from __future__ import annotations

from kept import Parts, load, source, table


def models() -> str:
    """docs/capture.md: models of many kinds, errors and cost."""
    from bench.models.__main__ import HEAD, cells

    result = load("models.json")
    return f"{source('models.json', False, result)}\n\n" + table([*HEAD], [cells(row) for row in result["rows"]])


def workspace() -> str:
    """docs/capture.md: what it saves and costs that uses wait."""
    from bench.workspace import HEAD, cells

    result = load("workspace.json")
    return f"{source('workspace.json', False, result)}\n\n" + table([*HEAD], [cells(row) for row in result["rows"]])


def inline() -> str:
    """docs/capture.md: what inline features add to a training step."""
    result = load("inline.json")
    names = list(next(iter(result["cases"].values()))["ratio"])
    rows = []
    for case in result["cases"].values():
        shape = f"d = {case['d_model']}, {case['steps']} steps, batch {case['batch']}"
        rows.append([shape, *(f"{case['ratio'][name]:.2f}" for name in names[1:])])
    return (
        f"Processor time over a plain forward and backward pass, one thread. {source('inline.json', False, result)}\n\n"
        + table(["model of bench.capture", *names[1:]], rows)
    )


def torch_calls() -> str:
    """docs/capture.md: what the capture does on the host for each torch call."""
    result = load("calls.json")
    before = result["before"]
    rows = []
    for name, row in result["rows"].items():
        earlier = before["rows"][name]
        rows.append([
            name, f"{row['calls']}", f"{row['plain_ms']:.1f}",
            *(f"{r['featurize_ms']:.1f} ({r['featurize_ms'] / r['plain_ms']:.1f})" for r in (earlier, row)),
            *(f"{r['more_us_a_call']:.0f}" for r in (earlier, row)),
        ])  # fmt: skip
    head = [
        "model, one example",
        "torch calls",
        "plain step, ms",
        "featurize call before, ms",
        "now, ms",
        "µs more a torch call, before",
        "now",
    ]
    return (
        f"{source('calls.json', False, result)} *Before* is commit {before['provenance']['commit'][:12]}; in parentheses, over the "
        f"plain step.\n\n" + table(head, rows)
    )


def fuzz() -> str:
    """docs/capture.md: what random looped models show."""
    result = load("fuzz.json")
    counts = result["verdicts"]["sketched"]
    wrong = counts.get("wrong", 0) + counts.get("accepted", 0)
    parts = result.get("parts", [])  # a run that was stopped and went on
    stopped = f" The run has {len(parts)} parts, each with its commit in the file." if len(parts) > 1 else ""
    return (
        f"Of {result['models']:,} random looped models {counts['right']:,} were right, {wrong} wrong, "
        f"{counts['refused']} refused ({result['refused share']['sketched']:.1%} of those that autograd on single "
        f"examples handles), and {counts['rejected']} that mix examples were rejected, as they must be. "
        f"{source('fuzz.json', False, result)}{stopped}"
    )


PARTS: Parts = {"models": models, "workspace": workspace, "inline": inline, "torch-calls": torch_calls, "fuzz": fuzz}

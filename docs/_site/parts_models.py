"""The tables in docs/capture.md and docs/training.md."""

# ruff: noqa: E501  # sentences of the pages
from __future__ import annotations

import statistics

from kept import Parts, load, machines, source, table


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
    parts = ["Processor time over a plain forward and backward pass, one thread."]
    for name, result in machines("inline"):
        contestants = list(next(iter(result["cases"].values()))["ratio"])[1:]
        rows = []
        for case in result["cases"].values():
            shape = f"d = {case['d_model']}, {case['steps']} steps, batch {case['batch']}"
            rows.append([shape, *(f"{case['ratio'][contestant]:.2f}" for contestant in contestants)])
        parts += [source(name, False, result), table(["model of bench.capture", *contestants], rows)]
    return "\n\n".join(parts)


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


def training() -> str:
    """docs/training.md: what influence over all of a training costs, and what old queries lose."""
    result = load("training.json")
    costs = []
    for case in result["larger"].values():
        model = f"d = {case['d_model']}, {case['steps']} steps, batch {case['batch']}"
        costs.append([model, *(f"{ratio:.2f}" for ratio in case["ratio"].values())])
    errors, shares = [], []
    shape = result["cases"]["adder"]["case"]  # all are trained alike
    for name, case in result["cases"].items():
        what = f"{name}, {case['case']['optimizer']} {case['case']['learning_rate']:g}"
        shares.append(f"{what}: {', '.join(f'{share:.2g}' for share in case['predicted share of the fall'])}")
        for k, runs in case["every"].items():
            means = {key: statistics.fmean(run[key] for run in runs) for key in runs[0]}
            kept = [""] * 4 if k == "1" else [f"{means[key]:.2f}" for key in ("tracin", "sdi", "rank", "top")]
            errors.append([what, k, f"{means['cost']:.1f}", *kept])
    head = [
        "problem, optimizer",
        "k",
        "cost",
        "relative error, TracIn",
        "by step",
        "rank correlation",
        "top-10 overlap",
    ]
    return (
        f"Processor time of training over that of a plain one, one thread, {result['queries']} queries, models of "
        f"bench.capture. {source('training.json', False, result)}\n\n"
        + table(["model", *(f"k = {k}" for k in result["larger"]["gpt512"]["ratio"])], costs)
        + f"\n\nErrors against k = 1, means over {result['seeds']} seeds, of two problems of "
        f"`stepinfluence.evaluation`: one layer of d = {shape['d_model']}, {shape['steps']} steps, {shape['updates']} "
        f"updates of {shape['batch']} examples from the start. The cost is that of models so small that it is mostly "
        "Python's.\n\n"
        + table(head, errors)
        + f"\n\nPredicted over actual fall of the queries' losses at k = 1, each seed: {'; '.join(shares)}."
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


PARTS: Parts = {
    "models": models,
    "workspace": workspace,
    "inline": inline,
    "torch-calls": torch_calls,
    "training": training,
    "fuzz": fuzz,
}

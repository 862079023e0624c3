"""Figures of the README."""

# ruff: noqa: E501  # sentences of the page
from __future__ import annotations

import json
from typing import Any

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

from kept import EXPERIMENTS, ROOT, Parts, comparison, load, machines, mean, mib, source, table

MODELS = {
    "sudoku": "Sudoku-like",
    "parity": "parity-like",
    "gpt512": "GPT",
    "gpt768": "GPT",
}
EXTRAS = "report,explore,notebook"
ROWS = {
    "floor": "floor (forward + input gradients)",
    "first": "sdi-kernels, first call",
    "later": "sdi-kernels, later calls",
    "published": "published package, per step",
}


def _case(key: str, case: dict[str, Any]) -> str:
    blocks = f", {case['blocks']} blocks" if case["blocks"] > 1 else ""
    heads = f", {case['heads']} heads" if case["heads"] > 16 else ""
    shape = f"d={case['d_model']}{heads}{blocks}, τ={case['steps']}, {case['tokens']} tokens, batch {case['batch']}"
    return f"{MODELS[key]}: {shape}"


def costs() -> str:
    """A table for each machine."""
    texts = []
    for name, result in machines("capture"):
        threads = result["provenance"]["machine"]["torch threads"]
        clock = {"cpu": "processor seconds", "wall": "seconds by the clock"}[result["clock"]]
        rows = []
        for key, found in result["cases"].items():
            f = found["figures"]
            plain = f["plain forward+backward"]["median_s"]
            ratios = {k: f"{f[long]['ratio']:.2f}" for k, long in ROWS.items()}
            rows.append([
                _case(key, found["case"]), f"{plain:.2f}", ratios["floor"], ratios["first"], f"**{ratios['later']}**",
                ratios["published"]])  # fmt: skip
        head = ["looped model", "plain step, s", "floor", "first call", "**later calls**", "published package"]
        texts += [
            table(head, rows),
            f"{threads} thread(s), {clock}, medians of {result['rounds']} rounds. {source(name, False, result)}",
        ]
        lines = []
        grown = {r["field"]: r["ratio"] for r in result.get("scaling", ()) if r["factor"] == 4}
        if grown:
            times = ", ".join(f"{grown[field]:.1f}" for field in ("batch", "tokens", "steps"))
            lines.append(f"Four times the batch, tokens or loop steps took {times} times as long.")
        first = result["cases"]["sudoku"]["figures"]
        peaks = {k: first[v]["peak_mib"] for k, v in {**ROWS, "plain": "plain forward+backward"}.items()}
        if any(v is not None for v in peaks.values()):
            lines.append(
                f"On the first model a call added {mib(peaks['later'])} MiB at its peak ({mib(peaks['first'])} the first "
                f"call), the plain step {mib(peaks['plain'])}, the published package {mib(peaks['published'])}."
            )
        memory = result.get("checkpointing", ())
        if memory and all(r["plain_mib"] is not None and r["checkpointed_mib"] is not None for r in memory):
            small, large = memory[0], memory[-1]
            lines.append(
                f"From {small['steps']} to {large['steps']} loop steps, peak memory of featurizing a small model grew by "
                f"{large['checkpointed_mib'] - small['checkpointed_mib']:.0f} MiB with activation checkpointing per step and "
                f"by {large['plain_mib'] - small['plain_mib']:.0f} MiB without."
            )
        texts.append(" ".join(lines))
    return "\n\n".join(text for text in texts if text)


def costs_short() -> str:
    """README: later and first calls of all machines in one table."""
    found = machines("capture")
    names = [result["provenance"]["machine"]["CPU"].split("(R)")[0].split()[0] for _, result in found]
    columns = {"floor": "floor", "first": "first call", "later": "**later calls**", "published": "published package"}
    head = ["looped model", *columns.values()]
    rows = []
    for key, first in found[0][1]["cases"].items():
        figures = [result["cases"][key]["figures"] for _, result in found]
        cells = {name: "; ".join(f"{f[ROWS[name]]['ratio']:.2f}" for f in figures) for name in columns}
        rows.append([_case(key, first["case"]), *({**cells, "later": f"**{cells['later']}**"}.values())])
    first = found[0][1]["cases"]["sudoku"]["figures"]
    links = ", ".join(f"[{name}](bench/results/{name})" for name, _ in found)
    return (
        table(head, rows)
        + "\n\n"
        + f"In plain steps, {'; '.join(names)}. Memory: on the first model a call adds {mib(first[ROWS['later']]['peak_mib'])} MiB at its peak, a plain step "
        f"{mib(first['plain forward+backward']['peak_mib'])}. Seconds, threads, how it grows with batch, tokens and steps, and the "
        f"machines: [docs/capture.md](docs/capture.md#what-a-pass-costs) ({links})."
    )


def calls() -> str:
    """One sketch call, of every machine together."""
    faster, gemms = [], []
    for _, result in machines("sketch"):
        for r in result["linear"]:
            if r["hashing"] == "balanced":
                faster.append(r["published_over_ours"])
                gemms.append(r["ours_over_gemm"])
    return (
        "Per call, the compiled CPU kernels took between "
        f"1/{max(faster):.0f} and 1/{min(faster):.1f} of the published function's time, and {min(gemms):.2f} to {max(gemms):.2f} "
        "of the weight-gradient GEMM's, which plain training runs and featurizing does not ([docs/cpu.md](docs/cpu.md))."
    )


def install() -> str:
    texts = []
    for name, result in machines("install"):
        one, two = result["stages"]
        total = one["seconds"] + two["seconds"]
        texts.append(
            f"`make demo` first makes an environment in `.venv`, with torch's CPU build: {one['megabytes'] / 1000:.1f} GB in "
            f"{one['seconds']:.0f} s ({two['megabytes'] / 1000:.1f} GB in {total:.0f} s with what the tests need) with the package index "
            f"near ({source(name, True, result).rstrip('.')})."
        )
    return "\n\n".join(texts)


def install_line() -> str:
    """The commands that install the package: from pyproject.toml, the one place that knows where it is published."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    name, url = project["project"]["name"], project["project"]["urls"]["Repository"]
    if project["tool"][name]["published"]:
        lines = [f"pip install '{name}[{EXTRAS}]'"]
    else:
        lines = [f"git clone {url} && cd {name}", "make build", f'pip install "$(ls dist/*.whl)[{EXTRAS}]"']
    return "\n".join(["```sh", *lines, "```"])


def demo_seeds() -> str:
    """How many seeds solve the task and show the period, over machines and instruction sets together, in one sentence."""
    found = [result["summary"] for _, result in machines("demo-seeds")]
    summaries = [summary for of_machine in found for summary in of_machine.values()]
    runs, solved, period = (sum(s[key] for s in summaries) for key in ("runs", "solved", "period_of_4"))
    return (
        f"*One seed is drawn. Of {runs} runs ({summaries[0]['runs']} seeds under each of {len(summaries)} instruction sets) {solved} "
        f"learn the task and {period} show this period; where there is none, the report says so "
        "([table](bench/README.md#seeds-of-the-demonstration)).*"
    )


def demo_table() -> str:
    """bench/README.md: the same by instruction set."""
    texts = []
    for name, result in machines("demo-seeds"):
        rows = []
        for capability, found in result["summary"].items():
            seconds = sorted(c["cpu_seconds"] for c in result["cells"] if c["capability"] == capability)
            counts = [found[k] for k in ("runs", "solved", "period_of_4", "energy_period_of_4", "plain_period_of_4")]
            rows.append([capability, *map(str, counts), f"{seconds[0]:.0f} to {seconds[-1]:.0f}"])
        head = [
            "instructions",
            "runs",
            "solved",
            "period of 4",
            "regardless of sign",
            "without curvature",
            "processor s a run",
        ]
        texts += [source(name, False, result), table(head, rows)]
    return "\n\n".join(texts)


def reproduction() -> str:
    rows = [
        [
            "relative error of sketched SDI, m = 2048 (135.1M-parameter looped GPT, τ = 32, random weights and tokens)",
            "0.0388 ± 0.0030",
            (
                f"{comparison('fidelity', 'relative error of SDI, m = 2048, iid hashing')} with the paper's hashing, "
                f"{comparison('fidelity', 'relative error of SDI, m = 2048, balanced hashing')} with ours; **between different "
                f"examples {_between():.2f}**"
            ),
        ],
        [
            "error against sketch size, log-log slope",
            "-0.489",
            (
                f"{comparison('fidelity', 'log-log slope of the SDI error on m, iid')}; "
                f"{comparison('fidelity', 'log-log slope of the SDI error on m, balanced')}"
            ),
        ],
        [
            "parity, at the paper's width: accuracy at 40 bits; period of the influence profile on 0101…, of the logit margin",
            "100 %; 4; 4",
            (
                f"{comparison('parity-hours', 'accuracy at 40 bits')}; "
                f"{comparison('parity-hours', 'period of the summed SDI profile, from the end of the curriculum')} from the end of the "
                f"curriculum on ({comparison('parity-hours', 'period of the summed SDI profile, all checkpoints, loop steps')} over all "
                f"checkpoints); {comparison('parity-hours', 'period of the logit margin, loop steps')}"
            ),
        ],
        [
            "Sudoku: self-influence of hard over easy training puzzles, medians",
            "2.00",
            (
                f"6 × 6 boards: {comparison('sudoku', 'self-influence, hard / easy median')}; 9 × 9, trained for a tenth: "
                f"{comparison('sudoku-hours', 'self-influence, hard / easy median')}"
            ),
        ],
        [
            "Sudoku, 9 × 9: rank correlation of blanks with self-influence, and with the mass of influence on test puzzles",
            "0.428, 0.500",
            (
                f"{comparison('sudoku-hours', 'Spearman: blanks, self-influence')}, "
                f"{comparison('sudoku-hours', 'Spearman: blanks, cross-influence mass C')}"
            ),
        ],
        [
            "language model (328M parameters; here 435k, and 1.7M on GSM8K): share of the last loop step, signed, by τ from 2 to 16",
            "usually ≥ 0.50",
            f"{comparison('nanochat', 'share of the last step, signed, by τ')}; {_on_gsm8k()}",
        ],
        [
            "algorithmic tasks (claims of a summary): correlation with planted examples, sketched SDI; TracIn",
            "0.87; 0.62",
            (
                f"{comparison('planted', 'rank-biserial correlation with planted examples: SDI sketched (m = 256), summed')}; "
                f"{comparison('planted', 'rank-biserial correlation with planted examples: TracIn, eq. 1')}"
            ),
        ],
    ]
    return table(["", "paper", "here"], rows)


def _on_gsm8k() -> str:
    """Share of the last step, signed, where it is at least a half and where it is not, by loop count."""
    results = json.loads((EXPERIMENTS / "nanochat-gsm8k" / "results.json").read_text(encoding="utf-8"))
    shares = {int(t): row["last"]["value"] for t, row in results["numbers"]["profiles"]["protocol"].items()}
    half = [t for t, share in shares.items() if share >= 0.5]
    rest = "".join(f", {share:.2f} at τ = {t}" for t, share in shares.items() if t not in half)
    return f"{min(shares[t] for t in half):.2f} to {max(shares[t] for t in half):.2f} up to τ = {max(half)}{rest}"


def _between() -> float:
    """Relative error of SDI between different examples at m = 2048 with the paper's hashing, mean over draws."""
    results = json.loads((EXPERIMENTS / "fidelity" / "results.json").read_text(encoding="utf-8"))["numbers"]
    return mean(results["errors"]["iid"]["sdi_cross"][results["sketch_sizes"].index(2048)])


def between() -> str:
    return (
        f"The first row's two errors differ because an example is most like itself: the paper's measure is mostly self-influence, and "
        f"{_between():.2f} is between random examples, whose gradients are nearly orthogonal. On trained models it lies between the "
        "two ([docs/store.md](docs/store.md)). Where a ranking matters, take a larger m, or recompute the short list exactly (`--exact`)."
    )


def peers() -> str:
    """What other libraries answer, in a sentence."""
    found = load("peers.json")["libraries"]
    lists: dict[str, list[str]] = {"right": [], "wrong": [], "raises": [], "missing": []}
    for library, result in found.items():
        if library in ("stepinfluence", "sdi"):
            continue
        verdicts = [ask["verdict"].partition(",")[0] for ask in result["asks"]]
        kinds = [kind for kind in ("right", "wrong", "raises") if kind in verdicts] or ["missing"]
        for kind in kinds:
            asks = [a["label"] for a in result["asks"] if a["verdict"].partition(",")[0] == kind]
            lists[kind].append(f"{library} ({', '.join(asks)})" if len(kinds) > 1 else library)
    words = {
        "right": "right for the step-summed gradient",
        "wrong": "wrong for it",
        "raises": "an error",
        "missing": "no answer",
    }
    return "; ".join(f"{words[kind]}: {', '.join(names)}" for kind, names in lists.items() if names) + "."


PARTS: Parts = {
    "costs": costs,
    "readme-costs": costs_short,
    "calls": calls,
    "demo-seeds": demo_seeds,
    "demo-table": demo_table,
    "install": install,
    "install-line": install_line,
    "readme-reproduction": reproduction,
    "between": between,
    "readme-peers": peers,
}

"""Write docs/reproduction.md: the paper's numbers beside ours, from the results of the runs in docs/results.

python docs/_site/reproduction.py
"""

# ruff: noqa: E501  # rows of tables
from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parents[1]
ORDER = ("fidelity", "parity", "sudoku", "nanochat", "planted", "error", "uses")

HEAD = """# Reproduction

The paper's experiments (Kaissis et al., arXiv 2602.10097), each by one command, and its numbers beside ours. The
tables below are taken from the `results.json` of runs that are kept under `docs/results`; each has a report with figures
and an analysis of what differs. The experiments are not installed: run them from a clone of the repository.

    python -m reproduce {fidelity,parity,sudoku,nanochat,planted,error,uses} --scale cpu
    python -m reproduce nanochat --scale gsm8k --data FOLDER    # GSM8K's train.jsonl and test.jsonl
    python -m reproduce {parity,sudoku} --scale hours
    python -m reproduce ... --scale paper            # the paper's configuration, as far as it states one; not run so far

**In short**

- *As in the paper*: the error of sketches and how it falls with their size, conservation, parity's accuracy at 40 bits and the period of its logits; Sudoku's
  harder puzzles are memorised more and matter more.
- *In part*: parity's profile has its period from the end of the curriculum on with every seed, over all checkpoints with one of three. The last loop step of the language models has most of
  the influence, but on GSM8K not at the largest loop count; growth by one rate is seen at few loop counts.
- *Not*: hard Sudokus' influence does not decay more slowly at 9 × 9. What a summary of the paper claims of planted examples is not seen: summed over steps, SDI is
  TracIn.

**What was run**: the `cpu` scale of each experiment below, the `hours` scale of parity and sudoku and the `gsm8k` scale of nanochat, each once but where the table has columns of other seeds, on two cores of an AMD EPYC that was shared with other
work (times by the clock are of that). Where something is trained, models and tasks are smaller
than the paper's, or trained for less: directions and ratios can be compared, absolute values cannot. **What was not run**: the `paper` scale
of any. [What of the paper is not done](#what-of-the-paper-is-not-done) is listed at the end.

**Where the kept runs come from.** Each `results.json` has command (then `sdi reproduce`), configuration, seed, versions, CPU, threads, load at
the end and time of every stage. {missing} New runs write them, each stage with its commit. nanochat's
`cpu` run is of the time before batches were drawn by the number of the update: the command now trains on other batches of the same text.
"""

TAIL = """
The last three tables have no experiment of the paper behind them. *planted*: a summary of the paper claims results on algorithmic tasks that
the paper itself does not have, without a protocol. *error*: the same summary fears for deep loops and sparse gradients, and the paper bounds the error of
checkpoints that share their hashes without measuring it. *uses*: what the summary says influence by step is good for. We define protocols and report what comes out.
"""


NOT_DONE = """
## What of the paper is not done

Row by row; "smaller" rows are in the tables above at another size than the paper's.

| of the paper | here |
|---|---|
| §4, D.1: largest batch in 48 GB of an RTX A6000, in steps of 4 | smaller: resident memory of a process under 2.1 GB on a CPU, width 256, 8 steps, 64 tokens |
| §4, D.1: 2.55 s per checkpoint over an inference-only forward pass, batch 40, 10 trials, GPU | at the paper's batch {batch} processor seconds of one CPU, 2 rounds ([Scale](scale.md#the-papers-batch-40-examples-32-loop-steps)); in the table batch 4 and 8 steps, 3 rounds |
| D.1: overhead of featurizing over a plain backward pass on CUDA | not on a GPU; on CPUs in the README's table |
| §4: "a 1B-parameter model" in FLOPs, 135.1M parameters, 132 effective blocks | errors and conservation at this size; no training (the paper's inputs are random, too) |
| Fig. 4: errors for six sketch sizes, ten seeds, SDI and TracIn | done at the paper's size, batch 4 (the paper does not state the batch of this figure) |
| Fig. 1A, D.2: SDI profile of the probe 0101…, 512 training examples, all checkpoints | at the paper's width with a fiftieth of the training (`hours`), and width 48, {parity}; the choice of checkpoints is not stated in the paper and decides the period |
| D.2: the second probe, 1010… | read by the proxy (table in the report); no profile of it is shown, here or in the paper |
| Fig. 1B: phase portrait and transition matrix | done at the paper's width; drawn in the report |
| D.2: 384 test strings of 40 bits, calibration and evaluation of the proxy | done; there are fewer alternating strings than the paper's counts of them |
| §4: 100 % at 40 bits | reached at the paper's width by two seeds of three (99.5 % by the other); not by the smaller model, three seeds |
| Fig. 2A, D.3: board accuracy at 4 to 64 loops, SATNet's 9 × 9 puzzles, width 128, mean of 32 loops | 9 × 9 boards that we generate, width 128, mean of 32 loops (`hours`): trained for a tenth, mostly with short loops: accuracy rises from 4 to 12 loops and stays; smaller: 6 × 6, width 64, mean of 8 loops |
| Fig. 2B: energy curves by difficulty | done at 9 × 9 (`hours`), where the slower decay of hard puzzles is not there; at 6 × 6 it is in the sum over checkpoints, not at most of them (reports) |
| Table 1, D.4: 512 + 512 puzzles | done at 9 × 9 (`hours`), three evaluations; smaller: 256 + 256, all rows |
| D.4: centre of mass and CDF crossings ("auxiliary") | the paper prints no numbers |
| Fig. 3, D.5: 328.3M-parameter recursive nanochat, three training stages, 82 and 71 checkpoints | smaller: {nanochat}; {gsm8k} |
| §4, D.5: GSM8K, SmolTalk, MMLU, ARC, SpellingBee; 1024 conversations of 2048 tokens; mid-training and fine-tuning | smaller: GSM8K and spelling tasks made here, {examples} of {tokens} tokens, both stages; no SmolTalk, MMLU, ARC |
| Fig. 3 in the mid-training stage | the fine-tuning stage, as §4's text has it |
| §4: task accuracy on GSM8K plateaus beyond τ = 4 | not done: held-out loss of the small models instead |
| Appendices B, C: lemmas on CountSketch and TensorSketch | derived anew with exact variances, tested by enumeration ([design.md](design.md)); Lemma 1 by Monte Carlo (*error*, above) |
| comparison with other attribution methods | the paper has none; ours are in [peers.md](peers.md) and [evaluation.md](evaluation.md) |
"""


def page() -> str:
    """The page as text."""
    kept = {
        path.parent.name: json.loads(path.read_text(encoding="utf-8"))
        for name in ORDER
        for path in sorted((DOCS / "results").glob(f"{name}*/results.json"))
    }
    without = [name for name, results in kept.items() if "provenance" not in results]
    missing = (
        f"Commit, CPU flags and load before were not recorded yet when {', '.join(without)} ran, and "
        "these have not been run again."
        if without
        else ""
    )
    parts = [HEAD.replace("{missing}", missing)]
    parts += [_section(folder, results, _repeats(folder)) for folder, results in kept.items()]
    return "".join([*parts, TAIL, _not_done(kept)])


def _not_done(kept: dict[str, Any]) -> str:
    checkpoints = len(kept["parity"]["config"]["training"]["checkpoint_digits"]) + 1
    talk = kept["nanochat-gsm8k"]["config"]
    stages = [talk[name]["updates"] for name in ("pretraining", "mid_training", "fine_tuning")]
    batch = json.loads((DOCS.parent / "bench" / "results" / "paper-batch.json").read_text(encoding="utf-8"))
    parts = {
        "batch": f"{batch['processor seconds over the forward pass']:.0f}",
        "parity": f"{checkpoints} checkpoints",
        "nanochat": f"{_parameters(kept['nanochat'])}, {kept['nanochat']['config']['pretraining']['updates']} updates of one "
        "stage, text of Python's documentation",
        "gsm8k": f"{_parameters(kept['nanochat-gsm8k'])}, {sum(stages):,} updates of three stages, "
        f"{talk['fine_tuning']['checkpoints']} checkpoints",
        "examples": f"{talk['train_examples']} + {talk['query_examples']} conversations",
        "tokens": str(talk["model"]["sequence_len"]),
    }
    text = NOT_DONE
    for name, part in parts.items():
        text = text.replace(f"{{{name}}}", part)
    return text


def _parameters(results: dict[str, Any]) -> str:
    note: str = next(c["note"] for c in results["comparisons"] if "parameters" in c["note"])
    return f"{note.partition(' ')[0]} parameters"


def _repeats(folder: str) -> list[dict[str, Any]]:
    """Results of the same command with other seeds, which have no report here."""
    paths = sorted((DOCS / "results" / folder / "seeds").glob("*.json"))
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths]


def _section(folder: str, results: dict[str, Any], repeats: list[dict[str, Any]]) -> str:
    scale = results["scale"]
    name = folder.removesuffix(f"-{scale}")
    cpu = sum(t["cpu_seconds"] for t in results["timings"].values())
    wall = sum(t["seconds"] for t in results["timings"].values())
    data = f" --data {results['config']['data']}" if results["config"].get("data") else ""
    took = f"{cpu / 60:.0f} minutes of processor time, {wall / 60:.0f} by the clock"
    columns = ["ours", *(f"seed {repeat['config']['seed']}" for repeat in repeats), "paper", "where", "remark"]
    lines = [
        f"\n## {name}{'' if scale == 'cpu' else f', scale `{scale}`'}\n",
        f"`python -m reproduce {name} --scale {scale} --seed {results['config']['seed']}{data}`: {took}. [Report with figures](results/{folder}/report.md).\n",
        f"| quantity | {' | '.join(columns)} |",
        "|---" * (1 + len(columns)) + "|",
    ]
    again = [{c["name"]: c["ours"] for c in repeat["comparisons"]} for repeat in repeats]
    for c in results["comparisons"]:
        cells = (
            c["name"],
            _number(c["ours"]),
            *(_number(values.get(c["name"], "–")) for values in again),
            "–" if c["paper"] is None else _number(c["paper"]),
            re.sub(r"^(?=\d)", "§", c["where"]),  # as most experiments have it
            c["note"],
        )
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _number(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.3g}"


if __name__ == "__main__":
    (DOCS / "reproduction.md").write_text(page(), encoding="utf-8")

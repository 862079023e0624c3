"""The paper's scalability model at its own batch (D.1): 135.1M parameters, 32 loop steps, 40 examples, on a CPU.

    python -m bench.paper_batch            # two rounds: about half an hour of one core, 10 GB of memory
    python -m bench.paper_batch --keep     # kept: docs/scale.md states its figures
    python -m bench.paper_batch --small    # a model of the same code in a second, to try the command

What the paper times for a checkpoint: sketches of the batch and the scores of all its pairs, over a forward pass for
inference. 40 examples' activations would take 43 GB, so that the core's blocks are checkpointed, which runs them once
more; the paper's GPU of 48 GB kept them. Random weights (fp32) and tokens. Both contestants run in every round; what is
found is kept after each.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import stepinfluence
import torch
from stepinfluence.machine import PeakMemory
from stepinfluence.models import LoopedGPTConfig
from stepinfluence.models.gpt import gpt_loss
from stepinfluence.progress import tqdm

from bench import malloc
from bench.large import SMALL, make, make_batch, timed
from bench.provenance import Provenance, add_output, machine_line, write

EXAMPLES, SKETCH_SIZE = 40, 2048
FORWARD, FEATURIZE, SCORE = "forward pass for inference", "featurize, core checkpointed", "scores of all pairs"


def measure(
    config: LoopedGPTConfig, examples: int, rounds: int, keep: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """Seconds (clock, processor) of each part by round, and peak memory. ``keep`` is told after every round."""
    model = make(config)
    batch = make_batch(config, examples, config.sequence_len)
    capture = stepinfluence.attach(model, body=model.core, sketch_size=SKETCH_SIZE, verify=False)
    peak = PeakMemory()
    made = peak.peak_bytes()
    body = sum(p.numel() for p in model.core.parameters())
    seconds: dict[str, list[list[float]]] = {FORWARD: [], FEATURIZE: [], SCORE: []}
    found: dict[str, Any] = {}
    with torch.no_grad():
        gpt_loss(model, make_batch(config, 1, config.sequence_len))  # what libraries do once, at their first call
    for _ in tqdm(range(rounds), desc="rounds"):
        with torch.no_grad():
            _, *took = timed(lambda: gpt_loss(model, batch))
        seconds[FORWARD].append(took)
        features, *took = timed(lambda: capture.featurize([batch], gpt_loss, progress=False))
        seconds[FEATURIZE].append(took)
        _, *took = timed(partial(stepinfluence.influence, features, features))
        seconds[SCORE].append(took)
        added = [
            a[1] + b[1] - c[1] for a, b, c in zip(seconds[FEATURIZE], seconds[SCORE], seconds[FORWARD], strict=True)
        ]
        found = {
            "parameters": sum(p.numel() for p in model.parameters()),
            "steps": config.steps, "examples": examples, "tokens": config.sequence_len,
            "seconds (clock, processor)": seconds,
            "processor seconds over the forward pass": statistics.median(added),
            "bytes": {
                "peak with the model made": made,
                "peak": peak.peak_bytes(),
                "features": features.values.nbytes,
                "gradients by step, fp32": 4 * examples * config.steps * body,
            },
        }  # fmt: skip
        keep(found)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    add_output(parser, "paper-batch")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    provenance = Provenance()
    config, examples = (replace(SMALL, sequence_len=16), 3) if given.small else (LoopedGPTConfig.paper(), EXAMPLES)
    figures = measure(config, examples, given.rounds, lambda found: write(given.json, provenance, found))
    print(machine_line(provenance.finish()))
    for name, value in figures.items():
        print(f"{name}: {value}")


if __name__ == "__main__":
    malloc.restart()
    main()

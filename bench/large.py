"""A looped GPT of 1.3 billion parameters and 12 loop steps, featurized on a CPU: seconds, memory, and error.

    python -m bench.large            # about 14 GiB of memory at the peak, 10 of them for the exact part
    python -m bench.large --keep     # kept: docs/scale.md states its figures
    python -m bench.large --small    # a model of the same code in a second, to try the command

Random weights (fp32) and tokens, one batch of two examples. The core's blocks are checkpointed, so that a step costs
its states and not its activations. Influence from the sketches is held against exact influence of all four pairs at
every loop step, which the same backward pass gives from its factors (:mod:`stepinfluence.capture.pairs`): no gradient
of the model is formed. The command fails if an error is larger than hashing can explain.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from typing import Any, TypeVar

import stepinfluence
import torch
from stepinfluence import Capture
from stepinfluence.capture.pairs import BatchGradients, PairCapture, ParameterGradient
from stepinfluence.capture.session import isolated
from stepinfluence.machine import PeakMemory
from stepinfluence.models import LoopedGPT, LoopedGPTConfig
from stepinfluence.models.gpt import gpt_loss
from torch import Tensor
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from bench.provenance import Provenance, add_output, machine_line, write

SKETCH_SIZE = 2048
EXAMPLES, TOKENS = 2, 64
SMALL = LoopedGPTConfig(
    vocab_size=101, d_model=64, n_heads=2, sequence_len=64, n_prelude=1, n_core=3, n_coda=1, steps=12
)
DEVIATIONS = 5
"""Standard deviations of an inner product of sketches that an error may have: each is at most
``|x| |y| sqrt(2 / m)``."""

Result = TypeVar("Result")


def timed(call: Callable[[], Result]) -> tuple[Result, float, float]:
    """What a call gives; its seconds by the clock, and of the processor."""
    clock, processor = time.perf_counter(), time.process_time()
    result = call()
    return result, time.perf_counter() - clock, time.process_time() - processor


def make(config: LoopedGPTConfig) -> LoopedGPT:
    torch.manual_seed(0)
    model = LoopedGPT(config).eval()
    for k, block in enumerate(model.core.blocks):
        model.core.blocks[k] = checkpoint_wrapper(block)
    return model


def make_batch(config: LoopedGPTConfig, examples: int = EXAMPLES, length: int = TOKENS) -> dict[str, Tensor]:
    tokens = torch.randint(config.vocab_size, (examples, length + 1), generator=torch.Generator().manual_seed(1))
    return {"tokens": tokens[:, :-1], "targets": tokens[:, 1:]}


def summed(one: BatchGradients) -> BatchGradients:
    """The gradients of all steps together, from those by step; the factors are not copied."""
    total = BatchGradients(one.size, one.steps, False, one.ids)
    for (target, _), part in one.parts.items():
        whole = total.parts.setdefault((target, 0), ParameterGradient())
        whole.rows += part.rows
        whole.columns += part.columns
        assert part.dense is None  # every parameter of this body is a linear layer's weight
    return total


def exact_influence(capture: Capture, batch: dict[str, Tensor]) -> tuple[Tensor, int]:
    """``(train, query, steps)`` of all pairs of the batch, and the bytes of the factors that it was made from."""
    pairs = PairCapture(capture)
    with isolated(capture.model, training=False):
        query = pairs.record(batch, gpt_loss, None, 0, per_step=True)
    return pairs.influence(summed(query), query), query.bytes


def errors(features: Tensor, exact: Tensor) -> dict[str, Any]:
    """How far influence by sketches ``(B, steps, D)`` is from the exact one ``(B, B, steps)``.

    Raises:
        SystemExit: further than hashing can explain.
    """
    train = features.sum(1).double()
    found = torch.einsum("nd,qtd->nqt", train, features.double())
    # Norms from the sketches themselves, whose error is a second-order part of the bound.
    scale = train.norm(dim=1)[:, None, None] * features.double().norm(dim=2)[None]
    error = (found - exact).abs() / scale
    bound = DEVIATIONS * math.sqrt(2 / SKETCH_SIZE)
    if not float(error.max()) < bound:
        raise SystemExit(
            f"influence is {float(error.max()):.3g} of the norms away from the exact one; bound {bound:.3g}"
        )
    own = torch.eye(len(exact), dtype=torch.bool)

    def relative(some: Tensor) -> float:
        return float((found - exact)[some].norm() / exact[some].norm())

    return {
        "largest error over norms": float(error.max()),
        "bound": bound,
        "relative error, an example with itself": relative(own),
        "relative error, different examples": relative(~own),
        "cosine of different examples": float(exact.sum(2)[0, 1] / exact.sum(2).diagonal().prod().sqrt()),
        "exact": exact.tolist(),
        "sketched": found.tolist(),
    }


def measure(config: LoopedGPTConfig) -> dict[str, Any]:
    """All figures of one run.

    Raises:
        SystemExit: influence is wrong.
    """
    model, *made = timed(lambda: make(config))
    batch = make_batch(config)
    capture = stepinfluence.attach(model, body=model.core, sketch_size=SKETCH_SIZE)

    def featurize(verify: bool) -> Tensor:
        return capture.featurize([batch], gpt_loss, progress=False, verify=verify).values

    peak = PeakMemory()
    weights = peak.peak_bytes()
    features, *later = timed(lambda: featurize(False))
    first_peak = peak.peak_bytes()
    again, *first = timed(lambda: featurize(True))
    if not torch.equal(features, again):
        raise SystemExit("two calls gave different features")
    (exact, factors), *pairs = timed(lambda: exact_influence(capture, batch))
    body = sum(p.numel() for p in model.core.parameters())
    everything = sum(p.numel() for p in model.parameters())
    return {
        "parameters": everything,
        "in the loop": body,
        "steps": config.steps,
        "examples": EXAMPLES,
        "tokens": TOKENS,
        "columns": capture.width,
        "seconds (clock, processor)": {
            "make the model": made,
            "featurize": later,
            "featurize, first call": first,
            "exact influence of 4 pairs": pairs,
        },
        "bytes": {
            "peak with the model made": weights,
            "peak of featurizing": first_peak,
            "factors of the exact influence": factors,
            "peak": peak.peak_bytes(),
            "features of an example": 4 * config.steps * capture.width,
            "gradients of an example by step, fp32": 4 * config.steps * body,
            "gradients of an example by step, all parameters, fp32": 4 * config.steps * everything,
        },
        "errors": errors(features, exact),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    add_output(parser, "large")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    provenance = Provenance()
    figures = measure(SMALL if given.small else LoopedGPTConfig.large())
    write(given.json, provenance, figures)
    print(machine_line(provenance.finish()))
    for name, value in figures.items():
        print(f"{name}: {value}")


if __name__ == "__main__":
    main()

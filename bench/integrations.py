"""What the checkpoint callbacks cost: processor time of a training step with and without loop counts, and of a save.

python -m bench.integrations --keep
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time

import torch
from stepinfluence.integrations.checkpointing import LoopCounter, Saver
from transformers import AlbertConfig, AlbertForMaskedLM

from bench.provenance import Provenance, add_output, machine_line, machine_slug, write

BODY = "albert.encoder.albert_layer_groups.0"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=12, help="timed steps of either kind")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=64)
    add_output(parser, f"integrations-{machine_slug()}")
    options = parser.parse_args()
    torch.set_num_threads(1)
    provenance = Provenance()
    torch.manual_seed(0)
    config = AlbertConfig(
        vocab_size=8000, embedding_size=128, hidden_size=512, intermediate_size=2048, num_attention_heads=8,
        num_hidden_layers=12,
    )  # fmt: skip
    model = AlbertForMaskedLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    tokens = torch.randint(5, 8000, (options.batch, options.length))

    def step() -> float:
        began = time.process_time()
        optimizer.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        return time.process_time() - began

    step()
    plain, counted = [], []
    for _ in range(options.steps):  # in turns, as other programs come and go
        plain.append(step())
        counter = LoopCounter(model, BODY)
        counted.append(step())
        counter.remove()
    ratios = sorted(b / a for a, b in zip(plain, counted, strict=True))
    found: dict[str, object] = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "loop_steps": config.num_hidden_layers,
        "batch": options.batch,
        "length": options.length,
        "step_s": statistics.median(plain),
        "with_loop_counts": statistics.median(ratios),
        "quartiles": [ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]],
    }
    for moments in (True, False):
        with tempfile.TemporaryDirectory() as folder:
            saver = Saver(folder, second_moments=moments)
            began = time.process_time()
            for number in range(1, 6):
                saver.save(number, model, optimizer)
            what = "save_with_moments" if moments else "save_weights"
            found[what] = {"s": (time.process_time() - began) / 5, "mib": saver.bytes / 5 / 2**20}
    for name, value in found.items():
        print(f"{name}: {value}")
    print(machine_line(provenance.finish()))
    write(options.json, provenance, found)


if __name__ == "__main__":
    main()

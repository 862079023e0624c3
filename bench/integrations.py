"""What the checkpoint callbacks cost: processor time of a training step with and without loop counts, and of a save.

python -m bench.integrations
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time

import torch
from stepinfluence.integrations.checkpointing import LoopCounter, Saver
from transformers import AlbertConfig, AlbertForMaskedLM

BODY = "albert.encoder.albert_layer_groups.0"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=12, help="timed steps of either kind")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=64)
    options = parser.parse_args()
    torch.set_num_threads(1)
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
    low, high = ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]
    print(f"model: {sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters, 12 loop steps, one thread")
    print(f"training step: {statistics.median(plain):.3f} s of processor time")
    print(f"with loop counts: {statistics.median(ratios):.3f} of that (quartiles {low:.3f} to {high:.3f})")
    for moments in (True, False):
        with tempfile.TemporaryDirectory() as folder:
            saver = Saver(folder, second_moments=moments)
            began = time.process_time()
            for number in range(1, 6):
                saver.save(number, model, optimizer)
            spent = (time.process_time() - began) / 5
            what = "with second moments" if moments else "weights alone"
            print(f"a save, {what}: {spent:.3f} s of processor time, {saver.bytes / 5 / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()

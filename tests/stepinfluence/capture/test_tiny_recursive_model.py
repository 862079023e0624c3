"""TRM (``tiny-recursive-model``): one network for latent and output refinements, gradients through the last round."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compare import compare
from torch import Tensor, nn
from torch.nn import functional as F

pytestmark = pytest.mark.numeric

trm = pytest.importorskip("tiny_recursive_model")

TOKENS, VOCABULARY, ROUNDS, LATENT_STEPS = 6, 11, 2, 3


def model() -> nn.Module:
    torch.manual_seed(0)
    network = trm.MLPMixer1D(dim=8, depth=1, seq_len=TOKENS)
    made: nn.Module = trm.TinyRecursiveModel(
        dim=8,
        num_tokens=VOCABULARY,
        network=network,
        num_refinement_blocks=ROUNDS,
        num_latent_refinements=LATENT_STEPS,
    )
    return made


def loss(model: Any, batch: Tensor) -> Tensor:
    outputs, latents = model.get_initial()
    predictions = model(batch, outputs, latents)[2]
    return F.cross_entropy(predictions.transpose(1, 2), batch, reduction="none").mean(1)


@pytest.mark.filterwarnings("ignore")  # of the package and what it imports
def test_every_application_of_the_network_is_a_step_and_rounds_without_gradient_are_zero() -> None:
    generator = torch.Generator().manual_seed(1)
    batches = [torch.randint(0, VOCABULARY, (n, TOKENS), generator=generator) for n in (4, 3)]
    result = compare(model(), batches, loss, body=["network"])
    steps = LATENT_STEPS + 1
    assert result.sketches.values.shape[1] == ROUNDS * steps
    assert bool((result.sketches.values[:, : (ROUNDS - 1) * steps] == 0).all())
    assert bool((result.sketches.values[:, (ROUNDS - 1) * steps :] != 0).any(-1).all())

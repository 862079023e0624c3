"""Weights that are filled in at kept places or picked by a mask; loops in other threads and inside ``torch.vmap``."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from stepinfluence import ExactCapture, UnsupportedUseError, attach
from torch import Tensor, nn

WIDTH = 8
PLACES = torch.tensor([[0, 1, 2, 5], [3, 3, 1, 0]])
"""No buffer of any module, as peft's FourierFT keeps its own."""


def fourier(weight: Tensor) -> Tensor:
    """peft's FourierFT: a few numbers at fixed places of a spectrum."""
    spectrum = torch.zeros(WIDTH, WIDTH)
    spectrum[PLACES[0, :], PLACES[1, :]] = weight.float()
    matrix: Tensor = torch.fft.ifft2(spectrum).real * 10.0
    return matrix


def placed(weight: Tensor) -> Tensor:
    return torch.zeros(WIDTH, WIDTH).index_put((PLACES[0], PLACES[1]), weight)


def masked_rows(weight: Tensor) -> Tensor:
    return weight.view(4, 1).expand(4, WIDTH)[torch.tensor([True, False, True, True])].sum(0).expand(WIDTH, WIDTH)


def masked(weight: Tensor) -> Tensor:
    return weight[torch.tensor([True, False, True, True])].sum() * torch.eye(WIDTH)


class Looped(nn.Module):
    def __init__(self, form: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.core = Body(form)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = self.core(x)
        return x.sum(-1)


class Body(nn.Module):
    def __init__(self, form: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.weight, self.form = nn.Parameter(torch.randn(4)), form

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x + nn.functional.linear(x, self.form(self.weight)))


def loss(model: nn.Module, batch: Tensor) -> Tensor:
    losses: Tensor = model(batch) ** 2
    return losses


def by_autograd(model: Looped, batch: Tensor) -> Tensor:
    """``(B, steps, d)``: one example at a time, a copy of the weight for each step."""
    found = []
    for row in batch:
        copies = [model.core.weight.detach().clone().requires_grad_() for _ in range(3)]
        state = row.unsqueeze(0)
        for copy in copies:
            state = torch.tanh(state + nn.functional.linear(state, model.core.form(copy)))
        found.append(torch.stack(torch.autograd.grad((state.sum(-1) ** 2).sum(), copies)))
    return torch.stack(found)


@pytest.mark.parametrize("form", [fourier, placed, masked, masked_rows])
@pytest.mark.parametrize("size", [3, 4, 5])
def test_against_autograd(form: Callable[[Tensor], Tensor], size: int) -> None:
    """Masks and places may be as many as there are examples."""
    model, batch = Looped(form), torch.randn(size, WIDTH)
    truth = by_autograd(model, batch).double()
    exact = ExactCapture(model, body=model.core).featurize([batch], loss).values.double()
    torch.testing.assert_close(exact, truth, rtol=1e-4, atol=1e-5 * float(truth.abs().max()))
    # A vector of four in four buckets: signs and an order, so that inner products are those of gradients.
    sketched = attach(model, body=model.core, sketch_size=4).featurize([batch], loss).values
    found = sketched.flatten(0, 1).double() @ sketched.flatten(0, 1).double().T
    wanted = truth.flatten(0, 1) @ truth.flatten(0, 1).T
    assert float((found - wanted).abs().max()) <= 1e-4 * float(wanted.abs().max())


class Elsewhere(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.core = nn.Linear(WIDTH, WIDTH)


class OneStepElsewhere(Elsewhere):
    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            with ThreadPoolExecutor(1, "pool") as pool:
                x = pool.submit(self.core, x).result().tanh()
        return x.sum(-1)


class AllElsewhere(Elsewhere):
    def forward(self, x: Tensor) -> Tensor:
        def run(x: Tensor) -> Tensor:
            for _ in range(3):
                x = self.core(x).tanh()
            return x.sum(-1)

        with ThreadPoolExecutor(1, "pool") as pool:
            return pool.submit(run, x).result()


@pytest.mark.parametrize("kind", [OneStepElsewhere, AllElsewhere])
def test_a_body_in_another_thread_is_called_that(kind: Callable[[], Elsewhere]) -> None:
    model = kind()
    message = r"core\.\w+: the body was run in another thread \(pool_0\).*run the loop in the thread that featurizes"
    with pytest.raises(UnsupportedUseError, match=message):
        attach(model, body=model.core, sketch_size=8).featurize([torch.randn(4, WIDTH)], loss)


class OneStepMapped(Elsewhere):
    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = torch.vmap(self.core)(x).tanh()
        return x.sum(-1)


class AllMapped(Elsewhere):
    def forward(self, x: Tensor) -> Tensor:
        def run(row: Tensor) -> Tensor:
            for _ in range(3):
                row = self.core(row).tanh()
            return row.sum(-1)

        return torch.vmap(run)(x)


@pytest.mark.parametrize("kind", [OneStepMapped, AllMapped])
def test_a_body_inside_vmap_is_called_that(kind: Callable[[], Elsewhere]) -> None:
    model = kind()
    with pytest.raises(
        UnsupportedUseError, match=r"used inside torch\.vmap or torch\.func.*on the whole batch instead"
    ):
        attach(model, body=model.core, sketch_size=8).featurize([torch.randn(4, WIDTH)], loss)

"""Complex operands made of real parameters: gradients stay complex until they are back at the parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import zoo
from compare import compare
from stepinfluence import LossError, attach
from stepinfluence.search import rerank
from torch import Tensor, nn
from torch.nn import functional as F

HALF = zoo.D // 2


def pairs(h: Tensor) -> Tensor:
    return torch.view_as_complex(h.unflatten(-1, (-1, 2)).contiguous())


def real(z: Tensor) -> Tensor:
    return torch.view_as_real(z).flatten(-2).tanh()


WAYS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "matmul": lambda z, w: z @ w,
    "matmul, conjugate": lambda z, w: z @ w.conj(),
    "adjoint": lambda z, w: z @ w.mH,
    "weight on the left": lambda z, w: (w @ z.mT).mT,
    "F.linear": F.linear,
    "F.linear with a complex bias": lambda z, w: F.linear(z, w, w[1]),
    "addmm": lambda z, w: torch.addmm(w[0], z.flatten(0, 1), w).view(z.shape),
    "matrix and vector": lambda z, w: z + (z @ w[0]).unsqueeze(-1),
    "elementwise": lambda z, w: z * w[0] + w[1].conj() / (2 + w[2].abs()),
    "imaginary part of a conjugate": lambda z, w: z * w.conj().imag[1] + w.real[0],
    "rows by index": lambda z, w: z * w[(z.abs().sum(-1) * 9).long() % HALF],
    "rows of a conjugate by index": lambda z, w: z + w.conj()[(z.abs().sum(-1) * 9).long() % HALF],
    "einsum": lambda z, w: torch.einsum("bti,ij->btj", z, w),
    "real parts apart": lambda z, w: torch.complex(z.real @ w.real, z.imag @ w.imag),
    "spectrum": lambda z, w: torch.fft.ifft(torch.fft.fft(z, dim=1) * w[0], dim=1),
}


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_complex_operands(name: str, dtype: torch.dtype) -> None:
    def forward(core: Any, h: Tensor) -> Tensor:
        return real(WAYS[name](pairs(h), torch.view_as_complex(core.weight)))

    core = zoo.Core(forward, weight=nn.Parameter(0.4 * torch.randn(HALF, HALF, 2)))
    compare(zoo.Looped(core).to(dtype), [zoo.make_batch(3, dtype=dtype), zoo.make_batch(2, 5, dtype=dtype)])


def test_exact_influence_of_pairs_keeps_complex_gradients() -> None:
    """Factors are kept and multiplied there, and no sketch is made."""
    for how in ("matmul, conjugate", "rows by index", "elementwise", "F.linear with a complex bias"):

        def forward(core: Any, h: Tensor, how: str = how) -> Tensor:
            return real(WAYS[how](pairs(h), torch.view_as_complex(core.weight)))

        model = zoo.Looped(zoo.Core(forward, weight=nn.Parameter(0.4 * torch.randn(HALF, HALF, 2)))).double()
        batch = zoo.make_batch(3, dtype=torch.float64)
        exact = compare(model, [batch]).gradients
        capture = attach(model, body="core", sketch_size=16)
        found = rerank(capture, zoo.squared_error, [batch], [batch], progress=False)
        expected = torch.einsum("nd,qtd->nqt", exact.sum(1), exact)
        torch.testing.assert_close(found.sdi, expected, rtol=1e-9, atol=1e-12)


def test_complex_losses_are_refused() -> None:
    model = zoo.Looped(zoo.LAYERS["mlp"]())
    with pytest.raises(LossError, match=r"loss_fn: returned torch\.complex64; return real losses"):
        attach(model, body="core").featurize(
            [zoo.make_batch(3)], lambda m, b: zoo.squared_error(m, b) * torch.tensor(1j)
        )

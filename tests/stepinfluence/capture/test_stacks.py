"""Matrices that lie in one parameter of more dimensions, side by side: of experts, of heads, of groups of channels."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import zoo
from compare import compare
from stepinfluence.capture.recording import dense
from torch import Tensor
from torch.nn import functional as F

pytestmark = pytest.mark.numeric

TOKENS, WIDE = 4, zoo.D + 3

# Each a run of entries of the parameter (2, D, WIDE), in some order of its dimensions.
RUNS: dict[str, Callable[[zoo.Core, Tensor], Tensor]] = {
    "x @ P[e]": lambda s, x: x @ s.p[1],
    "linear of P[e].T": lambda s, x: F.linear(x, s.p[1].T),
    "linear of P.mT[e]": lambda s, x: F.linear(x, s.p.mT[1]),
    "x @ P of a transposed stack": lambda s, x: x @ s.p.transpose(1, 2).unbind(0)[1].mT,
    "all of a stack": lambda s, x: sum(F.linear(x, m) for m in s.p.permute(0, 2, 1).unbind()),
    "P[e] @ x": lambda s, x: (s.p[1].T @ x.mT).mT,
    "transposed by einsum": lambda s, x: torch.einsum("btm,fm->btf", x, s.p.mT[0]),
    "lookup in P[e]": lambda s, x: F.embedding((x[..., 0] > 0).long() + 1, s.p[1]),
    "index of P[e]": lambda s, x: s.p[0][(x[..., 0] > 0).long()],
    "lookup in P[e].T": lambda s, x: F.pad(F.embedding((x[..., 0] > 0).long() + 1, s.p[1].T), (0, 3)),
    "all of P as one table": lambda s, x: F.embedding((x[..., 0] > 0).long(), s.p.flatten(1)).narrow(-1, 2, WIDE),
}
# No run: matrices with gaps between their entries.
OTHERS: dict[str, Callable[[zoo.Core, Tensor], Tensor]] = {
    "columns of P[e]": lambda s, x: F.pad(x @ s.p[1][:, 2:5], (0, WIDE - 3)),
    "every second column": lambda s, x: F.pad(x @ s.p[1][:, ::2], (0, 3)),
    "lookup in some columns": lambda s, x: F.pad(F.embedding((x[..., 0] > 0).long(), s.p[1][:, 1:4]), (0, WIDE - 3)),
}


def body(use: Callable[[zoo.Core, Tensor], Tensor]) -> zoo.Core:
    return zoo.Core(lambda s, x: (x + use(s, x)[..., : zoo.D]).tanh(), p=zoo.normal(2, zoo.D, WIDE))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", [*RUNS, *OTHERS])
def test_one_matrix_of_a_stack(name: str, dtype: torch.dtype) -> None:
    model = zoo.Looped(body((RUNS | OTHERS)[name]), steps=2).to(dtype)
    compare(model, [zoo.make_batch(size, TOKENS, dtype=dtype) for size in (3, TOKENS)])


@pytest.mark.parametrize("name", RUNS)
def test_a_run_of_entries_needs_no_autograd(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense, "pull_back", lambda *_: pytest.fail("gradients were taken back through autograd"))
    model = zoo.Looped(body(RUNS[name]), steps=2).double()
    compare(model, [zoo.make_batch(3, TOKENS, dtype=torch.float64)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("equation", ["bthk,hkj->bthj", "bthk,hjk->bthj", "bthk,khj->bthj", "bthk,jhk->bthj",
                                      "bthk,jkh->bthj", "hkj,bthk->bthj"])  # fmt: skip
@pytest.mark.parametrize("heads", [2, 3])
def test_a_matrix_for_each_head(heads: int, equation: str, dtype: torch.dtype) -> None:
    """In single precision and less, where the compiled kernels are at work."""
    sizes = {"h": heads, "k": zoo.D // heads, "j": zoo.D // heads}
    names = next(part for part in equation.partition("->")[0].split(",") if "b" not in part)

    def run(s: zoo.Core, x: Tensor) -> Tensor:
        x = x.unflatten(-1, (heads, -1))
        return torch.einsum(equation, *((s.p, x) if equation.startswith("hkj") else (x, s.p))).flatten(2).tanh()

    model = zoo.Looped(zoo.Core(run, p=zoo.normal(*(sizes[c] for c in names))), steps=2).to(dtype)
    compare(model, [zoo.make_batch(size, TOKENS, dtype=dtype) for size in (3, TOKENS)])


@pytest.mark.parametrize("groups", [2, 3, zoo.D])
def test_convolution_in_groups(groups: int) -> None:
    convolution = torch.nn.Conv1d(zoo.D, zoo.D, 3, padding=1, groups=groups)
    core = zoo.Core(lambda s, x: s.conv(x.mT).mT.tanh(), conv=convolution)
    compare(zoo.Looped(core, steps=2), [zoo.make_batch(size, TOKENS) for size in (3, TOKENS)])

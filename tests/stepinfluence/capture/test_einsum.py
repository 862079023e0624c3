"""einsum of data and a parameter, however its letters are ordered.

Sizes that are equal hide a transposed parameter from every check of shapes; those that differ make it fail.
"""

from __future__ import annotations

import pytest
import torch
import zoo
from compare import compare
from torch import Tensor
from torch.nn import functional as F

pytestmark = pytest.mark.numeric

TOKENS = 4
SIZES = {"b": 0, "t": TOKENS, "s": TOKENS, "c": 2, "d": 3, "m": zoo.D}
"""By letter; any other letter (of features that the parameter adds) has the size that the test adds."""

EQUATIONS = [
    "btm,mf->btf", "btm,fm->btf", "mf,btm->btf", "fm,btm->btf", "btm,mf->bft", "btm,fm->fbt", "...m,fm->...f",
    "...m,mf->...f", "btm,fm", "btm,mf", "btcd,cdf->btf", "btcd,fcd->btf", "btcd,fdc->btf", "btcd,dcf->btf",
    "btcd,cfd->btf", "btm,mfg->btfg", "btm,fgm->btfg", "btm,fmg->btgf", "btcd,df->btcf", "btcd,fd->btfc",
    "btcd,cdf->btcf", "btcd,cfd->btcf", "btcd,fcd->btfc", "btm,st->bsm", "btm,ts->bsm", "st,btm->sbm",
]  # fmt: skip


def core(equation: str, added: int) -> zoo.Core:
    given, _, result = equation.replace("...", "bt").partition("->")
    left, right = given.split(",")
    at_right = "b" in left
    of_data, of_parameter = (left, right) if at_right else (right, left)
    result = result or "".join(sorted(c for c in left + right if (left + right).count(c) == 1))
    tokens = "t" if "t" in result else "s"
    cut = [SIZES[c] for c in of_data[2:]]

    def run(s: zoo.Core, x: Tensor) -> Tensor:
        x = x.unflatten(-1, cut)
        y = torch.einsum(equation, *((x, s.p) if at_right else (s.p, x)))
        y = y.movedim((result.index("b"), result.index(tokens)), (0, 1)).flatten(2)
        return F.pad(y, (0, zoo.D))[..., : zoo.D].tanh()

    return zoo.Core(run, p=zoo.normal(*(SIZES.get(c, added) for c in of_parameter)))


CASES = [(e, zoo.D) for e in EQUATIONS] + [(e, 4) for e in EQUATIONS if set(e) & set("fg")]


@pytest.mark.parametrize(("equation", "added"), CASES)
def test_letters_in_any_order(equation: str, added: int) -> None:
    model = zoo.Looped(core(equation, added), steps=2).double()
    compare(model, [zoo.make_batch(size, TOKENS, dtype=torch.float64) for size in (3, TOKENS)])

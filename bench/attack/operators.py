"""Operators called directly with what does not belong together: refused before a kernel reads memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any, TypeAlias

from bench.attack.campaign import Attack, Campaign
from bench.attack.verdicts import SAME, SILENT, UNJUST, Verdict, judged

Arguments: TypeAlias = dict[str, Any]
REFUSALS = (ValueError, TypeError, IndexError)
NAMES = ("linear", "matrix", "embedding", "vector", "scaled_vector")


def call_of(rng: Random, name: str) -> Arguments:
    """Arguments of an operator that belong together."""
    import torch

    from sdi_kernels import TensorSketch

    rows, tokens = rng.randrange(1, 4), rng.randrange(1, 5)
    d_out, d_in, m = rng.randrange(2, 40), rng.randrange(2, 40), rng.choice((8, 16, 33, 64))
    made = torch.Generator().manual_seed(rng.randrange(2**31))

    def floats(*shape: int) -> Any:
        return torch.randn(*shape, generator=made)

    tables = [table.clone() for table in TensorSketch(d_out, d_in, m, hashing="iid", seed=rng.randrange(9)).tables()]
    out, one_side = torch.zeros(rows, m), tables[3:]
    if name == "linear":
        metric = floats(d_out, d_in).abs() if rng.random() < 0.3 else None
        sides = {"activations": floats(rows, tokens, d_in), "grad_outputs": floats(rows, tokens, d_out)}
        return {"out": out, **sides, "tables": tables, "m": m, "route": "direct", "metric": metric}
    if name == "matrix":
        return {"out": out, "grads": floats(rows, d_out, d_in), "tables": tables, "m": m, "metric": None}
    if name == "embedding":
        ids = torch.randint(d_out, (rows, tokens), generator=made)
        return {"out": out, "token_ids": ids, "grad_outputs": floats(rows, tokens, d_in), "tables": tables, "m": m}
    if name == "vector":
        return {"out": out, "grads": floats(rows, tokens, d_in), "tables": one_side, "m": m}
    scaled = {"grads": floats(rows, tokens, d_in), "factors": floats(rows, tokens, d_in)}
    return {"out": out, **scaled, "center": None, "scale": floats(rows, tokens), "tables": one_side, "m": m}


def wrong_table(rng: Random, call: Arguments) -> str:
    """One table made wrong; what was done."""
    import torch

    tables = call["tables"]
    place = rng.randrange(len(tables))
    table = tables[place].clone()
    kind = rng.randrange(9)
    if kind == 0:
        del tables[place]
        return "a table missing"
    if kind == 1:
        table.view(-1)[rng.randrange(table.numel())] += (
            rng.choice((1000, 10**6, 2**30)) if table.dtype != torch.int8 else 3
        )
        tables[place] = table
        return "an entry beyond"
    if kind == 2:
        table.view(-1)[rng.randrange(table.numel())] = (
            rng.choice((-100, -128)) if table.dtype == torch.int8 else -(2**20)
        )
        tables[place] = table
        return "an entry below"
    if kind == 3:
        tables[place] = table.long()
        return "a table in int64"
    if kind == 4:
        tables[place] = table[:-1]
        return "a short table"
    if kind == 5:
        tables[place] = torch.cat([table, table])
        return "a long table"
    if kind == 6:
        tables[place] = table[:0]
        return "an empty table"
    if kind == 7:
        tables[place] = torch.stack([table, table], -1)[..., 0]
        return "a table with gaps"
    call["tables"] = []
    return "no tables"


def wrong_out(rng: Random, call: Arguments) -> str:
    """An ``out`` that is not the right one, or that shares memory; what was done."""
    import torch

    out, m = call["out"], call["m"]
    rows = len(out)
    sharing = next(v for v in call.values() if torch.is_tensor(v) and v.is_floating_point() and v is not out)
    made = {
        "out with a row less": lambda: out[:-1],
        "out with a row more": lambda: torch.zeros(rows + 1, m),
        "narrower out": lambda: out[:, :-1],
        "wider out": lambda: torch.zeros(rows, m + 1),
        "out in float64": lambda: out.double(),
        "out in int32": lambda: out.int(),
        "flat out": lambda: out[0],
        "out on meta": lambda: out.to("meta"),
        "expanded out": lambda: torch.zeros(1, m).expand(rows, m) if rows > 1 else torch.zeros(rows, 1).expand(rows, m),
        "out whose rows overlap": lambda: (
            torch.zeros(rows * m).as_strided((rows + 1 - 1, m), (1, 1)) if rows > 1 else torch.zeros(1, 1).expand(1, m)
        ),
        "out within an input": lambda: _within(sharing, rows, m),
    }
    name = rng.choice(list(made))
    call["out"] = made[name]()
    return name


def _within(value: Any, rows: int, m: int) -> Any:
    """An ``out`` that lies where an input does."""
    import torch

    store = torch.zeros(value.numel() + rows * m)
    store[: value.numel()] = value.flatten()
    value.set_(store.untyped_storage(), 0, value.shape)
    return store[: rows * m].view(rows, m)


def wrong_input(rng: Random, call: Arguments) -> str:
    """An input of another width, length, type or device; what was done."""
    import torch

    names = [k for k, v in call.items() if torch.is_tensor(v) and k != "out"]
    name = rng.choice(names)
    value = call[name]
    changes: dict[str, Callable[[Any], Any]] = {
        "wider": lambda v: torch.cat([v, v], -1),
        "narrower": lambda v: v[..., :-1] if v.shape[-1] > 1 else torch.cat([v, v], -1),
        "a row less": lambda v: v[:-1],
        "of a dimension less": lambda v: v[0],
        "of a dimension more": lambda v: v[None],
        "complex": lambda v: v.to(torch.complex64),
        "bool": lambda v: v.bool(),
        "on meta": lambda v: v.to("meta"),
        "transposed": lambda v: v.mT.contiguous() if v.shape[-1] != v.shape[-2] else v[..., :-1],
    }
    if name == "token_ids":
        changes = {"beyond": lambda v: v + 10**6, "negative": lambda v: v - 10**6, "int32": lambda v: v.int()}
    how = rng.choice(list(changes))
    call[name] = changes[how](value)
    return f"{name} {how}"


def wrong_number(rng: Random, call: Arguments) -> str:
    """Another ``m`` or a route that is none; what was done."""
    if "route" in call and rng.random() < 0.3:
        call["route"] = rng.choice(("dense", "", "shear", "DIRECT"))
        call["m"] += 1
        return f"route {call['route']!r}"
    call["m"] = rng.choice((0, -1, call["m"] + 1, call["m"] - 1, 2**31, 2**40))
    return f"m {call['m']}"


def prepare(folder: Path) -> Attack:
    import torch

    from sdi_kernels import ops

    del folder
    torch.set_num_threads(1)
    operators = {name: getattr(ops, f"{name}_sketch_") for name in NAMES}

    def attack(rng: Random) -> Verdict:
        name = rng.choice(NAMES)
        call = call_of(rng, name)
        if rng.random() < 0.05:
            what, right = "nothing wrong", True
        else:
            wrong = rng.choice((wrong_table, wrong_table, wrong_out, wrong_input, wrong_number))
            what, right = wrong(rng, call), False
        where = f"{name}: {what}"
        _, verdict = judged(lambda: operators[name](*call.values()), REFUSALS, where)
        if right:
            return Verdict(SAME, where) if verdict is None else Verdict(UNJUST, verdict.detail)
        return verdict or Verdict(SILENT, f"{where}: taken")

    return attack


CAMPAIGN = Campaign("operators", "operators called directly with what does not belong together", 0.04, prepare)

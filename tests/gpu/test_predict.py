"""The predictions for a GPU: kept as they are computed, and printed beside what is measured."""

from __future__ import annotations

import json

import pytest
import torch

from bench.gpu import predict, report
from bench.gpu.layers import Case, cases


def test_the_kept_table_is_what_the_model_says() -> None:
    """Else ``python -m bench.gpu.predict --keep`` was not run after a change."""
    kept = json.loads(predict.RESULT.read_text(encoding="utf-8"))
    assert kept.pop("provenance")["command"] == "python -m bench.gpu.predict"
    assert kept == json.loads(json.dumps(predict.table()))
    assert [goal["met"] for goal in predict.goals(kept["rows"])] == [goal["met"] for goal in kept["goals"]]


def test_every_benchmark_shape_is_predicted() -> None:
    assert set(predict.kept()) == {
        predict.key({**case._asdict(), "dtype": str(case.dtype)[6:], "rows": case.rows}) for case in cases()
    }


def test_the_busiest_part_binds() -> None:
    for row in predict.kept().values():
        for route in row["routes"].values():
            parts = route["parts_ms"]
            assert parts[route["bound"]] == max(parts.values()) <= route["ms"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_more_of_anything_takes_longer(dtype: torch.dtype) -> None:
    small, large = Case(768, 768, 128, 2048, dtype), Case(4096, 4096, 128, 2048, dtype)
    for route in (predict.fft, predict.direct):
        assert route(small)["ms"] < route(large)["ms"]
        assert route(small)["ms"] < route(small._replace(tokens=4 * 256 * 128))["ms"]


def test_measured_over_predicted() -> None:
    row = next(iter(predict.kept().values()))
    ms = row["routes"]["fft"]["ms"]
    record = {
        **{name: row[name] for name in ("d_out", "d_in", "tokens", "m", "dtype", "rows")},
        "ms": {"fft": 1.5 * ms},
    }
    assert report.over_predicted(record, predict.kept()) == {"fft": f"1.50 ({row['routes']['fft']['bound']})"}
    assert report.over_predicted({**record, "m": 3}, predict.kept()) == {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_looped_gpt_trades_a_product_for_a_sketch(dtype: torch.dtype) -> None:
    found = predict.looped_gpt(dtype)
    assert found["predicted"] > 2 / 3
    assert found["met"] == (found["predicted"] <= 1)

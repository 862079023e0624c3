"""Looped models that no one here wrote: ALBERT and HRM-text from ``transformers``."""

from __future__ import annotations

import pytest
import torch
from compare import compare
from language import VOCABULARY, language_batch, language_loss
from torch import nn

pytestmark = pytest.mark.numeric

transformers = pytest.importorskip("transformers")


def albert(attention: str, groups: int = 1) -> nn.Module:
    config = transformers.AlbertConfig(
        vocab_size=VOCABULARY, embedding_size=4, hidden_size=8, num_hidden_layers=4, num_hidden_groups=groups,
        num_attention_heads=2, intermediate_size=12, inner_group_num=1, max_position_embeddings=8,
        attn_implementation=attention,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.AlbertForMaskedLM(config).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_albert(attention: str, dtype: torch.dtype) -> None:
    model = albert(attention).to(dtype)
    batches = [language_batch(3), language_batch(5), language_batch(2)]
    result = compare(model, batches, language_loss, body=["albert.encoder.albert_layer_groups.0"])
    assert result.sketches.values.shape[1] == 4


def test_albert_in_two_groups() -> None:
    groups = "albert.encoder.albert_layer_groups"
    result = compare(albert("eager", 2), [language_batch(3)], language_loss, body=[groups])
    assert result.sketches.values.shape[1] == 2
    compare(
        albert("eager", 2), [language_batch(3)], language_loss, body=[f"{groups}.0", f"{groups}.1"], loop="timeline"
    )


def hrm_text() -> nn.Module:
    config = transformers.HrmTextConfig(
        vocab_size=VOCABULARY, hidden_size=8, intermediate_size=12, num_attention_heads=2, num_key_value_heads=2,
        head_dim=4, num_layers_per_stack=1, H_cycles=2, L_cycles=2, max_position_embeddings=16, pad_token_id=0,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.HrmTextForCausalLM(config).eval()


@pytest.mark.skipif(not hasattr(transformers, "HrmTextConfig"), reason="this transformers has no HRM-text")
@pytest.mark.parametrize("loop", ["entries", "timeline"])
def test_hrm_text(loop: str) -> None:
    model = hrm_text()
    batches = [language_batch(3), language_batch(2)]
    compare(model, batches, language_loss, body=["model.H_module", "model.L_module"], loop=loop)

"""Mixtures of experts whose matrices are one stack: grouped products, and published models in all their ways.

Experts' matrices are picked by a 0-d index (eager), looked up for every token (batched), or met by runs of sorted
tokens (grouped). The oracle runs single examples through the eager form.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import zoo
from compare import compare
from language import VOCABULARY, language_batch, language_loss
from stepinfluence import UnsupportedUseError, attach
from torch import Tensor, nn
from torch.nn import functional as F
from zoo import D, normal

pytestmark = pytest.mark.numeric

EXPERTS = 3
WIDTH = 8  # torch asks for rows of a multiple of 16 bytes
GROUPED = [f for f in (getattr(torch, "_grouped_mm", None), getattr(F, "grouped_mm", None)) if f is not None]


def one_by_one(x: Tensor, stack: Tensor, offs: Tensor, **_: Any) -> Tensor:
    """What a grouped product is."""
    ends = offs.tolist()
    parts = [x[a:b] @ stack[k] for k, (a, b) in enumerate(zip([0, *ends], ends, strict=False))]
    return torch.cat(parts)


class Grouped(nn.Module):
    """Sorts tokens by expert and multiplies each run by its expert's matrix."""

    def __init__(self, product: Any, form: str) -> None:
        super().__init__()
        self.product, self.form = product, form
        self.gate = nn.Linear(D, EXPERTS)
        self.w = normal(EXPERTS, WIDTH, WIDTH)
        if form == "frozen":
            self.w.requires_grad_(False)

    def weight(self) -> Tensor:
        return {
            "as it is": lambda: self.w,
            "transposed": lambda: self.w.transpose(-2, -1),
            "computed": lambda: self.w.tanh(),
            "empty group": lambda: self.w,
            "frozen": lambda: self.w,
            "part": lambda: torch.cat([self.w[1:], self.w[:1]]),
        }[self.form]()

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, D)
        weights, choice = self.gate(flat).softmax(-1).max(-1)
        if self.form == "empty group":
            choice = torch.where(choice == 1, 2, choice)
        order = choice.argsort(stable=True)
        offs = torch.bincount(choice, minlength=EXPERTS).cumsum(0).to(torch.int32)
        out = self.product(F.pad(flat[order], (0, WIDTH - D)), self.weight(), offs=offs)[:, :D]
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order))
        return (out[back] * weights.unsqueeze(-1)).view_as(x).tanh()


BATCHES = [zoo.make_batch(size, tokens, seed=size) for size, tokens in ((3, 4), (4, 3), (1, 5))]


@pytest.mark.parametrize("form", ["as it is", "transposed", "computed", "empty group", "frozen", "part"])
@pytest.mark.parametrize("product", GROUPED)
def test_grouped_products(product: Any, form: str) -> None:
    torch.manual_seed(5)
    grouped, plain = zoo.Looped(Grouped(product, form)), zoo.Looped(Grouped(one_by_one, form))
    plain.load_state_dict(grouped.state_dict())
    result = compare(grouped, BATCHES, plain=plain, exact=False)
    assert result.capture.owners == "followed"


@pytest.mark.skipif(not GROUPED, reason="this torch has no grouped products")
def test_other_grouped_forms_are_refused() -> None:
    def biased(core: Any, x: Tensor) -> Tensor:
        flat = x.reshape(-1, D)
        offs = torch.tensor([len(flat) // 2, len(flat)], dtype=torch.int32)
        return GROUPED[-1](flat, core.w, offs=offs, bias=core.b).view_as(x).tanh()

    def columns(core: Any, x: Tensor) -> Tensor:
        flat = x.reshape(-1, D)
        offs = torch.tensor([D // 2, D], dtype=torch.int32)
        return flat @ GROUPED[-1](core.v, core.v, offs=offs).sum(0) + GROUPED[-1](flat, core.v, offs=offs).sum()

    for core in (zoo.Core(biased, w=normal(2, D, D), b=normal(D)), zoo.Core(columns, v=normal(D, D))):
        with pytest.raises((UnsupportedUseError, RuntimeError)):
            attach(zoo.Looped(core), body="core", sketch_size=16).featurize(BATCHES, zoo.squared_error)


SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 32,
}
JAMBA = {
    "num_experts": 3, "num_hidden_layers": 2, "expert_layer_period": 1, "expert_layer_offset": 0,
    "attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False, "mamba_d_state": 4, "mamba_dt_rank": 3,
}  # fmt: skip
QWEN = {"num_experts": 3, "num_hidden_layers": 1, "moe_intermediate_size": 24, "head_dim": 8, "decoder_sparse_step": 1}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "Mixtral": ("MixtralForCausalLM", {"num_local_experts": 3, "num_hidden_layers": 1}),
    "Qwen3Moe": ("Qwen3MoeForCausalLM", QWEN),
    "Jamba": ("JambaForCausalLM", JAMBA),
    "Olmoe": ("OlmoeForCausalLM", {"num_experts": 3, "num_hidden_layers": 1}),
}


def looped(name: str, experts: str) -> nn.Module:
    """A published model whose layers are applied twice."""
    transformers = pytest.importorskip("transformers")
    kind, options = MODELS[name]
    config = getattr(transformers, f"{name}Config")(
        **SIZES, **options, attn_implementation="eager", experts_implementation=experts
    )
    torch.manual_seed(0)
    model: Any = getattr(transformers, kind)(config).eval()
    model.model.layers = nn.ModuleList([*model.model.layers] * 2)
    config.use_cache = False
    config.num_hidden_layers *= 2
    return model  # type: ignore[no-any-return]


@pytest.mark.parametrize("experts", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("name", MODELS)
def test_published_mixtures(name: str, experts: str) -> None:
    make: Callable[[str], nn.Module] = lambda how: looped(name, how)  # noqa: E731
    model, plain = make(experts), make("eager")
    # Grouped products are for single precision; the others are compared in double.
    if experts != "grouped_mm":
        model, plain = model.double(), plain.double()
    layers = MODELS[name][1]["num_hidden_layers"]
    body = [f"model.layers.{k}" for k in range(layers)]
    result = compare(
        model, [language_batch(3), language_batch(2)], language_loss, body=body, plain=plain, exact=experts == "eager"
    )
    assert result.sketches.values.shape[1] == 2
    assert result.capture.owners == "followed"

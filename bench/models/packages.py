"""Looped models from packages that others publish, installed by name (``requirements.txt``)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.models.cases import Case, Task

VOCABULARY = 64


def tokens(large: bool) -> Tensor:
    torch.manual_seed(0)
    return torch.randint(3, VOCABULARY, (8, 64) if large else (3, 6))


def language_loss(model: Any, batch: Tensor) -> Tensor:
    out = model(input_ids=batch, use_cache=False) if "use_cache" in model.config.to_dict() else model(input_ids=batch)
    return F.cross_entropy(out.logits.transpose(1, 2), batch, reduction="none").mean(1)


def sizes(large: bool, **more: Any) -> dict[str, Any]:
    width = 256 if large else 16
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_attention_heads": 4 if large else 2,
        "max_position_embeddings": 64,
        **more,
    }


def albert(large: bool) -> Task:
    import transformers

    torch.manual_seed(0)
    config = transformers.AlbertConfig(**sizes(large, embedding_size=16, num_hidden_layers=4, num_hidden_groups=1))
    model = transformers.AlbertForMaskedLM(config).eval()
    return Task(model, tokens(large), ["albert.encoder.albert_layer_groups.0"], language_loss)


def mixture(kind: str, experts: str, **options: Any) -> Any:
    """A published mixture of experts, its layer applied twice."""

    def make(large: bool) -> Task:
        import transformers

        torch.manual_seed(0)
        given = sizes(large, num_key_value_heads=2, num_experts_per_tok=2, num_hidden_layers=1, **options)
        config = getattr(transformers, f"{kind}Config")(**given, experts_implementation=experts)
        model: Any = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
        model.model.layers = nn.ModuleList([*model.model.layers] * 2)
        config.num_hidden_layers = 2
        return Task(model, tokens(large), ["model.layers.0"], language_loss)

    return make


def recursive(large: bool) -> Task:
    import tiny_recursive_model as trm

    batch, width = tokens(large), 256 if large else 16
    torch.manual_seed(0)
    network = trm.MLPMixer1D(dim=width, depth=1, seq_len=batch.shape[1])
    model = trm.TinyRecursiveModel(
        dim=width, num_tokens=VOCABULARY, network=network, num_refinement_blocks=2, num_latent_refinements=3
    )

    def loss(given: Any, ids: Tensor) -> Tensor:
        predictions = given(ids, *given.get_initial())[2]
        return F.cross_entropy(predictions.transpose(1, 2), ids, reduction="none").mean(1)

    return Task(model.eval(), batch, ["network"], loss)


class Encoder(nn.Module):
    """x-transformers' encoder, applied three times."""

    def __init__(self, width: int) -> None:
        super().__init__()
        from x_transformers import Encoder as Layers

        self.embed = nn.Embedding(VOCABULARY, width)
        heads = 4 if width > 16 else 2  # rotary embeddings want heads of more than four features
        self.core = Layers(dim=width, depth=1, heads=heads, attn_dim_head=width // heads, rotary_pos_emb=True)
        self.head = nn.Linear(width, VOCABULARY)

    def forward(self, ids: Tensor) -> Tensor:
        state = injected = self.embed(ids)
        for _ in range(3):
            state = self.core(state) + injected
        out: Tensor = self.head(state)
        return out


def encoder(large: bool) -> Task:
    def loss(given: Any, ids: Tensor) -> Tensor:
        return F.cross_entropy(given(ids).transpose(1, 2), ids, reduction="none").mean(1)

    torch.manual_seed(0)
    return Task(Encoder(256 if large else 16).eval(), tokens(large), ["core"], loss)


HF = ("transformers",)
QWEN = {"num_experts": 4, "decoder_sparse_step": 1}
CASES = [
    Case("ALBERT (transformers)", "one layer, four times", albert, HF),
    *(
        Case(f"Mixtral (transformers), {how}", "a layer of four experts, twice",
             mixture("Mixtral", how, num_local_experts=4), HF)
        for how in ("eager", "batched_mm", "grouped_mm")
    ),
    *(
        Case(f"Qwen3-MoE (transformers), {how}", "a layer of four experts, twice",
             mixture("Qwen3Moe", how, **QWEN), HF)
        for how in ("eager", "batched_mm", "grouped_mm")
    ),
    Case("TRM (tiny-recursive-model)", "a mixer for latents and outputs", recursive, ("tiny_recursive_model",)),
    Case("encoder (x-transformers)", "a layer with rotary attention, three times", encoder, ("x_transformers",)),
]  # fmt: skip

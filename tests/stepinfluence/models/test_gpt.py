"""The looped GPT: the paper's size, steps, truncated BPTT, injection, rotation, loop-count sampling."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from stepinfluence.models import Block, BlockConfig, LoopedGPT, LoopedGPTConfig, gpt_loss, sample_loop_counts
from stepinfluence.models.blocks import rotary_table
from torch import Tensor

pytestmark = pytest.mark.usefixtures("in_float64")

TINY = LoopedGPTConfig.tiny()


def tiny_model(**changes: Any) -> LoopedGPT:
    torch.manual_seed(0)
    return LoopedGPT(replace(TINY, **changes))


def random_batch(batch: int = 3, tokens: int = 16) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    shape = (batch, tokens)
    return {
        "tokens": torch.randint(TINY.vocab_size, shape, generator=generator),
        "targets": torch.randint(TINY.vocab_size, shape, generator=generator),
    }


def core_outputs(model: LoopedGPT, batch: dict[str, Tensor]) -> list[Tensor]:
    """What each entry of the loop body returned; gradients kept where there is a graph."""
    states: list[Tensor] = []

    def keep(_: object, __: object, output: Tensor) -> None:
        if output.requires_grad:
            output.retain_grad()
        states.append(output)

    handle = model.core.register_forward_hook(keep)
    gpt_loss(model, batch).sum().backward()
    handle.remove()
    return states


def test_paper_config_has_135m_parameters() -> None:
    config = LoopedGPTConfig.paper()
    with torch.device("meta"):
        model = LoopedGPT(config)
    d, vocab = config.d_model, config.vocab_size
    total = sum(p.numel() for p in model.parameters())
    assert total == 2 * vocab * d + 8 * 12 * d * d + 2 * d * d == 135_069_696
    assert round(total / 1e6, 1) == 135.1
    assert config.effective_depth == 132
    assert sum(p.numel() for p in model.core.parameters()) == 4 * 12 * d * d + 2 * d * d
    assert (config.steps, config.sequence_len, config.bptt_k) == (32, 128, None)


def test_large_config_has_1_3b_parameters() -> None:
    config = LoopedGPTConfig.large()
    with torch.device("meta"):
        model = LoopedGPT(config)
    d, vocab = config.d_model, config.vocab_size
    total = sum(p.numel() for p in model.parameters())
    assert total == 2 * vocab * d + 22 * 12 * d * d + 2 * d * d == 1_321_730_048
    assert sum(p.numel() for p in model.core.parameters()) == 18 * 12 * d * d + 2 * d * d
    assert (config.steps, config.effective_depth, d // config.n_heads) == (12, 220, 128)


def test_shapes_and_steps() -> None:
    model = tiny_model()
    batch = random_batch()
    states = core_outputs(model, batch)
    assert len(states) == TINY.steps
    assert model(batch["tokens"]).shape == (3, 16, TINY.vocab_size)
    assert model(batch["tokens"][:, :5], steps=9).shape == (3, 5, TINY.vocab_size)
    assert gpt_loss(model, batch).shape == (3,)
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())


def test_steps_matter_and_the_state_stays_bounded() -> None:
    model = tiny_model()
    tokens = random_batch()["tokens"]
    assert (model(tokens, steps=1) - model(tokens, steps=2)).abs().max() > 1e-3
    assert torch.isfinite(model(tokens, steps=200)).all()


def test_future_tokens_do_not_matter() -> None:
    model = tiny_model()
    tokens = random_batch()["tokens"]
    changed = tokens.clone()
    changed[:, 10:] = (changed[:, 10:] + 1) % TINY.vocab_size
    torch.testing.assert_close(model(tokens)[:, :10], model(changed)[:, :10])
    assert (model(tokens)[:, 10:] - model(changed)[:, 10:]).abs().max() > 1e-3


def test_truncated_bptt_has_no_early_gradient() -> None:
    batch = random_batch()
    full = tiny_model()
    everything = core_outputs(full, batch)
    assert all(state.grad is not None and state.grad.abs().max() > 0 for state in everything)

    truncated = tiny_model(bptt_k=2)
    states = core_outputs(truncated, batch)
    assert [state.requires_grad for state in states] == [False, False, True, True]
    torch.testing.assert_close(states[-1], everything[-1])  # the forward pass is the same

    # The gradient is that of the last two steps alone, started from a constant state.
    torch.testing.assert_close(states[-1].grad, everything[-1].grad)
    for name, parameter in truncated.coda.named_parameters():
        torch.testing.assert_close(parameter.grad, full.coda.get_parameter(name).grad)
    assert truncated.core.adapter.weight.grad is not None
    assert not torch.allclose(truncated.core.adapter.weight.grad, full.core.adapter.weight.grad)


def test_truncated_bptt_is_detaching() -> None:
    """Against the definition in D.5: the state detached before the last k iterations."""
    batch = random_batch()
    model = tiny_model(bptt_k=3)
    gpt_loss(model, batch).sum().backward()
    got = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    entries = 0

    def detach(_: object, args: tuple[Any, ...]) -> tuple[Any, ...]:
        nonlocal entries
        entries += 1
        return (args[0].detach() if entries == TINY.steps - 3 + 1 else args[0], *args[1:])

    model.core.register_forward_pre_hook(detach)
    logits = model(batch["tokens"], bptt_k=TINY.steps)  # no truncation but the hook's
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten()).mul(3).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(got[name], parameter.grad, msg=name)


def test_no_grad_stays_off() -> None:
    model = tiny_model(bptt_k=2)
    with torch.no_grad():
        assert not model(random_batch()["tokens"]).requires_grad


@pytest.mark.parametrize("injection", ["adapter", "add", "none"])
@pytest.mark.parametrize("start", ["zeros", "noise", "prelude"])
def test_injection_and_start(injection: str, start: str) -> None:
    if injection == "none" and start != "prelude":
        with pytest.raises(ValueError, match=r"^initial_state: got '.*' with injection='none'"):
            tiny_model(injection=injection, initial_state=start)
        return
    model = tiny_model(injection=injection, initial_state=start)
    assert hasattr(model.core, "adapter") == (injection == "adapter")
    tokens = random_batch()["tokens"]
    first = model(tokens, generator=torch.Generator().manual_seed(5))
    again = model(tokens, generator=torch.Generator().manual_seed(5))
    other = model(tokens, generator=torch.Generator().manual_seed(6))
    assert torch.equal(first, again)
    assert torch.equal(first, other) == (start != "noise")


def test_zero_init_is_nanochats() -> None:
    model = tiny_model(zero_init=True)
    assert torch.count_nonzero(model(random_batch()["tokens"])) == 0
    for block in (*model.prelude, *model.core.blocks, *model.coda):
        assert isinstance(block, Block)
        assert all(torch.count_nonzero(projection.weight) == 0 for projection in block.residual_projections())


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm", "rmsnorm_plain"])
def test_styles_of_the_block(fused: bool, norm: Any) -> None:
    model = tiny_model(fused_qkv=fused, norm=norm)
    gpt_loss(model, random_batch()).sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


def test_rotary_attention_depends_on_distance_alone() -> None:
    """Equal tokens give equal scores at equal distances: shifting a sequence shifts its output."""
    torch.manual_seed(0)
    block = Block(BlockConfig(16, 2, norm="rmsnorm_plain", activation="relu2", bias=False, qk_norm=True))
    cos, sin = rotary_table(12, 8)
    x = torch.randn(1, 6, 16)
    shifted = block(x, (cos[5:11], sin[5:11]))
    torch.testing.assert_close(block(x, (cos, sin)), shifted)
    assert (block(x, (cos, sin)) - block(x)).abs().max() > 1e-3
    with pytest.raises(ValueError, match=r"^d_head: got 3"):
        rotary_table(4, 3)


def test_bidirectional_block_sees_the_future() -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 6, 16)
    y = x.clone()
    y[:, -1] *= -1
    for causal in (True, False):
        block = Block(BlockConfig(16, 2, causal=causal))
        assert torch.equal(block(x)[:, 0], block(y)[:, 0]) == causal


def test_gpt_loss_is_the_mean_over_tokens() -> None:
    model = tiny_model()
    batch = random_batch()
    log_p = model(batch["tokens"]).log_softmax(-1)
    per_token = -log_p.gather(-1, batch["targets"][..., None])[..., 0]
    torch.testing.assert_close(gpt_loss(model, batch), per_token.mean(1))
    mask = torch.zeros(3, 16)
    mask[:, 4:7] = 1
    torch.testing.assert_close(gpt_loss(model, {**batch, "mask": mask}), per_token[:, 4:7].mean(1))
    mask[1] = 0
    with pytest.raises(ValueError, match=r"^mask: examples \[1\] of the batch have no valid token"):
        gpt_loss(model, {**batch, "mask": mask})


@pytest.mark.parametrize(("mean", "sigma"), [(32.0, 0.5), (4.0, 0.5), (8.0, 0.1)])
def test_loop_counts_follow_the_distribution(mean: float, sigma: float) -> None:
    size = 100_000
    counts = sample_loop_counts(mean, size, sigma=sigma, generator=torch.Generator().manual_seed(0)).double()
    variance = mean + mean**2 * math.expm1(sigma**2)
    assert counts.min() >= 1
    assert abs(counts.mean().item() - (mean + 1)) < 5 * math.sqrt(variance / size)
    assert counts.var().item() == pytest.approx(variance, rel=0.05)
    # The rate's median is mean * exp(-sigma^2 / 2), and a Poisson's median is its rate to within 1.
    assert abs(counts.median().item() - 1 - mean * math.exp(-(sigma**2) / 2)) <= 1


def test_loop_counts_are_clipped_and_reproducible() -> None:
    def draw(seed: int) -> Tensor:
        return sample_loop_counts(32, 5000, maximum=64, generator=torch.Generator().manual_seed(seed))

    assert draw(0).dtype == torch.int64
    assert int(draw(0).min()) >= 1
    assert int(draw(0).max()) == 64
    assert torch.equal(draw(0), draw(0))
    assert not torch.equal(draw(0), draw(1))
    for wrong in ({"mean": 0.0}, {"mean": math.inf}, {"sigma": -1.0}, {"size": 0}, {"maximum": 0}):
        (name, value) = next(iter(wrong.items()))
        with pytest.raises(ValueError, match=rf"^{name}: got {value}"):
            sample_loop_counts(**{"mean": 4.0, "size": 3, **wrong})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_heads": 5}, r"^n_heads: 5 heads do not divide d_model=32"),
        ({"n_heads": 32}, r"^n_heads: 32 heads of odd width 1"),
        ({"steps": 0}, r"^steps: got 0; pass a positive int"),
        ({"n_prelude": -1}, r"^n_prelude: got -1; pass a non-negative int"),
        ({"bptt_k": 0}, r"^bptt_k: got 0"),
        ({"injection": "concat"}, r"^injection: got 'concat'; pass one of 'adapter', 'add', 'none'"),
        ({"initial_state": "ones"}, r"^initial_state: got 'ones'"),
        ({"norm": "batch"}, r"^norm: got 'batch'"),
        ({"logit_softcap": -1.0}, r"^logit_softcap: got -1.0"),
        ({"initial_state_std": 0.0}, r"^initial_state_std: got 0.0"),
    ],
)
def test_config_is_checked(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(TINY, **changes)


def test_bad_input_is_refused() -> None:
    model = tiny_model()
    tokens = random_batch()["tokens"]
    with pytest.raises(ValueError, match=r"^tokens: got 17 tokens, the model takes 16"):
        model(torch.zeros(1, 17, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"^tokens: got torch.float32 of shape"):
        model(tokens.float())
    with pytest.raises(ValueError, match=r"^steps: got 0"):
        model(tokens, steps=0)
    with pytest.raises(ValueError, match=r"^bptt_k: got -1"):
        model(tokens, bptt_k=-1)
    with pytest.raises(TypeError, match=r"^d_model: got float 32.0"):
        replace(TINY, d_model=32.0)  # type: ignore[arg-type]


def test_device_and_dtype_follow_the_model() -> None:
    model = tiny_model(initial_state="noise").to(torch.bfloat16)
    logits = model(random_batch()["tokens"], generator=torch.Generator().manual_seed(0))
    assert logits.dtype == torch.float32  # the loss is computed in full precision, as in nanochat
    assert tiny_model().double()(random_batch()["tokens"]).dtype == torch.float64


def test_rotary_table_is_not_in_the_checkpoint() -> None:
    assert not [name for name in tiny_model().state_dict() if "rotary" in name]

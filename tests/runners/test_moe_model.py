"""The network: routing, experts, causality, initialisation, counts."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from bayeslr.errors import SpecError
from bayeslr_runners.moe import MoeRunner
from bayeslr_runners.moe.experts import (
    grouped_matmul,
    load_balance_loss,
    route,
    router_entropy,
    router_z_loss,
    softmax_over_few,
    swiglu,
    swiglu_experts,
)
from bayeslr_runners.moe.losses import head_loss, token_losses
from bayeslr_runners.moe.model import MoeTransformer
from bayeslr_runners.moe.options import ModelOptions, ScalingOptions
from bayeslr_runners.moe.parametrization import parametrization
from bayeslr_runners.moe.shapes import MoeShape

SHAPE = MoeShape(d_model=16, n_layers=2, n_heads=2, d_expert=8, n_experts=4, top_k=2)
DENSE = MoeShape(d_model=16, n_layers=2, n_heads=2, d_expert=8)


def build(
    shape: MoeShape = SHAPE, vocab_size: int = 50, seed: int = 0, **options
) -> MoeTransformer:
    rules = parametrization("sp", shape, ScalingOptions())
    return MoeTransformer(shape, rules, ModelOptions(**options), vocab_size=vocab_size, seed=seed)


def tokens(num_sequences: int = 3, seq_len: int = 12, vocab_size: int = 50) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randint(0, vocab_size, (num_sequences, seq_len), generator=generator)


def test_load_balance_loss_is_one_at_uniform_routing_in_each_layer() -> None:
    model = build()
    for block in model.blocks:
        torch.nn.init.zeros_(block.moe.router)  # every score 1/E
    _, stats = model(tokens())
    assert len(stats) == SHAPE.n_layers
    for layer in stats:
        assert layer.balance_loss.item() == pytest.approx(1.0, abs=1e-6)
        assert router_entropy(layer.score_TE).item() == pytest.approx(
            math.log(SHAPE.n_experts), abs=1e-5
        )


def test_load_balance_loss_sees_a_layer_that_a_mean_over_layers_would_hide() -> None:
    """Two layers that each use one expert, not the same one: over both, the load is even."""
    losses = [
        load_balance_loss(
            torch.eye(2)[expert].expand(6, 2),
            torch.bincount(torch.tensor([expert] * 6), minlength=2),
        ).item()
        for expert in (0, 1)
    ]
    assert losses == [2.0, 2.0]


def test_balanced_load_has_loss_one_whatever_the_scores() -> None:
    score_TE = torch.softmax(torch.randn(64, 4, generator=torch.Generator().manual_seed(0)), -1)
    assert load_balance_loss(score_TE, torch.full((4,), 16)).item() == pytest.approx(1.0, abs=1e-5)


def test_router_z_loss() -> None:
    assert router_z_loss(torch.zeros(7, 4)).item() == pytest.approx(math.log(4) ** 2, abs=1e-6)


def test_one_expert_equals_the_dense_layer() -> None:
    moe = build(DENSE).blocks[0].moe
    x_TD = torch.randn(10, DENSE.d_model, generator=torch.Generator().manual_seed(1))
    gate, up = (x_TD @ moe.experts_up[0]).chunk(2, dim=-1)
    out_TD, stats = moe(x_TD)
    torch.testing.assert_close(out_TD, (F.silu(gate) * up) @ moe.experts_down[0])
    assert stats is None
    assert moe.router is None


@pytest.mark.parametrize("gates", ["softmax_topk", "sigmoid_topk"])
def test_equal_experts_equal_the_dense_layer_whatever_the_routing(gates: str) -> None:
    moe = build(gates=gates).blocks[0].moe
    with torch.no_grad():
        moe.experts_up.copy_(moe.experts_up[:1].expand_as(moe.experts_up).clone())
        moe.experts_down.copy_(moe.experts_down[:1].expand_as(moe.experts_down).clone())
    x_TD = torch.randn(10, SHAPE.d_model, generator=torch.Generator().manual_seed(1))
    out_TD, _ = moe(x_TD)
    torch.testing.assert_close(out_TD, swiglu(x_TD @ moe.experts_up[0]) @ moe.experts_down[0])


def test_experts_and_their_gradients_equal_a_loop_over_tokens() -> None:
    generator = torch.Generator().manual_seed(2)
    num_tokens, width, hidden, num_experts, top_k = 9, 6, 5, 4, 2

    def leaf(*sizes: int) -> torch.Tensor:
        return torch.randn(*sizes, generator=generator, dtype=torch.float64).requires_grad_()

    x, up, down = leaf(num_tokens, width), leaf(num_experts, width, 2 * hidden), leaf(4, hidden, 6)
    logits = leaf(num_tokens, num_experts)
    leaves = (x, up, down, logits)

    routing = route(torch.softmax(logits, -1), top_k, bias_E=None, normalise=True)
    fast = swiglu_experts(x, routing, up, down)

    weight, chosen = torch.softmax(logits, -1).topk(top_k, dim=-1)
    weight = weight / weight.sum(-1, keepdim=True)
    slow = torch.stack([
        sum(weight[t, k] * (swiglu(x[t] @ up[chosen[t, k]]) @ down[chosen[t, k]])
            for k in range(top_k))
        for t in range(num_tokens)
    ])  # fmt: skip
    torch.testing.assert_close(fast, slow)
    upstream = torch.randn(fast.shape, generator=generator, dtype=torch.float64)
    for got, wanted in zip(
        torch.autograd.grad(fast, leaves, upstream),
        torch.autograd.grad(slow, leaves, upstream),
        strict=True,
    ):
        torch.testing.assert_close(got, wanted)


def test_every_routed_token_is_accounted_for() -> None:
    generator = torch.Generator().manual_seed(3)
    gate_TE = torch.softmax(3 * torch.randn(101, 8, generator=generator), -1)
    routing = route(gate_TE, 3, bias_E=None, normalise=True)
    assert int(routing.load_E.sum()) == 101 * 3
    assert routing.sizes == routing.load_E.tolist()
    assert torch.equal(routing.order_A[routing.inverse_A], torch.arange(101 * 3))
    torch.testing.assert_close(routing.gate_TK.sum(-1), torch.ones(101))
    # Identity experts give back each token, so none is dropped or doubled.
    x_TD = torch.randn(101, 5, generator=generator)
    rows_AD = x_TD.repeat_interleave(3, dim=0)[routing.order_A]
    out_AD = grouped_matmul(rows_AD, torch.eye(5).expand(8, 5, 5).contiguous(), routing)
    torch.testing.assert_close(out_AD[routing.inverse_A].view(101, 3, 5).mean(1), x_TD)


def test_an_idle_expert_gets_a_zero_gradient() -> None:
    gate_TE = torch.tensor([[0.9, 0.1, 0.0]]).repeat(4, 1)
    routing = route(gate_TE, 1, bias_E=None, normalise=False)
    weight = torch.randn(3, 2, 2).requires_grad_()
    grouped_matmul(torch.ones(4, 2), weight, routing).sum().backward()
    assert weight.grad is not None
    assert weight.grad[0].abs().min() > 0
    assert torch.equal(weight.grad[1:], torch.zeros(2, 2, 2))


def test_selection_bias_changes_the_choice_and_not_the_gate() -> None:
    gate_TE = torch.tensor([[0.6, 0.3, 0.1]])
    routing = route(gate_TE, 1, bias_E=torch.tensor([-1.0, 0.0, 0.0]), normalise=False)
    assert routing.load_E.tolist() == [0, 1, 0]
    assert routing.gate_TK.item() == pytest.approx(0.3)


def test_causal_mask() -> None:
    model = build()
    before = tokens()
    after = before.clone()
    after[:, 7] = (after[:, 7] + 1) % 50
    with torch.no_grad():
        change_BS = (model(before)[0] - model(after)[0]).abs().amax(-1)
    assert change_BS[:, :7].max() == 0
    assert change_BS[:, 7:].min(0).values.min() > 0


def test_positions_matter() -> None:
    """Without rotary positions the last logits would not see the order of earlier tokens."""
    model = build(DENSE)
    row = tokens(1)
    swapped = row.clone()
    swapped[0, [2, 5]] = row[0, [5, 2]]
    with torch.no_grad():
        change = (model(row)[0][0, -1] - model(swapped)[0][0, -1]).abs().max()
    assert change > 1e-6


@pytest.mark.parametrize("shape", [SHAPE, DENSE])
def test_loss_at_initialisation_is_ln_vocabulary(shape: MoeShape) -> None:
    model = build(shape, vocab_size=256)
    row_BS = tokens(8, 64, 256)
    with torch.no_grad():
        logits_BSV, _ = model(row_BS)
    loss = F.cross_entropy(logits_BSV[:, :-1].flatten(0, 1), row_BS[:, 1:].flatten())
    assert loss.item() == pytest.approx(math.log(256), abs=0.06)


@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"n_experts": 1, "top_k": 1},
        {"n_shared_experts": 2},
        {"n_layers": 1, "d_expert": 24, "n_experts": 8, "top_k": 3, "n_shared_experts": 1},
    ],
)
@pytest.mark.parametrize("qk_norm", [True, False])
def test_counts_equal_the_models_parameters(extra: dict[str, int], qk_norm: bool) -> None:
    raw = {"name": "s", "d_model": 16, "n_layers": 2, "n_heads": 2, "d_expert": 8, "n_experts": 4,
           "top_k": 2} | extra  # fmt: skip
    shape = MoeShape.from_mapping(raw)
    model = build(shape, qk_norm=qk_norm)
    n_active, n_total = MoeRunner({"qk_norm": qk_norm}).counts(raw)
    embedding_and_head = 2 * 50 * shape.d_model
    assert n_total == sum(p.numel() for p in model.parameters()) - embedding_and_head
    idle = sum(p[shape.top_k :].numel() for n, p in model.named_parameters() if ".experts_" in n)
    assert n_active == n_total - idle


def test_same_seed_same_weights_and_the_global_generator_is_left_alone() -> None:
    before = torch.random.get_rng_state()
    first, again, other = build(seed=1), build(seed=1), build(seed=2)
    assert torch.equal(torch.random.get_rng_state(), before)
    for a, b in zip(first.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(first.head, other.head)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_heads": 3}, r"d_model \(16\) must be a multiple of 2 x n_heads \(6\)"),
        ({"top_k": 5}, r"top_k \(5\) must not exceed n_experts \(4\)"),
        ({"depth": 3}, "unknown key 'depth'; allowed keys are"),
        ({"d_expert": 0}, "d_expert must be a whole number >= 1, got 0"),
        ({"d_model": 16.0}, "d_model must be a whole number >= 1, got 16.0"),
    ],
)
def test_bad_shapes_say_what_is_wrong(change: dict[str, object], message: str) -> None:
    raw = {"name": "tiny", "d_model": 16, "n_layers": 1, "n_heads": 2, "d_expert": 8,
           "n_experts": 4, "top_k": 2} | change  # fmt: skip
    with pytest.raises(SpecError, match=message) as caught:
        MoeRunner({}).counts(raw)
    assert "shape tiny" in str(caught.value)


def test_a_missing_width_is_named() -> None:
    with pytest.raises(SpecError, match="key 'd_expert' is missing"):
        MoeRunner({}).counts({"name": "s", "d_model": 16, "n_layers": 1, "n_heads": 2})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learning_rate": 1}, "unknown key 'learning_rate'"),
        ({"data": "web"}, "data must be one of stdlib, synthetic, path, got 'web'"),
        ({"data": "path"}, "path goes with data = 'path'"),
        ({"threads": 0}, "threads must be finite and >= 1, got 0"),
        ({"lr_multipliers": {"heads": 2.0}}, "lr_multipliers, group must be one of"),
        ({"lr_multipliers": {"router": 0.0}}, "lr_multipliers.router must be finite and > 0"),
        ({"lr_multipliers": {"router": "2"}}, "lr_multipliers.router must be a number, got '2'"),
        ({"lr_multipliers": 3}, "lr_multipliers must be a table of numbers, got 3"),
        ({"base_shape": 3}, "base_shape must be a table or left out, got 3"),
        ({"val_tokens": 32e3}, "val_tokens must be a whole number, got 32000.0"),
        ({"qk_norm": 1}, "qk_norm must be true or false, got 1"),
        ({"threads": True}, "threads must be a whole number or left out, got True"),
        ({"beta1": "0.9"}, "beta1 must be a number, got '0.9'"),
        ({"beta2": 1.0}, r"beta2 must be in \[0, 1\), got 1.0"),
        ({"grad_clip": 0.0}, "grad_clip must be finite and > 0, got 0.0"),
        ({"adam_eps": 0.0}, "adam_eps must be finite and > 0, got 0.0"),
        ({"rope_theta": -1.0}, "rope_theta must be finite and > 0, got -1.0"),
        ({"base_tokens": 0}, "base_tokens must be finite and > 0, got 0"),
        ({"depth_exponent": float("nan")}, "depth_exponent must be finite, got nan"),
        ({"vocab_size": 0}, "vocab_size must be finite and >= 1, got 0"),
        ({"horizon_exponent": -0.3}, "needs base_tokens"),
    ],
)
def test_bad_options_say_what_is_wrong(options: dict[str, object], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        MoeRunner(options)


def test_softmax_over_few_equals_pytorchs_with_its_gradient() -> None:
    generator = torch.Generator().manual_seed(3)
    logits = (20 * torch.randn(2, 7, 11, generator=generator, dtype=torch.float64)).requires_grad_()
    upstream = torch.randn(2, 7, 11, generator=generator, dtype=torch.float64)
    got, wanted = softmax_over_few(logits), torch.softmax(logits, -1)
    torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(
        torch.autograd.grad(got, logits, upstream), torch.autograd.grad(wanted, logits, upstream)
    )


@pytest.mark.parametrize("members", [(), (3,)])
@pytest.mark.parametrize("chunk", [1, 25, 1 << 18])  # 1 row, 5 rows of 5 logits, all rows
def test_head_loss_equals_pytorchs_with_its_gradients(
    members: tuple[int, ...], chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bayeslr_runners.moe.losses.CHUNK_LOGITS", chunk)
    generator = torch.Generator().manual_seed(3)
    x, head = (
        torch.randn(*members, *sizes, generator=generator, dtype=torch.float64).requires_grad_()
        for sizes in ((2, 7, 4), (5, 4))
    )
    target = torch.randint(0, 5, (*members, 2, 7), generator=generator)
    upstream = torch.randn(members, generator=generator, dtype=torch.float64)
    logits = 30.0 * x @ (head.mT if not members else head.mT.unsqueeze(1))
    wanted = token_losses(logits, target).flatten(-2).mean(-1)
    got = head_loss(x, head, target, 30.0)
    torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(
        torch.autograd.grad(got, (x, head), upstream),
        torch.autograd.grad(wanted, (x, head), upstream),
    )

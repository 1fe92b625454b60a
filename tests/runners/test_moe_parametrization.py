"""Transfer rules: the table, the optimizer that follows it, the coordinate check."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import nn

from bayeslr.errors import SpecError, StorageError
from bayeslr.specs import RunSpec
from bayeslr_runners.moe import parametrization as table
from bayeslr_runners.moe.coordinates import Change, activation_changes, slopes
from bayeslr_runners.moe.data import Corpus, load_corpus
from bayeslr_runners.moe.model import NAMING, MoeTransformer
from bayeslr_runners.moe.optim import AdamW, param_groups
from bayeslr_runners.moe.options import GROUPS, ModelOptions, Options, ScalingOptions
from bayeslr_runners.moe.parametrization import PARAMETRIZATIONS, Parametrization, parametrization
from bayeslr_runners.moe.shapes import MoeShape

HIDDEN = ("attention", "router", "expert_up", "expert_down")


pytestmark = pytest.mark.usefixtures("one_thread")


def raw(d_model: int = 64, n_layers: int = 2, **changes: int) -> dict[str, int]:
    return {"d_model": d_model, "n_layers": n_layers, "n_heads": d_model // 16,
            "d_expert": d_model, "n_experts": 4, "top_k": 2} | changes  # fmt: skip


def rules(
    name: str, shape: dict[str, int], base: dict[str, int], **options: Any
) -> Parametrization:
    run = {key: options.pop(key) for key in ("tokens", "batch_tokens") if key in options}
    scaling = ScalingOptions(base_shape=base, **options)
    return parametrization(name, MoeShape.from_mapping(shape), scaling, **run)


@pytest.mark.parametrize("name", PARAMETRIZATIONS)
def test_every_parametrisation_keeps_lr_decay_and_epsilon_at_the_base(name: str) -> None:
    found = rules(name, raw(), raw())
    assert set(found.groups) == {*GROUPS, "final_norm"}
    for group, rule in found.groups.items():
        assert (rule.lr, rule.eps) == (1, 1), group
        assert rule.weight_decay == (0 if "norm" in group else 1), group
    assert found.residual == 1
    assert found.attention_scale == 16**-0.5


@pytest.mark.parametrize("name", ["mup", "completep"])
def test_mup_is_sp_at_the_base(name: str) -> None:
    standard, found = rules("sp", raw(), raw()), rules(name, raw(), raw())
    assert found == standard


def test_mup_at_four_times_the_width() -> None:
    base, found = rules("sp", raw(), raw()), rules("mup", raw(256, n_heads=4), raw())
    for group in HIDDEN:
        rule = found.groups[group]
        assert (rule.lr, rule.weight_decay, rule.eps) == (1 / 4, 4, 1 / 4), group
        assert rule.init_std == pytest.approx(base.groups[group].init_std / 2), group
    for group in ("embedding", "head"):
        assert found.groups[group].lr == 1
        assert found.groups[group].init_std == base.groups[group].init_std
    assert found.groups["head"].output == 1 / 4
    # Heads four times as wide: 1 / d_head instead of 1 / sqrt(d_head).
    assert found.attention_scale == pytest.approx(base.attention_scale / 4)


def test_mup_follows_the_expert_width_where_that_is_the_fan_in() -> None:
    found = rules("mup", raw(256, d_expert=128), raw())
    assert found.groups["expert_up"].lr == 1 / 4
    assert found.groups["expert_down"].lr == 1 / 2
    assert found.groups["expert_down"].init_std == 128**-0.5


def test_completep_at_four_times_the_depth() -> None:
    found = rules("completep", raw(n_layers=8), raw())
    assert found.residual == 1 / 4
    for group in (*HIDDEN, "norm"):
        assert (found.groups[group].lr, found.groups[group].eps) == (1, 1 / 4)
    half = rules("completep", raw(n_layers=8), raw(), depth_exponent=0.5)
    assert half.residual == 1 / 2
    assert half.groups["attention"].lr == pytest.approx(1 / 2)
    assert half.groups["norm"].lr == pytest.approx(1 / 2)
    assert (half.groups["head"].lr, half.groups["final_norm"].lr) == (1, 1)


def test_norms_in_blocks_follow_the_hidden_epsilon_and_the_final_one_does_not() -> None:
    """Source: 2505.01618, table 1."""
    found = rules("completep", raw(256, n_layers=8), raw())
    assert found.groups["norm"].eps == found.groups["attention"].eps == 1 / 16
    assert found.groups["final_norm"].eps == 1


def test_fixed_sparsity_expert_rules() -> None:
    """Source: 2601.20205, with alpha_ffn = d_expert / d_model going from 1 to 1/2."""
    found = rules("moe_fixed_sparsity", raw(256, d_expert=128, n_experts=8, top_k=4), raw())
    down = found.groups["expert_down"]
    base_std = rules("sp", raw(), raw()).groups["expert_down"].init_std
    assert down.init_std / base_std == pytest.approx((256**0.5 / 128) / (64**0.5 / 64))
    assert down.lr == 1 / 2
    assert found.groups["router"].init_std == pytest.approx(table.LOGIT_STD * 64**-0.5 / 4)
    assert found.route_scale == 1 / 4
    assert found.gates == "sigmoid"


def test_fixed_sparsity_refuses_another_share_of_experts() -> None:
    with pytest.raises(SpecError, match="2 of 8 and base_shape 2 of 4; use 'complete_mue'"):
        rules("moe_fixed_sparsity", raw(n_experts=8), raw())


def test_complete_mue_worked_example() -> None:
    """d 128 to 1024, 25k to 100k steps, dense to 8 of 128 experts and a shared one (2605.23893)."""
    base = raw(128, n_experts=1, top_k=1)
    shape = raw(1024, n_experts=128, top_k=8, n_shared_experts=1)
    found = rules(
        "complete_mue", shape, base, tokens=4e6, batch_tokens=10, base_tokens=1e6,
        base_batch_tokens=10,
    )  # fmt: skip
    down = found.groups["expert_down"]
    assert down.output == pytest.approx(1 / 9)
    assert found.route_scale == 8
    assert down.init_std == pytest.approx(3 * found.groups["expert_up"].init_std)
    assert found.groups["head"].lr == pytest.approx(0.5)
    for group in HIDDEN:
        assert found.groups[group].lr == pytest.approx(0.5 / 8)
        assert found.groups[group].weight_decay == pytest.approx(0.5)
    assert found.one_minus_beta == pytest.approx(1 / 4)


@pytest.mark.parametrize(("exponent", "factor"), [(-0.5, 0.5), (-0.3, 4**-0.3), (0.0, 1.0)])
def test_horizon_exponent(exponent: float, factor: float) -> None:
    found = rules("sp", raw(), raw(), tokens=4e6, base_tokens=1e6, horizon_exponent=exponent)
    assert [rule.lr for rule in found.groups.values()] == pytest.approx(
        [factor] * (len(GROUPS) + 1)
    )


def test_lr_multipliers_are_per_group() -> None:
    found = rules("sp", raw(), raw(), lr_multipliers={"router": 0.5})
    assert found.groups["router"].lr == 0.5
    assert found.groups["head"].lr == 1
    norms = rules("sp", raw(), raw(), lr_multipliers={"norm": 0.5}).groups
    assert norms["norm"].lr == norms["final_norm"].lr == 0.5


def test_param_groups_of_any_module() -> None:
    module = nn.Sequential(nn.Embedding(7, 64), nn.Linear(64, 64), nn.LayerNorm(64))
    naming = {"0.*": "embedding", "1.weight": "attention", "*": "norm"}
    groups = param_groups(
        module, naming, rules("mup", raw(), raw(16)), lr=0.1, weight_decay=0.2, eps=1e-8
    )
    torch.optim.AdamW(groups)
    by_name = {group["group"]: group for group in groups}
    assert by_name["attention"]["lr"] == pytest.approx(0.1 / 4)
    assert by_name["attention"]["weight_decay"] == pytest.approx(0.8)
    assert by_name["attention"]["eps"] == pytest.approx(1e-8 / 4)
    assert by_name["norm"]["weight_decay"] == 0
    listed = [id(p) for group in groups for p in group["params"]]
    assert sorted(listed) == sorted(id(p) for p in module.parameters())


def test_a_parameter_without_a_group_is_named() -> None:
    with pytest.raises(SpecError, match="parameter 'bias' matches none of"):
        param_groups(
            nn.Linear(2, 2), {"weight": "head"}, rules("sp", raw(), raw()), lr=1, weight_decay=0
        )


def test_a_group_that_the_rules_lack_is_named() -> None:
    with pytest.raises(SpecError, match=r"module group 'attn', and the rules have .*attention"):
        param_groups(nn.Linear(2, 2), {"*": "attn"}, rules("sp", raw(), raw()), lr=1,
                     weight_decay=0)  # fmt: skip


def test_every_parameter_of_the_model_has_the_right_group() -> None:
    shape = MoeShape.from_mapping(raw(n_shared_experts=1))
    model = MoeTransformer(shape, rules("sp", raw(), raw()), ModelOptions(), vocab_size=9, seed=0)
    groups = param_groups(model, NAMING, rules("sp", raw(), raw()), lr=1, weight_decay=0)
    counted = {group["group"]: sum(p.numel() for p in group["params"]) for group in groups}
    d, layers = 64, 2
    assert counted == {
        "embedding": 9 * d,
        "head": 9 * d,
        "attention": layers * 4 * d * d,
        "router": layers * 4 * d,
        "expert_up": layers * 5 * 2 * d * d,
        "expert_down": layers * 5 * d * d,
        "norm": layers * (2 * d + 2 * 16),
        "final_norm": d,
    }


def test_our_adamw_equals_pytorchs() -> None:
    def layer() -> nn.Linear:
        made = nn.Linear(64, 64)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in made.parameters():
                parameter.normal_(generator=generator)
        return made

    naming = {"weight": "attention", "bias": "norm"}
    ours, theirs = layer(), layer()
    mup = rules("mup", raw(), raw(16))
    groups = [
        param_groups(module, naming, mup, lr=0.02, weight_decay=0.1, eps=1e-6)
        for module in (ours, theirs)
    ]
    mine = AdamW(groups[0], beta1=0.9, beta2=0.95)
    reference = torch.optim.AdamW(groups[1], betas=(0.9, 0.95))
    generator = torch.Generator().manual_seed(1)
    for number in range(8):
        x = torch.randn(32, 64, generator=generator)
        mine.backward(ours(x).square().mean())
        reference.zero_grad()
        theirs(x).square().mean().backward()
        factor = 1.0 - number / 10
        norm = mine.clip_grad(0.5)
        assert norm.item() == pytest.approx(
            nn.utils.clip_grad_norm_(theirs.parameters(), 0.5).item(), rel=1e-5
        )
        for group, rule in zip(reference.param_groups, ("attention", "norm"), strict=True):
            group["lr"] = 0.02 * mup.groups[rule].lr * factor
        mine.step(factor)
        reference.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_weights_of_other_module_groups_are_not_restored() -> None:
    optimizer = AdamW(
        param_groups(nn.Linear(4, 4), {"weight": "attention", "bias": "norm"},
                     rules("sp", raw(), raw()), lr=0.1, weight_decay=0.0), beta1=0.9, beta2=0.95,
    )  # fmt: skip
    state = optimizer.state()
    del state["groups"]["norm"]
    with pytest.raises(StorageError, match=r"holds attention, not the module groups .* delete it"):
        optimizer.restore(state)


@pytest.mark.parametrize(
    ("kind", "lr", "shrinks_by"),
    [("coupled", 0.1, 0.02), ("coupled", 0.01, 0.002), ("independent", 0.1, 0.2),
     ("independent", 0.01, 0.2)],
)  # fmt: skip
def test_weight_decay_kinds(kind: str, lr: float, shrinks_by: float) -> None:
    """Without a gradient, at the peak LR; under muP the product of LR and decay stays."""
    module = nn.Linear(4, 4, bias=False)
    before = module.weight.detach().clone()
    groups = param_groups(
        module, {"weight": "attention"}, rules("mup", raw(256), raw()), lr=lr, weight_decay=0.2,
        weight_decay_kind=kind,
    )  # fmt: skip
    AdamW(groups, beta1=0.9, beta2=0.95).step(1.0)
    torch.testing.assert_close(module.weight.detach(), before * (1 - shrinks_by))


@pytest.mark.parametrize(("kind", "ratio"), [("coupled", 4.0), ("independent", 1.0)])
def test_a_tuned_multiplier_leaves_independent_decay_alone(kind: str, ratio: float) -> None:
    module = nn.ModuleDict({"router": nn.Linear(4, 4), "attention": nn.Linear(4, 4)})
    groups = param_groups(
        module, {"router.*": "router", "*": "attention"},
        rules("mup", raw(256), raw(), lr_multipliers={"router": 4.0}), lr=0.1, weight_decay=0.2,
        weight_decay_kind=kind,
    )  # fmt: skip
    by_name = {group["group"]: group["lr"] * group["weight_decay"] for group in groups}
    assert by_name["router"] / by_name["attention"] == pytest.approx(ratio)


def test_independent_decay_follows_the_horizon_as_its_source_does() -> None:
    """complete_mue scales LR and decay each by the root of rho_B / rho_D."""
    found = rules("complete_mue", raw(), raw(), tokens=4e6, base_tokens=1e6, batch_tokens=16,
                  base_batch_tokens=16)  # fmt: skip
    groups = param_groups(
        nn.Linear(4, 4), {"*": "router"}, found, lr=0.1, weight_decay=0.2,
        weight_decay_kind="independent",
    )  # fmt: skip
    assert groups[0]["lr"] * groups[0]["weight_decay"] == pytest.approx(0.2 / 4)


# The check itself. Vocabulary of 16: with more tokens than columns, the tokens' updates interfere
# at the small widths and every slope is a little negative.
CHECK: dict[str, Any] = {
    "data": "synthetic", "synthetic_tokens": 40_000, "val_tokens": 4096, "synthetic_vocab": 16,
    "synthetic_order": 1, "synthetic_branching": 3, "threads": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return load_corpus(Options.from_mapping(CHECK).data)


def check(
    corpus: Corpus, name: str, shapes: list[dict[str, int]], seeds: tuple[int, ...] = (0, 1)
) -> list[Change]:
    spec = RunSpec(
        run_id="c", family="f", runner="moe", lr=2e-3, tokens=100_000, batch_tokens=512,
        n_active=1, n_total=1, seq_len=32, parametrization=name, weight_decay=0.0,
        options={**CHECK, "base_shape": shapes[0]},
    )  # fmt: skip
    return activation_changes(spec, corpus, shapes, num_steps=10, seeds=seeds)


WIDTHS = [raw(64), raw(256)]
DEPTHS = [raw(64, 2), raw(64, 8)]


@pytest.mark.parametrize("name", ["completep", "complete_mue"])
def test_width_does_not_move_activations(corpus: Corpus, name: str) -> None:
    found = slopes(check(corpus, name, WIDTHS), "d_model")
    assert set(found) == {*GROUPS, "stream"}
    assert max(map(abs, found.values())) < 0.15, found


def test_depth_does_not_move_activations(corpus: Corpus) -> None:
    found = slopes(check(corpus, "completep", DEPTHS), "n_layers")
    assert max(abs(found[group]) for group in GROUPS) < 0.15, found
    assert found["stream"] < 0.1


def test_the_check_fails_the_standard_parametrisation(corpus: Corpus) -> None:
    width = slopes(check(corpus, "sp", WIDTHS, (0,)), "d_model")
    assert min(width[group] for group in (*HIDDEN, "head")) > 0.2, width
    depth = slopes(check(corpus, "sp", DEPTHS, (0,)), "n_layers")
    assert depth["stream"] > 0.2, depth


def test_the_check_fails_a_wrong_rule(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    """One group's LR left as it was at the base."""
    right = table._RULES["mup"]

    def wrong(ratios: Any, scaling: ScalingOptions) -> Parametrization:
        found = right(ratios, scaling)
        down = dataclasses.replace(found.groups["expert_down"], lr=1.0)
        return dataclasses.replace(found, groups=found.groups | {"expert_down": down})

    monkeypatch.setitem(table._RULES, "mup", wrong)
    assert slopes(check(corpus, "mup", WIDTHS, (0,)), "d_model")["expert_down"] > 0.2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["completep", "moe_fixed_sparsity"])
@pytest.mark.parametrize("axis", ["d_model", "n_layers"])
def test_no_slope_over_eight_fold_width_and_depth(corpus: Corpus, name: str, axis: str) -> None:
    widths, depths = [raw(d) for d in (64, 128, 256, 512)], [raw(64, n) for n in (2, 4, 8, 16)]
    shapes = widths if axis == "d_model" else depths
    found = slopes(check(corpus, name, shapes, seeds=(0, 1, 2)), axis)
    assert max(abs(found[group]) for group in GROUPS) < 0.1, found

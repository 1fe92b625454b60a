"""Schedules, horizons and what they cost."""

from __future__ import annotations

import math

import pytest

from bayeslr.errors import SpecError
from bayeslr.specs import RunSpec
from bayeslr_runners.moe import MoeRunner
from bayeslr_runners.moe.schedule import horizons, lr_factor, schedule_state, trained_tokens


def spec(**changes: object) -> RunSpec:
    values: dict[str, object] = {
        "run_id": "r", "family": "f", "runner": "moe", "lr": 0.01, "tokens": 1000,
        "batch_tokens": 10, "seq_len": 5, "n_active": 7, "n_total": 7, "warmup_tokens": 100,
    }  # fmt: skip
    return RunSpec(**{**values, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("tokens", "factor"), [(0, 0), (50, 0.5), (100, 1), (800, 1), (900, 0.5), (1000, 0)]
)
def test_wsd(tokens: int, factor: float) -> None:
    assert lr_factor(spec(), tokens, 1000) == pytest.approx(factor)


def test_wsd_ends_at_the_final_fraction() -> None:
    run = spec(final_lr_fraction=0.1)
    assert lr_factor(run, 900, 1000) == pytest.approx(0.55)
    assert lr_factor(run, 1000, 1000) == pytest.approx(0.1)


def test_one_minus_sqrt_decay() -> None:
    assert lr_factor(spec(), 850, 1000, decay_shape="one_minus_sqrt") == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("schedule", "tokens", "factor"),
    [
        ("cosine", 550, 0.5),
        ("cosine", 325, 0.5 + math.sqrt(0.125)),
        ("linear", 325, 0.75),
        ("constant", 1000, 1),
        ("constant", 50, 0.5),
    ],
)
def test_other_schedules(schedule: str, tokens: int, factor: float) -> None:
    assert lr_factor(spec(schedule=schedule), tokens, 1000) == pytest.approx(factor)


def test_branches_leave_the_trunk_where_the_decay_starts() -> None:
    run = spec(decay_at=(500, 1000))
    found = horizons(run)
    assert [(h.branch_step, h.num_steps) for h in found] == [(40, 50), (80, 100)]
    # Trunk 80 steps, branches 10 and 20, of 10 tokens each.
    assert trained_tokens(run) == 1100
    assert MoeRunner({}).flops(run) == 6 * 7 * 1100


def test_no_trunk_step_has_begun_to_decay() -> None:
    run = spec(tokens=1003, decay_at=(507, 1003), warmup_tokens=0)
    for horizon in horizons(run):
        for step in range(horizon.branch_step):
            assert lr_factor(run, (step + 0.5) * 10, horizon.tokens) == 1.0


def test_a_single_horizon_schedule_costs_its_tokens() -> None:
    assert trained_tokens(spec(schedule="cosine")) == 1000
    assert trained_tokens(spec(schedule="constant", decay_at=(500, 1000))) == 1000


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schedule": "cosine", "decay_at": (500,)}, "'cosine' has one horizon"),
        ({"batch_tokens": 12}, r"batch_tokens \(12\) must be a multiple of seq_len \(5\)"),
        ({"decay_at": (998,)}, "less than one batch of 10 tokens apart"),
    ],
)
def test_impossible_plans_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        horizons(spec(**changes))


@pytest.mark.parametrize(
    ("tokens", "state"), [(50, "warmup"), (500, "stable"), (900, "decay"), (1000, "decayed")]
)
def test_schedule_state(tokens: int, state: str) -> None:
    assert schedule_state(spec(), tokens, 1000) == state

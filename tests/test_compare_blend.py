"""A transferred LR beside a law: scores, weights, and the mixture of both."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest

from bayeslr import blend as blend_module
from bayeslr.blend import _mixture, _split, blend, log_score, weights_of
from bayeslr.errors import DataError
from bayeslr.features import build_design
from bayeslr.posterior import Posterior
from bayeslr.predict import TargetDraws
from bayeslr.priors import load_prior
from bayeslr.runs import RunTable, make_table
from bayeslr.specs import Target
from tests.model_fixtures import run_record, target


def test_a_score_is_the_log_density_of_what_came() -> None:
    rng = np.random.default_rng(2)
    predicted, optimum = rng.normal(0, 0.5, size=4000), rng.normal(0.8, 0.2, size=4000)
    variance = 0.5**2 + 0.2**2
    exact = -0.5 * math.log(2 * math.pi * variance) - 0.5 * 0.8**2 / variance
    # Smoothing widens 500 draws by 1/30 of their variance; 4 standard errors of the mean density
    # over them are 0.12 in its log.
    assert log_score(predicted, optimum) == pytest.approx(exact, abs=0.15)
    assert log_score(predicted, optimum + 10) < log_score(predicted, optimum) - 10


def test_an_unknown_optimum_says_little() -> None:
    rng = np.random.default_rng(3)
    near, far = rng.normal(0, 0.2, size=500), rng.normal(1, 0.2, size=500)
    known, open_ = rng.normal(0, 0.1, size=500), rng.normal(0, 3, size=500)
    assert log_score(near, known) - log_score(far, known) > 5
    assert abs(log_score(near, open_) - log_score(far, open_)) < 0.5


def test_weights_follow_the_scores() -> None:
    weights = weights_of({"a": -1.0, "b": -1.0 - math.log(3), "c": -2000.0})
    assert weights["a"] == pytest.approx(0.75)
    assert weights["b"] == pytest.approx(0.25)
    assert sum(weights.values()) == pytest.approx(1)
    assert weights["c"] == 0


def of_runs(posterior: Posterior, *more: dict[str, Any]) -> Posterior:
    """The made-up runs' fit as if it had been of further runs too."""
    assert posterior.runs is not None
    runs = make_table([*posterior.runs.frame.to_dict("records"), *more])
    return dataclasses.replace(posterior, runs=runs, design=build_design(runs))


@pytest.mark.parametrize(
    "how", [{"status": "failed"}, {"status": "partial", "loss": 2.5}], ids=["failed", "partial"]
)
def test_the_largest_shape_is_one_that_shows_its_optimum(
    posterior: Posterior, how: dict[str, Any]
) -> None:
    far = run_record("far", 3e9, 8e9, 524_288.0, 3e-4, None) | how
    held_out, rest = _split(of_runs(posterior, far))
    assert {round(target.n_active) for target in held_out.values()} == {120_000_000}
    assert len(held_out) == 4
    assert rest is not None
    assert set(rest.frame["n_active"]) == {3e7}


def test_only_families_that_are_held_out_need_runs_that_are_left(posterior: Posterior) -> None:
    lone = run_record("lone", 3e7, 2e9, 131_072.0, 1e-1, None, family="lone")
    assert _split(of_runs(posterior, lone))[1] is not None
    large = {**lone, "n_active": 1.2e8, "n_total": 9.6e8}
    assert _split(of_runs(posterior, large)) == ({}, None)


def test_a_refit_that_did_not_converge_is_told_of(
    posterior: Posterior, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only what the scores are of counts: the fits of all runs tell of themselves."""

    def stand_in(_: RunTable, card: str, *, fast: bool = False, **__: Any) -> Posterior:
        trustworthy = fast and card == "moe-default"
        return dataclasses.replace(posterior, info={**posterior.info, "trustworthy": trustworthy})

    monkeypatch.setattr(blend_module, "fit", stand_in)
    assert posterior.runs is not None
    found = blend(posterior.runs, [target()])
    assert found.doubted == ("transfer",)
    assert "50 % moe-default (without it the fit under transfer did not converge)." in (
        found.sentence
    )
    right = dataclasses.replace(found, doubted=())
    assert "converge" not in right.sentence


def draws(level: float, num: int = 2000) -> TargetDraws:
    one = np.full((num, 2), level)
    return TargetDraws(
        log_lr=one, log_curvature=one, skew=one, log_edge=one, edge_width=one[:, :1], floor=one,
        loss_tokens=one, loss_exponent=one, diverged_loss=2.0,
    )  # fmt: skip


def test_a_mixture_holds_each_in_its_share() -> None:
    mixed = _mixture([draws(1.0), draws(2.0, num=400)], [0.25, 0.75])
    assert mixed.log_lr.shape == (2000, 2)
    assert mixed.edge_width.shape == (2000, 1)
    assert (mixed.log_lr == 1.0).mean() == 0.25


def test_a_mixture_joins_a_shared_skew_and_one_by_target() -> None:
    shared = draws(1.0)
    shared = dataclasses.replace(shared, skew=shared.skew[:, :1])
    mixed = _mixture([shared, draws(2.0)], [0.5, 0.5])
    assert mixed.skew.shape == (2000, 2)
    assert mixed.skew.mean() == 1.5


def test_the_card_of_the_transfer_keeps_the_lr_and_the_data_may_overrule() -> None:
    card, law = load_prior("transfer"), load_prior("moe-default")
    low, high = card["lr_n_active"].interval(0.9)
    assert -0.15 < low < 0 < high < 0.1
    assert law["lr_n_active"].interval(0.9)[1] < low + 0.1
    assert card["lr_intercept"].scale > 3 * law["lr_intercept"].scale


def ladder(exponent: float, **more: Any) -> RunTable:
    """Two sizes whose LR* falls like n_active^exponent, five LRs each."""
    rng = np.random.default_rng(4)
    rows = []
    for n_active in (3e4, 2.7e5):
        optimum = math.log(1e-2) + exponent * math.log(n_active / 3e4)
        for step in range(-2, 3):
            log_lr = math.log(1e-2) + 0.6 * exponent * math.log(n_active / 3e4) + 0.5 * step
            loss = 1.5 + 3 * (n_active / 1e4) ** -0.3 + 0.05 * (log_lr - optimum) ** 2
            rows.append(
                {
                    "run_id": f"r{len(rows)}", "family": "f", "parametrization": "mup",
                    "lr": math.exp(log_lr), "n_active": n_active, "n_total": 4 * n_active,
                    "param_convention": "non_embedding", "tokens": 5e6, "batch_tokens": 4096,
                    "loss": loss + 1e-3 * rng.normal(), "status": "ok",
                    "source": "bayeslr_runners", **more,
                }
            )  # fmt: skip
    return make_table(rows)


BIG = Target(
    target_id="big", family="f", n_active=2.4e6, n_total=9.6e6, tokens=5e6, batch_tokens=4096
)


@pytest.mark.parametrize("other", ["sp", None])
def test_runs_of_two_parametrisations_are_refused(other: str | None) -> None:
    """One that is not stated counts as sp, in another family too."""
    table = ladder(0.0)
    table.frame.loc[:4, "family"] = "g"
    table.frame.loc[:4, "parametrization"] = other
    with pytest.raises(DataError, match=r"one parametrization; the runs have mup, sp"):
        blend(table, [BIG])


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("exponent", "better"), [(0.0, "transfer"), (-0.6, "moe-default")])
def test_the_model_that_predicts_the_largest_shape_gets_the_weight(
    exponent: float, better: str
) -> None:
    """Real fits. Without the larger size its optimum is told by the card alone: 1.0 in ln LR lower
    under the law (sd 0.55), nowhere else under the transfer (sd 0.3); what came is 0 or 1.3."""
    found = blend(ladder(exponent), [BIG])
    assert found.weights[better] > 0.65
    assert found.num_held_out == 1
    alone = {card: table.iloc[0] for card, table in found.alone.items()}
    both = found.predictions.iloc[0]
    lows = sorted(row["lr"] for row in alone.values())
    assert lows[0] * 0.95 <= both["lr"] <= lows[1] * 1.05
    assert "%" in found.sentence

"""Misfit: exact for runs of the model, loud for runs of another; the likelihood once more."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import xarray as xr
from numpy.typing import NDArray
from scipy.stats import kstest

from bayeslr.features import build_design
from bayeslr.misfit import LEVEL, check_misfit, transforms
from bayeslr.models.simulate import PlannedSlice, Simulation, simulate
from bayeslr.pointwise import log_likelihood, run_draws
from bayeslr.posterior import Posterior
from bayeslr.priors import Prior
from bayeslr.runs import RunTable, make_table

LAYOUT = [
    PlannedSlice(
        family="made-up", n_active=n, n_total=8 * n, tokens=d, batch_tokens=b, num_lrs=7,
        step=math.log(2) / 2, repeats=2,
    )
    for n in (3e7, 1.2e8) for d in (2e9, 8e9) for b in (131_072.0, 524_288.0)
]  # fmt: skip


def at_truth(runs: RunTable, truth: Mapping[str, NDArray[np.float64]], card: Prior) -> Posterior:
    """A posterior of one draw: what the runs were drawn from, which is a draw of the posterior."""
    design = build_design(runs)
    features = design.slice_features()
    draws = {
        name: (("chain", "draw", *(f"{name}_{i}" for i in range(np.ndim(value)))),
               np.asarray(value)[None, None])
        for name, value in truth.items()
    }  # fmt: skip
    info: dict[str, Any] = {
        "method": "bayes", "families": list(design.families),
        "centre": {name: float(np.mean(values)) for name, values in features.items()},
    }  # fmt: skip
    return Posterior(draws=xr.Dataset(draws), prior=card, info=info, design=design, runs=runs)


def simulated(card: Prior, seed: int) -> Simulation:
    return simulate(card, LAYOUT, np.random.default_rng(seed))


def test_transforms_of_the_models_own_runs_are_uniform(card: Prior) -> None:
    """Ten tables of about 100 losses; Kolmogorov and Smirnov's test fails 1 in 10,000 if correct.

    The simulation is checked against the model by the calibration, so this checks `pointwise`.
    """
    pits = []
    for seed in range(10):
        drawn = simulated(card, seed)
        pits.append(transforms(at_truth(drawn.runs, drawn.truth, card))[0])
    together = np.concatenate(pits)
    assert len(together) > 600
    assert kstest(together, "uniform").pvalue > 1e-4


def test_divergence_is_the_models_too(card: Prior) -> None:
    """Diverged runs of ten tables, against the sum of their probabilities: 4 sd, 1 in 16,000."""
    seen = expected = variance = 0.0
    for seed in range(10):
        drawn = simulated(card, seed)
        posterior = at_truth(drawn.runs, drawn.truth, card)
        assert posterior.design is not None
        at = run_draws(posterior, np.arange(posterior.design.num_runs), np.array([0]))
        odds = 1 / (1 + np.exp(-np.clip(at.logit[0], -500, 500)))
        seen += float(posterior.design.diverged.sum())
        expected += float(odds.sum())
        variance += float((odds * (1 - odds)).sum())
    assert expected > 5
    assert abs(seen - expected) < 4 * math.sqrt(variance)


def test_false_alarms_are_as_rare_as_they_are_said_to_be(card: Prior) -> None:
    """Of 40 tables of the model 0.4 should be flagged; more than 4 are in 1 of 10,000 cases."""
    flagged = 0
    for seed in range(40):
        drawn = simulated(card, 100 + seed)
        found = check_misfit(at_truth(drawn.runs, drawn.truth, card))
        assert found is not None
        flagged += found.verdict != "fits"
    assert LEVEL == 0.01
    assert flagged <= 4


def shaken(runs: RunTable, by: float, above: NDArray[np.float64] | None = None) -> RunTable:
    """The runs with their losses disturbed: all of them, or those at LRs above these (run,)."""
    frame, rng = runs.frame.copy(), np.random.default_rng(1)
    disturbed = frame["loss"] + by * rng.normal(size=len(frame))
    chosen = frame["lr"] > (0.0 if above is None else above)
    frame["loss"] = disturbed.where(chosen, frame["loss"])
    return make_table(frame, source="shaken")


def test_a_wrong_noise_is_found_and_placed(card: Prior) -> None:
    """A twin whose losses scatter by 0.1 nats, a hundred times the seed noise: never missed."""
    drawn = simulated(card, 3)
    found = check_misfit(at_truth(shaken(drawn.runs, 0.1), drawn.truth, card))
    assert found is not None
    assert found.verdict == "large"
    assert found.groups[0].spread > 2
    assert found.groups[0].cover_90 < 0.8
    assert "more scatter than fitted" in found.sentence
    optimum = np.exp(drawn.truth["lr_opt"])[build_design(drawn.runs).slice_of_run]
    above = check_misfit(at_truth(shaken(drawn.runs, 0.1, optimum), drawn.truth, card))
    assert above is not None
    standing = [one.name for one in above.groups[1:] if one.stands_out]
    assert standing
    assert not any("below LR*" in name for name in standing)


def test_losses_that_are_shifted_are_found(card: Prior) -> None:
    drawn = simulated(card, 4)
    frame = drawn.runs.frame.copy()
    frame["loss"] = frame["loss"] - 0.2
    found = check_misfit(at_truth(make_table(frame, source="lower"), drawn.truth, card))
    assert found is not None
    assert found.verdict == "large"
    assert "losses lower than fitted" in found.sentence


def test_divergences_against_the_odds_are_found(card: Prior) -> None:
    drawn = simulated(card, 5)
    frame = drawn.runs.frame.copy()
    low = frame["lr"] == frame.groupby(["n_active", "tokens", "batch_tokens"])["lr"].transform(
        "min"
    )
    frame.loc[low, "status"], frame.loc[low, "loss"] = "diverged", None
    found = check_misfit(at_truth(make_table(frame, source="odd"), drawn.truth, card))
    assert found is not None
    assert found.surprises >= low.sum() > found.expected_surprises + 5
    assert "against even odds" in found.sentence


def test_a_fit_is_checked_and_few_runs_are_not(posterior: Posterior, card: Prior) -> None:
    found = check_misfit(posterior)
    assert found is not None
    assert found.groups[0].name == "all runs"
    assert sum(found.deciles) == pytest.approx(1.0)
    few = make_table(posterior.runs.frame.iloc[:5], source="few") if posterior.runs else None
    assert few is not None
    drawn = dataclasses.replace(posterior, design=build_design(few), runs=few)
    assert check_misfit(drawn) is None
    assert check_misfit(dataclasses.replace(posterior, design=None, runs=None)) is None


def test_the_likelihood_is_the_sum_over_runs(posterior: Posterior) -> None:
    """Blocks do not show: the sum over all runs is that over each run alone."""
    from scipy.stats import t

    design = posterior.design
    assert design is not None
    draws = np.array([0, 7, 100])
    total = np.zeros(3)
    for i in range(design.num_runs):
        at = run_draws(posterior, np.array([i]), draws)
        logit = at.logit[:, 0]
        if design.diverged[i]:
            total += -np.log1p(np.exp(-logit))
        else:
            total += -np.log1p(np.exp(logit))
            total += t.logpdf(design.loss[i], at.dof[:, 0], at.mean[:, 0], at.scale[:, 0])
    np.testing.assert_allclose(log_likelihood(posterior, draws), total, rtol=1e-10)

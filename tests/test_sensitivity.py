"""What the runs changed: overlap, power scaling against known answers and against ArviZ."""

from __future__ import annotations

import dataclasses
import importlib
import math
import warnings
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from bayeslr.posterior import Posterior, smoothed_weights
from bayeslr.predict import prior_posterior
from bayeslr.priors import Prior
from bayeslr.sensitivity import (
    QUANTITIES,
    UNTOUCHED,
    VERDICTS,
    Influence,
    _contradicted,
    distance,
    influence,
    overlap,
    power_scaling,
    prior_draws,
    sentences,
)

with warnings.catch_warnings():
    warnings.simplefilter("ignore", FutureWarning)
    az: Any = importlib.import_module("arviz")


def test_overlap_of_normals_is_as_integrated_by_hand() -> None:
    """2 Phi(-shift / 2) of unit normals; 20,000 draws and smoothing leave 0.02."""
    rng = np.random.default_rng(1)
    first = rng.normal(size=20_000)
    for shift in (0.0, 0.25, 1.0, 3.0):
        exact = math.erfc(shift / 2 / math.sqrt(2))
        assert overlap(first, shift + rng.normal(size=20_000)) == pytest.approx(exact, abs=0.025)
    assert overlap(first, 0.5 * rng.normal(size=20_000)) == pytest.approx(0.677, abs=0.03)
    assert overlap(np.zeros(5), np.zeros(5)) == 1.0


def test_draws_of_one_distribution_overlap_even_if_they_are_few() -> None:
    """200 effective draws are the fewest that a trusted fit has: the prior must be recognised.

    Of 60 pairs at most three may miss (each misses in under 1 of 100 cases: 1 in 10,000).
    """
    rng = np.random.default_rng(2)
    shared = [overlap(rng.normal(size=8000), rng.normal(size=200)) for _ in range(60)]
    assert sum(value < UNTOUCHED for value in shared) <= 3


def normal_case(prior_sd: float, data_sd: float, mean: float,
                num_draws: int = 4000) -> tuple[NDArray[np.float64], ...]:  # fmt: skip
    """Draws of a normal mean's posterior, its log prior and its log likelihood."""
    precision = 1 / prior_sd**2 + 1 / data_sd**2
    rng = np.random.default_rng(3)
    theta = mean / data_sd**2 / precision + rng.normal(size=num_draws) / math.sqrt(precision)
    return theta, -0.5 * (theta / prior_sd) ** 2, -0.5 * ((theta - mean) / data_sd) ** 2


def arviz_power_scaling(theta: NDArray[np.float64], log_prior: NDArray[np.float64],
                        log_likelihood: NDArray[np.float64]) -> dict[str, float]:  # fmt: skip
    """The same two sensitivities by ArviZ, of either major."""
    groups: dict[str, Any] = {
        "posterior": {"theta": theta[None]},
        "log_prior": {"theta": log_prior[None]},
        "log_likelihood": {"y": log_likelihood[None, :, None]},
    }
    found = {}
    if hasattr(az, "psens"):
        prior = groups.pop("log_prior")
        data = az.from_dict(**groups)
        data.add_groups(log_prior=prior)
        for part in ("prior", "likelihood"):
            found[part] = float(az.psens(data, component=part)["theta"])
    else:
        data = az.from_dict(groups)
        for part in ("prior", "likelihood"):
            answer = az.psense(data, group=part, alphas=(1 / 1.01, 1.01))
            answer = answer.to_dataset() if not hasattr(answer, "data_vars") else answer
            found[part] = float(answer["theta"])
    return found


@pytest.mark.parametrize(("prior_sd", "data_sd", "mean"), [(1, 1, 0), (1, 5, 0), (1, 0.5, 3)])
def test_power_scaling_agrees_with_arviz(prior_sd: float, data_sd: float, mean: float) -> None:
    theta, log_prior, log_likelihood = normal_case(prior_sd, data_sd, mean)
    theirs = arviz_power_scaling(theta, log_prior, log_likelihood)
    assert power_scaling(theta, log_prior) == pytest.approx(theirs["prior"], rel=0.02, abs=2e-3)
    assert power_scaling(theta, log_likelihood) == pytest.approx(
        theirs["likelihood"], rel=0.02, abs=2e-3
    )


def test_power_scaling_knows_who_decides() -> None:
    """A vague prior is not felt, a strong one is; the likelihood the other way round."""
    theta, log_prior, log_likelihood = normal_case(prior_sd=100, data_sd=1, mean=1)
    assert power_scaling(theta, log_prior) < 0.01
    assert power_scaling(theta, log_likelihood) > 0.05
    theta, log_prior, log_likelihood = normal_case(prior_sd=1, data_sd=100, mean=1)
    assert power_scaling(theta, log_prior) > 0.05
    assert power_scaling(theta, log_likelihood) < 0.01


def test_distance_is_zero_of_equal_weights_and_grows() -> None:
    draws = np.random.default_rng(4).normal(size=1000)
    assert distance(draws, np.ones(1000)) == pytest.approx(0.0, abs=1e-6)
    tilts = [distance(draws, np.exp(tilt * draws)) for tilt in (0.1, 0.5, 2.0)]
    assert 0 < tilts[0] < tilts[1] < tilts[2] < 1


def test_smoothed_weights_are_normalised_and_warn_of_wild_ratios() -> None:
    rng = np.random.default_rng(5)
    weights, k = smoothed_weights(0.01 * rng.normal(size=2000))
    assert weights.sum() == pytest.approx(1.0)
    assert k < 0.5
    assert smoothed_weights(3.0 * rng.normal(size=2000))[1] > 0.7


def test_prior_draws_are_what_the_card_alone_predicts(card: Prior) -> None:
    """Levels at the card's own reference: the intercepts, wider by the spread of families.

    Bounds are 4 standard errors of 40,000 draws.
    """
    drawn = prior_draws(card, {**card.log_reference, "log_batch": 12.0}, num_draws=40_000)
    assert set(drawn) == set(QUANTITIES)
    entry, spread = card["lr_intercept"], card["lr_family_sd"]
    median = np.median(drawn["lr_level"])
    assert median == pytest.approx(entry.location, abs=4 * 1.25 * drawn["lr_level"].std() / 200)
    assert drawn["lr_level"].std() > math.hypot(entry.scale, spread.location)
    assert drawn["lr_tokens"].mean() == pytest.approx(
        card["lr_tokens"].location, abs=4 * drawn["lr_tokens"].std() / 200
    )


def test_a_fit_says_what_its_runs_touched(posterior: Posterior, card: Prior) -> None:
    found = {one.name: one for one in influence(posterior)}
    assert set(found) <= set(QUANTITIES)
    assert {one.verdict for one in found.values()} <= set(VERDICTS)
    # Forty runs place LR* itself, and are all of one sparsity.
    assert found["lr_level"].verdict in ("runs", "both")
    assert found["lr_level"].overlap < 0.7
    assert found["lr_sparsity"].verdict == "card"
    text = " ".join(sentences(list(found.values())))
    assert "Not touched by the runs" in text
    assert "LR* in sparsity" in text
    assert influence(prior_posterior(card, num_draws=50)) == []


def influence_of(name: str, family: str | None, verdict: str) -> Influence:
    return Influence(
        name=name, family=family, overlap=0.5, by_card=0.1, by_runs=0.1, noise=0.05, surprise=0.5,
        verdict=verdict,
    )  # fmt: skip


def test_a_contradiction_is_shared_between_what_the_runs_touched() -> None:
    """Ten quantities: each may lie in the outer 0.5 % of its prior."""
    found = [
        dataclasses.replace(influence_of(name, None, verdict), surprise=surprise)
        for name, verdict, surprise in (
            ("lr_level", "runs", 0.006), ("lr_tokens", "both", 0.004), ("log_skew", "card", 0.001),
        )
    ] + [influence_of(name, None, "runs") for name in list(QUANTITIES)[-8:]]  # fmt: skip
    verdicts = [one.verdict for one in _contradicted(found)]
    assert verdicts[:3] == ["runs", "conflict", "card"]
    assert [one.verdict for one in _contradicted(found[:1])] == ["conflict"]


def test_sentences_name_the_family_where_families_differ() -> None:
    found = [
        influence_of("lr_tokens", "a", "card"), influence_of("lr_tokens", "b", "card"),
        influence_of("lr_n_active", "a", "card"), influence_of("lr_n_active", "b", "runs"),
        influence_of("log_skew", "a", "conflict"), influence_of("log_skew", "b", "runs"),
        influence_of("curvature_tokens", None, "card"),
    ]  # fmt: skip
    untouched, conflict = sentences(found)
    assert untouched.endswith(
        "LR* in tokens; LR* in active parameters (a); curvature in tokens."
    )  # fmt: skip
    assert "Against the prior card" in conflict
    assert sentences(found, at_most=1)[0].endswith("LR* in tokens; and 2 more.")
    assert "skew of the valley (a)" in conflict
    assert sentences([influence_of("lr_tokens", "a", "runs")]) == []
    alone = sentences([dataclasses.replace(found[2], verdict="card")])
    assert alone == [
        "Not touched by the runs, so as the prior card has it: LR* in active parameters."
    ]

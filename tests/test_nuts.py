"""Coordinates of the sampler: exact on a normal, and what is told of one by its own gradients."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from bayeslr.nuts import rounder


def normal(num_draws: int, seed: int) -> tuple[NDArray[np.float64], ...]:
    """Covariance of a stretched normal, draws from it and gradients of its log density there."""
    shape = np.random.default_rng(5)
    turn, _ = np.linalg.qr(shape.normal(size=(12, 12)))
    covariance = (turn * 10.0 ** shape.uniform(-4, 2, size=12)) @ turn.T
    rng = np.random.default_rng(seed)
    draws = rng.multivariate_normal(np.zeros(12), covariance, size=num_draws)
    return covariance, draws, -draws @ np.linalg.inv(covariance)


def test_a_normal_is_made_round_in_three_windows_of_few_draws() -> None:
    """Gradients are exact, so the draws' own chance cancels: condition 1e6 to nearly 1."""
    root = np.eye(12)
    for seed in range(3):
        covariance, draws, gradient = normal(30, seed)
        root = rounder(root, np.linalg.solve(root, draws.T).T, gradient @ root)
    left = np.linalg.eigvalsh(np.linalg.solve(root, covariance) @ np.linalg.inv(root).T)
    assert left.max() / left.min() < 1.5
    # The twin: by the draws' covariance alone, thirty of them are far from enough.
    root = np.linalg.cholesky(np.cov(draws.T))
    left = np.linalg.eigvalsh(np.linalg.solve(root, covariance) @ np.linalg.inv(root).T)
    assert left.max() / left.min() > 5


def test_round_coordinates_stay_as_they_are_with_few_draws() -> None:
    """Directions that no draw tells keep their scale."""
    rng = np.random.default_rng(2)
    draws = rng.normal(size=(8, 40))
    root = rounder(np.eye(40), draws, -draws)
    assert root @ root.T == pytest.approx(np.eye(40), abs=1e-9)


def test_chains_that_never_moved_leave_the_coordinates_alone() -> None:
    still = np.zeros((20, 3))
    root = rounder(np.eye(3), still, still)
    np.testing.assert_array_equal(root, np.eye(3))


def test_gradients_of_any_size_leave_coordinates_that_can_be_inverted() -> None:
    """As from a chain at the mouth of a funnel: a few directions a million times as steep."""
    rng = np.random.default_rng(0)
    draws = rng.normal(size=(200, 300))
    steep = 1e6 * rng.standard_t(1.5, size=(200, 3)) @ rng.normal(size=(3, 300))
    root = rounder(np.eye(300), draws, steep - draws)
    assert np.linalg.cond(root) < 1e5

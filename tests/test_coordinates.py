"""Coordinates of the sampler: exact on a normal, and what is told of one by its own gradients."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from numpy.typing import NDArray

from bayeslr.coordinates import Branch, Dense, Tree, moved, rounder


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


def a_tree(rng: np.random.Generator) -> Tree:
    """Three parameters on top, two groups of two below, five of one in those, places mixed up."""
    places = rng.permutation(12)
    return Tree(
        top=places[:3],
        root=rng.normal(size=(3, 3)) + 3.0 * np.eye(3),
        branches=(
            Branch(
                at=places[3:7].reshape(2, 2), root=rng.normal(size=(2, 2, 2)) + 3.0 * np.eye(2),
                slope=rng.normal(size=(2, 2, 3)), above={},
            ),
            Branch(
                at=places[7:].reshape(5, 1), root=rng.uniform(1, 2, size=(5, 1, 1)),
                slope=rng.normal(size=(5, 1, 3)),
                above={0: (np.array([0, 1, 1, 0, 1]), rng.normal(size=(5, 1, 2)))},
            ),
        ),
    )  # fmt: skip


def test_coordinates_go_there_and_back() -> None:
    rng = np.random.default_rng(6)
    tree = a_tree(rng)
    dense = Dense(tree.x(np.eye(12)).T)
    z, gradient = rng.normal(size=(2, 4, 7, 12))
    for one in (tree, dense):
        assert one.x(z) == pytest.approx(z @ dense.root.T, rel=1e-12)
        assert one.z(one.x(z)) == pytest.approx(z, rel=1e-9)
        assert one.pull(gradient) == pytest.approx(gradient @ dense.root, rel=1e-12)
        assert one.push(one.pull(gradient)) == pytest.approx(gradient, rel=1e-9)
        single = np.asarray(moved(one.compact(), z[0, 0]))
        assert single == pytest.approx(one.x(z)[0, 0], rel=1e-5, abs=1e-5)


def test_parameters_of_a_group_move_with_what_holds_it_alone() -> None:
    tree = a_tree(np.random.default_rng(6))
    root = tree.x(np.eye(12)).T
    upper, lower = tree.branches
    assert (root[lower.at[0, 0], upper.at[0]] != 0).all()
    assert (root[lower.at[0, 0], upper.at[1]] == 0).all()
    assert (root[upper.at[0]][:, lower.at.ravel()] == 0).all()


def test_the_top_and_the_groups_of_a_tree_are_made_round() -> None:
    rng = np.random.default_rng(9)
    tree = a_tree(rng)
    upper, lower = tree.branches
    turned = upper.root @ np.array([[0.1, 0.0], [0.02, 20.0]])
    off = dataclasses.replace(
        tree,
        root=tree.root @ np.diag([30.0, 1.0, 0.01]),
        branches=(dataclasses.replace(upper, root=turned), lower),
    )
    z = rng.normal(size=(400, 12))
    found = off.rounder(tree.x(z), tree.push(-z))
    for one, other in [(found, tree), *zip(found.branches, tree.branches, strict=True)]:
        left = np.linalg.solve(one.root, other.root)
        near = np.broadcast_to(np.eye(left.shape[-1]), left.shape)
        assert left @ np.swapaxes(left, -1, -2) == pytest.approx(near, abs=0.02)

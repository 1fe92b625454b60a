"""The curvature of the model: what a few gradients tell is what one for each parameter tells."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from bayeslr.coordinates import Tree
from bayeslr.curvature import curvature_at
from bayeslr.features import build_design
from bayeslr.models import valley
from bayeslr.models.compiled import CompiledModel, compiled_model
from bayeslr.priors import load_prior
from bayeslr.runs import make_table
from bayeslr.sampling import configure_jax
from tests.model_fixtures import run_record


@pytest.fixture(scope="module")
def arrays() -> valley.Arrays:
    """Two families; shapes and cells with one member and with several; two seeds in one slice."""
    rng = np.random.default_rng(3)
    rows = []
    slices = [("a", 1e8, 2e9, 2**17), ("a", 1e8, 2e9, 2**19), ("a", 1e8, 8e9, 2**17),
              ("a", 4e8, 8e9, 2**19), ("b", 2e8, 4e9, 2**18), ("b", 2e8, 8e9, 2**18)]  # fmt: skip
    for family, n, tokens, batch in slices:
        for i in range(4):
            for seed in (1, 2) if tokens == 2e9 else (1,):
                loss = None if i == 3 and n > 3e8 else 3.0 + 0.02 * (i - 1.5) ** 2
                loss = loss and loss + 1e-3 * rng.normal()
                name = f"{family}{n}{tokens}{batch}{i}{seed}"
                rows.append(run_record(name, n, tokens, batch, 1e-3 * math.exp(0.7 * i), loss,
                                       seed=seed, family=family))  # fmt: skip
    return valley.model_data(build_design(make_table(rows, source="made-up")))


@pytest.fixture(scope="module")
def compiled(arrays: valley.Arrays) -> CompiledModel:
    configure_jax()
    return compiled_model(arrays, load_prior("moe-default"), 2)


@pytest.fixture
def x(compiled: CompiledModel) -> NDArray[np.float64]:
    return compiled.start + 0.1 * np.random.default_rng(1).normal(size=compiled.size)


def one_by_one(
    compiled: CompiledModel, arrays: valley.Arrays, x: NDArray[np.float64]
) -> NDArray[np.float64]:
    """The Hessian at x by central differences of the gradient, a parameter at a time."""
    rows = []
    for step in 1e-5 * np.eye(compiled.size):
        ahead, behind = (
            np.asarray(compiled.value_and_grad(at, tuple(arrays.values()))[1])
            for at in (x + step, x - step)
        )
        rows.append((ahead - behind) / 2e-5)
    return (np.array(rows) + np.array(rows).T) / 2


def apart(found: NDArray[np.float64], wanted: NDArray[np.float64]) -> float:
    """Largest error of a Hessian, in the parameters' own units."""
    unit = np.sqrt(np.abs(np.diag(wanted)) + 1.0)
    return float(np.abs((found - wanted) / np.outer(unit, unit)).max())


def test_all_of_a_level_at_once_tell_what_one_by_one_tell(
    compiled: CompiledModel, arrays: valley.Arrays, x: NDArray[np.float64]
) -> None:
    assert (arrays["run_in_order"] > 0).any()
    assert set(arrays["cell_alone"]) == set(arrays["shape_alone"]) == {0.0, 1.0}
    found = curvature_at(compiled, arrays, x).matrix
    wanted = one_by_one(compiled, arrays, x)
    assert apart(found, wanted) < 1e-4
    # The twin: elsewhere it is another.
    assert apart(found, one_by_one(compiled, arrays, x + 0.1)) > 1e-2


def test_of_several_points_it_is_the_mean(
    compiled: CompiledModel, arrays: valley.Arrays, x: NDArray[np.float64]
) -> None:
    points = np.stack([x, x + 0.01, x - 0.02])
    alone = [curvature_at(compiled, arrays, point).matrix for point in points]
    assert apart(curvature_at(compiled, arrays, points).matrix, np.mean(alone, axis=0)) < 1e-4


def test_what_is_held_has_no_curvature_but_what_it_is_given(
    compiled: CompiledModel, arrays: valley.Arrays, x: NDArray[np.float64]
) -> None:
    at = compiled.index("lr_cell_sd_log__")
    matrix = curvature_at(compiled, arrays, x, at).with_own(at, 2.5).matrix
    (row,) = matrix[at]
    assert row[at] == 2.5
    assert np.delete(row, at) == pytest.approx(0.0)
    rest = np.setdiff1d(np.arange(compiled.size), at)
    whole = curvature_at(compiled, arrays, x).matrix
    np.testing.assert_array_equal(matrix[np.ix_(rest, rest)], whole[np.ix_(rest, rest)])


def test_the_tree_makes_a_normal_of_this_curvature_round(
    compiled: CompiledModel, arrays: valley.Arrays, x: NDArray[np.float64]
) -> None:
    found = curvature_at(compiled, arrays, x)
    steep = 2.0 * abs(np.linalg.eigvalsh(found.matrix)[0])
    for level, own in zip(found.levels, found.own, strict=True):
        own += steep * np.eye(level.at.shape[1])
    for i in found.top:
        found = found.with_own(np.array([i]), found.matrix[i, i] + steep)
    tree = found.tree(1e-6)
    assert isinstance(tree, Tree)
    for root in (tree.x(np.eye(compiled.size)).T, found.dense(1e-6).root):
        assert root.T @ found.matrix @ root == pytest.approx(np.eye(compiled.size), abs=1e-6)


def test_directions_that_bend_down_or_hardly_at_all_stay_short(
    compiled: CompiledModel, arrays: valley.Arrays, x: NDArray[np.float64]
) -> None:
    """By a slice's own effects, which hang on all others: raised to 0.5 alone, they flew off."""
    found = curvature_at(compiled, arrays, x)
    at = found.levels[2].at[-1]
    found.own[2][-1] = np.diag([-50.0, 1e-9, 1e3])
    root = found.tree(0.5).x(np.eye(compiled.size)).T
    alone = np.abs(root[at][:, at]).max(axis=1)
    assert alone == pytest.approx([50**-0.5, 0.5**-0.5, 1e-3**0.5], rel=1e-6)
    dense = found.dense(0.5)
    assert np.linalg.norm(dense.root, ord=2) <= 0.5**-0.5 + 1e-9

"""The classical Fitting paradigm: a parabola a slice, then a power law by least squares.

The baseline that every claim is measured against. Stage one takes the vertex of a parabola in ln LR
through the runs around a slice's best; stage two regresses the vertices on ln n_active, ln
sparsity, ln tokens and ln batch by ordinary least squares, with the covariance that goes with it;
each family has an intercept of its own.
Diverged runs are dropped, and slices whose vertex lies outside the runs around it are left out, as
is the custom; so are unfinished runs, whose best LR is not that of the run at its end, and runs
whose covariates are not the reference.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from bayeslr.errors import DataError
from bayeslr.features import REGRESSORS
from bayeslr.runs import lr_group

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from bayeslr.features import Design

    FloatArray = NDArray[np.float64]

_ENTRY_ORDER = ("log_tokens", "log_batch", "log_n_active", "log_sparsity")

# Standard deviation (ln) of what the regressors before it leave of one, for it to have an exponent.
# Shapes whose sparsity differs by a rounding of widths would else be given exponents of hundreds.
_LEAST_SPREAD = 0.1

# Half-width of the parabola's window in ln LR: a factor of 4, the custom of published fits.
WINDOW = np.log(4.0) + 0.02


def vertices(design: Design) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Vertex (ln LR), curvature (nats) and minimum (nats) of each slice; NaN where there is none.

    Each (slice,).
    """
    vertex = np.full(design.num_slices, np.nan)
    curvature, minimum = vertex.copy(), vertex.copy()
    kept = ~design.diverged & design.at_reference
    order = np.argsort(design.slice_of_run, kind="stable")
    bounds = np.searchsorted(design.slice_of_run[order], np.arange(design.num_slices + 1))
    for s in range(design.num_slices):
        rows = order[bounds[s] : bounds[s + 1]]
        rows = rows[kept[rows]]
        if len(rows) < 3:
            continue
        x, y = design.log_lr[rows], design.loss[rows]
        x_best = x[np.argmin(y)]
        near = np.abs(x - x_best) <= WINDOW
        # One LR in two roundings is one: a parabola through it has any curvature.
        if lr_group(np.exp(x[near])).max() < 2:
            continue
        a, b, c = np.polyfit(x[near] - x_best, y[near], 2)
        shift = -b / (2 * a) if a > 0 else np.inf
        low, high = (x[near] - x_best).min(), (x[near] - x_best).max()
        if low <= shift <= high:
            vertex[s], curvature[s] = x_best + shift, a
            minimum[s] = c - b**2 / (4 * a)
    return vertex, curvature, minimum


def fit(design: Design, *, seed: int, num_draws: int) -> dict[str, FloatArray]:
    """Draws of the coefficients from their least-squares distribution.

    Returns: ``intercept`` (1, draw, family) and ``coefficient`` (1, draw, regressor), about the
    centre of the data; ``mean_intercept``, ``family_sd``, ``residual_sd``, ``curvature`` and
    ``r_squared``, each (1, draw). A regressor that does not vary by itself within families has
    coefficient zero. A family that is new, or without a vertex, has the mean intercept of the
    others, and their scatter about it.
    Raises: DataError if fewer than two slices of finished runs have a vertex, or no more than there
    are families among them.
    """
    vertex, curvature, _ = vertices(design)
    good = np.isfinite(vertex) & design.annealed[design.cell_of_slice]
    if good.sum() < 2:
        raise DataError(
            "two-stage needs at least two slices of finished runs with a vertex inside them, got "
            f"{good.sum()}; add runs on both sides of each optimum, or fit with --method bayes"
        )
    family, names = design.family_of_slice[good], np.array(design.families)
    seen = np.unique(family)
    if len(seen) >= good.sum():
        raise DataError(
            f"two-stage needs more slices with a vertex than families, and each of the {len(seen)} "
            f"slices is of another family ({', '.join(names[seen])}); fit one family at a time, "
            "add slices, or fit with --method bayes"
        )
    features = design.slice_features()
    x = np.column_stack([features[name] - features[name].mean() for name in REGRESSORS])[good]
    # As many regressors as the slices can carry with a degree of freedom left, none that hardly
    # moves apart from the others; sparsity comes last, for it often moves with size.
    varies = np.zeros(len(REGRESSORS), dtype=bool)
    intercepts = columns = (family[:, None] == seen).astype(float)
    for j in (REGRESSORS.index(name) for name in _ENTRY_ORDER):
        own = x[:, j] - columns @ np.linalg.lstsq(columns, x[:, j], rcond=None)[0]
        if columns.shape[1] + 1 < len(x) and own.std() > _LEAST_SPREAD:
            varies[j], columns = True, np.column_stack([columns, x[:, j]])
    columns = np.column_stack([intercepts, x[:, varies]])
    y = vertex[good]
    coefficient, *_ = np.linalg.lstsq(columns, y, rcond=None)
    residual = y - columns @ coefficient
    freedom = max(1, len(y) - columns.shape[1])
    variance = float(residual @ residual) / freedom
    total = float(((y - y.mean()) ** 2).sum())
    rng = np.random.default_rng(seed)
    # Student t: normal over the root of a scaled chi-square.
    scale = np.sqrt(freedom / rng.chisquare(freedom, size=num_draws))
    root = np.linalg.cholesky(
        variance * np.linalg.inv(columns.T @ columns) + 1e-15 * np.eye(columns.shape[1])
    )
    draws = coefficient + scale[:, None] * (rng.normal(size=(num_draws, len(root))) @ root.T)
    full = np.zeros((num_draws, len(REGRESSORS)))
    full[:, varies] = draws[:, len(seen) :]
    known = draws[:, : len(seen)]
    mean, family_sd = known.mean(axis=1), np.zeros(num_draws)
    if len(seen) > 1:
        family_sd = known.std(axis=1, ddof=1) * np.sqrt(1 + 1 / len(seen))
    intercept = mean[:, None] + family_sd[:, None] * rng.normal(size=(num_draws, len(names)))
    intercept[:, seen] = known
    return {
        "intercept": intercept[None],
        "coefficient": full[None],
        "mean_intercept": mean[None],
        "family_sd": family_sd[None],
        "residual_sd": np.sqrt(variance) * scale[None],
        "curvature": np.full((1, num_draws), float(np.median(curvature[good]))),
        "r_squared": np.full((1, num_draws), 1 - float(residual @ residual) / max(total, 1e-300)),
    }

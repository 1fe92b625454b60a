"""The classical Fitting paradigm: a parabola a slice, then a power law by least squares.

The baseline that every claim is measured against. Stage one takes the vertex of a parabola in ln LR
through the runs around a slice's best; stage two regresses the vertices on ln n_active, ln
sparsity, ln tokens and ln batch by ordinary least squares, with the covariance that goes with it.
Diverged runs are dropped, and slices whose vertex lies outside the runs around it are left out, as
is the custom; so are unfinished runs, whose best LR is not that of the run at its end, and runs
whose covariates are not the reference.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from bayeslr.errors import DataError
from bayeslr.features import REGRESSORS

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
        if len(np.unique(x[near])) < 3:
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

    Returns: ``intercept``, ``residual_sd``, ``curvature``, ``r_squared``, each (1, draw), and
    ``coefficient`` (1, draw, regressor), about the centre of the data. A regressor that does not
    vary by itself has coefficient zero.
    Raises: DataError if fewer than two slices of finished runs have a vertex.
    """
    vertex, curvature, _ = vertices(design)
    good = np.isfinite(vertex) & design.annealed[design.cell_of_slice]
    if good.sum() < 2:
        raise DataError(
            "two-stage needs at least two slices of finished runs with a vertex inside them, got "
            f"{good.sum()}; add runs on both sides of each optimum, or fit with --method bayes"
        )
    features = design.slice_features()
    x = np.column_stack([features[name] - features[name].mean() for name in REGRESSORS])[good]
    # As many regressors as the slices can carry with a degree of freedom left, none that hardly
    # moves apart from the others; sparsity comes last, for it often moves with size.
    varies = np.zeros(len(REGRESSORS), dtype=bool)
    columns = np.ones((len(x), 1))
    for j in (REGRESSORS.index(name) for name in _ENTRY_ORDER):
        own = x[:, j] - columns @ np.linalg.lstsq(columns, x[:, j], rcond=None)[0]
        if columns.shape[1] + 1 < len(x) and own.std() > _LEAST_SPREAD:
            varies[j], columns = True, np.column_stack([columns, x[:, j]])
    columns = np.column_stack([np.ones(len(x)), x[:, varies]])
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
    full[:, varies] = draws[:, 1:]
    return {
        "intercept": draws[None, :, 0],
        "coefficient": full[None],
        "residual_sd": np.sqrt(variance) * scale[None],
        "curvature": np.full((1, num_draws), float(np.median(curvature[good]))),
        "r_squared": np.full((1, num_draws), 1 - float(residual @ residual) / max(total, 1e-300)),
    }

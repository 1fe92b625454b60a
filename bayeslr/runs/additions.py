"""The cheapest slice to add, so that runs tell exponents apart.

Optima scatter about a law of LR*; with that scatter, least squares on the slices says how well each
exponent would be known. A slice helps if with it the exponents in question are known well enough.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from bayeslr.units import format_quantity, train_flops

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import NDArray

    FloatArray = NDArray[np.float64]

REGRESSORS = ("n_active", "sparsity", "tokens", "batch_tokens")

# Sd of ln LR* of a slice about a fitted power law: Step Law's tables at fixed batch, dense and MoE.
SCATTER = 0.25

# Standard error at which an exponent counts as known: the published values of each lie further
# apart, and the cards' sds are about as wide.
KNOWN = 0.2

NUM_LRS = 3  # LRs that place an optimum.
_STEPS = (0.125, 0.25, 4.0, 8.0)  # Sizes, token counts and batches beyond those that were run.
_MIN_STEPS = 500  # Steps of training under which a proxy says little.


@dataclass(frozen=True, kw_only=True, slots=True)
class Addition:
    """A slice to add: parameters, tokens and batch in tokens; ``flops`` of its `NUM_LRS` runs."""

    n_active: float
    n_total: float
    tokens: float
    batch_tokens: float

    @property
    def flops(self) -> float:
        """FLOPs of the slice's runs."""
        return NUM_LRS * train_flops(self.n_active, self.tokens)

    def __str__(self) -> str:
        size = format_quantity(self.n_active)
        if self.n_total > self.n_active * (1 + 1e-9):
            size += f" of {format_quantity(self.n_total)}"
        flops = f"{self.flops:.1e}".replace("e+", "e")
        return (
            f"{NUM_LRS} LRs at {size} parameters, {format_quantity(self.tokens)} tokens, batch "
            f"{format_quantity(self.batch_tokens)} ({flops} FLOPs)"
        )


def cheapest_addition(cells: pd.DataFrame, exponents: Sequence[str]) -> Addition | None:
    """The cheapest slice with which the named exponents are known, or the most telling one.

    cells: a row a slice that was run (n_active, n_total, tokens, batch_tokens). exponents: names in
    `REGRESSORS`. Candidates combine sizes, token counts and batches that were run, and those 4 and
    8 times beyond. None where no candidate helps.
    """
    seen = cells[["n_active", "n_total", "tokens", "batch_tokens"]].drop_duplicates()
    rows = seen.to_numpy(dtype=np.float64)
    logs = _logs(rows)
    centre = logs.mean(axis=0)
    # The triangular factor stands for all slices: least squares sees no difference.
    told = np.linalg.qr(_with_intercept(logs - centre), mode="r")
    best: tuple[float, Addition] | None = None
    for one in sorted(_candidates(rows, exponents), key=lambda one: (one.flops, one.n_total)):
        added = np.array([[one.n_active, one.n_total, one.tokens, one.batch_tokens]])
        errors = _errors(np.vstack([told, _with_intercept(_logs(added) - centre)]))
        worst = max(errors[name] for name in exponents)
        if worst <= KNOWN:
            return one
        if math.isfinite(worst) and (best is None or worst < 0.9 * best[0]):
            best = worst, one
    return best[1] if best else None


def standard_errors(slices: FloatArray) -> dict[str, float]:
    """Standard error of each exponent from the optima of slices (slice, 4), infinite if unknown.

    Columns of slices: n_active, n_total, tokens, batch_tokens. A regressor that does not vary is
    left out; its exponent is unknown.
    """
    logs = _logs(slices)
    return _errors(_with_intercept(logs - logs.mean(axis=0)))


def _logs(slices: FloatArray) -> FloatArray:
    log = np.log(slices)
    return np.stack([log[:, 0], log[:, 0] - log[:, 1], log[:, 2], log[:, 3]], axis=1)


def _with_intercept(logs: FloatArray) -> FloatArray:
    return np.column_stack([np.ones(len(logs)), logs])


def _errors(x: FloatArray) -> dict[str, float]:
    """Standard errors from a design matrix: the intercept's column, then `REGRESSORS`."""

    def left(j: int, others: NDArray[np.int64]) -> float:
        fitted = x[:, others] @ np.linalg.lstsq(x[:, others], x[:, j], rcond=None)[0]
        return float(np.linalg.norm(x[:, j] - fitted))

    intercept = np.array([0])
    varied = np.array([j for j in range(1, x.shape[1]) if left(j, intercept) > 1e-6])
    errors = dict.fromkeys(REGRESSORS, math.inf)
    for j in varied:
        size = left(int(j), np.append(intercept, varied[varied != j]))
        if size > 1e-3:
            errors[REGRESSORS[j - 1]] = SCATTER / size
    return errors


def _candidates(rows: FloatArray, exponents: Sequence[str]) -> list[Addition]:
    """Slices that were not run, of values that were or of such in their neighbourhood."""
    sizes = set(map(tuple, _spread(np.unique(rows[:, :2], axis=0))))
    n_active, n_total = min(sizes)
    if "n_active" in exponents:
        sizes |= {(n_active * step, n_total * step) for step in _STEPS}
    if "sparsity" in exponents:
        # Other numbers of experts at the same active size; never fewer parameters than active ones.
        sizes |= {(n_active, max(n_active, n_total * step)) for step in _STEPS}
    tokens, batches = (set(_spread(np.unique(rows[:, i]))) for i in (2, 3))
    if "tokens" in exponents:
        tokens |= {step * ends for step in _STEPS for ends in (min(tokens), max(tokens))}
    if "batch_tokens" in exponents:
        batches |= {step * ends for step in _STEPS for ends in (min(batches), max(batches))}
    run = set(map(tuple, rows))
    return [
        Addition(n_active=n, n_total=total, tokens=d, batch_tokens=b)
        for (n, total), d, b in itertools.product(sizes, tokens, batches)
        if (n, total, d, b) not in run and d >= _MIN_STEPS * b
    ]


def _spread(values: FloatArray) -> FloatArray:
    """At most eight of sorted values, the ends among them: as many choices as a planner needs."""
    return np.asarray(values[np.unique(np.linspace(0, len(values) - 1, 8).round().astype(int))])

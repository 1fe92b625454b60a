"""A Gaussian process over size, tokens, batch and LR, as a strategy of its own."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from bayeslr.recorded import QUANTILE_LEVELS, Campaign, answer

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import NDArray

    FloatArray = NDArray[np.float64]

# A run far above the floor says "far too high", and no more than that (nats).
_MAX_EXCESS = 0.3

# Logs of the kernel's scale and the noise, nats, and of the lengths in size, tokens, batch and LR,
# as shares of the pool's range.
_START = np.log([0.1, 0.003, 1.0, 1.0, 1.0, 0.5])


def gp_surface(campaign: Campaign) -> pd.DataFrame:
    """A Gaussian process over ln N, ln D, ln batch, ln LR: the largest variance per FLOP is bought.

    Squared-exponential kernel with a length a dimension and a linear trend, by maximum marginal
    likelihood. The answer is the minimum of posterior draws along ln LR at each target.
    """
    surface = _Surface(campaign)
    while len(left := campaign.affordable()):
        surface.fit(every=8)
        variance = surface.variance(left)
        campaign.buy(int(left[np.argmax(variance / campaign.pool.flops[left])]))
    surface.fit(every=1)
    return surface.answer()


class _Surface:
    """Loss as a Gaussian process of the logs of size, tokens, batch and LR."""

    def __init__(self, campaign: Campaign) -> None:
        self.campaign = campaign
        frame = campaign.pool.table.frame
        names = ("n_active", "tokens", "batch_tokens", "lr")
        self.x = np.log(frame[list(names)].to_numpy(dtype=float))
        self.low = self.x.min(axis=0)
        self.span = np.maximum(np.ptp(self.x, axis=0), math.log(2.0))
        self.parameters = _START
        self._fitted_at = -99

    def _scaled(self, x: FloatArray) -> FloatArray:
        return np.asarray((x - self.low) / self.span)

    def _kernel(self, a: FloatArray, b: FloatArray, parameters: FloatArray) -> FloatArray:
        scale, lengths = math.exp(parameters[0]), np.exp(parameters[2:])
        distance = (((a[:, None, :] - b[None, :, :]) / lengths) ** 2).sum(axis=2)
        # A trend in size and tokens: coefficients of standard deviation 0.5 nats a range.
        trend = 0.25 * (a[:, :2] @ b[:, :2].T)
        return np.asarray(scale**2 * np.exp(-0.5 * distance) + trend)

    def fit(self, every: int) -> None:
        """Condition on the runs bought; lengths anew once ``every`` more of them are there."""
        from scipy.linalg import cho_factor, cho_solve
        from scipy.optimize import minimize

        bought = self.campaign.bought
        loss = self.campaign.losses()
        finite = np.isfinite(loss)
        level = float(loss[finite].max()) if finite.any() else 3.0
        y = np.where(finite, loss, level + _MAX_EXCESS)
        y = np.minimum(y, y.min() + 1.0)
        self.a, self.mean = self._scaled(self.x[bought]), float(np.median(y))
        y = y - self.mean

        def cost(parameters: FloatArray) -> float:
            k = self._kernel(self.a, self.a, parameters)
            k[np.diag_indices_from(k)] += math.exp(2 * parameters[1]) + 1e-10
            try:
                factor = np.linalg.cholesky(k)
            except np.linalg.LinAlgError:
                return 1e9
            z = np.linalg.solve(factor, y)
            # Log-normal priors of sd 1 about the start keep a handful of runs from degenerating.
            away = parameters - _START
            return float(0.5 * z @ z + np.log(np.diag(factor)).sum() + 0.5 * away @ away)

        if len(bought) - self._fitted_at >= every:
            self.parameters = minimize(cost, self.parameters, method="L-BFGS-B",
                                       options={"maxiter": 30}).x  # fmt: skip
            self._fitted_at = len(bought)
        k = self._kernel(self.a, self.a, self.parameters)
        k[np.diag_indices_from(k)] += math.exp(2 * self.parameters[1]) + 1e-10
        self.factor = cho_factor(k, lower=True)
        self.weights = cho_solve(self.factor, y)

    def variance(self, runs: NDArray[np.int64]) -> FloatArray:
        """Posterior variance of the loss of runs of the pool."""
        from scipy.linalg import cho_solve

        b = self._scaled(self.x[runs])
        cross = self._kernel(self.a, b, self.parameters)
        prior = math.exp(2 * self.parameters[0]) + 0.25 * (b[:, :2] ** 2).sum(axis=1)
        return np.asarray(prior - (cross * cho_solve(self.factor, cross)).sum(axis=0))

    def answer(self) -> pd.DataFrame:
        """Quantiles of the minimum along ln LR, over posterior draws of each target's valley."""
        from scipy.linalg import cho_solve

        rng = np.random.default_rng([self.campaign.seed, 20_260_109])
        grid = np.linspace(self.x[:, 3].min(), self.x[:, 3].max(), 61)
        columns, best = [], []
        for t in self.campaign.targets:
            at = np.log([t.n_active, t.tokens, t.batch_tokens])
            b = self._scaled(np.column_stack([np.tile(at, (len(grid), 1)), grid]))
            cross = self._kernel(self.a, b, self.parameters)
            mean = cross.T @ self.weights
            spread = self._kernel(b, b, self.parameters) - cross.T @ cho_solve(self.factor, cross)
            scales, vectors = np.linalg.eigh((spread + spread.T) / 2)
            root = vectors * np.sqrt(np.maximum(scales, 0.0))
            draws = mean + rng.normal(size=(400, len(grid))) @ root.T
            found = grid[np.argmin(draws, axis=1)]
            columns.append(np.quantile(found, list(QUANTILE_LEVELS.values())))
            best.append(grid[int(np.argmin(mean))])
        return answer(self.campaign.targets, np.array(best), np.array(columns).T)

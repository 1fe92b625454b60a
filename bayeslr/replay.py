"""Replay: strategies that choose runs, side by side on recorded runs, scored at held-out targets.

A replay buys recorded runs within a share of the pool's FLOPs, from the same start for every
strategy, and scores the answer against the losses measured at the targets. Scores: regret in nats
of the recommended LR; coverage of the 50 and 90 % intervals; interval score of the 90 % interval in
octaves (Gneiting and Raftery 2007, eq. 43).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from bayeslr import acquire, predict, sampling
from bayeslr.errors import BayeslrError, DataError, SpecError
from bayeslr.features import REGRESSORS
from bayeslr.importers import steplaw
from bayeslr.recorded import (
    QUANTILE_LEVELS,
    START_LRS,
    STRATEGY_GROUP,
    Campaign,
    Pool,
    Strategy,
    answer,
    buy_start,
    copied,
    make_pool,
)
from bayeslr.runner_protocol import find_entry_point
from bayeslr.runs import read_csv as read_cells
from bayeslr.runs import read_runs
from bayeslr.specs import Target

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from bayeslr.posterior import Posterior

    FloatArray = NDArray[np.float64]

# Scoring: the optimum is the bottom of a cubic in ln LR through the runs within a factor of 4.1 of
# the best, sought within three quarters of an octave of it. A parabola reads skewed valleys low.
_CUBIC_WINDOW, _CUBIC_REACH, _CUBIC_RUNS = 1.41, 0.52, 5

# Nats per squared ln LR charged outside the measured LRs: a valley's usual curvature, so that
# leaving the measured range is never free.
_OUTSIDE = 0.027

# The classical design: LRs a slice (C_eta); the LRs of a factor of two to each side of the best.
_CLASSICAL_LRS = 5

# Draws a chain: of the refits that choose, and of the answer.
_LOOP_DRAWS, _FINAL_DRAWS = 150, 300

# A run far above the floor says "far too high", and no more than that (nats).
_MAX_EXCESS = 0.3


def read_pool(path: str | Path) -> Pool:
    """Pool of a run table, or of a raw Step Law CSV, which its header tells."""
    path = Path(path)
    if path.suffix.lower() == ".csv" and set(steplaw.DENSE_HEADER) <= set(read_cells(path).frame):
        return make_pool(steplaw.read(path))
    return make_pool(read_runs(path))


def read_truth(path: str | Path, targets: Sequence[Target]) -> pd.DataFrame:
    """Losses measured at the targets: target_id, lr, loss, diverged; LR ascending.

    Raises: DataError on a missing column, a value that is no number, or a target without rows.
    """
    path = Path(path)
    try:
        frame = pd.read_csv(path)
    except (OSError, ValueError) as error:
        raise DataError(f"truth file {path} cannot be read: {error}") from error
    for name in ("target_id", "lr", "loss"):
        if name not in frame:
            raise DataError(
                f"{path}: column {name!r} is missing; needed: target_id, lr, loss; also read: "
                "diverged"
            )
    for name in ("lr", "loss"):
        numbers = pd.to_numeric(frame[name], errors="coerce")
        bad = ~np.isfinite(numbers) | ((numbers <= 0) if name == "lr" else False)
        if bad.any():
            row = int(np.flatnonzero(bad)[0])
            raise DataError(
                f"{path} line {row + 2}: {name} must be a finite number, got "
                f"{frame[name].iloc[row]!r}; leave out the runs without one"
            )
        frame[name] = numbers
    if "diverged" in frame:
        frame["diverged"] = frame["diverged"].astype(str).str.lower().isin(["true", "1", "1.0"])
    else:
        frame["diverged"] = False
    known = set(frame.loc[~frame["diverged"], "target_id"].astype(str))
    for target in targets:
        if target.target_id not in known:
            raise DataError(f"{path}: target {target.target_id!r} has no finished run to score it")
    return frame.sort_values(["target_id", "lr"]).reset_index(drop=True)


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """How good predictions are, over all target slices. Regret in nats, the rest in octaves."""

    regret_mean: float
    regret_worst: float
    octave_error: float
    cover_50: float
    cover_90: float
    width_90: float
    interval_score: float


def optimum(log_lr: FloatArray, loss: FloatArray) -> float:
    """Natural log of the LR at a slice's optimum; log_lr ascending, both (run,)."""
    best = int(np.argmin(loss))
    near = np.abs(log_lr - log_lr[best]) <= _CUBIC_WINDOW
    if near.sum() < _CUBIC_RUNS:
        return float(log_lr[best])
    steps = np.linspace(-_CUBIC_REACH, _CUBIC_REACH, 401)
    cubic = np.polyfit(log_lr[near] - log_lr[best], loss[near], 3)
    return float(log_lr[best] + steps[np.argmin(np.polyval(cubic, steps))])


def score(truth: pd.DataFrame, predictions: pd.DataFrame) -> Score:
    """Score predictions against the losses measured at their targets (`read_truth`).

    Raises: DataError if a target is not predicted exactly once, or by no positive number.
    """
    from scipy.interpolate import PchipInterpolator

    columns = ["lr", *QUANTILE_LEVELS]
    if predictions["target_id"].duplicated().any():
        raise DataError("a target is predicted twice; keep one row a target")
    by_id = predictions.set_index("target_id")[columns].astype(float)
    rows = []
    for name, group in truth.groupby("target_id"):
        if name not in by_id.index:
            raise DataError(f"target {name!r} is not predicted; predict every target of the truth")
        given = by_id.loc[name].to_numpy()
        if not (np.isfinite(given) & (given > 0)).all():
            raise DataError(f"target {name!r} is predicted by {given}, not by positive numbers")
        log_given = np.log(given)
        log_lr = np.log(group["lr"].to_numpy())
        loss = group["loss"].to_numpy(dtype=float)
        finished = ~group["diverged"].to_numpy(dtype=bool)
        star = optimum(log_lr[finished], loss[finished])
        curve = PchipInterpolator(log_lr, loss)
        inside = float(np.clip(log_given[0], log_lr[0], log_lr[-1]))
        bottom = float(curve(np.linspace(log_lr[0], log_lr[-1], 2000)).min())
        regret = float(curve(inside)) - bottom + _OUTSIDE * (log_given[0] - inside) ** 2
        q05, q25, q50, q75, q95 = log_given[1:] / math.log(2.0)
        octave = star / math.log(2.0)
        miss = max(q05 - octave, octave - q95, 0.0)
        rows.append((regret, q50 - octave, q25 <= octave <= q75, q05 <= octave <= q95, q95 - q05,
                     q95 - q05 + 2.0 / 0.1 * miss))  # fmt: skip
    regret_, error, in50, in90, width, winkler = np.array(rows, dtype=float).T
    return Score(
        regret_mean=float(regret_.mean()),
        regret_worst=float(regret_.max()),
        octave_error=float(np.sqrt((error**2).mean())),
        cover_50=float(in50.mean()),
        cover_90=float(in90.mean()),
        width_90=float(np.median(width)),
        interval_score=float(winkler.mean()),
    )


# ------------------------------------------------------------------------------- strategies


def _posterior(campaign: Campaign, *, num_draws: int) -> Posterior:
    """Our model given the runs bought; where all of them diverged, the prior card alone."""
    runs = campaign.runs()
    if (runs.frame["status"] == "ok").any():
        return sampling.fit(
            runs, campaign.prior, seed=campaign.seed, fast=True, num_draws=num_draws
        )
    return predict.prior_posterior(campaign.prior, seed=campaign.seed)


def _predictions(campaign: Campaign) -> pd.DataFrame:
    """What our model says of the targets, given the runs bought."""
    return predict.predict(_posterior(campaign, num_draws=_FINAL_DRAWS), campaign.targets)


def bayeslr(campaign: Campaign) -> pd.DataFrame:
    """Ours: fit, choose, buy; in few rounds, each worth as much as the rest allows.

    A replay spends its whole budget, so that strategies are compared at equal compute: the stop
    rule is off.
    """
    pool = campaign.pool
    num_affordable = campaign.left_flops / pool.flops.min()
    rounds = int(np.clip(round(math.log2(max(num_affordable, 1.0)) - 2), 1, 4))
    for number in range(rounds, 0, -1):
        candidates = campaign.affordable()
        if len(candidates) == 0:
            break
        posterior = _posterior(campaign, num_draws=_LOOP_DRAWS)
        share = max(campaign.left_flops / number, START_LRS * float(pool.flops.min()))
        plan = acquire.choose(
            posterior,
            [acquire.Candidate(spec=pool.specs[i], flops=float(pool.flops[i])) for i in candidates],
            campaign.targets,
            num_runs=len(candidates),
            budget_flops=min(share, campaign.left_flops),
            seed=campaign.seed,
            only_paying=False,
        )
        by_spec = {id(pool.specs[i]): int(i) for i in candidates}
        for proposal in plan.proposals:
            campaign.buy(by_spec[id(proposal.spec)])
        if not plan.proposals and number == 1:
            break
    return _predictions(campaign)


def random(campaign: Campaign) -> pd.DataFrame:
    """Runs drawn at random from those that fit the budget; our model at the end."""
    rng = np.random.default_rng([campaign.seed, 20_260_108])
    while len(left := campaign.affordable()):
        campaign.buy(int(rng.choice(left)))
    return _predictions(campaign)


def ladder(campaign: Campaign) -> pd.DataFrame:
    """The grid, cheapest slices first, every second LR of each; our model at the end."""
    pool = campaign.pool
    for every in (2, 1):
        for number in range(int(pool.slice_of_run.max()) + 1):
            for run in pool.runs_of(number)[::every]:
                if run not in campaign.bought and pool.flops[run] <= campaign.left_flops:
                    campaign.buy(int(run))
    return _predictions(campaign)


def classical(campaign: Campaign) -> pd.DataFrame:
    """The O(n C_D C_eta) design: a size at a time, its token counts, a few LRs; least squares.

    One batch a cell, its middle one; batches to both sides once every affordable cell has one.
    Five LRs a slice about the best LR so far (WSD's factor along D does not apply to recorded
    cosine runs, so each token count is paid for).
    """
    pool = campaign.pool
    for slices in _rings(pool):
        for number in slices:
            runs = pool.runs_of(int(number))
            loss = campaign.losses()
            best = pool.log_lr[campaign.bought[int(np.argmin(loss))]]
            order = np.argsort(np.abs(pool.log_lr[runs] - best), kind="stable")
            step = 2 if len(runs) >= 2 * _CLASSICAL_LRS else 1
            middle = int(order[0])
            wanted = [middle + step * j for j in (0, -1, 1, -2, 2)]
            chosen = [int(runs[j]) for j in wanted if 0 <= j < len(runs)]
            new = [run for run in chosen if run not in campaign.bought]
            cost = math.fsum(pool.flops[new])
            if cost > campaign.left_flops:
                continue
            for run in new:
                campaign.buy(run)
    return _least_squares(campaign)


def _rings(pool: Pool) -> list[list[int]]:
    """Slices by their batch's distance from the cell's middle one, each ring cheapest first."""
    frame = pool.table.frame
    cells: dict[tuple[float, ...], list[int]] = {}
    for number in range(int(pool.slice_of_run.max()) + 1):
        row = frame.iloc[int(pool.runs_of(number)[0])]
        key = (float(row["n_active"]), float(row["n_total"]), float(row["tokens"]))
        cells.setdefault(key, []).append(number)
    rings: dict[int, list[int]] = {}
    for numbers in cells.values():
        numbers.sort(key=lambda s: float(frame["batch_tokens"].iloc[int(pool.runs_of(s)[0])]))
        for place, number in enumerate(numbers):
            rings.setdefault(abs(place - (len(numbers) - 1) // 2), []).append(number)
    return [sorted(rings[distance]) for distance in sorted(rings)]


def _least_squares(campaign: Campaign) -> pd.DataFrame:
    """The two-stage estimator's answer; with under two optima, the best LR copied."""
    runs = campaign.runs()
    try:
        posterior = sampling.fit(runs, campaign.prior, seed=campaign.seed, method="two-stage")
        table = predict.predict(posterior, campaign.targets)
        found = table[["lr", *QUANTILE_LEVELS]].to_numpy(dtype=float)
        if (np.isfinite(found) & (found > 1e-12) & (found < 1e3)).all():
            return table
    except DataError:
        pass
    return copied(campaign, campaign.bought)


def d_optimal(campaign: Campaign) -> pd.DataFrame:
    """Three LRs a slice, slices by D-optimality per FLOP for the LR law; our model at the end.

    The regressors are those of the law (1, ln n_active, ln sparsity, ln tokens, ln batch), with a
    unit prior on their standardised coefficients; what raises ln det of the information most per
    FLOP is bought.
    """
    pool = campaign.pool
    first = np.array([pool.runs_of(s)[0] for s in range(int(pool.slice_of_run.max()) + 1)])
    frame = pool.table.frame.iloc[first]
    n_active, n_total, tokens, batch = (
        np.log(frame[name].to_numpy(dtype=float))
        for name in ("n_active", "n_total", "tokens", "batch_tokens")
    )
    raw = np.column_stack([n_active, n_active - n_total, tokens, batch])
    spread = raw.std(axis=0)
    x = np.column_stack(
        [np.ones(len(raw)), (raw - raw.mean(axis=0)) / np.where(spread > 0, spread, 1.0)]
    )
    information = np.eye(len(REGRESSORS) + 1)
    for number in np.unique(pool.slice_of_run[campaign.bought]):
        information += np.outer(x[number], x[number])
    tried = set(np.unique(pool.slice_of_run[campaign.bought]).tolist())
    while True:
        inverse = np.linalg.inv(information)
        gain = np.log1p(np.einsum("si,ij,sj->s", x, inverse, x)) / pool.flops[first]
        for number in np.argsort(-gain, kind="stable"):
            runs = [int(r) for r in _about_best(campaign, int(number)) if r not in campaign.bought]
            if number in tried or math.fsum(pool.flops[runs]) > campaign.left_flops:
                continue
            for run in runs:
                campaign.buy(run)
            information += np.outer(x[number], x[number])
            tried.add(int(number))
            break
        else:
            break
    return _predictions(campaign)


def _about_best(campaign: Campaign, number: int) -> list[int]:
    """Three LRs of a slice, an octave apart, about the best LR so far."""
    pool = campaign.pool
    runs = pool.runs_of(number)
    best = pool.log_lr[campaign.bought[int(np.argmin(campaign.losses()))]]
    wanted = best + math.log(2.0) * np.array([0.0, -1.0, 1.0])
    chosen = [int(runs[np.argmin(np.abs(pool.log_lr[runs] - w))]) for w in wanted]
    return list(dict.fromkeys(chosen))


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
        self.low, self.span = self.x.min(axis=0), np.maximum(np.ptp(self.x, axis=0), 1e-9)
        self.span = np.maximum(self.span, math.log(2.0))
        self.parameters = np.log([0.1, 0.003, 1.0, 1.0, 1.0, 0.5])
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
            away = parameters - np.log([0.1, 0.003, 1.0, 1.0, 1.0, 0.5])
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


STRATEGIES: Mapping[str, Strategy] = {
    "bayeslr": bayeslr,
    "random": random,
    "ladder": ladder,
    "classical": classical,
    "d-optimal": d_optimal,
    "gp-surface": gp_surface,
}


def strategies(name: str) -> tuple[dict[str, Strategy], list[str]]:
    """Strategies by name (``all``: every one), and notices of those that are not installed.

    Raises: SpecError for an unknown name.
    """
    plugged = sorted(point.name for point in entry_points(group=STRATEGY_GROUP))
    if name != "all" and name not in STRATEGIES and name not in plugged:
        raise SpecError(
            f"no strategy named {name!r}; there are all, {', '.join([*STRATEGIES, *plugged])}"
        )
    found = {k: v for k, v in STRATEGIES.items() if name in ("all", k)}
    notices = []
    for key in plugged:
        if name not in ("all", key):
            continue
        try:
            found[key] = find_entry_point(STRATEGY_GROUP, key)
        except SpecError as error:
            if name == key:
                raise
            notices.append(f"strategy {key} is left out: {error}")
    return found, notices


# ----------------------------------------------------------------------------------- replay


def replay(pool: Pool, targets: Sequence[Target], truth: pd.DataFrame, *,
           chosen: Mapping[str, Strategy], budget_shares: Sequence[float], seeds: Sequence[int],
           prior: str, progress: Callable[[str], None] = lambda line: None,
           ) -> pd.DataFrame:  # fmt: skip
    """Scores, one row a strategy, budget and seed.

    Columns: strategy, budget_share, seed, the fields of `Score`, runs, flops_share.
    Raises: SpecError if a share is outside (0, 1] or too small for a run.
    """
    rows: list[dict[str, Any]] = []
    for share in budget_shares:
        if not 0 < share <= 1:
            raise SpecError(f"--budget is a share of the pool's FLOPs in (0, 1], got {share}")
        for seed in seeds:
            for name, strategy in chosen.items():
                campaign = Campaign(
                    pool=pool, targets=targets, budget_flops=share * pool.total_flops, seed=seed,
                    prior=prior,
                )  # fmt: skip
                buy_start(campaign)
                try:
                    predictions = strategy(campaign)
                except BayeslrError as error:
                    progress(f"{name}, seed {seed}: {error}; the best LR is copied instead")
                    predictions = copied(campaign, campaign.bought)
                found = score(truth, predictions)
                spent = math.fsum(pool.flops[campaign.bought])
                rows.append(
                    {"strategy": name, "budget_share": share, "seed": seed}
                    | {field: getattr(found, field) for field in found.__slots__}
                    | {"runs": len(campaign.bought), "flops_share": spent / pool.total_flops}
                )
                progress(
                    f"{name} at {100 * share:g} %, seed {seed}: {len(campaign.bought)} runs, "
                    f"regret {found.regret_mean:.4f} nats, coverage {found.cover_90:.2f}"
                )
    return pd.DataFrame(rows)


def summary(scores: pd.DataFrame) -> list[dict[str, Any]]:
    """Averages over seeds, one entry a strategy and budget, in order of appearance.

    ``regret_low`` and ``regret_high`` are the least and the largest mean regret of a seed.
    """
    entries: list[dict[str, Any]] = []
    for (name, share), group in scores.groupby(["strategy", "budget_share"], sort=False):
        means = group.drop(columns=["strategy", "budget_share", "seed"]).mean()
        entries.append(
            {"strategy": name, "budget_share": float(str(share)), "seeds": len(group)}
            | {str(key): float(value) for key, value in means.items()}
            | {"regret_low": float(group["regret_mean"].min()),
               "regret_high": float(group["regret_mean"].max())}
        )  # fmt: skip
    return entries


def plot(scores: pd.DataFrame, path: Path) -> None:
    """Regret, coverage and interval score against the share of compute, bands over seeds."""
    import matplotlib

    matplotlib.use("Agg", force=False)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.6), layout="constrained")
    panels = (
        ("regret_mean", "mean regret, nats"), ("cover_90", "coverage of 90 % intervals"),
        ("interval_score", "interval score, octaves"),
    )  # fmt: skip
    for axes, (column, label) in zip(figure.subplots(1, 3), panels, strict=True):
        for name, group in scores.groupby("strategy", sort=False):
            by_share = group.groupby("budget_share")[column]
            share = np.array(sorted(group["budget_share"].unique()))
            (line,) = axes.plot(100 * share, by_share.mean(), marker="o", ms=3, label=str(name))
            axes.fill_between(
                100 * share, by_share.quantile(0.1), by_share.quantile(0.9), alpha=0.15,
                color=line.get_color(), lw=0,
            )  # fmt: skip
        axes.set(xscale="log", xlabel="share of the pool's compute, %", ylabel=label)
        if column != "cover_90":
            axes.set_yscale("log")
        else:
            axes.axhline(0.9, color="0.6", lw=0.8)
    figure.axes[0].legend(fontsize=7, frameon=False)
    figure.savefig(path, format=path.suffix.lstrip(".") or "svg")

"""Strategies of a replay that need no further package: ours, and what people do without it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from bayeslr import acquire, predict, sampling
from bayeslr.errors import DataError
from bayeslr.features import REGRESSORS
from bayeslr.recorded import QUANTILE_LEVELS, START_LRS, Campaign, Pool, copied
from bayeslr.replay.laplace import normal_posterior

if TYPE_CHECKING:
    import pandas as pd

# The classical design: LRs a slice (C_eta); the LRs of a factor of two to each side of the best.
_CLASSICAL_LRS = 5

# Draws a chain of the answer.
_NUM_DRAWS = 300

_MAX_ROUNDS = 4


def _predictions(campaign: Campaign) -> pd.DataFrame:
    """What our model says of the targets, given the runs bought; else the prior card alone."""
    runs = campaign.runs()
    if (runs.frame["status"] == "ok").any():
        posterior = sampling.fit(
            runs, campaign.prior, seed=campaign.seed, fast=True, num_draws=_NUM_DRAWS
        )
    else:
        posterior = predict.prior_posterior(campaign.prior, seed=campaign.seed)
    return predict.predict(posterior, campaign.targets)


def bayeslr(campaign: Campaign) -> pd.DataFrame:
    """Ours: fit, choose, buy; in few rounds, each worth as much as the rest allows.

    A replay spends its whole budget, so that strategies are compared at equal compute: the stop
    rule is off.
    """
    pool = campaign.pool
    sizes = _largest_sizes(campaign)
    num_affordable = campaign.left_flops / pool.flops.min()
    rounds = int(np.clip(round(math.log2(max(num_affordable, 1.0)) - 2), 1, _MAX_ROUNDS))
    for number in range(rounds, 0, -1):
        candidates = campaign.affordable()
        if len(candidates) == 0:
            break
        if (campaign.runs().frame["status"] == "ok").any():
            posterior = normal_posterior(
                campaign.runs(), campaign.prior, sizes=sizes, seed=campaign.seed
            )
        else:
            posterior = predict.prior_posterior(campaign.prior, seed=campaign.seed)
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
    return _predictions(campaign)


def _largest_sizes(campaign: Campaign) -> dict[str, int]:
    """Most runs, slices, cells and shapes that the campaign can end with."""
    pool = campaign.pool
    runs = len(campaign.bought) + int(campaign.left_flops / pool.flops.min())
    frame = pool.table.frame.iloc[np.unique(pool.slice_of_run, return_index=True)[1]]
    shapes = frame[["family", "n_active", "n_total"]]
    cells = frame[["family", "n_active", "n_total", "tokens"]]
    sizes = {"slice": len(frame), "cell": len(cells.drop_duplicates()),
             "shape": len(shapes.drop_duplicates())}  # fmt: skip
    return {"run": runs} | {level: min(size, runs) for level, size in sizes.items()}


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

"""Strategies of a replay that need no further package: ours, and what people do without it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from bayeslr import acquire, designs, predict, sampling
from bayeslr.errors import DataError
from bayeslr.recorded import QUANTILE_LEVELS, Campaign, copied
from bayeslr.replay.laplace import normal_posterior
from bayeslr.space import Candidate

if TYPE_CHECKING:
    import pandas as pd

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
        share = max(campaign.left_flops / number, designs.START_LRS * float(pool.flops.min()))
        plan = acquire.choose(
            posterior,
            [Candidate(spec=pool.specs[i], flops=float(pool.flops[i])) for i in candidates],
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
    _follow(campaign, designs.ladder)
    return _predictions(campaign)


def classical(campaign: Campaign) -> pd.DataFrame:
    """The O(n C_D C_eta) design, then least squares.

    WSD's factor along D does not apply to recorded cosine runs, so each token count is paid for.
    """
    _follow(campaign, designs.classical)
    return _least_squares(campaign)


def d_optimal(campaign: Campaign) -> pd.DataFrame:
    """Three LRs a slice, slices by D-optimality per FLOP for the LR law; our model at the end."""
    _follow(campaign, designs.d_optimal)
    return _predictions(campaign)


def _follow(campaign: Campaign, design: designs.Design) -> None:
    """Buy step after step of a design to its end."""
    while step := design(_menu(campaign)):
        for run in step:
            campaign.buy(run)


def _menu(campaign: Campaign) -> designs.Menu:
    pool = campaign.pool
    loss = np.full(len(pool), np.nan)
    loss[campaign.bought] = campaign.losses()
    names = ("n_active", "n_total", "tokens", "batch_tokens")
    return designs.Menu(
        **{name: pool.table.frame[name].to_numpy(dtype=float) for name in names},
        log_lr=pool.log_lr, flops=pool.flops, slice_of_run=pool.slice_of_run, loss=loss,
        left_flops=campaign.left_flops,
    )  # fmt: skip


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

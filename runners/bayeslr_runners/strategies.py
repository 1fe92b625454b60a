"""Optuna's samplers as strategies of a replay: tune at the largest affordable cell, copy the LR.

What people do without a scaling law. The budget buys `LEAST_TRIALS` or more LRs of one slice at the
largest cell that allows it; a sampler proposes LRs there and the nearest recorded run that is not
bought yet answers. The best LR is copied to every target. Its interval is what such a search knows:
from the next LR tried below the best to the next one above, an octave to each side at least.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import optuna
from optuna.distributions import FloatDistribution

from bayeslr.recorded import Campaign, copied

if TYPE_CHECKING:
    import pandas as pd
    from optuna.samplers import BaseSampler

LEAST_TRIALS = 5
"""Trials that a search of one LR needs to be one: two to each side of the best."""


def tpe(campaign: Campaign) -> pd.DataFrame:
    """Tree-structured Parzen estimator."""
    return _search(campaign, optuna.samplers.TPESampler(seed=campaign.seed, n_startup_trials=3))


def gp(campaign: Campaign) -> pd.DataFrame:
    """Optuna's Gaussian process; its random sampler where PyTorch, which it needs, is missing."""
    try:
        import torch

        torch.set_num_threads(1)
    except ModuleNotFoundError:
        return _search(campaign, optuna.samplers.RandomSampler(seed=campaign.seed))
    return _search(campaign, optuna.samplers.GPSampler(seed=campaign.seed, n_startup_trials=3))


def _search(campaign: Campaign, sampler: BaseSampler) -> pd.DataFrame:
    pool = campaign.pool
    slice_number = _largest_slice(campaign)
    runs = pool.runs_of(slice_number)
    log_lr = pool.log_lr[runs]
    low, high = float(np.exp(log_lr.min())), float(np.exp(log_lr.max()))
    space = {"lr": FloatDistribution(low, high * (1 + 1e-9), log=True)}
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        study = optuna.create_study(sampler=sampler)
        for run in campaign.bought:
            if pool.slice_of_run[run] == slice_number:
                _tell(campaign, study, space, run)
        while len(left := [r for r in runs if r in set(campaign.affordable())]):
            trial = study.ask(space)
            distance = np.abs(pool.log_lr[left] - math.log(trial.params["lr"]))
            run = int(left[int(np.argmin(distance))])
            campaign.buy(run)
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
            _tell(campaign, study, space, run)
    finally:
        optuna.logging.set_verbosity(before)
    bought = [run for run in campaign.bought if pool.slice_of_run[run] == slice_number]
    losses = campaign.losses()
    finite = [run for run in bought if np.isfinite(losses[campaign.bought.index(run)])]
    return copied(campaign, bought if finite else campaign.bought)


def _tell(campaign: Campaign, study: optuna.Study, space: dict[str, FloatDistribution],
          run: int) -> None:  # fmt: skip
    """Enter a run at the LR that was recorded; a diverged one as far above the worst."""
    losses = campaign.losses()
    value = float(losses[campaign.bought.index(run)])
    if not math.isfinite(value):
        finite = losses[np.isfinite(losses)]
        value = (float(finite.max()) if len(finite) else 3.0) + 0.3
    lr = float(np.clip(np.exp(campaign.pool.log_lr[run]), space["lr"].low, space["lr"].high))
    study.add_trial(
        optuna.trial.create_trial(params={"lr": lr}, distributions=dict(space), value=value)
    )


def _largest_slice(campaign: Campaign) -> int:
    """Dearest cell of which the budget buys enough runs; of its slices the targets' batch."""
    pool, left = campaign.pool, campaign.left_flops
    slices = range(int(pool.slice_of_run.max()) + 1)
    cost = np.array([pool.flops[pool.runs_of(s)[0]] for s in slices])
    enough = [s for s in slices if LEAST_TRIALS * cost[s] <= left] or [int(np.argmin(cost))]
    top = max(cost[s] for s in enough)
    batch = pool.table.frame["batch_tokens"].to_numpy(dtype=float)
    wanted = float(np.median([math.log(t.batch_tokens) for t in campaign.targets]))
    largest = [s for s in enough if cost[s] >= top * (1 - 1e-9)]
    return min(largest, key=lambda s: abs(math.log(batch[pool.runs_of(s)[0]]) - wanted))

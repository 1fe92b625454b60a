"""Recorded runs as a pool to buy from: what each costs, what is left, and where to start.

The bookkeeping of a replay. A strategy is a function of a `Campaign` that buys runs and returns the
predictions table; strategies of other packages are found through the entry-point group
``bayeslr.strategies``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from bayeslr.designs import START_LRS, slices_from_cheapest, spread
from bayeslr.errors import DataError, SpecError
from bayeslr.runs import RunTable, horizon
from bayeslr.specs import COVARIATES, SCHEDULES, RunSpec, Target, covariate_arguments
from bayeslr.units import format_quantity, train_flops

if TYPE_CHECKING:
    from numpy.typing import NDArray

    FloatArray = NDArray[np.float64]
    IntArray = NDArray[np.int64]

STRATEGY_GROUP = "bayeslr.strategies"

MAX_START_RUNS = 6

QUANTILE_LEVELS = {"lr_q05": 0.05, "lr_q25": 0.25, "lr_q50": 0.5, "lr_q75": 0.75, "lr_q95": 0.95}

_ROUNDING = 1e-12
"""Share of a budget that sums of costs in another order may differ by."""

_SLICE_KEY = ["family", "n_active", "n_total", "tokens", "batch_tokens"]


@dataclass(frozen=True, kw_only=True)
class Pool:
    """Recorded runs, one a row of ``table``, and their FLOPs (run,).

    ``specs`` are the runs as a strategy would ask for them; ``slice_of_run`` (run,) numbers the
    slices from the cheapest up.
    """

    table: RunTable
    flops: FloatArray
    specs: tuple[RunSpec, ...]
    slice_of_run: IntArray

    def __len__(self) -> int:
        return len(self.flops)

    @property
    def total_flops(self) -> float:
        """FLOPs of all runs."""
        return float(self.flops.sum())

    @property
    def log_lr(self) -> FloatArray:
        """Natural log of the peak LRs (run,)."""
        return np.asarray(np.log(self.table.frame["lr"].to_numpy(dtype=float)))

    def runs_of(self, number: int) -> IntArray:
        """Runs of a slice, LR ascending."""
        runs = np.flatnonzero(self.slice_of_run == number)
        return runs[np.argsort(self.log_lr[runs], kind="stable")]


def make_pool(table: RunTable) -> Pool:
    """Pool of the finished and diverged runs of a table; cost 6 N_active D a run.

    A diverged run costs its whole horizon. Repeats of one LR in a slice stay runs of their own.
    Raises: DataError if no run is left.
    """
    frame = table.frame[table.frame["status"].isin(["ok", "diverged"])].reset_index(drop=True)
    if frame["batch_tokens"].isna().any():
        raise DataError(f"{table.source}: a replay needs batch_tokens of every run")
    if frame.empty:
        raise DataError(f"{table.source}: no finished or diverged run to replay; see bayeslr check")
    frame["tokens"] = horizon(frame)
    flops = np.array([
        train_flops(n, t) for n, t in zip(frame["n_active"], frame["tokens"], strict=True)
    ])  # fmt: skip
    code = frame.groupby(_SLICE_KEY, sort=True, dropna=False).ngroup().to_numpy()
    return Pool(
        table=RunTable(frame, source=table.source),
        flops=flops,
        specs=tuple(_spec(row) for row in frame.to_dict("records")),
        slice_of_run=slices_from_cheapest(code.astype(np.int64), flops),
    )


def _spec(row: Mapping[Any, Any]) -> RunSpec:
    names = ("lr", "tokens", "batch_tokens", "n_active", "n_total", "seq_len", *COVARIATES)
    numbers = {name: float(row[name]) for name in names}
    seq_len = numbers["seq_len"]
    stated = {name: numbers[name] for name in COVARIATES if math.isfinite(numbers[name])}
    return RunSpec(
        run_id=str(row["run_id"]),
        family=str(row["family"]),
        runner="table",
        lr=numbers["lr"],
        tokens=round(numbers["tokens"]),
        batch_tokens=round(numbers["batch_tokens"]),
        n_active=round(numbers["n_active"]),
        n_total=round(numbers["n_total"]),
        seq_len=round(seq_len) if math.isfinite(seq_len) else 1,
        param_convention=str(row["param_convention"]),
        # A run table may name schedules that no runner knows; recorded runs are not trained again.
        schedule=row["schedule"] if row["schedule"] in SCHEDULES else "cosine",
        **covariate_arguments(stated),
    )


@dataclass(kw_only=True)
class Campaign:
    """One replay: the pool, the targets, the budget, and the runs bought so far, in order."""

    pool: Pool
    targets: Sequence[Target]
    budget_flops: float
    seed: int
    prior: str
    bought: list[int] = field(default_factory=list)

    @property
    def left_flops(self) -> float:
        """FLOPs that are not spent, and what rounding may come to: a budget of the whole pool buys
        the last run too, in whatever order.
        """
        budget = self.budget_flops * (1.0 + _ROUNDING)
        return budget - math.fsum(self.pool.flops[self.bought])

    def buy(self, run: int) -> None:
        """Pay for a run. Raises: SpecError if it was bought before or does not fit the budget."""
        if run in self.bought:
            raise SpecError(f"run {self.pool.specs[run].run_id} was bought before; choose another")
        if self.pool.flops[run] > self.left_flops:
            raise SpecError(
                f"run {self.pool.specs[run].run_id} costs {format_quantity(self.pool.flops[run])} "
                f"FLOPs and {format_quantity(self.left_flops)} are left; choose a cheaper one"
            )
        self.bought.append(run)

    def affordable(self) -> IntArray:
        """Runs that are not bought and fit what is left of the budget."""
        open_ = self.pool.flops <= self.left_flops
        open_[self.bought] = False
        return np.flatnonzero(open_)

    def runs(self) -> RunTable:
        """Rows of the runs bought."""
        frame = self.pool.table.frame.iloc[self.bought].reset_index(drop=True)
        return RunTable(frame, source=self.pool.table.source)

    def losses(self) -> FloatArray:
        """Losses of the runs bought, in order; infinite for diverged ones."""
        frame = self.runs().frame
        loss = frame["loss"].to_numpy(dtype=float)
        return np.where(frame["status"].to_numpy() == "ok", loss, np.inf)


Strategy = Callable[[Campaign], pd.DataFrame]
"""Buys runs of a campaign that holds its start, and answers with the predictions table: target_id,
lr, lr_q05, lr_q25, lr_q50, lr_q75, lr_q95."""


def buy_start(campaign: Campaign) -> None:
    """Buy the runs that every strategy starts from: a function of pool, budget and seed alone.

    Slices of the cheapest cell, three LRs spread over each; as many slices as a third of the budget
    pays for, two at most; at least one run.
    """
    pool = campaign.pool
    rng = np.random.default_rng([campaign.seed, 20_260_107])
    cheapest = np.flatnonzero(pool.flops <= pool.flops.min() * (1 + 1e-9))
    slices = np.unique(pool.slice_of_run[cheapest])
    num_runs = int(campaign.budget_flops / 3 / pool.flops.min()) // START_LRS * START_LRS
    num_runs = min(max(num_runs, START_LRS), MAX_START_RUNS)
    for place in spread(len(slices), max(1, num_runs // START_LRS), rng):
        runs = pool.runs_of(int(slices[place]))
        for i in spread(len(runs), START_LRS, rng):
            if pool.flops[runs[i]] <= campaign.left_flops:
                campaign.buy(int(runs[i]))
    if not campaign.bought:
        raise SpecError(
            f"the budget, {format_quantity(campaign.budget_flops)} FLOPs, is below the cheapest "
            f"run's {format_quantity(float(pool.flops.min()))}; give a larger share"
        )


def answer(targets: Sequence[Target], log_lr: FloatArray, quantiles: FloatArray) -> pd.DataFrame:
    """Predictions table from ln LRs (target,) and quantiles of ln LR* (quantile, target)."""
    columns = dict(zip(QUANTILE_LEVELS, np.exp(quantiles), strict=True))
    names = [target.target_id for target in targets]
    return pd.DataFrame({"target_id": names, "lr": np.exp(log_lr), **columns})


def copied(campaign: Campaign, runs: Sequence[int]) -> pd.DataFrame:
    """The best LR of these runs for every target; its neighbours tried are the 90 % interval.

    Beyond the LRs tried, and at least, an octave to each side; in between, a normal.
    """
    loss = campaign.losses()
    losses = np.array([loss[campaign.bought.index(run)] for run in runs])
    log_lr = campaign.pool.log_lr[list(runs)]
    best = float(log_lr[int(np.argmin(losses))])
    half = math.log(2.0)
    below, above = log_lr[log_lr < best - 1e-9], log_lr[log_lr > best + 1e-9]
    low = min(best - half, float(below.max())) if len(below) else best - half
    high = max(best + half, float(above.min())) if len(above) else best + half
    quartile = 0.6745 / 1.6449  # of a standard normal: its 75 % and 95 % points
    marks = [low, best - quartile * (best - low), best, best + quartile * (high - best), high]
    size = len(campaign.targets)
    return answer(
        campaign.targets, np.full(size, best), np.repeat(np.array(marks)[:, None], size, 1)
    )

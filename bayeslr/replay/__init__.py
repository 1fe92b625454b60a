"""Replay: strategies that choose runs, side by side on recorded runs, scored at held-out targets.

A replay buys recorded runs within a share of the pool's FLOPs, from the same start for every
strategy, and scores the answer against the losses measured at the targets.
"""

from __future__ import annotations

import math
import multiprocessing
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pandas as pd

from bayeslr.errors import SpecError
from bayeslr.importers import steplaw
from bayeslr.recorded import STRATEGY_GROUP, Campaign, Pool, Strategy, buy_start, copied, make_pool
from bayeslr.replay.builtin import bayeslr, classical, d_optimal, ladder, random
from bayeslr.replay.figure import plot as plot
from bayeslr.replay.scoring import (
    Score as Score,
)
from bayeslr.replay.scoring import (
    optimum as optimum,
)
from bayeslr.replay.scoring import (
    read_truth as read_truth,
)
from bayeslr.replay.scoring import (
    score as score,
)
from bayeslr.replay.surface import gp_surface
from bayeslr.runner_protocol import find_entry_point
from bayeslr.runs import read_csv as read_cells
from bayeslr.runs import read_runs
from bayeslr.specs import Target


def read_pool(path: str | Path) -> Pool:
    """Pool of a run table, or of a raw Step Law CSV, which its header tells."""
    path = Path(path)
    if path.suffix.lower() == ".csv" and set(steplaw.DENSE_HEADER) <= set(read_cells(path).frame):
        return make_pool(steplaw.read(path))
    return make_pool(read_runs(path))


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

    ``bayes``, as a sweep calls it, is ours. Raises: SpecError for an unknown name.
    """
    name = "bayeslr" if name == "bayes" else name
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


@dataclass(frozen=True, kw_only=True)
class Task:
    """One replay: a strategy at a share of the pool's FLOPs, with a seed."""

    name: str
    strategy: Strategy
    budget_share: float
    seed: int


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What all replays share: pool, targets, truth and prior card."""

    pool: Pool
    targets: Sequence[Target]
    truth: pd.DataFrame
    prior: str

    def campaign(self, task: Task) -> Campaign:
        """A replay's start, bought. Raises: SpecError for a budget below the cheapest run."""
        campaign = Campaign(
            pool=self.pool, targets=self.targets, seed=task.seed, prior=self.prior,
            budget_flops=task.budget_share * self.pool.total_flops,
        )  # fmt: skip
        buy_start(campaign)
        return campaign

    def run(self, task: Task) -> dict[str, Any]:
        """Row of scores. ``failure`` says what broke, after which the best LR was copied."""
        campaign = self.campaign(task)
        started, failure = time.monotonic(), ""
        try:
            found = score(self.truth, task.strategy(campaign))
        except Exception as error:  # a strategy of another package may raise anything
            failure = f"{type(error).__name__}: {error}"
            found = score(self.truth, copied(campaign, campaign.bought))
        return {
            "strategy": task.name, "budget_share": task.budget_share, "seed": task.seed,
            **{field: getattr(found, field) for field in found.__slots__},
            "runs": len(campaign.bought),
            "flops_share": math.fsum(self.pool.flops[campaign.bought]) / self.pool.total_flops,
            "seconds": time.monotonic() - started,
            "failure": failure,
        }  # fmt: skip


def replays(bench: Bench, tasks: Sequence[Task], *, jobs: int = 1) -> Iterator[dict[str, Any]]:
    """Rows of scores as they are finished, ``jobs`` at a time.

    Strategies of other packages run in processes of their own, for some load PyTorch and ours load
    JAX, which never share one. Raises: SpecError, before anything is run, for a budget below the
    cheapest run.
    """
    for task in tasks:
        bench.campaign(task)
    ours = [task for task in tasks if task.strategy.__module__.partition(".")[0] == "bayeslr"]
    others = [task for task in tasks if task not in ours]
    if jobs == 1:
        yield from map(bench.run, ours)
        ours = []
    for group in (ours, others):
        if not group:
            continue
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(
            min(jobs, len(group)), mp_context=context, initializer=_begin, initargs=(bench,)
        ) as executor:
            waiting = [executor.submit(_run, task) for task in group]
            try:
                for future in as_completed(waiting):
                    yield future.result()
            finally:
                executor.shutdown(cancel_futures=True)


_bench: Bench | None = None


def _begin(bench: Bench) -> None:
    global _bench
    _bench = bench


def _run(task: Task) -> dict[str, Any]:
    assert _bench is not None
    return _bench.run(task)


def tasks_of(chosen: Mapping[str, Strategy], budget_shares: Sequence[float],
             seeds: Sequence[int]) -> list[Task]:  # fmt: skip
    """Every strategy at every share with every seed; seed by seed, so that figures come early.

    Raises: SpecError if a share is outside (0, 1].
    """
    for share in budget_shares:
        if not 0 < share <= 1:
            raise SpecError(f"--budget is a share of the pool's FLOPs in (0, 1], got {share}")
    return [
        Task(name=name, strategy=strategy, budget_share=share, seed=seed)
        for seed in seeds for share in budget_shares for name, strategy in chosen.items()
    ]  # fmt: skip


def table_of(rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Scores, one row a replay: strategy, budget_share, seed, the fields of `Score`, runs,
    flops_share, seconds, failure. In the order of budgets and seeds, whichever ended first.
    """
    frame = pd.DataFrame(rows)
    names = list(dict.fromkeys([*STRATEGIES, *sorted(set(frame["strategy"]))]))
    frame = frame.assign(_order=frame["strategy"].map(names.index)).sort_values(
        ["budget_share", "_order", "seed"]
    )
    return frame.drop(columns="_order").reset_index(drop=True)


def summary(scores: pd.DataFrame) -> list[dict[str, Any]]:
    """Averages over seeds, one entry a strategy and budget, in order of appearance.

    ``regret_low`` and ``regret_high`` are the least and the largest mean regret of a seed;
    ``failures`` counts the seeds in which the strategy broke and the best LR was copied.
    """
    entries: list[dict[str, Any]] = []
    for (name, share), group in scores.groupby(["strategy", "budget_share"], sort=False):
        means = group.drop(columns=["strategy", "budget_share", "seed", "failure"]).mean()
        entries.append(
            {"strategy": name, "budget_share": float(str(share)), "seeds": len(group)}
            | {str(key): float(value) for key, value in means.items()}
            | {"regret_low": float(group["regret_mean"].min()),
               "regret_high": float(group["regret_mean"].max()),
               "failures": int((group["failure"] != "").sum())}
        )  # fmt: skip
    return entries

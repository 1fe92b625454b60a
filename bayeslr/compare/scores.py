"""What the held-out runs say: loss, regret and differences between arms, each with its interval.

Seeds are paired: the runs of one seed see the same batches, so a seed shifts all cells of a target
alike, and that shift cancels in differences. What is left (cell by seed) is the noise of a loss; it
is pooled over the cells of a target. A cell's mean is then known up to a Student t of that noise,
and every interval below is read off joint draws of those.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from bayeslr.compare.arms import Arm
from bayeslr.compare.heldout import Cell

if TYPE_CHECKING:
    from numpy.typing import NDArray

    FloatArray = NDArray[np.float64]

PROB = 0.9
NUM_DRAWS = 10_000
"""Draws behind each interval: Monte Carlo error of a 5 % quantile about 0.02 of its sd."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """A value in nats per token and its 90 % interval; no interval from a single seed."""

    value: float
    low: float | None = None
    high: float | None = None

    @property
    def settled(self) -> bool:
        """Whether the interval excludes zero."""
        return self.low is not None and self.high is not None and self.low * self.high > 0

    def document(self) -> dict[str, float | None]:
        """JSON-safe form."""
        return {"value": self.value, "low": self.low, "high": self.high}


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """One arm at one target.

    lr: what was trained for it. loss: mean over seeds. regret: above the lowest mean loss on its
    own valley; gap: above the lowest of all valleys. All None where a seed of the choice did not
    end well. beyond_edge: the lowest loss of its valley is at the lowest or highest LR trained.
    """

    arm: str
    target_id: str
    variant: str
    lr: float
    states: tuple[str, ...]
    loss: Estimate | None
    regret: Estimate | None
    gap: Estimate | None
    best_lr: float | None
    beyond_edge: bool

    def document(self) -> dict[str, Any]:
        """JSON-safe form."""
        estimates = {
            name: None if (e := getattr(self, name)) is None else e.document()
            for name in ("loss", "regret", "gap")
        }
        return {
            "arm": self.arm, "target_id": self.target_id, "variant": self.variant, "lr": self.lr,
            "states": list(self.states), **estimates, "best_lr": self.best_lr,
            "beyond_edge": self.beyond_edge,
        }  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """Loss of arm ``first`` minus that of ``second`` at their choices, mean over targets.

    ``by_regret`` is the part that is due to their LRs (the difference of the regrets on their own
    valleys), ``by_valley`` the rest: the best that either valley reaches. targets: those at which
    both choices ended well with every seed.
    """

    first: str
    second: str
    total: Estimate
    by_regret: Estimate
    by_valley: Estimate
    targets: tuple[str, ...]

    def document(self) -> dict[str, Any]:
        """JSON-safe form."""
        parts = {k: getattr(self, k).document() for k in ("total", "by_regret", "by_valley")}
        names = {"first": self.first, "second": self.second, "targets": list(self.targets)}
        return {**names, **parts}


class Scoreboard:
    """Joint draws of the mean losses of all cells, and what follows from them."""

    def __init__(self, cells: Sequence[Cell], *, seed: int = 1) -> None:
        self.cells = tuple(cells)
        self.noise: dict[str, tuple[float, int]] = {}
        self._means = np.array(
            [np.mean([y for y in c.losses if y is not None]) if c.complete else np.nan
             for c in cells]
        )  # fmt: skip
        self._draws = np.repeat(self._means[None], NUM_DRAWS, axis=0)
        rng = np.random.default_rng(seed)
        for target_id in dict.fromkeys(c.target_id for c in cells):
            at = [i for i, c in enumerate(cells) if c.target_id == target_id and c.complete]
            if not at:
                continue
            losses = np.array([cells[i].losses for i in at], dtype=float)
            sd, freedom = seed_noise(losses)
            self.noise[target_id] = (sd, freedom)
            if freedom:
                scale = sd * np.sqrt(freedom / rng.chisquare(freedom, size=(NUM_DRAWS, 1)))
                normal = rng.normal(size=(NUM_DRAWS, len(at)))
                self._draws[:, at] += scale / math.sqrt(losses.shape[1]) * normal

    def outcome(self, arm: Arm, target_id: str) -> Outcome:
        """How an arm did at a target."""
        index = self._chosen(arm.name, target_id)
        cell = self.cells[index]
        own = self._ended(target_id, cell.variant)
        best = min(own, key=lambda i: self._means[i]) if own else None
        lrs = [self.cells[i].lr for i in range(len(self.cells)) if self._on(i, cell)]
        best_lr = None if best is None else self.cells[best].lr
        ended = cell.complete
        return Outcome(
            arm=arm.name,
            target_id=target_id,
            variant=cell.variant,
            lr=cell.lr,
            states=cell.states,
            loss=self._loss(index) if ended else None,
            regret=self._above(index, own) if ended else None,
            gap=self._above(index, self._ended(target_id)) if ended else None,
            best_lr=best_lr,
            beyond_edge=best_lr is not None and best_lr in (min(lrs), max(lrs)),
        )

    def difference(self, first: str, second: str) -> Difference | None:
        """Two arms over all targets at which both ended well; None if there is none."""
        total, regret, targets = [], [], []
        point = {"total": 0.0, "regret": 0.0}
        for target_id in dict.fromkeys(c.target_id for c in self.cells):
            a, b = self._chosen(first, target_id), self._chosen(second, target_id)
            if not (self.cells[a].complete and self.cells[b].complete):
                continue
            own = [self._ended(target_id, self.cells[i].variant) for i in (a, b)]
            total.append(self._draws[:, a] - self._draws[:, b])
            regret.append(
                self._draws[:, a] - self._draws[:, own[0]].min(axis=1)
                - self._draws[:, b] + self._draws[:, own[1]].min(axis=1)
            )  # fmt: skip
            point["total"] += self._means[a] - self._means[b]
            point["regret"] += (
                self._means[a] - self._means[own[0]].min()
                - self._means[b] + self._means[own[1]].min()
            )  # fmt: skip
            targets.append(target_id)
        if not targets:
            return None
        num = len(targets)
        total_draws, regret_draws = np.mean(total, axis=0), np.mean(regret, axis=0)
        whole, part = point["total"] / num, point["regret"] / num
        return Difference(
            first=first,
            second=second,
            total=self._estimate(whole, total_draws, targets),
            by_regret=self._estimate(part, regret_draws, targets),
            by_valley=self._estimate(whole - part, total_draws - regret_draws, targets),
            targets=tuple(targets),
        )

    def _chosen(self, arm: str, target_id: str) -> int:
        return next(
            i for i, c in enumerate(self.cells) if c.target_id == target_id and arm in c.chosen_by
        )

    def _on(self, index: int, cell: Cell) -> bool:
        other = self.cells[index]
        return (other.target_id, other.variant) == (cell.target_id, cell.variant)

    def _ended(self, target_id: str, variant: str | None = None) -> list[int]:
        """Cells of a target, of one valley or all, whose every seed ended well."""
        return [
            i
            for i, c in enumerate(self.cells)
            if c.target_id == target_id and c.complete and variant in (None, c.variant)
        ]

    def _loss(self, index: int) -> Estimate:
        """Mean loss; its interval holds the seeds' common shift too, from the cell's own seeds."""
        from scipy.stats import t

        losses = np.array(self.cells[index].losses, dtype=float)
        mean = float(losses.mean())
        if len(losses) < 2:
            return Estimate(value=mean)
        half = float(t.ppf(0.5 + PROB / 2, len(losses) - 1) * losses.std(ddof=1))
        half /= math.sqrt(len(losses))
        return Estimate(value=mean, low=mean - half, high=mean + half)

    def _above(self, index: int, others: Sequence[int]) -> Estimate:
        value = float(self._means[index] - self._means[others].min())
        draws = self._draws[:, index] - self._draws[:, others].min(axis=1)
        return self._estimate(value, draws, [self.cells[index].target_id])

    def _estimate(self, value: float, draws: FloatArray, targets: Sequence[str]) -> Estimate:
        if any(self.noise[target_id][1] == 0 for target_id in targets):
            return Estimate(value=float(value))
        low, high = np.quantile(draws, [(1 - PROB) / 2, (1 + PROB) / 2])
        return Estimate(value=float(value), low=float(low), high=float(high))


def seed_noise(losses: FloatArray) -> tuple[float, int]:
    """Noise of a loss (cell, seed) beside the shifts of cells and seeds: its sd and freedom.

    The residual of the additive two-way layout. With one cell the seeds' shift cannot be told from
    the noise and is counted in. Freedom 0 (one seed): sd is NaN.
    """
    num_cells, num_seeds = losses.shape
    residual = losses - losses.mean(axis=1, keepdims=True)
    freedom = num_cells * (num_seeds - 1)
    if num_cells > 1:
        residual = residual - residual.mean(axis=0, keepdims=True)
        freedom = (num_cells - 1) * (num_seeds - 1)
    if freedom == 0:
        return math.nan, 0
    return float(np.sqrt((residual**2).sum() / freedom)), freedom

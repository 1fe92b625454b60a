"""What the held-out runs say: loss, regret and differences between arms, each with its interval.

Everything but the loss itself is a difference between runs of the same seed, which see the same
batches, so that what a seed does to all runs of a target cancels. The differences are averaged over
the targets seed by seed, and the interval is that of Student's t over the seeds. No noise is pooled
over LRs: near the edge of divergence it is many times that at the bottom of a valley.
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

    @property
    def is_nothing(self) -> bool:
        """Whether this is a difference of something with itself."""
        return self.value == self.low == self.high == 0

    def document(self) -> dict[str, float | None]:
        """JSON-safe form."""
        return {"value": self.value, "low": self.low, "high": self.high}


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """One arm at one target.

    lr: what was trained for it. loss: mean over seeds. regret: above the LR with the lowest mean
    loss on its own valley; gap: above that of all valleys. Which LR that is, is read off the same
    runs. All None where a seed of the choice did not end well. beyond_edge: the lowest loss of its
    valley is at the lowest or highest LR trained.
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
    """Contrasts between the cells of a comparison."""

    def __init__(self, cells: Sequence[Cell]) -> None:
        self.cells = tuple(cells)

    def outcome(self, arm: Arm, target_id: str) -> Outcome:
        """How an arm did at a target."""
        cell = self._chosen(arm.name, target_id)
        best, lowest = self._best(target_id, cell.variant), self._best(target_id)
        lrs = [c.lr for c in self._of(target_id, cell.variant)]
        ended = cell.complete and best is not None and lowest is not None
        return Outcome(
            arm=arm.name,
            target_id=target_id,
            variant=cell.variant,
            lr=cell.lr,
            states=cell.states,
            loss=over_seeds([_losses(cell)]) if ended else None,
            regret=over_seeds([_losses(cell) - _losses(best)]) if ended else None,
            gap=over_seeds([_losses(cell) - _losses(lowest)]) if ended else None,
            best_lr=None if best is None else best.lr,
            beyond_edge=best is not None and best.lr in (min(lrs), max(lrs)),
        )

    def difference(self, first: str, second: str) -> Difference | None:
        """Two arms over all targets at which both ended well; None if there is none."""
        total, regret, targets = [], [], []
        for target_id in dict.fromkeys(c.target_id for c in self.cells):
            a, b = self._chosen(first, target_id), self._chosen(second, target_id)
            if not (a.complete and b.complete):
                continue
            best_a, best_b = (self._best(target_id, cell.variant) for cell in (a, b))
            total.append(_losses(a) - _losses(b))
            regret.append(_losses(a) - _losses(best_a) - _losses(b) + _losses(best_b))
            targets.append(target_id)
        if not targets:
            return None
        by_valley = [whole - part for whole, part in zip(total, regret, strict=True)]
        return Difference(
            first=first,
            second=second,
            total=over_seeds(total),
            by_regret=over_seeds(regret),
            by_valley=over_seeds(by_valley),
            targets=tuple(targets),
        )

    def noise(self) -> dict[str, float | None]:
        """Seed noise of a loss at the chosen LRs of each target; None where it is not known."""
        found = {}
        for target_id in dict.fromkeys(c.target_id for c in self.cells):
            chosen = [c.losses for c in self._of(target_id) if c.chosen_by and c.complete]
            found[target_id] = seed_noise(np.array(chosen, dtype=float)) if chosen else None
        return found

    def _of(self, target_id: str, variant: str | None = None) -> list[Cell]:
        """Cells of a target, of one valley or of all."""
        return [c for c in self.cells if c.target_id == target_id and variant in (None, c.variant)]

    def _chosen(self, arm: str, target_id: str) -> Cell:
        return next(c for c in self._of(target_id) if arm in c.chosen_by)

    def _best(self, target_id: str, variant: str | None = None) -> Cell | None:
        """Cell with the lowest mean loss among those whose every seed ended well."""
        ended = [c for c in self._of(target_id, variant) if c.complete]
        return min(ended, key=lambda c: float(_losses(c).mean())) if ended else None


def _losses(cell: Cell | None) -> FloatArray:
    assert cell is not None
    return np.array(cell.losses, dtype=float)


def over_seeds(by_target: Sequence[FloatArray]) -> Estimate:
    """Mean over targets and seeds of values (seed,), one array a target, and its interval.

    Student's t over the seeds' means, which holds whatever the targets share. A contrast of a cell
    with itself is zero and has no width; from a single seed there is no interval.
    """
    from scipy.stats import t

    values = np.mean(by_target, axis=0)
    mean, num_seeds = float(values.mean()), len(values)
    if num_seeds < 2:
        return Estimate(value=mean)
    half = float(t.ppf(0.5 + PROB / 2, num_seeds - 1) * values.std(ddof=1) / math.sqrt(num_seeds))
    return Estimate(value=mean, low=mean - half, high=mean + half)


def seed_noise(losses: FloatArray) -> float | None:
    """Sd of a loss (cell, seed) beside what cells and seeds share, in nats; None if not known.

    The residual of the additive two-way layout. With one cell the seeds' shift cannot be told from
    the noise and is counted in.
    """
    num_cells, num_seeds = losses.shape
    residual = losses - losses.mean(axis=1, keepdims=True)
    freedom = num_cells * (num_seeds - 1)
    if num_cells > 1:
        residual = residual - residual.mean(axis=0, keepdims=True)
        freedom = (num_cells - 1) * (num_seeds - 1)
    return float(np.sqrt((residual**2).sum() / freedom)) if freedom else None

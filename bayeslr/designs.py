"""Designs: what people run without a posterior, one step at a time, as a function of what is known.

A step is the runs to make next, all at once. It depends on the menu alone: on recorded runs
(`bayeslr.replay`) and in a sweep (`bayeslr.loop`) a design is the same function, and a sweep that
was killed goes on with the step it was at.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    FloatArray = NDArray[np.float64]
    IntArray = NDArray[np.int64]

START_LRS = 3
"""Fewest LRs that can show a valley: one to each side of the lowest."""

CLASSICAL_LRS = 5
"""LRs of a slice (C_eta): two octaves to each side of the best, where the grid is fine enough."""


@dataclass(frozen=True, kw_only=True)
class Menu:
    """The runs there are, one a row, and what came of those that were made.

    n_active, n_total, tokens, batch_tokens, log_lr, flops, slice_of_run, loss: each (run,), logs
    natural, losses in nats. ``loss`` is NaN for a run that was not made and infinite for one that
    came to nothing; ``slice_of_run`` numbers the slices from the cheapest up. ``left_flops``: what
    the budget has left.
    """

    n_active: FloatArray
    n_total: FloatArray
    tokens: FloatArray
    batch_tokens: FloatArray
    log_lr: FloatArray
    flops: FloatArray
    slice_of_run: IntArray
    loss: FloatArray
    left_flops: float

    @property
    def made(self) -> NDArray[np.bool_]:
        """Whether each run was made (run,)."""
        return ~np.isnan(self.loss)

    @property
    def num_slices(self) -> int:
        """Slices: shapes at a token count and a batch."""
        return int(self.slice_of_run.max()) + 1

    def runs_of(self, number: int) -> IntArray:
        """Runs of a slice, LR ascending."""
        runs = np.flatnonzero(self.slice_of_run == number)
        return runs[np.argsort(self.log_lr[runs], kind="stable")]

    def best_log_lr(self) -> float | None:
        """Ln LR of the lowest loss so far; the lowest LR made where none ended well, if any."""
        made = np.flatnonzero(self.made)
        if len(made) == 0:
            return None
        if not np.isfinite(self.loss[made]).any():
            return float(self.log_lr[made].min())
        return float(self.log_lr[made[np.argmin(self.loss[made])]])

    def payable(self, runs: list[int]) -> bool:
        """Whether the budget pays for these runs together."""
        return math.fsum(self.flops[runs]) <= self.left_flops


Design = Callable[[Menu], list[int]]
"""Next runs to make, all at once, within the budget; empty where the design has ended."""


def slices_from_cheapest(slice_of_run: IntArray, flops: FloatArray) -> IntArray:
    """The same slices, (run,), numbered from the cheapest up; equals keep their order."""
    first = np.unique(slice_of_run, return_index=True)[1]
    rank = np.argsort(np.argsort(flops[first], kind="stable"), kind="stable")
    return rank[slice_of_run].astype(np.int64)


def spread(num_points: int, num_chosen: int, rng: np.random.Generator) -> list[int]:
    """Indices of a grid, one near the middle of each of equal strata, the middle one first."""
    num_chosen = min(num_chosen, num_points)
    places = (np.arange(num_chosen) + 0.5 + rng.uniform(-0.2, 0.2)) / num_chosen
    chosen = [min(int(place * num_points), num_points - 1) for place in places]
    middle = num_chosen // 2
    return [chosen[middle], *chosen[:middle], *chosen[middle + 1 :]]


def ladder(menu: Menu) -> list[int]:
    """The grid, cheapest slices first: every second LR of each, then the others; a slice a step."""
    made, left = menu.made, menu.left_flops
    for every in (2, 1):
        for number in range(menu.num_slices):
            step = []
            for run in menu.runs_of(number)[::every]:
                if not made[run] and menu.flops[run] <= left:
                    step.append(int(run))
                    left -= float(menu.flops[run])
            if step:
                return step
    return []


def classical(menu: Menu) -> list[int]:
    """The O(n C_D C_eta) design: a slice a step, five LRs of it about the best so far.

    One batch a cell, its middle one; batches to both sides once every payable cell has one. The
    first slice of all has its LRs spread over the whole range. Where one run measures several token
    counts (WSD), a slice is its longest.
    """
    made = menu.made
    for slices in _rings(menu):
        for number in slices:
            runs = menu.runs_of(number)
            if made[runs].sum() >= CLASSICAL_LRS:
                continue
            new = [int(run) for run in _five(menu, runs) if not made[run]]
            if new and menu.payable(new):
                return new
    return []


def _five(menu: Menu, runs: IntArray) -> IntArray:
    """LRs of a slice, the most telling first."""
    best = menu.best_log_lr()
    if best is None:
        places = np.unique(np.linspace(0, len(runs) - 1, CLASSICAL_LRS).round().astype(int))
        return np.asarray(runs[places])
    every = 2 if len(runs) >= 2 * CLASSICAL_LRS else 1
    middle = int(np.argmin(np.abs(menu.log_lr[runs] - best)))
    places = np.arange(middle % every, len(runs), every)
    nearest = np.argsort(np.abs(places - middle), kind="stable")[:CLASSICAL_LRS]
    return np.asarray(runs[places[nearest]])


def _rings(menu: Menu) -> list[list[int]]:
    """Slices by their batch's distance from the cell's middle one, each ring cheapest first."""
    cells: dict[tuple[float, ...], list[int]] = {}
    for number in range(menu.num_slices):
        run = int(menu.runs_of(number)[0])
        key = tuple(float(x[run]) for x in (menu.n_active, menu.n_total, menu.tokens))
        cells.setdefault(key, []).append(number)
    rings: dict[int, list[int]] = {}
    for numbers in cells.values():
        numbers.sort(key=lambda s: float(menu.batch_tokens[int(menu.runs_of(s)[0])]))
        for place, number in enumerate(numbers):
            rings.setdefault(abs(place - (len(numbers) - 1) // 2), []).append(number)
    return [sorted(rings[distance]) for distance in sorted(rings)]


def d_optimal(menu: Menu) -> list[int]:
    """Three LRs of a slice a step, slices by D-optimality per FLOP for the LR law.

    The regressors are those of the law (1, ln n_active, ln sparsity, ln tokens, ln batch), with a
    unit prior on their standardised coefficients; the slice that raises ln det of the information
    most per FLOP is next.
    """
    first = np.array([menu.runs_of(s)[0] for s in range(menu.num_slices)])
    n_active, n_total, tokens, batch = (
        np.log(values[first])
        for values in (menu.n_active, menu.n_total, menu.tokens, menu.batch_tokens)
    )
    raw = np.column_stack([n_active, n_active - n_total, tokens, batch])
    spread = raw.std(axis=0)
    x = np.column_stack(
        [np.ones(len(raw)), (raw - raw.mean(axis=0)) / np.where(spread > 0, spread, 1.0)]
    )
    tried = np.unique(menu.slice_of_run[menu.made])
    information = np.eye(x.shape[1]) + x[tried].T @ x[tried]
    gain = np.log1p(np.einsum("si,ij,sj->s", x, np.linalg.inv(information), x)) / menu.flops[first]
    for number in np.argsort(-gain, kind="stable"):
        step = _about_best(menu, int(number))
        if number not in tried and menu.payable(step):
            return step
    return []


def _about_best(menu: Menu, number: int) -> list[int]:
    """Three LRs of a slice, an octave apart, about the best LR so far."""
    runs = menu.runs_of(number)
    best = menu.best_log_lr()
    middle = float(np.median(menu.log_lr[runs])) if best is None else best
    wanted = middle + math.log(2.0) * np.array([0.0, -1.0, 1.0])
    return list(dict.fromkeys(int(runs[np.argmin(np.abs(menu.log_lr[runs] - w))]) for w in wanted))


DESIGNS: Mapping[str, Design] = {"classical": classical, "ladder": ladder, "d-optimal": d_optimal}

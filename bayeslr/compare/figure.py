"""The held-out valleys of one target, and where each arm expected the optimum: inline SVG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.ticker import MaxNLocator

from bayeslr.compare.arms import Arm
from bayeslr.compare.heldout import Cell
from bayeslr.report.figures import (
    GRID,
    LAWS,
    MUTED,
    PAPER,
    POSTERIOR,
    WARN,
    drawing,
    log_axis,
    to_svg,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

    FloatArray = NDArray[np.float64]

# Colour (and the CSS variable of the same), marker and dashes of a valley, in order of appearance.
STYLES: tuple[tuple[str, str, str, tuple[float, ...]], ...] = (
    (POSTERIOR, "posterior", "o", ()),
    (LAWS[0], "law1", "s", (6, 2)),
    (LAWS[1], "law2", "^", (2, 1.5)),
    (LAWS[3], "law4", "v", (6, 2, 2, 2)),
)


def style_of(variants: Sequence[str]) -> dict[str, tuple[str, str, str, tuple[float, ...]]]:
    """Style of each valley."""
    return {variant: STYLES[i % len(STYLES)] for i, variant in enumerate(variants)}


def held_out(
    name: str, *, cells: Sequence[Cell], arms: Sequence[Arm], target_id: str, description: str
) -> str:
    """Loss against LR on every valley of a target; below, each arm's choice and 90 % interval.

    cells: of this target alone. Each seed is a dot, with what the runs of a seed share taken out;
    the line joins the means. A cross at the top: a run that did not end well.
    """
    styles = style_of(list(dict.fromkeys(arm.variant for arm in arms)))
    choices = [(arm, c) for arm in arms for c in arm.choices if c.target_id == target_id]
    ends = [c.lr for c in cells] + [lr for _, c in choices for lr in (c.lr_q05, c.lr_q95)]
    low, high = min(ends) / 1.2, max(ends) * 1.2
    with drawing(430, 285 + 24 * len(choices)) as figure:
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[1.0, 0.1 * len(choices)])
        upper.set_xscale("log")
        shift = seed_shifts(cells)
        floor, top = _frame(cells, shift)
        for variant, (colour, _, marker, dash) in styles.items():
            on = sorted((c for c in cells if c.variant == variant), key=lambda c: c.lr)
            whole = [c for c in on if c.complete]
            line: Any = {"color": colour, "linewidth": 1.6}
            if dash:
                line["linestyle"] = (0, dash)
            upper.plot([c.lr for c in whole], [_mean(c) for c in whole], **line)
            for cell in on:
                seeds = [min(y, top) for y in _levelled(cell, shift)]
                upper.plot(
                    [cell.lr] * len(seeds), seeds, marker, linestyle="none", color=colour,
                    markersize=4.2, markeredgecolor=PAPER, markeredgewidth=0.6, alpha=0.75,
                )  # fmt: skip
                lost = len(cell.losses) - len(seeds)
                if lost:
                    upper.plot([cell.lr], [top], "x", color=WARN, markersize=6, markeredgewidth=1.6)
                if cell.chosen_by and cell.complete:
                    upper.plot(
                        [cell.lr], [min(_mean(cell), top)], "D", color=PAPER,
                        markeredgecolor=colour, markersize=7.5, markeredgewidth=1.8,
                    )  # fmt: skip
        span = top - floor
        upper.set_ylim(floor - 0.08 * span, top + 0.06 * span)
        upper.text(0.01, 1.0, "loss, nats", transform=upper.transAxes, color=MUTED, va="bottom")
        upper.yaxis.set_major_locator(MaxNLocator(5))
        upper.grid(axis="y")
        for row, (arm, choice) in enumerate(choices):
            colour = styles[arm.variant][0]
            lower.hlines(row, choice.lr_q05, choice.lr_q95, color=colour, linewidth=3, alpha=0.45)
            lower.plot(
                [choice.lr], [row], "D", color=PAPER, markeredgecolor=colour, markersize=6,
                markeredgewidth=1.6,
            )  # fmt: skip
            # Inside the frame: beside it, names would not fit a narrow window.
            lower.text(
                0.01, row - 0.2, arm.name, transform=lower.get_yaxis_transform(), va="bottom",
                fontsize=8.5,
            )  # fmt: skip
        lower.set_yticks([])
        lower.set_ylim(len(choices) - 0.6, -0.95)
        lower.spines["left"].set_visible(False)
        lower.grid(axis="x", color=GRID)
        lower.set_xlim(low, high)
        log_axis(lower.xaxis, low, high, 7)
        lower.set_xlabel("peak LR")
        return to_svg(figure, name, description)


def _mean(cell: Cell) -> float:
    return float(np.mean([y for y in cell.losses if y is not None]))


def seed_shifts(cells: Sequence[Cell]) -> FloatArray:
    """What all runs of a seed share, (seed,), from the cells of which every seed ended well."""
    losses = np.array([c.losses for c in cells if c.complete], dtype=float)
    if len(losses) == 0:
        return np.zeros(len(cells[0].losses))
    return np.asarray((losses - losses.mean(axis=1, keepdims=True)).mean(axis=0))


def _levelled(cell: Cell, shift: FloatArray) -> list[float]:
    pairs = zip(cell.losses, shift, strict=True)
    return [float(loss - by) for loss, by in pairs if loss is not None]


def _frame(cells: Sequence[Cell], shift: FloatArray) -> tuple[float, float]:
    """Lowest and highest loss to show: all, unless one valley's wall would flatten the rest."""
    losses = [loss for cell in cells for loss in _levelled(cell, shift)]
    if not losses:
        return 0.0, 1.0
    floor, top = min(losses), max(losses)
    middle = [_mean(c) for c in cells if c.chosen_by and c.complete]
    if middle:
        top = min(top, floor + 4 * max(max(middle) - floor, 0.02))
    return floor, max(top, floor + 1e-3)


def description_of(cells: Sequence[Cell], means: Mapping[str, float]) -> str:
    """What the figure shows, for those who cannot see it."""
    lowest = "; ".join(f"{variant}: lowest mean {loss:.3f}" for variant, loss in means.items())
    return f"Loss against LR of {cells[0].target_id}. {lowest}." if means else "No run ended well."

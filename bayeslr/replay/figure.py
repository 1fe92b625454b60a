"""The figure of a replay: scores against the share of the pool's compute."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import numpy as np

from bayeslr.runs import write_atomically

if TYPE_CHECKING:
    from pathlib import Path

    import pandas as pd


def plot(scores: pd.DataFrame, path: Path) -> None:
    """Regret, coverage and interval score against the share of compute, bands over seeds.

    Raises: StorageError if the file cannot be written.
    """
    import matplotlib

    matplotlib.use("Agg", force=False)
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullFormatter

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
        ticks = 100 * np.array(sorted(scores["budget_share"].unique()))
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.xaxis.set_minor_formatter(NullFormatter())
        if column != "cover_90":
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(FuncFormatter(_plain))
            axes.yaxis.set_minor_formatter(FuncFormatter(_plain))
        else:
            axes.axhline(0.9, color="0.6", lw=0.8)
    figure.axes[0].legend(fontsize=7, frameon=False)
    picture = io.BytesIO()
    figure.savefig(picture, format=path.suffix.lstrip(".") or "svg")
    write_atomically(path, picture.getvalue())


def _plain(value: float, position: int) -> str:
    """1, 2 and 5 of each decade, as plain numbers."""
    return f"{value:g}" if f"{value:.0e}"[0] in "125" else ""

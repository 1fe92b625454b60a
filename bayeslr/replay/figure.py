"""The figure of a replay: scores against the share of the pool's compute."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import numpy as np

from bayeslr.runs import write_atomically

if TYPE_CHECKING:
    from pathlib import Path

    import pandas as pd


# Strategies that score alike are told apart by their place: side by side within this share of the
# way from one budget to the next.
_SPREAD = 1 / 3


def plot(scores: pd.DataFrame, path: Path) -> None:
    """Regret, coverage and interval score against the share of compute, bands over seeds.

    Raises: StorageError if the file cannot be written.
    """
    import matplotlib

    matplotlib.use("Agg", force=False)
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullFormatter

    shares = np.array(sorted(scores["budget_share"].unique()))
    gap = float(np.min(shares[1:] / shares[:-1], initial=2.0))
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    panels = (
        ("regret_mean", "mean regret, nats"), ("cover_90", "coverage of 90 % intervals"),
        ("interval_score", "interval score, octaves"),
    )  # fmt: skip
    groups = list(scores.groupby("strategy", sort=False))
    for axes, (column, label) in zip(figure.subplots(1, 3), panels, strict=True):
        for place, (name, group) in enumerate(groups):
            by_share = group.groupby("budget_share")[column]
            share = np.array(sorted(group["budget_share"].unique()))
            at = 100 * share * gap ** (_SPREAD * ((place + 0.5) / len(groups) - 0.5))
            (line,) = axes.plot(at, by_share.mean(), marker="o", ms=4, label=str(name))
            axes.fill_between(
                at, by_share.quantile(0.1), by_share.quantile(0.9), alpha=0.15,
                color=line.get_color(), lw=0,
            )  # fmt: skip
        axes.set(xscale="log", xlabel="share of the pool's compute, %", ylabel=label)
        axes.set_xticks(100 * shares, [f"{tick:g}" for tick in 100 * shares])
        axes.xaxis.set_minor_formatter(NullFormatter())
        if column != "cover_90":
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(FuncFormatter(_plain))
            axes.yaxis.set_minor_formatter(FuncFormatter(_plain))
        else:
            axes.axhline(0.9, color="0.6", lw=0.8)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right center",
                  frameon=False)  # fmt: skip
    picture = io.BytesIO()
    figure.savefig(picture, format=path.suffix.lstrip(".") or "svg")
    write_atomically(path, picture.getvalue())


def _plain(value: float, position: int) -> str:
    """1, 2, 3, 5 and 7 of each decade, as plain numbers."""
    return f"{value:g}" if f"{value:.0e}"[0] in "12357" else ""

"""Scores of predictions against the losses measured at the targets.

Regret in nats of the recommended LR; coverage of the 50 and 90 % intervals; interval score of the
90 % interval in octaves (Gneiting and Raftery 2007, eq. 43).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from bayeslr.errors import DataError
from bayeslr.recorded import QUANTILE_LEVELS
from bayeslr.specs import Target
from bayeslr.units import counted

if TYPE_CHECKING:
    from numpy.typing import NDArray

    FloatArray = NDArray[np.float64]

# Scoring: the optimum is the bottom of a cubic in ln LR through the runs within a factor of 4.1 of
# the best, sought within three quarters of an octave of it. A parabola reads skewed valleys low.
_CUBIC_WINDOW, _CUBIC_REACH, _CUBIC_RUNS = 1.41, 0.52, 5

# Nats per squared ln LR charged outside the measured LRs: a valley's usual curvature, so that
# leaving the measured range is never free.
_OUTSIDE = 0.027


def read_truth(path: str | Path, targets: Sequence[Target]) -> pd.DataFrame:
    """Losses measured at the targets: target_id, lr, loss, diverged; LR ascending.

    Raises: DataError on a missing column, a value that is no number, two runs of a target at one
    LR, or a target with finished runs at fewer than two LRs.
    """
    path = Path(path)
    try:
        frame = pd.read_csv(path)
    except (OSError, ValueError) as error:
        raise DataError(f"truth file {path} cannot be read: {error}") from error
    for name in ("target_id", "lr", "loss"):
        if name not in frame:
            raise DataError(
                f"{path}: column {name!r} is missing; needed: target_id, lr, loss; also read: "
                "diverged"
            )
    for name in ("lr", "loss"):
        numbers = pd.to_numeric(frame[name], errors="coerce")
        bad = ~np.isfinite(numbers) | ((numbers <= 0) if name == "lr" else False)
        if bad.any():
            row = int(np.flatnonzero(bad)[0])
            raise DataError(
                f"{path} line {row + 2}: {name} must be a finite number, got "
                f"{frame[name].iloc[row]!r}; leave out the runs without one"
            )
        frame[name] = numbers
    if "diverged" in frame:
        frame["diverged"] = frame["diverged"].astype(str).str.lower().isin(["true", "1", "1.0"])
    else:
        frame["diverged"] = False
    frame["target_id"] = frame["target_id"].astype(str)
    if (twice := frame.duplicated(["target_id", "lr"])).any():
        second = frame[twice].iloc[0]
        raise DataError(
            f"{path} line {int(frame.index[twice][0]) + 2}: target {second['target_id']!r} has two "
            f"runs at lr {second['lr']:g}; average the losses of its seeds, or keep one"
        )
    num_lrs = frame["target_id"][~frame["diverged"]].value_counts()
    for target in targets:
        if (found := num_lrs.get(target.target_id, 0)) < 2:
            raise DataError(
                f"{path}: target {target.target_id!r} has {counted(int(found), 'finished run')}; a "
                "valley to score it by takes two LRs at least"
            )
    return frame.sort_values(["target_id", "lr"]).reset_index(drop=True)


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """How good predictions are, over all target slices. Regret in nats, the rest in octaves."""

    regret_mean: float
    regret_worst: float
    octave_error: float
    cover_50: float
    cover_90: float
    width_90: float
    interval_score: float


def optimum(log_lr: FloatArray, loss: FloatArray) -> float:
    """Natural log of the LR at a slice's optimum; log_lr ascending, both (run,)."""
    best = int(np.argmin(loss))
    near = np.abs(log_lr - log_lr[best]) <= _CUBIC_WINDOW
    if near.sum() < _CUBIC_RUNS:
        return float(log_lr[best])
    steps = np.linspace(-_CUBIC_REACH, _CUBIC_REACH, 401)
    cubic = np.polyfit(log_lr[near] - log_lr[best], loss[near], 3)
    return float(log_lr[best] + steps[np.argmin(np.polyval(cubic, steps))])


def score(truth: pd.DataFrame, predictions: pd.DataFrame) -> Score:
    """Score predictions against the losses measured at their targets (`read_truth`).

    Raises: DataError if a target is not predicted exactly once, or by no positive number.
    """
    from scipy.interpolate import PchipInterpolator

    columns = ["lr", *QUANTILE_LEVELS]
    if predictions["target_id"].duplicated().any():
        raise DataError("a target is predicted twice; keep one row a target")
    by_id = predictions.set_index("target_id")[columns].astype(float)
    rows = []
    for name, group in truth.groupby("target_id"):
        if name not in by_id.index:
            raise DataError(f"target {name!r} is not predicted; predict every target of the truth")
        given = by_id.loc[name].to_numpy()
        if not (np.isfinite(given) & (given > 0)).all():
            raise DataError(f"target {name!r} is predicted by {given}, not by positive numbers")
        log_given = np.log(given)
        log_lr = np.log(group["lr"].to_numpy())
        loss = group["loss"].to_numpy(dtype=float)
        finished = ~group["diverged"].to_numpy(dtype=bool)
        star = optimum(log_lr[finished], loss[finished])
        curve = PchipInterpolator(log_lr, loss)
        inside = float(np.clip(log_given[0], log_lr[0], log_lr[-1]))
        bottom = float(curve(np.linspace(log_lr[0], log_lr[-1], 2000)).min())
        regret = float(curve(inside)) - bottom + _OUTSIDE * (log_given[0] - inside) ** 2
        q05, q25, q50, q75, q95 = log_given[1:] / math.log(2.0)
        octave = star / math.log(2.0)
        miss = max(q05 - octave, octave - q95, 0.0)
        rows.append((regret, q50 - octave, q25 <= octave <= q75, q05 <= octave <= q95, q95 - q05,
                     q95 - q05 + 2.0 / 0.1 * miss))  # fmt: skip
    regret_, error, in50, in90, width, winkler = np.array(rows, dtype=float).T
    return Score(
        regret_mean=float(regret_.mean()),
        regret_worst=float(regret_.max()),
        octave_error=float(np.sqrt((error**2).mean())),
        cover_50=float(in50.mean()),
        cover_90=float(in90.mean()),
        width_90=float(np.median(width)),
        interval_score=float(winkler.mean()),
    )

"""Raw tables of the Step Law project (github.com/step-law/steplaw, folder data).

Dense and MoE tables are told apart by their header. Upstream has no status: a run that diverged is
recognised by its loss (`diverged_rows`). In a few upstream cells the diverged runs were left out,
so that nothing is known there about where divergence begins.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from bayeslr.errors import DataError
from bayeslr.runs import Rows, RunTable, make_table, numbers, read_csv

DENSE_HEADER = ("h", "numl", "lr", "bs", "smooth loss", "exp_name", "D", "N")
MOE_HEADER = (*DENSE_HEADER, "Na", "nume", "topk")
SEQ_LEN = 2048  # of every run; ``bs`` counts sequences of it
# Schedule of all runs (Li et al. 2025, Step Law, arXiv 2503.04715): 2,000 steps of warm-up, then a
# cosine to a fixed LR, which the run names repeat (mlr1.00e-05).
WARMUP_STEPS = 2000
FINAL_LR = 1e-5

# An excess loss above its slice's best, at a higher LR, that no converged run has. Between the two
# kinds lies a wide empty stretch in every upstream table (0.29 to 1.56 nats in the dense one); the
# cut is put into the middle of it, and here where a table has no diverged run.
DEFAULT_EXCESS = 0.7
_MIN_CONVERGED_EXCESS, _MIN_DIVERGED_EXCESS = 0.1, 1.0


def read(path: str | Path, *, family: str | None = None) -> RunTable:
    """Run table of a raw Step Law CSV. Raises: DataError if the header is another."""
    path = Path(path)
    rows = read_csv(path)
    cells = rows.frame
    missing = [name for name in DENSE_HEADER if name not in cells]
    if missing:
        raise DataError(
            f"{path} is no Step Law table: column {missing[0]!r} is missing. Expected "
            f"{', '.join(DENSE_HEADER)}; any other table: bayeslr import csv"
        )
    moe = all(name in cells for name in MOE_HEADER)
    raw = pd.DataFrame({name: numbers(cells[name])[0] for name in ("lr", "bs", "D")})
    frame = pd.DataFrame(
        {
            "run_id": cells["exp_name"],
            "family": family or ("steplaw_moe" if moe else "steplaw_dense"),
            "arch": "moe" if moe else "dense",
            "parametrization": "sp",
            "optimizer": "adamw",
            "schedule": "cosine",
            "lr": cells["lr"],
            "final_lr_fraction": FINAL_LR / raw["lr"].where(raw["lr"] > FINAL_LR),
            "n_active": cells["Na" if moe else "N"],
            "n_total": cells["N"],
            "param_convention": "non_embedding",
            "d_model": cells["h"],
            "n_layers": cells["numl"],
            "tokens": cells["D"],
            "planned_tokens": cells["D"],
            "batch_tokens": raw["bs"] * SEQ_LEN,
            "seq_len": SEQ_LEN,
            "loss": cells["smooth loss"],
            "loss_kind": "train_smoothed",
            "source": "steplaw",
        }
    )
    warmup = WARMUP_STEPS * frame["batch_tokens"]
    frame["warmup_tokens"] = warmup.where(warmup < raw["D"])  # the few shorter runs are not told
    if moe:
        frame["n_experts"], frame["top_k"] = cells["nume"], cells["topk"]
    diverged, cut = diverged_rows(frame)
    frame["status"] = np.where(diverged, "diverged", "ok")
    reason = f"loss not finite, or over {cut:.2f} nats above its slice's best at a higher LR"
    frame["status_reason"] = pd.Series(reason, index=frame.index).where(diverged, None)
    return make_table(Rows(frame, rows.place, rows.lines, rows.broken))


def diverged_rows(frame: pd.DataFrame) -> tuple[NDArray[np.bool_], float]:
    """Rows that diverged, (num_rows,), and the excess loss in nats beyond which a row did.

    A row diverged if its loss is not finite, or if its LR is above that of its slice's best run and
    its loss exceeds the best by more than the cut. The cut is the geometric middle of the widest
    gap (in ratio) between excesses of that side, all slices together, that has at least
    `_MIN_CONVERGED_EXCESS` below it and at least `_MIN_DIVERGED_EXCESS` above it. Where even a
    slice's best is that far above the best of its cell, all of the slice may have diverged, and the
    best of the cell takes its place.
    """
    lr, loss = (numbers(frame[name])[0] for name in ("lr", "loss"))
    comparable = np.where(np.isfinite(loss), loss, np.inf)
    cell_keys = ["n_active", "n_total", "d_model", "n_layers", "tokens"]
    best_of_slice = _best(frame, [*cell_keys, "batch_tokens"], comparable)
    best_of_cell = _best(frame, cell_keys, comparable)
    with np.errstate(invalid="ignore"):
        lost = comparable[best_of_slice] - comparable[best_of_cell] > DEFAULT_EXCESS
        best = np.where(lost, best_of_cell, best_of_slice)
        excess = np.where(lr > lr[best], comparable - comparable[best], 0.0)
    cut = _widest_gap(excess[np.isfinite(excess) & (excess > 0)])
    return ~np.isfinite(loss) | (excess > cut), cut


def _best(frame: pd.DataFrame, keys: list[str], loss: NDArray[np.float64]) -> NDArray[np.int64]:
    """Position of the best row of each row's group, (num_rows,)."""
    group = frame.groupby(keys, dropna=False).ngroup().to_numpy()
    order = np.lexsort((loss, group))
    first = order[np.diff(group[order], prepend=-1) > 0]
    return first[group]


def _widest_gap(excess: NDArray[np.float64]) -> float:
    values = np.sort(np.append(excess, _MIN_CONVERGED_EXCESS))
    low, high = values[:-1], values[1:]
    gaps = (low >= _MIN_CONVERGED_EXCESS) & (high >= _MIN_DIVERGED_EXCESS)
    if not gaps.any():
        return DEFAULT_EXCESS
    ratios = np.where(gaps, high / np.maximum(low, _MIN_CONVERGED_EXCESS), 0.0)
    widest = int(np.argmax(ratios))
    return math.sqrt(float(low[widest] * high[widest]))

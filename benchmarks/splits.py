"""Other held-out splits of Step Law's tables, as folders for `held_out.py`.

    BAYESLR_DATA=DIR python benchmarks/splits.py OUT && python benchmarks/held_out.py OUT/*

DIR holds ``steplaw/dense_lr_bs_loss.csv`` and ``steplaw/moe_lr_bs_loss.csv``. Each split asks for
another kind of extrapolation: a sparsity that no run had, the largest size from the smallest alone,
the longest horizons, size and horizon at once. A target is a slice of five LRs or more whose best
one is not the grid's first or last.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd

from bayeslr.importers import steplaw

Rows = Callable[[pd.DataFrame], "pd.Series[bool]"]

# Kind of table, the runs that are known, the runs whose optima are asked for.
SPLITS: dict[str, tuple[str, Rows, Rows]] = {
    "sparsity_1_in_89": (
        "moe",
        lambda r: (r["n_active"] > 3e8) & (r["tokens"] < 1e10),
        lambda r: r["n_active"] < 3e8,
    ),
    "sparsity_1_in_8": (
        "moe",
        lambda r: (r["n_active"] < 3e8) & (r["tokens"] < 1e10),
        lambda r: r["n_active"] > 3e8,
    ),
    "size": ("dense", lambda r: r["n_active"] < 2.2e8, lambda r: r["n_active"] > 4e8),
    "tokens": ("dense", lambda r: r["tokens"] < 1.5e10, lambda r: r["tokens"] > 3e10),
    "size_and_tokens": (
        "dense",
        lambda r: (r["n_active"] < 3e8) & (r["tokens"] < 1.5e10),
        lambda r: (r["n_active"] > 4e8) & (r["tokens"] > 3e10),
    ),
}
CELL = ["family", "n_active", "n_total", "param_convention", "tokens"]
FEWEST_LRS = 5


def held_out(runs: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Targets and truth tables of the slices whose optimum lies inside their grid."""
    targets, truth = [], []
    cell: Any
    batch: Any
    for cell, of_cell in runs.groupby(CELL):
        best_batch = of_cell["batch_tokens"].iloc[of_cell["loss"].to_numpy().argmin()]
        for batch, group in of_cell.groupby("batch_tokens"):
            valley = group.sort_values("lr").drop_duplicates("lr").reset_index(drop=True)
            best = int(valley["loss"].to_numpy().argmin())
            if len(valley) < FEWEST_LRS or best in (0, len(valley) - 1):
                continue
            _, n_active, _, _, tokens = cell
            name = f"{n_active / 1e6:.0f}M_{tokens / 1e9:g}B_{batch / 1e3:.0f}k"
            targets.append({"target_id": name, **dict(zip(CELL, cell, strict=True)),
                            "batch_tokens": batch})  # fmt: skip
            truth.append(
                valley[["lr", "loss"]].assign(
                    target_id=name, diverged=valley["status"] == "diverged",
                    best_batch=batch == best_batch,
                )
            )  # fmt: skip
    return pd.DataFrame(targets), pd.concat(truth)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path)
    out = parser.parse_args().out
    tables = {
        kind: steplaw.read(Path(os.environ["BAYESLR_DATA"], "steplaw", f"{kind}_lr_bs_loss.csv"))
        for kind in ("dense", "moe")
    }
    for name, (kind, known, asked) in SPLITS.items():
        runs = tables[kind].frame
        folder = out / name
        folder.mkdir(parents=True, exist_ok=True)
        runs[known(runs)].to_csv(folder / "train.csv", index=False)
        targets, truth = held_out(runs[asked(runs)])
        targets.to_csv(folder / "targets.csv", index=False)
        truth.to_csv(folder / "truth.csv", index=False)
        print(f"{folder}: {int(known(runs).sum())} runs, {len(targets)} targets")


if __name__ == "__main__":
    main()

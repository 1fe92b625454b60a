"""Does pooling help? Six cheap runs of one family, fitted alone and beside families with hundreds.

    BAYESLR_DATA=DIR python benchmarks/pooling.py [--draws 0 1 2] [--out scores.csv]

DIR holds the public tables ``steplaw/dense_lr_bs_loss.csv``, ``steplaw/moe_lr_bs_loss.csv`` and
``marin_optimizer_sweep.csv``. For every draw and family: two cheap slices, three LRs each, chosen
blindly; then both fits predict the optima of the family's larger cells. ``shifted`` and ``bent``
make an outlier of a family: its LRs times 8, and an exponent in tokens that is 0.6 lower.

Scores, as mean over the targets of a draw: error (root mean square of log2(median / optimum)),
regret (nats, interpolated in the measured losses), share of optima in the 90 % interval, and the
interval score (octaves; width + 20 times the miss; less is better).
"""

from __future__ import annotations

import argparse
import math
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.interpolate import PchipInterpolator

from bayeslr.importers import steplaw
from bayeslr.predict import predict
from bayeslr.runs import RunTable, make_table
from bayeslr.sampling import fit
from bayeslr.specs import Target

CARD = "no-steplaw"  # Knows none of these runs.
FAMILIES = ("steplaw_dense", "steplaw_moe", "marin_adamw", "marin_muon")
OUTLIERS = {"": (0.0, 0.0), "shifted": (math.log(8.0), 0.0), "bent": (0.0, -0.6)}
NUM_RUNS, PER_SLICE = 6, 3
COLUMNS = ["run_id", "family", "lr", "n_active", "n_total", "param_convention", "tokens",
           "batch_tokens", "loss", "status"]  # fmt: skip
SLICE = ["family", "n_active", "n_total", "tokens", "batch_tokens"]


def read(data: Path) -> pd.DataFrame:
    """Runs of the four families, two batches a cell where there are more."""
    parts = [
        steplaw.read(data / "steplaw" / f"{kind}_lr_bs_loss.csv").frame for kind in ("dense", "moe")
    ]
    marin = pd.read_csv(data / "marin_optimizer_sweep.csv")
    marin = marin[marin["ablated"].isna() | (marin["ablated"] == "lr")]
    marin = marin.assign(
        n_active=marin["n_nonembed"], n_total=marin["n_nonembed"], param_convention="non_embedding"
    )
    frame = pd.concat([part[COLUMNS] for part in (*parts, marin)], ignore_index=True)
    kept = []
    for _, cell in frame.groupby(["family", "n_active", "tokens"]):
        batches = np.sort(cell["batch_tokens"].unique())
        middle = batches[[len(batches) // 3, 2 * len(batches) // 3]]
        kept.append(cell[cell["batch_tokens"].isin(middle if len(batches) > 3 else batches)])
    return pd.concat(kept, ignore_index=True)


def made_outlier(frame: pd.DataFrame, kind: str) -> pd.DataFrame:
    """The same runs at LRs that another recipe would have had."""
    shift, bend = OUTLIERS[kind]
    return frame.assign(lr=frame["lr"] * np.exp(shift + bend * np.log(frame["tokens"] / 5e9)))


def split(own: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Runs of the cheapest third of a family's cells (two at least), and of the dearest 40 %."""
    compute = own["n_active"] * own["tokens"]
    cells = np.sort(compute.unique())
    cheap, dear = max(2, len(cells) // 3), max(1, round(0.4 * len(cells)))
    return own[compute <= cells[cheap - 1]], own[compute >= cells[-dear]]


def six_runs(cheap: pd.DataFrame, rng: np.random.Generator) -> pd.DataFrame:
    """Two slices, in each three LRs an octave apart about one drawn blindly."""
    slices = [group for _, group in cheap.groupby(SLICE) if group["lr"].nunique() >= PER_SLICE]
    chosen = []
    for i in rng.permutation(len(slices))[: NUM_RUNS // PER_SLICE]:
        group = slices[i].sort_values("lr").drop_duplicates("lr").reset_index(drop=True)
        log_lr = np.log2(group["lr"].to_numpy())
        centre = rng.uniform(log_lr[0] + 1, max(log_lr[-1] - 1, log_lr[0] + 1))
        left = set(range(len(group)))
        for wanted in centre + np.array([-1.0, 0.0, 1.0]):
            nearest = min(left, key=lambda j: abs(log_lr[j] - wanted))
            left.discard(nearest)
            chosen.append(group.iloc[[nearest]])
    return pd.concat(chosen, ignore_index=True)


def truth(dear: pd.DataFrame) -> list[dict[str, Any]]:
    """Slices with two LRs or more, and where their optimum lies, ``low`` to ``high`` in ln LR.

    A point, the minimum of a cubic, where five runs lie within a factor of four of the best; else
    half a step of the grid around the best, open to the side on which nothing was tried.
    """
    found = []
    for key, group in dear.groupby(SLICE):
        group = group.sort_values("lr").drop_duplicates("lr")
        done = group[group["status"] == "ok"]
        if len(group) < 2 or done.empty:
            continue
        every, x = np.log(group["lr"].to_numpy()), np.log(done["lr"].to_numpy())
        loss = done["loss"].to_numpy()
        best = x[int(np.argmin(loss))]
        near = np.abs(x - best) <= 1.41
        below, above = every[every < best - 1e-6], every[every > best + 1e-6]
        low = (best + below[-1]) / 2 if len(below) else -np.inf
        high = (best + above[0]) / 2 if len(above) else np.inf
        if near.sum() >= 5 and len(below) and len(above):
            steps = np.linspace(-0.52, 0.52, 401)
            fitted = np.polyval(np.polyfit(x[near] - best, loss[near], 3), steps)
            low = high = best + steps[np.argmin(fitted)]
        found.append({
            "key": dict(zip(SLICE, key, strict=True)), "low": low, "high": high,
            "log_lr": every, "loss": group["loss"].to_numpy(),
        })  # fmt: skip
    return found


def off(value: float, one: dict[str, Any]) -> float:
    """Octaves from ln LR ``value`` up to where the optimum lies (down: negative); zero inside."""
    return (min(value - one["low"], 0.0) + max(value - one["high"], 0.0)) / math.log(2)


def score(runs: RunTable, wanted: list[dict[str, Any]], seed: int) -> dict[str, float]:
    """Fit and score at the slices of ``wanted``."""
    started = time.monotonic()
    posterior = fit(runs, CARD, seed=seed, fast=True)
    targets = [
        Target(target_id=str(i), param_convention="non_embedding", **one["key"])
        for i, one in enumerate(wanted)
    ]
    table = predict(posterior, targets)
    octaves, regrets, inside, winkler = [], [], [], []
    for (_, row), one in zip(table.iterrows(), wanted, strict=True):
        low, middle, high = (math.log(row[f"lr_{q}"]) for q in ("q05", "q50", "q95"))
        miss = max(off(low, one), -off(high, one), 0.0)
        octaves.append(off(middle, one))
        inside.append(miss == 0.0)
        winkler.append((high - low) / math.log(2) + 20 * miss)
        x, y = one["log_lr"], one["loss"]
        finite = np.isfinite(y)
        curve = PchipInterpolator(x[finite], y[finite])
        chosen = math.log(row["lr"])
        at = float(np.clip(chosen, x[finite][0], x[finite][-1]))
        least = float(np.min(curve(np.linspace(x[finite][0], x[finite][-1], 2000))))
        # Outside the measured LRs: the edge's loss and a valley of typical curvature, unless the
        # optimum itself may lie there.
        beyond = 0.0 if one["low"] <= chosen <= one["high"] else 0.027 * (chosen - at) ** 2
        regrets.append(float(curve(at)) - least + beyond)
    return {
        "targets": len(wanted), "error": float(np.sqrt(np.mean(np.square(octaves)))),
        "regret": float(np.mean(regrets)), "cover_90": float(np.mean(inside)),
        "interval_score": float(np.mean(winkler)), "runs": len(runs),
        "trusted": float(posterior.trustworthy), "seconds": time.monotonic() - started,
    }  # fmt: skip


def main() -> None:
    """Score every family, outlier and draw; print the means and the worst draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--draws", type=int, nargs="*", default=[0, 1, 2, 3, 4])
    parser.add_argument("--families", nargs="*", default=list(FAMILIES))
    parser.add_argument("--outliers", nargs="*", default=list(OUTLIERS))
    parser.add_argument("--out", type=Path, default=Path("pooling.csv"))
    args = parser.parse_args()
    frame = read(Path(os.environ["BAYESLR_DATA"]))
    print(frame.groupby("family").size().to_string(), flush=True)
    rows = []
    for draw in args.draws:
        for kind in args.outliers:
            for family in args.families:
                own = made_outlier(frame[frame["family"] == family], kind)
                cheap, dear = split(own)
                rng = np.random.default_rng([draw, FAMILIES.index(family)])
                six, wanted = six_runs(cheap, rng), truth(dear)
                if not (six["status"] == "ok").any():
                    continue
                others = frame[frame["family"] != family]
                for how, used in (("alone", six), ("pooled", pd.concat([six, others]))):
                    table = make_table(used.reset_index(drop=True), source=how)
                    found = score(table, wanted, seed=draw + 1)
                    rows.append({"draw": draw, "family": family, "outlier": kind, "fit": how,
                                 **found})  # fmt: skip
                    print(rows[-1], flush=True)
                pd.DataFrame(rows).to_csv(args.out, index=False)
    scores = pd.DataFrame(rows)
    means = ["error", "regret", "cover_90", "interval_score"]
    print(scores.groupby(["outlier", "family", "fit"])[means].mean().round(4).to_string())


if __name__ == "__main__":
    main()

"""Held-out targets: the posterior beside least squares, its bootstrap and the published laws.

    python benchmarks/held_out.py FOLDER... [--prior no-steplaw] [--seed 1]

A FOLDER holds ``train.csv`` and, where there is one, ``thin.csv`` (runs, in Step Law's header or as
a run table), ``targets.csv`` and ``truth.csv``. Every row is scored by `bayeslr.replay.scoring`:
regret (nats, mean and worst over the targets), error (octaves, root mean square), share of optima
in the 90 % interval, median width and interval score (octaves). A law is a point: its score has no
intervals; ``laws, together`` are their median and span.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from bayeslr.errors import BayeslrError
from bayeslr.features import REGRESSORS, build_design
from bayeslr.importers import steplaw
from bayeslr.models import two_stage
from bayeslr.predict import read_targets, target_features
from bayeslr.recorded import QUANTILE_LEVELS, answer
from bayeslr.replay.scoring import read_truth, score
from bayeslr.report.published import PUBLISHED_LAWS
from bayeslr.runs import RunTable, read_runs
from bayeslr.sampling import fit
from bayeslr.specs import Target

NUM_RESAMPLES = 1000
LEVELS = tuple(QUANTILE_LEVELS.values())


def read(path: Path) -> RunTable:
    try:
        return steplaw.read(path)
    except BayeslrError:
        return read_runs(path)


def bootstrap(runs: RunTable, targets: list[Target], seed: int) -> NDArray[np.float64]:
    """ln LR* (draw, target) of least squares on slices drawn with replacement."""
    design = build_design(runs)
    vertex, _, _ = two_stage.vertices(design)
    told = two_stage.fit(design, seed=seed, num_draws=2)["coefficient"].any(axis=(0, 1))
    features = design.slice_features()
    names = [name for name, used in zip(REGRESSORS, told, strict=True) if used]
    at = target_features(targets)
    good = np.flatnonzero(np.isfinite(vertex))
    x = np.column_stack([np.ones(len(vertex)), *(features[name] for name in names)])
    x_target = np.column_stack([np.ones(len(targets)), *(at[name] for name in names)])
    rng, draws = np.random.default_rng(seed), []
    while len(draws) < NUM_RESAMPLES:
        kept = rng.choice(good, size=len(good))
        coefficient, _, rank, _ = np.linalg.lstsq(x[kept], vertex[kept], rcond=None)
        if rank == x.shape[1]:
            draws.append(x_target @ coefficient)
    return np.array(draws)


def show(label: str, found: pd.DataFrame, truth: pd.DataFrame, note: str = "", *,
         point: bool = False) -> None:  # fmt: skip
    s = score(truth, found)
    intervals = (
        f"{'':>24}" if point else f"{s.cover_90:8.2f}{s.width_90:8.2f}{s.interval_score:8.2f}"
    )
    scores = f"{s.regret_mean:9.4f}{s.regret_worst:9.4f}{s.octave_error:8.2f}"
    print(f"  {label:28}{scores}{intervals}  {note}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--prior", default="no-steplaw")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    for folder in options.folders:
        targets = read_targets(folder / "targets.csv")
        truth = read_truth(folder / "truth.csv", targets)
        for name in ("train.csv", "thin.csv"):
            if not (folder / name).is_file():
                continue
            runs = read(folder / name)
            print(f"{folder.name} {name}: {len(runs.frame)} runs, {len(targets)} targets")
            print(
                f"  {'':28}{'regret':>9}{'worst':>9}{'error':>8}{'in 90':>8}{'width':>8}{'IS':>8}"
            )
            started = time.monotonic()
            posterior = fit(runs, options.prior, seed=options.seed)
            note = f"{time.monotonic() - started:.0f} s; {posterior.info['verdict']}"
            show("posterior", posterior.predict(targets), truth, note)
            classical = fit(runs, options.prior, seed=options.seed, method="two-stage")
            show("two-stage", classical.predict(targets), truth)
            resampled = np.quantile(bootstrap(runs, targets, options.seed), LEVELS, axis=0)
            show("two-stage, bootstrap", answer(targets, resampled[2], resampled), truth)
        counts = np.array([(t.n_active, t.n_total, t.tokens) for t in targets]).T
        laws = np.log([law(*counts) for law in PUBLISHED_LAWS])
        print("  published, without a run")
        for law, points in zip(PUBLISHED_LAWS, laws, strict=True):
            show(law.label, answer(targets, points, np.tile(points, (5, 1))), truth, law.source,
                 point=True)  # fmt: skip
        span = np.quantile(laws, (0, 0.25, 0.5, 0.75, 1), axis=0)
        show("laws, together", answer(targets, span[2], span), truth)


if __name__ == "__main__":
    main()

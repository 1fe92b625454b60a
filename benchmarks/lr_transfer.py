"""How far the best LR moves along an axis (width, depth, ...) under a parametrisation: real runs.

    python benchmarks/lr_transfer.py OUT --axis width --sizes 32 64 128 256 --parametrization mup

Each size is trained at LRs around the best of the size before, all seeds as one stack; where the
lowest loss lies at the grid's edge the grid grows. The valley's bottom is that of a parabola in
log LR through the LRs within 1.5 octaves of the lowest mean loss, with a level for each seed; its
standard error follows from the scatter about the parabola. Started again, it goes on.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bayeslr.specs import RunSpec
from bayeslr_runners.moe import MoeRunner
from bayeslr_runners.moe.__main__ import keep_freed_memory
from bayeslr_runners.moe.rules import completed
from bayeslr_runners.moe.train import train

BASE = {"d_model": 16, "n_layers": 2, "n_heads": 1, "d_expert": 16, "n_experts": 8, "top_k": 2}
AXES = {"width": "d_model", "depth": "n_layers", "sparsity": "n_experts", "tokens": "tokens"}
GRID = (-1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5)  # octaves about the guess
BATCH_TOKENS, SEQ_LEN = 512, 64


def spec_of(arguments: argparse.Namespace, size: int, lr: float, seed: int) -> RunSpec:
    tokens = size if arguments.axis == "tokens" else arguments.tokens
    key = AXES[arguments.axis]
    base = BASE if arguments.axis == "tokens" else completed(BASE, {key: arguments.sizes[0]})
    shape = base if arguments.axis == "tokens" else completed(BASE, {key: size})
    options: dict[str, Any] = {"base_shape": base, "threads": 1, "partial_evals": 0,
                               "qk_norm": False}  # fmt: skip
    if arguments.horizon_exponent is not None:
        options |= {"base_tokens": arguments.sizes[0],
                    "horizon_exponent": arguments.horizon_exponent}  # fmt: skip
    n_active, n_total = MoeRunner(options).counts(shape)
    return RunSpec(
        run_id=f"{key}{size}-lr{lr:.5g}-seed{seed}", family="f", runner="moe", lr=lr,
        tokens=tokens, batch_tokens=BATCH_TOKENS, seq_len=SEQ_LEN, n_active=n_active,
        n_total=n_total, shape=shape, options=options, parametrization=arguments.parametrization,
        warmup_tokens=20 * BATCH_TOKENS, seed=seed, weight_decay=arguments.weight_decay,
        weight_decay_kind=arguments.weight_decay_kind,
    )  # fmt: skip


def losses(
    arguments: argparse.Namespace, size: int, rates: Sequence[float]
) -> dict[float, list[float]]:
    """Final loss of every seed at each LR; infinite where a run diverged."""
    for seed in range(arguments.seeds):
        folders = []
        for lr in rates:
            spec = spec_of(arguments, size, lr, seed)
            folder = arguments.out / spec.run_id
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "spec.json").write_text(spec.to_json())
            folders.append(folder)
        for first in range(0, len(folders), arguments.stack):
            train(*folders[first : first + arguments.stack])
    return {lr: [final_loss(arguments, size, lr, seed) for seed in range(arguments.seeds)]
            for lr in rates}  # fmt: skip


def final_loss(arguments: argparse.Namespace, size: int, lr: float, seed: int) -> float:
    folder = arguments.out / spec_of(arguments, size, lr, seed).run_id
    row = json.loads((folder / "records.jsonl").read_text().splitlines()[-1])
    return float(row["loss"]) if row["status"] == "ok" else math.inf


def valley(arguments: argparse.Namespace, size: int, guess: float) -> dict[str, Any]:
    """Bottom of a size's valley, in log2 LR, with its standard error over seeds."""
    found: dict[float, list[float]] = {}
    octaves = list(GRID)
    for _ in range(4):
        rates = [float(f"{guess * 2**octave:.6g}") for octave in octaves]
        found |= losses(arguments, size, [lr for lr in rates if lr not in found])
        means = {lr: statistics.fmean(found[lr]) for lr in rates}
        best = min(means, key=lambda lr: means[lr])
        if best == max(rates):
            octaves += [max(octaves) + 0.5, max(octaves) + 1.0]
        elif best == min(rates):
            octaves = [min(octaves) - 1.0, min(octaves) - 0.5, *octaves]
        else:
            break
    near = [lr for lr in found if abs(math.log2(lr / best)) < 1.51 and math.isfinite(means[lr])]
    bottom, error = parabola_bottom(
        np.log2(np.array(near) / best), np.array([found[lr] for lr in near])
    )
    return {
        "size": size,
        "log2_lr": math.log2(best) + bottom,
        "log2_lr_se": error,
        "loss": means[best],
        "losses": {f"{lr:.4g}": found[lr] for lr in sorted(found)},
    }


def parabola_bottom(x_L: NDArray[np.float64], loss_LS: NDArray[np.float64]) -> tuple[float, float]:
    """Bottom of one parabola for all seeds, each at its own level, and its standard error.

    x_L: (num_lrs,), loss_LS: (num_lrs, num_seeds). NaN where the losses bend the other way.
    """
    num_lrs, num_seeds = loss_LS.shape
    x = np.repeat(x_L, num_seeds)
    columns = np.column_stack([x**2, x, np.tile(np.eye(num_seeds), (num_lrs, 1))])
    weight, *_ = np.linalg.lstsq(columns, loss_LS.ravel(), rcond=None)
    square, linear = weight[:2]
    if square <= 0:
        return math.nan, math.nan
    residual = loss_LS.ravel() - columns @ weight
    variance = float(residual @ residual) / max(1, len(x) - len(weight))
    covariance = variance * np.linalg.inv(columns.T @ columns)[:2, :2]
    slope = np.array([linear / (2 * square**2), -1 / (2 * square)])
    return float(-linear / (2 * square)), float(math.sqrt(slope @ covariance @ slope))


def lines(axis: str, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    first = rows[0]
    return [
        f"{AXES[axis]} {row['size']:>7d}: LR* {2 ** row['log2_lr']:.3e} (+- "
        f"{row['log2_lr_se']:.2f} octaves), moved {row['log2_lr'] - first['log2_lr']:+.2f}, "
        f"loss {row['loss']:.4f}"
        for row in rows
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--axis", choices=tuple(AXES), required=True)
    parser.add_argument("--sizes", type=int, nargs="+", required=True)
    parser.add_argument("--parametrization", default="mup")
    parser.add_argument("--guess", type=float, default=0.016, help="best LR of the first size")
    parser.add_argument("--tokens", type=int, default=98_304)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--stack", type=int, default=8, help="most runs trained as one program")
    parser.add_argument("--horizon-exponent", type=float)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--weight-decay-kind", default="coupled")
    arguments = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    guess = arguments.guess
    for size in arguments.sizes:
        rows.append(valley(arguments, size, guess))
        # A grid point, so that a later size shares its LRs and the grid stays on one lattice.
        if math.isfinite(rows[-1]["log2_lr"]):
            guess *= 2 ** (round(2 * (rows[-1]["log2_lr"] - math.log2(guess))) / 2)
        (arguments.out / "valleys.json").write_text(json.dumps(rows, indent=1))
        print(lines(arguments.axis, rows)[-1], flush=True)
    moved = [row["log2_lr"] - rows[0]["log2_lr"] for row in rows]
    print(f"{arguments.parametrization} over {arguments.axis}: LR* spans "
          f"{max(moved) - min(moved):.2f} octaves", flush=True)  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())

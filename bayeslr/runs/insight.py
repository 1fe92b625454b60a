"""What a run table holds, and what its runs cannot tell."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pandas as pd

from bayeslr.runs.additions import cheapest_addition
from bayeslr.runs.columns import SHAPE_KEYS
from bayeslr.runs.table import (
    RunTable,
    common_horizon,
    covariate_values,
    covariates_within,
    last_word,
    lr_group,
    total_flops,
)
from bayeslr.specs import COVARIATES
from bayeslr.units import format_lr, format_quantity


def _with_groups(frame: pd.DataFrame) -> pd.DataFrame:
    """The frame with integer columns shape, cell and slice, of the rows that a fit would use.

    Failed and lost runs are left out, and all checkpoints but the last of a run that has not ended.
    A diverged run belongs to the token count that it was meant to reach.
    """
    told = frame[~frame["status"].isin(["failed", "lost"])]
    told = told[last_word(told)].copy()
    told["horizon"] = common_horizon(told)
    told["shape"] = told.groupby(list(SHAPE_KEYS), dropna=False, sort=False).ngroup()
    told["cell"] = told.groupby(["shape", "horizon"], dropna=False, sort=False).ngroup()
    told["slice"] = told.groupby(["cell", "batch_tokens"], sort=False).ngroup()
    told["lr_code"] = lr_group(told["lr"])
    return told


def describe(table: RunTable) -> dict[str, Any]:
    """Counts of what is in the table, by family (JSON-safe)."""
    grouped = _with_groups(table.frame)
    families = []
    for family in table.families:
        rows = table.frame[table.frame["family"] == family]
        told = grouped[grouped["family"] == family]
        per_slice = told.groupby("slice")["lr_code"].nunique()
        families.append(
            {
                "family": family,
                "rows": len(rows),
                "runs": int(rows["run_id"].nunique()),
                "status": {s: int(n) for s, n in rows["status"].value_counts().items()},
                "arch": sorted(set(rows["arch"])),
                "shapes": int(told["shape"].nunique()),
                "cells": int(told["cell"].nunique()),
                "slices": int(told["slice"].nunique()),
                "lrs_per_slice": _span(per_slice),
                "n_active": _span(rows["n_active"]),
                "n_total": _span(rows["n_total"]),
                "tokens": _span(rows["tokens"]),
                "batch_tokens": _span(rows["batch_tokens"]),
                "lr": _span(rows["lr"]),
                "loss": _span(rows["loss"]),
                "covariates": {
                    name: [float(v) for v in sorted(set(values.dropna()))]
                    for name, values in covariates_within(told, told["slice"]).items()
                },
                "flops": total_flops(rows),
            }
        )
    return {
        "source": table.source,
        "rows": len(table),
        "param_convention": str(table.frame["param_convention"].iloc[0]),
        "flops": total_flops(table.frame),
        "data_hash": table.data_hash,
        "families": families,
    }


def _span(values: pd.Series[Any]) -> list[float] | None:
    known = values.dropna()
    return [float(known.min()), float(known.max())] if len(known) else None


def identifiability(table: RunTable) -> list[str]:
    """What these runs cannot tell, in sentences; whatever is named stays as the prior has it."""
    grouped = _with_groups(table.frame)
    several = len(table.families) > 1
    told: list[str] = []
    for family in table.families:
        prefix = f"family {family}: " if several else ""
        told += [prefix + text for text in _blind_spots(grouped[grouped["family"] == family])]
    return told


def _blind_spots(rows: pd.DataFrame) -> list[str]:
    measured = rows[rows["status"].isin(["ok", "partial", "pruned"]) & rows["loss"].notna()]
    if measured.empty:
        if (rows["status"] == "diverged").any():
            return [
                "all runs diverged: they bound the LR from above, and the rest is the prior's; "
                "add runs at lower LRs"
            ]
        return ["no run has a loss: the fit would only repeat the prior"]
    cells = measured.drop_duplicates(["cell", "batch_tokens"])
    told = [
        *_scale_blind_spots(cells),
        *_lr_blind_spots(rows, measured),
        *_covariate_blind_spots(measured),
    ]
    if not (rows["status"] == "diverged").any():
        told.append("no run diverged: where divergence begins is the prior's")
    return told


# Range in natural logs within which values of a regressor count as one: token counts are rounded to
# whole batches, parameters to whole widths, and no exponent can be told from what that leaves.
_ONE = 0.1


def _is_one(values: pd.Series[float]) -> bool:
    """Whether values of a regressor are one but for rounding."""
    return float(np.log(values.max() / values.min())) < _ONE


def _scale_blind_spots(cells: pd.DataFrame) -> list[str]:
    """What the slices (one row each) cannot tell of the exponents, and what to run about it."""
    told = []
    if _is_one(cells["n_active"]):
        told.append(
            f"one model size only (n_active {format_quantity(cells['n_active'].iloc[0])}): the "
            "size exponent is the prior's" + _advice(cells, ["n_active"])
        )
    if _is_one(cells["tokens"]):
        told.append(
            f"one token count only ({format_quantity(cells['tokens'].iloc[0])}): the token "
            "exponent is the prior's" + _advice(cells, ["tokens"])
        )
    if _is_one(cells["batch_tokens"]):
        told.append(
            f"one batch size only ({format_quantity(cells['batch_tokens'].iloc[0])} tokens): the "
            "batch exponent is the prior's" + _advice(cells, ["batch_tokens"])
        )
    cells = cells.assign(sparsity=cells["n_active"] / cells["n_total"])
    sparsity = cells["sparsity"]
    if (sparsity < 1).any() and _is_one(sparsity):
        told.append(
            f"one sparsity only (n_active / n_total = {sparsity.iloc[0]:.3g}): the sparsity "
            "exponent is the prior's" + _advice(cells, ["sparsity"])
        )
    return told + _moving_together(cells)


_WORDS = {
    "n_active": ("size", "size"), "sparsity": ("sparsity", "sparsity"),
    "tokens": ("token count", "token"), "batch_tokens": ("batch size", "batch"),
}  # fmt: skip

# Correlation, of two or of one with all others, from which regressors count as moving together.
_TOGETHER = 0.98


def _moving_together(cells: pd.DataFrame) -> list[str]:
    """Regressors whose exponents cannot be told apart: pairs first, then one with all others."""
    names, told = list(_WORDS), []
    logs = np.log(cells[names].to_numpy(dtype=np.float64))
    logs = logs - logs.mean(axis=0)
    varied = [j for j, name in enumerate(names) if not _is_one(cells[name])]
    if len(logs) < 3:
        return []
    for i, j in itertools.combinations(varied, 2):
        correlation = float(np.corrcoef(logs[:, i], logs[:, j])[0, 1])
        if abs(correlation) > _TOGETHER:
            first, second = _WORDS[names[i]], _WORDS[names[j]]
            told.append(
                f"{first[0]} and {second[0]} move together (correlation {correlation:.3f}): only a "
                f"sum of the {first[1]} and {second[1]} exponents is known, how it splits is the "
                "prior's" + _advice(cells, [names[i], names[j]])
            )
    if told or len(varied) < 3:
        return told
    for j in varied:
        others = [i for i in varied if i != j]
        fitted = logs[:, others] @ np.linalg.lstsq(logs[:, others], logs[:, j], rcond=None)[0]
        if len(logs) > len(varied) and np.var(fitted) > _TOGETHER**2 * np.var(logs[:, j]):
            listed = " and ".join(_WORDS[names[i]][0] for i in others)
            told.append(
                f"{_WORDS[names[j]][0]} follows from {listed}: their exponents cannot be told "
                "apart, how they split is the prior's" + _advice(cells, [names[j]])
            )
            break
    return told


def _advice(cells: pd.DataFrame, exponents: list[str]) -> str:
    found = cheapest_addition(cells, exponents)
    return "" if found is None else f"; the cheapest that helps: {found}"


def _lr_blind_spots(rows: pd.DataFrame, measured: pd.DataFrame) -> list[str]:
    tried = measured.groupby("slice")["lr_code"].nunique()
    if int(tried.max()) == 1:
        bounded = (rows["status"] == "diverged").any()
        known = "but the prior and the bound by diverged runs" if bounded else "but the prior"
        return [
            f"one LR only in every slice: nothing is known of the best LR {known}; try at "
            "least 3 LRs in one slice"
        ]
    told = []
    if int(tried.max()) < 3:
        told.append(
            "fewer than 3 LRs in every slice: the curvature of the valley is the prior's; try at "
            "least 3 LRs in one slice"
        )
    best = measured.loc[measured.groupby("slice")["loss"].idxmin()].set_index("slice")["lr_code"]
    wide = tried.index[tried >= 3]
    if len(wide) == 0:
        return told
    lowest = rows.groupby("slice")["lr_code"].min()
    highest = rows.groupby("slice")["lr_code"].max()
    at_low = wide[best.loc[wide] == lowest.loc[wide]]
    at_high = wide[best.loc[wide] == highest.loc[wide]]
    for at, edge, side, factor in (
        (at_low, "lowest", "lower", 0.5),
        (at_high, "highest", "higher", 2.0),
    ):
        if len(at):
            first = _largest(measured[measured["slice"].isin(at)])
            tried = rows.loc[rows["slice"] == first["slice"], "lr"]
            lr = factor * float(tried.min() if factor < 1 else tried.max())
            told.append(
                f"in {len(at)} of {len(wide)} slices the best LR is the {edge} that was tried: the "
                f"optimum may lie {side}; try {side} LRs there, first {format_lr(lr)} at "
                f"{_place(first)}"
            )
    return told


def _covariate_blind_spots(measured: pd.DataFrame) -> list[str]:
    """What cannot be told of weight decay and LR multipliers that are not the same everywhere."""
    told, within = [], covariates_within(measured, measured["slice"])
    for name in COVARIATES:
        values = covariate_values(measured, name)
        if values.nunique() < 2:
            continue
        tried = f"{name} differs ({values.min():.3g} to {values.max():.3g})"
        if name not in within:
            told.append(
                f"{tried} between slices and within none: what it does to the LR passes for an "
                "effect of size, tokens or batch, and LRs hold for targets whose value follows the "
                "runs'; try 2 LRs at another value in one slice"
            )
            continue
        usual = values.mode().iloc[0]
        off = measured[values.notna() & (values != usual)]
        if int(off.groupby(["slice", values[off.index]])["lr_code"].nunique().max()) < 2:
            told.append(
                f"{tried} within slices, with one LR at each value but the usual {usual:.3g}: how "
                "much of what it does is a shift of the best LR is the prior's; try a second LR at "
                "one of these values"
            )
    return told


def _largest(rows: pd.DataFrame) -> pd.Series[Any]:
    """The row of the largest compute: the one whose optimum tells most about a larger run."""
    return rows.iloc[int(np.argmax(rows["n_active"].to_numpy() * rows["horizon"].to_numpy()))]


def _place(row: pd.Series[Any]) -> str:
    size = format_quantity(row["n_active"])
    if row["n_total"] > row["n_active"]:
        size += f" of {format_quantity(row['n_total'])}"
    tokens, batch = format_quantity(row["horizon"]), format_quantity(row["batch_tokens"])
    return f"{size}, {tokens} tokens, batch {batch}"

"""The run table: accepted runs, with what was set aside and why."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from bayeslr.errors import DataError, SpecError
from bayeslr.runs.cells import Rows, empty_quarantine, first_reasons, quarantine_of, type_columns
from bayeslr.runs.columns import COLUMN_NAMES, SHAPE_KEYS
from bayeslr.runs.files import encode, json_lines, read_quarantine, read_rows, write_atomically
from bayeslr.runs.rules import apply_rules
from bayeslr.specs import COVARIATES, as_path
from bayeslr.units import train_flops


@dataclass(frozen=True)
class RunTable:
    """Accepted runs, with what was set aside and why.

    Attributes
    ----------
    frame
        Accepted rows. All columns of `COLUMNS` are there, numbers as float64 (NaN when missing),
        text as object (None when missing); columns that bayeslr does not know follow, as they were.
    quarantine
        One row for each rejected one, with its first broken rule: `QUARANTINE_COLUMNS`. ``line``
        is 1-based; in Parquet and in memory it counts rows.
    warnings
        What was assumed or looks odd, in sentences.
    source
        Where the rows came from.
    """

    frame: pd.DataFrame
    quarantine: pd.DataFrame = field(default_factory=empty_quarantine)
    warnings: tuple[str, ...] = ()
    source: str = ""

    def __len__(self) -> int:
        return len(self.frame)

    @property
    def families(self) -> tuple[str, ...]:
        """Families in order of appearance."""
        return tuple(str(name) for name in self.frame["family"].unique())

    @cached_property
    def data_hash(self) -> str:
        """SHA-256 of our columns, whatever the order of the rows."""
        lines = sorted(json_lines(self.frame[list(COLUMN_NAMES)]))
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    def write(self, path: str | Path) -> None:
        """Write the accepted rows as CSV, Parquet or JSON lines, by suffix, all or nothing.

        Raises: SpecError on another suffix; StorageError if the disk is full or not writable, in
        which case a file that was there before is as it was.
        """
        path = as_path(path)
        write_atomically(path, encode(self.frame, path))


def horizon(frame: pd.DataFrame) -> pd.Series[float]:
    """Tokens (row,) that each row belongs to: of a diverged run, those that it was meant to reach.

    Not those at which it died, for another LR would have gone on.
    """
    return frame["planned_tokens"].where(frame["status"] == "diverged").fillna(frame["tokens"])


def common_horizon(frame: pd.DataFrame) -> pd.Series[float]:
    """`horizon` (row,), one for what is one in a shape but for rounding to whole batches."""
    shape = frame.groupby(list(SHAPE_KEYS), dropna=False, sort=False).ngroup()
    tokens = horizon(frame)
    code = tokens.groupby(shape).transform(_alike, within=0.01)
    return tokens.groupby([shape, code]).transform("min")


def lr_group(lr: pd.Series[float] | NDArray[np.float64]) -> NDArray[np.int64]:
    """Codes (row,), from the lowest LR up, of the LRs that are one but for rounding (within 2 %).

    For grouping alone: tables write one LR as 0.000345 and as 0.0003453.
    """
    return _alike(lr, within=0.02)


def _alike(values: pd.Series[float] | NDArray[np.float64], within: float) -> NDArray[np.int64]:
    """Codes, from the least value up, of values that lie within a share of the first of them."""
    distinct, where = np.unique(np.asarray(values, dtype=np.float64), return_inverse=True)
    codes = np.zeros(len(distinct), dtype=np.int64)
    start, code = -math.inf, -1
    for i, value in enumerate(distinct):
        if value > (1 + within) * start:
            start, code = value, code + 1
        codes[i] = code
    return codes[where]


def covariate_values(frame: pd.DataFrame, name: str) -> pd.Series[float]:
    """Values (row,) of a covariate; an LR multiplier that is not stated is 1."""
    values = frame[name].astype(float)
    return values if name == "weight_decay" else values.fillna(1.0)


def covariates_within(
    frame: pd.DataFrame, group: pd.Series[int] | NDArray[np.int64]
) -> dict[str, pd.Series[float]]:
    """`covariate_values` of those covariates that differ within some group (row,), by name."""
    found = {name: covariate_values(frame, name) for name in COVARIATES}
    return {n: v for n, v in found.items() if (v.groupby(group).nunique() > 1).any()}


def last_word(frame: pd.DataFrame) -> NDArray[np.bool_]:
    """Rows (row,) that count: ended ones, and the last checkpoint of each run that has not ended.

    Earlier checkpoints of a run share its noise, and were measured at a schedule's start.
    """
    open_ = frame["status"].isin(["partial", "pruned"]).to_numpy()
    ended = set(frame.loc[~open_, "run_id"])
    by_tokens = frame.loc[open_ & ~frame["run_id"].isin(ended)].sort_values("tokens", kind="stable")
    latest = by_tokens.drop_duplicates("run_id", keep="last").index
    return np.asarray(~open_ | frame.index.isin(latest), dtype=bool)


def total_flops(frame: pd.DataFrame) -> float:
    """FLOPs of all runs, each counted once, at the longest of its rows."""
    return float(frame.groupby("run_id")["flops"].max().sum())


def read_runs(*paths: str | Path) -> RunTable:
    """Read run tables (CSV, Parquet or JSON lines, by suffix) into one checked table.

    Rows that were set aside when a table was written (`quarantine_path`) come first among those
    that are set aside here.
    Raises: DataError if a file cannot be read, a required column is missing, parameter conventions
    are mixed, or no row is left.
    """
    if not paths or not all(isinstance(path, str | Path) for path in paths):
        raise SpecError(
            f"read_runs takes one or more paths, got {', '.join(map(repr, paths)) or 'none'}; "
            "of a list of them: read_runs(*paths)"
        )
    table = _check([read_rows(Path(path)) for path in paths])
    earlier = [rows for path in paths if (rows := read_quarantine(path)) is not None]
    if not earlier:
        return table
    quarantine = pd.concat([*earlier, table.quarantine], ignore_index=True)
    return dataclasses.replace(table, quarantine=quarantine)


def make_table(
    data: pd.DataFrame | Iterable[Mapping[str, Any]] | Rows,
    *,
    source: str = "records",
    warnings: Sequence[str] = (),
) -> RunTable:
    """Check rows that are in memory already, exactly as `read_runs` does.

    source: what messages call the place; `Rows` name theirs themselves.
    """
    if isinstance(data, Rows):
        return _check([data], warnings)
    if isinstance(data, pd.DataFrame):
        frame = data
    else:
        records = list(data) if isinstance(data, Iterable) else [data]
        wrong = [row for row in records if not isinstance(row, Mapping)]
        if wrong:
            raise SpecError(f"a row is a mapping of column to value, got {wrong[0]!r:.80}")
        frame = pd.DataFrame.from_records(records)
    lines = np.arange(1, len(frame) + 1)
    return _check([Rows(frame.reset_index(drop=True), source, lines)], warnings)


def concat(tables: Sequence[RunTable]) -> RunTable:
    """One table of several; runs that contradict each other across them are quarantined."""
    tables = list(tables) if isinstance(tables, Iterable) else [tables]
    if not tables or not all(isinstance(table, RunTable) for table in tables):
        raise SpecError("concat takes a list of run tables, at least one")
    parts = [
        Rows(t.frame.reset_index(drop=True), t.source, np.arange(1, len(t) + 1)) for t in tables
    ]
    joined = _check(parts, [warning for t in tables for warning in t.warnings])
    quarantines = [t.quarantine for t in (*tables, joined) if len(t.quarantine)]
    if not quarantines:
        return joined
    quarantine = pd.concat(quarantines, ignore_index=True)
    return RunTable(joined.frame, quarantine, joined.warnings, joined.source)


def _check(parts: list[Rows], earlier: Sequence[str] = ()) -> RunTable:
    """Type, check and split the rows of several places."""
    source = ", ".join(dict.fromkeys(part.place for part in parts))
    if not any(len(part) or part.broken for part in parts):
        raise DataError(f"{source}: there are no rows")
    warnings = list(earlier)
    typed = type_columns(parts, warnings)
    apply_rules(typed, warnings)
    quarantine = quarantine_of(typed)
    accepted = typed.frame.loc[~typed.rejects.hit].reset_index(drop=True)
    if accepted.empty:
        raise DataError(
            f"{source}: no row is left, all {len(quarantine)} were rejected:\n"
            f"{first_reasons(quarantine)}"
        )
    _derive(accepted)
    _warn_of_odd(accepted, warnings)
    return RunTable(accepted, quarantine, tuple(dict.fromkeys(warnings)), source)


def _derive(frame: pd.DataFrame) -> None:
    dense = (frame["n_active"] == frame["n_total"]).to_numpy()
    arch = pd.Series(np.where(dense, "dense", "moe"), index=frame.index, dtype=object)
    frame["arch"] = frame["arch"].where(frame["arch"].notna(), arch)
    pairs = zip(frame["n_active"].tolist(), frame["tokens"].tolist(), strict=True)
    flops = pd.Series([train_flops(n, t) for n, t in pairs], index=frame.index, dtype=np.float64)
    frame["flops"] = frame["flops"].fillna(flops)


def _warn_of_odd(frame: pd.DataFrame, warnings: list[str]) -> None:
    large = frame[(frame["status"] == "ok") & (frame["n_active"] >= 1e7)]
    if len(large) and float(large["loss"].median()) < 1.3:
        warnings.append(
            f"the median loss is {large['loss'].median():.3g}: usual for bits a byte, low for nats "
            "a token. Losses must be in nats a token"
        )
    kinds = frame.groupby("family", sort=False)["loss_kind"].nunique()
    warnings.extend(
        f"family {family} mixes kinds of loss, which do not compare: give each its own family"
        for family in kinds.index[kinds > 1]
    )

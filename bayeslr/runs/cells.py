"""From cells as they stand in a file to typed columns, and the rows that are set aside."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from bayeslr.errors import DataError
from bayeslr.runs.columns import COLUMNS, NUMBER_NAMES, REQUIRED_NAMES, likely_headers
from bayeslr.units import counted

QUARANTINE_COLUMNS = ("file", "line", "run_id", "column", "value", "rule", "advice")

Mask = NDArray[np.bool_]
Floats = NDArray[np.float64]

_MISSING = frozenset({"", "na", "n/a", "null", "none", "<na>"})


@dataclass
class Rows:
    """Rows as they stand in one place, before any check.

    frame: cells, of any type. place: what messages call it. lines: 1-based line of each row,
    (num_rows,). broken: quarantine entries of lines that are no rows at all.
    """

    frame: pd.DataFrame
    place: str
    lines: NDArray[np.int64]
    broken: list[dict[str, Any]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.frame)


class Rejects:
    """The first broken rule of each row. Masks are (num_rows,)."""

    def __init__(self, num_rows: int) -> None:
        self.hit: Mask = np.zeros(num_rows, dtype=bool)
        self.column = np.full(num_rows, None, dtype=object)
        self.rule = np.full(num_rows, None, dtype=object)
        self.advice = np.full(num_rows, None, dtype=object)

    def add(self, mask: Mask, column: str, rule: str, advice: str) -> None:
        """Set aside the rows of the mask that have broken no rule so far."""
        new = mask & ~self.hit
        if new.any():
            self.column[new], self.rule[new], self.advice[new] = column, rule, advice
            self.hit |= new


@dataclass
class TypedRows:
    """Rows of several places with our columns typed, and what was rejected of them so far."""

    frame: pd.DataFrame
    rejects: Rejects
    parts: list[Rows]
    _columns: dict[tuple[int, str], list[Any]] = field(default_factory=dict)

    def where(self, row: int) -> tuple[Rows, int]:
        """The part that a row came from, and its position there."""
        for part in self.parts:
            if row < len(part):
                return part, row
            row -= len(part)
        raise IndexError(row)

    def cell(self, row: int, column: str) -> str:
        """A cell as the user wrote it."""
        part, position = self.where(row)
        key = (id(part), column)
        if key not in self._columns:
            self._columns[key] = part.frame[column].tolist() if column in part.frame else []
        value = self._columns[key][position] if self._columns[key] else None
        return "" if value is None or value is pd.NA else str(value)


def type_columns(parts: list[Rows], warnings: list[str]) -> TypedRows:
    """Our columns as float64 or text, the others as they are; text for numbers is rejected.

    Raises: DataError if a required column is missing, or one is there twice. A missing status is
    warned of.
    """
    frames = []
    no_numbers: dict[str, list[Mask]] = {name: [] for name in NUMBER_NAMES}
    for part in parts:
        _require_columns(part, warnings)
        columns: dict[str, Any] = {}
        for column in COLUMNS:
            if column.kind == "text":
                columns[column.name] = _texts(_cells(part, column.name))
            else:
                columns[column.name], bad = numbers(_cells(part, column.name))
                no_numbers[column.name].append(bad)
        if "status" not in part.frame:
            columns["status"] = np.full(len(part), "ok", dtype=object)
        for name in part.frame.columns:
            if str(name) not in columns:
                columns[str(name)] = _extra(part.frame[name])
        frames.append(pd.DataFrame(columns))
    frame = frames[0] if len(frames) == 1 else pd.concat(frames, ignore_index=True)
    for column in COLUMNS:
        if column.kind == "text":  # pandas 3 would infer its own string type, with NaN
            values = frame[column.name].astype(object)
            frame[column.name] = values.where(values.notna(), None)
    typed = TypedRows(frame, Rejects(len(frame)), parts)
    for name, masks in no_numbers.items():
        _reject_text(typed, name, np.concatenate(masks))
    return typed


def _cells(part: Rows, name: str) -> pd.Series[Any]:
    if name in part.frame:
        return part.frame[name]
    return pd.Series(np.full(len(part), math.nan))


def _require_columns(part: Rows, warnings: list[str]) -> None:
    have = [str(name) for name in part.frame.columns]
    if twice := [name for name in have if have.count(name) > 1]:
        raise DataError(
            f"{part.place}: the column {twice[0]!r} is there twice; rename or remove one"
        )
    missing = [name for name in REQUIRED_NAMES if name not in have]
    if "status" in missing:
        missing.remove("status")
        warnings.append(
            f"{part.place} has no column status: every run is taken as ok. Runs that blew up "
            "belong in the table with status=diverged"
        )
    if not missing or (not len(part) and part.broken):
        return
    hints = [f"{name} is perhaps {h!r}" for name, h in likely_headers(missing, have).items()]
    raise DataError(
        f"{part.place}: required column{'s' if len(missing) > 1 else ''} {', '.join(missing)} "
        f"missing. {'; '.join(hints)}{'. ' if hints else ''}Rename them, or map them: "
        "bayeslr import csv FILE --map ours=theirs (--set ours=value for what is the same in all "
        "runs). Exports of other tools: bayeslr import --help"
    )


def numbers(values: pd.Series[Any]) -> tuple[Floats, Mask]:
    """Numbers of a column, NaN where missing, and where text stands instead; both (num_rows,)."""
    if isinstance(values.dtype, np.dtype) and values.dtype.kind in "fiu":
        return values.to_numpy(dtype=np.float64, copy=True), np.zeros(len(values), dtype=bool)
    # float() reads every decimal exactly, which pandas' own parser does not.
    parsed = np.empty(len(values), dtype=np.float64)
    bad = np.zeros(len(values), dtype=bool)
    known: dict[str, float | None] = {}
    for i, value in enumerate(values.tolist()):
        if not isinstance(value, str):
            number = _parse_number(value)
        elif value in known:
            number = known[value]
        else:
            number = known[value] = _parse_number(value)
        bad[i] = number is None
        parsed[i] = math.nan if number is None else number
    return parsed, bad


def _parse_number(value: Any) -> float | None:
    """NaN if the cell is empty, None if it holds no number."""
    if isinstance(value, str):
        if value.strip().lower() in _MISSING:
            return math.nan
        try:
            return None if "_" in value else float(value)
        except ValueError:
            return None
    if isinstance(value, bool | np.bool_):
        return None
    if value is None or value is pd.NA or value is pd.NaT:
        return math.nan
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return None


def _texts(values: pd.Series[Any]) -> NDArray[np.object_]:
    """Text of a column, stripped, without NUL, which no netCDF file holds; None where missing."""
    out = np.full(len(values), None, dtype=object)
    missing = values.isna().to_numpy()
    for i, value in enumerate(values.tolist()):
        if missing[i]:
            continue
        if isinstance(value, float) and value.is_integer():  # an id that pandas made a float
            value = int(value)
        out[i] = str(value).replace("\0", "").strip() or None
    return out


def _extra(values: pd.Series[Any]) -> pd.Series[Any]:
    """A column that is not ours: numbers if all of it are, else text, JSON for nested values."""
    if values.dtype.kind in "fiub":
        return values
    parsed, bad = numbers(values)
    if not bad.any() and not np.isnan(parsed).all():
        return pd.Series(parsed, index=values.index)
    plain = [json.dumps(v) if isinstance(v, dict | list) else v for v in values.tolist()]
    return pd.Series(_texts(pd.Series(plain, dtype=object)), index=values.index, dtype=object)


def _reject_text(typed: TypedRows, name: str, bad: Mask) -> None:
    advice = {row: _number_advice(typed.cell(row, name)) for row in np.flatnonzero(bad).tolist()}
    for text in dict.fromkeys(advice.values()):
        mask = np.zeros(len(bad), dtype=bool)
        mask[[row for row, given in advice.items() if given == text]] = True
        typed.rejects.add(mask, name, f"{name} must be a number", text)


def _number_advice(value: str) -> str:
    value = value.strip()
    if "," in value:
        return "write it without thousands separators and with a decimal point"
    if value[:1].isdigit() and value[-1:].upper() in tuple("KMBGT"):
        return "write the number itself, such as 1300000000 for 1.3B"
    return "give the number, or leave the cell empty if it is optional"


def quarantine_of(typed: TypedRows) -> pd.DataFrame:
    """One row for each rejected one, `QUARANTINE_COLUMNS`, in order of place and line."""
    rejects = typed.rejects
    run_ids = typed.frame["run_id"].tolist()
    entries = []
    for row in np.flatnonzero(rejects.hit).tolist():
        part, position = typed.where(row)
        entries.append(
            {
                "file": part.place,
                "line": int(part.lines[position]),
                "run_id": run_ids[row],
                "column": rejects.column[row],
                "value": typed.cell(row, rejects.column[row]),
                "rule": rejects.rule[row],
                "advice": rejects.advice[row],
            }
        )
    entries += [entry for part in typed.parts for entry in part.broken]
    if not entries:
        return empty_quarantine()
    table = pd.DataFrame(entries, columns=pd.Index(QUARANTINE_COLUMNS))
    return table.sort_values(["file", "line"], kind="stable", ignore_index=True)


def empty_quarantine() -> pd.DataFrame:
    """A quarantine without rows."""
    return pd.DataFrame({name: pd.Series(dtype=object) for name in QUARANTINE_COLUMNS})


def broken_line(place: str, line: int, value: str, rule: str, advice: str) -> dict[str, Any]:
    """Quarantine entry of a line that cannot be split into cells."""
    shown = value if len(value) <= 80 else value[:77] + "..."
    cells = (place, line, None, None, shown, rule, advice)
    return dict(zip(QUARANTINE_COLUMNS, cells, strict=True))


def first_reasons(quarantine: pd.DataFrame, limit: int = 3) -> str:
    """The most frequent reasons of a quarantine, one a line, each with its first place."""
    groups = quarantine.groupby(["column", "rule"], sort=False, dropna=False)
    reasons: Sequence[pd.DataFrame] = sorted((rows for _, rows in groups), key=lambda r: -len(r))
    shown = []
    for rows in reasons[:limit]:
        first = rows.iloc[0]
        shown.append(
            f"  {counted(len(rows), 'row')}: {first['rule']}, got "
            f"{first['value']!r} ({first['file']}, line {first['line']}); {first['advice']}"
        )
    if len(reasons) > limit:
        rest = sum(len(rows) for rows in reasons[limit:])
        shown.append(f"  and {rest} more, for {len(reasons) - limit} other reasons")
    return "\n".join(shown)

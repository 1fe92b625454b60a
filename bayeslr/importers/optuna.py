"""Trials of Optuna: the CSV of ``study.trials_dataframe()``, or a SQLite storage.

Optuna itself is not needed: the storage is opened read-only as the SQLite file that it is.
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from bayeslr.errors import DataError, StorageError
from bayeslr.importers.mapping import finish, look_names, plan, statuses
from bayeslr.runs import Rows, RunTable, read_csv

# Optuna turns a trial whose value is NaN into FAIL, without a value; a RUNNING trial of a finished
# export is one whose worker was killed.
STATES = {
    "complete": "ok",
    "pruned": "pruned",
    "fail": "failed",
    "running": "lost",
}
_SQLITE_MAGIC = b"SQLite format 3\x00"


def read(
    path: str | Path,
    *,
    family: str | None = None,
    mapping: Sequence[str] = (),
    constants: Sequence[str] = (),
    study: str | None = None,
) -> RunTable:
    """Run table of a study's trials. mapping, constants: as in `bayeslr.importers.csv`.

    path: CSV, SQLite file, or ``sqlite:///file``. study: its name, if the storage has several.
    Parameters and user attributes are found by their names, without ``params_`` and
    ``user_attrs_``.
    """
    file = Path(str(path).removeprefix("sqlite:///"))
    if file.is_file() and file.read_bytes()[:16] == _SQLITE_MAGIC:
        rows = _read_storage(file, study)
    else:
        rows = read_csv(file)
    headers = [str(name) for name in rows.frame.columns]
    if not {"number", "state"} <= set(headers):
        raise DataError(
            f"{rows.place} has no columns number and state, so it is no table of Optuna trials; "
            "any other table: bayeslr import csv"
        )
    rows, num_waiting = _without_waiting(rows)
    values = [h for h in headers if h == "value" or h.startswith("values_")]
    names = look_names(headers, prefixes=("user_attrs_", "params_"))
    if len(values) == 1:
        names["loss"] = values[0]
    made = plan(rows, names=names, family=family, mapping=mapping, constants=constants)
    loss = made.values("loss", rows.frame)
    status, reason = statuses(rows.frame["state"], STATES, loss)
    prefix = str(made.constants.get("family", file.stem))
    given: dict[str, pd.Series[Any] | str] = {
        "run_id": prefix + "-" + rows.frame["number"].astype(str),
        "source": "optuna",
    }
    own = "user_attrs_status"
    if own in headers:  # trials of bayeslr say themselves how they ended
        cells = rows.frame[own]
        status = cells.where(cells.notna() & (cells != ""), status)
    given["status"], given["status_reason"] = status, reason
    if "datetime_start" in headers:
        given["created_at"] = rows.frame["datetime_start"]
    if "duration" in headers:
        spans = pd.to_timedelta(rows.frame["duration"], errors="coerce")
        given["wall_s"] = spans / pd.Timedelta(seconds=1)
    table = finish(rows, made, given)
    if not num_waiting:
        return table
    told = f"left out: {num_waiting} waiting trials, which never ran"
    return RunTable(table.frame, table.quarantine, (*table.warnings, told), table.source)


def _without_waiting(rows: Rows) -> tuple[Rows, int]:
    ran = (rows.frame["state"].astype(str).str.upper() != "WAITING").to_numpy()
    frame = rows.frame[ran].reset_index(drop=True)
    return Rows(frame, rows.place, rows.lines[ran], rows.broken), int((~ran).sum())


def _read_storage(path: Path, study: str | None) -> Rows:
    """Trials of one study in a SQLite storage, under the names of trials_dataframe()."""
    try:
        with contextlib.closing(
            sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, timeout=10)
        ) as connection:
            study_id = _study_id(connection, path, study)
            trials = connection.execute(
                "SELECT trial_id, number, state, datetime_start, datetime_complete FROM trials "
                "WHERE study_id = ? ORDER BY number",
                (study_id,),
            ).fetchall()
            cells = _trial_cells(connection, study_id)
    except sqlite3.Error as error:
        raise StorageError(
            f"{path} cannot be read as an Optuna storage: {error}. Another version, or in use? "
            "Export study.trials_dataframe() as CSV instead"
        ) from error
    records = []
    for trial_id, number, state, start, complete in trials:
        record: dict[str, Any] = {"number": number, "state": state, "datetime_start": start}
        if start and complete:
            record["duration"] = pd.Timestamp(complete) - pd.Timestamp(start)
        records.append(record | cells.get(trial_id, {}))
    if not records:
        raise DataError(f"{path} has a study without trials")
    frame = pd.DataFrame.from_records(records)
    return Rows(frame, str(path), frame["number"].to_numpy(dtype=np.int64) + 1)


def _study_id(connection: sqlite3.Connection, path: Path, study: str | None) -> int:
    studies = dict(connection.execute("SELECT study_name, study_id FROM studies").fetchall())
    if study is None and len(studies) == 1:
        study = next(iter(studies))
    if study is None or study not in studies:
        asked = f"no study {study!r}" if study else f"{len(studies)} studies"
        listed = ", ".join(map(repr, studies)) or "none"
        raise DataError(f"{path} has {asked}; name one with --study: {listed}")
    return int(studies[study])


def _trial_cells(connection: sqlite3.Connection, study_id: int) -> dict[int, dict[str, Any]]:
    """Values, parameters and user attributes by trial."""
    of_study = "trial_id IN (SELECT trial_id FROM trials WHERE study_id = ?)"
    cells: dict[int, dict[str, Any]] = {}
    values = connection.execute(
        f"SELECT trial_id, objective, value, value_type FROM trial_values WHERE {of_study}",
        (study_id,),
    ).fetchall()
    single = {objective for _, objective, _, _ in values} <= {0}
    for trial_id, objective, value, value_type in values:
        name = "value" if single else f"values_{objective}"
        infinite = {"INF_POS": "inf", "INF_NEG": "-inf"}.get(value_type)
        cells.setdefault(trial_id, {})[name] = infinite or value
    for trial_id, name, value, distribution in connection.execute(
        "SELECT trial_id, param_name, param_value, distribution_json FROM trial_params "
        f"WHERE {of_study}",
        (study_id,),
    ):
        choices = json.loads(distribution).get("attributes", {}).get("choices")
        shown = value if choices is None else choices[int(value)]
        cells.setdefault(trial_id, {})[f"params_{name}"] = shown
    for trial_id, key, text in connection.execute(
        f"SELECT trial_id, key, value_json FROM trial_user_attributes WHERE {of_study}",
        (study_id,),
    ):
        cells.setdefault(trial_id, {})[f"user_attrs_{key}"] = json.loads(text)
    return cells

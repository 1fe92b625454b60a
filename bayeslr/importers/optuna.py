"""Trials of Optuna: the CSV of ``study.trials_dataframe()``, a SQLite storage or a journal file.

Optuna itself is not needed. The study of a sweep gives the sweep's own run table.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from bayeslr.errors import DataError, SpecError, StorageError
from bayeslr.importers.mapping import finish, look_names, plan, statuses
from bayeslr.importers.optuna_storages import is_storage, read_trials
from bayeslr.runs import Rows, RunTable, make_table, read_csv
from bayeslr.specs import JOURNAL_FILE

# Optuna turns a trial whose value is NaN into FAIL, without a value; a RUNNING trial of a finished
# export is one whose worker was killed.
STATES = {
    "complete": "ok",
    "pruned": "pruned",
    "fail": "failed",
    "running": "lost",
}


def read(
    path: str | Path,
    *,
    family: str | None = None,
    mapping: Sequence[str] = (),
    constants: Sequence[str] = (),
    study: str | None = None,
) -> RunTable:
    """Run table of a study's trials. mapping, constants: as in `bayeslr.importers.csv`.

    path: CSV, SQLite or journal file (``sqlite:///file``, ``journal://file``), or the folder of a
    sweep. study: its name, if the storage has several. Parameters and user attributes are found by
    their names, without ``params_`` and ``user_attrs_``. Raises: DataError, StorageError, and
    SpecError for a mapping of a sweep's study, whose trials hold the rows of its run table.
    """
    file = _file(str(path))
    if is_storage(file):
        trials = read_trials(file, study)
        if any("user_attrs_spec" in trial for trial in trials):
            if mapping or constants:
                raise SpecError(f"{file} is a sweep's: its runs are complete; no --map, no --set")
            return _sweep_table(trials, file, family)
        frame = pd.DataFrame.from_records(trials)
        rows = Rows(frame, str(file), frame["number"].to_numpy(dtype=np.int64) + 1)
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
    notes = [f"left out: {num_waiting} waiting trials, which never ran"] if num_waiting else []
    early = (status == "pruned") & loss.notna() & (loss != "")
    if early.any():
        given["loss"] = loss.mask(early)
        notes.append(
            f"no loss is taken of {int(early.sum())} pruned trials: Optuna has the last that was "
            "reported, at fewer tokens than planned. One measured at its tokens says so by a user "
            "attribute status, 'partial'; or --map loss=value"
        )
    if "datetime_start" in headers:
        given["created_at"] = rows.frame["datetime_start"]
    if "duration" in headers:
        spans = pd.to_timedelta(rows.frame["duration"], errors="coerce")
        seconds = spans / pd.Timedelta(seconds=1)
        # Optuna's times are local: clocks are put back once a year.
        given["wall_s"] = seconds.where(seconds >= 0)
    table = finish(rows, made, given)
    return dataclasses.replace(table, warnings=(*table.warnings, *notes))


def _without_waiting(rows: Rows) -> tuple[Rows, int]:
    ran = (rows.frame["state"].astype(str).str.upper() != "WAITING").to_numpy()
    frame = rows.frame[ran].reset_index(drop=True)
    return Rows(frame, rows.place, rows.lines[ran], rows.broken), int((~ran).sum())


def _file(path: str) -> Path:
    """The file that a path or the URL of a storage means."""
    for scheme in ("sqlite:///", "journal://"):
        path = path.removeprefix(scheme)
    if "://" in path:
        raise StorageError(
            f"storages of Optuna are read from SQLite and journal files, not from "
            f"{path.partition(':')[0]}; export study.trials_dataframe() as CSV"
        )
    file = Path(path)
    if not file.is_dir():
        return file
    if not (file / JOURNAL_FILE).is_file():
        raise DataError(
            f"{file} is a folder without {JOURNAL_FILE}, so not that of a sweep with a study of "
            "its own; name the file of the storage, or take the runs.parquet of the sweep"
        )
    return file / JOURNAL_FILE


def _sweep_table(trials: Sequence[Mapping[str, Any]], file: Path, family: str | None) -> RunTable:
    """Run table of a sweep's trials that have ended, as the sweep itself makes it."""
    ended = [trial["user_attrs_result"] for trial in trials if "user_attrs_result" in trial]
    told = {} if family is None else {"family": family}
    rows = [{**row, **told} for result in ended for row in result["records"]]
    if not rows:
        raise DataError(f"{file} is a sweep's, and no run of it has ended yet")
    rows.sort(key=lambda row: (row["run_id"], row["tokens"], row["status"]))
    return make_table(rows, source=str(file))

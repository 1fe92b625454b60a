"""Trials of a study in an Optuna storage, SQLite or journal file, read without Optuna.

Both are opened for reading alone, so a study that is running can be looked at. What is returned
has one mapping a trial, under the names that ``study.trials_dataframe()`` gives its columns:
``number``, ``state``, ``datetime_start``, ``duration``, ``value`` (``values_0``, ... of several
objectives), ``params_NAME``, ``user_attrs_NAME``; what a trial lacks is left out.
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import pandas as pd

from bayeslr.errors import DataError, StorageError

_SQLITE_MAGIC = b"SQLite format 3\x00"
_STATES = ("RUNNING", "COMPLETE", "PRUNED", "FAIL", "WAITING")  # by optuna.trial.TrialState
_INSTEAD = "Export study.trials_dataframe() as CSV instead"

# Studies that a sweep NAME keeps beside its own: who took over what, and the target's own runs.
_BESIDE = (".claims", ".validation")


def is_storage(path: Path) -> bool:
    """Whether a file is an Optuna storage, by its first bytes."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        head = file.readline(4096)
    return head.startswith(_SQLITE_MAGIC) or (head.startswith(b"{") and b'"op_code"' in head)


def read_trials(path: Path, study: str | None) -> list[dict[str, Any]]:
    """Trials of one study, by number. study: its name, if the storage has several.

    Raises: DataError if there is no such study, or more than one and none is named, or the study
    has no trials; StorageError if the file cannot be read.
    """
    with path.open("rb") as file:
        is_sqlite = file.read(16) == _SQLITE_MAGIC
    trials = _read_sqlite(path, study) if is_sqlite else _read_journal(path, study)
    if not trials:
        raise DataError(f"{path} has a study without trials")
    return trials


def _pick(studies: Mapping[str, int], path: Path, study: str | None) -> int:
    """Id of the study that is meant."""
    own = [
        n for n in studies if not any(n.endswith(b) and n[: -len(b)] in studies for b in _BESIDE)
    ]
    if study is None and len(own) == 1:
        study = own[0]
    if study is None or study not in studies:
        asked = f"no study {study!r}" if study else f"{len(own)} studies"
        listed = ", ".join(map(repr, studies)) or "none"
        raise DataError(f"{path} has {asked}; name one with --study: {listed}")
    return studies[study]


def _times(start: str | None, complete: str | None) -> dict[str, Any]:
    times: dict[str, Any] = {"datetime_start": start}
    if start and complete:
        times["duration"] = pd.Timestamp(complete) - pd.Timestamp(start)
    return times


def _values(values: Sequence[Any]) -> dict[str, Any]:
    """Objective values under their names."""
    if len(values) == 1:
        return {"value": values[0]}
    return {f"values_{i}": value for i, value in enumerate(values)}


def _parameter(value: float, distribution: str) -> Any:
    """A parameter as the user knows it; a storage holds the place of a choice."""
    choices = json.loads(distribution).get("attributes", {}).get("choices")
    return value if choices is None else choices[int(value)]


# ------------------------------------------------------------------------------ journal


def _read_journal(path: Path, study: str | None) -> list[dict[str, Any]]:
    # What follows the last line end is being written, or was left by a killed writer.
    *lines, _ = path.read_bytes().split(b"\n")
    journal = _Journal()
    for number, line in enumerate(lines, start=1):
        try:
            journal.apply(json.loads(line))
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise StorageError(
                f"{path}, line {number} is no entry of an Optuna journal "
                f"({type(error).__name__}: {error}); was the file cut or edited? {_INSTEAD}"
            ) from error
    chosen = _pick({name: id_ for id_, name in journal.studies.items()}, path, study)
    found = [trial for id_, trial in journal.trials if id_ == chosen]
    return [{"number": number, **trial} for number, trial in enumerate(found)]


class _Journal:
    """State of the studies after the entries so far, as `optuna.storages.JournalStorage` has it."""

    def __init__(self) -> None:
        self.studies: dict[int, str] = {}  # name by id
        self.trials: list[tuple[int, dict[str, Any]]] = []  # study's id and trial, by trial id
        self._num_studies = 0

    def apply(self, entry: Mapping[str, Any]) -> None:
        """Take in one entry; those that came too late for their study or trial change nothing."""
        operation = entry["op_code"]
        if operation == 0:  # create a study
            if entry["study_name"] not in self.studies.values():
                self.studies[self._num_studies] = entry["study_name"]
                self._num_studies += 1
        elif operation == 1:  # delete it
            self.studies.pop(entry["study_id"], None)
        elif operation == 4:  # create a trial
            if entry["study_id"] in self.studies:
                self.trials.append((entry["study_id"], _created(entry)))
        elif operation in (5, 6, 8) and entry["trial_id"] < len(self.trials):
            _, trial = self.trials[entry["trial_id"]]
            if trial["state"] not in ("RUNNING", "WAITING"):
                return
            if operation == 5:
                value = _parameter(entry["param_value_internal"], entry["distribution"])
                trial[f"params_{entry['param_name']}"] = value
            elif operation == 6:
                _change_state(trial, entry)
            else:
                trial |= {f"user_attrs_{k}": v for k, v in entry["user_attr"].items()}


def _created(entry: Mapping[str, Any]) -> dict[str, Any]:
    state = _STATES[entry.get("state", 0)]
    start = _local(entry.get("datetime_start"))
    trial = {"state": state, **_times(start, _local(entry.get("datetime_complete")))}
    distributions = entry.get("distributions", {})
    for name, value in entry.get("params", {}).items():
        trial[f"params_{name}"] = _parameter(value, distributions[name])
    trial |= {f"user_attrs_{k}": v for k, v in entry.get("user_attrs", {}).items()}
    values = entry.get("values") or [v for v in (entry.get("value"),) if v is not None]
    return trial | _values(values)


def _change_state(trial: dict[str, Any], entry: Mapping[str, Any]) -> None:
    trial["state"] = _STATES[entry["state"]]
    start = _local(entry.get("datetime_start")) or trial["datetime_start"]
    trial |= _times(start, _local(entry.get("datetime_complete"))) | _values(entry["values"] or [])


def _local(time: str | None) -> str | None:
    """A time of a journal, which is UTC, as SQLite storages write it."""
    return str(datetime.fromisoformat(time).astimezone().replace(tzinfo=None)) if time else None


# ------------------------------------------------------------------------------- SQLite


def _read_sqlite(path: Path, study: str | None) -> list[dict[str, Any]]:
    try:
        with contextlib.closing(
            sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, timeout=10)
        ) as connection:
            studies = connection.execute("SELECT study_name, study_id FROM studies").fetchall()
            study_id = _pick(dict(studies), path, study)
            trials = connection.execute(
                "SELECT trial_id, number, state, datetime_start, datetime_complete FROM trials "
                "WHERE study_id = ? ORDER BY number",
                (study_id,),
            ).fetchall()
            cells = _cells(connection, study_id)
    except sqlite3.Error as error:
        raise StorageError(
            f"{path} cannot be read as an Optuna storage: {error}. Another version, or in use? "
            f"{_INSTEAD}"
        ) from error
    return [
        {"number": number, "state": state, **_times(start, complete), **cells.get(trial_id, {})}
        for trial_id, number, state, start, complete in trials
    ]


def _cells(connection: sqlite3.Connection, study_id: int) -> dict[int, dict[str, Any]]:
    """Values, parameters and user attributes by trial."""
    of_study = "trial_id IN (SELECT trial_id FROM trials WHERE study_id = ?)"
    values: dict[int, list[Any]] = {}
    for trial_id, value, value_type in connection.execute(
        f"SELECT trial_id, value, value_type FROM trial_values WHERE {of_study} ORDER BY objective",
        (study_id,),
    ):
        infinite = {"INF_POS": "inf", "INF_NEG": "-inf"}.get(value_type)
        values.setdefault(trial_id, []).append(infinite or value)
    cells = {trial_id: _values(found) for trial_id, found in values.items()}
    for trial_id, name, value, distribution in connection.execute(
        "SELECT trial_id, param_name, param_value, distribution_json FROM trial_params "
        f"WHERE {of_study}",
        (study_id,),
    ):
        cells.setdefault(trial_id, {})[f"params_{name}"] = _parameter(value, distribution)
    for trial_id, key, text in connection.execute(
        f"SELECT trial_id, key, value_json FROM trial_user_attributes WHERE {of_study}",
        (study_id,),
    ):
        cells.setdefault(trial_id, {})[f"user_attrs_{key}"] = json.loads(text)
    return cells

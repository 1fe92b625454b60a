"""Runs of MLflow: the CSV of an experiment's page, or that of ``mlflow.search_runs()``.

The page writes parameters, metrics and tags without prefixes, in this order; search_runs with them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from bayeslr.errors import DataError
from bayeslr.importers.mapping import Source, finish, look_names, plan, statuses
from bayeslr.runs import RunTable, numbers, read_csv

_PREFIXES = ("params.", "tags.", "metrics.")
_AGAIN = " (2)"  # `read_csv` calls the second column of a name so

STATES = {
    "finished": "ok",
    "running": "partial",
    "failed": "failed",
    "killed": "lost",
    "scheduled": "lost",
    "unfinished": "lost",
}


def read(
    path: str | Path,
    *,
    family: str | None = None,
    mapping: Sequence[str] = (),
    constants: Sequence[str] = (),
) -> RunTable:
    """Run table of MLflow runs. mapping, constants: as in `bayeslr.importers.csv`.

    Of a parameter and a metric of one name, the metric is what a run measured.
    """
    rows = read_csv(Path(path))
    headers = [str(name) for name in rows.frame.columns]
    id_header = next((h for h in ("run_id", "Run ID") if h in headers), None)
    if id_header is None:
        raise DataError(
            f"{rows.place} has neither run_id nor Run ID, so it is no export of MLflow; "
            "any other table: bayeslr import csv"
        )
    measured = look_names(headers, prefixes=("metrics.", "params.", "tags."))
    measured |= {h.removesuffix(_AGAIN): h for h in headers if h.endswith(_AGAIN)}
    made = plan(
        rows, names=look_names(headers, prefixes=_PREFIXES), measured=measured,
        family=family, mapping=mapping, constants=constants,
    )  # fmt: skip
    twins = _twins(rows.frame, made.guessed)
    made = dataclasses.replace(made, warnings=(*made.warnings, *twins))
    given: dict[str, pd.Series[Any] | str] = {"run_id": rows.frame[id_header], "source": "mlflow"}
    state = next((h for h in ("status", "Status") if h in headers), None)
    if state is not None:
        loss = made.values("loss", rows.frame)
        given["status"], given["status_reason"] = statuses(rows.frame[state], STATES, loss)
    start = next((h for h in ("start_time", "Start Time") if h in headers), None)
    if start is not None:
        given["created_at"] = _dated(rows.frame[start])
    if {"start_time", "end_time"} <= set(headers):
        started, ended = (_dated(rows.frame[name]) for name in ("start_time", "end_time"))
        given["wall_s"] = _seconds(ended) - _seconds(started)
    elif "Duration" in headers:
        given["wall_s"] = _duration(rows.frame["Duration"])
    return finish(rows, made, given)


def _twins(frame: pd.DataFrame, guessed: Mapping[str, Source]) -> list[str]:
    """A sentence for each column that was taken where another of its name tells something else."""
    taken = {name: source.headers[0] for name, source in guessed.items()}
    return [
        f"{name} is taken from {header!r}; {other!r} has the same name and differs. "
        f"--map '{name}={other}' if that is meant"
        for name, header in taken.items()
        for other in frame.columns
        if _bare(other) == _bare(header) and not frame[other].equals(frame[header])
    ]


def _bare(header: str) -> str:
    """Name of a parameter, a metric or a tag, as it was logged."""
    for prefix in _PREFIXES:
        header = header.removeprefix(prefix)
    return header.removesuffix(_AGAIN)


def _dated(times: pd.Series[Any]) -> pd.Series[Any]:
    """Times as texts: those of MLflow's own records are in milliseconds since 1970."""
    milliseconds = numbers(times)[0]
    dates = pd.to_datetime(pd.Series(milliseconds, index=times.index), unit="ms", errors="coerce")
    return times.mask(dates.notna(), dates.astype(str) + "+00:00")


def _seconds(times: pd.Series[Any]) -> pd.Series[Any]:
    stamps = pd.to_datetime(times, errors="coerce", utc=True, format="mixed")
    return (stamps - pd.Timestamp(0, tz="UTC")) / pd.Timedelta(seconds=1)


def _duration(texts: pd.Series[Any]) -> pd.Series[Any]:
    """Seconds from texts such as ``2.5min``, ``1.2h``, ``340ms``; missing where unreadable."""
    return pd.to_timedelta(texts, errors="coerce") / pd.Timedelta(seconds=1)

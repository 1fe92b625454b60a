"""Runs table of Weights & Biases: the CSV of a project's page, one run a row.

All its cells are quoted, numbers too; configuration keys are dotted, summary keys have slashes. The
columns are those that the page showed.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from bayeslr.errors import DataError
from bayeslr.importers.mapping import finish, look_names, plan, statuses
from bayeslr.runs import RunTable, read_csv

# W&B marks a run crashed when its process went silent, failed when it ended with an error.
STATES = {
    "finished": "ok",
    "running": "partial",
    "failed": "failed",
    "crashed": "lost",
    "killed": "lost",
    "preempting": "lost",
    "preempted": "lost",
}


def read(
    path: str | Path,
    *,
    family: str | None = None,
    mapping: Sequence[str] = (),
    constants: Sequence[str] = (),
) -> RunTable:
    """Run table of a W&B runs table. mapping, constants: as in `bayeslr.importers.csv`.

    Raises: DataError for the CSV of a chart, which holds curves without their settings.
    """
    rows = read_csv(Path(path))
    headers = [str(name) for name in rows.frame.columns]
    if "Name" not in headers:
        _refuse_chart(headers, rows.place)
        raise DataError(
            f"{rows.place} has no column Name, so it is no W&B runs table; download the table of "
            "the project's page, or use bayeslr import csv"
        )
    names = look_names(headers)
    made = plan(rows, names=names, family=family, mapping=mapping, constants=constants)
    given: dict[str, pd.Series[Any] | str] = {"run_id": _run_ids(rows.frame), "source": "wandb"}
    if "State" in headers:
        loss = made.values("loss", rows.frame)
        given["status"], given["status_reason"] = statuses(rows.frame["State"], STATES, loss)
    return finish(rows, made, given)


def _refuse_chart(headers: Sequence[str], place: str) -> None:
    if headers[0] in ("Step", "epoch", "Relative Time (Process)") or any(
        header.endswith(("__MIN", "__MAX")) for header in headers
    ):
        raise DataError(
            f"{place} is the CSV of a W&B chart: curves, often a sample of about 500 points, "
            "without the settings of their runs. Download the runs table instead"
        )


def _run_ids(frame: pd.DataFrame) -> pd.Series[Any]:
    """ID where shown; else the name, with the creation time where names repeat."""
    if "ID" in frame:
        return frame["ID"]
    names = frame["Name"]
    if "Created" in frame and names.duplicated().any():
        return names.where(~names.duplicated(keep=False), names + " @ " + frame["Created"])
    return names

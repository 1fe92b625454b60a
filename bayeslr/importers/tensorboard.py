"""One scalar of one run: the CSV that TensorBoard downloads, or tbparse's long table.

It holds a loss curve and nothing of its run: the settings come as constants. A point is counted in
steps, so that tokens are steps times batch_tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from bayeslr.errors import DataError
from bayeslr.importers.mapping import finish, look_names, plan
from bayeslr.runs import Rows, RunTable, numbers, read_csv


def read(
    path: str | Path,
    *,
    family: str | None = None,
    mapping: Sequence[str] = (),
    constants: Sequence[str] = (),
    tag: str | None = None,
) -> RunTable:
    """Run table of one row: the last point of the curve.

    constants: lr, n_active, n_total, batch_tokens, param_convention and whatever else is known.
    Points of one step, which a restart writes again, count once: the latest written.
    Raises: DataError if there is no curve, or several of which none is named by ``tag``.
    """
    rows = read_csv(Path(path))
    folded = {str(h).lower().replace(" ", "_"): str(h) for h in rows.frame.columns}
    if not {"step", "value"} <= folded.keys():
        raise DataError(
            f"{rows.place} has no columns Step and Value, so it is no scalar of TensorBoard; "
            "any other table: bayeslr import csv"
        )
    frame = rows.frame.rename(columns={header: name for name, header in folded.items()})
    chosen = _chosen(frame, tag, rows.place)
    step, bad = numbers(frame["step"])
    curve = pd.DataFrame({"step": step, "written": _written(frame)})[chosen & ~bad]
    if curve["step"].isna().all():
        raise DataError(f"{rows.place} has no step that is a number")
    num_overlaps = int(curve["step"].duplicated().sum())
    last = int(curve.sort_values(["step", "written"], kind="stable").index[-1])
    settings = list(constants)
    if not any(text.partition("=")[0].strip() == "run_id" for text in settings):
        settings.append(f"run_id={Path(path).stem}")
    only = Rows(frame.loc[[last]].reset_index(drop=True), rows.place, rows.lines[[last]])
    made = plan(
        only,
        names=look_names([]),
        family=family,
        mapping=mapping,
        constants=settings,
    )
    value = numbers(only.frame["value"])[0]
    given: dict[str, pd.Series[Any] | str] = {
        "loss": only.frame["value"],
        "status": pd.Series(np.where(np.isfinite(value), "ok", "diverged"), dtype=object),
        "source": "tensorboard",
    }
    batch, _ = numbers(made.values("batch_tokens", only.frame))
    given["tokens"] = pd.Series(step[[last]] * batch)
    table = finish(only, made, given)
    told = [f"{len(curve)} points; the last, of step {step[last]:g}, is the run's loss"]
    if num_overlaps:
        told.append(f"{num_overlaps} points repeat a step (restarts): the latest written counts")
    return RunTable(table.frame, table.quarantine, (*table.warnings, *told), table.source)


def _chosen(frame: pd.DataFrame, tag: str | None, place: str) -> np.ndarray:
    """Mask of the points of one scalar, (num_points,)."""
    if "tag" not in frame:
        if tag is not None:
            raise DataError(
                f"{place} has no column tag: it holds one scalar and does not tell which. See that "
                "it is the loss, and leave out --tag"
            )
        return np.ones(len(frame), dtype=bool)
    tags = sorted({str(name) for name in frame["tag"]})
    if tag is None and len(tags) == 1:
        tag = tags[0]
    if tag not in tags:
        asked = "several scalars" if tag is None else f"no scalar {tag!r}"
        raise DataError(f"{place} has {asked}; name one with --tag: {', '.join(tags)}")
    return (frame["tag"] == tag).to_numpy()


def _written(frame: pd.DataFrame) -> np.ndarray:
    """When each point was written; their order in the file where that is not told."""
    if "wall_time" not in frame:
        return np.arange(len(frame), dtype=np.float64)
    return numbers(frame["wall_time"])[0]

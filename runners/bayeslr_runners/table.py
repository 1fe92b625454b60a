"""Recorded runs as a runner: each run that is asked for is looked up, none is trained.

Options of the recipe::

    [options]
    runs = "./recorded.csv"      # a run table; ./ is beside the recipe

A run is answered by the recorded one of the same counts, tokens and batch whose LR is nearest (in
ln LR); the answer carries the LR, the weight decay and the LR multipliers that were recorded. Where
the runs of a slice differ in the latter two, they must be what was asked for.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, final

from bayeslr.errors import SpecError
from bayeslr.runner_protocol import RECORDS_FILE, SPEC_FILE
from bayeslr.runs import RunTable, read_runs
from bayeslr.specs import COVARIATES, RunSpec
from bayeslr.units import format_quantity, train_flops
from bayeslr_runners.command import stated_counts

SAME = 0.005
"""Counts, tokens and batches that differ by less than this share are the same cell: trainers round
to whole batches, people to three figures."""

_KEPT = ("loss", "loss_kind", "loss_se", "status", "status_reason", "wall_s", "device", *COVARIATES)


@final
class TableRunner:
    """`bayeslr.runner_protocol.RecordedRunner` over a run table."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        if not isinstance(options.get("runs"), str):
            raise SpecError(
                f"[options] runs must name a run table (csv, parquet, jsonl), got "
                f"{options.get('runs')!r}"
            )
        self._path = Path(options["runs"])
        self._family = options.get("family")

    @cached_property
    def _table(self) -> RunTable:
        return read_runs(self._path)

    def counts(self, shape: Mapping[str, Any]) -> tuple[int, int]:
        """Active and total parameters, as the shape states them."""
        return stated_counts(shape)

    def flops(self, spec: RunSpec) -> float:
        """FLOPs that training the run would have cost."""
        return train_flops(spec.n_active, spec.trained_tokens)

    def command(self, spec: RunSpec, run_dir: Path) -> list[str]:
        """A child that writes the recorded rows, for callers that insist on a process."""
        words = [SPEC_FILE, RECORDS_FILE]
        paths = [str(run_dir.absolute() / word) for word in words]
        return [sys.executable, "-m", "bayeslr_runners.table", *paths]

    def records(self, spec: RunSpec) -> list[dict[str, Any]]:
        """Rows of the nearest recorded run, one for each of ``spec.decay_at``.

        Raises: SpecError if the table has no run in one of the slices.
        """
        return [self._nearest(spec, tokens) for tokens in spec.decay_at]

    def _nearest(self, spec: RunSpec, tokens: int) -> dict[str, Any]:
        frame = self._table.frame
        wanted = {
            "n_active": spec.n_active,
            "n_total": spec.n_total,
            "tokens": tokens,
            "batch_tokens": spec.batch_tokens,
        }
        planned = frame["planned_tokens"].fillna(frame["tokens"])
        reached = frame["tokens"].where(frame["status"] != "diverged", planned)
        match = frame["status"].isin(["ok", "diverged"])
        if self._family is not None:
            match &= frame["family"] == self._family
        for name, value in wanted.items():
            column = reached if name == "tokens" else frame[name]
            match &= (column / value - 1).abs() < SAME
        cell = ", ".join(f"{name} {format_quantity(v)}" for name, v in wanted.items())
        rows = frame[match]
        if rows.empty:
            raise SpecError(f"{self._path} has no finished run with {cell}")
        for name, asked in spec.covariates.items():
            recorded = rows[name].dropna().unique() if name in rows else ()
            if len(recorded) < 2:
                continue
            rows = rows[(rows[name] - asked).abs() <= SAME * asked]
            if rows.empty:
                others = ", ".join(f"{other:g}" for other in sorted(recorded))
                raise SpecError(
                    f"{self._path} has no finished run with {cell} and {name} {asked:g}; it has "
                    f"{others}"
                )
        distance = (rows["lr"].map(math.log) - math.log(spec.lr)).abs()
        row = rows.iloc[int(distance.to_numpy().argmin())].to_dict()
        kept = {name: _plain(row.get(name)) for name in _KEPT}
        # The horizons of one spec may be answered at different LRs, as runs of their own.
        suffix = f"@{tokens}" if len(spec.decay_at) > 1 else ""
        return {
            "run_id": spec.run_id + suffix,
            "planned_tokens": tokens,
            "tokens": float(row["tokens"]),
            "lr": float(row["lr"]),
            "source": f"{self._path.name}: {row['run_id']}",
            **{name: value for name, value in kept.items() if value is not None},
        }


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def main(spec_path: str, records_path: str) -> None:
    """Child process: append the recorded rows of a spec."""
    spec = RunSpec.from_json(Path(spec_path).read_text(encoding="utf-8"))
    rows = TableRunner(spec.options).records(spec)
    with open(records_path, "a", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


if __name__ == "__main__":
    main(*sys.argv[1:])

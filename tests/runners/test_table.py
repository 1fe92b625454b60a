"""Recorded runs as a runner."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from bayeslr.errors import SpecError
from bayeslr.loop.children import judge, write_rows
from bayeslr.runner_protocol import RecordedRunner, find_entry_point
from bayeslr.runs import make_table
from bayeslr.specs import RunSpec
from bayeslr_runners.table import TableRunner

LRS = (1e-3, 2e-3, 4e-3, 8e-3)


def row(lr: float, tokens: float = 1e9, **changes: Any) -> dict[str, Any]:
    return {
        "run_id": f"lr{lr}-t{tokens}",
        "family": "f",
        "lr": lr,
        "n_active": 1e8,
        "n_total": 4e8,
        "param_convention": "non_embedding",
        "tokens": tokens,
        "batch_tokens": 1e5,
        "loss": 3.0 + abs(math.log(lr / 2e-3)),
        "status": "ok",
        **changes,
    }


@pytest.fixture
def table(tmp_path: Path) -> Path:
    rows = [row(lr, tokens) for lr in LRS for tokens in (1e9, 2e9)]
    gone = {"status": "diverged", "loss": None, "planned_tokens": 1e9, "status_reason": "NaN"}
    rows.append(row(0.1, 3e8, run_id="gone", **gone))
    rows.append(row(1e-3, 5e8, run_id="half", status="partial", planned_tokens=1e9))
    path = tmp_path / "recorded.csv"
    pd.DataFrame(rows).to_csv(path, index=False)
    return path


def spec(table: Path, **changes: Any) -> RunSpec:
    standard = RunSpec(
        run_id="asked", family="replay", runner="table", lr=2.2e-3, tokens=1_000_000_000,
        batch_tokens=100_000, n_active=100_000_000, n_total=400_000_000, seq_len=2048,
        schedule="cosine", options={"runs": str(table)},
    )  # fmt: skip
    return dataclasses.replace(standard, **{"decay_at": (), **changes})


@pytest.mark.parametrize(
    ("asked", "recorded"), [(2.2e-3, 2e-3), (1e-5, 1e-3), (5.6e-3, 4e-3), (5.7e-3, 8e-3)]
)
def test_the_nearest_lr_of_the_slice_answers(table: Path, asked: float, recorded: float) -> None:
    runner = TableRunner({"runs": str(table)})
    (answer,) = runner.records(spec(table, lr=asked))
    assert answer["lr"] == recorded
    assert answer["loss"] == pytest.approx(3.0 + abs(math.log(recorded / 2e-3)))
    assert answer["source"] == f"recorded.csv: lr{recorded}-t1000000000.0"


def test_a_run_is_answered_at_its_weight_decay(tmp_path: Path) -> None:
    path = tmp_path / "recorded.csv"
    rows = [
        row(lr, run_id=f"{lr}-{decay}", weight_decay=decay, loss=3.0 + decay)
        for lr in LRS for decay in (0.01, 0.1)
    ]  # fmt: skip
    pd.DataFrame(rows).to_csv(path, index=False)
    runner = TableRunner({"runs": str(path)})
    for decay in (0.01, 0.1):
        (answer,) = runner.records(spec(path, weight_decay=decay))
        assert (answer["weight_decay"], answer["loss"]) == (decay, 3.0 + decay)
    with pytest.raises(SpecError, match=r"weight_decay 0\.5; it has 0\.01, 0\.1"):
        runner.records(spec(path, weight_decay=0.5))
    pd.DataFrame(rows[::2]).to_csv(path, index=False)
    (answer,) = TableRunner({"runs": str(path)}).records(spec(path, weight_decay=0.5))
    assert answer["weight_decay"] == 0.01  # all that there is, and told as it was


def test_a_recorded_divergence_is_one(table: Path, tmp_path: Path) -> None:
    asked = spec(table, lr=0.1)
    write_rows(tmp_path / "run", TableRunner({"runs": str(table)}).records(asked))
    verdict = judge(asked, tmp_path / "run")
    assert (verdict.state, verdict.reason) == ("diverged", "NaN")


def test_every_horizon_is_looked_up(table: Path, tmp_path: Path) -> None:
    asked = spec(table, schedule="wsd", tokens=2_000_000_000, decay_at=(10**9, 2 * 10**9))
    rows = TableRunner({"runs": str(table)}).records(asked)
    write_rows(tmp_path / "run", rows)
    assert judge(asked, tmp_path / "run").complete
    told = make_table(judge(asked, tmp_path / "run").rows)
    assert len(told) == 2
    assert len(told.quarantine) == 0
    assert sorted(told.frame["planned_tokens"]) == [1e9, 2e9]


@pytest.mark.parametrize(
    "changes", [{"n_active": 10**7}, {"tokens": 3 * 10**9}, {"batch_tokens": 10**6}]
)
def test_a_slice_that_is_not_recorded_is_named(table: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(SpecError, match=r"recorded\.csv has no finished run with n_active"):
        TableRunner({"runs": str(table)}).records(spec(table, **changes))


def test_cells_match_within_rounding(table: Path) -> None:
    near = spec(table, n_active=100_300_000, tokens=999_000_000)
    assert TableRunner({"runs": str(table)}).records(near)


def test_a_family_may_be_chosen(table: Path) -> None:
    with pytest.raises(SpecError, match="no finished run"):
        TableRunner({"runs": str(table), "family": "other"}).records(spec(table))


def test_the_child_process_says_the_same(table: Path, tmp_path: Path) -> None:
    runner = TableRunner({"runs": str(table)})
    asked = spec(table)
    (tmp_path / "spec.json").write_text(asked.to_json())
    subprocess.run(runner.command(asked, tmp_path), check=True)
    lines = (tmp_path / "records.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == runner.records(asked)


def test_the_table_must_be_named() -> None:
    with pytest.raises(SpecError, match=r"\[options\] runs must name a run table"):
        TableRunner({})


def test_it_is_a_recorded_runner_found_by_name(table: Path) -> None:
    assert find_entry_point("bayeslr.runners", "table") is TableRunner
    assert isinstance(TableRunner({"runs": str(table)}), RecordedRunner)

"""A sweep killed at random moments ends as one that was left alone."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("optuna")

from tests import fakes
from tests.fakes import finished_runs, toy_recipe, write_recipe

BUDGET = 4e12


def start(recipe: Path, out: Path, root: Path) -> subprocess.Popen[bytes]:
    words = [sys.executable, str(root / "tests" / "fakes.py"), "sweep", str(recipe), str(out)]
    environment = {**os.environ, "PYTHONPATH": f"{root}:{root / 'runners'}"}
    with (out.parent / "log").open("ab") as log:
        return subprocess.Popen(words, env=environment, stdout=log, stderr=log)


def uninterrupted(recipe: Path, out: Path, root: Path) -> dict[str, Any]:
    process = start(recipe, out, root)
    assert process.wait(200) == 0, (out.parent / "log").read_text()
    return finished_runs(out)


@pytest.mark.parametrize(
    ("num_kills", "workers", "seed"),
    [
        (3, 1, 0),
        pytest.param(10, 1, 1, marks=pytest.mark.slow),
        pytest.param(10, 2, 2, marks=pytest.mark.slow),
    ],
)
def test_killed_and_resumed_is_as_good_as_left_alone(
    num_kills: int, workers: int, seed: int, tmp_path: Path, root: Path
) -> None:
    recipe = write_recipe(
        tmp_path / "toy.toml",
        toy_recipe(
            sweep__budget_flops=BUDGET,
            sweep__workers=workers,
            options__seconds=0.5 if num_kills < 5 else 1.0,
        ),
    )
    started = time.monotonic()
    expected = uninterrupted(recipe, tmp_path / "alone", root)
    duration = time.monotonic() - started
    rng = random.Random(seed)
    out = tmp_path / "killed"
    for _ in range(num_kills):
        process = start(recipe, out, root)
        # Start-up takes about a second; kills are spread over the life of the sweep.
        time.sleep(rng.uniform(0.2, 1.0 + 1.5 * duration / num_kills))
        process.kill()
        process.wait()
    process = start(recipe, out, root)
    assert process.wait(200) == 0, (tmp_path / "log").read_text()
    assert finished_runs(out) == expected
    # A toy run's checkpoint counts its steps: a resumed run made no more of them than one at rest.
    for run_id in expected:
        records = (out / "runs" / run_id / "records.jsonl").read_text().splitlines()
        assert len(records) <= len(expected[run_id][1]) + 10 + num_kills


def test_what_was_finished_is_not_trained_again(tmp_path: Path, root: Path) -> None:
    recipe = write_recipe(
        tmp_path / "toy.toml", toy_recipe(sweep__budget_flops=BUDGET, options__seconds=0.3)
    )
    out = tmp_path / "out"
    process = start(recipe, out, root)
    give_up = time.monotonic() + 60
    while len(list((out / "runs").glob("*/records.jsonl"))) < 3:
        assert time.monotonic() < give_up
        time.sleep(0.05)
    process.kill()
    process.wait()
    before = {p: p.stat().st_mtime_ns for p in (out / "runs").glob("*/records.jsonl")}
    done = finished_runs(out)
    assert start(recipe, out, root).wait(200) == 0
    for path, changed in before.items():
        if path.parent.name in done:
            assert path.stat().st_mtime_ns == changed


def test_the_stand_in_proposes_from_the_losses() -> None:
    """The kill test would prove little if proposals did not depend on what was measured."""
    from bayeslr.runs import make_table

    row = {
        "run_id": "a", "family": "f", "lr": 1e-2, "n_active": 1e6, "n_total": 1e6, "tokens": 1e7,
        "batch_tokens": 4096, "loss": 3.0, "status": "ok", "param_convention": "non_embedding",
    }  # fmt: skip
    other = {**row, "run_id": "b", "lr": 1e-3}
    best = [fakes.fit(make_table([{**row, "loss": y}, other])).best_lr for y in (2.9, 3.1)]
    assert best[0] > 5e-3 > 2e-3 > best[1]

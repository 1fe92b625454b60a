"""Early ends: which runs are stopped, what becomes of their curve, and what is said of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("optuna")

from bayeslr.loop import open_status
from bayeslr.loop import worker as worker_module
from bayeslr.loop.early import early_ends, hopeless
from bayeslr.loop.planning import table_of
from bayeslr.loop.status import status_lines
from bayeslr.loop.worker import Due, Stop, Worker
from bayeslr.predict import prior_posterior
from bayeslr.runner_protocol import Trial, find_runner
from bayeslr.space import candidates
from bayeslr.specs import RunSpec, parse_recipe
from bayeslr_runners.study import open_study
from tests.fakes import toy_recipe


def spec(lr: float, **changes: Any) -> RunSpec:
    given: dict[str, Any] = {
        "run_id": f"run-{lr}", "family": "f", "runner": "command", "lr": lr, "tokens": 1000,
        "batch_tokens": 10, "n_active": 100, "n_total": 100, "seq_len": 10, "decay_at": (1000,),
    }  # fmt: skip
    return RunSpec(**{**given, **changes})


def curve(run: RunSpec, excess: float, upto: float = 1.0) -> list[dict[str, Any]]:
    return [
        {"run_id": run.run_id, "tokens": share * run.tokens, "status": "partial",
         "loss": 3.0 + excess - math.log(share)}
        for share in (0.1, 0.3, 0.5, 0.7, 0.9) if share <= upto
    ]  # fmt: skip


def trial(run: RunSpec, excess: float, **changes: Any) -> Trial:
    given: dict[str, Any] = {"number": 0, "spec": run, "state": "ok", "flops": 1.0}
    return Trial(**{**given, "records": curve(run, excess), **changes})


VALLEY = [trial(spec(1e-3), 0.05), trial(spec(2e-3), 0.0), trial(spec(4e-3), 0.05)]


@pytest.mark.parametrize(
    ("lr", "excess", "upto", "stopped"),
    [
        (1.6e-2, 0.3, 0.5, True),
        (1.6e-2, 0.3, 0.1, False),  # too early to judge
        (1.6e-2, 0.1, 0.5, False),  # not far enough up
        (2.5e-4, 0.3, 0.5, True),
        (2e-3, 0.3, 0.5, False),  # the lowest run's own LR
        (3e-3, 0.3, 0.5, False),  # nothing lies between it and the lowest
    ],
)
def test_runs_far_up_the_side_are_stopped(
    lr: float, excess: float, upto: float, stopped: bool
) -> None:
    run = spec(lr, run_id="new")
    assert bool(hopeless(run, curve(run, excess, upto), VALLEY)) is stopped


def test_a_valley_that_is_not_bracketed_stops_nothing() -> None:
    run = spec(1.6e-2, run_id="new")
    falling = [trial(spec(1e-3), 0.0), trial(spec(2e-3), 0.05), trial(spec(4e-3), 0.05)]
    assert not hopeless(run, curve(run, 0.4), falling)


@pytest.mark.parametrize("change", [{"batch_tokens": 20}, {"n_active": 90}, {"family": "g"}])
def test_only_runs_of_the_slice_are_compared(change: dict[str, Any]) -> None:
    run = spec(1.6e-2, run_id="new", **change)
    assert not hopeless(run, curve(run, 0.3), VALLEY)


def test_under_wsd_horizons_share_a_trunk_and_otherwise_not() -> None:
    longer = spec(1.6e-2, run_id="new", tokens=1500, decay_at=(1500,))
    rows = [{**row, "tokens": row["tokens"] / 1.5} for row in curve(longer, 0.3)]
    assert hopeless(longer, rows, VALLEY)
    cosine = [trial(spec(t.spec.lr, schedule="cosine"), 0.0) for t in VALLEY]
    other = spec(1.6e-2, run_id="new", tokens=1500, decay_at=(1500,), schedule="cosine")
    assert not hopeless(other, rows, cosine)


def test_savings_and_wrongful_stops_are_counted() -> None:
    run = spec(1e-3, n_active=10**8, n_total=10**8, tokens=10**10, batch_tokens=10**5,
               decay_at=(10**10,))  # fmt: skip
    stopped = [trial(run, 0.2, state="pruned", flops=50.0, records=curve(run, 0.2, upto=0.5))]
    found = early_ends(stopped)
    assert found.saved_flops == found.spent_flops == 50.0
    posterior = prior_posterior("dense-default", num_draws=500)
    # Published laws alone put the best LR of such a run within a factor of ten of 1e-3.
    assert early_ends(stopped, posterior).wrongful == (run.run_id,)
    absurd = spec(9.0, n_active=10**8, n_total=10**8, tokens=10**10, batch_tokens=10**5,
                  decay_at=(10**10,))  # fmt: skip
    assert not early_ends([trial(absurd, 0.2, state="pruned")], posterior).wrongful


@pytest.mark.parametrize("switch", [True, False])
def test_a_sweep_stops_a_hopeless_run_and_keeps_its_curve(
    switch: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_module, "REPORT_SECONDS", 0.0)
    document = toy_recipe(sweep__early_ends=switch, options__seconds=1.0, options__noise=0.0)
    recipe = parse_recipe(document)
    runner = find_runner(recipe)
    of_slice = sorted(
        (p for p in candidates(recipe, runner)
         if p.spec.shape["name"] == "small" and p.spec.tokens == 400_000),
        key=lambda p: p.spec.lr,
    )  # fmt: skip
    # The valley of the toy world has its bottom near 1.7e-2 here.
    good, bad = of_slice[6:11:2], of_slice[0]

    def plan(trials: Sequence[Trial], batch: int) -> list[Due] | Stop:
        if batch == 2:
            return Stop(kind="done", reason="enough")
        runs = [bad] if batch else good
        return [Due(spec=p.spec, flops=p.flops, reason="test") for p in runs]

    study = open_study(None, "toy", tmp_path, recipe)
    Worker(study, runner, tmp_path / "runs", slots=3, plan=plan).run()
    trials = {t.spec.run_id: t for t in study.trials()}
    stopped = trials[bad.spec.run_id]
    assert {trials[p.spec.run_id].state for p in good} == {"ok"}
    if not switch:
        assert stopped.state == "ok"
        return
    assert stopped.state == "pruned"
    assert 0.15 * bad.flops < stopped.flops < 0.7 * bad.flops
    assert "nats above the run at LR" in stopped.status_reason
    frame = table_of(list(trials.values()), recipe).frame
    kept = frame[frame["run_id"] == bad.spec.run_id]
    assert list(kept["status"])[-1] == "pruned"
    # It is not asked for again, nor for a longer horizon.
    left = candidates(recipe, runner, list(trials.values()))
    assert not any(p.spec.lr == bad.spec.lr and p.spec.shape["name"] == "small" for p in left)
    study.close()
    status = open_status(str(tmp_path), "toy")
    assert status["early_ends"]["saved_flops"] == pytest.approx(bad.flops - stopped.flops, rel=0.01)
    assert any("1 run was stopped early" in line for line in status_lines(status))

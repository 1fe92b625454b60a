"""Early ends: which runs are stopped, what becomes of their curve, and what is said of it."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("optuna")

from bayeslr.errors import SpecError
from bayeslr.finishing import Finishing
from bayeslr.loop import open_status
from bayeslr.loop import worker as worker_module
from bayeslr.loop.early import early_ends, final_excess, hopeless
from bayeslr.loop.planning import table_of
from bayeslr.loop.status import status_lines
from bayeslr.loop.worker import Due, Stop, Worker, due_entry, due_of
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


def end(worth: float = 1.0, rate: float = 1.0) -> Finishing:
    """Of a run that costs 1e15 FLOPs; its end saves ``worth`` as many at the floor, half of that at
    0.2 nats above it, a tenth at 0.4 and beyond.
    """
    saves = tuple(1e15 * worth * share for share in (1.0, 0.5, 0.1))
    return Finishing(excess=(0.0, 0.2, 0.4), saves_flops=saves, rate=rate, flops=1e15)


def test_the_worth_of_an_end_lies_between_those_of_the_table() -> None:
    assert [end().saves(e) for e in (-1.0, 0.0, 0.1, 0.2, 0.3, 0.4, 9.0)] == pytest.approx(
        [1e15, 1e15, 0.75e15, 0.5e15, 0.3e15, 0.1e15, 0.1e15]
    )
    assert Finishing.of(json.loads(json.dumps(end().document()))) == end()
    with pytest.raises(SpecError, match="must be of one length"):
        Finishing(excess=(0.0, 0.1), saves_flops=(1.0,), rate=1.0, flops=1.0)


def test_the_excess_that_still_pays_falls_with_the_rate_and_rises_with_what_is_done() -> None:
    """At a rate of 0.9 and a fifth done, 0.72 of 1e15: 1 - 2.5 e is that at 0.112 nats."""

    def highest(rate: float, share: float) -> float:
        grid = [0.001 * i for i in range(500)]
        return max(e for e in grid if end(rate=rate).pays(e, share))

    by_rate = [highest(rate, 0.2) for rate in (0.3, 0.6, 0.9, 1.2)]
    assert by_rate == sorted(by_rate, reverse=True)
    assert len(set(by_rate)) == 4
    assert by_rate[2] == pytest.approx(0.112, abs=0.001)
    by_share = [highest(1.2, share) for share in (0.2, 0.4, 0.6)]
    assert by_share == sorted(set(by_share))


def test_a_worthless_end_is_stopped_and_a_precious_one_goes_on() -> None:
    run = spec(1.6e-2, run_id="new")
    rows = curve(run, 0.3, 0.5)
    why = hopeless(run, rows, VALLEY, end(worth=0.5))
    # Three octaves above the best: 0.08 of the gap are left out. Half of the run is to come.
    assert why == (
        "0.30 nats above the run at LR 0.002 at 500 tokens; finishing it would save 232.5T FLOPs "
        "at the targets and costs 500T"
    )
    assert not hopeless(run, rows, VALLEY, end(worth=5.0))
    dear = hopeless(run, rows, VALLEY, end(worth=5.0, rate=8.0))
    assert "costs 500T; those save at least 4e+15 elsewhere" in dear
    # Worth nothing at all, it is still one of the three at the bottom, or too young to judge.
    nothing = end(worth=0.0)
    assert not hopeless(spec(3e-3, run_id="new"), rows, VALLEY, nothing)
    assert not hopeless(run, curve(run, 0.3, 0.1), VALLEY, nothing)
    assert not hopeless(run, curve(run, -0.01, 0.5), VALLEY, nothing)
    assert hopeless(run, curve(run, 0.01, 0.5), VALLEY, nothing)


def test_the_end_is_judged_by_the_least_excess_that_it_will_have() -> None:
    """What the quickstart's proxies did: too low an LR catches up, too high a one gains at last."""
    assert final_excess(spec(1e-3), 0.4, 4e-3, 250.0) == pytest.approx(0.1)
    assert final_excess(spec(1.6e-2), 0.2, 4e-3, 250.0) == pytest.approx(0.145)
    assert final_excess(spec(1.6e-2), 0.01, 4e-3, 250.0) == 0.0


def test_what_an_end_is_worth_stands_in_the_batch() -> None:
    due = Due(spec=spec(1e-3), flops=1e15, reason="r", finishing=end())
    entry = json.loads(json.dumps(due_entry(due)))
    assert due_of(entry) == due
    # Batches that were planned by an earlier version do not have it.
    del entry["finishing"]
    assert due_of(entry) == Due(spec=spec(1e-3), flops=1e15, reason="r")
    assert due_of(due_entry(due_of(entry))).finishing is None


def test_a_valley_that_is_not_bracketed_stops_nothing() -> None:
    run = spec(1.6e-2, run_id="new")
    falling = [trial(spec(1e-3), 0.0), trial(spec(2e-3), 0.05), trial(spec(4e-3), 0.05)]
    assert not hopeless(run, curve(run, 0.4), falling)


@pytest.mark.parametrize(
    "change",
    [
        {"batch_tokens": 20}, {"n_active": 90}, {"family": "g"}, {"weight_decay": 0.3},
        {"options": {"lr_multipliers": {"router": 4.0}}},
    ],
)  # fmt: skip
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


@pytest.mark.parametrize(
    ("switch", "finishing", "stops"),
    [
        (True, None, True),
        (True, end(worth=0.0), True),
        (True, end(worth=1e6), False),
        (False, end(worth=0.0), False),
    ],
)
def test_a_sweep_stops_a_hopeless_run_and_keeps_its_curve(
    switch: bool,
    finishing: Finishing | None,
    stops: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
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
        return [
            Due(spec=p.spec, flops=p.flops, reason="test", finishing=finishing if batch else None)
            for p in runs
        ]

    study = open_study(None, "toy", tmp_path, recipe)
    Worker(study, runner, tmp_path / "runs", slots=3, plan=plan).run()
    trials = {t.spec.run_id: t for t in study.trials()}
    stopped = trials[bad.spec.run_id]
    assert {trials[p.spec.run_id].state for p in good} == {"ok"}
    if not stops:
        assert stopped.state == "ok"
        return
    assert stopped.state == "pruned"
    assert 0.15 * bad.flops < stopped.flops < 0.7 * bad.flops
    assert "nats above the run at LR" in stopped.status_reason
    assert ("finishing it would save" in stopped.status_reason) is (finishing is not None)
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

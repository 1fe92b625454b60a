"""The closed loop in one process, with inference replaced by a stand-in."""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import os
import re
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

pytest.importorskip("optuna")

from bayeslr import loop
from bayeslr.errors import DataError, SpecError, StorageError
from bayeslr.loop import SweepResult, describe, find_recipe, open_recipe, open_status, to_toml
from bayeslr.loop.ending import train_target
from bayeslr.loop.status import status_lines
from bayeslr.loop.validation import validate
from bayeslr.runner_protocol import Trial
from bayeslr.runs import quarantine_path
from bayeslr.space import start_design
from bayeslr.specs import load_recipe, parse_recipe, recipe_document
from bayeslr_runners import toy
from bayeslr_runners.study import open_study
from tests import fakes
from tests.fakes import finished_runs, toy_recipe, write_recipe


@pytest.fixture(autouse=True)
def _stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, module in fakes.modules().items():
        monkeypatch.setitem(sys.modules, name, module)


class Log:
    def __init__(self) -> None:
        self.lines: list[str] = []

    def __call__(self, line: str, *, transient: bool = False) -> None:
        if not transient:
            self.lines.append(line)


def sweep(out: Path, **changes: Any) -> tuple[SweepResult, list[str]]:
    """A sweep of the toy recipe; ``_seed`` and the like go to `loop.sweep` itself."""
    words = {k[1:]: changes.pop(k) for k in list(changes) if k.startswith("_")}
    log = Log()
    result = loop.sweep(parse_recipe(toy_recipe(**changes)), out, progress=log, **words)
    return result, log.lines


def test_a_sweep_spends_its_budget_and_finds_the_valley(tmp_path: Path) -> None:
    result, lines = sweep(tmp_path)
    assert result.stop.kind == "budget"
    assert 0.9 * 6e12 < result.spent_flops <= 6e12
    best = toy.best_lr(3e5, 4e5, 4096)
    assert 0.4 * best < result.predictions["lr"][0] < 2.5 * best
    runs = finished_runs(tmp_path)
    assert len(runs) == len([line for line in lines if "of budget]" in line]) == 14
    assert set(runs) == set(result.runs.frame["run_id"])
    for path in ("recipe.toml", "resolved.json", "runs.parquet", "predictions.csv", "fit"):
        assert (tmp_path / path).exists(), path
    assert any("loss" in line and "lr=" in line for line in lines)
    assert lines[-1].startswith("stopped: 72B of 6T FLOPs are left")


def test_the_same_command_again_changes_nothing(tmp_path: Path) -> None:
    first, _ = sweep(tmp_path)
    second, lines = sweep(tmp_path)
    assert lines == [f"stopped: {first.stop.reason}"]
    pd.testing.assert_frame_equal(first.predictions, second.predictions)


def test_proposals_depend_on_the_runs_and_not_on_their_order(tmp_path: Path) -> None:
    alone, _ = sweep(tmp_path / "one", sweep__workers=1, sweep__batch_runs=3)
    beside, _ = sweep(tmp_path / "three", sweep__workers=3, sweep__batch_runs=3)
    assert finished_runs(tmp_path / "one") == finished_runs(tmp_path / "three")
    assert alone.spent_flops == beside.spent_flops


def test_the_first_runs_are_the_start_design(tmp_path: Path) -> None:
    sweep(tmp_path, sweep__max_runs=6)
    recipe = parse_recipe(toy_recipe())
    start = start_design(recipe, loop.find_runner(recipe))
    assert list(finished_runs(tmp_path)) == [p.spec.run_id for p in start]


@pytest.mark.parametrize("few", [{"sweep__max_runs": 2}, {"sweep__budget_flops": 1e12}])
def test_the_first_runs_that_are_shown_are_those_that_are_made(
    few: dict[str, Any], tmp_path: Path
) -> None:
    shown = [run["run_id"] for run in describe(parse_recipe(toy_recipe(**few)))["start"]]
    sweep(tmp_path, **few)
    assert shown == list(finished_runs(tmp_path))[: len(shown)]
    assert len(shown) < 6


def test_max_runs_stops(tmp_path: Path) -> None:
    result, _ = sweep(tmp_path, sweep__max_runs=7)
    assert (result.stop.kind, len(finished_runs(tmp_path))) == ("max_runs", 7)


def test_an_empty_proposal_is_the_stop_rule(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["bayeslr.acquire"], "choose", lambda *_, **__: fakes.Plan(()))
    result, _ = sweep(tmp_path)
    assert (result.stop.kind, len(finished_runs(tmp_path))) == ("rule", 6)
    assert result.stop.reason == "nothing pays"


def test_a_space_that_is_used_up_stops(tmp_path: Path) -> None:
    result, _ = sweep(tmp_path, space__lr={"low": 4e-3, "high": 8e-3, "per_octave": 1})
    assert result.stop.kind == "done"
    # Two LRs, two shapes; the start's trunks measure both horizons.
    assert len(finished_runs(tmp_path)) == 4


def test_a_space_that_is_used_up_is_repeated_where_the_recipe_allows(tmp_path: Path) -> None:
    few = {"low": 4e-3, "high": 8e-3, "per_octave": 1}
    result, _ = sweep(tmp_path, space__lr=few, sweep__repeats=True, sweep__max_runs=7)
    assert result.stop.kind == "max_runs"
    names = finished_runs(tmp_path)
    assert len(names) == 7
    assert len({name.rpartition("-s")[0] for name in names}) == 4


def test_repeats_are_not_drawn_at_random(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unmixed(runs: Any, *_: Any, **__: Any) -> fakes.FakePosterior:
        return fakes.FakePosterior(8e-3, len(runs), trustworthy=False)

    monkeypatch.setattr(sys.modules["bayeslr.sampling"], "fit", unmixed)
    few = {"low": 4e-3, "high": 8e-3, "per_octave": 1}
    result, _ = sweep(tmp_path, space__lr=few, sweep__repeats=True)
    assert (result.stop.kind, len(finished_runs(tmp_path))) == ("done", 4)
    assert "a repeat is not drawn at random, for the runs so far cannot be fitted: so so" in (
        result.stop.reason
    )


def test_a_larger_budget_goes_on(tmp_path: Path) -> None:
    sweep(tmp_path, sweep__budget_flops=3e12)
    few = finished_runs(tmp_path)
    result, _ = sweep(tmp_path, sweep__budget_flops=6e12)
    many = finished_runs(tmp_path)
    assert set(few) < set(many)
    assert 5e12 < result.spent_flops <= 6e12


TIMED = """
import json, sys
from bayeslr_runners.toy import loss_of
spec = json.load(open(sys.argv[1]))
with open(sys.argv[2], "a") as records:
    for tokens in spec["decay_at"]:
        seconds = 6 * spec["n_active"] * tokens / 2e9
        row = dict(tokens=tokens, loss=loss_of(spec, tokens), wall_s=seconds)
        records.write(json.dumps(row) + chr(10))
"""


def test_a_budget_that_does_not_pay_for_what_was_killed_is_refused(tmp_path: Path) -> None:
    few = {"sweep__max_runs": 2}
    first, _ = sweep(tmp_path, **few)
    study = open_study(None, "toy", tmp_path, None)
    spec = dataclasses.replace(study.trials()[0].spec, run_id="killed")
    assert study.ask(spec, flops=1e12, reason="a run that was killed") is not None
    study.close()
    needed = first.spent_flops + 1e12
    told = re.escape(f"is below the {needed:.10g} FLOPs")
    with pytest.raises(SpecError, match=f"{told}.*have not ended"):
        sweep(tmp_path, **few, sweep__budget_flops=first.spent_flops)
    result, _ = sweep(tmp_path, **few, sweep__budget_flops=needed)
    assert finished_runs(tmp_path)["killed"][0] == "ok"
    assert result.spent_flops <= needed


def test_a_budget_in_gpu_hours_is_kept_and_said(tmp_path: Path) -> None:
    """6e12 FLOPs as hours, on devices that the records then show to be twice as fast."""
    rate = 1e9
    argv = ["{python}", "-c", TIMED, "{spec}", "{records}"]
    hours = {"sweep__budget_flops": None, "sweep__budget_gpu_hours": 6e12 / 3600 / rate}
    result, lines = sweep(
        tmp_path, **hours, sweep__flops_per_second=rate, options__argv=argv, sweep__max_runs=8
    )
    assert 0 < result.spent_flops <= result.recipe.budget_flops == pytest.approx(6e12)
    assert "budget_gpu_hours = 1.6666" in (tmp_path / "recipe.toml").read_text()
    status = open_status(str(tmp_path))
    assert status["flops_per_second"] == rate
    assert status["budget_gpu_hours"] == pytest.approx(6e12 / 3600 / rate)
    assert status["spent_gpu_hours"] == pytest.approx(status["spent_flops"] / 3600 / rate)
    measured = status["measured"]
    assert measured["runs"] == 8
    assert measured["flops_per_second"] == pytest.approx(2e9, rel=0.3)
    told = "\n".join(status_lines(status))
    assert "of 6T FLOPs (1.67 GPU-hours)" in told
    assert "8 ended runs trained for" in told
    assert "where the recipe says 1B: at that pace the whole budget takes" in told
    # More hours go on, and what was spent before counts.
    hours["sweep__budget_gpu_hours"] = 2 * 6e12 / 3600 / rate
    more, lines = sweep(tmp_path, **hours, sweep__flops_per_second=rate, options__argv=argv)
    assert more.stop.kind == "budget"
    assert 6e12 < more.spent_flops <= 1.2e13
    assert "12T FLOPs (3.33 GPU-hours) are left" in lines[-1]


def test_another_recipe_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    sweep(tmp_path, sweep__max_runs=2)
    with pytest.raises(SpecError, match=r"another recipe: space\.tokens, sweep\.seed differ"):
        sweep(tmp_path, sweep__max_runs=2, _seed=9, space__tokens=[200_000])


def test_a_random_sweep_needs_no_fit_before_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    fit = fakes.fit
    monkeypatch.setattr(
        sys.modules["bayeslr.sampling"], "fit", lambda *a, **k: calls.append(1) or fit(*a, **k)
    )
    result, _ = sweep(tmp_path, sweep__strategy="random")
    assert (result.stop.kind, len(calls)) == ("budget", 1)


@pytest.mark.parametrize("strategy", ["classical", "ladder", "d-optimal"])
def test_a_design_makes_its_runs_and_fits_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, strategy: str
) -> None:
    methods: list[str] = []

    def fit(*words: Any, method: str, **rest: Any) -> Any:
        methods.append(method)
        return fakes.fit(*words, **rest)

    monkeypatch.setattr(sys.modules["bayeslr.sampling"], "fit", fit)
    changes = {"sweep__budget_flops": 12e12, "sweep__max_runs": 11}
    first, _ = sweep(tmp_path, _strategy=strategy, **changes)
    assert methods == ["two-stage" if strategy == "classical" else "bayes"]
    runs = finished_runs(tmp_path)
    assert all(set(losses) == {200_000, 400_000} for _, losses in runs.values())
    if strategy == "classical":
        assert first.stop.kind == "done"
        assert [sum(shape in run for run in runs) for shape in ("small", "medium")] == [5, 5]
    with pytest.raises(SpecError, match=r"sweep\.strategy"):
        sweep(tmp_path, _strategy="bayes", **changes)


def test_a_design_that_was_killed_goes_on_with_its_step(tmp_path: Path) -> None:
    whole, _ = sweep(tmp_path / "whole", _strategy="classical", sweep__budget_flops=12e12)
    sweep(tmp_path / "parts", _strategy="classical", sweep__budget_flops=12e12, sweep__max_runs=7)
    sweep(tmp_path / "parts", _strategy="classical", sweep__budget_flops=12e12)
    assert finished_runs(tmp_path / "parts") == finished_runs(tmp_path / "whole")
    assert whole.stop.kind == "done"


@pytest.mark.parametrize(
    ("fit_s", "run_s", "checked"),
    [(1.0, 1.0, True), (300.0, None, True), (300.0, 3600.0, True), (300.0, 20.0, False)],
)
def test_the_largest_cells_are_left_out_where_that_is_worth_its_time(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fit_s: float,
    run_s: float | None,
    checked: bool,
) -> None:
    def fit(runs: Any, *words: Any, **rest: Any) -> Any:
        runs.frame["wall_s"] = math.nan if run_s is None else run_s
        return dataclasses.replace(fakes.fit(runs, *words, **rest), seconds=fit_s)

    monkeypatch.setattr(sys.modules["bayeslr.sampling"], "fit", fit)
    result, _ = sweep(tmp_path, sweep__max_runs=6)
    info = result.posterior.info
    assert ("holdout" in info) is checked
    if not checked:
        assert info["no_holdout"].startswith("The largest cells were not left out")
        assert "a fit took 300 s here, and all runs 120 s" in info["no_holdout"]


def test_runs_that_cannot_be_fitted_fall_back_to_chance_and_say_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit = fakes.fit

    def refuse(*words: Any, fast: bool = False, **rest: Any) -> Any:
        if fast:
            raise DataError("all runs diverged")
        return fit(*words, **rest)

    monkeypatch.setattr(sys.modules["bayeslr.sampling"], "fit", refuse)
    _, lines = sweep(tmp_path, sweep__max_runs=8)
    assert any("at random" in line and "all runs diverged" in line for line in lines)


@pytest.mark.parametrize("trustworthy", [True, False])
def test_a_fit_that_has_not_mixed_chooses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trustworthy: bool
) -> None:
    calls: list[bool] = []

    def unmixed(runs: Any, *_: Any, fast: bool = False, **__: Any) -> fakes.FakePosterior:
        calls.append(fast)
        return fakes.FakePosterior(8e-3, 6, trustworthy=trustworthy)

    monkeypatch.setattr(sys.modules["bayeslr.sampling"], "fit", unmixed)
    _, lines = sweep(tmp_path, sweep__max_runs=8)
    assert calls == [True, False]
    assert any("at random" in line and "so so" in line for line in lines) is not trustworthy


def test_diverged_runs_are_told_and_kept(tmp_path: Path) -> None:
    result, lines = sweep(tmp_path, space__lr={"low": 4e-3, "high": 1.0, "per_octave": 1})
    states = {run_id: state for run_id, (state, _) in finished_runs(tmp_path).items()}
    assert "diverged" in states.values()
    assert set(result.runs.frame["status"]) >= {"ok", "diverged"}
    assert any("diverged (loss is not finite)" in line for line in lines)


SCHEDULED = """
import json, sys
from pathlib import Path
spec = json.loads(Path(sys.argv[1]).read_text())
from bayeslr_runners.toy import loss_of
with open(sys.argv[2], "a") as records:
    for tokens in (FIRST, *spec["decay_at"]):
        lr = spec["lr"] * (1 - tokens / spec["tokens"])
        records.write(json.dumps(dict(tokens=tokens, loss=LOSS, lr=lr)) + chr(10))
"""


def scheduled(loss: str = "loss_of(spec, tokens)", first: str = "spec['tokens'] // 4") -> list[str]:
    """A trainer that logs the LR of the step, its first record after so many tokens."""
    code = SCHEDULED.replace("LOSS", loss).replace("FIRST", first)
    return ["{python}", "-c", code, "{spec}", "{records}"]


def test_a_trainer_may_log_its_scheduled_lr(tmp_path: Path) -> None:
    result, _ = sweep(tmp_path, options__argv=scheduled(), sweep__max_runs=7)
    assert len(result.runs.quarantine) == 0
    asked = {t.spec.run_id: t.spec.lr for t in open_study(None, "toy", tmp_path, None).trials()}
    found = result.runs.frame.groupby("run_id")["lr"].unique()
    assert {run: list(lrs) for run, lrs in found.items()} == {k: [v] for k, v in asked.items()}


def test_rows_that_break_a_rule_are_said_and_kept_apart(tmp_path: Path) -> None:
    argv = scheduled(
        "loss_of(spec, tokens or 1)", first="0"
    )  # the loss at initialisation, as many trainers log it
    result, lines = sweep(tmp_path, options__argv=argv, sweep__max_runs=6)
    count = len(result.runs.quarantine)
    assert count == 6
    path = quarantine_path(tmp_path / "runs.parquet")
    assert len(pd.read_csv(path)) == count
    said = "\n".join(lines)
    assert f"{count} rows set aside, for they break a rule of the run table (all in {path})" in said
    assert "tokens must be finite and > 0, got '0.0'" in said
    status = open_status(str(tmp_path))
    assert status["quarantine"]["rows"] == count
    assert "tokens must be finite and > 0" in "\n".join(status_lines(status))


def test_seconds_that_are_no_number_fail_the_run_and_not_the_sweep(tmp_path: Path) -> None:
    argv = scheduled("loss_of(spec, tokens), wall_s='00:12:31'")
    with pytest.raises(DataError, match=r"wall_s must be a number, got '00:12:31'"):
        sweep(tmp_path, options__argv=argv, sweep__max_runs=1)
    assert [state for state, _ in finished_runs(tmp_path).values()] == ["failed"]


def test_the_line_of_a_run_has_its_final_loss(tmp_path: Path) -> None:
    """An undecayed loss at the same tokens is a checkpoint, whichever was recorded last."""
    undecayed = "row | dict(loss=9.0, status='partial')"
    code = f"{TIMED}        records.write(json.dumps({undecayed}) + chr(10))"
    argv = ["{python}", "-c", code, "{spec}", "{records}"]
    _, lines = sweep(tmp_path, options__argv=argv, sweep__max_runs=1)
    ((_, losses),) = finished_runs(tmp_path).values()
    assert f"loss {losses[4e5]:.4f}" in lines[0]


def test_a_trainer_that_never_works_stops_the_sweep(tmp_path: Path) -> None:
    argv = ["{python}", "-c", "raise SystemExit('no GPU here')"]
    with pytest.raises(DataError, match=r"no run came to anything.*no GPU here.*--retry"):
        sweep(tmp_path, options__argv=argv)
    assert len(finished_runs(tmp_path)) == 6
    status = open_status(str(tmp_path))
    assert (status["state"], status["stop"]["kind"]) == ("stopped", "failures")
    assert any("failed: " in line and "no GPU here" in line for line in status_lines(status))


@pytest.mark.parametrize("loss", ["0.0", "3000.0"])
def test_a_trainer_whose_losses_break_a_rule_stops_the_sweep(tmp_path: Path, loss: str) -> None:
    with pytest.raises(DataError, match=r"no run came to anything.*break a rule of the run table"):
        sweep(tmp_path, options__argv=scheduled(loss))
    states = [state for state, _ in finished_runs(tmp_path).values()]
    assert states == ["failed"] * 6
    status = open_status(str(tmp_path))
    assert status["stop"]["kind"] == "failures"
    assert f"got '{loss}'" in status["stop"]["reason"]


def test_runs_that_broke_a_rule_are_made_again_from_nothing(tmp_path: Path) -> None:
    marker, out = tmp_path / "mended", tmp_path / "out"
    changes: dict[str, Any] = {
        "options__argv": scheduled(f"loss_of(spec, tokens) * Path({str(marker)!r}).exists()"),
        "sweep__max_runs": 12,
        "sweep__budget_flops": 24e12,
    }
    with pytest.raises(DataError, match="loss must be > 0"):
        sweep(out, **changes)
    marker.touch()
    sweep(out, **changes, _retry=True)
    study = open_study(None, "toy", out, None)
    assert [t.state for t in study.trials()] == ["failed"] * 6 + ["ok"] * 6
    study.close()
    assert len(list((out / "runs").glob("*.failed-1"))) == 6


def test_failed_runs_are_made_again_with_retry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    marker = tmp_path / "mended"
    code = (
        f"import os, runpy, sys; os.path.exists({str(marker)!r}) or sys.exit('not yet');"
        "runpy.run_module('bayeslr_runners.toy', run_name='__main__', alter_sys=True)"
    )
    changes = {"options__argv": ["{python}", "-c", code, "{spec}", "{records}", "{dir}"]}
    with pytest.raises(DataError, match="not yet"):
        sweep(tmp_path / "out", **changes, sweep__budget_flops=12e12)
    marker.touch()
    result, _ = sweep(tmp_path / "out", **changes, sweep__budget_flops=12e12, _retry=True)
    study = open_study(None, "toy", tmp_path / "out", None)
    states = [t.state for t in study.trials()]
    assert states[:6] == ["failed"] * 6
    assert set(states[6:]) == {"ok"}
    assert len({t.spec.run_id for t in study.trials()[:12]}) == 6
    assert all(t.reason.startswith("again, for it was failed") for t in study.trials()[6:12])
    assert result.spent_flops <= 12e12


def test_options_that_the_trainer_alone_refuses_can_be_mended(tmp_path: Path) -> None:
    budget = {"sweep__budget_flops": 12e12}
    with pytest.raises(DataError, match="no run came to anything"):
        sweep(tmp_path, **budget, options__argv=["{python}", "-c", "raise SystemExit('no')"])
    with pytest.raises(SpecError, match=r"another recipe: run\.seq_len differ"):
        sweep(tmp_path, **budget, run__seq_len=32)
    result, _ = sweep(tmp_path, **budget)
    study = open_study(None, "toy", tmp_path, None)
    trials = study.trials()
    study.close()
    assert [t.state for t in trials[:12]] == ["failed"] * 6 + ["ok"] * 6
    assert {t.spec.run_id for t in trials[:6]} == {t.spec.run_id for t in trials[6:12]}
    assert result.spent_flops <= 12e12
    with pytest.raises(SpecError, match=r"another recipe: options\.seconds differ"):
        sweep(tmp_path, **budget, options__seconds=0.1)


def test_a_run_that_is_made_again_is_paid_for_again(tmp_path: Path) -> None:
    """The part that the first try got through is spent; the second may cost the whole."""
    marker = tmp_path / "mended"
    code = (
        "import json, os, runpy, sys; line = json.dumps(dict(tokens=4e4, loss=9.0)) + chr(10);"
        f"os.path.exists({str(marker)!r}) or (open(sys.argv[2], 'w').write(line),"
        "sys.exit('not yet'));"
        "runpy.run_module('bayeslr_runners.toy', run_name='__main__', alter_sys=True)"
    )
    changes = {"options__argv": ["{python}", "-c", code, "{spec}", "{records}", "{dir}"],
               "sweep__max_runs": 1}  # fmt: skip
    with pytest.raises(DataError, match="not yet"):
        sweep(tmp_path / "out", **changes)
    marker.touch()
    sweep(tmp_path / "out", **changes, _retry=True)
    study = open_study(None, "toy", tmp_path / "out", None)
    first, again = study.trials()
    study.close()
    assert (first.state, again.state) == ("failed", "ok")
    assert again.flops == 10 * first.flops > 0


def test_a_second_sweep_on_the_folder_is_told_who_has_it(tmp_path: Path) -> None:
    with (
        loop._locked(tmp_path, "toy"),
        pytest.raises(StorageError, match=r"in use by process \d+ on .*bayeslr worker --storage"),
    ):
        sweep(tmp_path)
    sweep(tmp_path, sweep__max_runs=1)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES])
def test_a_disk_that_refuses_is_said_and_the_sweep_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def full(*_: Any) -> None:
        raise OSError(number, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("bayeslr.loop.worker.start", full)
        with pytest.raises(StorageError, match=r"No space left on device.*repeat the same command"):
            sweep(tmp_path)
    result, _ = sweep(tmp_path)
    assert result.stop.kind == "budget"


@pytest.mark.parametrize("name", ["resolved.json", "recipe.toml", "predictions.csv"])
def test_what_others_read_is_written_all_or_nothing(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep(tmp_path, sweep__max_runs=1)
    before = (tmp_path / name).read_text()
    replace = os.replace

    def full(source: Any, target: Any) -> None:
        if Path(target).name == name:
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(StorageError, match=rf"{name}.*No space left on device"):
        sweep(tmp_path, sweep__max_runs=2)
    assert (tmp_path / name).read_text() == before
    assert open_status(str(tmp_path))["name"] == "toy"


def test_an_interrupted_sweep_gives_its_runs_up_cleanly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Interrupt(Log):
        def __call__(self, line: str, *, transient: bool = False) -> None:
            if "of budget]" in line:
                raise KeyboardInterrupt

    recipe = parse_recipe(toy_recipe(sweep__workers=2, options__seconds=0.2))
    with pytest.raises(KeyboardInterrupt):
        loop.sweep(recipe, tmp_path, progress=Interrupt())
    status = open_status(str(tmp_path))
    assert status["state"] == "idle"
    assert all(not run["alive"] for run in status["running"])
    assert any("resumes it" in line for line in status_lines(status))
    result, _ = sweep(tmp_path, sweep__workers=2, options__seconds=0.2, sweep__max_runs=7)
    assert result.stop.kind == "max_runs"


def test_a_sweep_that_chooses_its_next_runs_is_not_idle(tmp_path: Path) -> None:
    states = []

    def look(line: str, *, transient: bool = False) -> None:
        if line == "choosing the next runs":
            states.append(open_status(str(tmp_path))["state"])

    loop.sweep(parse_recipe(toy_recipe(sweep__max_runs=7)), tmp_path, progress=look)
    assert states == ["running"] * 3
    assert open_status(str(tmp_path))["state"] == "stopped"


def test_records_of_a_run_that_was_not_told_are_used(tmp_path: Path) -> None:
    """Killed between the child's end and the study's answer: nothing is trained again."""
    recipe = parse_recipe(toy_recipe(sweep__max_runs=1))
    runner = loop.find_runner(recipe)
    (first, *_) = start_design(recipe, runner)
    rows = [{"tokens": t, "loss": 3.0} for t in first.spec.decay_at]
    folder = tmp_path / "runs" / first.spec.run_id
    folder.mkdir(parents=True)
    (folder / "records.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    sweep(tmp_path, sweep__max_runs=1)
    assert finished_runs(tmp_path)[first.spec.run_id] == ("ok", {200_000: 3.0, 400_000: 3.0})


def test_the_table_runner_drives_the_same_loop(tmp_path: Path) -> None:
    made, _ = sweep(tmp_path / "made", space__lr={"low": 1e-3, "high": 6.4e-2, "per_octave": 1})
    made.runs.write(tmp_path / "recorded.csv")
    result, _ = sweep(
        tmp_path / "replayed",
        sweep__runner="table",
        sweep__name="replayed",
        options={"runs": str(tmp_path / "recorded.csv")},
        sweep__max_runs=10,
    )
    replayed = result.runs.frame
    recorded = made.runs.frame[["n_active", "tokens", "lr", "loss"]]
    both = replayed[["n_active", "tokens", "lr", "loss"]].merge(recorded, how="left")
    assert len(replayed) > 10
    assert both["loss"].notna().all()


def test_the_target_itself_is_trained_and_judged(tmp_path: Path) -> None:
    result, lines = sweep(tmp_path, sweep__validate_target=True)
    checked = result.validation
    assert checked is not None
    assert [round(lr / checked.lr, 6) for lr in checked.lrs] == [0.5, 1.0, 2.0]
    assert checked.states == ("ok", "ok", "ok")
    assert checked.best_lr is not None
    assert checked.best_lr == pytest.approx(toy.best_lr(1e6, 1e6, 4096), rel=0.3)
    assert checked.regret is not None
    text = "\n".join(checked.lines())
    assert "recommended" in text
    assert "Regret" in text
    document = json.loads((tmp_path / "validation.json").read_text())
    assert document["losses"] == list(checked.losses)
    assert any("training the target big itself" in line for line in lines)
    assert "validation" not in "".join(finished_runs(tmp_path))
    again, _ = sweep(tmp_path, sweep__validate_target=True)
    assert again.validation == checked
    # After more runs another LR is recommended: it is checked by runs of its own.
    moved = again.predictions.assign(lr=3.0 * checked.lr)
    runner, lines = loop.find_runner(again.recipe), []
    anew = train_target(
        dataclasses.replace(again, predictions=moved), runner, None,
        lambda line, transient=False: lines.append(line),
    )  # fmt: skip
    assert anew.lr == pytest.approx(3.0 * checked.lr, rel=1e-4)
    assert [round(lr / anew.lr, 3) for lr in anew.lrs] == [0.5, 1.0, 2.0]
    assert sum("of budget" in line for line in lines) == 3


def test_the_targets_own_runs_are_made_again_with_retry_and_end_whole(tmp_path: Path) -> None:
    marker, out = tmp_path / "mended", tmp_path / "out"
    code = (
        f"import os, runpy, sys; os.path.exists({str(marker)!r}) or 'validation' in sys.argv[1]"
        " and sys.exit('no room for it');"
        "runpy.run_module('bayeslr_runners.toy', run_name='__main__', alter_sys=True)"
    )
    changes = {
        "options__argv": ["{python}", "-c", code, "{spec}", "{records}", "{dir}"],
        "sweep__max_runs": 6,
        "sweep__early_ends": True,
        "sweep__validate_target": True,
    }
    result, _ = sweep(out, **changes)
    marker.touch()
    same, _ = sweep(out, **changes)
    for checked in (result.validation, same.validation):
        assert checked is not None
        assert checked.states == ("failed",) * 3
    mended, _ = sweep(out, **changes, _retry=True)
    checked = mended.validation
    assert checked is not None
    assert checked.states == ("ok",) * 3
    assert "Regret" in "\n".join(checked.lines())
    study = open_study(None, "toy.validation", out, None)
    assert [t.state for t in study.trials()] == ["failed"] * 3 + ["ok"] * 3
    assert not study.recipe().early_ends
    study.close()


def verdict(losses: dict[float, float | None], low: float = 5e-3, high: float = 2e-2) -> Any:
    recipe = parse_recipe(toy_recipe())
    spec = start_design(recipe, loop.find_runner(recipe))[0].spec
    trials = []
    for lr, loss in losses.items():
        run = parse_spec(spec, lr)
        rows = [] if loss is None else [{"tokens": 1, "loss": loss, "status": "ok"}]
        state = "diverged" if loss is None else "ok"
        trials.append(Trial(number=0, spec=run, state=state, flops=1.0, records=rows))
    return validate(trials, {"target_id": "t", "lr": 1e-2, "lr_q05": low, "lr_q95": high})


def parse_spec(spec: Any, lr: float) -> Any:
    return dataclasses.replace(spec, lr=lr)


@pytest.mark.parametrize(
    ("losses", "interval", "inside"),
    [
        ({5e-3: 3.1, 1e-2: 3.0, 2e-2: 3.1}, (8e-3, 1.2e-2), True),
        ({5e-3: 3.1, 1e-2: 3.0, 2e-2: 3.1}, (2e-2, 4e-2), False),
        ({5e-3: 2.9, 1e-2: 3.0, 2e-2: 3.1}, (6e-3, 2e-2), False),
        ({5e-3: 2.9, 1e-2: 3.0, 2e-2: 3.1}, (3e-3, 2e-2), None),
        ({5e-3: 3.1, 1e-2: 3.0, 2e-2: 2.9}, (6e-3, 1.8e-2), False),
        ({5e-3: 3.1, 1e-2: 3.0, 2e-2: None}, (6e-3, 2e-2), None),
        ({5e-3: None, 1e-2: None, 2e-2: None}, (6e-3, 2e-2), None),
    ],
)
def test_the_verdict_is_honest(
    losses: dict[float, float | None], interval: tuple[float, float], inside: bool | None
) -> None:
    checked = verdict(losses, *interval)
    assert checked.inside is inside
    text = "\n".join(checked.lines())
    assert ("OUTSIDE" in text) is (inside is False)


def test_of_two_losses_the_lower_says_to_which_side_the_optimum_may_lie() -> None:
    falling = verdict({5e-3: 3.1, 1e-2: 3.0, 2e-2: None})
    assert "the optimum may lie further above" in "\n".join(falling.lines())
    rising = verdict({5e-3: None, 1e-2: 3.0, 2e-2: 3.1})
    assert "the optimum may lie further below" in "\n".join(rising.lines())


def test_the_parabola_finds_its_bottom() -> None:
    checked = verdict({5e-3: 3.0 + 0.04, 1e-2: 3.0, 2e-2: 3.0 + 0.04})
    assert checked.best_lr == pytest.approx(1e-2)
    assert checked.regret == pytest.approx(0.0, abs=1e-12)


def test_the_regret_is_that_above_the_bottom_between_the_runs() -> None:
    off = {lr: 3.0 + 0.05 * math.log(lr / 8e-3) ** 2 for lr in (5e-3, 1e-2, 2e-2)}
    checked = verdict(off)
    assert checked.best_lr == pytest.approx(8e-3)
    assert checked.regret == pytest.approx(off[1e-2] - 3.0)
    assert "nats above that bottom." in checked.lines()[-1]
    at_edge = verdict({5e-3: 2.9, 1e-2: 3.0, 2e-2: 3.1})
    assert at_edge.regret == pytest.approx(0.1)
    assert "nats above the lowest of them." in at_edge.lines()[-1]


def test_a_recipe_survives_toml(tmp_path: Path) -> None:
    recipe = parse_recipe(toy_recipe(options__words={"a b": [1.5, True, 'say "hi"', "ü"]}))
    path = tmp_path / "r.toml"
    path.write_text(to_toml(recipe_document(recipe)), encoding="utf-8")
    assert load_recipe(path) == recipe


def test_paths_in_options_are_beside_the_recipe(tmp_path: Path) -> None:
    changes = {"sweep__runner": "table", "options": {"runs": "./data/runs.csv", "other": "./"}}
    path = write_recipe(tmp_path / "r.toml", toy_recipe(**changes))
    options = open_recipe(path).options
    assert options["runs"] == str(tmp_path.resolve() / "data" / "runs.csv")


def test_shipped_recipes_are_found_by_name() -> None:
    assert find_recipe("quickstart").name == "quickstart.toml"
    with pytest.raises(SpecError, match=r"recipe nope does not exist.*quickstart"):
        find_recipe("nope")


def test_every_shipped_recipe_can_begin(root: Path) -> None:
    for path in sorted((root / "runners" / "recipes").glob("*.toml")):
        if path.name == "compare.toml":  # tests/test_compare.py looks at it
            continue
        plan = describe(open_recipe(path))
        assert plan["start"], path
        assert plan["start_flops"] <= plan["budget_flops"], path
        if open_recipe(path).validate_target:
            dearest = max(6 * c["n_active"] * c["tokens"] for c in plan["cells"])
            assert plan["targets"][0]["flops"] >= 4 * dearest, path


def test_a_budget_below_the_cheapest_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"the budget of 1K FLOPs is below the cheapest run"):
        sweep(tmp_path, sweep__budget_flops=1e3)


def test_what_the_runner_refuses_is_said_before_there_is_a_study(tmp_path: Path) -> None:
    recipe = open_recipe("quickstart")
    wrong = dataclasses.replace(recipe, run={**recipe.run, "param_convention": "total"})
    with pytest.raises(SpecError, match="the proxy trainer counts non_embedding parameters"):
        loop.sweep(wrong, tmp_path)
    assert not (tmp_path / "study.journal").exists()


def test_validation_needs_a_target_that_can_be_trained(tmp_path: Path) -> None:
    target = {"n_active": 1e6, "n_total": 2e6, "tokens": 1e6, "batch_tokens": 4096}
    with pytest.raises(SpecError, match="validate_target needs a shape"):
        sweep(tmp_path, sweep__validate_target=True, targets=[target])


def test_an_unknown_key_in_a_recipe_is_named(tmp_path: Path) -> None:
    path = tmp_path / "r.toml"
    path.write_text(to_toml(toy_recipe(sweep__budget=3)), encoding="utf-8")
    with pytest.raises(SpecError, match=r"r\.toml, \[sweep\]: unknown key 'budget'; allowed"):
        loop.sweep(path, tmp_path)


def test_a_sweep_whose_study_lies_elsewhere_is_not_begun_anew_beside_it(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'study.db'}"
    first, _ = sweep(tmp_path / "out", sweep__max_runs=1, _storage=url)
    with pytest.raises(StorageError, match=r"keeps its study in sqlite:///.*study\.db: give that"):
        sweep(tmp_path / "out", sweep__max_runs=1)
    assert not (tmp_path / "out" / "study.journal").exists()
    again, _ = sweep(tmp_path / "out", sweep__max_runs=1, _storage=url)
    assert again.spent_flops == first.spent_flops


def test_a_sweep_with_a_journal_is_not_begun_anew_in_a_database(tmp_path: Path) -> None:
    out, url = tmp_path / "out", f"sqlite:///{tmp_path / 'study.db'}"
    first, _ = sweep(out, sweep__max_runs=1)
    with pytest.raises(StorageError, match="keeps its study in that folder's journal: give no sto"):
        sweep(out, sweep__max_runs=1, _storage=url)
    assert not (tmp_path / "study.db").exists()
    again, _ = sweep(out, sweep__max_runs=1)
    assert again.spent_flops == first.spent_flops
    sweep(out, sweep__max_runs=1, sweep__name="another", _storage=url)


def test_a_broken_resolved_file_is_named_and_can_be_written_anew(tmp_path: Path) -> None:
    sweep(tmp_path, sweep__max_runs=1)
    path = tmp_path / "resolved.json"
    path.write_text("")
    for read in (lambda: open_status(str(tmp_path)), lambda: sweep(tmp_path, sweep__max_runs=1)):
        with pytest.raises(StorageError, match=r"resolved\.json is not valid JSON.*delete it"):
            read()
    path.unlink()
    sweep(tmp_path, sweep__max_runs=1)
    assert open_status(str(tmp_path))["name"] == "toy"


def test_resolved_keeps_versions_and_no_password(tmp_path: Path) -> None:
    sweep(tmp_path, sweep__max_runs=1)
    document = json.loads((tmp_path / "resolved.json").read_text())
    assert document["versions"]["optuna"]
    assert parse_recipe(document["recipe"]) == parse_recipe(toy_recipe(sweep__max_runs=1))

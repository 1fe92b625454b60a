"""Runs that a worker trains as one program, each asked for and told alone: real training."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from bayeslr.loop import worker as worker_module
from bayeslr.loop.worker import Due, Stop, Worker
from bayeslr.runner_protocol import RECORDS_FILE, SPEC_FILE, STOP_FILE, Study, Trial
from bayeslr.space import Candidate, candidates
from bayeslr.specs import Recipe, RunSpec, parse_recipe
from bayeslr_runners.moe import MoeRunner
from bayeslr_runners.study import open_study
from tests.fakes import finished_runs, toy_recipe, write_recipe
from tests.runners.stopping import train_stopped
from tests.runners.test_moe_train import OPTIONS, SHAPE

pytestmark = pytest.mark.usefixtures("one_thread")

SHORT, LONG = 6400, 12_800
RECIPE: dict[str, Any] = {
    "sweep__runner": "moe", "sweep__budget_flops": 1e12, "space__tokens": [SHORT, LONG],
    "space__batch_tokens": [256], "space__shapes": [SHAPE], "run__seq_len": 32, "options": OPTIONS,
    "space__lr": {"low": 0.005, "high": 0.04, "per_octave": 1},
    "targets": [{"tokens": 51_200, "batch_tokens": 256, "shape": SHAPE}],
}  # fmt: skip
QUIET: Callable[[str], None] = lambda line: None  # noqa: E731


def opened(**changes: Any) -> Recipe:
    return parse_recipe(toy_recipe(**{**RECIPE, **changes}))


def cell(recipe: Recipe, tokens: int = SHORT, trials: Sequence[Trial] = ()) -> list[Candidate]:
    """All LRs of the cell."""
    found = candidates(recipe, MoeRunner(recipe.options), trials)
    return sorted((c for c in found if c.spec.tokens == tokens), key=lambda c: c.spec.lr)


def work(
    study: Study, runs_dir: Path, chosen: Sequence[Candidate], *, slots: int = 1,
    watch: Callable[[str], None] = QUIET,
) -> tuple[Stop, list[str]]:  # fmt: skip
    """One worker to which these runs are due, in one batch; why it stopped, its lines."""
    said: list[str] = []

    def plan(trials: Sequence[Trial], batch: int) -> list[Due] | Stop:
        asked = [trial.spec.run_id for trial in trials]
        left = [c for c in chosen if c.spec.run_id not in asked]
        due = [Due(spec=c.spec, flops=c.flops, reason="test") for c in left]
        return due or Stop(kind="done", reason="they have ended")

    def progress(line: str, *, transient: bool = False) -> None:
        said.append(line)
        watch(line)

    study.set_note("stop", None)
    runner = MoeRunner(study.recipe().options)
    return Worker(study, runner, runs_dir, slots=slots, plan=plan, progress=progress).run(), said


@pytest.fixture
def programs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Number of runs of every program that is started."""
    made: list[int] = []
    stacked, alone = MoeRunner.stack_command, MoeRunner.command

    def stack_command(self: MoeRunner, run_dirs: Sequence[Path]) -> list[str]:
        made.append(len(run_dirs))
        return stacked(self, run_dirs)

    def command(self: MoeRunner, spec: RunSpec, run_dir: Path) -> list[str]:
        made.append(1)
        return alone(self, spec, run_dir)

    monkeypatch.setattr(MoeRunner, "stack_command", stack_command)
    monkeypatch.setattr(MoeRunner, "command", command)
    return made


def rows(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / RECORDS_FILE).read_text().splitlines()]


def curve(run_dir: Path) -> list[tuple[Any, ...]]:
    return [(row["status"], row["tokens"], row["loss"]) for row in rows(run_dir)]


def states(study: Study) -> list[str]:
    return [trial.state for trial in study.trials()]


@pytest.mark.slow
def test_a_batch_is_one_program_and_so_is_what_goes_on_from_it(
    tmp_path: Path, programs: list[int]
) -> None:
    recipe = opened()
    study, alone = (open_study(None, "toy", tmp_path / name, recipe) for name in ("a", "b"))
    short = cell(recipe)[:3]
    work(study, tmp_path / "a", short)
    long = cell(recipe, LONG, study.trials())[:3]
    work(study, tmp_path / "a", long)
    assert programs == [3, 3]
    for chosen in (short, long):
        for one in chosen:
            work(alone, tmp_path / "b", [one])
    assert programs == [3, 3] + 6 * [1]
    for trial, wanted in zip(study.trials(), alone.trials(), strict=True):
        assert (trial.state, trial.flops) == ("ok", wanted.flops)
        assert trial.trunk_tokens == wanted.trunk_tokens is not None
        assert trial.spec == wanted.spec
        assert (trial.spec.continues is not None) == (trial.spec.tokens == LONG)
        assert trial.final_loss == wanted.final_loss  # to the bit
    # A run's seconds are its share of the program's.
    assert all(row["wall_s"] > 0 for trial in study.trials() for row in trial.records)


@pytest.mark.parametrize(("slots", "others", "wanted"), [(2, 0, [1, 1]), (1, 1, [1, 1])])
def test_no_run_waits_in_a_stack_for_a_slot_that_is_free(
    slots: int, others: int, wanted: list[int], tmp_path: Path, programs: list[int]
) -> None:
    """A slot of this worker, or of another one that lives."""
    study = open_study(None, "toy", tmp_path, opened())
    other = open_study(None, "toy", tmp_path, None)
    other.join(others)
    work(study, tmp_path / "runs", cell(opened())[:2], slots=slots)
    assert programs == wanted
    other.close()


def test_two_slots_share_a_batch_evenly(tmp_path: Path, programs: list[int]) -> None:
    study = open_study(None, "toy", tmp_path, opened())
    work(study, tmp_path / "runs", cell(opened())[:4], slots=2)
    assert programs == [2, 2]
    assert states(study) == ["ok"] * 4


def test_a_diverging_member_is_told_at_once_and_the_others_are_untouched(tmp_path: Path) -> None:
    recipe = opened(space__lr={"low": 1 / 64, "high": 1.0, "per_octave": 1})
    good, wild = cell(recipe, LONG)[:2], cell(recipe, LONG)[-1]
    study = open_study(None, "toy", tmp_path / "a", recipe)
    at_divergence: list[list[str]] = []

    def watch(line: str) -> None:
        if "diverged" in line:
            at_divergence.append(states(study))

    work(study, tmp_path / "a", [good[0], wild, good[1]], watch=watch)
    assert states(study) == ["ok", "diverged", "ok"]
    assert at_divergence == [["running", "diverged", "running"]]
    other = open_study(None, "toy", tmp_path / "b", recipe)
    work(other, tmp_path / "b", good)
    for one in good:
        kept, wanted = (curve(tmp_path / out / one.spec.run_id) for out in "ab")
        assert kept == wanted


def test_a_stack_holds_what_the_budget_has_room_for(tmp_path: Path, programs: list[int]) -> None:
    price = cell(opened())[0].flops
    recipe = opened(sweep__budget_flops=2.5 * price)
    study = open_study(None, "toy", tmp_path, recipe)
    stop, _ = work(study, tmp_path / "runs", cell(recipe)[:3])
    assert stop.kind == "budget"
    assert programs == [2]
    assert [(t.state, t.flops) for t in study.trials()] == [("ok", price)] * 2


def test_a_hopeless_member_is_left_out_and_the_others_do_not_notice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = opened(space__tokens=[76_800], options={**OPTIONS, "partial_evals": 8})
    chosen = cell(recipe, 76_800)[:3]
    bad = chosen[1].spec.run_id
    whole = open_study(None, "toy", tmp_path / "whole", recipe)
    work(whole, tmp_path / "whole", chosen)
    monkeypatch.setattr(worker_module, "REPORT_SECONDS", 0.0)
    monkeypatch.setattr(
        worker_module, "hopeless",
        lambda spec, rows, others, finishing: "far up" if spec.run_id == bad else "",
    )  # fmt: skip
    recipe = opened(space__tokens=[76_800], options={**OPTIONS, "partial_evals": 8},
                    sweep__early_ends=True)  # fmt: skip
    study = open_study(None, "toy", tmp_path / "early", recipe)
    work(study, tmp_path / "early", chosen)
    assert states(study) == ["ok", "pruned", "ok"]
    for one in chosen:
        kept, wanted = (curve(tmp_path / out / one.spec.run_id) for out in ("early", "whole"))
        assert kept == (wanted[: len(kept)] if one.spec.run_id == bad else wanted)
    stopped = study.trials()[1]
    assert stopped.status_reason == "stopped early: far up"
    assert 0 < stopped.flops < 0.9 * chosen[1].flops
    # What is counted as saved was not trained: the trainer has let go of it.
    assert "ok" not in {row["status"] for row in rows(tmp_path / "early" / bad)}
    assert not (tmp_path / "early" / bad / STOP_FILE).exists()
    last = max(row["tokens"] for row in stopped.records)
    assert stopped.flops == pytest.approx(chosen[1].flops * chosen[1].spec.share_at(last))


def test_orphans_of_a_stack_go_on_together_each_from_its_checkpoint(
    tmp_path: Path, programs: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = opened(options={**OPTIONS, "checkpoint_steps": 5})
    chosen = cell(recipe)[:3]
    study = open_study(None, "toy", tmp_path, recipe)
    folders = [tmp_path / "runs" / c.spec.run_id for c in chosen]
    for one, folder in zip(chosen, folders, strict=True):
        trial = study.ask(one.spec, flops=one.flops, reason="test")
        assert trial is not None
        folder.mkdir(parents=True)
        (folder / SPEC_FILE).write_text(one.spec.to_json())
        study.release(trial.number)  # its worker is gone
    train_stopped(*folders, steps=12, monkeypatch=monkeypatch)
    for folder in folders:
        saved = torch.load(folder / "checkpoint.pt", weights_only=True)
        assert saved["position"]["step"] == 10
        torch.save({**saved, "wall_s": 1000.0}, folder / "checkpoint.pt")
    _, said = work(study, tmp_path / "runs", ())
    assert programs == [3]
    assert sum("goes on (its worker" in line for line in said) == 3
    assert states(study) == ["ok"] * 3
    for trial in study.trials():  # none was begun anew
        assert trial.records[-1]["wall_s"] > 1000.0
    assert sum(t.flops for t in study.trials()) == sum(c.flops for c in chosen)


def test_what_a_killed_stack_had_completed_is_told_and_not_trained_again(
    tmp_path: Path, programs: list[int]
) -> None:
    recipe = opened()
    chosen = cell(recipe)[:3]
    done = open_study(None, "toy", tmp_path, recipe)
    work(done, tmp_path / "runs", chosen)
    study = open_study(None, "toy", tmp_path / "again", recipe)
    (tmp_path / "runs" / chosen[2].spec.run_id / RECORDS_FILE).unlink()
    programs.clear()
    work(study, tmp_path / "runs", chosen)
    assert programs == [1]
    assert states(study) == ["ok"] * 3


@pytest.mark.slow
def test_a_stack_that_is_killed_goes_on_and_at_last_one_by_one(
    tmp_path: Path, programs: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    kill = [sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"]
    killed: list[int] = []
    monkeypatch.setattr(
        MoeRunner, "stack_command", lambda self, run_dirs: killed.append(len(run_dirs)) or kill
    )
    study = open_study(None, "toy", tmp_path, opened())
    work(study, tmp_path / "runs", cell(opened())[:3])
    assert (killed, programs) == ([3, 3], [1, 1, 1])
    assert states(study) == ["ok"] * 3


@pytest.mark.slow
def test_a_member_that_breaks_the_stack_costs_the_others_nothing(
    tmp_path: Path, programs: list[int]
) -> None:
    chosen = cell(opened())[:3]
    bad = tmp_path / "runs" / chosen[1].spec.run_id
    bad.mkdir(parents=True)
    (bad / "checkpoint.pt").write_bytes(b"not a checkpoint")
    study = open_study(None, "toy", tmp_path, opened())
    work(study, tmp_path / "runs", chosen)
    assert programs == [3, 1, 1, 1]
    assert states(study) == ["ok", "failed", "ok"]
    assert "cannot be read" in study.trials()[1].status_reason


def test_a_member_that_somebody_else_took_over_is_left_to_him(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_module, "BEAT_SECONDS", 0.0)
    recipe = opened(space__tokens=[76_800])
    chosen = cell(recipe, 76_800)[:3]
    study = open_study(None, "toy", tmp_path, recipe)
    other = open_study(None, "toy", tmp_path, None)

    def watch(line: str) -> None:
        if line == "training 3 run(s)":
            study.release(1)  # as if it had been silent for too long
            assert other.adopt(1)
        if "taken it over" in line:
            other.tell(1, state="lost", flops=0.0, records=[])

    _, said = work(study, tmp_path / "runs", chosen, watch=watch)
    assert f"{chosen[1].spec.run_id}: somebody else has taken it over" in said
    assert states(study) == ["ok", "lost", "ok"]
    path = tmp_path / "runs" / chosen[1].spec.run_id / RECORDS_FILE
    assert not path.exists() or "ok" not in {row["status"] for row in rows(path.parent)}
    other.close()


def start(recipe: Path, out: Path, root: Path) -> subprocess.Popen[bytes]:
    words = [sys.executable, str(root / "tests" / "fakes.py"), "sweep", str(recipe), str(out)]
    environment = {**os.environ, "PYTHONPATH": f"{root}:{root / 'runners'}"}
    with (out.parent / f"{out.name}.log").open("ab") as log:
        return subprocess.Popen(words, env=environment, stdout=log, stderr=log)


@pytest.mark.slow
def test_a_killed_sweep_ends_as_one_that_was_left_alone(tmp_path: Path, root: Path) -> None:
    changes = {"sweep__max_runs": 4, "sweep__start_runs": 4, "space__tokens": [38_400]}
    document = toy_recipe(**{**RECIPE, **changes, "options": {**OPTIONS, "checkpoint_steps": 10}})
    recipe = write_recipe(tmp_path / "toy.toml", document)
    assert start(recipe, tmp_path / "alone", root).wait(200) == 0
    out = tmp_path / "killed"
    process = start(recipe, out, root)
    give_up = time.monotonic() + 60
    while len(list((out / "runs").glob("*/checkpoint.pt"))) < 4:
        assert time.monotonic() < give_up
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert start(recipe, out, root).wait(200) == 0
    assert "goes on" in (tmp_path / "killed.log").read_text()
    found = finished_runs(out)
    assert found == finished_runs(tmp_path / "alone")
    assert [state for state, _ in found.values()] == ["ok"] * 4

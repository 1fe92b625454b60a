"""Longer runs that go on from shorter ones, through a worker and its study, with real training."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from bayeslr.loop.planning import ask_again, table_of
from bayeslr.loop.worker import Due, Stop, Worker
from bayeslr.runner_protocol import Study, Trial
from bayeslr.runs import read_runs
from bayeslr.space import Candidate, candidates, line_of, start_design, trials_in
from bayeslr.specs import Recipe, parse_recipe
from bayeslr_runners.command import CommandRunner
from bayeslr_runners.moe import MoeRunner
from bayeslr_runners.study import open_study
from tests.fakes import TOY_ARGV, toy_recipe
from tests.runners.test_moe_train import BY_HORIZON, OPTIONS, SHAPE

pytestmark = pytest.mark.usefixtures("one_thread")

# Steps of 256 tokens: the short run's trunk ends at 20, the long one's at 40.
SHORT, LONG, TRUNK = 6400, 12_800, 5120
RECIPE: dict[str, Any] = {
    "sweep__runner": "moe", "sweep__budget_flops": 1e12, "space__tokens": [SHORT, LONG],
    "space__batch_tokens": [256], "space__shapes": [SHAPE], "run__seq_len": 32, "options": OPTIONS,
    "space__lr": {"low": 0.02, "high": 0.04, "per_octave": 1},
    "targets": [{"tokens": 51_200, "batch_tokens": 256, "shape": SHAPE}],
}  # fmt: skip


def opened(**changes: Any) -> tuple[Recipe, MoeRunner]:
    recipe = parse_recipe(toy_recipe(**{**RECIPE, **changes}))
    return recipe, MoeRunner(recipe.options)


def pick(trials: Sequence[Trial], tokens: int, **changes: Any) -> Candidate:
    """The candidate of the lowest LR that goes so far."""
    return next(p for p in candidates(*opened(**changes), trials) if p.spec.tokens == tokens)


def work(study: Study, runs_dir: Path, *chosen: Candidate) -> tuple[Stop, list[str]]:
    """One worker with folders of its own, to which these runs are due; why it stopped, its lines.

    Where they do not fit into the budget they are due again.
    """
    said: list[str] = []
    due = [Due(spec=p.spec, flops=p.flops, reason="test") for p in chosen]

    def plan(trials: Sequence[Trial], batch: int) -> list[Due] | Stop:
        asked = [t.spec.run_id for t in trials]
        left = [run for run in due if run.spec.run_id not in asked]
        return left or Stop(kind="done", reason="they have ended")

    def progress(line: str, *, transient: bool = False) -> None:
        said.append(line)

    study.set_note("stop", None)
    runner = MoeRunner(study.recipe().options)
    return Worker(study, runner, runs_dir, slots=1, plan=plan, progress=progress).run(), said


def losses(trials: Sequence[Trial], tokens: int) -> list[float]:
    return [r["loss"] for t in trials for r in t.records
            if r["tokens"] == tokens and r["status"] == "ok"]  # fmt: skip


@pytest.fixture(scope="module")
def short_run(one_thread: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep whose short run has been trained."""
    out = tmp_path_factory.mktemp("short")
    study = open_study(None, "toy", out, opened()[0])
    work(study, out / "here", pick((), SHORT))
    study.close()
    return out


@pytest.fixture
def study(short_run: Path, tmp_path: Path) -> Study:
    """A copy of it, in the test's own folder."""
    shutil.copytree(short_run, tmp_path, dirs_exist_ok=True)
    found: Study = open_study(None, "toy", tmp_path, None)
    return found


def test_a_line_that_deserves_more_goes_on_at_the_price_of_what_is_new(
    study: Study, tmp_path: Path
) -> None:
    long = pick(study.trials(), LONG)
    work(study, tmp_path / "here", long)
    first, second = trials = study.trials()
    assert (second.state, second.spec.decay_at) == ("ok", (LONG,))
    assert (second.spec.continues, second.spec.continues_at) == (first.spec.run_id, TRUNK)
    assert {r["run_id"] for r in second.records} == {long.spec.run_id}
    assert set(table_of(trials, study.recipe()).frame["run_id"]) == {t.spec.run_id for t in trials}
    # Both together cost what one run to both horizons costs, and say what it says.
    whole = pick((), LONG)
    assert first.flops + second.flops == whole.flops
    alone = open_study(None, "alone", tmp_path / "alone", study.recipe())
    work(alone, tmp_path / "alone", whole)
    for horizon in (SHORT, LONG):
        assert losses(trials, horizon) == losses(alone.trials(), horizon) != []


def test_a_worker_without_the_trunk_trains_the_whole_run_and_pays_for_it(
    study: Study, tmp_path: Path
) -> None:
    long = pick(study.trials(), LONG)
    _, said = work(study, tmp_path / "elsewhere", long)
    _, trial = study.trials()
    assert (trial.state, trial.spec.run_id) == ("ok", long.spec.run_id)
    assert trial.spec.continues is None
    assert trial.flops == MoeRunner(OPTIONS).flops(trial.spec) > long.flops
    assert f"trained whole, for the trunk of {long.spec.continues} is not in" in trial.reason
    assert any("trained whole" in line for line in said)


def test_a_whole_run_that_does_not_fit_is_not_trained_in_place_of_its_rest(
    study: Study, tmp_path: Path
) -> None:
    long = pick(study.trials(), LONG)
    budget = 1.01 * pick((), LONG).flops
    study.set_recipe(opened(sweep__budget_flops=budget)[0])
    stop, _ = work(study, tmp_path / "elsewhere", long)
    assert stop.kind == "budget"
    assert [t.state for t in study.trials()] == ["ok"]
    # Where the trunk is, there is room.
    work(study, tmp_path / "here", long)
    assert [t.spec.continues for t in study.trials()] == [None, long.spec.continues]
    assert sum(t.flops for t in study.trials()) <= budget


def test_a_run_taken_over_without_its_trunk_is_lost_and_asked_for_again_whole(
    study: Study, tmp_path: Path
) -> None:
    long = pick(study.trials(), LONG)
    asked = study.ask(long.spec, flops=long.flops, reason="test")
    assert asked is not None
    study.release(asked.number)  # its worker is gone
    work(study, tmp_path / "elsewhere")
    _, lost = study.trials()
    # Nothing recorded proves nothing spent.
    assert (lost.state, lost.flops) == ("lost", long.flops)
    assert "is not in" in lost.status_reason
    assert ask_again(study)
    work(study, tmp_path / "elsewhere")
    *_, again = study.trials()
    assert (again.state, again.spec.continues) == ("ok", None)


def test_what_can_be_gone_on_from_is_told_by_the_records(study: Study, tmp_path: Path) -> None:
    """By a sweep's own and by a table of them; never to a runner that cannot, nor another seed."""
    recipe, runner = opened()
    (short,) = trials = study.trials()
    left = candidates(recipe, runner, trials)
    assert short.trunk_tokens == TRUNK
    assert [p.spec.continues for p in left if line_of(p.spec) == line_of(short.spec)] == [
        short.spec.run_id
    ]
    table_of(trials, recipe).write(tmp_path / "runs.parquet")
    from_table = trials_in(read_runs(tmp_path / "runs.parquet"), recipe, runner)
    assert candidates(recipe, runner, from_table) == left
    assert pick(trials, LONG, run__seed=3).spec.continues is None
    counts = dict(zip(("n_active", "n_total"), runner.counts(SHAPE), strict=True))
    other, _ = opened(space__shapes=[{**SHAPE, **counts}])
    found = candidates(other, CommandRunner({"argv": TOY_ARGV}), trials)
    assert len(found) == len(left)
    assert {p.spec.continues for p in found} == {None}


def test_where_the_lr_depends_on_the_horizon_each_is_a_run_of_its_own() -> None:
    recipe, runner = opened(options={**OPTIONS, **BY_HORIZON})
    pool = candidates(recipe, runner)
    assert {p.spec.decay_at for p in pool} == {(SHORT,), (LONG,)}
    assert {p.trunk for p in pool} == {None}
    assert {p.spec.tokens for p in start_design(recipe, runner)} == {SHORT, LONG}

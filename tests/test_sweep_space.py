"""The runs that a recipe allows, and those it starts with."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from bayeslr.errors import SpecError
from bayeslr.runner_protocol import Trial, spec_row
from bayeslr.runs import make_table
from bayeslr.space import (
    candidates,
    line_of,
    random_design,
    repeats,
    start_design,
    targets_of,
    trials_in,
)
from bayeslr.specs import Recipe, RunSpec, parse_recipe
from bayeslr_runners.command import CommandRunner
from tests.fakes import toy_recipe


def opened(**changes: Any) -> tuple[Recipe, CommandRunner]:
    recipe = parse_recipe(toy_recipe(**changes))
    return recipe, CommandRunner(recipe.options)


def trial(spec: Any, state: str = "ok", *, void: bool = False) -> Trial:
    return Trial(number=0, spec=spec, state=state, flops=1.0, void=void)


def test_every_shape_horizon_batch_and_lr_is_a_candidate() -> None:
    recipe, runner = opened()
    pool = candidates(recipe, runner)
    assert len(pool) == 2 * 2 * 1 * 13
    assert len({p.spec.run_id for p in pool}) == len(pool)
    assert {p.spec.decay_at for p in pool} == {(200_000,), (200_000, 400_000)}


def test_the_price_counts_every_decay_branch() -> None:
    recipe, runner = opened()
    spec = next(p for p in candidates(recipe, runner) if p.spec.tokens == 400_000).spec
    # Stable to 320k, then 80k to 400k and, off the trunk at 160k, 40k to 200k.
    assert spec.trained_tokens == 320_000 + 80_000 + 40_000
    assert runner.flops(spec) == 6 * spec.n_active * 440_000


def test_without_wsd_each_horizon_is_a_run_of_its_own() -> None:
    recipe, runner = opened(run__schedule="cosine")
    assert {p.spec.decay_at for p in candidates(recipe, runner)} == {(200_000,), (400_000,)}


def test_what_was_measured_is_no_candidate_again() -> None:
    recipe, runner = opened()
    pool = candidates(recipe, runner)
    short = next(p for p in pool if p.spec.tokens == 200_000).spec
    left = candidates(recipe, runner, [trial(short)])
    same_line = [p.spec for p in left if line_of(p.spec) == line_of(short)]
    assert [s.decay_at for s in same_line] == [(400_000,)]


@pytest.mark.parametrize("state", ["diverged", "failed"])
def test_a_line_that_blew_up_is_not_trained_further(state: str) -> None:
    recipe, runner = opened()
    short = next(p for p in candidates(recipe, runner) if p.spec.tokens == 200_000).spec
    left = candidates(recipe, runner, [trial(short, state)])
    assert not [p for p in left if line_of(p.spec) == line_of(short)]


@pytest.mark.parametrize(
    ("state", "left"), [("diverged", [(200_000,)]), ("pruned", [(200_000,)]), ("failed", [])]
)
def test_without_wsd_a_shorter_run_may_end_well_where_a_longer_one_did_not(
    state: str, left: list[tuple[int, ...]]
) -> None:
    recipe, runner = opened(run__schedule="cosine")
    pool = [p.spec for p in candidates(recipe, runner)]
    long = next(spec for spec in pool if spec.tokens == 400_000)
    short = next(spec for spec in pool if line_of(spec) == line_of(long) and spec != long)
    for blown, expected in ((long, left), (short, [])):
        pool_left = candidates(recipe, runner, [trial(blown, state)])
        assert [p.spec.decay_at for p in pool_left if line_of(p.spec) == line_of(long)] == expected


class HorizonRunner(CommandRunner):
    """Each horizon has an LR of its own from the start on."""

    def depends_on_horizon(self, spec: RunSpec) -> bool:
        return True


@pytest.mark.parametrize("state", ["diverged", "failed", "pruned"])
def test_where_each_horizon_has_its_lr_one_that_blew_up_leaves_the_others(state: str) -> None:
    recipe, _ = opened()
    runner = HorizonRunner(recipe.options)
    short = next(p for p in candidates(recipe, runner) if p.spec.tokens == 200_000).spec
    table = make_table(rows(short, (90_000, state)))
    for trials in ([trial(short, state)], trials_in(table, recipe, runner)):
        left = [p.spec for p in candidates(recipe, runner, trials)]
        same_line = [s.decay_at for s in left if line_of(s) == line_of(short)]
        assert same_line == [(400_000,)]


def test_a_refused_trial_measures_nothing() -> None:
    recipe, runner = opened()
    pool = candidates(recipe, runner)
    assert candidates(recipe, runner, [trial(pool[0].spec, "pruned", void=True)]) == pool


def test_a_repeat_is_the_longest_good_run_with_the_next_seed() -> None:
    recipe, runner = opened(sweep__repeats=True)
    short, long = (
        next(p.spec for p in candidates(recipe, runner) if p.spec.tokens == tokens)
        for tokens in (200_000, 400_000)
    )
    assert line_of(short) == line_of(long)
    other = next(p.spec for p in candidates(recipe, runner) if line_of(p.spec) != line_of(long))
    (again,) = repeats(recipe, runner, [trial(long), trial(short), trial(other, "diverged")])
    assert again.repeat
    expected = dataclasses.replace(long, run_id=again.spec.run_id, seed=long.seed + 1)
    assert again.spec == expected
    assert again.spec.run_id != long.run_id
    # One that is still running is not asked for twice; one that was refused counts for nothing.
    (third,) = repeats(recipe, runner, [trial(long), trial(again.spec, "running")])
    assert third.spec.seed == long.seed + 2
    assert repeats(recipe, runner, [trial(long, void=True)]) == []


def rows(spec: RunSpec, *ends: tuple[int, str], **more: Any) -> list[dict[str, Any]]:
    """Rows of a run as a table has them: (tokens, status) each."""
    return [
        {**spec_row(spec), "tokens": tokens, "status": status,
         "planned_tokens": tokens if status == "ok" else spec.tokens,
         "loss": 3.0 if status in ("ok", "partial", "pruned") else None, **more}
        for tokens, status in ends
    ]  # fmt: skip


def test_runs_of_a_table_are_the_trials_of_a_sweep() -> None:
    """Whatever a sweep's own trials close or leave open, the table of their rows does too."""
    recipe, runner = opened()
    long = [p.spec for p in candidates(recipe, runner) if p.spec.tokens == 400_000]
    ends = {
        "ok": [(200_000, "ok"), (400_000, "ok")],
        "diverged": [(200_000, "ok"), (230_000, "diverged")],
        "pruned": [(90_000, "partial"), (120_000, "pruned")],
        "failed": [(200_000, "ok"), (200_000, "failed")],
    }
    made = dict(zip(ends, long, strict=False))
    table = make_table([row for state, s in made.items() for row in rows(s, *ends[state])])
    trials = [trial(spec, state) for state, spec in made.items()]
    found = trials_in(table, recipe, runner)
    assert [(t.spec.run_id, t.state) for t in found] == [(s.run_id, k) for k, s in made.items()]
    assert candidates(recipe, runner, found) == candidates(recipe, runner, trials)
    assert repeats(recipe, runner, found) == repeats(recipe, runner, trials)


def test_a_table_closes_what_it_measured_and_nothing_else() -> None:
    recipe, runner = opened()
    pool = candidates(recipe, runner)
    short, *_ = [p.spec for p in pool if p.spec.tokens == 200_000]
    table = make_table([
        # As people write it: a whole batch short of the horizon, the LR in three figures.
        *rows(short, (200_000 - 2048, "ok"), lr=float(f"{short.lr:.3g}"), planned_tokens=None),
        *rows(pool[2].spec, (400_000, "lost")),
        *rows(pool[4].spec, (90_000, "partial")),
        *rows(pool[6].spec, (200_000, "diverged"), family="another"),
        *rows(pool[8].spec, (200_000, "ok"), lr=1.1 * pool[8].spec.lr),
    ])  # fmt: skip
    found = trials_in(table, recipe, runner)
    assert [(t.spec.decay_at, t.state) for t in found] == [((200_000,), "ok")]
    left = [p.spec for p in candidates(recipe, runner, found)]
    assert len(left) == len(pool) - 1
    assert [s.decay_at for s in left if line_of(s) == line_of(short)] == [(400_000,)]


def test_a_run_that_was_made_again_counts_as_what_it_came_to() -> None:
    recipe, runner = opened()
    spec = next(p.spec for p in candidates(recipe, runner) if p.spec.tokens == 400_000)
    both = [(1, "failed"), (200_000, "ok"), (400_000, "ok")]
    (found,) = trials_in(make_table(rows(spec, *both)), recipe, runner)
    assert (found.state, found.spec.decay_at) == ("ok", (200_000, 400_000))


def test_recorded_runs_have_no_other_seeds() -> None:
    with pytest.raises(SpecError, match="holds no other seeds"):
        opened(sweep__repeats=True, sweep__runner="table")


def test_the_start_takes_the_cheapest_shapes_and_spreads_the_lrs() -> None:
    recipe, runner = opened(sweep__start_runs=6)
    start = start_design(recipe, runner)
    assert [p.spec.shape["name"] for p in start] == ["small"] * 3 + ["medium"] * 3
    assert all(p.spec.decay_at == (200_000, 400_000) for p in start)
    for cell in (start[:3], start[3:]):
        low, middle, high = sorted(p.spec.lr for p in cell)
        assert cell[0].spec.lr == middle
        assert low < 4e-3 < 2e-2 < high


def test_the_start_depends_on_the_recipe_alone() -> None:
    recipe, runner = opened()
    assert start_design(recipe, runner) == start_design(recipe, runner)


@pytest.mark.parametrize("start_runs", [1, 2, 3, 4, 5, 7, 40])
def test_any_number_of_start_runs_is_kept_to_where_the_space_allows(start_runs: int) -> None:
    recipe, runner = opened(sweep__start_runs=start_runs)
    start = start_design(recipe, runner)
    assert len({p.spec.run_id for p in start}) == len(start) == min(start_runs, 26)


def test_random_draws_are_keyed_by_their_number() -> None:
    recipe, runner = opened()
    pool = candidates(recipe, runner)
    first = random_design(recipe, pool, num_runs=3, budget_flops=1e15, first=0)
    again = random_design(recipe, pool, num_runs=3, budget_flops=1e15, first=0)
    other = random_design(recipe, pool, num_runs=3, budget_flops=1e15, first=3)
    reseeded = dataclasses.replace(recipe, seed=2)
    assert first == again
    assert first != other
    assert first != random_design(reseeded, pool, num_runs=3, budget_flops=1e15, first=0)


def test_random_draws_stay_within_the_budget() -> None:
    recipe, runner = opened()
    pool = candidates(recipe, runner)
    drawn = random_design(recipe, pool, num_runs=50, budget_flops=2e12, first=0)
    assert 0 < sum(p.flops for p in drawn) <= 2e12
    assert len({line_of(p.spec) for p in drawn}) == len(drawn)


def test_a_target_with_a_shape_gets_its_counts_from_the_runner() -> None:
    recipe, runner = opened()
    (target,) = targets_of(recipe, runner)
    assert (target.n_active, target.n_total, target.tokens) == (1e6, 2e6, 1e6)
    assert (target.family, target.seq_len) == ("toy", 64)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ({"n_active": 1e6, "tokens": 1e6, "batch_tokens": 4096}, "n_total"),
        ({"n_active": "much", "n_total": 1, "tokens": 1, "batch_tokens": 1}, "n_active must be"),
        ({"n_active": 1, "n_total": 1, "tokens": 1, "batch_tokens": 1, "size": 3}, "size"),
    ],
)
def test_a_bad_target_is_named(target: dict[str, Any], message: str) -> None:
    recipe, runner = opened(targets=[target])
    with pytest.raises(SpecError, match=message):
        targets_of(recipe, runner)


def test_a_bad_value_under_run_is_named() -> None:
    recipe, runner = opened(run={})
    with pytest.raises(SpecError, match="seq_len"):
        candidates(recipe, runner)

"""Trains what a plan asks for, in a study of its own, and goes on where it was killed."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

from bayeslr.errors import DataError
from bayeslr.loop.planning import ask_again, failures_of
from bayeslr.loop.worker import Due, Plan, Progress, Stop, Worker
from bayeslr.runner_protocol import Runner, Study, Trial, find_entry_point
from bayeslr.specs import Recipe


def train(
    recipe: Recipe,
    runner: Runner,
    folder: Path,
    plan: Plan,
    *,
    retry: bool,
    progress: Progress,
    wanted: Collection[str] | None = None,
) -> list[Trial]:
    """Ended trials of a plan, in a journal in ``folder``; runs lie in ``folder/runs``.

    recipe: names the study and bounds what it may spend. retry: ask again for failed and lost runs.
    wanted: IDs of the runs that the budget is for; what earlier plans spent on others comes on top.
    Raises: DataError if the trainer never works.
    """
    study: Study = find_entry_point("bayeslr.studies", "optuna")(None, recipe.name, folder, recipe)

    def guarded(trials: Sequence[Trial], batch: int) -> list[Due] | Stop:
        return failures_of(trials) or plan(trials, batch)

    try:
        if wanted is not None:
            others = math.fsum(t.flops for t in study.trials() if t.spec.run_id not in wanted)
            recipe = replace(recipe, budget_flops=recipe.budget_flops + others)
        study.set_recipe(recipe)
        study.set_note("stop", None)  # the plan is asked again: more seeds may be wanted by now
        if retry:
            ask_again(study)
        stop = Worker(
            study, runner, folder / "runs", slots=recipe.workers, plan=guarded, progress=progress
        ).run()
        if stop.kind == "failures":
            raise DataError(f"{recipe.name}: {stop.reason}")
        return [trial for trial in study.trials() if not trial.void]
    finally:
        study.close()


def all_of(runs: Sequence[Due]) -> Plan:
    """Plan that asks for each of some runs once."""

    def plan(trials: Sequence[Trial], batch: int) -> list[Due] | Stop:
        asked = {trial.spec.run_id for trial in trials}
        missing = [run for run in runs if run.spec.run_id not in asked]
        return missing or Stop(kind="done", reason="every run has been made")

    return plan

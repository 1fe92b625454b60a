"""Which runs of a sweep come next, and when to stop."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, final

import numpy as np

from bayeslr.designs import DESIGNS, Menu, slices_from_cheapest
from bayeslr.errors import BayeslrError, DataError, UntrustworthyFit
from bayeslr.loop.worker import Due, Progress, Stop, due_entry, due_runs
from bayeslr.runner_protocol import Runner, Study, Trial
from bayeslr.runs import RunTable, make_table
from bayeslr.space import (
    Candidate,
    candidates,
    cell_of,
    grid,
    random_design,
    repeats,
    start_design,
    targets_of,
    weights_of,
)
from bayeslr.specs import Recipe, RunSpec
from bayeslr.units import format_flops, format_interval, format_lr, format_quantity

if TYPE_CHECKING:
    pass

FAILED_STATES = ("failed", "lost")


def first_runs(recipe: Recipe, runner: Runner) -> list[Candidate]:
    """The runs that a sweep begins with, as far as its budget and ``max_runs`` go. The classical
    design starts by itself.
    """
    if recipe.strategy == "classical":
        start = design_step(recipe, runner, (), recipe.budget_flops)
    else:
        start = start_design(recipe, runner)
    left, paid = recipe.budget_flops, []
    for priced in start[: recipe.max_runs]:
        if priced.flops <= left:
            left -= priced.flops
            paid.append(priced)
    return paid


def design_step(
    recipe: Recipe, runner: Runner, trials: Sequence[Trial], left_flops: float
) -> list[Candidate]:
    """Next step of the recipe's design, given the runs so far; empty where it has ended.

    Where horizons share a trunk the runs are those to the longest, which measure the shorter ones.
    """
    pool = grid(recipe, runner)
    specs = [priced.spec for priced in pool]
    flops = np.array([priced.flops for priced in pool])
    losses = {
        t.spec.run_id: math.inf if t.final_loss is None else t.final_loss
        for t in trials
        if not t.void
    }
    cells = {key: number for number, key in enumerate(dict.fromkeys(map(cell_of, specs)))}
    names = ("n_active", "n_total", "tokens", "batch_tokens")
    menu = Menu(
        **{name: np.array([float(getattr(spec, name)) for spec in specs]) for name in names},
        log_lr=np.log([spec.lr for spec in specs]),
        flops=flops,
        slice_of_run=slices_from_cheapest(np.array([cells[cell_of(s)] for s in specs]), flops),
        loss=np.array([losses.get(spec.run_id, math.nan) for spec in specs]),
        left_flops=left_flops,
    )
    return [pool[i] for i in DESIGNS[recipe.strategy](menu)]


@final
class Planner:
    """Plans batch after batch; a plan is a function of the recipe and the runs that have ended."""

    def __init__(self, study: Study, runner: Runner, progress: Progress) -> None:
        self._study = study
        self._runner = runner
        self._progress = progress

    def __call__(self, trials: Sequence[Trial], batch: int) -> list[Due] | Stop:
        """Runs of a batch, or why there is none."""
        recipe = self._study.recipe()
        if stop := failures_of(trials):
            return stop
        num_runs = max(recipe.batch_runs, recipe.workers) if batch else recipe.start_runs
        if recipe.max_runs is not None:
            num_runs = min(num_runs, recipe.max_runs - len(trials))
            if num_runs <= 0:
                return Stop(kind="max_runs", reason=f"{len(trials)} runs, as max_runs says")
        left = recipe.budget_flops - math.fsum(t.flops for t in trials)
        pool = candidates(recipe, self._runner, trials)
        if recipe.repeats and recipe.strategy == "bayes":
            pool += repeats(recipe, self._runner, trials)
        affordable = [p for p in pool if p.flops <= left]
        if not pool:
            return Stop(kind="done", reason="every run of the space has been made")
        if not affordable:
            cheapest = min(p.flops for p in pool)
            return Stop(
                kind="budget",
                reason=f"{format_quantity(left)} of "
                f"{format_flops(recipe.budget_flops, recipe.flops_per_second)} are left, and the "
                f"cheapest run that is not made yet costs {format_quantity(cheapest)}",
            )
        if recipe.strategy in DESIGNS and (batch or recipe.strategy == "classical"):
            limit = None if recipe.max_runs is None else recipe.max_runs - len(trials)
            step = design_step(recipe, self._runner, trials, left)[:limit]
            if not step:
                return Stop(kind="done", reason=f"the {recipe.strategy} design has ended")
            return _due(step, f"{recipe.strategy}: the next slice")
        if batch == 0:
            why = "start: the cheapest cells, LRs spread over their range"
            return _due(start_design(recipe, self._runner)[:num_runs], why)
        if recipe.strategy == "random":
            why = "drawn at random"
        else:
            try:
                return self._best(recipe, trials, affordable, num_runs, left, batch)
            except BayeslrError as error:
                why = f"drawn at random, for the runs so far cannot be fitted: {error}"
                self._progress(why)
        new = [p for p in affordable if not p.repeat]
        if not new:
            reason = "every run of the space that the budget has room for has been made"
            return Stop(kind="done", reason=f"{reason}, and a repeat is not {why}")
        drawn = random_design(recipe, new, num_runs=num_runs, budget_flops=left, first=len(trials))
        return _due(drawn, why)

    def _best(
        self,
        recipe: Recipe,
        trials: Sequence[Trial],
        pool: Sequence[Candidate],
        num_runs: int,
        budget_flops: float,
        batch: int,
    ) -> list[Due] | Stop:
        # JAX takes a second to load: a worker that never plans never pays it.
        from bayeslr.acquire import choose
        from bayeslr.predict import predict
        from bayeslr.sampling import refit

        targets = targets_of(recipe, self._runner)
        posterior = refit(table_of(trials, recipe), recipe.prior, seed=recipe.seed)
        if not posterior.trustworthy:
            raise UntrustworthyFit(str(posterior.info["verdict"]))
        predictions = predict(posterior, targets)
        self._study.set_note(
            "prediction",
            {"batch": batch, "runs": len(trials), "targets": predictions.to_dict("records")},
        )
        self._progress(prediction_line(predictions.to_dict("records")[0], len(trials)))
        plan = choose(
            posterior,
            pool,
            targets,
            num_runs=num_runs,
            budget_flops=budget_flops,
            seed=recipe.seed + batch,
            only_paying=recipe.stop_rule,
            weights=weights_of(recipe),
            price_ends=recipe.early_ends,
        )
        if not plan.proposals:
            return Stop(kind="rule", reason=plan.stop_reason)
        return [
            Due(spec=p.spec, flops=p.flops, reason=p.reason, finishing=p.finishing)
            for p in plan.proposals
        ]


def rows_of(trials: Sequence[Trial]) -> list[dict[str, Any]]:
    """Records of the ended trials, in an order that does not depend on when they ended."""
    rows = [dict(row) for t in trials if t.finished for row in t.records]
    return sorted(rows, key=lambda r: (r["run_id"], r["tokens"] or 0.0, r["status"]))


def table_of(trials: Sequence[Trial], recipe: Recipe) -> RunTable:
    """Run table of the ended trials, in the order of `rows_of`. Raises: DataError without any."""
    rows = rows_of(trials)
    if not rows:
        raise DataError(f"sweep {recipe.name}: no run has ended yet")
    return make_table(rows, source=f"sweep {recipe.name}")


def prediction_line(row: Mapping[Hashable, Any], num_runs: int) -> str:
    """What is believed of a target after so many runs, in one line."""
    return (
        f"after {num_runs} runs: {row['target_id']} lr {format_lr(row['lr'])} "
        f"({format_interval(row['lr_q05'], row['lr_q95'])})"
    )


def again(trials: Sequence[Trial]) -> list[Due]:
    """Runs that failed or were lost, to be asked for once more."""
    last = {t.spec.run_id: t for t in trials if not t.void}
    times = [t.spec.run_id for t in trials if not t.void]
    return [
        Due(
            spec=t.spec,
            flops=t.flops,
            reason=f"again, for it was {t.state}: {t.status_reason}",
            nth=times.count(t.spec.run_id) + 1,
        )
        for t in last.values()
        if t.state in FAILED_STATES
    ]


def came_to_nothing(trials: Sequence[Trial]) -> bool:
    """Whether there were runs and each of them failed or was lost: nothing rests on them then."""
    states = {t.state for t in trials if not t.void}
    return bool(states) and states <= set(FAILED_STATES)


def ask_again(study: Study, mended: Mapping[str, RunSpec] = MappingProxyType({})) -> bool:
    """Put the runs that failed or were lost into a batch of their own; whether there were any.

    mended: by run_id, what a run is from now on.
    """
    trials = study.trials()
    due = again(trials)
    if not due:
        return False
    number = 0
    while study.note(f"batch:{number}") is not None:
        number += 1
    due += due_runs(study, trials, number - 1)
    due = [replace(run, spec=mended.get(run.spec.run_id, run.spec)) for run in due]
    study.set_note(f"batch:{number}", {"runs": [due_entry(run) for run in due]})
    return True


def failures_of(trials: Sequence[Trial]) -> Stop | None:
    """A trainer that never works is not paid for any longer."""
    recent = trials[-3:]
    if len(recent) < 3 or any(t.state not in FAILED_STATES for t in recent):
        return None
    return Stop(
        kind="failures",
        reason=f"the last {len(recent)} runs came to nothing; {recent[-1].spec.run_id}: "
        f"{recent[-1].status_reason}. Mend the cause and repeat the command with --retry",
    )


def _due(priced: Sequence[Candidate], why: str) -> list[Due]:
    return [Due(spec=p.spec, flops=p.flops, reason=why) for p in priced]

"""Proxies of the transfer paradigm: which runs come next, as functions of the runs that have ended.

Every way of using the transferred LR begins with the same runs, the LR grid on the base shape with
one seed, and is charged for them. What is left of its budget goes to more seeds around the best LR
(`SeedsPlan`), to multipliers of module groups (`ModulesPlan`) or to larger shapes (`RungsPlan`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, final

from bayeslr.compare.recipe import CompareRecipe, Modules
from bayeslr.errors import DataError, SpecError
from bayeslr.features import build_design
from bayeslr.loop.planning import table_of
from bayeslr.loop.worker import Due, Stop
from bayeslr.models.two_stage import vertices
from bayeslr.runner_protocol import Runner, Trial
from bayeslr.space import run_spec
from bayeslr.specs import Recipe
from bayeslr.units import format_quantity

NEAR_OCTAVES = 1.01
"""More seeds go to LRs within an octave of the best: beyond, the valley's side says little."""

RUNG_MULTIPLES = (1.0, 0.5, 2.0, 2**-0.5, 2**0.5)
"""LRs on a rung, times the base's best, in the order in which they are bought."""

Multipliers = Mapping[str, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class BaseResult:
    """What the LR grid on the base shape showed: the bottom of its valley, and what it cost."""

    lr: float
    flops: float
    at_edge: bool


def due_run(
    recipe: Recipe,
    runner: Runner,
    shape: Mapping[str, Any],
    *,
    lr: float,
    tokens: int,
    batch_tokens: int,
    seed: int,
    reason: str,
    multipliers: Multipliers | None = None,
    family: str | None = None,
) -> Due:
    """One run, its LR multipliers in the options; with any, a family of its own.

    Runs of other multipliers measure another valley: they must never share a slice.
    """
    options, prefix = dict(recipe.options), recipe.name
    family = family or recipe.family
    changed = {group: value for group, value in (multipliers or {}).items() if value != 1}
    if changed:
        options["lr_multipliers"] = {**options.get("lr_multipliers", {}), **changed}
        label = " ".join(f"{group} x{value:.4g}" for group, value in sorted(changed.items()))
        family = f"{family}, {label}"
        prefix = f"{prefix}-{label.replace(' ', '_')}"
    varied = replace(recipe, family=family, run={**recipe.run, "seed": seed}, options=options)
    spec = run_spec(
        varied, runner, shape, lr=lr, batch_tokens=batch_tokens, decay_at=[tokens], prefix=prefix
    )
    return Due(spec=spec, flops=runner.flops(spec), reason=reason)


def grid_runs(recipe: CompareRecipe, runner: Runner) -> list[Due]:
    """The LR grid on the base shape, one seed. Raises: SpecError if it exceeds the budget."""
    transfer = recipe.transfer
    runs = [
        _on_shape(
            transfer, runner, transfer.space.shapes[0], lr, recipe.seed, "LR grid, base shape"
        )
        for lr in transfer.space.lr.values()
    ]
    cost = math.fsum(run.flops for run in runs)
    if cost > recipe.proxy_flops:
        raise SpecError(
            f"recipe {recipe.name}: proxy_flops ({format_quantity(recipe.proxy_flops)}) do not "
            f"cover the LR grid on the base shape ({len(runs)} runs, {format_quantity(cost)} FLOPs)"
        )
    return runs


def base_result(recipe: CompareRecipe, trials: Sequence[Trial]) -> BaseResult:
    """Bottom of the valley of the base shape, first seed: a parabola, or the lowest loss.

    The lowest loss stands where the parabola's bottom lies outside the runs around it.
    Raises: DataError if no run on the base shape ended.
    """
    grid = _first_seed(recipe, trials)
    ended = {t.spec.lr: loss for t in grid if (loss := t.final_loss) is not None}
    if not ended:
        raise DataError(
            f"comparison {recipe.name}: no run on the base shape came to anything; see the logs of "
            "its runs, mend the cause, repeat with --retry"
        )
    vertex, _, _ = vertices(build_design(table_of(grid, recipe.transfer)))
    lowest = min(ended, key=lambda lr: ended[lr])
    at_edge = lowest in (min(ended), max(t.spec.lr for t in grid))
    lr = float(math.exp(vertex[0])) if math.isfinite(vertex[0]) else lowest
    return BaseResult(lr=lr, flops=math.fsum(t.flops for t in grid), at_edge=at_edge)


@final
class SeedsPlan:
    """The grid, then a further seed at a time around the best LR, until the budget is spent.

    The best is that of the grid's seed throughout: seeds shift all LRs alike, so means over
    different seeds do not compare.
    """

    def __init__(self, recipe: CompareRecipe, runner: Runner) -> None:
        self._recipe, self._runner = recipe, runner

    def __call__(self, trials: Sequence[Trial], batch: int) -> list[Due] | Stop:
        """Runs of a batch, or why there is none."""
        recipe = self._recipe
        if batch == 0:
            return grid_runs(recipe, self._runner)
        left = recipe.proxy_flops - math.fsum(t.flops for t in trials)
        best = base_result(recipe, trials).lr
        grid = {t.spec.lr for t in _first_seed(recipe, trials) if t.final_loss is not None}
        near = [lr for lr in grid if abs(math.log2(lr / best)) <= NEAR_OCTAVES]
        seed = recipe.seed + batch
        runs = [
            _on_shape(
                recipe.transfer, self._runner, recipe.transfer.space.shapes[0], lr, seed,
                f"seed {seed} near the best LR of the grid",
            )
            for lr in sorted(near, key=lambda lr: abs(math.log(lr / best)))
        ]  # fmt: skip
        return _affordable(runs, left)


@final
class ModulesPlan:
    """Multipliers of module groups, one group after the other, by the loss of the same seed.

    A batch is the factors of one group on top of the best so far. The first batch is the run that
    all of them are measured against, at the base's best LR with all multipliers 1. The seed is not
    that of the grid, whose luck chose the LR.
    """

    def __init__(self, recipe: CompareRecipe, runner: Runner, modules: Modules, base: BaseResult):
        self._recipe, self._runner, self._modules, self._base = recipe, runner, modules, base

    def __call__(self, trials: Sequence[Trial], batch: int) -> list[Due] | Stop:
        """Runs of a batch, or why there is none."""
        left = self._recipe.proxy_flops - self._base.flops - math.fsum(t.flops for t in trials)
        if batch == 0:
            return _affordable([self._run({}, "all multipliers 1")], left)
        modules = self._modules
        if batch > modules.rounds * len(modules.groups):
            return Stop(kind="done", reason="every module group has been tried")
        group = modules.groups[(batch - 1) % len(modules.groups)]
        current = best_multipliers(trials)
        asked = {_key(multipliers_of(t)) for t in trials}
        tried = [{**current, group: current.get(group, 1.0) * f} for f in modules.factors]
        runs = [
            self._run(t, f"LR of {group} times {t[group]:.4g}")
            for t in tried
            if _key(t) not in asked
        ]
        return _affordable(runs, left) if runs else self(trials, batch + 1)

    def _run(self, multipliers: Multipliers, reason: str) -> Due:
        recipe = self._recipe
        return _on_shape(
            recipe.transfer, self._runner, recipe.transfer.space.shapes[0], self._base.lr,
            recipe.seed + 1, reason, multipliers,
        )  # fmt: skip


def best_multipliers(trials: Sequence[Trial]) -> dict[str, float]:
    """Multipliers of the run with the lowest loss, without those that are 1."""
    measured = [(loss, i) for i, t in enumerate(trials) if (loss := t.final_loss) is not None]
    return multipliers_of(trials[min(measured)[1]]) if measured else {}


def multipliers_of(trial: Trial) -> dict[str, float]:
    """LR multipliers that a run was trained with."""
    return dict(trial.spec.options.get("lr_multipliers", {}))


@final
class RungsPlan:
    """Larger shapes at LRs around the base's best, seed after seed, until the budget is spent."""

    def __init__(self, recipe: CompareRecipe, runner: Runner, base: BaseResult) -> None:
        self._recipe, self._runner, self._base = recipe, runner, base

    def __call__(self, trials: Sequence[Trial], batch: int) -> list[Due] | Stop:
        """Runs of a batch, or why there is none."""
        recipe = self._recipe
        left = recipe.proxy_flops - self._base.flops - math.fsum(t.flops for t in trials)
        runs = [
            _on_shape(
                recipe.transfer, self._runner, shape, self._base.lr * multiple,
                recipe.seed + batch, f"rung at {multiple:.3g} times the base's best LR",
            )
            for multiple in RUNG_MULTIPLES
            for shape in recipe.rungs
        ]  # fmt: skip
        return _affordable(runs, left)


def _on_shape(
    recipe: Recipe, runner: Runner, shape: Mapping[str, Any], lr: float, seed: int, reason: str,
    multipliers: Multipliers | None = None,
) -> Due:  # fmt: skip
    return due_run(
        recipe, runner, shape, lr=lr, tokens=recipe.space.tokens[0],
        batch_tokens=recipe.space.batch_tokens[0], seed=seed, reason=reason,
        multipliers=multipliers,
    )  # fmt: skip


def _affordable(runs: Sequence[Due], left: float) -> list[Due] | Stop:
    """The first runs that fit into what is left; a stop if not even the first does."""
    chosen: list[Due] = []
    for run in runs:
        if run.flops > left:
            break
        chosen.append(run)
        left -= run.flops
    if chosen:
        return chosen
    return Stop(
        kind="budget", reason=f"{format_quantity(max(left, 0))} FLOPs are left, less than a run"
    )


def _first_seed(recipe: CompareRecipe, trials: Sequence[Trial]) -> list[Trial]:
    return [t for t in trials if not t.void and t.spec.seed == recipe.seed]


def _key(multipliers: Multipliers) -> tuple[tuple[str, float], ...]:
    return tuple(sorted((g, round(m, 9)) for g, m in multipliers.items() if m != 1))
